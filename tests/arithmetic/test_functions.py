"""Functions made of exact operations: the oracle's bits, and how far they are from the functions themselves."""

import numpy as np
import pytest
from support import compiling, oracle

from m3jax.arithmetic import functions

RNG = np.random.default_rng(0)
SIGNS = RNG.choice([-1.0, 1.0], 20_000)
ARGUMENTS = {
    "exp": np.concatenate([RNG.uniform(0, 80, 10_000), RNG.uniform(0, 1, 10_000)]),
    "reciprocal": SIGNS * 2.0 ** RNG.uniform(-120, 100, 20_000),
    "tanh": SIGNS * 2.0 ** RNG.uniform(-80, 5, 20_000),
}
FUNCTIONS = {"exp": (np.exp, 2), "reciprocal": (np.reciprocal, 2), "tanh": (np.tanh, 6)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_oracles_and_near_the_truth(name):
    x = ARGUMENTS[name].astype(np.float32)
    got = np.asarray(compiling.jit(getattr(functions, name))(x, np.uint32(0)))
    assert got.tobytes() == getattr(oracle, name)(x).astype(np.float32).tobytes()
    truth, units = FUNCTIONS[name]
    want = truth(x.astype(np.float64))
    assert np.max(np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32))) <= units


def test_functions_at_their_ends():
    zero = np.uint32(0)
    ends = np.array([0.0, -0.0, 1e30, -np.inf], np.float32)
    assert np.asarray(compiling.jit(functions.tanh)(ends, zero)).tolist() == [0.0, 0.0, 1.0, -1.0]
    assert np.asarray(compiling.jit(functions.exp)(np.array([0.0, -3.0], np.float32), zero)).tolist() == [1.0, 1.0]
    assert float(compiling.jit(functions.exp)(np.array([200.0], np.float32), zero)[0]) == pytest.approx(np.exp(80.0))
