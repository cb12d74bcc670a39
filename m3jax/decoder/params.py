"""From Hugging Face's tensor names to the decoder's parameters, and onto devices."""

import functools
import os
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from m3jax.checkpoints import open_checkpoint
from m3jax.checkpoints.protocol import DTYPES, Checkpoint, check_unchanged
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.modeling import Params, abstract_params, fitting
from m3jax.decoder.weight_map import Cut, Path, Shape, Target, TensorView, is_ignored, rank, targets, view
from m3jax.errors import M3Error
from m3jax.trees.matching import named_leaves

_FLOATS = ("BF16", "F16", "F32", "F64")
_SHOWN = 8  # names listed of each kind of fault


# --- Tensors and parameters --------------------------------------------------------------------------------------


class StoredPart(NamedTuple):
    """A stored tensor that holds a parameter, or one expert of it.

    Attributes:
        name: The tensor.
        view: How the parameter lies in it.
    """

    name: str
    view: TensorView


class StoredParameter(NamedTuple):
    """Where one parameter comes from.

    Attributes:
        parts: The whole, or each expert.
        stacked: Whether parts are experts, each of which fills one index of the leading axis.
        cut: The mesh axis over which each of the leading axes is cut.
    """

    parts: tuple[StoredPart, ...]
    stacked: bool
    cut: Cut


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
    """The stored tensors of every parameter.

    Args:
        stored: Shape of each tensor and whether its dtype is a plain float, by name.
        config: The decoder.
        where: What to call the source in errors.

    Returns:
        Where they come from, by the paths of all of the decoder's parameters.

    Raises:
        M3Error: The tensors do not fit the configuration; all that is wrong is named at once.
    """
    wanted = {path: leaf.shape for path, leaf in _flatten(abstract_params(config)).items()}
    found: dict[Path, dict[int | None, StoredPart]] = {}
    cuts: dict[Path, Cut] = {}
    leftover, doubled, misshapen, quantized = [], [], [], []
    for name, (shape, is_float) in stored.items():
        fits = [one for one in targets(name, config) if _is_wanted(one, wanted)]
        leftover += [] if fits or is_ignored(name, config) else [name]
        quantized += [name] if fits and not is_float else []
        for target in fits:
            whole = wanted[target.path]
            seen = view(target.layout, whole if target.expert is None else whole[1:], config)
            parts, own = found.setdefault(target.path, {}), target.expert
            # An expert has a tensor of its own, or all have one.
            others = [own] if own in parts else [key for key in parts if None in (own, key)]
            doubled += [f"{name} and {parts[others[0]].name}"] if others else []
            misshapen += [f"{name} {list(shape)} for {list(seen.stored)}"] if shape != seen.stored else []
            parts[own] = StoredPart(name, seen)
            cuts[target.path] = target.cut
    missing = [name for path, shape in wanted.items() for name in _missing(path, shape, found.get(path, {}))]
    faults = (
        _listed("lacks", missing),
        _listed("has left over", leftover),
        _listed("has twice", doubled),
        _listed("has misshapen", dict.fromkeys(misshapen)),
        _listed("has in no floating-point dtype", quantized),
    )
    if any(faults):
        said = "; ".join(filter(None, faults))
        raise M3Error(
            f"{where} does not fit its {config.architecture} config: it {said};"
            " give weights and config.json of one model."
        )
    return {path: _assembled(found[path], cuts[path]) for path in wanted}


def _is_wanted(target: Target, wanted: Mapping[Path, Shape]) -> bool:
    """Whether the decoder has the parameter, and the expert of it."""
    shape = wanted.get(target.path)
    if shape is None:
        return False
    lead = 0 if target.expert is None else 1
    return len(shape) == lead + rank(target.layout) and (target.expert or 0) < shape[0]


def _missing(path: Path, shape: Shape, parts: Mapping[int | None, StoredPart]) -> list[str]:
    """What is missing of a parameter: nothing, the whole or some experts."""
    name = ".".join(map(str, path))
    if None in parts:
        return []
    return [f"{name} of expert {i}" for i in range(shape[0]) if i not in parts] if parts else [name]


def _assembled(parts: Mapping[int | None, StoredPart], cut: Cut) -> StoredParameter:
    if None in parts:
        return StoredParameter((parts[None],), False, cut)
    return StoredParameter(tuple(parts[i] for i in range(len(parts))), True, cut)


def _listed(fault: str, found: Iterable[str]) -> str:
    """A fault with the first few names that have it."""
    names = list(found)
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{fault} {', '.join(names[:_SHOWN])}{more}"


# --- Onto devices ------------------------------------------------------------------------------------------------


def _auto(mesh: Mesh) -> Mesh:
    """The same mesh with axes that the compiler propagates."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _sharding(mesh: Mesh | None, shape: Shape, cut: Cut) -> Sharding:
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
        M3Error: The weights cannot be read, change meanwhile, or do not fit the configuration: all that is missing,
            left over or misshapen is named at once.
    """
    _check_mesh(mesh)
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as checkpoint:
            return load_params(checkpoint, config, dtype, mesh)
    before = source.fingerprint()
    stored = {name: (info.shape, info.dtype in _FLOATS) for name, info in source.tensors.items()}
    matched = match_tensors(stored, config, source.location)
    shapes = _flatten(abstract_params(config))
    params = nest({path: _load(source, matched[path], shapes[path].shape, dtype, mesh) for path in shapes})
    check_unchanged(source, before, "loaded: load")
    return params


def _load(
    checkpoint: Checkpoint, parameter: StoredParameter, shape: Shape, dtype: DTypeLike | None, mesh: Mesh | None
) -> jax.Array:
    """One parameter, read part by part."""

    @functools.cache  # devices often share rows
    def rows(name: str, start: int, shape: Shape) -> npt.NDArray[Any]:
        stored = DTYPES[checkpoint.tensors[name].dtype]
        part = np.empty(shape, stored)
        checkpoint.read_into(name, start * stored.itemsize, part.reshape(-1).view(np.uint8))
        return part

    def read(part: StoredPart, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        seen = part.view.part(index)
        begin, start, sizes = 0, 0, seen.fine
        while isinstance(which := seen.taken[begin], int):  # one of several things, each in one piece
            begin += 1
            start += which * prod(sizes[begin:])
        start += which.start * prod(sizes[begin + 1 :])
        found = rows(part.name, start, (which.stop - which.start, *sizes[begin + 1 :]))
        found = found[(slice(None), *seen.taken[begin + 1 :])].transpose(seen.order)
        return found.astype(_target(found.dtype, dtype), copy=False)

    def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
        assert index is not None
        if not parameter.stacked:
            return read(parameter.parts[0], index)
        start, stop, _ = index[0].indices(shape[0])
        return np.stack([read(one, index[1:]) for one in parameter.parts[start:stop]])

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
    return _from_arrays(_named_arrays(tree), config, "the tree of parameters", dtype, mesh)


def nested_params(arrays: Mapping[str, Array], config: DecoderConfig, where: str) -> Params:
    """The decoder's parameters from arrays under Hugging Face's names; inside and outside of jit.

    Args:
        arrays: Every tensor by name, of any dtypes.
        config: The decoder.
        where: What to call them in errors.

    Raises:
        M3Error: They do not fit the configuration.
    """
    stored = {name: (tuple(x.shape), True) for name, x in arrays.items()}
    matched = match_tensors(stored, config, where)
    return nest({path: _assemble(parameter, arrays) for path, parameter in matched.items()})


def _from_arrays(
    arrays: Mapping[str, Any], config: DecoderConfig, where: str, dtype: DTypeLike | None, mesh: Mesh | None
) -> Params:
    stored = {name: (tuple(np.shape(x)), jnp.issubdtype(x.dtype, jnp.floating)) for name, x in arrays.items()}
    matched = match_tensors(stored, config, where)
    return nest({path: _place(parameter, arrays, dtype, mesh) for path, parameter in matched.items()})


def _named_arrays(tree: PyTree) -> dict[str, Any]:
    """Arrays by their paths joined with dots; an entry of a list goes by its index."""
    arrays = named_leaves(tree)
    others = [f"{name or 'its root'} ({type(x).__name__})" for name, x in arrays.items() if not hasattr(x, "dtype")]
    if others:
        raise M3Error(f"the tree of parameters {_listed('has no array at', others)}: give arrays of numpy or jax.")
    return arrays


def _place(
    parameter: StoredParameter, arrays: Mapping[str, Any], dtype: DTypeLike | None, mesh: Mesh | None
) -> jax.Array:
    """One parameter from arrays in memory."""
    own = {part.name: _on_automatic_axes(arrays[part.name]) for part in parameter.parts}
    own = {name: x.astype(_target(x.dtype, dtype)) for name, x in own.items()}
    x = _assemble(parameter, own)
    return jnp.asarray(x) if mesh is None else jax.device_put(x, _sharding(mesh, x.shape, parameter.cut))


def _assemble(parameter: StoredParameter, arrays: Mapping[str, Any]) -> Any:
    """One parameter, out of its tensor or its experts' tensors."""
    parts = [part.view.of(arrays[part.name]) for part in parameter.parts]
    if not parameter.stacked:
        return parts[0]
    return np.stack(parts) if all(isinstance(x, np.ndarray) for x in parts) else jnp.stack(parts)


def _on_automatic_axes(array: Any) -> Any:
    """The same array; on a mesh with explicit axes a reshape would ask how its result is to be laid out."""
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        mesh = array.sharding.mesh
        if isinstance(mesh, Mesh):
            return jax.device_put(array, NamedSharding(_auto(mesh), array.sharding.spec))
    return array


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on, if they lie on one."""
    leaves: Iterable[Any] = jax.tree.leaves(params)
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None
