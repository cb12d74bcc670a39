"""Flax trees as tensors: names, shapes and dtypes of a pytree, and what an anatomy makes of them block by block."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from m3jax.anatomy import Anatomy, group_of
from m3jax.checkpoints import TensorInfo
from m3jax.checkpoints.protocol import DTYPE_NAMES


def infos(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, dtype) for name, shape in shapes.items()}


def of_tree(tree: Any) -> dict[str, TensorInfo]:
    """Leaves by their path joined by "."; of shapes alone (`jax.eval_shape`) or of arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {}
    for path, leaf in leaves:
        name = ".".join(_key(key) for key in path)
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        shape, dtype = ((*leaf.shape, 2), "uint32") if key else (leaf.shape, np.dtype(leaf.dtype).name)
        found[name] = TensorInfo(name, tuple(shape), DTYPE_NAMES[dtype])
    return found


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(key)


def by_block(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[tuple[int, ...], str, int | None]]:
    """Every tensor of the model, one per block: its canonical name, with its shape, its group and its block."""
    found = {}
    for name, part in anatomy.parts.items():
        if part.kind not in {"parameter", "statistics", "adapter"}:
            continue
        shape = tensors[name].shape
        if part.stack_axis is None:
            found[part.canonical] = (shape, group_of(anatomy, name, "layer"), part.block)
        for i, block in enumerate(part.blocks):
            rest = shape[: part.stack_axis] + shape[part.stack_axis + 1 :]
            own = group_of(anatomy, name, "tensor", block)
            found[own] = (rest, group_of(anatomy, name, "layer", block), block)
            assert part.block_names[i] == own
    return found
