"""RegMean in memory: the formula by LAPACK in float64, its limits, weights of other layouts, and misuse."""

import jax
import numpy as np
import pytest
from support.matrix import grams, same

import m3jax

OUT, IN = 10, 12
NAME = "layers.0.up.weight"


def models(n=2, seed=0):
    """Weights of n experts, and the Gram matrices of what comes into them."""
    rng = np.random.default_rng(seed)
    experts = [{NAME: rng.standard_normal((OUT, IN)).astype(np.float32)} for _ in range(n)]
    return experts, [grams(expert, rng) for expert in experts]


def merged(experts, statistics, ratio=0.9, **keys):
    return m3jax.merge(experts, m3jax.regmean(ratio), statistics=statistics, **keys)


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_it_is_the_formula_in_float64(ratio):
    experts, statistics = models(3)
    weights = [0.5, 0.2, 1.9]
    told = [w * np.float64(s[NAME]) for w, s in zip(weights, statistics, strict=True)]
    told = [np.where(np.eye(IN) == 1, g, ratio * g) for g in told]
    seen = np.diagonal(sum(told)) > 0
    assert seen.tolist() == [i != 3 for i in range(IN)]
    want = sum(w * np.float64(e[NAME]) for w, e in zip(weights, experts, strict=True)) / sum(weights)
    right = sum(np.float64(e[NAME])[:, seen] @ g[seen][:, seen] for e, g in zip(experts, told, strict=True))
    want[:, seen] = np.linalg.solve(sum(told)[seen][:, seen], right.T).T
    np.testing.assert_allclose(merged(experts, statistics, ratio, weights=weights)[NAME], want, rtol=1e-6, atol=1e-6)


def test_it_fits_the_outputs_better_than_the_average():
    rng = np.random.default_rng(3)
    experts, inputs = models(2)[0], [rng.standard_normal((40, IN)) * np.exp(rng.standard_normal(IN)) for _ in "ab"]
    statistics = [{NAME: np.float32(x.T @ x)} for x in inputs]

    def distance(weight):
        pairs = zip(experts, inputs, strict=True)
        return sum(np.sum((x @ (np.float64(weight) - np.float64(e[NAME])).T) ** 2) for e, x in pairs)

    found, average = merged(experts, statistics, 1.0)[NAME], m3jax.merge(experts)[NAME]
    assert distance(found) < 0.9 * distance(average)
    moved = np.asarray(found) + 1e-2 * rng.standard_normal((OUT, IN))
    assert distance(found) < distance(moved)


def test_experts_that_agree_stay_and_who_has_no_weight_is_not_asked():
    (a, b), (g, h) = models()
    assert same(merged([a, a], [g, h]), a) == (True, [])
    assert same(merged([a], [g]), a) == (True, [])
    np.testing.assert_allclose(merged([a, b], [g, h], weights=[0.0, 1.0])[NAME], b[NAME], rtol=1e-6)


def kernels(tree, function):
    return {NAME.replace("weight", "kernel"): function(tree[NAME])}


def test_kernels_heads_and_stacked_blocks_mean_the_same():
    experts, statistics = models()
    want = np.asarray(merged(experts, statistics)[NAME])
    named = [kernels(s, lambda g: g) for s in statistics]
    turned = merged([kernels(e, np.transpose) for e in experts], named)
    assert same(turned, kernels({NAME: want}, np.transpose)) == (True, [])
    heads = merged([kernels(e, lambda w: w.T.reshape(3, 4, OUT)) for e in experts], named)  # an attention's output
    assert same(heads, kernels({NAME: want}, lambda w: w.T.reshape(3, 4, OUT))) == (True, [])
    (others, beside), how = models(seed=1), {"weights": m3jax.mixup(1.0, "layer"), "key": 3}
    apart = [{NAME: one[NAME], NAME.replace("0", "1"): two[NAME]} for one, two in zip(experts, others, strict=True)]
    told = [{NAME: one[NAME], NAME.replace("0", "1"): two[NAME]} for one, two in zip(statistics, beside, strict=True)]
    each = merged(apart, told, **how)
    for axis in (0, 1):
        stacked = [{"layers.up.weight": np.stack(list(tree.values()), axis)} for tree in apart]
        matrices = [{"layers.up.weight": np.stack(list(tree.values()))} for tree in told]
        got = merged(stacked, matrices, **how, anatomy={"stacked": {"layers": axis}})
        assert same(got, {"layers.up.weight": np.stack([np.asarray(w) for w in each.values()], axis)}) == (True, [])


def edited(matrix, value):
    found = matrix.copy()
    found[0, 1] = value
    return found


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"change": lambda g: edited(g, np.nan)}, r"up.weight: its Gram matrix holds NaN, infinities or negative"),
        ({"change": lambda g: edited(g, 1e30)}, "its statistics are no Gram matrix, which is symmetric"),
        ({"change": lambda g: edited(g, 0.0)}, "its statistics are no Gram matrix, which is symmetric"),
        ({"change": lambda g: g[:-1]}, r"the statistics of expert 1 are float32\[11, 12\], but the leaf is of shape"),
        ({"change": lambda g: g[:-1, :-1]}, "the statistics of expert 0 are"),
        ({"both": lambda g: g[:-2, :-2]}, r"is \[10, 12\], and its statistics are of 10 inputs, but neither"),
        (
            {"ratio": 1.0, "weights": [1.0, 0.0]},
            "the sum of its Gram matrices is singular, .* measure on more than 12 tokens",
        ),
        ({"weights": [-1.0, 2.0]}, "regmean: a weight is -1, but shares are not negative"),
        ({"weights": [0.0, 0.0]}, "weights: 0, 0 sum to 0"),
        ({"name": "layers.0.c_proj.weight"}, "square: is .*, but they may lie along either axis"),
    ],
)
def test_misuse_is_said(keys, sentence):
    (a, b), (g, h) = models()
    if "both" in keys:
        g, h = ({NAME: keys["both"](each[NAME])} for each in (g, h))
    if "name" in keys:
        square = keys["name"]
        a, b, g, h = ({square: tree[NAME][:10, :10]} for tree in (a, b, g, h))
        sentence = sentence.replace("square", square)
    h = {name: keys.get("change", lambda g: g)(each) for name, each in h.items()}
    with pytest.raises(m3jax.M3Error, match=sentence):
        merged([a, b], [g, h], keys.get("ratio", 0.9), weights=keys.get("weights"))


def test_weights_that_only_a_program_knows_are_refused():
    experts, statistics = models()
    with pytest.raises(m3jax.M3Error, match="weights are traced, but regmean"):
        jax.jit(lambda w: merged(experts, statistics, weights=w))(np.float32([0.5, 0.5]))
    with pytest.raises(m3jax.M3Error, match="weights are traced, but regmean"):
        jax.jit(lambda k: merged(experts, statistics, weights=m3jax.mixup(0.5), key=k))(jax.random.key(0))
    with pytest.raises(m3jax.M3Error, match="reduce_non_diagonal_ratio is 2"):
        m3jax.regmean(2.0)
