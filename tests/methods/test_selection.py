"""Methods that select entries: the papers' formulas in float64, ties, entries that are zero, and misuse."""

import itertools

import numpy as np
import pytest
from support.matrix import DTYPES, models

import m3jax
from m3jax.cli.displays.methods import explained
from m3jax.methods import catalogue


def near_base(n, shape=(12, 20), spread=0.1, seed=0):
    """A base, experts near it, and their task vectors in float64."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    experts = [(base + rng.standard_normal(shape) * spread * (i + 1)).astype(np.float32) for i in range(n)]
    return base, experts, np.stack([e.astype(np.float64) - base for e in experts])


def merged(method, base, experts, **more):
    """The merged task vector of one tensor."""
    trees = [{"w": np.asarray(e, np.float32)} for e in experts]
    got = m3jax.merge(trees, method, base={"w": np.asarray(base, np.float32)}, **more)
    return np.asarray(got["w"]).astype(np.float64) - base


def of_deltas(method, *deltas, **more):
    """What becomes of task vectors over a base of zeros, as lists."""
    deltas = [np.array(delta, np.float32) for delta in deltas]
    return merged(method, np.zeros(deltas[0].shape), deltas, **more).tolist()


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_sce_is_the_formula_in_float64(topk):
    base, experts, deltas = near_base(3)
    if topk < 1:
        variance = deltas.var(axis=0)
        deltas = deltas * (variance >= np.sort(variance, axis=None)[-int(topk * variance.size)])
    weights = (deltas**2).mean(axis=(1, 2))
    weights = (weights / weights.sum())[:, None, None]
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    want = (weights * agree * deltas).sum(0) / np.maximum((weights * agree).sum(0), 1e-30)
    close(merged(m3jax.sce(topk), base, experts), want)


def test_ram_is_the_formula_in_float64():
    base, experts, deltas = near_base(3)
    changed = np.abs(deltas) > 0.15
    count = changed.sum(0)
    mean = (deltas * changed).sum(0) / np.maximum(count, 1)
    close(merged(m3jax.ram(0.15), base, experts), mean)
    alone = changed & (count == 1)
    shared = (changed & (count > 1)).sum((1, 2)) / alone.sum((1, 2))
    assert shared.min() < 1.5 < shared.max()
    factors = 1 + 0.3 * np.clip(shared, 0, 1.5)
    want = np.where(count == 1, (factors[:, None, None] * deltas * alone).sum(0), mean)
    close(merged(m3jax.ramplus_tl(0.3, 1.5, 0.15), base, experts), want)


def test_nearswap_is_the_formula_in_float64():
    base, experts, (delta,) = near_base(1)
    want = np.clip(0.05 / np.abs(delta), 0, 1) * delta
    close(merged(m3jax.nearswap(0.05), base, experts), want)
    assert of_deltas(m3jax.nearswap(0.5), [0, 0.25, -0.5, 2, -4]) == [0, 0.25, -0.5, 0.5, -0.5]
    assert of_deltas(m3jax.nearswap(0.0), [0, 1, -1]) == [0, 0, 0]


def test_magmax_is_the_formula_in_float64():
    base, experts, deltas = near_base(3)
    want = 0.7 * np.take_along_axis(deltas, np.abs(deltas).argmax(0)[None], 0)[0]
    close(merged(m3jax.magmax(0.7), base, experts), want)


def test_consensus_is_the_formula_in_float64():
    base, experts, deltas = near_base(4)
    weights, limits = np.array([0.4, 1.0, -0.3, 0.2]), np.array([0.2, 0.5, 0.1, 0.3])
    terms = weights[:, None, None] * deltas
    total = terms.sum(0)
    matters = np.abs(terms) >= limits[:, None, None] * np.abs(total - terms)
    for agreement in (1, 2, 4):
        want = np.where(matters.sum(0) >= agreement, 0.6 * total, 0)
        assert np.count_nonzero(want) > 0
        method = m3jax.consensus(tuple(limits), agreement, scale=0.6)
        close(merged(method, base, experts, weights=weights.tolist()), want)
    assert np.count_nonzero(want) < want.size
    halved = m3jax.consensus(tuple(limits), 4, normalize=True, scale=0.6 * weights.sum())
    close(merged(halved, base, experts, weights=weights.tolist()), want)


@pytest.mark.parametrize("normalize", [False, True])
def test_pcb_is_the_formula_in_float64(normalize):
    base, experts, deltas = near_base(3, (100, 120))
    size = base.size
    ordered = np.sort(np.abs(deltas).reshape(3, -1))
    low, high = (ordered[:, i, None, None] for i in (int(size * 0.0001), int(size * 0.9999 - 1)))
    clamped = np.clip(np.abs(deltas), low, high)
    scores = np.exp(3 * ((clamped - low) / (high - low)) ** 2) * np.tanh(deltas * deltas.sum(0))
    ordered = np.sort(scores.reshape(3, -1))
    least, most = (ordered[:, i, None, None] for i in (int(size * 0.7), -1))
    shares = np.clip((scores - least) / (most - least), 0, None)
    weights = np.array([0.5, 0.2, 0.9])[:, None, None]
    total = ((weights if normalize else 1) * shares).sum(0)
    want = (weights * shares * np.sign(deltas) * clamped).sum(0) / np.where(total == 0, 1, total)
    got = merged(m3jax.pcb(0.3, normalize), base, experts, weights=weights.ravel().tolist())
    assert 0.3 < np.count_nonzero(want) / size < 0.9
    # Where all shares are next to nothing they have lost digits, so what is compared is their sum times the result.
    np.testing.assert_allclose(got * total, want * total, rtol=1e-5, atol=1e-7)


def test_pcb_drops_entries_at_the_threshold():
    """Their share is exactly 0: where the others' are 0 too, any other one would be divided by itself."""
    for seed in range(4):
        deltas = np.random.default_rng(seed).normal(0, 0.1, (1, 204)).astype(np.float32)
        # Of one expert, 20 entries and the threshold are not below it.
        assert np.count_nonzero(of_deltas(m3jax.pcb(0.1), *deltas.tolist())) == 20


def test_ties_are_kept_whoever_comes_first():
    a, b, c = [4, 1, 1, 0], [0, 3, 1, 2], [2, 2, 1, 1]
    # Variances 8, 2, 0 and 2 thirds: the two of 2 tie for the second place, and experts who agree are not kept.
    for order in itertools.permutations((a, b, c)):
        assert np.count_nonzero(of_deltas(m3jax.sce(2 / 3), *order)) == 3
    twice = np.array(of_deltas(m3jax.magmax(), [3, -2, 2, 1], [1, 2, 2, -1], [-3, 1, 2, 1]))
    np.testing.assert_allclose(twice, [0, 0, 2, 1 / 3], rtol=1e-7)
    # Experts of one size: |δ| = |the other's|.
    assert of_deltas(m3jax.consensus(), [1, 1, 1], [1, -1, 2]) == [2, 0, 0]
    assert of_deltas(m3jax.ram(0.5), [0.5, 1, 1], [0.5, 0.5, -3]) == [0, 1, -1]


def test_task_vectors_of_zeros_and_one_expert():
    zeros, one = [0.0] * 4, [1.0, -2.0, 0.5, 0.0]
    for method in (m3jax.sce(0.5), m3jax.ramplus_tl(), m3jax.magmax(), m3jax.consensus(), m3jax.pcb()):
        assert of_deltas(method, zeros, zeros) == zeros, method.name
    empty = [{"w": np.zeros((0, 3), np.float32)}] * 2
    assert m3jax.merge(empty, m3jax.sce(0.5), base=empty[0])["w"].shape == (0, 3)
    for method in (m3jax.sce(), m3jax.ramplus_tl(), m3jax.magmax(), m3jax.consensus(agreement=1)):
        assert of_deltas(method, one) == one, method.name
    assert of_deltas(m3jax.sce(0.0), one, zeros) == zeros
    # Who has changed nothing has no weight, and neither has what does not vary.
    assert of_deltas(m3jax.sce(), one, zeros) == one
    assert of_deltas(m3jax.sce(0.99), one, one) == zeros


def test_m3_draws_the_weights_of_a_consensus():
    base, experts = models(DTYPES["float32"], 2)
    method, drawn = m3jax.consensus(0.5), m3jax.draw_weights(3, 0.5)
    got = m3jax.merge(experts, method, base=base, weights=m3jax.mixup(0.5), key=3)
    want = m3jax.merge(experts, method, base=base, weights=drawn)
    assert all(np.array_equal(got[name], want[name]) for name in base)


@pytest.mark.parametrize(
    ("make", "experts", "sentence"),
    [
        (lambda: m3jax.sce(1.5), 2, "sce: select_topk is 1.5, but must lie between 0 and 1"),
        (lambda: m3jax.sce(0.5), 1, "sce: select_topk is 0.5, but the entries of one expert do not vary"),
        (lambda: m3jax.sce(), 17, "sce: merges at most 16 experts, but there are 17"),
        (lambda: m3jax.ram(-1.0), 2, "ram: epsilon is -1, but must be finite and at least 0"),
        (lambda: m3jax.ramplus_tl(float("nan")), 2, "ramplus_tl: r is nan, but must be finite"),
        (lambda: m3jax.nearswap(-0.5), 1, "nearswap: t is -0.5, but must be finite and at least 0"),
        (lambda: m3jax.nearswap(0.5), 2, "nearswap: merges 1 experts, but there are 2"),
        (lambda: m3jax.consensus(agreement=1.5), 2, "consensus: agreement is 1.5, but must be a whole number"),
        (lambda: m3jax.consensus(agreement=3), 2, "consensus: agreement is 3, but there are 2 experts"),
        (lambda: m3jax.pcb(1.5), 2, "pcb: density is 1.5, but must lie between 0 and 1"),
        (lambda: m3jax.pcb(trim_scope="block"), 2, "pcb: trim_scope is 'block', but must be 'model' or 'tensor'"),
        (lambda: m3jax.magmax(), 2, "magmax: cannot be combined with dare"),
    ],
)
def test_misuse_is_said(make, experts, sentence):
    base, trees = models(DTYPES["float32"], experts, {"w": (4,)})
    with pytest.raises(m3jax.M3Error, match=sentence):
        m3jax.merge(trees, make(), base=base, sparsify=m3jax.dare(0.5) if "dare" in sentence else None, key=0)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"merge_method": "nearswap"}, "parameters.t: nearswap needs it for every tensor"),
        ({"merge_method": "nearswap", "parameters": {"t": -1}}, r"parameters.t: -1 is outside \[0, inf\]"),
        ({"merge_method": "nearswap", "parameters": {"t": 1}, "models": 2}, "nearswap merges 1 model, not 2"),
        ({"merge_method": "sce", "parameters": {"select_topK": 0.5}}, "did you mean 'select_topk'"),
        ({"merge_method": "sce", "parameters": {"select_topk": 2}}, r"2 is outside \[0, 1\]"),
        ({"merge_method": "ram", "mixup": {"alpha": 0.5}, "models": 2}, "draws weights, and ram takes none"),
        ({"merge_method": "ram", "base_model": None}, "missing, and ram works on differences from it"),
        (
            {"merge_method": "arcee_fusion"},
            "merge_method: arcee_fusion is left out: .*; take task_arithmetic with spars",
        ),
        ({"merge_method": "pcb", "parameters": {"density": -1}}, r"-1 is outside \[0, 1\]"),
        ({"merge_method": "consensus", "parameters": {"agreement": 0}}, r"0 is outside \[1, inf\]"),
    ],
)
def test_misuse_in_recipes_is_said(recipe, sentence):
    given = {"base_model": "base", **recipe, "models": [f"expert-{i}" for i in range(recipe.get("models", 1))]}
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(m3jax.M3Error, match=sentence):
        m3jax.load_recipe(given)


def test_what_is_left_out_is_said_wherever_it_is_asked_for():
    for ask in (catalogue.method_row, explained):
        with pytest.raises(m3jax.M3Error, match="arcee_fusion is left out: above a million entries"):
            ask("arcee_fusion")
