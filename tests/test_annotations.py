"""The annotations of arrays are checked in every call that a test makes: see conftest.py."""

import jax.numpy as jnp
import pytest
from support.shapes import of_arrays

from m3jax.arithmetic import ranking, threefry
from m3jax.methods.linear import weighted_sum

INDEX = threefry.flat_index((4,))
WORDS = jnp.zeros((1, 2), jnp.uint32)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: threefry.mask_words(jnp.zeros((1, 3), jnp.uint32), INDEX, 2), "keys"),
        (lambda: threefry.mask_words(WORDS.astype(jnp.int32), INDEX, 2), "keys"),
        (lambda: threefry.mask_words(WORDS, INDEX[:1], 2), "index"),
        (lambda: ranking.bins((jnp.ones(4),), jnp.zeros((1, 1), jnp.uint32), 16), "low"),
        (lambda: weighted_sum(jnp.ones((2, 2)), (jnp.ones(4), jnp.ones(4)), None), "coefficients"),
    ],
)
def test_a_call_that_breaks_its_annotations_is_refused(call, named):
    with pytest.raises(TypeError, match=f"checking parameter '{named}'"):
        call()


def test_calls_that_keep_to_them_go_through():
    assert [word.shape for word in threefry.mask_words(WORDS, INDEX, 2)] == [(4,), (4,)]
    assert weighted_sum(jnp.ones(2), (jnp.ones(4), jnp.ones(4)), None).tolist() == [2.0] * 4


def test_only_what_speaks_of_arrays_is_checked():
    shapes = threefry.mask_words.__annotations__
    assert [name for name, hint in shapes.items() if of_arrays(hint)] == ["keys", "index", "return"]
