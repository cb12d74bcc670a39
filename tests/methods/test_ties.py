"""TIES over a model: thresholds and the majority's sign from one reading, and when it has to be another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.arithmetic import ranking
from m3jax.methods import ties
from m3jax.methods.base import Extent, Known, Place

EXPERTS, ENTRIES = 2, 4096
DENSITY = {"density": (0.5, 0.3)}


def by_hand(values, thresholds):
    """The sign that more of the trimmed sums have."""
    kept = [np.where(np.abs(v).view(np.uint32) >= t, v, np.float32(0)) for v, t in zip(values, thresholds, strict=True)]
    signs = np.sign(kept[0] + kept[1])
    return int(np.sign((signs > 0).sum() - (signs < 0).sum()))


def guessed(values, suggested):
    """The state after the reading that confirms what a sample suggests."""
    method = ties.ties(0.5, trim_scope="model", sign_election="unweighted")
    (measure,), options = method.measures, method.options
    coefficients = ties.Coefficients(np.ones(EXPERTS, np.float32), None, None)
    known = Known(coefficients, {}, (np.uint32(0), np.uint32(0)), None, np.uint32(0))
    values = tuple(jnp.asarray(value) for value in values)
    state = measure.begin(options, DENSITY, Extent(ENTRIES, (), EXPERTS))
    state = state._replace(search=ranking.bracket(state.search, suggested), expected=suggested)
    (step,) = (each for each in measure.rounds(Place(True, "cpu", 2**30)) if each.name == "guess")
    rows = jax.jit(step.counts, static_argnums=0)(options, values, known, state, None)
    counts = step.finish([np.asarray(row) for row in rows]).astype(np.int64)
    there = next(each for each in measure.rounds(Place(True, "gpu", 2**30)) if each.name == "guess")
    tallies = jax.jit(there.counts, static_argnums=0)(options, values, known, state, None)
    np.testing.assert_array_equal(counts, tallies)  # as devices count
    words = (counts >> 32).astype(np.uint32), counts.astype(np.uint32)
    return measure, measure.advance(options, "guess", state, words)


@pytest.mark.parametrize("skew", [0.0, 0.2])
@pytest.mark.parametrize("step", [0.0, 0.02])
def test_a_majority_that_is_told_by_the_sample_is_the_model_s(skew, step):
    """Signs by thresholds that are nearly right decide only where no other thresholds there would."""
    rng = np.random.default_rng(3)
    told = set()
    for off in (0, 1, 300, 20000, 2**20):
        values = [(rng.standard_normal(ENTRIES) + skew).astype(np.float32) for _ in range(EXPERTS)]
        values = [np.float32(step) * np.round(v / np.float32(step)) if step else v for v in values]
        sorted_bits = [np.sort(np.abs(v).view(np.uint32)) for v in values]
        right = [bits[int(ENTRIES * (1 - d)) - 1] for bits, d in zip(sorted_bits, DENSITY["density"], strict=True)]
        measure, state = guessed(values, np.array(right, np.uint32) + np.uint32(off))
        told.add((bool(state.search.found), bool(state.decided)))
        assert measure.settled(None, "fine", state) == (off < 2**20)
        if state.search.found:
            assert state.search.low.tolist() == [int(t) for t in right]
        if state.decided:
            assert int(measure.conclude(None, state, None).majority) == by_hand(values, right)
    assert (True, True) in told
    assert (False, False) in told


def test_what_is_not_decided_is_counted_again():
    """One entry that a wrong threshold drops turns the majority, so that nothing is decided by it."""
    values = [np.zeros(ENTRIES, np.float32) for _ in range(EXPERTS)]
    values[0][:2048] = -np.linspace(1.0, 1.001, 2048, dtype=np.float32)
    values[0][2048:] = np.linspace(1.0, 1.001, 2048, dtype=np.float32)
    right = np.sort(np.abs(values[0]).view(np.uint32))[ENTRIES // 2 - 1]
    suggested = np.array([right + 64, 0], np.uint32)
    measure, state = guessed(values, suggested)
    assert state.search.found
    assert not state.decided
    assert measure.settled(None, "coarse", state)
    assert not measure.settled(None, "signs", state)
