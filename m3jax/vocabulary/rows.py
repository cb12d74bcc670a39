"""Which row of which model each row of a united vocabulary is, and the views that show models so.

A model's own row where it has the token. Where it lacks it: what the recipe says, else the base's row, else that of
the one model that has it, else the mean of those that have it; of a token without a row anywhere, the mean of all its
rows. A row without a token (padding) is the model's own where that is padding there too, else the mean of all its rows.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from m3jax.anatomy import Anatomy
from m3jax.checkpoints import Checkpoint
from m3jax.checkpoints.views_gathered import Gathering, Lent, Rows, RowsOf, gathered
from m3jax.errors import M3Error
from m3jax.recipe.tokenizers import TokenizerSettings, TokenSource
from m3jax.vocabulary.uniting import Speaker, United


class Model(NamedTuple):
    """An opened model.

    Attributes:
        name: As the recipe calls it.
        checkpoint: Its tensors, under the names that all models have.
        anatomy: What they are.
    """

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy


class Borrowed(NamedTuple):
    """Rows of one model that others lend.

    Attributes:
        at: Which rows of the output.
        lenders: Of each lender its position and its rows, None for the mean of all; nobody for zeros.
    """

    at: Rows
    lenders: tuple[tuple[int, Rows | None], ...]


class RowPlan(NamedTuple):
    """Where the rows of one model are.

    Attributes:
        own: For each row of the output, which of its own it is; -1 where it is borrowed.
        borrowed: Those that are.
    """

    own: Rows
    borrowed: tuple[Borrowed, ...]


# --- Deciding --------------------------------------------------------------------------------------------


def word_tensors(model: Model) -> dict[str, int]:
    """The tensors of a model that have an axis of tokens, and which axis."""
    parts = model.anatomy.parts.items()
    return {
        name: part.vocabulary_axis
        for name, part in parts
        if part.vocabulary_axis is not None and name in model.checkpoint.tensors
    }


def count_rows(model: Model) -> int | None:
    """How many rows a model has for tokens; None where it has no embedding that is known as one.

    Raises:
        M3Error: Its tensors have different numbers of them.
    """
    axes, tensors = word_tensors(model), model.checkpoint.tensors
    counts = {name: tensors[name].shape[axis] for name, axis in axes.items()}
    for first in (model.anatomy.embedding, model.anatomy.head, *counts):
        if first in counts:
            return counts[first]
    return None


def plan_rows(
    united: United, counts: Sequence[int], base: int | None, settings: TokenizerSettings | None
) -> list[RowPlan]:
    """Where every row of every model is.

    Args:
        united: The vocabulary.
        counts: How many rows each model has.
        base: The position of the base; None without.
        settings: What the recipe says of tokens and padding.

    Raises:
        M3Error: A model has more tokens than rows; the recipe names a token, or a row, that is none.
    """
    for position, speaker in enumerate(united.speakers):
        _check_rows(speaker, united.tokens_of(position), counts[position])
    size = _size(united, counts[united.leader], settings)
    ids = np.fromiter(united.tokens.values(), np.int64, len(united.tokens))
    named = np.zeros(size, np.bool_)
    named[ids] = True
    own = [_own_rows(united, position, count, named, ids) for position, count in enumerate(counts)]
    asked = _asked(united, counts, settings)
    return [_plan_of(position, own, named, base, asked) for position in range(len(own))]


def _size(united: United, count: int, settings: TokenizerSettings | None) -> int:
    """How many rows an output has: as many as the leader, or as the tokens need."""
    needed = 1 + max(united.tokens.values(), default=-1)
    if settings is not None and settings.pad_to_multiple_of is not None:
        multiple = settings.pad_to_multiple_of
        return -(-needed // multiple) * multiple
    return max(needed, count)


def _check_rows(speaker: Speaker, tokens: Mapping[str, int], count: int) -> None:
    """Raise M3Error for tokens beyond the rows: a special one may have been added without a row, no other."""
    told = speaker.vocabulary
    special = {token for token, how in (told.added or {}).items() if how.special} if told is not None else set()
    beyond = [token for token, number in tokens.items() if number >= count and token not in special]
    if beyond:
        last = max(beyond, key=tokens.__getitem__)
        raise M3Error(
            f"{speaker.name}: its tokenizer has more tokens than its embedding has rows: {last!r} is number"
            f" {tokens[last]}, and there are {count} rows: take the tokenizer that belongs to these weights"
        )


def notes_on_rows(united: United, counts: Sequence[int]) -> tuple[str, ...]:
    """What a reader of the recipe should know of special tokens that were added to a tokenizer without a row."""
    notes = []
    for position, speaker in enumerate(united.speakers):
        tokens = united.tokens_of(position)
        beyond = [token for token in united.tokens if tokens.get(token, -1) >= counts[position]]
        if beyond:
            more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            notes.append(f"{speaker.name}: {beyond[0]!r}{more} has no row there, and gets one as where it is lacking")
    return tuple(notes)


def _own_rows(united: United, position: int, count: int, named: np.ndarray, ids: Rows) -> Rows:
    """For each row of the output, which of a model's own it is; -1 where it is none."""
    tokens = united.tokens_of(position)
    rows = np.fromiter((tokens.get(token, -1) for token in united.tokens), np.int64, len(ids))
    rows[rows >= count] = -1
    found = np.full(len(named), -1, np.int64)
    found[ids] = rows
    taken = np.zeros(max(count, len(named)), np.bool_)
    taken[[number for number in tokens.values() if number < count]] = True
    padding = np.flatnonzero(~named & ~taken[: len(named)])
    padding = padding[padding < count]
    found[padding] = padding
    return found


def _plan_of(
    position: int,
    own: Sequence[Rows],
    named: np.ndarray,
    base: int | None,
    asked: Mapping[int, tuple[bool, tuple[tuple[int, Rows | None], ...]]],
) -> RowPlan:
    """Where the rows of one model are."""
    rows, borrowed = own[position].copy(), []
    for number, (force, lenders) in asked.items():
        if force or rows[number] < 0:
            rows[number] = -1
            borrowed.append(Borrowed(np.array([number]), lenders))
    left = rows < 0
    left[[int(each.at[0]) for each in borrowed]] = False
    if base is not None:
        at = np.flatnonzero(left & named & (own[base] >= 0))
        borrowed += _borrowed(at, ((base, own[base][at]),))
        left[at] = False
    having = np.stack([(each >= 0) & named for each in own])
    at = np.flatnonzero(left & having.any(axis=0))
    left[at] = False
    patterns, which = np.unique(having[:, at], axis=1, return_inverse=True)
    for pattern in range(patterns.shape[1]):
        some = at[which.reshape(-1) == pattern]
        having_them = np.flatnonzero(patterns[:, pattern]).tolist()
        lenders = tuple((lender, own[lender][some]) for lender in having_them)
        borrowed += _borrowed(some, lenders)
    borrowed += _borrowed(np.flatnonzero(left), ((position, None),))
    return RowPlan(rows, tuple(borrowed))


def _borrowed(at: Rows, lenders: tuple[tuple[int, Rows | None], ...]) -> list[Borrowed]:
    return [Borrowed(at, lenders)] if len(at) else []


def _asked(
    united: United, counts: Sequence[int], settings: TokenizerSettings | None
) -> dict[int, tuple[bool, tuple[tuple[int, Rows | None], ...]]]:
    """What the recipe says of tokens: by id, whether of all models, and whose row it is."""
    found = {}
    for token, told in (settings.tokens if settings is not None else {}).items():
        place = f"tokenizer.tokens.{token}"
        if token not in united.tokens:
            raise M3Error(f"{place}: is a token of no tokenizer{_nearest(token, united.tokens)}")
        found[united.tokens[token]] = told.force, _lender(united, counts, place, token, told.source)
    return found


def _lender(
    united: United, counts: Sequence[int], place: str, token: str, source: TokenSource
) -> tuple[tuple[int, Rows | None], ...]:
    """Whose row a recipe says that a token's is."""
    if source.kind == "zero":
        return ()
    position = next(i for i, speaker in enumerate(united.speakers) if speaker.name == source.model)
    tokens, wanted = united.tokens_of(position), token if source.token is None else source.token
    row = tokens.get(wanted) if source.token_id is None else source.token_id
    if row is None:
        raise M3Error(f"{place}: {wanted!r} is no token of {source.model}{_nearest(wanted, tokens)}")
    if row >= counts[position]:
        raise M3Error(f"{place}: {source.model} has {counts[position]} rows, so there is no row {row}: name another")
    return ((position, np.array([row])),)


def _nearest(token: str, tokens: Mapping[str, int]) -> str:
    close = get_close_matches(token, tokens, n=1)
    return f"; did you mean {close[0]!r}?" if close else ": name one that is"


# --- Views -----------------------------------------------------------------------------------------------


def is_own(plan: RowPlan, count: int) -> bool:
    """Whether a model's rows are what they are, without a view."""
    return len(plan.own) == count and bool((plan.own == np.arange(count)).all())


def seen_with_rows(position: int, models: Sequence[Model], plan: RowPlan, count: int) -> Checkpoint:
    """A model with the rows of a united vocabulary.

    Args:
        position: Which of the models.
        models: All of them, in the vocabulary's order, as they are without views of it.
        plan: Of its rows.
        count: How many rows it has.

    Raises:
        M3Error: Its tensors have different numbers of rows, or those of a lender do not fit.
    """
    model = models[position]
    gatherings = {}
    for name, axis in word_tensors(model).items():
        if (rows := model.checkpoint.tensors[name].shape[axis]) != count:
            raise M3Error(
                f"{model.name}: {name} has {rows} rows for tokens where others have {count}, so that one vocabulary"
                " cannot number both: exclude it, or merge models whose tokens are the same"
            )
        lent = []
        for each in plan.borrowed:
            sources = tuple(_rows_of(models[lender], name, axis, rows) for lender, rows in each.lenders)
            lent.append(Lent(each.at, sources))
        gatherings[name] = Gathering(axis, plan.own, tuple(lent))
    return gathered(model.checkpoint, gatherings)


def _rows_of(model: Model, name: str, axis: int, rows: Rows | None) -> RowsOf:
    """Rows of a lender's tensor, or of what a tied one has in its place."""
    axes = word_tensors(model)
    embedding = model.anatomy.embedding
    if name not in axes and embedding is not None and axes.get(embedding) == axis:
        return RowsOf(model.checkpoint, embedding, axis, rows)
    return RowsOf(model.checkpoint, name, axes.get(name, axis), rows)
