"""Drawn ratios: their law, their bits, their bounds."""

import jax
import numpy as np
import pytest
from scipy import special, stats
from support import oracle

import m3jax
from m3jax import M3Error, draw_weights, mixup
from m3jax.arithmetic import threefry
from m3jax.methods import mixup as mixing

SEEDS = 100_000


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 5.0, (2.0, 5.0), (0.5, 3.0)])
def test_ratios_of_100_000_seeds_follow_the_beta_law(alpha):
    """Kolmogorov-Smirnov on float64 quantiles, of which the ratios are the float32 roundings.

    The roundings themselves have an atom at 1 (1.6 % of the mass for α = 0.2), which a continuous test would see.
    """
    a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha)
    roots = np.stack([np.zeros(SEEDS, np.uint32), np.arange(SEEDS, dtype=np.uint32)])
    uniforms = mixing.uniform(threefry.fold_in(roots, threefry.WEIGHTS), 0)
    exact = special.betaincinv(a, b, uniforms)
    assert stats.kstest(exact, stats.beta(a, b).cdf).pvalue > 1e-3
    ratios = mixing.beta_quantile(uniforms, a, b)
    assert ratios.dtype == np.float32
    assert (ratios == exact.astype(np.float32)).all()
    for seed in (0, 1, 77, SEEDS - 1):
        assert draw_weights(seed, alpha) == (float(ratios[seed]), 1.0 - float(ratios[seed]))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("group", [None, "model.layers.3"])
def test_weights_are_the_oracles(n, group):
    for seed in (0, 5, 2**40):
        assert list(draw_weights(seed, 0.5, n, group)) == oracle.draw(seed, 0.5, n, group)


def test_dirichlet_margins():
    """Each weight of a symmetric Dirichlet over n experts is Beta(α, (n − 1)α)."""
    drawn = np.array([draw_weights(seed, 0.7, 3) for seed in range(2000)])
    assert np.allclose(drawn.sum(1), 1)
    for i in range(3):
        assert stats.kstest(drawn[:, i], stats.beta(0.7, 1.4).cdf).pvalue > 1e-4


def test_a_key_is_as_good_as_its_seed():
    key = jax.random.key(9, impl="threefry2x32")
    assert draw_weights(key, 0.5) == draw_weights(9, 0.5)


def test_drawing_under_jit_says_what_to_do():
    with pytest.raises(TypeError, match=r"take m3jax\.mixup_weights"):
        jax.jit(lambda k: draw_weights(k, 0.5)[0])(jax.random.key(0))


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), (1, 2, 3), (1, -1)])
def test_bad_alpha(alpha):
    with pytest.raises(M3Error, match="alpha"):
        mixup(alpha)


def test_bad_granularity_and_pairs():
    with pytest.raises(M3Error, match="granularity"):
        mixup(0.5, "block")
    with pytest.raises(M3Error, match="two shape parameters"):
        draw_weights(0, (1.0, 2.0), 3)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "x", None, (0.5, 0.5, 0.5)])
def test_weights_are_drawn_of_numbers_above_0(alpha):
    with pytest.raises(m3jax.M3Error, match="mixup: alpha"):
        m3jax.draw_weights(0, alpha)


@pytest.mark.parametrize(("alpha", "n"), [(0.5, 2), ((2.0, 0.5), 2), (0.3, 3)])
def test_how_often_one_expert_is_given_nearly_all(alpha, n):
    draws = [max(draw_weights(seed, alpha, n)) for seed in range(4000)]
    often = sum(share > 0.9 for share in draws) / len(draws)
    assert abs(mixing.likelihood_of_one(alpha, n, 0.9) - often) < 0.025  # three deviations of 4,000 draws


def test_neighbouring_blocks_share_a_walk_and_keep_their_law():
    blocks = {number: f"model.layers.{number}" for number in range(4000)}
    walk = mixing.draw_walk(3, 1.0, 2, blocks, 0.9)
    ratios = np.array([walk[group][0] for group in blocks.values()])
    normal = special.ndtri(ratios)
    assert np.corrcoef(normal[:-1], normal[1:])[0, 1] == pytest.approx(0.9, abs=0.03)
    assert np.corrcoef(normal[:-2], normal[2:])[0, 1] == pytest.approx(0.81, abs=0.05)
    thinned = ratios[::40]  # far enough from each other to be as good as independent
    assert stats.kstest(thinned, stats.uniform.cdf).pvalue > 1e-3
    alone = mixing.draw_walk(3, 0.5, 3, {2: "model.layers.2", 7: "model.layers.7"}, 0.0)
    assert alone == {group: draw_weights(3, 0.5, 3, group) for group in alone}
    steps = mixing.draw_walk(3, 1.0, 2, {0: "model.layers.0", 2: "model.layers.2"}, 0.9)  # past a block that is absent
    own = [special.ndtri(draw_weights(3, 1.0, 2, f"model.layers.{number}")[0]) for number in (0, 2)]
    second = special.ndtri(steps["model.layers.2"][0])
    assert second == pytest.approx(0.81 * own[0] + np.sqrt(1 - 0.81**2) * own[1], abs=1e-5)
