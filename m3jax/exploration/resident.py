"""Experts that stay in memory: any weights, one compiled program, and the bits that `m3jax merge` would write.

Coefficients are folded on the host in float64 as out of core, thresholds are measured by the same passes over the same
files; the program takes them as run-time arguments, so that a sample costs no compilation.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from m3jax.arithmetic import exact, threefry
from m3jax.checkpoints.protocol import check_unchanged
from m3jax.cluster.meshes import spread
from m3jax.cluster.processes import ALONE
from m3jax.errors import M3Error
from m3jax.exploration.samples import Weights, weights_of
from m3jax.methods.leaf import LeafScalars, merged_leaf
from m3jax.streaming.findings import MERGE, Findings, phases_of
from m3jax.streaming.jobs import Ready
from m3jax.streaming.passes import Circumstances, Passes
from m3jax.streaming.plan import FLOATS, MergePlan, TensorPlan
from m3jax.streaming.reading import default_chunk_entries
from m3jax.trees import loading

Params: TypeAlias = dict[str, Array]
"""Merged arrays by tensor name."""


class Resident(NamedTuple):
    """A merge whose inputs are in memory.

    Attributes:
        plan: What happens to each tensor.
        arrays: The inputs' arrays of each tensor, in the order of its sources; of copied ones the first.
        findings: What was measured, which no weights enter.
        root: uint32[2], the recipe's root key.
        merged: The compiled program, from arrays, scalars and a zero to merged arrays.
    """

    plan: MergePlan
    arrays: dict[str, tuple[Array, ...]]
    findings: Findings
    root: threefry.Words
    merged: Callable[[Any, Any, Any], Params]

    def scalars(self, weights: Weights) -> dict[str, LeafScalars]:
        """The run-time scalars of a merge with these weights, on the host.

        Args:
            weights: By group.
        """
        return {
            tensor.output.name: self.findings.scalars(
                with_weights(tensor, weights), self.root, None if tensor.axis is not None else 0
            )
            for tensor in self.plan.tensors
            if tensor.blocks
        }

    def merge(self, weights: Weights) -> Params:
        """The merge with these weights, on the inputs' devices.

        Args:
            weights: By group.
        """
        return self.merged(self.arrays, self.scalars(weights), np.uint32(0))


def with_weights(tensor: TensorPlan, weights: Weights) -> TensorPlan:
    """The plan of a tensor with other weights.

    Args:
        tensor: The plan.
        weights: By group.
    """
    blocks = (
        block._replace(settings=block.settings._replace(weights=weights_of(weights, block))) for block in tensor.blocks
    )
    return tensor._replace(blocks=tuple(blocks))


def merge_arrays(
    plan: MergePlan, arrays: Mapping[str, tuple[Array, ...]], scalars: Mapping[str, LeafScalars], zero: exact.Zero
) -> Params:
    """Every tensor of a plan merged; pure, for use under jit.

    Args:
        plan: What happens to each tensor.
        arrays: The inputs' arrays of each tensor, in the order of its sources.
        scalars: Of each tensor that is merged.
        zero: A run-time zero, see `exact.fence`.
    """
    merged = {}
    for tensor in plan.tensors:
        name, sources = tensor.output.name, arrays[tensor.output.name]
        if tensor.pipeline is None:
            merged[name] = sources[0]
            continue
        experts, base = (sources[1:], sources[0]) if tensor.has_base else (sources, None)
        merged[name] = _merged_tensor(tensor, experts, base, scalars[name], zero)
    return merged


def _merged_tensor(
    tensor: TensorPlan, experts: Sequence[Array], base: Array | None, scalars: LeafScalars, zero: exact.Zero
) -> Array:
    """One tensor merged, block by block where it stacks some."""
    pipe, dtype = tensor.pipeline, FLOATS[tensor.output.dtype]
    assert pipe is not None  # copied tensors do not come here
    shape = pipe.laid_out(tensor.block_shape) or (1,)
    index = threefry.flat_index(shape)

    def of_block(experts: Any, base: Any, scalars: Any) -> Array:
        experts, base = jax.tree.map(lambda x: x.reshape(shape), (experts, base))
        return merged_leaf(pipe, experts, base, scalars, index, zero, dtype).reshape(tensor.block_shape)

    if tensor.axis is None:
        return of_block(experts, base, scalars)
    axis = tensor.axis
    result: Array = jax.vmap(of_block, in_axes=(axis, axis, 0), out_axes=axis)(tuple(experts), base, scalars)
    return result


def _load(ready: Ready, mesh: Mesh | None) -> dict[str, tuple[Array, ...]]:
    """The arrays of every tensor; copied ones must be equal in all sources, of which one is kept."""
    wanted: dict[int, list[str]] = {}  # what is left out of the merge, as training state, is left where it is
    for tensor in ready.plan.tensors:
        for position in tensor.sources:
            wanted.setdefault(position, []).append(tensor.output.name)
    loaded = {
        position: loading.load_checkpoint(
            ready.models[position].checkpoint, names, lambda name, shape: spread(mesh, shape)
        )
        for position, names in wanted.items()
    }
    arrays = {}
    for tensor in ready.plan.tensors:
        sources = tuple(loaded[position].pop(tensor.output.name) for position in tensor.sources)
        if tensor.pipeline is None:
            _check_equal(ready, tensor, sources)
            sources = sources[:1]
        else:
            _check_finite(ready, tensor, sources)
            _check_statistics(ready, tensor, sources)
        arrays[tensor.output.name] = sources
    return arrays


@jax.jit
def _all_finite(arrays: Sequence[Array]) -> Bool[Array, " n"]:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def _check_finite(ready: Ready, tensor: TensorPlan, sources: tuple[Array, ...]) -> None:
    """Refuse now what the final merge would refuse after all samples."""
    finite = np.asarray(_all_finite(sources))
    if not finite.all():
        model = ready.models[tensor.sources[int(np.argmin(finite))]].input.name
        raise M3Error(
            f"{tensor.output.name}: holds NaN or infinities in {model}: restore the model, or exclude the tensor"
        )


@jax.jit
def _none_negative(arrays: Sequence[Array]) -> Bool[Array, " n"]:
    return jnp.stack([(x >= 0).all() for x in arrays])


def _check_statistics(ready: Ready, tensor: TensorPlan, sources: tuple[Array, ...]) -> None:
    """Refuse negative statistics, likewise."""
    if not tensor.statistics:
        return
    positive = np.asarray(_none_negative(sources[-len(tensor.statistics) :]))
    if not positive.all():
        name = ready.models[tensor.statistics[int(np.argmin(positive))]].input.name
        raise M3Error(f"{tensor.output.name}: is negative somewhere in {name}, as statistics are not: measure again")


def _check_equal(ready: Ready, tensor: TensorPlan, sources: Sequence[Array]) -> None:
    first = np.asarray(sources[0]).tobytes()
    for position, other in zip(tensor.sources[1:], sources[1:], strict=True):
        if np.asarray(other).tobytes() != first:
            names = [ready.models[p].input.name for p in (tensor.sources[0], position)]
            raise M3Error(
                f"{tensor.output.name}: is a buffer of {tensor.output.dtype}, which is copied, but differs between "
                f"{names[0]} and {names[1]}: exclude it"
            )


def _measured(ready: Ready, root_seed: int) -> Findings:
    """What the method must know of more than one entry, by the passes that `m3jax merge` makes."""
    how = Circumstances(default_chunk_entries(len(ready.models), 4), None, ALONE, False, None)
    passes = Passes(ready.plan, [model.checkpoint for model in ready.models], root_seed, None, how)
    for phase in phases_of(ready.plan):
        steps = [step for step in phase if step != MERGE]
        if steps and not passes.findings.settled(steps[0]):
            passes.measure(steps, ready.plan.tensors)
    return passes.findings


def check_inputs(ready: Ready) -> None:
    """Raise M3Error if an input has changed since a merge was prepared."""
    for model, seen in zip(ready.models, ready.fingerprints, strict=True):
        check_unchanged(model.checkpoint, seen, "explored: explore")


def load_resident(ready: Ready, seed: int, mesh: Mesh | None = None) -> Resident:
    """Load the inputs of a prepared merge and measure what its method needs to know of them.

    Args:
        ready: Of `streaming.prepared`, with its inputs open.
        seed: Of masks.
        mesh: Over which every tensor is spread; one device without it.

    Raises:
        M3Error: An input cannot be loaded, or has changed since, or buffers differ.
    """
    if ready.plan.pipeline.method.preparation is not None:
        raise M3Error(
            f"{ready.plan.pipeline.method.name}: solves equations on the host for each merge, so m3jax explore has no "
            "program of it: make the merges one by one, such as by `seeds: 0..7`, and evaluate them"
        )
    findings = _measured(ready, seed)
    arrays = _load(ready, mesh)
    check_inputs(ready)
    program = jax.jit(functools.partial(merge_arrays, ready.plan))
    return Resident(ready.plan, arrays, findings, threefry.root_key(seed), program)
