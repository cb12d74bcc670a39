"""Rotary position embeddings: by how much each pair of entries of a head is turned, and the turning.

What a configuration says of them is in `rotary`.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m3jax.decoder.rotary import Rope


def frequencies(rope: Rope, head_dim: int, lengths: Int[Array, " batch"]) -> Float[Array, "rows half"]:
    """Radians per position of each rotated pair of entries of a head, float32.

    Args:
        rope: Base and stretching.
        head_dim: Width of a head.
        lengths: Tokens of each text so far, on which two ways of stretching depend.

    Returns:
        A row for each text, or one for all.

    References:
        Su et al., RoFormer, 2021; Chen et al., Extending Context Window via Positional Interpolation, 2023;
        Peng et al., YaRN, 2023 (also of dynamic scaling); Ding et al., LongRoPE, 2024; Llama 3.1's model card, 2024.
    """
    width = int(head_dim * rope.share)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    if rope.kind == "dynamic":
        excess = jnp.maximum(lengths, rope.original_context).astype(jnp.float32) * rope.factor
        growth = (excess / rope.original_context - (rope.factor - 1)) ** (width / (width - 2))
        return 1 / (rope.theta * growth[:, None]) ** exponents[None, :]
    powers = np.float32(rope.theta) ** exponents
    if rope.kind == "longrope":
        short, long = (1 / (np.array(f, np.float32) * powers) for f in (rope.short_factors, rope.long_factors))
        return jnp.where((lengths > rope.original_context)[:, None], long[None, :], short[None, :])
    return jnp.asarray(_stretched(rope, np.float32(1) / powers))[None, :]


def _stretched(rope: Rope, plain: Float[np.ndarray[Any, Any], " half"]) -> Float[np.ndarray[Any, Any], " half"]:
    """Frequencies that are the same for all texts."""
    if rope.kind in ("default", "linear"):
        return np.asarray(plain / np.float32(rope.factor), np.float32)
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, len(plain))
    else:
        turns = rope.original_context * plain / (2 * np.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return np.asarray((1 - kept) * plain / rope.factor + kept * plain, np.float32)


def _yarn_ramp(rope: Rope, pairs: int) -> Float[np.ndarray[Any, Any], " half"]:
    """How much of each frequency YaRN stretches, from 0 to 1."""

    def place(turns: float) -> float:
        """The index of the frequency that turns so often within the original context."""
        return pairs * math.log(rope.original_context / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    steps = (np.arange(pairs, dtype=np.float32) - first) / (last - first if last != first else 0.001)
    return np.asarray(np.clip(steps, 0, 1), np.float32)


def rotate(
    x: Float[Array, "batch length heads head_dim"], angles: Float[Array, "batch length half"], magnitude: float = 1.0
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates entry i of each head with entry i + width/2, in float32, for the first `width` entries.

    Args:
        x: Queries or keys.
        angles: In radians, half as many as entries that are rotated.
        magnitude: Factor on what is rotated.
    """
    width = 2 * angles.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], angles, magnitude), x[..., width:]], axis=-1)
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    along, across = (jnp.concatenate(pair, axis=-1)[:, :, None] for pair in ((cos, cos), (-sin, sin)))
    # Each entry and its partner: a CPU is several times slower at putting finished halves together.
    partner = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    return (x.astype(jnp.float32) * along + partner.astype(jnp.float32) * across).astype(x.dtype)
