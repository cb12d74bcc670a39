"""The inputs of a merge seen with the rows of one vocabulary."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from m3jax.arithmetic import SCHEMES
from m3jax.checkpoints.locate import digest_companions, named_companions
from m3jax.errors import M3Error
from m3jax.recipe import Recipe
from m3jax.vocabulary import (
    Model,
    Speaker,
    United,
    count_rows,
    difference,
    first_conflict,
    is_own,
    notes_on_rows,
    numbering,
    plan_rows,
    read_speakers,
    seen_with_rows,
    told_apart,
    unite,
    word_tensors,
)

if TYPE_CHECKING:
    from m3jax.streaming.opening import OpenedModel


class Alignment(NamedTuple):
    """The vocabulary of an output.

    Attributes:
        united: Its tokens.
        size: How many rows there are; None where all models keep theirs.
        read: The digests of the files that it was read from, by their paths.
    """

    united: United
    size: int | None
    read: Mapping[Path, str] = MappingProxyType({})

    @property
    def numberings(self) -> tuple[str, ...]:
        """For each model the digest of which token has which number; models with equal files share a vocabulary."""
        distinct = {id(speaker.vocabulary): speaker.vocabulary for speaker in self.united.speakers}
        told = {key: numbering(vocabulary) for key, vocabulary in distinct.items()}
        return tuple(told[id(speaker.vocabulary)] for speaker in self.united.speakers)


def aligned(
    models: Sequence["OpenedModel"], recipe: Recipe, scheme: str, base: str | None
) -> tuple[list["OpenedModel"], Alignment | None]:
    """The models with the rows of the vocabulary that a recipe asks for.

    Args:
        models: Opened, under one naming; the first leads where there is no base.
        recipe: What is asked for.
        scheme: How bits are made: merges of the scheme m3jax-1 took rows by their places.
        base: Which of them is the base of the whole merge, and so leads; None without.

    Returns:
        Views of them, and the vocabulary; the models as they are and None where the recipe asks for none.

    Raises:
        M3Error: Tokenizers or tensors do not fit each other or the recipe; none is asked for, and one is needed.
    """
    template = max((i for i, model in enumerate(models) if model.input.name == base), default=0)
    if recipe.tokenizer_source is None:
        if scheme != SCHEMES[0]:
            _check_same_rows(models, recipe, template)
        return list(models), None
    read = {path: told for model in models for path, told in digest_companions(model.place.path).items()}
    united = unite(recipe.tokenizer_source, _speakers(models), template)
    if not united.tokens and recipe.tokenizer is not None:
        raise M3Error(
            f"tokenizer: {models[template].input.name} has no tokenizer that can be read: add its tokenizer.json"
        )
    seen = [Model(model.input.name, model.checkpoint, model.input.anatomy) for model in models]
    counts = [count_rows(model) for model in seen]
    if not united.tokens or scheme == SCHEMES[0] or (_are_one(united, recipe) and None in counts):
        return list(models), Alignment(united, None, read)
    lacking = next((m.name for m, count in zip(seen, counts, strict=True) if count is None), None)
    if lacking is not None:
        raise M3Error(
            f"{lacking}: has no tensor that is known as an embedding, so that its rows cannot be numbered by tokens:"
            " leave out tokenizer_source, or give models whose embeddings are called as usual"
        )
    known = [count for count in counts if count is not None]
    lender = next((i for i, model in enumerate(models) if model.input.name == base), None)
    plans = plan_rows(united, known, lender, recipe.tokenizer)
    if all(is_own(plan, count) for plan, count in zip(plans, known, strict=True)):
        return list(models), Alignment(united, None, read)
    found = []
    for position, (model, plan, count) in enumerate(zip(models, plans, known, strict=True)):
        if is_own(plan, count):
            found.append(model)
            continue
        view = seen_with_rows(position, seen, plan, count)
        found.append(model._replace(checkpoint=view, input=model.input._replace(tensors=view.tensors)))
    told = united._replace(notes=(*united.notes, *notes_on_rows(united, known)))
    return found, Alignment(told, len(plans[0].own), read)


def _speakers(models: Sequence["OpenedModel"]) -> tuple[Speaker, ...]:
    return read_speakers([(model.input.name, named_companions(model.place.path)) for model in models])


def _are_one(united: United, recipe: Recipe) -> bool:
    """Whether all models have the same tokens, and nothing else is asked for."""
    same = all(united.tokens_of(position) == united.tokens for position in range(len(united.speakers)))
    return same and recipe.tokenizer is None


def _check_same_rows(models: Sequence["OpenedModel"], recipe: Recipe, template: int) -> None:
    """Raise M3Error where models have different numbers of rows for tokens, and the recipe does not say what of it."""
    seen = [Model(model.input.name, model.checkpoint, model.input.anatomy) for model in models]
    first = seen[template]
    for name, axis in word_tensors(first).items():
        shape = first.checkpoint.tensors[name].shape
        for position, model in enumerate(seen):
            other = model.checkpoint.tensors.get(name)
            if other is None or recipe.excludes(name) or other.shape == shape or len(other.shape) != len(shape):
                continue
            if all(a == b for at, (a, b) in enumerate(zip(shape, other.shape, strict=True)) if at != axis):
                one, two = _speakers([models[template], models[position]])
                more, fewer = (model, first) if other.shape[axis] > shape[axis] else (first, model)
                rows = abs(other.shape[axis] - shape[axis])
                raise M3Error(
                    f"{name}: is {list(shape)} in {first.name} but {list(other.shape)} in {model.name}:"
                    f" {more.name} has {rows} more row{'s' if rows > 1 else ''} than {fewer.name};"
                    f" {_mend(one, two, models[template].role != 'expert')}"
                )


def notes_on_numbers(models: Sequence["OpenedModel"], recipe: Recipe, scheme: str) -> Iterator[str]:
    """Sentences on tokens that have other numbers in other models, where the recipe lets rows be merged by numbers.

    Args:
        models: As for `aligned`, of a recipe without `tokenizer_source`.
        recipe: What is asked for.
        scheme: As for `aligned`.

    Raises:
        M3Error: An ordinary token of one model has the number of another one in another: as no tokens fit their rows
            after the merge, no such merge is meant.
    """
    template = len(models) - 1 if models[-1].role != "expert" else 0
    seen = Model(models[template].input.name, models[template].checkpoint, models[template].input.anatomy)
    if scheme == SCHEMES[0] or all(map(recipe.excludes, word_tensors(seen))):
        return
    count = count_rows(seen)
    if count is None or len({told_apart(named_companions(model.place.path)) for model in models}) == 1:
        return  # as nearly always; a large vocabulary takes a second to read
    found = first_conflict(_speakers([models[template], *models]), count)
    if found is None:
        return
    said = " and ".join(f"{token!r} in {name}" for token, name in found.said)
    mend = "write tokenizer_source: base, union or a model to have them merged by their tokens"
    if found.is_ordinary:
        raise M3Error(f"token {found.number:,} is {said}, so that their rows cannot be merged by numbers: {mend}")
    yield f"added token {found.number:,} is {said}, and their rows are merged by numbers: {mend}"


def _mend(first: Speaker, other: Speaker, is_base: bool) -> str:
    """Which key settles what to do with different numbers of rows."""
    source = "base" if is_base else first.name
    told = difference(first, other)
    if told is not None:
        return (
            f"{told}: write tokenizer_source: union to keep every token, or tokenizer_source: {source} to keep those of"
            f" {first.name} alone"
        )
    if first.vocabulary is None or other.vocabulary is None:
        return "their tokenizers cannot be compared: give both a tokenizer.json, and write tokenizer_source: union"
    return (
        f"their tokens are the same, so what differs is padding: write tokenizer_source: {source} to have as many rows"
        f" as {first.name}, or tokenizer_source: {other.name}"
    )
