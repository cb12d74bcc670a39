import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import BFLOAT16, CONFIGS, weights
from support.matrix import few

from m3jax.decoder import PADDING, DecoderConfig, Rope, attention, bind, modeling, params_from_tree, rotation
from m3jax.decoder.experts import mix


def tiny(name, dtype=np.float32):
    config = DecoderConfig.from_dict(CONFIGS[name])
    params = params_from_tree(weights(CONFIGS[name], dtype), config)

    @jax.jit
    def read(params, tokens, positions=None, cache=None):
        decoder = bind(config, params)
        hidden, cache = decoder(tokens, positions, cache)
        return hidden, cache, decoder.logits(hidden)

    return functools.partial(read, params)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 64, (2, 12)), jnp.int32)


NAMES = ["llama-tied-biased", "qwen2", "gemma2", "gpt-oss", "gpt2", "gpt-neox"]


@pytest.mark.parametrize("name", few(NAMES, "gemma2", "gpt2"))
def test_reading_in_two_parts_equals_reading_at_once(name):
    read = tiny(name)
    whole, *_ = read(TOKENS)
    first, cache, _ = read(TOKENS[:, :7])
    cache = cache.extend(16)
    parts = [first]
    for i in range(7, 12):
        part, cache, _ = read(TOKENS[:, i : i + 1], jnp.full((2, 1), i), cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    assert int(cache.filled) == 12


@pytest.mark.parametrize(("name", "side"), [("llama", "right"), ("gemma2", "left"), ("gpt2", "left")])
def test_padding_on_either_side_changes_nothing(name, side):
    read = tiny(name)
    alone, *_ = read(TOKENS[:1, :8])
    tokens = jnp.zeros((2, 12), jnp.int32).at[1].set(TOKENS[1])
    positions = jnp.full((2, 12), PADDING).at[1].set(jnp.arange(12))
    place = slice(4, 12) if side == "left" else slice(0, 8)
    tokens, positions = tokens.at[0, place].set(TOKENS[0, :8]), positions.at[0, place].set(jnp.arange(8))
    padded, *_ = read(tokens, positions)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:1, place], alone, atol=1e-5)


def test_queries_in_blocks_see_the_same(monkeypatch):
    read = tiny("mistral")
    whole, *_ = read(TOKENS)
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 5)
    blocks, *_ = tiny("mistral")(TOKENS)
    np.testing.assert_allclose(blocks, whole, atol=1e-5)


def test_a_window_hides_what_is_before_it():
    read = tiny("mistral")  # two blocks of window 5: nothing more than 8 tokens back is seen
    changed = TOKENS.at[:, 0].set(5 - TOKENS[:, 0] % 2)
    a, b = read(TOKENS)[0], read(changed)[0]
    assert not np.allclose(a[:, 4], b[:, 4])
    np.testing.assert_array_equal(a[:, 9:], b[:, 9:])


def test_both_ways_to_multiply_agree():
    rng = np.random.default_rng(0)
    weight, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((24, 16), (300, 16)))
    want = np.asarray(x) @ np.asarray(weight).T
    for rows in (1, 3, 300):
        np.testing.assert_allclose(modeling.project(weight, x[:rows]), want[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gpt2", "olmo2"])
def test_bfloat16_stays_near_float32(name):
    exact = tiny(name)
    rounded = tiny(name, BFLOAT16)
    a, b = exact(TOKENS)[2], rounded(TOKENS)[2]
    assert b.dtype == jnp.float32
    assert float(jnp.corrcoef(a.ravel(), b.ravel())[0, 1]) > 0.99


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_gradients_reach_every_parameter(name):
    config = DecoderConfig.from_dict(CONFIGS[name])
    params = params_from_tree(weights(CONFIGS[name]), config)

    def loss(params):
        decoder = bind(config, params)
        return jnp.sum(decoder.logits(decoder(TOKENS)[0]) ** 2)

    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_rotation_is_a_product_of_complex_numbers(dtype):
    rng = np.random.default_rng(0)
    heads = rng.standard_normal((2, 5, 3, 8), np.float32).astype(dtype)
    angles = rng.standard_normal((2, 5, 4), np.float32)
    wide = heads.astype(np.float32)
    turned = (wide[..., :4] + 1j * wide[..., 4:]) * np.exp(1j * angles)[:, :, None]
    found = rotation.rotate(jnp.asarray(heads), jnp.asarray(angles))
    assert found.dtype == dtype
    want = np.concatenate([turned.real, turned.imag], -1).astype(dtype)
    np.testing.assert_allclose(found.astype(jnp.float32), want.astype(np.float32), atol=1e-6, rtol=2**-7)


def test_the_gate_is_rounded_once():
    config = DecoderConfig.from_dict(CONFIGS["llama"])
    params = params_from_tree(weights(CONFIGS["llama"], BFLOAT16), config)
    layer = bind(config, params).layers[0].feed_forward
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 7, 32), np.float32), jnp.bfloat16)
    gate, up = (part(x).astype(jnp.float32) for part in (layer.gate, layer.up))
    np.testing.assert_array_equal(layer(x), layer.down((jax.nn.silu(gate) * up).astype(jnp.bfloat16)))
    rounded_often = layer.down(jax.nn.silu(gate.astype(jnp.bfloat16)) * up.astype(jnp.bfloat16))
    assert bool(jnp.any(rounded_often != layer(x)))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_part_of_each_head_is_rotated(share):
    heads = np.random.default_rng(0).standard_normal((2, 5, 3, 16), np.float32)
    half = int(16 * share) // 2
    angles = np.random.default_rng(1).standard_normal((2, 5, half), np.float32)
    found = rotation.rotate(jnp.asarray(heads), jnp.asarray(angles), 1.5)
    turned = (heads[..., :half] + 1j * heads[..., half : 2 * half]) * 1.5 * np.exp(1j * angles)[:, :, None]
    want = np.concatenate([turned.real, turned.imag, heads[..., 2 * half :]], -1)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_yarn_leaves_fast_turns_alone_and_stretches_slow_ones():
    rope = Rope(1e4, "yarn", 4.0, original_context=4096)
    stretched, plain = (rotation.frequencies(one, 128, jnp.array([1]))[0] for one in (rope, Rope(1e4)))
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(stretched[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(stretched[turns < 0.9], plain[turns < 0.9] / 4, rtol=1e-6)
    assert bool(jnp.all(stretched[1:] < stretched[:-1]))


def test_two_ways_of_stretching_look_at_each_texts_own_length():
    dynamic = Rope(1e4, "dynamic", 2.0, original_context=64)
    rows = rotation.frequencies(dynamic, 16, jnp.array([10, 64, 128]))
    np.testing.assert_allclose(rows[:2], rotation.frequencies(Rope(1e4), 16, jnp.array([1, 1])).repeat(2, 0), rtol=1e-6)
    theta = 1e4 * 3 ** (16 / 14)  # of twice the context, by the formula of its author
    np.testing.assert_allclose(rows[2], rotation.frequencies(Rope(theta), 16, jnp.array([1]))[0], rtol=1e-5)
    long = Rope(1e4, "longrope", original_context=64, short_factors=(1.0, 2.0), long_factors=(3.0, 4.0))
    rows = rotation.frequencies(long, 4, jnp.array([64, 65]))
    np.testing.assert_allclose(rows, [[1, 0.005], [1 / 3, 0.0025]], rtol=1e-6)


@pytest.mark.parametrize(("tokens", "count", "active"), [(1, 5, 2), (7, 3, 3), (40, 4, 1), (300, 2, 2), (33, 64, 4)])
def test_mixtures_are_sums_over_the_chosen_experts(tokens, count, active):
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 8), np.float32)
    factors = rng.standard_normal((count, 8), np.float32)
    chosen = np.stack([rng.permutation(count)[:active] for _ in range(tokens)]).astype(np.int32)
    chosen[: tokens // 2] = chosen[0]  # crowds on few experts
    shares = rng.random((tokens, active), np.float32)

    @jax.jit
    def run(x, chosen, shares):
        return mix(lambda rows, i: rows * jnp.asarray(factors)[i][None, :], x, chosen, shares, count)

    want = (x[:, None, :] * factors[chosen] * shares[:, :, None]).sum(1)
    np.testing.assert_allclose(run(x, chosen, shares), want, rtol=1e-5, atol=1e-6)


def test_only_the_experts_that_a_token_takes_change_it():
    config = DecoderConfig.from_dict(CONFIGS["mixtral"])
    layer = bind(config, params_from_tree(weights(CONFIGS["mixtral"]), config)).layers[0].feed_forward
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 32), np.float32))
    before = layer(x)
    layer.up.weight[...] = layer.up.weight[...].at[1].add(1.0)
    scores = modeling.project(layer.router.weight[...], x)[0]
    takes = np.any(np.argsort(scores, axis=-1)[:, -2:] == 1, axis=-1)
    assert 0 < takes.sum() < 9
    np.testing.assert_array_equal(np.any(before != layer(x), axis=-1)[0], takes)


def test_sinks_take_their_share():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 2, 5), np.float32))
    sinks = jnp.asarray([0.5, -1.0, 30.0, 2.0])
    found = attention._softmax_with_sinks(scores, sinks)
    wide = jnp.broadcast_to(sinks.reshape(1, 2, 1, 2, 1), (2, 2, 3, 2, 1))
    want = jax.nn.softmax(jnp.concatenate([scores, wide], -1), axis=-1)[..., :-1]
    np.testing.assert_allclose(found, want, atol=1e-6)
