"""Texts that begin alike: what they share is read once, and each row goes on behind it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from m3jax.decoder.batching import batches, pad
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.modeling import PADDING, Cache, Decoder, KeyValue, bind
from m3jax.decoder.params import mesh_of
from m3jax.decoder.texts import Tokens, check_text
from m3jax.errors import M3Error

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
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(shared, min(map(len, texts)) - 1)]


def make_prefix(tokens: Tokens, slots: int = 0) -> Prefix:
    """A prefix as programs take it.

    Args:
        tokens: Token ids, perhaps none.
        slots: Room that it has at least.
    """
    padded = np.zeros(padded_length(max(len(tokens), slots)), np.int32)
    padded[: len(tokens)] = tokens
    return Prefix(jnp.asarray(padded), jnp.int32(len(tokens)))


def read_behind(
    decoder: Decoder,
    prefix: Prefix,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    more: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Array, Cache]:
    """Reads texts behind what they share, which is read once; pure, differentiable, for use under jit.

    Args:
        decoder: The model.
        prefix: What all texts begin with.
        tokens: What follows, padded on the right.
        lengths: How many tokens of each row that are.
        more: Slots for tokens to come.
        mesh: As for `Decoder`.

    Returns:
        Hidden states of what follows, and the cache with room for so many tokens more.
    """
    rows, length = tokens.shape
    shared = len(prefix.tokens)
    behind = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = jnp.where(behind < lengths[:, None], prefix.length + behind, PADDING)
    if not shared:
        hidden, cache = decoder(tokens, positions, mesh=mesh)
        return hidden, cache.extend(length + more)
    places = jnp.arange(shared, dtype=jnp.int32)
    _, cache = decoder(prefix.tokens[None], jnp.where(places < prefix.length, places, PADDING)[None], mesh=mesh)
    cache = cache.extend(shared + length + more)
    blocks = [KeyValue(*(jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in pair)) for pair in cache.blocks]
    slots = jnp.broadcast_to(cache.positions, (rows, shared + length + more))
    return decoder(tokens, positions, Cache(blocks, slots, cache.filled), mesh)


@functools.partial(jax.jit, static_argnames=("config", "most", "mesh"))
def _written(
    params: Any,
    prefix: Prefix,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    asked: Int[Array, ""],
    stops: Int[Array, " stops"],
    *,
    config: DecoderConfig,
    most: int,
    mesh: Mesh | None,
) -> Int[Array, "rows most"]:
    """The likeliest tokens behind the first `asked` rows; a row that has stopped repeats its last."""
    decoder = bind(config, params)
    hidden, cache = read_behind(decoder, prefix, tokens, lengths, most, mesh)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = jnp.argmax(decoder.logits(last), axis=-1).astype(jnp.int32)
    done = jnp.isin(token, stops) | (jnp.arange(len(token)) >= asked)
    said = jnp.zeros((len(token), most), jnp.int32).at[:, 0].set(token)

    def going(carry: tuple[Any, ...]) -> Array:
        number, _, done, _, _ = carry
        more: Array = (number < most) & ~jnp.all(done)
        return more

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, token, done, cache, said = carry
        positions = prefix.length + lengths + number - 1
        hidden, cache = decoder(token[:, None], positions[:, None], cache, mesh)
        next_ = jnp.argmax(decoder.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
        token = jnp.where(done, token, next_)
        said = lax.dynamic_update_slice_in_dim(said, token[:, None], number, axis=1)
        return number + 1, token, done | jnp.isin(token, stops), cache, said

    found: Array = lax.while_loop(going, step, (jnp.int32(1), token, done, cache, said))[-1]
    return found


def _room(config: DecoderConfig) -> int:
    """Tokens of a text that the model reads in the same way from its beginning, however it goes on."""
    changing = (rope.original_context for rope in config.ropes if rope and rope.kind in ("longrope", "dynamic"))
    return min([config.context_length, *changing])


def continue_alike(
    params: Any,
    config: DecoderConfig,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    batch_size: int = 32,
) -> list[tuple[list[int], bool]]:
    """Continues prompts that begin alike by their likeliest tokens; what `generate` writes, but for rounding.

    Args:
        params: The decoder's parameters.
        config: The decoder.
        prompts: Token ids of each prompt.
        max_new_tokens: Most tokens of a continuation.
        stop_token_ids: Tokens that end a continuation.
        batch_size: Prompts that run together; fewer are filled up, so that one program serves all.

    Returns:
        New tokens without the one that ended them, and whether one did; in the order of the prompts.

    Raises:
        M3Error: A prompt is empty, not of the vocabulary, or too long for the model with its continuation.
    """
    for number, prompt in enumerate(prompts):
        check_text(prompt, f"prompt {number}", config)
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > _room(config):
        raise M3Error(
            f"a prompt and its answer have {longest} tokens, but only {_room(config)} are read behind a shared "
            "beginning: shorten it"
        )
    shared = common_prefix(prompts)
    rest = [list(prompt[len(shared) :]) for prompt in prompts]
    mesh = mesh_of(params)
    prefix, stops = make_prefix(shared), jnp.asarray(list(stop_token_ids), jnp.int32)
    found: dict[int, tuple[list[int], bool]] = {}
    for members in batches([len(text) for text in rest], batch_size):
        length = padded_length(max(len(rest[i]) for i in members))
        tokens, lengths = pad([rest[i] for i in members], batch_size, length, mesh)
        said = np.asarray(
            _written(
                params,
                prefix,
                tokens,
                lengths,
                jnp.int32(len(members)),
                stops,
                config=config,
                most=max_new_tokens,
                mesh=mesh,
            )
        )
        for i, row in zip(members, said.tolist(), strict=False):
            end = next((place for place, token in enumerate(row) if token in stop_token_ids), None)
            found[i] = (row[:end], end is not None)
    return [found[i] for i in range(len(prompts))]
