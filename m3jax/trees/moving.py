"""Arrays of one library as those of another, where they lie: what `views_permuted` does to files."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.views_permuted import Arithmetic, Permuted


def moved(arrays: Mapping[str, jax.Array], tensors: Mapping[str, Permuted]) -> dict[str, jax.Array]:
    """Arrays whose entries are those of others, each in its place; inside and outside of jit.

    Args:
        arrays: By the names that they are stored under.
        tensors: How each is made, by its name; each of one stored array.

    Example:
        >>> turned = Permuted((3, 2), "F32", (3, 2), (1, 3), (("kernel", 0),))
        >>> moved({"kernel": jnp.arange(6.0).reshape(2, 3)}, {"weight": turned})["weight"].tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    return {name: _moved(arrays[tensor.places[0][0]], tensor) for name, tensor in tensors.items()}


def _moved(array: jax.Array, tensor: Permuted) -> jax.Array:
    """One array: taken apart at every axis that is walked, of which those that are not are picked, and turned."""
    ((_, start),) = tensor.places
    walked = [axis for axis, size in enumerate(tensor.fine) if size > 1]
    outermost_first = sorted(walked, key=lambda axis: -tensor.strides[axis])
    shape: list[int] = []
    index: list[int | slice] = []
    extent = array.size
    for axis in outermost_first:
        step, size = tensor.strides[axis], tensor.fine[axis]
        shape += [extent // (step * size), size]
        index += [start // (step * size) % shape[-2], slice(None)]
        extent = step
    shape.append(extent)
    index.append(start % extent)
    found = array.reshape(shape)[tuple(index)]
    found = found.transpose([outermost_first.index(axis) for axis in walked]).reshape(tensor.shape)
    return found if tensor.arithmetic is None else _changed(found, tensor.arithmetic)


def _changed(array: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    wide, operand = array.astype(jnp.float32), np.float32(arithmetic.operand)
    if arithmetic.operation == "plus":
        return (wide + operand).astype(array.dtype)
    return (wide * operand if arithmetic.operation == "times" else wide / operand).astype(array.dtype)
