"""The arithmetic against numpy, exhaustively where that is possible."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import compiling, oracle

from m3jax.arithmetic import exact

ALL_16_BIT = np.arange(2**16, dtype=np.uint16)


def bits(x):
    return np.asarray(x).view(np.uint32)


def odd_float32s(count=1 << 20):
    """Every exponent, random mantissas: subnormals, halfway cases, infinities and NaNs among them."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, count, dtype=np.uint32)
    words[::3] &= np.uint32(0xFFFF8000)  # exact halfway between two bfloat16
    words[1::5] &= np.uint32(0xFFFFF000)  # and between two float16
    return words.view(np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_widening_is_exact_for_every_value(dtype):
    x = ALL_16_BIT.view(dtype)
    want = oracle.wide(x)
    got = np.asarray(compiling.jit(exact.widen)(x))
    finite = ~np.isnan(want)
    assert (bits(got)[finite] == bits(want)[finite]).all()
    assert np.isnan(got[~finite]).all()


@pytest.mark.parametrize("name", exact.FLOAT_DTYPES)
def test_narrowing_rounds_as_numpy_does(name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    x = oracle.flush(odd_float32s())
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(dtype)
    got = np.asarray(compiling.jit(lambda v: exact.narrow(v, dtype))(x))
    nan = np.isnan(x)
    assert got.dtype == dtype
    assert got[~nan].tobytes() == want[~nan].tobytes()
    assert np.isnan(got[nan].astype(np.float32)).all()


def test_nans_get_one_pattern():
    nans = np.array([0x7F800001, 0xFFC01234, 0x7FFFFFFF], np.uint32).view(np.float32)
    for name in exact.FLOAT_DTYPES:
        got = np.asarray(exact.narrow(jnp.asarray(nans), jnp.dtype(name)))
        assert len({v.tobytes() for v in got}) == 1, name


def test_flush_keeps_signs_and_the_smallest_kept_number():
    edge = np.float32(2.0**-125)
    x = np.array([edge, np.nextafter(edge, np.float32(0)), -edge, 1e-45, -1e-45, 0.0, -0.0, np.inf], np.float32)
    want = np.array([edge, 0.0, -edge, 0.0, -0.0, 0.0, -0.0, np.inf], np.float32)
    assert (bits(compiling.jit(exact.flush)(x)) == bits(want)).all()


def naive(c, xs, zero):
    return sum((c[i] * x for i, x in enumerate(xs)), start=jnp.float32(0))


def fenced(c, xs, zero):
    terms = [exact.multiply(c[i], x, zero) for i, x in enumerate(xs)]
    total = terms[0]
    for term in terms[1:]:
        total = exact.add(total, term)
    return total


@pytest.mark.parametrize("zero", [np.uint32(0), None], ids=["run-time zero", "opaque zero"])
def test_no_compiler_contracts_across_the_fence(zero):
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal(1 << 20).astype(np.float32) for _ in range(3)]
    c = np.array([0.3, 0.5, 0.2], np.float32)
    want = c[0] * xs[0]
    for i in (1, 2):
        want = want + c[i] * xs[i]
    got = (
        compiling.jit(fenced)(c, xs, zero)
        if zero is not None
        else compiling.jit(lambda c, xs: fenced(c, xs, None))(c, xs)
    )
    assert (bits(got) == bits(want)).all()


def test_the_fence_is_needed():
    """If this fails, compilers have stopped contracting, and the fence may go."""
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal(1 << 16).astype(np.float32) for _ in range(2)]
    c = np.array([0.3, 0.7], np.float32)
    got = compiling.jit(lambda c, xs: c[0] * xs[0] + c[1] * xs[1])(c, xs)
    assert (bits(got) != bits(c[0] * xs[0] + c[1] * xs[1])).any()


def test_products_near_the_smallest_normal_number_agree():
    """Hardware flushes before or after rounding; the wider limit hides the difference."""
    rng = np.random.default_rng(2)
    a = (rng.uniform(1, 2, 1 << 16) * 2.0**-63).astype(np.float32)
    b = (rng.uniform(0.5, 2, 1 << 16) * 2.0**-63).astype(np.float32)
    got = compiling.jit(exact.multiply)(a, b, np.uint32(0))
    assert (bits(got) == bits(oracle.flush(a * b))).all()


def test_every_step_is_an_identity_to_differentiation():
    def f(x):
        y = exact.multiply(jnp.float32(3.0), exact.widen(x), None)
        return exact.narrow(exact.subtract(y, jnp.float32(1.0)), jnp.bfloat16).astype(jnp.float32)

    value, slope = jax.value_and_grad(f)(jnp.bfloat16(2.0))
    assert (value, slope) == (5.0, 3.0)
    assert jax.grad(lambda a: exact.multiply(a, jnp.float32(4.0), np.uint32(0)))(jnp.float32(2.0)) == 4.0


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="float32, bfloat16, float16"):
        exact.widen(np.zeros(1, dtype))
    with pytest.raises(TypeError, match="float32, bfloat16, float16"):
        exact.narrow(jnp.zeros(1), dtype)


def test_quotients_are_rounded_as_numpy_rounds_them():
    """Any two float32s, quotients next to a halfway point, and every edge of the range with every other."""
    rng = np.random.default_rng(3)
    edges = np.array([0, 2.0**-125, 2.0**-124, 1, 1 + 2.0**-23, 2 - 2.0**-23, 3, 2.0**127, np.inf, np.nan], np.float32)
    edges = np.concatenate([edges, -edges, [np.finfo(np.float32).max]]).astype(np.float32)
    near = rng.uniform(1, 2, (2, 1 << 18)).astype(np.float32)
    low = np.exp2(rng.uniform(-130, -120, 1 << 16)).astype(np.float32)
    with np.errstate(all="ignore"):
        a = np.concatenate([odd_float32s(), np.repeat(edges, len(edges)), near[0] * near[1], low * near[1, : 1 << 16]])
        b = np.concatenate([odd_float32s()[::-1], np.tile(edges, len(edges)), near[1], near[1, : 1 << 16]])
        a, b = oracle.flush(a), oracle.flush(b)
        want = oracle.flush(a / b)
    got = np.asarray(compiling.jit(exact.divide)(a, b))
    number = ~np.isnan(want)
    assert (bits(got)[number] == bits(want)[number]).all()
    assert np.isnan(got[~number]).all()


def test_quotients_have_derivatives():
    one, other = (jax.grad(exact.divide, at)(jnp.float32(3.0), jnp.float32(2.0)) for at in (0, 1))
    assert (one, other) == (0.5, -0.75)
