"""Mixtures of experts: each token goes through a few of many layers, and only those are computed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_MOST_ROWS = 128  # of a tile: enough to keep a product busy, few enough to leave little of one empty


def mix(
    expert: Callable[[Float[Array, "tile width"], Int[Array, ""]], Float[Array, "tile width"]],
    tokens: Float[Array, "tokens width"],
    chosen: Int[Array, "tokens active"],
    shares: Float[Array, "tokens active"],
    count: int,
) -> Float[Array, "tokens width"]:
    """What the chosen experts make of each token, added up by their shares.

    Tokens are laid out by expert in tiles of one size, each of a single expert, and tiles are computed one after
    another; those that no token needs are skipped. No token is dropped, and none depends on another.

    Args:
        expert: From rows and the number of an expert to what it makes of them.
        tokens: What experts read.
        chosen: Experts of each token, int32.
        shares: What each of them counts, float32.
        count: How many experts there are.

    References:
        Gale et al., MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, 2022.
    """
    active = chosen.shape[1]
    pairs = chosen.size
    rows = _tile_rows(pairs, count)
    tiles = pairs // rows + min(count, pairs)  # as many as it takes at most
    owner = chosen.reshape(-1)
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(owner, length=count).astype(jnp.int32)
    starts = jnp.cumsum(sizes) - sizes  # of each expert's pairs, among all in order
    tile_ends = jnp.cumsum(-(-sizes // rows))
    first_tiles = tile_ends - -(-sizes // rows)

    numbers = jnp.arange(tiles, dtype=jnp.int32)
    experts = jnp.minimum(jnp.searchsorted(tile_ends, numbers, side="right").astype(jnp.int32), count - 1)
    within = (numbers - first_tiles[experts])[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)[None, :]
    ranks = jnp.minimum(starts[experts][:, None] + within, pairs - 1)
    laid_out = tokens[order[ranks] // active]

    @jax.checkpoint  # a gradient would else keep each tile's weights
    def compute(x: Array, number: Array) -> Array:
        return expert(x, number)

    def tile(one: tuple[Array, Array, Array]) -> Array:
        x, number, needed = one
        made: Array = lax.cond(needed, compute, lambda x, _: jnp.zeros_like(x), x, number)
        return made

    made = lax.map(tile, (laid_out, experts, numbers < tile_ends[-1])).reshape(tiles * rows, -1)
    rank = jnp.argsort(order).astype(jnp.int32) - starts[owner]
    found = made[first_tiles[owner] * rows + rank].reshape(*chosen.shape, -1)
    mixed = jnp.sum(found.astype(jnp.float32) * shares[:, :, None], axis=1)
    return mixed.astype(tokens.dtype)


def _tile_rows(pairs: int, count: int) -> int:
    """Rows of a tile: a power of two near what an expert gets."""
    return min(_MOST_ROWS, 1 << max(0, int(np.log2(max(1, pairs / count)))))
