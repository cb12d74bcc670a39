"""From Hugging Face's tensor names to the decoder's parameters, and onto devices."""

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from m3jax.checkpoints import open_checkpoint
from m3jax.checkpoints.protocol import DTYPES, Checkpoint
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.modeling import Params, abstract_params, fitting
from m3jax.errors import M3Error
from m3jax.trees.matching import named_leaves

Shape: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[str | int, ...]

_FLOATS = ("BF16", "F16", "F32", "F64")
_SHOWN = 8  # names listed of each kind of fault


# --- The table ---------------------------------------------------------------------------------------------------


class _Axes(NamedTuple):
    """How a stored tensor becomes a parameter: each stored axis is split into so many of the parameter's.

    A tensor keeps its order of entries, so that any part of a parameter is read from where it is stored.
    """

    split: tuple[int, ...]

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of the stored tensor for a parameter's shape."""
        ends = np.cumsum(self.split)
        return tuple(prod(shape[end - count : end]) for end, count in zip(ends, self.split, strict=True))


_AS_STORED = _Axes((1, 1))  # [outputs, inputs]
_HEADS_OUT = _Axes((2, 1))  # [heads·width, inputs] -> [heads, width, inputs]
_HEADS_IN = _Axes((1, 2))  # [outputs, heads·width] -> [outputs, heads, width]
_HEADS_BIAS = _Axes((2,))  # [heads·width] -> [heads, width]
_VECTOR = _Axes((1,))

_Cut: TypeAlias = tuple[str | None, ...]  # the mesh axis over which each of the leading axes is cut
_Row: TypeAlias = tuple[str, tuple[str, ...], _Axes, _Cut]


def _block_row(name: str, path: str, axes: _Axes, cut: _Cut) -> _Row:
    return rf"(?:model\.)?layers\.([0-9]+)\.{re.escape(name)}", ("layers", *path.split(".")), axes, cut


# Weights are cut along outputs over one axis and along inputs over the other, so that both axes share every large
# one; heads are whole on a device, and so are the small vectors.
_TABLE: tuple[_Row, ...] = (
    (r"(?:model\.)?embed_tokens\.weight", ("embedding", "weight"), _AS_STORED, ("tp", "fsdp")),
    (r"(?:model\.)?norm\.weight", ("norm", "weight"), _VECTOR, ()),
    (r"lm_head\.weight", ("head", "weight"), _AS_STORED, ("tp", "fsdp")),
    *(
        row
        for part in ("query", "key", "value")
        for row in (
            _block_row(
                f"self_attn.{part[0]}_proj.weight", f"attention.{part}.weight", _HEADS_OUT, ("tp", None, "fsdp")
            ),
            _block_row(f"self_attn.{part[0]}_proj.bias", f"attention.{part}.bias", _HEADS_BIAS, ("tp",)),
        )
    ),
    _block_row("self_attn.o_proj.weight", "attention.output.weight", _HEADS_IN, ("fsdp", "tp")),
    _block_row("self_attn.o_proj.bias", "attention.output.bias", _VECTOR, ()),
    _block_row("self_attn.q_norm.weight", "attention.query_norm.weight", _VECTOR, ()),
    _block_row("self_attn.k_norm.weight", "attention.key_norm.weight", _VECTOR, ()),
    *(
        row
        for part in ("gate", "up")
        for row in (
            _block_row(f"mlp.{part}_proj.weight", f"feed_forward.{part}.weight", _AS_STORED, ("tp", "fsdp")),
            _block_row(f"mlp.{part}_proj.bias", f"feed_forward.{part}.bias", _VECTOR, ("tp",)),
        )
    ),
    _block_row("mlp.down_proj.weight", "feed_forward.down.weight", _AS_STORED, ("fsdp", "tp")),
    _block_row("mlp.down_proj.bias", "feed_forward.down.bias", _VECTOR, ()),
    _block_row("input_layernorm.weight", "attention_norm.weight", _VECTOR, ()),
)
_NORMS: Mapping[bool, tuple[_Row, ...]] = {
    # One name means two things: what follows attention in Gemma 2 precedes the feed-forward layer elsewhere.
    False: (_block_row("post_attention_layernorm.weight", "feed_forward_norm.weight", _VECTOR, ()),),
    True: (
        _block_row("post_attention_layernorm.weight", "after_attention_norm.weight", _VECTOR, ()),
        _block_row("pre_feedforward_layernorm.weight", "feed_forward_norm.weight", _VECTOR, ()),
        _block_row("post_feedforward_layernorm.weight", "after_feed_forward_norm.weight", _VECTOR, ()),
    ),
}
# Not weights: a buffer that old checkpoints saved, and the output layer of models that use the embedding instead.
_IGNORED = r"(?:model\.)?(?:layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"
_IGNORED_IF_TIED = r"lm_head\.weight"


class StoredParameter(NamedTuple):
    """Where one stored tensor goes.

    Attributes:
        name: The tensor.
        path: Keys of the decoder's parameter.
        axes: How the tensor's axes become the parameter's.
        cut: The mesh axis over which each of the leading axes is cut.
    """

    name: str
    path: Path
    axes: _Axes
    cut: _Cut


def _find(name: str, config: DecoderConfig) -> StoredParameter | None:
    """The parameter of a stored tensor, if the table has one."""
    for pattern, path, axes, cut in (*_TABLE, *_NORMS[config.sandwich_norms]):
        match = re.fullmatch(pattern, name)
        if match:
            numbered: Path = (path[0], *map(int, match.groups()), *path[1:])
            return StoredParameter(name, numbered, axes, cut)
    return None


def _flatten(tree: Any) -> dict[Path, Any]:
    """Leaves of nested dicts by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def nest(flat: Mapping[Path, Any]) -> Params:
    """Nested dicts from leaves by path.

    Args:
        flat: Any leaves; no path is the beginning of another.

    Returns:
        A tree with those leaves.

    Example:
        >>> nest({("layers", 0, "weight"): 1.0, ("norm",): 2.0})
        {'layers': {0: {'weight': 1.0}}, 'norm': 2.0}
    """
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        functools.reduce(lambda branch, key: branch.setdefault(key, {}), path[:-1], tree)[path[-1]] = leaf
    return tree


def match_tensors(
    stored: Mapping[str, tuple[Shape, bool]], config: DecoderConfig, where: str
) -> dict[Path, StoredParameter]:
    """The stored tensor of every parameter.

    Args:
        stored: Shape of each tensor and whether its dtype is a plain float, by name.
        config: The decoder.
        where: What to call the source in errors.

    Returns:
        Where tensors go, by the paths of all of the decoder's parameters.

    Raises:
        M3Error: The tensors do not fit the configuration; all that is wrong is named at once.
    """
    wanted = {path: leaf.shape for path, leaf in _flatten(abstract_params(config)).items()}
    found: dict[Path, StoredParameter] = {}
    leftover, doubled, misshapen, quantized = [], [], [], []
    for name, (shape, is_float) in stored.items():
        parameter = _find(name, config)
        if parameter is None or parameter.path not in wanted:
            ignored = re.fullmatch(_IGNORED, name) or (config.tie_embeddings and re.fullmatch(_IGNORED_IF_TIED, name))
            leftover += [] if ignored else [name]
            continue
        expected = parameter.axes.stored_shape(wanted[parameter.path])
        doubled += [f"{name} and {found[parameter.path].name}"] if parameter.path in found else []
        misshapen += [f"{name} {list(shape)} for {list(expected)}"] if shape != expected else []
        quantized += [] if is_float else [name]
        found[parameter.path] = parameter
    missing = [".".join(map(str, path)) for path in wanted if path not in found]
    faults = (
        _listed("lacks", missing),
        _listed("has left over", leftover),
        _listed("has twice", doubled),
        _listed("has misshapen", misshapen),
        _listed("has in no floating-point dtype", quantized),
    )
    if any(faults):
        said = "; ".join(filter(None, faults))
        raise M3Error(
            f"{where} does not fit its {config.architecture} config: it {said};"
            " give weights and config.json of one model."
        )
    return found


def _listed(fault: str, names: Sequence[str]) -> str:
    """A fault with the first few names that have it."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{fault} {', '.join(names[:_SHOWN])}{more}"


# --- Onto devices ------------------------------------------------------------------------------------------------


def _auto(mesh: Mesh) -> Mesh:
    """The same mesh with axes that the compiler propagates."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _sharding(mesh: Mesh | None, shape: Shape, cut: _Cut) -> Sharding:
    """Where a parameter goes: cut as the table says, as far as its sizes divide."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return fitting(_auto(mesh), shape, cut)


def _check_mesh(mesh: Mesh | None) -> None:
    if mesh is not None and not {"fsdp", "tp"} & set(mesh.axis_names):
        raise M3Error(f"the mesh has the axes {', '.join(mesh.axis_names)}: name them 'fsdp', 'tp' or both.")


def load_params(
    source: str | os.PathLike[str] | Checkpoint,
    config: DecoderConfig,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Reads a model's weights onto devices; each device's part is read by itself.

    Args:
        source: A model directory or safetensors file, or an open checkpoint with Hugging Face's tensor names.
        config: The decoder.
        dtype: Of the parameters; by default each keeps its own, and float64 becomes float32.
        mesh: Mesh with the axes `fsdp`, `tp` or both; one device without it.

    Returns:
        The decoder's parameters.

    Raises:
        M3Error: The weights cannot be read, or do not fit the configuration: all that is missing, left over or
            misshapen is named at once.
    """
    _check_mesh(mesh)
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as checkpoint:
            return load_params(checkpoint, config, dtype, mesh)
    stored = {name: (info.shape, info.dtype in _FLOATS) for name, info in source.tensors.items()}
    matched = match_tensors(stored, config, source.location)
    shapes = _flatten(abstract_params(config))
    return nest({path: _load(source, matched[path], shapes[path].shape, dtype, mesh) for path in shapes})


def _load(
    checkpoint: Checkpoint, parameter: StoredParameter, shape: Shape, dtype: DTypeLike | None, mesh: Mesh | None
) -> jax.Array:
    """One parameter, read part by part."""
    stored = DTYPES[checkpoint.tensors[parameter.name].dtype]
    target = _target(stored, dtype)

    @functools.cache  # devices often share rows
    def rows(start: int, stop: int) -> npt.NDArray[Any]:
        part = np.empty((stop - start, *shape[1:]), stored)
        row_bytes = stored.itemsize * prod(shape[1:])
        checkpoint.read_into(parameter.name, start * row_bytes, part.reshape(-1).view(np.uint8))
        return part.astype(target, copy=False)

    def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
        assert index is not None
        start, stop, _ = index[0].indices(shape[0])
        return rows(start, stop)[:, *index[1:]]

    return jax.make_array_from_callback(shape, _sharding(mesh, shape, parameter.cut), part)


def _target(stored: np.dtype[Any], dtype: DTypeLike | None) -> np.dtype[Any]:
    """The dtype of a parameter."""
    if dtype is not None:
        return jnp.dtype(dtype)
    return np.dtype(np.float32) if stored == np.float64 else stored


def params_from_tree(
    tree: PyTree,
    config: DecoderConfig,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """The decoder's parameters from arrays in memory, such as a merge that was never written.

    Args:
        tree: Arrays under Hugging Face's tensor names: a flat dict, or dicts nested at the dots, where blocks may
            be a list.
        config: The decoder.
        dtype: Of the parameters; by default each keeps its own, and float64 becomes float32.
        mesh: Mesh with the axes `fsdp`, `tp` or both; by default arrays on devices stay where they are.

    Returns:
        The decoder's parameters, sharing memory with `tree` where nothing has to change.

    Raises:
        M3Error: The arrays do not fit the configuration; all that is wrong is named at once.
    """
    _check_mesh(mesh)
    arrays = _named_arrays(tree)
    stored = {name: (tuple(np.shape(x)), jnp.issubdtype(x.dtype, jnp.floating)) for name, x in arrays.items()}
    matched = match_tensors(stored, config, "the tree of parameters")
    shapes = _flatten(abstract_params(config))
    return nest(
        {path: _place(arrays[matched[path].name], matched[path], shapes[path].shape, dtype, mesh) for path in shapes}
    )


def _named_arrays(tree: PyTree) -> dict[str, Any]:
    """Arrays by their paths joined with dots; an entry of a list goes by its index."""
    arrays = named_leaves(tree)
    others = [f"{name or 'its root'} ({type(x).__name__})" for name, x in arrays.items() if not hasattr(x, "dtype")]
    if others:
        raise M3Error(f"the tree of parameters {_listed('has no array at', others)}: give arrays of numpy or jax.")
    return arrays


def _place(
    array: Any, parameter: StoredParameter, shape: Shape, dtype: DTypeLike | None, mesh: Mesh | None
) -> jax.Array:
    """One parameter from an array in memory."""
    lies_on_mesh = isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)
    if lies_on_mesh:
        # On a mesh with explicit axes a reshape would ask how its result is to be laid out.
        array = jax.device_put(array, NamedSharding(_auto(array.sharding.mesh), array.sharding.spec))
    x = array.astype(_target(array.dtype, dtype)).reshape(shape)
    return jnp.asarray(x) if mesh is None else jax.device_put(x, _sharding(mesh, shape, parameter.cut))


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on, if they lie on one."""
    leaves: Iterable[Any] = jax.tree.leaves(params)
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None
