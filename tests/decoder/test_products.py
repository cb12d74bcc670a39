"""Products of weights and activations: the same whichever way a processor goes about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.decoder.products import project


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
    [(6, 2048), (5, 4096), (1, 8192), (7, 6144), (3, 40), (256, 8), (257, 8), (774, 24), (1024, 16)],
)
def test_products_are_added_up_in_float32(dtype, rows, out, width):
    weight, x = factors(dtype, rows, out, width)
    found = jax.jit(project, static_argnums=2)(weight, x, jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact(weight, x), rtol=0, atol=1e-5 * width**0.5)
    rounded = project(weight, x.reshape(rows, 1, width))
    assert (rounded.shape, rounded.dtype) == ((rows, 1, out), dtype)
    steps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(rounded[:, 0], np.float64), exact(weight, x), steps, 1e-5 * width**0.5)


@pytest.mark.parametrize(("dtype", "out", "width"), [(jnp.bfloat16, 6, 2048), (jnp.float16, 774, 24)])
@pytest.mark.parametrize("rows", [2, 65])
def test_products_have_derivatives(dtype, out, width, rows):
    weight, x = factors(dtype, rows, out, width)
    of_weight, of_x = jax.grad(lambda *both: project(*both, jnp.float32).sum(), argnums=(0, 1))(weight, x)
    ones = np.ones((rows, out))
    np.testing.assert_allclose(of_weight.astype(np.float32), exact(np.asarray(x, np.float64).T, ones.T), 0.01, 0.05)
    np.testing.assert_allclose(of_x.astype(np.float32), exact(np.asarray(weight, np.float64).T, ones), 0.01, 0.5)


def test_half_precision_weights_are_not_widened_all_at_once():
    weight, x = factors(jnp.float16, 1, 64 * 512, 64)
    compiled = jax.jit(project).lower(weight, x).compile()
    if jax.default_backend() == "cpu":
        assert compiled.memory_analysis().temp_size_in_bytes < weight.nbytes / 4
