"""Random bits that depend on nothing but (seed, tensor name, expert, index): Threefry as plain arithmetic.

Everything here works on numpy arrays and on JAX arrays alike, so that keys are folded on the host where they are
known and traced where they are not. The scheme has a name, `m3jax.arithmetic.SCHEME`, which the manifest records.

References:
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from m3jax.errors import M3Error

# What a root key is folded with before its use, so that no two uses share a stream.
WEIGHTS, MASKS, SAMPLES, SUBSETS = 0, 1, 2, 3

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)

Words = Any  # uint32 arrays of numpy or JAX: every operation here is one that both spell the same


def _rotate_left(x: Words, distance: int) -> Words:
    return (x << np.uint32(distance)) | (x >> np.uint32(32 - distance))


def threefry2x32(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Threefry-2x32 with 20 rounds, written out so that it fuses with whatever uses its words.

    Args:
        key: Two uint32 words, scalar or of a shape that broadcasts with the counter's.
        counter: The high and the low uint32 word of each counter, any shape.

    Returns:
        Two independent uint32 words for each counter.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    u, v = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            u = u + v
            v = u ^ _rotate_left(v, distance)
        u = u + schedule[(group + 1) % 3]
        v = v + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return u, v


def root_key(seed: int) -> UInt32[np.ndarray, "2"]:
    """The two words of `jax.random.key(seed, impl="threefry2x32")`, for seeds of up to 64 bits.

    Raises:
        M3Error: The seed is negative or has more than 64 bits.

    Example:
        >>> root_key(7).tolist()
        [0, 7]
    """
    if not 0 <= seed < 2**64:
        raise M3Error(f"the seed is {seed}, but must be at least 0 and below 2**64")
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


_MADE = "pass jax.random.key(seed)"


def key_words(key: Any) -> Words:
    """The uint32[..., 2] words of a key: an integer seed, a typed JAX key, or the words themselves.

    Raises:
        M3Error: It is none, or belongs to another generator than Threefry.
    """
    if isinstance(key, int | np.integer):
        return root_key(int(key))
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) != "threefry2x32":
            raise M3Error(
                f"key: is of the generator {jax.random.key_impl(key)}, but draws and masks are of threefry2x32: "
                'make it with jax.random.key(seed, impl="threefry2x32")'
            )
        key = jax.random.key_data(key)
    if isinstance(key, jax.Array) and not isinstance(key, jax.core.Tracer):
        key = np.asarray(key)
    if not hasattr(key, "dtype"):
        raise M3Error(f"key: is {key!r}, but must be an integer seed or a threefry2x32 key: {_MADE}")
    if key.dtype != np.uint32 or key.shape[-1:] != (2,):
        given = f"{key.dtype}{list(key.shape)}"
        raise M3Error(f"key: is {given}, but must be an integer seed or a threefry2x32 key: {_MADE}")
    return key


def fold_in(key: Words, data: Any) -> Words:
    """`jax.random.fold_in` on the words of a key: host arithmetic on what is known there, else traced.

    Args:
        key: uint32[2].
        data: An integer in [0, 2³²), which may be traced.
    """
    zero, traced = key[0] ^ key[0], isinstance(data, jax.core.Tracer)
    word = zero + (jnp.asarray(data).astype(jnp.uint32) if traced else np.uint32(data))
    if isinstance(key, np.ndarray) and not traced:
        with np.errstate(over="ignore"):
            return np.stack(threefry2x32((key[0], key[1]), (zero, word)))
    return jnp.stack(threefry2x32((key[0], key[1]), (zero, word)))


def fold_in_name(key: Words, name: str) -> Words:
    """`key` folded with the first 64 bits of SHA-256 of `name`, as two big-endian words."""
    digest = hashlib.sha256(name.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = fold_in(key, int.from_bytes(word, "big"))
    return key


def sample_key(root: Words, sample: Any) -> Words:
    """The root key of one sample of an exploration, from which its weights are drawn as a merge's are from its seed.

    Sample 0 is what the recipe draws by itself, so its key is the recipe's.

    Args:
        root: uint32[2], the recipe's root key.
        sample: Its number, from 0; may be traced.

    Example:
        >>> [bool((sample_key(root_key(7), k) == root_key(7)).all()) for k in (0, 1)]
        [True, False]
    """
    own = fold_in(fold_in(root, SAMPLES), sample)
    if isinstance(sample, int | np.integer):
        return root if sample == 0 else own
    return jnp.where(sample == 0, root, own)


def mask_keys(root: Words, names: Sequence[str], num_experts: int) -> Words:
    """Keys of the mask streams of tensors, all in one go; the words of one hash serve two experts.

    Args:
        root: uint32[2], the merge's root key.
        names: The tensors' names.
        num_experts: How many experts are merged.

    Returns:
        uint32[names, ⌈num_experts/2⌉, 2]; row j of a tensor serves experts 2j and 2j + 1.
    """
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    words = np.frombuffer(digests, ">u4").astype(np.uint32).reshape(len(names), 2)
    start, zeros = fold_in(root, MASKS), np.zeros(len(names), np.uint32)
    with np.errstate(over="ignore"):
        own = threefry2x32((start[0] + zeros, start[1] + zeros), (zeros, words[:, 0]))
        own = threefry2x32(own, (zeros, words[:, 1]))
        pairs = [threefry2x32(own, (zeros, zeros + np.uint32(j))) for j in range((num_experts + 1) // 2)]
    xp: Any = np if isinstance(start, np.ndarray) else jnp
    return xp.stack([xp.stack(pair, axis=-1) for pair in pairs], axis=1)


def pair_keys(root: Words, name: str, num_experts: int) -> Words:
    """`mask_keys` of one tensor.

    Args:
        root: uint32[2], the merge's root key.
        name: The tensor's name.
        num_experts: How many experts are merged.

    Returns:
        uint32[⌈num_experts/2⌉, 2].
    """
    return mask_keys(root, [name], num_experts)[0]


def mask_words(
    keys: UInt32[Array, "pairs 2"], index: tuple[UInt32[Array, "..."], UInt32[Array, "..."]], num_experts: int
) -> list[UInt32[Array, "..."]]:
    """One uniform uint32 word per expert and entry.

    Args:
        keys: What `pair_keys` gave.
        index: The high and the low word of each entry's flat row-major index.
        num_experts: How many words are wanted.
    """
    words: list[UInt32[Array, ...]] = []
    for pair in range(keys.shape[0]):
        words.extend(threefry2x32((keys[pair, 0], keys[pair, 1]), index))
    return words[:num_experts]


def keep_threshold(density: float) -> int:
    """⌊density·2³²⌋: an entry is kept iff its word is below this; 2³² itself keeps all."""
    return math.floor(density * 2**32)


def multiply_add_64(high: Words, low: Words, factor: int, addend: Words) -> tuple[Words, Words]:
    """(high·2³² + low)·factor + addend modulo 2⁶⁴, in uint32 words.

    Args:
        high: uint32.
        low: uint32.
        factor: An integer in [0, 2³²).
        addend: uint32.
    """
    half = np.uint32(0xFFFF)
    sixteen = np.uint32(16)
    factor_low, factor_high = np.uint32(factor & 0xFFFF), np.uint32(factor >> 16)
    lowest = (low & half) * factor_low
    middle_a = (low >> sixteen) * factor_low
    middle_b = (low & half) * factor_high
    carry = ((lowest >> sixteen) + (middle_a & half) + (middle_b & half)) >> sixteen
    upper = (low >> sixteen) * factor_high + (middle_a >> sixteen) + (middle_b >> sixteen) + carry
    product = low * np.uint32(factor)
    total = product + addend
    return high * np.uint32(factor) + upper + (total < product).astype(np.uint32), total


def flat_index(shape: tuple[int, ...]) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The high and the low word of the flat row-major index of every entry of an array of `shape`.

    Made of iotas, so that under a sharding every device computes its own part and nothing is exchanged.
    """
    high = low = jnp.zeros(shape, jnp.uint32)
    if math.prod(shape) <= 2**32:
        for axis, size in enumerate(shape):
            low = low * np.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
        return high, low
    for axis, size in enumerate(shape):
        high, low = multiply_add_64(high, low, size, lax.broadcasted_iota(jnp.uint32, shape, axis))
    return high, low


def range_index(
    start_high: UInt32[Any, ""], start_low: UInt32[Any, ""], size: int
) -> tuple[UInt32[Array, " size"], UInt32[Array, " size"]]:
    """The words of the indices start, start + 1, …, start + size − 1."""
    offset = lax.iota(jnp.uint32, size)
    low = offset + start_low
    return start_high + (low < offset).astype(jnp.uint32), low
