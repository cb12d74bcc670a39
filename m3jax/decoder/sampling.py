"""The next token of each row: the likeliest, or one drawn with a key of the row's own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from m3jax.errors import M3Error


class Sampling(NamedTuple):
    """How tokens are chosen; arrays, so that other values need no other program.

    Attributes:
        keys: Of each row's draws.
        temperature: Divides logits.
        top_p: See `nucleus`.
        stops: Tokens that end a text.
        limits: New tokens that each row may have.
    """

    keys: Key[Array, " batch"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stops: Int[Array, " stops"]
    limits: Int[Array, " batch"]


def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, count: Int[Array, " batch"], greedy: bool
) -> Int[Array, " batch"]:
    """The next token of each row; a row's randomness depends on its own key and length alone.

    Args:
        logits: Scores, float32.
        sampling: How to choose.
        count: New tokens that each row has so far.
        greedy: Takes the likeliest.

    Returns:
        Token ids, int32.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, count)
    return jax.vmap(jax.random.categorical)(keys, nucleus(scaled, sampling.top_p)).astype(jnp.int32)


def nucleus(logits: Float[Array, "batch vocab"], top_p: Float[Array, ""]) -> Float[Array, "batch vocab"]:
    """Rules out all but the likeliest tokens whose probabilities add up to `top_p`, at least one.

    Args:
        logits: Scores, float32.
        top_p: The sum, above 0 and at most 1.

    Returns:
        The scores, minus infinity where a token is ruled out.

    References:
        Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def prompt_keys(key: Array | None, count: int) -> Key[Array, " prompts"]:
    """A key for each prompt.

    Args:
        key: One key, from which prompt i draws with `fold_in(key, i)`, or a key for each; `None` draws nothing.
        count: How many prompts there are.

    Raises:
        M3Error: There are several keys, but not as many as prompts.
    """
    key = jax.random.key(0) if key is None else key
    if key.ndim == 1:
        if len(key) != count:
            raise M3Error(f"there are {len(key)} keys for {count} prompts: give one key, or one for each.")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))
