"""Random bits against JAX's own, against the oracle, and against their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import oracle

from m3jax import M3Error
from m3jax.arithmetic import threefry

uint32s = st.integers(0, 2**32 - 1)


def test_words_reproduce_jax_random_bits():
    key = jax.random.key(7, impl="threefry2x32")
    want = jax.random.bits(key, (1000,), jnp.uint32)
    index = threefry.range_index(jnp.uint32(0), jnp.uint32(0), 1000)
    u, v = threefry.threefry2x32(tuple(jax.random.key_data(key)), index)
    assert ((u ^ v) == want).all()


@given(uint32s, uint32s, uint32s, uint32s)
def test_threefry_is_the_oracles(k0, k1, c0, c1):
    words = [np.array([w], np.uint32) for w in (k0, k1, c0, c1)]
    got = threefry.threefry2x32((words[0], words[1]), (words[2], words[3]))
    want = oracle.threefry((k0, k1), (words[2], words[3]))
    assert [int(g[0]) for g in got] == [int(w[0]) for w in want]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_keys_are_jaxs(seed):
    key = jax.random.key(seed, impl="threefry2x32")
    assert threefry.root_key(seed).tolist() == jax.random.key_data(key).tolist()
    for data in (0, 1, 2**32 - 1):
        want = jax.random.key_data(jax.random.fold_in(key, data)).tolist()
        assert threefry.fold_in(threefry.key_words(key), data).tolist() == want
        assert jax.jit(lambda k, d=data: threefry.fold_in(threefry.key_words(k), d))(key).tolist() == want


def test_seeds_of_64_bits_are_told_apart():
    assert threefry.root_key(2**40 + 5).tolist() == [2**8, 5]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(M3Error, match="seed"):
        threefry.root_key(seed)


def test_other_generators_are_refused():
    with pytest.raises(M3Error, match=r"generator rbg, .* make it with jax.random.key\(seed, impl="):
        threefry.key_words(jax.random.key(0, impl="rbg"))
    with pytest.raises(M3Error, match="integer seed"):
        threefry.key_words(np.zeros(3, np.uint32))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5])
def test_masks_are_the_oracles(num_experts):
    densities = (0.1, 0.5, 0.9, 0.3, 0.7)[:num_experts]
    keys = threefry.pair_keys(threefry.root_key(11), "model.norm.weight", num_experts)
    words = threefry.mask_words(jnp.asarray(keys), threefry.flat_index((7, 30)), num_experts)
    for word, density, want in zip(
        words, densities, oracle.masks(11, "model.norm.weight", densities, (7, 30)), strict=True
    ):
        assert (np.asarray(word < np.uint32(threefry.keep_threshold(density))) == want).all()


@given(uint32s, uint32s, uint32s, uint32s)
def test_64_bit_arithmetic_in_words(high, low, factor, addend):
    words = [np.array(w, np.uint32)[None] for w in (high, low, addend)]
    got = threefry.multiply_add_64(words[0], words[1], factor, words[2])
    want = (((high << 32) + low) * factor + addend) % 2**64
    assert (int(got[0][0]) << 32) + int(got[1][0]) == want


@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**32, 5 * 2**32 - 1, 2**45 + 17])
def test_ranges_cross_word_boundaries(start):
    high, low = threefry.range_index(np.uint32(start >> 32), np.uint32(start & 0xFFFFFFFF), 8)
    got = [(int(h) << 32) + int(w) for h, w in zip(high, low, strict=True)]
    assert got == list(range(start, start + 8))


def test_flat_indices_of_tensors_over_2_to_32_entries():
    """A (2²⁰, 8192) tensor's index, at a few entries, without allocating it."""
    rows = np.array([0, 1, 524287, 524288, 2**20 - 1], np.uint32)
    cols = np.array([0, 8191, 4095, 0, 8191], np.uint32)
    high, low = threefry.multiply_add_64(np.zeros_like(rows), rows, 8192, cols)
    want = rows.astype(np.uint64) * 8192 + cols
    assert ((high.astype(np.uint64) << np.uint64(32)) + low == want).all()
    shape = jax.eval_shape(lambda: threefry.flat_index((2**20, 8192)))
    assert [s.shape for s in shape] == [(2**20, 8192)] * 2


def test_flat_index_is_row_major():
    high, low = threefry.flat_index((3, 4, 5))
    assert (np.asarray(low).ravel() == np.arange(60)).all()
    assert not np.asarray(high).any()


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_density_and_expectation_are_within_five_sigma(density):
    n = 1 << 20
    for word in threefry.mask_words(
        jnp.asarray(threefry.pair_keys(threefry.root_key(3), "w", 2)), threefry.flat_index((n,)), 2
    ):
        kept = int((np.asarray(word) < threefry.keep_threshold(density)).sum())
        assert abs(kept - n * density) < 5 * np.sqrt(n * density * (1 - density))


def test_the_two_words_of_a_hash_are_independent():
    n = 1 << 20
    u, v = threefry.mask_words(
        jnp.asarray(threefry.pair_keys(threefry.root_key(3), "w", 2)), threefry.flat_index((n,)), 2
    )
    half = np.uint32(2**31)
    both = int(((np.asarray(u) < half) & (np.asarray(v) < half)).sum())
    assert abs(both - n / 4) < 5 * np.sqrt(n * 3 / 16)


@pytest.mark.parametrize(("density", "threshold"), [(0.0, 0), (0.5, 2**31), (1.0, 2**32), (2.0**-33, 0)])
def test_thresholds(density, threshold):
    assert threefry.keep_threshold(density) == threshold
