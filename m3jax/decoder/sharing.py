"""Batches of texts of which the beginnings that several have are read once, in a batch of their own."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from m3jax.decoder.batching import batches, narrow_bucket, pad, put, row_count, say_compiling
from m3jax.decoder.prefixes import Shared, alike, common_prefix
from m3jax.decoder.running import ModelFunctions
from m3jax.decoder.texts import Tokens

_SHORTEST = 8  # tokens of a beginning that is read apart


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
) -> Iterator[tuple[list[int], Wave, int, int]]:
    """Batches of texts, what is read of them before, and to how many tokens and slots the rest of each is padded.

    Args:
        texts: Token ids.
        heads: Of each text the part whose beginning may be read apart, but for its last token.
        batch_size: Texts that run together.
        longest: Tokens of a text of which the beginning may be read apart; 0 for none.
        whole: The padded length of a batch of texts that are read whole.
        read: Reads beginnings.
    """
    found = alike(heads, batch_size) if longest > 0 else []
    groups = [(group, _beginning(texts, heads, group, longest)) for group in found]
    if not any(beginning for _, beginning in groups):
        for members in batches([len(text) for text in texts], batch_size):
            length = whole(max(len(texts[i]) for i in members))
            yield members, WHOLE, length, length
        return
    for some in (groups[start : start + batch_size] for start in range(0, len(groups), batch_size)):
        beginnings = [beginning for _, beginning in some]
        of = {i: (number, len(beginnings[number])) for number, (group, _) in enumerate(some) for i in group}
        wave = Wave(*read(beginnings), of)
        everyone = list(of)
        rest = [len(texts[i]) - wave.cut(i) for i in everyone]
        for places in batches(rest, batch_size):
            length = narrow_bucket(max(rest[place] for place in places))
            yield [everyone[place] for place in places], wave, length, narrow_bucket(max(rest))


def _beginning(texts: Sequence[Tokens], heads: Sequence[Tokens], group: Sequence[int], longest: int) -> list[int]:
    """What all of some texts begin with; nothing where it is not worth it, or a text is too long."""
    if len(group) == 1 or max(len(texts[i]) for i in group) > longest:
        return []
    shared = common_prefix([heads[i] for i in group])
    return shared if len(shared) >= _SHORTEST else []
