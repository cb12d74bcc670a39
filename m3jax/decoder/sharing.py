"""Batches of texts of which the beginnings that several have are read once, in a batch of their own."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from m3jax.decoder.batching import batches, length_bucket, narrow_bucket, pad, put, row_count, say_compiling
from m3jax.decoder.prefixes import Shared, alike, common_prefix
from m3jax.decoder.running import ModelFunctions
from m3jax.decoder.texts import Tokens

_SHORTEST = 8  # tokens of a beginning that is read apart
_WORTH = 0.75  # of the tokens that go through the model otherwise: more is not worth other programs and rounding

_Batch: TypeAlias = tuple[list[int], int, int]
"""Texts, and to how many tokens and slots what is read of each is padded."""

_Group: TypeAlias = tuple[list[int], list[int]]
"""Texts, and what all of them begin with."""


class Wave(NamedTuple):
    """Texts whose beginnings are read together, before what follows them is.

    Attributes:
        cache: What was read, a row for each beginning; None where texts are read whole.
        lengths: Tokens of each beginning.
        of: The beginning of each text, and how many tokens it has.
    """

    cache: Any
    lengths: Array | None
    of: Mapping[int, tuple[int, int]]

    def cut(self, text: int) -> int:
        """Tokens of a text that have been read.

        Args:
            text: Its number.
        """
        return self.of[text][1] if self.of else 0

    def shared(self, texts: Sequence[int], mesh: Mesh | None) -> Shared | None:
        """The beginnings of some texts, as the model goes on from them.

        Args:
            texts: Their numbers.
            mesh: Where the texts are.
        """
        if self.lengths is None:
            return None
        return Shared(self.cache, self.lengths, put(np.array([self.of[i][0] for i in texts], np.int32), mesh))


WHOLE = Wave(None, None, {})
"""Texts that are read whole."""


@functools.partial(jax.jit, static_argnames="model")
def _begin(
    params: Any, tokens: Int[Array, "beginnings length"], lengths: Int[Array, " beginnings"], *, model: ModelFunctions
) -> Any:
    assert model.begin is not None
    say_compiling("prefill", *tokens.shape)
    return model.begin(params, tokens, lengths)


def read_together(
    model: ModelFunctions, params: Any, beginnings: Sequence[Tokens], batch_size: int, mesh: Mesh | None
) -> tuple[Any, Array]:
    """Reads beginnings in a batch.

    Args:
        model: What reads them.
        params: Its parameters.
        beginnings: At most as many as a batch has rows.
        batch_size: Rows of a full batch.
        mesh: Where the batch goes.

    Returns:
        What was read, and how many tokens each beginning has.
    """
    rows, length = row_count(len(beginnings), batch_size), narrow_bucket(max(map(len, beginnings)))
    tokens, lengths = pad(beginnings, rows, length, mesh)
    return _begin(params, tokens, lengths, model=model), lengths


def behind_beginnings(
    texts: Sequence[Tokens],
    heads: Sequence[Tokens],
    batch_size: int,
    longest: int,
    whole: Callable[[int], int],
    read: Callable[[Sequence[Tokens]], tuple[Any, Array]],
    new: int = 0,
) -> Iterator[tuple[list[int], Wave, int, int]]:
    """Batches of texts, what is read of them before, and to how many tokens and slots the rest of each is padded.

    Args:
        texts: Token ids.
        heads: Of each text the part whose beginning may be read apart, but for its last token.
        batch_size: Texts that run together.
        longest: Tokens of a text of which the beginning may be read apart; 0 for none.
        whole: The padded length of a batch of texts that are read whole.
        read: Reads beginnings.
        new: Most new tokens behind a text.
    """

    def cost(planned: Sequence[_Batch]) -> int:
        """Tokens that go through the model; new ones take a batch as long, however few texts it has."""
        return sum(row_count(len(members), batch_size) * length + batch_size * new for members, length, _ in planned)

    plain = _whole(texts, range(len(texts)), batch_size, whole)
    alikes = alike(heads, batch_size) if longest > 0 else []
    groups = [(group, _beginning(texts, heads, group, longest)) for group in alikes]
    waves = list(_waves([(group, beginning) for group, beginning in groups if beginning], batch_size))
    apart = {i for wave in waves for group, _ in wave for i in group}
    left = _whole(texts, [i for i in range(len(texts)) if i not in apart], batch_size, whole)
    behind = [_rests(texts, wave, batch_size) for wave in waves]
    before = sum(row_count(len(wave), batch_size) * narrow_bucket(len(wave[0][1])) for wave in waves)
    worth = before + cost([*left, *itertools.chain(*behind)]) <= _WORTH * cost(plain)
    for members, length, slots in left if worth else plain:
        yield members, WHOLE, length, slots
    for groups_of_wave, batches_of_wave in zip(waves, behind, strict=True) if worth else ():
        of = {i: (row, len(beginning)) for row, (group, beginning) in enumerate(groups_of_wave) for i in group}
        wave = Wave(*read([beginning for _, beginning in groups_of_wave]), of)
        for members, length, slots in batches_of_wave:
            yield members, wave, length, slots
        del wave  # before the next is read


def _whole(
    texts: Sequence[Tokens], which: Sequence[int], batch_size: int, padded: Callable[[int], int]
) -> list[_Batch]:
    """Batches of some texts that are read whole."""
    found = [[which[place] for place in places] for places in batches([len(texts[i]) for i in which], batch_size)]
    lengths = [padded(max(len(texts[i]) for i in members)) for members in found]
    return [(members, length, length) for members, length in zip(found, lengths, strict=True)]


def _rests(texts: Sequence[Tokens], groups: Sequence[_Group], batch_size: int) -> list[_Batch]:
    """Batches of what follows beginnings that are read together."""
    rest = {i: len(texts[i]) - len(beginning) for group, beginning in groups for i in group}
    everyone, most = list(rest), narrow_bucket(max(rest.values()))
    found = [[everyone[place] for place in places] for places in batches(list(rest.values()), batch_size)]
    lengths = [narrow_bucket(max(rest[i] for i in members)) for members in found]
    # Of few sizes, as decoding is compiled for each, but not of the longest: all steps go over all slots.
    return [(members, length, min(length_bucket(length), most)) for members, length in zip(found, lengths, strict=True)]


def _waves(groups: Sequence[_Group], batch_size: int) -> Iterator[list[_Group]]:
    """Groups whose beginnings are read together: of like length, as all of them get the slots of the longest.

    Args:
        groups: Texts and their beginnings.
        batch_size: Beginnings that are read together.
    """
    wave: list[_Group] = []
    for group in sorted(groups, key=lambda group: -len(group[1])):
        if wave and (len(wave) == batch_size or 2 * len(group[1]) < len(wave[0][1])):
            yield wave
            wave = []
        wave.append(group)
    if wave:
        yield wave


def _beginning(texts: Sequence[Tokens], heads: Sequence[Tokens], group: Sequence[int], longest: int) -> list[int]:
    """What all of some texts begin with; nothing where it is not worth it, or a text is too long."""
    if len(group) == 1 or max(len(texts[i]) for i in group) > longest:
        return []
    shared = common_prefix([heads[i] for i in group])
    return shared if len(shared) >= _SHORTEST else []
