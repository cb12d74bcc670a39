"""What a merge must know of more than one entry, measured chunk by chunk: the passes, and what they found.

Each measure of the pipeline is a few rounds over a tensor or over the model whose counts reduce in any order. Nothing
here knows what is counted.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m3jax.arithmetic import threefry
from m3jax.cluster.processes import Buffer, Processes
from m3jax.methods.base import Extent, Place, Round
from m3jax.methods.leaf import LeafScalars, Pipeline, Stage, counted, leaf_scalars, with_found
from m3jax.streaming.plan import MergePlan, TensorPlan, row_size, total_entries
from m3jax.streaming.reading import Loaded, Visit, visits


class Step(NamedTuple):
    """A pass over a tensor or over the model.

    Attributes:
        stage: The measure that it belongs to, by key; "" for the merge.
        round: Which round of it.
        turn: Which going-through of the round.
        scope: "row", "tensor" or "model": over what its result holds.
        label: What it does, for people.
        sampled: It reads a sample.
        fallback: It is left out where the measure is settled.
    """

    stage: str
    round: str = ""
    turn: int = 0
    scope: str = "tensor"
    label: str = "merging"
    sampled: bool = False
    fallback: bool = False


MERGE = Step("")

_SAMPLED = 2**22  # entries of a sample: enough that its quantile falls inside a bracket around the model's
_SAMPLE_BLOCK = 2**12


# --- jitted functions of chunks -----------------------------------------------------------------------------------


def in_rows(shape: tuple[int, ...], arrays: Any) -> Any:
    """Flat chunks of whole rows as [rows, row] where the pipeline needs rows, else as they are.

    Args:
        shape: Of the chunk; see `chunk_shape`.
        arrays: A pytree of flat arrays.
    """
    return jax.tree.map(lambda x: x.reshape(shape), arrays)


def chunk_shape(tensor: TensorPlan, padded: int) -> tuple[int, ...]:
    """The shape in which a chunk of a tensor is worked on.

    Args:
        tensor: Its plan.
        padded: Entries of the chunk's arrays.
    """
    if tensor.pipeline is None or not tensor.pipeline.rows:
        return (padded,)
    row = row_size(tensor)
    return padded // row, row


def _index(start: Any, shape: tuple[int, ...]) -> Any:
    return in_rows(shape, threefry.range_index(start[0], start[1], math.prod(shape)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def count_chunk(
    pipe: Pipeline,
    key: str,
    name: str,
    place: Place,
    shape: tuple[int, ...],
    experts: Any,
    base: Any,
    scalars: LeafScalars,
    state: Any,
    start: Any,
    size: Any,
    zero: Any,
) -> Any:
    """What a round of a measure counts of a chunk's first `size` entries."""
    stage = stage_of(pipe, key)
    step = stage.round(place, name)
    valid = in_rows(shape, lax.iota(jnp.uint32, math.prod(shape)) < size)
    experts, base = in_rows(shape, experts), in_rows(shape, base)
    return counted(pipe, stage, step, experts, base, scalars, state, _index(start, shape), zero, valid)


def stage_of(pipe: Pipeline, key: str) -> Stage:
    """A pipeline's measure of a key."""
    return next(stage for stage in pipe.stages if stage.key == key)


# --- passes -------------------------------------------------------------------------------------------------------


def place_of(plan: MergePlan) -> Place:
    """Where the measures of a merge count."""
    return Place(True, jax.default_backend(), total_entries(plan.tensors))


def _steps(stage: Stage, place: Place) -> Iterator[Step]:
    measure = stage.measure
    there = place if measure.scope == "model" else place._replace(entries=0)
    for each in measure.rounds(there):
        for turn in range(each.repeats):
            yield Step(stage.key, each.name, turn, measure.scope, measure.label, each.sampled, each.fallback)


def phases_of(plan: MergePlan) -> list[list[Step]]:
    """The passes: each phase goes over all tensors before the next; the last one ends with the merge."""
    merged = [tensor for tensor in plan.tensors if tensor.settings is not None]
    phases: list[list[Step]] = []
    steps: list[Step] = []
    for stage in plan.pipeline.stages:
        if any(_needs(stage, tensor) for tensor in merged):
            steps += _steps(stage, place_of(plan))
    for step in [*steps, MERGE]:
        if step.scope == "model" or not phases or phases[-1][-1].scope == "model":
            phases.append([step])
        else:
            phases[-1].append(step)
    return phases


def _needs(stage: Stage, tensor: TensorPlan) -> bool:
    if tensor.settings is None or tensor.pipeline is None:
        return False
    if stage.owner == "sparsifier" and tensor.pipeline.sparsifier is None:
        return False
    return stage.needed(tensor.pipeline, tensor.settings)


def applies(step: Step, tensor: TensorPlan) -> bool:
    """Whether a pass has anything to do for a tensor."""
    if step == MERGE:
        return True
    if tensor.settings is None or tensor.pipeline is None:
        return False
    stage = next((stage for stage in tensor.pipeline.stages if stage.key == step.stage), None)
    return stage is not None and _needs(stage, tensor)


def samples(
    step: Step, model: Sequence[TensorPlan], tensors: Sequence[TensorPlan], chunk_entries: int, multiple: int = 1
) -> Iterator[Visit]:
    """Blocks spread evenly over tensors, about 2²² entries of the model, whatever its size.

    Args:
        step: The pass.
        model: All tensors.
        tensors: Those to sample.
        chunk_entries: As in `visits`.
        multiple: As in `visits`.
    """
    stride = max(_SAMPLE_BLOCK, total_entries([t for t in model if applies(step, t)]) // _SAMPLED * _SAMPLE_BLOCK)
    due = 0
    for tensor in [t for t in tensors if applies(step, t)]:
        while due < tensor.output.size:
            stop = min(due + _SAMPLE_BLOCK, tensor.output.size)
            (visit,) = visits(step, tensor, chunk_entries, False, due, stop, multiple)
            yield visit
            due += stride
        due -= tensor.output.size


_Scope = tuple[str, str | None]
"""A measure's key, and a tensor's name or None for the whole model."""


class Findings:
    """The states of all measures so far, by measure and scope."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._place = place_of(plan)
        self._states: dict[_Scope, tuple[bool, Any]] = {}  # whether it is over, and the state
        self._totals: dict[_Scope, Any] = {}

    def scalars(self, tensor: TensorPlan, root: np.ndarray) -> LeafScalars:
        """The scalars of a tensor as far as they are known."""
        if tensor.pipeline is None or tensor.settings is None:
            raise ValueError(f"{tensor.output.name} is copied and has no scalars")
        pipe, name = tensor.pipeline, tensor.output.name
        keys = threefry.pair_keys(root, name, pipe.num_experts) if pipe.random else None
        scalars = leaf_scalars(pipe, tensor.settings, tensor.output.shape, keys)
        for stage in pipe.stages:
            state = self._states.get((stage.key, self._scope(stage, tensor)))
            if state is not None and state[0] and _needs(stage, tensor):
                scalars = with_found(pipe, scalars, stage, state[1], tensor.settings)
        return scalars

    def rows(self, scalars: LeafScalars, visit: Visit) -> LeafScalars:
        """The scalars of a tensor with what was found by row cut to a chunk's rows.

        Args:
            scalars: Of the tensor.
            visit: The chunk, whose padded rows may reach beyond the last.
        """
        found = {owner: dict(own) for owner, own in scalars.found.items()}
        for stage in visit.plan.pipeline.stages if visit.plan.pipeline is not None else ():
            own = found[stage.owner]
            if stage.measure.scope == "row" and stage.measure.name in own:
                own[stage.measure.name] = _cut(own[stage.measure.name], *_rows_of(visit))
        return scalars._replace(found=found)

    @staticmethod
    def _scope(stage: Stage, tensor: TensorPlan) -> str | None:
        return None if stage.measure.scope == "model" else tensor.output.name

    def _state(self, stage: Stage, tensor: TensorPlan) -> Any:
        """The state of a measure: as it is, or as it begins."""
        scope = self._scope(stage, tensor)
        if (stage.key, scope) not in self._states:
            self._states[stage.key, scope] = (False, self._begin(stage, tensor))
        return self._states[stage.key, scope][1]

    def _begin(self, stage: Stage, tensor: TensorPlan) -> Any:
        if tensor.settings is None:
            raise ValueError(f"{tensor.output.name} is copied and not measured")
        spans = stage.measure.scope == "model"
        entries = total_entries(self._plan.tensors) if spans else tensor.output.size
        rows = (math.prod(tensor.output.shape[:-1]),) if stage.measure.scope == "row" else ()
        extent = Extent(entries, rows, self._plan.pipeline.num_experts)
        return stage.begin(self._plan.pipeline, tensor.settings, extent)

    def measure(self, loaded: Loaded, scalars: LeafScalars, start: np.ndarray, zero: np.uint32) -> Any:
        """Dispatch the measurement of a chunk."""
        visit = loaded.visit
        step, tensor = visit.stage, visit.plan
        experts, base = split(loaded)
        if tensor.pipeline is None:
            raise ValueError(f"{tensor.output.name} is copied and not measured")
        stage, shape = stage_of(tensor.pipeline, step.stage), chunk_shape(tensor, visit.padded)
        state = self._state(stage, tensor)
        if stage.measure.scope == "row":
            state = _cut(state, *_rows_of(visit))
        if len(shape) == 2:
            scalars = self.rows(scalars, visit)
        there = self._there(stage)
        size = np.uint32(visit.size)
        return count_chunk(
            tensor.pipeline, stage.key, step.round, there, shape, experts, base, scalars, state, start, size, zero
        )

    def _there(self, stage: Stage) -> Place:
        return self._place if stage.measure.scope == "model" else self._place._replace(entries=0)

    def _round(self, step: Step) -> tuple[Stage, Round]:
        stage = stage_of(self._plan.pipeline, step.stage)
        return stage, stage.round(self._there(stage), step.round)

    def absorb(self, visit: Visit, measured: Any) -> None:
        """Add a chunk's measurement to the totals of its scope."""
        stage, each = self._round(visit.stage)
        place = (stage.key, scope_of(visit))
        if each.reduction == "gather":
            parts = np.stack([np.asarray(row).ravel()[: visit.size] for row in measured])
            self._totals.setdefault(place, []).append(parts)
            return
        if each.finish is not None:
            measured = each.finish([np.asarray(row).ravel()[: visit.size] for row in measured])
        counts = np.asarray(measured)
        if stage.measure.scope == "row":
            self._totals.setdefault(place, []).append(counts[: visit.size // row_size(visit.plan)])
            return
        before = self._totals.get(place)
        wide = counts.astype(np.int64)
        self._totals[place] = wide if before is None else _REDUCED[each.reduction](before, wide)

    def conclude_model(self, step: Step, processes: Processes) -> None:
        """Let a model-wide measure go on from what all processes have counted."""
        tensor = next((t for t in self._plan.tensors if applies(step, t)), None)
        if tensor is None:
            return
        stage, each = self._round(step)
        total = self._totals.pop((stage.key, None), None)
        if each.reduction == "gather" and total is not None:
            total = np.concatenate(total, axis=1).astype(np.int64)
        state = self._state(stage, tensor)
        template = _leaves(state)

        def conclude(given: Sequence[Buffer]) -> Buffer:
            parts = [part for part in map(_from_bytes, given) if part is not None]
            after = state
            if parts:
                after = self._after(stage, step, state, functools.reduce(_REDUCED[each.reduction], parts))
            return b"".join(
                np.asarray(leaf, old.dtype).tobytes() for leaf, old in zip(_leaves(after), template, strict=True)
            )

        said = memoryview(processes.exchange(_to_bytes(total), conclude))
        leaves, at = [], 0
        for old in template:
            leaves.append(np.frombuffer(said[at : at + old.nbytes], old.dtype).reshape(old.shape))
            at += old.nbytes
        self._keep(stage, step, None, jax.tree.unflatten(jax.tree.structure(state), leaves))

    def conclude(self, visit: Visit) -> None:
        """Let a measure go on from the totals of the tensor that `visit` was the last of."""
        stage, _ = self._round(visit.stage)
        name = visit.plan.output.name
        total = self._totals.pop((stage.key, name))
        total = np.concatenate(total).astype(np.int64) if stage.measure.scope == "row" else total
        state = self._after(stage, visit.stage, self._state(stage, visit.plan), total)
        self._keep(stage, visit.stage, name, state)

    def _after(self, stage: Stage, step: Step, state: Any, total: np.ndarray) -> Any:
        """The state after a round, from its total as int64."""
        _, each = self._round(step)
        given: Any = _words(total) if each.reduction == "sum" else total.astype(np.uint32)
        return stage.measure.advance(stage.options(self._plan.pipeline), step.round, state, given)

    def _keep(self, stage: Stage, step: Step, scope: str | None, state: Any) -> None:
        """Keep the state that a step left, and whether it is the measure's last."""
        steps = list(_steps(stage, self._there(stage)))
        later = steps[next(i for i, each in enumerate(steps) if each == step) + 1 :]
        settled = stage.measure.settled(stage.options(self._plan.pipeline), state)
        over = not later or (settled and all(each.fallback for each in later))
        self._states[stage.key, scope] = (over, jax.tree.map(np.asarray, state))

    def settled(self, step: Step) -> bool:
        """Whether a model-wide measure is over before this pass of it."""
        state = self._states.get((step.stage, None))
        return step.scope == "model" and state is not None and state[0]

    def states(self) -> dict[tuple[str, str | None], Any]:
        """The last states of all measures that are over."""
        return {place: state for place, (over, state) in self._states.items() if over}

    def to_json(self) -> list[Any]:
        """What the merging phase needs of the phases before it."""
        return [
            [key, scope, [[array.dtype.name, list(array.shape), array.ravel().tolist()] for array in _leaves(state)]]
            for (key, scope), state in self.states().items()
        ]

    def from_json(self, found: Sequence[Any]) -> None:
        """Take over what `to_json` gave in an earlier run or another process."""
        by_name = {tensor.output.name: tensor for tensor in self._plan.tensors}
        for key, scope, leaves in found:
            stage = stage_of(self._plan.pipeline, key)
            tensor = by_name[scope] if scope is not None else next(t for t in by_name.values() if _needs(stage, t))
            arrays = [np.array(flat, dtype).reshape(shape) for dtype, shape, flat in leaves]
            structure = jax.tree.structure(self._begin(stage, tensor))
            self._states[key, scope] = (True, jax.tree.unflatten(structure, arrays))


def _leaves(state: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


_REDUCED: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": np.add,
    "max": np.maximum,
    "gather": lambda one, other: np.concatenate([one, other], axis=1),
}


def _to_bytes(total: np.ndarray | None) -> bytes:
    """Counts with their shape; nothing where nothing was counted."""
    if total is None:
        return b""
    shape = np.array([total.ndim, *total.shape], "<i8")
    return shape.tobytes() + np.ascontiguousarray(total, "<i8").tobytes()


def _from_bytes(said: Buffer) -> np.ndarray | None:
    numbers = np.frombuffer(said, "<i8")
    if not numbers.size:
        return None
    axes = int(numbers[0])
    return numbers[1 + axes :].reshape(numbers[1 : 1 + axes])


def _words(total: Any) -> tuple[Any, Any]:
    high = jax.tree.map(lambda array: (array >> 32).astype(np.uint32), total)
    return high, jax.tree.map(lambda array: (array & 0xFFFFFFFF).astype(np.uint32), total)


def _rows_of(visit: Visit) -> tuple[int, int]:
    """A chunk's first row, and how many rows its arrays have."""
    row = row_size(visit.plan)
    return visit.start // row, visit.padded // row


def _cut(found: Any, start: int, count: int) -> Any:
    """Rows from `start` on of arrays whose first axis is the tensor's rows, filled up with zeros."""

    def cut(array: np.ndarray) -> np.ndarray:
        rows = array[start : start + count]
        return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])

    return jax.tree.map(cut, found)


def scope_of(visit: Visit) -> str | None:
    """The tensor that a visit's measurement is of; None for the whole model."""
    return None if visit.stage.scope == "model" else visit.plan.output.name


def split(loaded: Loaded) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """The experts' arrays of a chunk, and the base's."""
    if loaded.visit.plan.has_base:
        return loaded.arrays[1:], loaded.arrays[0]
    return loaded.arrays, None
