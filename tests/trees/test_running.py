"""Averages along a run: of trees at once, and kept up by a training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import m3jax
from m3jax import M3Error, RunningMerge, soup

STEPS = 5
SCHEDULES = ["uniform", {"method": "ema", "decay": 0.7}, {"method": "wsm", "decay": "1-sqrt"}]


def tree(step: int):
    rng = np.random.default_rng(step)
    w = rng.standard_normal((8, 6)).astype(np.float32) * np.float32(10.0) ** rng.integers(-3, 3, (8, 6)).astype("f4")
    return {"w": jnp.asarray(w), "h": jnp.asarray(w[0], jnp.bfloat16), "zero": jnp.full(2, -0.0), "ids": jnp.arange(3)}


TREES = [tree(step) for step in range(STEPS)]


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def oracle(coefficients) -> np.ndarray:
    """Σ cₖ·xₖ of `w` in float32, the first step first."""
    terms = [np.float32(c) * np.asarray(t["w"]) for c, t in zip(coefficients, TREES, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_average_however_it_is_made(schedule, tmp_path) -> None:
    whole = soup(TREES, schedule)
    shares = {
        "uniform": [1.0] * STEPS,
        "ema": [0.7 ** (STEPS - 1 - k) for k in range(STEPS)],
        "wsm": [np.sqrt((k + 1) / STEPS) - np.sqrt(k / STEPS) for k in range(STEPS)],
    }[schedule if isinstance(schedule, str) else schedule["method"]]
    np.testing.assert_array_equal(whole["w"], oracle(np.array(shares) / sum(shares)))
    assert same(whole["ids"], TREES[0]["ids"])

    place = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    average = RunningMerge.start(TREES[0], schedule, window=STEPS)
    jitted = RunningMerge.start(jax.eval_shape(lambda: TREES[0]), schedule, window=STEPS)
    for step, params in enumerate(TREES):
        average = average.update(params)
        jitted = jax.jit(RunningMerge.update)(jitted, params | {"w": jax.device_put(params["w"], place)})
        if step == 2:  # a training that was interrupted
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "average", average)
                checkpointer.wait_until_finished()
                average = checkpointer.restore(tmp_path / "average", average)
    assert same(average.read(TREES[-1]), whole)
    assert same(jax.jit(RunningMerge.read)(jitted, TREES[-1]), whole)


def test_averages_without_an_end() -> None:
    mean, moving = RunningMerge.start(TREES[0]), RunningMerge.start(TREES[0], {"method": "ema", "decay": 0.7})
    kept, new = np.float32(0.7), np.float32(1 - 0.7)
    total = expected = np.asarray(TREES[0]["w"])
    for step, params in enumerate(TREES):
        mean, moving = mean.update(params), jax.jit(RunningMerge.update)(moving, params)
        if step:
            total, expected = total + np.asarray(params["w"]), kept * expected + new * np.asarray(params["w"])
        np.testing.assert_array_equal(mean.read(params)["w"], total * np.float32(1 / (step + 1)))
        np.testing.assert_array_equal(moving.read(params)["w"], expected)


def test_an_average_is_not_read_before_it_is_one() -> None:
    average = RunningMerge.start(TREES[0], window=2).update(TREES[0])
    with pytest.raises(M3Error, match="1 of 2 steps have been taken"):
        average.read(TREES[0])
    assert np.isnan(jax.jit(RunningMerge.read)(average, TREES[0])["w"]).all()
    full = average.update(TREES[1])
    with pytest.raises(M3Error, match="its window of 2 steps is full"):
        full.update(TREES[2])
    assert np.isnan(jax.jit(RunningMerge.update)(full, TREES[2]).read(TREES[0])["w"]).all()
    with pytest.raises(M3Error, match="other leaves"):
        average.update({"w": TREES[0]["w"]})
    with pytest.raises(M3Error, match="other leaves"):
        full.read({"w": TREES[0]["w"]})


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ("lawa", "'lawa' is not known: write uniform, ema or wsm"),
        ("ema", "the decay of ema is None: write a number between 0 and 1"),
        ({"method": "ema", "decay": 1.0}, "the decay of ema is 1.0"),
        ({"method": "wsm", "decay": "cosine"}, "the decay of wsm is 'cosine': write one of linear, 1-sqrt"),
        ({"method": "uniform", "decay": 0.5}, "uniform has no decay"),
        ({"method": "uniform", "window": 5}, "'window' is no key of it"),
    ],
)
def test_schedules_that_are_none(schedule, sentence) -> None:
    with pytest.raises(M3Error, match=sentence):
        soup(TREES, schedule)


def test_what_needs_steps() -> None:
    with pytest.raises(M3Error, match="there is no tree"):
        soup([])
    with pytest.raises(M3Error, match="wsm weighs a window"):
        RunningMerge.start(TREES[0], "wsm")
    with pytest.raises(M3Error, match="0 is no number of steps"):
        RunningMerge.start(TREES[0], window=0)
    assert same(soup(TREES[:1]), m3jax.merge(TREES[:1]))
