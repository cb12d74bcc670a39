"""Trees in memory: the draws of `m3jax explore`, in one program where the score allows it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3jax
from m3jax.errors import M3Error


@pytest.fixture(scope="module")
def trees():
    base, a, b, c = (np.random.default_rng(i).standard_normal((8, 4)).astype(np.float32) for i in range(4))
    return [{"layers": [{"w": jnp.asarray(base)}]}, *({"layers": [{"w": jnp.asarray(base + x)}]} for x in (a, b, c))]


def traced_score(tree):
    return -jnp.abs(tree["layers"][0]["w"]).sum()


def host_score(tree):
    return float(-np.abs(np.asarray(tree["layers"][0]["w"])).sum())


@pytest.mark.parametrize(("count", "score"), [(2, traced_score), (3, traced_score), (2, host_score)])
def test_the_best_draw_is_found_and_merged_exactly(trees, tmp_path, count, score):
    base, *experts = trees
    how = {"base": base, "sparsify": m3jax.dare(0.5), "key": 5}
    found = m3jax.explore_trees(experts[:count], m3jax.task_arithmetic(), score=score, samples=6, **how)
    assert found.compiled == (score is traced_score)
    assert found.draws.shape == (6, count)
    assert np.array_equal(found.draws, m3jax.mixup_weights(5, 0.5, count, sample=range(6)))
    assert tuple(found.draws[0]) == m3jax.draw_weights(5, 0.5, count)  # sample 0 is the key's own
    merged = [m3jax.merge(experts[:count], m3jax.task_arithmetic(), weights=list(w), **how) for w in found.draws]
    scores = [host_score(tree) for tree in merged]
    assert np.allclose(found.scores, scores, rtol=1e-6)
    assert found.sample == int(np.argmax(found.scores))
    best = merged[found.sample]
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), found.best, best))
    assert found.experts == pytest.approx([host_score(tree) for tree in experts[:count]])
    assert found.base == pytest.approx(host_score(base))
    rows = found.table.splitlines()
    named = [row.split("  ")[0] for row in rows[1 : count + 3]]
    assert named == ["base", *(f"expert {i}" for i in range(count)), "equal weights"]
    assert rows[count + 3].startswith(f"{found.sample} ")
    assert repr(found).startswith(f"TreeExploration(sample {found.sample} of 6: weights (")
    found.plot(tmp_path / "found.svg")
    assert (tmp_path / "found.svg").stat().st_size > 1000


def test_positions_and_mistakes(trees):
    found = m3jax.explore_trees(trees[:2], m3jax.slerp(), score=traced_score, samples=3, key=1, batch_size=2)
    assert found.draws.shape == (3, 1)
    merged = m3jax.merge(trees[:2], m3jax.slerp(), weights=found.weights[0])
    assert np.array_equal(found.best["layers"][0]["w"], merged["layers"][0]["w"])
    for wrong, sentence in [
        ({"samples": 0}, "the number of samples must be at least 1"),
        ({"samples": 2.5}, "the number of samples"),
        ({"batch_size": -1}, "the batch size must be at least 1"),
        ({"score": lambda tree: tree["layers"][0]["w"]}, "gives an array of shape"),
        ({"score": lambda tree: jnp.nan}, "is NaN of equal weights"),
        ({"score": lambda tree: None}, "gives None for equal weights"),
    ]:
        with pytest.raises(M3Error, match=sentence):
            m3jax.explore_trees(trees[:2], **{"score": traced_score, "samples": 2} | wrong)
    with pytest.raises(M3Error, match="experts"):
        m3jax.explore_trees([], score=traced_score)


def test_methods_that_need_statistics(trees):
    experts = trees[1:3]
    fishers = [jax.tree.map(lambda w, i=i: jnp.abs(w) + i, tree) for i, tree in enumerate(experts)]
    how = {"statistics": fishers}
    found = m3jax.explore_trees(experts, m3jax.fisher(), score=traced_score, samples=3, key=4, **how)
    merges = [m3jax.merge(experts, m3jax.fisher(), weights=list(weights), **how) for weights in found.draws]
    assert found.compiled
    assert np.allclose(found.scores, [host_score(tree) for tree in merges], rtol=1e-6)
    assert np.array_equal(found.best["layers"][0]["w"], merges[found.sample]["layers"][0]["w"])
    with pytest.raises(M3Error, match="fisher: needs the fisher statistics of each of 2 experts"):
        m3jax.explore_trees(experts, m3jax.fisher(), score=traced_score)
    grams = [{"layers": [{"w": np.eye(4, dtype=np.float32)}]}] * 2
    with pytest.raises(M3Error, match=r"regmean: is solved on the host, .* for each w of m3jax.mixup_weights"):
        m3jax.explore_trees(experts, m3jax.regmean(), score=traced_score, statistics=grams)
    for w in m3jax.mixup_weights(4, 0.5, 2, sample=range(1)).tolist():  # as that sentence says
        assert np.isfinite(host_score(m3jax.merge(experts, m3jax.regmean(), weights=w, statistics=grams)))


def untraceable(tree):
    """Indices that depend on values, which no program of JAX has, and float64."""
    w = tree["layers"][0]["w"]
    return 1.0 + 1e-12 * float(w[w > 0].sum()) * int(m3jax.digest(tree) != "")


def test_scores_that_no_program_can_have_are_of_one_merge_after_the_other_with_all_digits(trees):
    found = m3jax.explore_trees(trees[:2], score=untraceable, samples=4, key=2)
    assert not found.compiled
    merges = [m3jax.merge(trees[:2], weights=list(weights)) for weights in found.draws]
    assert found.scores.tolist() == [untraceable(tree) for tree in merges]
    assert len(set(found.scores.tolist())) == 4
