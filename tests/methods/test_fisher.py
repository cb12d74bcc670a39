"""Fisher merging in memory: the formula in float64, entries without information, derivatives, layouts and misuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3jax


def trees(shape=(12, 20), n=3, seed=0):
    """Experts, and statistics of many magnitudes with zeros among them, as arrays."""
    rng = np.random.default_rng(seed)
    experts = [rng.standard_normal(shape).astype(np.float32) for _ in range(n)]
    statistics = [np.exp(4 * rng.standard_normal(shape)).astype(np.float32) for _ in range(n)]
    for each in statistics:
        each[: shape[0] // 4] = 0
    statistics[0][: shape[0] // 2] = 0
    return experts, statistics


def merged(experts, statistics, weights=None, epsilon=0.0):
    named = [[{"w": each} for each in some] for some in (experts, statistics)]
    return m3jax.merge(named[0], m3jax.fisher(epsilon), statistics=named[1], weights=weights)["w"]


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_it_is_the_formula_in_float64(epsilon):
    experts, statistics = trees()
    weights = np.array([0.5, 0.2, 1.9])[:, None, None]
    told = weights * np.maximum(np.float64(statistics), epsilon)
    total = told.sum(0)
    assert (total == 0).any() == (epsilon == 0.0)
    average = (weights * experts).sum(0) / weights.sum()
    want = np.where(total > 0, (told * experts).sum(0) / np.where(total > 0, total, 1.0), average)
    np.testing.assert_allclose(merged(experts, statistics, weights.ravel(), epsilon), want, rtol=1e-6, atol=1e-6)


def test_who_alone_has_information_is_taken_bit_for_bit():
    (a, b), (_, own) = trees(n=2)
    nothing = np.zeros_like(own)
    assert merged([a, b], [nothing, np.full_like(own, 1e-30)]).tobytes() == b.tobytes()
    assert merged([a, b], [np.full_like(own, 3e38), nothing], [0.3, 0.7]).tobytes() == a.tobytes()


def test_derivatives_in_the_weights():
    experts, statistics = trees((4, 5), n=2)
    cost = np.random.default_rng(2).standard_normal((4, 5)).astype(np.float32)
    at, step = np.float32([0.5, 0.9]), np.float32(0.01)
    loss = jax.jit(jax.value_and_grad(lambda weights: jnp.sum(cost * merged(experts, statistics, weights))))
    moves = np.eye(2, dtype=np.float32) * step
    finite = [(loss(at + move)[0] - loss(at - move)[0]) / (2 * step) for move in moves]
    np.testing.assert_allclose(loss(at)[1], finite, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"statistics": None}, "fisher: needs the fisher statistics of each of 2 experts, and none are given"),
        ({"statistics": [{"w": 1}]}, "needs the fisher statistics of each of 2 experts, and 1 is given"),
        ({"statistics": {"w": 1}}, "and one tree is given"),
        ({"change": lambda f: {"w": -f}}, "w: the statistics of expert 1 hold negative or infinite numbers or NaN"),
        ({"change": lambda f: {"w": f / 0.0}}, "w: the statistics of expert 1 hold negative or infinite"),
        ({"change": lambda f: {"w": f[:3]}}, r"w: the statistics of expert 1 are float32\[3, 20\], but the leaf is of"),
        ({"change": lambda f: {"w": f.astype(int)}}, r"w: the statistics of expert 1 are int64\[12, 20\]"),
        ({"change": lambda f: {"w": f, "v": f}}, "v: is in the statistics of expert 1 but not in the trees"),
        ({"change": lambda f: {}}, "w: has statistics of expert 0 but not of expert 1"),
        ({"weights": [-1.0, 2.0]}, "fisher: a weight is -1, but shares are not negative"),
        ({"weights": [0.0, 0.0]}, "weights: 0, 0 sum to 0"),
        ({"method": m3jax.linear()}, "linear: takes no statistics, but some are given"),
        ({"sparsify": m3jax.dare(0.5), "key": 0}, "fisher: cannot be combined with dare"),
    ],
)
def test_misuse_is_said(keys, sentence):
    experts, statistics = trees(n=2)
    change = keys.get("change", lambda f: {"w": f})
    with np.errstate(divide="ignore", invalid="ignore"):
        given = {"statistics": [{"w": statistics[0]}, change(statistics[1])], "method": m3jax.fisher(), **keys}
    given.pop("change", None)
    with pytest.raises(m3jax.M3Error, match=sentence):
        m3jax.merge([{"w": each} for each in experts], given.pop("method"), **given)
    with pytest.raises(m3jax.M3Error, match="epsilon is -1"):
        m3jax.fisher(-1)
