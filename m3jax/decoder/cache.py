"""Keys and values of what a decoder has read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

PADDING = 2**30
"""The position of tokens that no other token may see."""


class KeyValue(NamedTuple):
    """Keys and values of one block.

    Attributes:
        key: Rotated keys, [batch, kv_heads, slots, head_dim]: the order in which attention multiplies them.
        value: Values, of the same shape.
    """

    key: Float[Array, "batch kv_heads slots head_dim"]
    value: Float[Array, "batch kv_heads slots head_dim"]


class Cache(NamedTuple):
    """What has been read: every row fills the same slot at the same time, whatever position it is at.

    Attributes:
        blocks: Keys and values of each block.
        positions: Position of the token in each slot, int32 [batch, slots]; `PADDING` where there is none.
        filled: Slots that are taken, an int32 scalar: the next token goes here.
    """

    blocks: list[KeyValue]
    positions: Int[Array, "batch slots"]
    filled: Int[Array, ""]

    def extend(self, slots: int) -> "Cache":
        """The same with room for more tokens.

        Args:
            slots: Slots that it is to have, at least as many as it has.
        """
        more = slots - self.positions.shape[1]
        blocks = [KeyValue(*(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in kv)) for kv in self.blocks]
        return Cache(blocks, jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=PADDING), self.filled)


@jax.custom_jvp
def put(old: Array, new: Array, slot: Array) -> Array:
    """A block's keys or values with new ones from a slot on.

    Args:
        old: [batch, kv_heads, slots, head_dim].
        new: The same of fewer slots.
        slot: The first that is taken, an int32 scalar.
    """
    # As integers: a CPU would widen the whole of a 16-bit cache to float32 and back for every token.
    kind = {2: jnp.uint16, 4: jnp.uint32}[old.dtype.itemsize]
    held, fresh = (lax.bitcast_convert_type(x, kind) for x in (old, new))
    return lax.bitcast_convert_type(lax.dynamic_update_slice_in_dim(held, fresh, slot, axis=2), old.dtype)


@put.defjvp
def _put_derivative(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """The same of tangents, which integers would lose."""
    old, new, _ = tangents
    return put(*primals), lax.dynamic_update_slice_in_dim(old, new, primals[2], axis=2)
