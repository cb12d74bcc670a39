"""Breadcrumbs and DELLA: what they keep, in float64, at their edges, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.directories import WIDE, read, recipe, write, write_models
from support.matrix import same

import m3jax
from m3jax.methods import catalogue
from m3jax.methods.della import ranks_by_searching, ranks_by_sorting
from m3jax.recipe import load_recipe


def merged(delta, sparsify, seed=0):
    """What a sparsifier leaves of one task vector."""
    base = {"w": np.zeros_like(delta)}
    return np.asarray(m3jax.merge([{"w": delta}], m3jax.task_arithmetic(), base=base, sparsify=sparsify, key=seed)["w"])


def test_breadcrumbs_keeps_the_middle():
    rng = np.random.default_rng(0)
    delta = rng.permutation(np.arange(1, 101)).astype(np.float32) * np.where(rng.random(100) < 0.5, -1, 1)
    left = merged(delta.astype(np.float32).reshape(10, 10), m3jax.breadcrumbs(0.3, 0.05))
    assert sorted(np.abs(left[left != 0])) == list(range(66, 96))  # ⌊0.05·100⌋ largest gone, then down to ⌊0.3·100⌋
    rescaled = merged(delta.astype(np.float32), m3jax.breadcrumbs(0.5, 0.05, rescale=True))
    assert np.abs(rescaled).max() == 190.0


def test_breadcrumbs_drops_fewer_of_the_largest_where_too_little_would_be_left():
    delta = np.arange(1, 11, dtype=np.float32)
    assert merged(delta, m3jax.breadcrumbs(0.9, 0.5)).tolist() == [*range(1, 10), 0]
    assert merged(delta, m3jax.breadcrumbs(1.0, 0.5)).tolist() == delta.tolist()
    assert merged(delta, m3jax.breadcrumbs(0.0, 0.5)).tolist() == [0] * 10
    assert merged(delta, m3jax.breadcrumbs(0.5, 0.0)).tolist() == [0] * 5 + [6, 7, 8, 9, 10]


def test_breadcrumbs_keeps_all_that_tie():
    delta = np.array([1, 2, 2, 2, 3, 9], np.float32)
    assert merged(delta, m3jax.breadcrumbs(0.5, 0.2)).tolist() == [0, 2, 2, 2, 3, 0]


@pytest.mark.parametrize("density", [0.0, 0.4])
def test_density_0_keeps_nothing(density):
    """Of one expert, whatever the sparsifier; the other is merged as it is asked for."""
    delta = np.arange(1, 9, dtype=np.float32)
    for sparsifier in (m3jax.dare, m3jax.magnitude, m3jax.breadcrumbs, m3jax.della):
        left = merged(delta, sparsifier(density))
        assert (np.count_nonzero(left) == 0) == (density == 0.0) or sparsifier is m3jax.della


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.8, 0.15), (0.3, 0.05)])
def test_della_keeps_by_rank_at_the_right_rates(density, epsilon):
    rows, columns = 400, 500
    delta = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    kept = merged(delta, m3jax.della(density, epsilon), seed=3) != 0
    order = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    for quintile in range(5):
        inside = order // (columns // 5) == quintile
        ranks = np.arange(quintile * columns // 5, (quintile + 1) * columns // 5)
        want = (density - epsilon + 2 * epsilon * ranks / (columns - 1)).mean()
        sigma = np.sqrt(want * (1 - want) / inside.sum())
        assert abs(kept[inside].mean() - want) < 5 * sigma, quintile
    assert abs(kept.mean() - density) < 5 * np.sqrt(density * (1 - density) / delta.size)


def test_della_keeps_the_expectation():
    delta = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    mean = np.mean([merged(delta, m3jax.della(0.6, 0.2), seed=s) for s in range(200)], axis=0)
    assert abs((mean / delta).mean() - 1) < 0.01


def test_della_of_equal_magnitudes_is_one_probability():
    delta = np.ones((50, 2000), np.float32)
    left = merged(delta, m3jax.della(0.5, 0.4))
    assert set(np.unique(left)) == {0.0, 2.0}
    assert abs((left != 0).mean() - 0.5) < 0.01


def test_della_refuses_probabilities_that_are_none():
    sentence = r"della: density 0\.9 with epsilon 0\.15 keeps entries with probabilities from 0\.75 to 1\.05"
    with pytest.raises(m3jax.M3Error, match=sentence):
        merged(np.ones(4, np.float32), m3jax.della(0.9))
    with pytest.raises(m3jax.M3Error, match=r"take an epsilon below 0\.1"):
        merged(np.ones(4, np.float32), m3jax.della(0.1, 0.2))
    assert merged(np.ones(4, np.float32), m3jax.della(1.0, 0.5)).tolist() == [1.0] * 4


def test_one_expert_is_a_legal_merge():
    base, expert = {"w": np.ones(3, np.float32)}, {"w": np.full(3, 3.0, np.float32)}
    assert np.asarray(m3jax.merge([expert])["w"]).tolist() == [3.0] * 3
    scaled = m3jax.merge([expert], m3jax.task_arithmetic(scale=0.5), base=base)
    assert np.asarray(scaled["w"]).tolist() == [2.0] * 3
    assert np.asarray(m3jax.merge([expert], m3jax.ties(1.0), base=base)["w"]).tolist() == [3.0] * 3
    assert len(load_recipe({"merge_method": "ties", "base_model": "b", "models": ["a"]}).experts) == 1


ROWS = {
    "della_linear": (
        {"density": 0.5, "epsilon": 0.2},
        {"method": "task_arithmetic", "sparsify": "della", "keep": 0.5, "epsilon": 0.2},
    ),
    "della": ({"density": 0.6}, {"method": "ties", "normalize": True, "sparsify": "della", "keep": 0.6}),
    "breadcrumbs": (
        {"density": 0.6, "gamma": 0.1},
        {"method": "task_arithmetic", "sparsify": "breadcrumbs", "keep": 0.6, "gamma": 0.1},
    ),
    "breadcrumbs_ties": (
        {"density": 0.6},
        {"method": "ties", "normalize": False, "sparsify": "breadcrumbs", "keep": 0.6},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_recipes_of_these_names_are_the_oracles(tmp_path, name):
    parameters, told = ROWS[name]
    base, experts = write_models(tmp_path / "in", n=3, shapes=WIDE)
    asked = recipe(tmp_path / "in", 3, merge_method=name, parameters=parameters, seed=5)
    m3jax.merge_checkpoint(asked, tmp_path / "out", chunk_entries=2**16)
    assert same(read(tmp_path / "out"), oracle.merge(experts, base, seed=5, **told)) == (True, [])


@pytest.mark.parametrize("row", catalogue.METHODS, ids=lambda row: row.name)
def test_every_row_merges_with_its_defaults(tmp_path, row):
    count = min(row.experts[1] or 3, 3)
    shapes = {"model.layers.0.w": (8, 6), "model.norm.weight": (6,)}
    _, experts = write_models(tmp_path / "in", n=count, shapes=shapes)
    asked = recipe(tmp_path / "in", count, merge_method=row.name)
    for i, model in enumerate(asked["models"] if row.statistics else ()):
        wide = {name: np.float32(x) for name, x in experts[i].items()}
        matrices = {name: x.T @ x + np.eye(x.shape[-1], dtype=np.float32) for name, x in wide.items() if x.ndim == 2}
        told = matrices if row.name == "regmean" else {name: np.square(x) for name, x in wide.items()}
        own = write(tmp_path / "in" / f"{i}", told)
        asked["models"][i] = {"model": model, "statistics": str(own)}
    needed = {p.name: 0.5 for p in row.parameters if p.default is None}
    if row.base != "task_vectors":
        del asked["base_model"]
    m3jax.merge_checkpoint({**asked, "parameters": needed}, tmp_path / "out")
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == m3jax.verify(tmp_path / "out").digest


@pytest.mark.parametrize("shape", [(7,), (4, 1), (2, 2, 65)])
def test_ranks_are_the_same_by_sorting_and_by_searching(shape):
    magnitudes = np.random.default_rng(0).integers(0, 20, shape).astype(np.uint32)
    below = (magnitudes[..., None, :] < magnitudes[..., None]).sum(-1)
    up_to = (magnitudes[..., None, :] <= magnitudes[..., None]).sum(-1)
    for ranks in (ranks_by_sorting, ranks_by_searching):
        np.testing.assert_array_equal(ranks(jnp.asarray(magnitudes)), below + up_to - 1)
