"""Texts that begin alike: what they share is read once, and each row goes on behind it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from m3jax.decoder.cache import PADDING, Cache, KeyValue
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.modeling import Decoder
from m3jax.decoder.texts import Tokens

_STEP = 8  # lengths are padded to multiples of it, so that few programs are compiled


class Prefix(NamedTuple):
    """What several texts begin with.

    Attributes:
        tokens: Padded on the right.
        length: How many of them there are.
    """

    tokens: Int[Array, " slots"]
    length: Int[Array, ""]


def padded_length(length: int) -> int:
    """The next multiple of 8.

    Args:
        length: Tokens.

    Example:
        >>> padded_length(0), padded_length(8), padded_length(9)
        (0, 8, 16)
    """
    return -(-length // _STEP) * _STEP


def common_prefix(texts: Sequence[Tokens]) -> list[int]:
    """What all of some texts begin with; at least one token of each is left over.

    Args:
        texts: Token ids, at least one text.

    Example:
        >>> common_prefix([[1, 2, 3], [1, 2, 4]]), common_prefix([[1, 2], [1, 2]])
        ([1, 2], [1])
    """
    first, last = min(map(list, texts)), max(map(list, texts))  # of which all others share what these two do
    return first[: min(_common(first, last), min(map(len, texts)) - 1)]


def make_prefix(tokens: Tokens, slots: int = 0) -> Prefix:
    """A prefix as programs take it.

    Args:
        tokens: Token ids, perhaps none.
        slots: Room that it has at least.
    """
    padded = np.zeros(padded_length(max(len(tokens), slots)), np.int32)
    padded[: len(tokens)] = tokens
    return Prefix(jnp.asarray(padded), jnp.int32(len(tokens)))


class Shared(NamedTuple):
    """Beginnings that have been read, and which of them each text goes on behind.

    Attributes:
        cache: A row for each beginning, of which all fill the same slots.
        lengths: Tokens of each beginning, perhaps none.
        of: The beginning of each text.
    """

    cache: Cache
    lengths: Int[Array, " beginnings"]
    of: Int[Array, " rows"]


def read_beginnings(
    decoder: Decoder,
    tokens: Int[Array, "beginnings slots"],
    lengths: Int[Array, " beginnings"],
    mesh: Mesh | None = None,
) -> Cache:
    """Reads what texts begin with; pure, differentiable, for use under jit.

    Args:
        decoder: The model.
        tokens: Each beginning, padded on the right.
        lengths: How many tokens of each row that are.
        mesh: As for `Decoder`.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    _, cache = decoder(tokens, jnp.where(places < lengths[:, None], places, PADDING), mesh=mesh)
    return cache


def read_on(
    decoder: Decoder,
    shared: Shared | None,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    more: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Array, Cache]:
    """Reads texts behind their beginnings; pure, differentiable, for use under jit.

    Args:
        decoder: The model.
        shared: The beginnings; None where texts are whole.
        tokens: What follows, padded on the right.
        lengths: How many tokens of each row that are.
        more: Slots for tokens to come.
        mesh: As for `Decoder`.

    Returns:
        Hidden states of what follows, and the cache with room for so many tokens more.
    """
    length = tokens.shape[1]
    before = jnp.int32(0) if shared is None else shared.lengths[shared.of][:, None]
    behind = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = jnp.where(behind < lengths[:, None], before + behind, PADDING)
    if shared is None:
        hidden, cache = decoder(tokens, positions, mesh=mesh)
        return hidden, cache.extend(length + more)
    cache = shared.cache.extend(shared.cache.positions.shape[1] + length + more)
    blocks = [KeyValue(*(x[shared.of] for x in pair)) for pair in cache.blocks]
    return decoder(tokens, positions, Cache(blocks, cache.positions[shared.of], cache.filled), mesh)


def read_behind(
    decoder: Decoder,
    prefix: Prefix,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    mesh: Mesh | None = None,
) -> tuple[Array, Cache]:
    """Reads texts behind the one beginning that all share, as `read_on` does.

    Args:
        decoder: The model.
        prefix: What all texts begin with.
        tokens: What follows, padded on the right.
        lengths: How many tokens of each row that are.
        mesh: As for `Decoder`.
    """
    if not len(prefix.tokens):
        return read_on(decoder, None, tokens, lengths, mesh=mesh)
    before = prefix.length[None]
    cache = read_beginnings(decoder, prefix.tokens[None], before, mesh)
    return read_on(decoder, Shared(cache, before, jnp.zeros_like(lengths)), tokens, lengths, mesh=mesh)


_FEW = 4  # texts, for which a group of their own is not worth it
_SLACK = 8  # tokens by which what a group shares may shrink as it grows


def alike(texts: Sequence[Tokens], rows: int) -> list[list[int]]:
    """Indices of texts in groups that begin alike; neighbours are compared, and the rest is one group.

    Args:
        texts: Token ids.
        rows: Texts that run together.

    Example:
        >>> alike([[1, 2, 3, 4, 5]] * 9 + [[7, 2, 3, 4, 6]] * 9 + [[8]], 8)
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18]]
    """
    groups: list[list[int]] = []
    shared: list[int] = []
    for number, text in enumerate(texts):
        common = _common(shared, text)
        least = len(text) / 2 if groups and len(groups[-1]) == 1 else len(shared) - _SLACK
        if groups and common >= least and common:
            groups[-1].append(number)
            shared = shared[:common]
        else:
            groups.append([number])
            shared = list(text)
    few = [i for group in groups if len(group) < min(_FEW, rows) for i in group]
    kept = [group for group in groups if len(group) >= min(_FEW, rows)]
    return [*kept, few] if few else kept


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def room_behind(config: DecoderConfig) -> int:
    """Tokens of a text that the model reads in the same way from its beginning, however it goes on.

    Args:
        config: The decoder.
    """
    changing = (rope.original_context for rope in config.ropes if rope and rope.kind in ("longrope", "dynamic"))
    return min([config.context_length, *changing])
