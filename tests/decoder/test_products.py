"""Products of weights and activations: the same whichever way a processor goes about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.decoder.products import project


@pytest.fixture(params=[1, 2], autouse=True, ids=["of one device", "of two devices"])
def devices(request, monkeypatch):
    """How many devices there seem to be: rows of weights are cut in pieces on one alone."""
    monkeypatch.setattr(jax, "device_count", lambda: request.param)
    return request.param


def factors(dtype, rows, out, width):
    source = np.random.default_rng(rows + out + width)
    made = source.standard_normal((out, width), np.float32), source.standard_normal((rows, width), np.float32)
    return [jnp.asarray(each, dtype) for each in made]


def exact(weight, x):
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 64, 65])
@pytest.mark.parametrize(
    ("out", "width"),
    [(6, 2048), (5, 4096), (1, 8192), (7, 6144), (3, 40), (300, 8), (0, 8), (0, 2048)],
)
def test_products_are_added_up_in_float32(dtype, rows, out, width):
    weight, x = factors(dtype, rows, out, width)
    found = jax.jit(lambda *both: project(*both, jnp.float32))(weight, x)  # traced anew
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact(weight, x), rtol=0, atol=1e-5 * width**0.5)
    rounded = project(weight, x.reshape(rows, 1, width))
    assert (rounded.shape, rounded.dtype) == ((rows, 1, out), dtype)
    steps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(rounded[:, 0], np.float64), exact(weight, x), steps, 1e-5 * width**0.5)


@pytest.mark.parametrize(("dtype", "out", "width"), [(jnp.bfloat16, 6, 2048), (jnp.float16, 74, 24)])
@pytest.mark.parametrize("rows", [2, 65])
def test_products_have_derivatives(dtype, out, width, rows):
    weight, x = factors(dtype, rows, out, width)
    of_weight, of_x = jax.grad(lambda *both: project(*both, jnp.float32).sum(), argnums=(0, 1))(weight, x)
    ones = np.ones((rows, out))
    np.testing.assert_allclose(of_weight.astype(np.float32), exact(np.asarray(x, np.float64).T, ones.T), 0.01, 0.05)
    np.testing.assert_allclose(of_x.astype(np.float32), exact(np.asarray(weight, np.float64).T, ones), 0.01, 0.5)


def test_what_is_divided_among_devices_is_not_cut_in_pieces(devices):
    weight, x = factors(jnp.bfloat16, 1, 6, 2048)
    told = str(jax.make_jaxpr(lambda *both: project(*both, jnp.float32))(weight, x))
    assert ("bf16[12,1024]" in told) == (jax.default_backend() == "cpu" and devices == 1)


def test_a_product_outside_of_jit_is_compiled_once(caplog):
    weight, x = factors(jnp.bfloat16, 2, 6, 2048)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.jit(lambda y: y + 1)(x)  # traced anew, so that what is looked for is known to be told
        assert "ompil" in caplog.text
        project(weight, x)
        caplog.clear()
        project(weight, x)
    assert "ompil" not in caplog.text
