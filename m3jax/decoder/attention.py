"""Causal attention over what is in a cache, a block of queries at a time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from m3jax.decoder.cache import PADDING, KeyValue
from m3jax.decoder.products import dot

# Bounds the memory of attention scores: one block of queries at a time.
_QUERY_BLOCK = 512


def softcap(x: Float[Array, "*shape"], bound: float | None) -> Float[Array, "*shape"]:
    """Bounds values smoothly: bound·tanh(x / bound)."""
    return x if bound is None else bound * jnp.tanh(x / bound)


def visible(
    queries: Int[Array, "batch length"], keys: Int[Array, "batch slots"], window: int | None
) -> Bool[Array, "batch length slots"]:
    """Which slots each query may see: those of positions up to its own, the last `window` of them.

    Args:
        queries: Positions of queries.
        keys: Positions of slots.
        window: How many positions a query sees, itself included; `None` is all before it.
    """
    query, key = queries[:, :, None], keys[:, None, :]
    return key <= query if window is None else (key <= query) & (key > query - window)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    cache: KeyValue,
    queries: Int[Array, "batch length"],
    keys: Int[Array, "batch slots"],
    *,
    window: int | None,
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Causal attention with grouped heads; scores and softmax in float32.

    Args:
        query: Rotated queries.
        cache: Keys and values.
        queries: Positions of queries.
        keys: Positions of slots.
        window: How many positions a query sees; `None` is all before it.
        scale: Factor on scores.
        cap: Bound of scores.
        sinks: A score of each head that takes its share and gives nothing.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, slots = cache.key.shape[1:3]

    def block(query: Array, queries: Array) -> Array:
        grouped = query.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2)
        rows = grouped.reshape(batch, kv_heads, -1, head_dim)
        scores = dot(rows, cache.key, (((3,), (3,)), ((0, 1), (0, 1)))) * scale
        scores = softcap(scores, cap).reshape(*grouped.shape[:-1], slots)
        scores = jnp.where(visible(queries, keys, window)[:, None, :, None], scores, -jnp.inf)
        shares = jax.nn.softmax(scores, axis=-1) if sinks is None else _softmax_with_sinks(scores, sinks)
        weights = shares.astype(query.dtype).reshape(*rows.shape[:-1], slots)
        mixed = dot(weights, cache.value, (((3,), (2,)), ((0, 1), (0, 1)))).astype(query.dtype)
        return mixed.reshape(grouped.shape).swapaxes(1, 2).reshape(query.shape)

    if length <= _QUERY_BLOCK:
        return block(query, queries)
    blocks = -(-length // _QUERY_BLOCK)
    short = blocks * _QUERY_BLOCK - length
    padded = jnp.pad(query, ((0, 0), (0, short), (0, 0), (0, 0)))
    padded = padded.reshape(batch, blocks, _QUERY_BLOCK, heads, head_dim).swapaxes(0, 1)
    # Padded queries see something, so that no softmax is over nothing.
    places = jnp.pad(queries, ((0, 0), (0, short)), constant_values=PADDING)
    places = places.reshape(batch, blocks, _QUERY_BLOCK).swapaxes(0, 1)
    out: Array = lax.map(lambda pair: block(*pair), (padded, places))
    return out.swapaxes(0, 1).reshape(batch, -1, heads, head_dim)[:, :length]


def _softmax_with_sinks(
    scores: Float[Array, "batch kv_heads length group slots"], sinks: Float[Array, " heads"]
) -> Float[Array, "batch kv_heads length group slots"]:
    """Softmax over the slots and one score more, whose share is left out."""
    sink = sinks.astype(jnp.float32).reshape(1, scores.shape[1], 1, scores.shape[3], 1)
    top = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    powers = jnp.exp(scores - top)
    return powers / (jnp.sum(powers, axis=-1, keepdims=True) + jnp.exp(sink - top))
