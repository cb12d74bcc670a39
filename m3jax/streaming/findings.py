"""What a merge must know of more than one entry, measured chunk by chunk: the passes, and what they found.

Each measure of the pipeline is a few rounds over a tensor or over the model whose counts reduce in any order. Nothing
here knows what is counted.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m3jax.arithmetic import threefry
from m3jax.cluster.processes import Buffer, Processes
from m3jax.methods.base import Extent, Place, Round
from m3jax.methods.leaf import (
    LeafScalars,
    Pipeline,
    Stage,
    about,
    counted,
    joined,
    leaf_scalars,
    merged_leaf,
    with_found,
)
from m3jax.streaming.plan import BlockPlan, MergePlan, TensorPlan, row_size, total_entries
from m3jax.streaming.reading import Loaded, Visit, inside_of, slice_of, unit_of, visits


class Step(NamedTuple):
    """A pass over a tensor or over the model.

    Attributes:
        stage: The measure that it belongs to, by key; "" for the merge.
        round: Which round of it.
        turn: Which going-through of the round.
        scope: "row", "column", "tensor" or "model": over what its result holds.
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
_SAMPLE_BLOCK = 2**14  # of them in a piece


# --- jitted functions of chunks -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the flat arrays of a chunk are seen.

    Attributes:
        outer: Slices through all blocks, of a tensor that stacks them along a later axis than the first; else 1.
        blocks: How many blocks are beside each other in a slice; 0 where the chunk is of one block.
        of_block: The shape of what a chunk has of one block: flat, or [rows, row] where rows are needed.
    """

    outer: int
    blocks: int
    of_block: tuple[int, ...]


def layout_of(visit: Visit) -> Layout:
    """How a chunk is seen."""
    tensor = visit.plan
    rows = tensor.pipeline is not None and tensor.pipeline.rows
    row, blocks = row_size(tensor) if rows else 1, len(tensor.blocks)
    stacks = visit.block is None
    entries = visit.padded // blocks if stacks else visit.padded
    outer = visit.padded // slice_of(tensor) if stacks else 1
    return Layout(outer, blocks if stacks else 0, (entries // row, row) if rows else (entries,))


def over_blocks(layout: Layout, function: Callable[..., Any], arrays: Any, scalars: Any, flat: bool) -> Any:
    """`function(arrays, scalars)` of a chunk, or of each block that it has entries of.

    Args:
        layout: The chunk's.
        function: Of one block's arrays, shaped as `layout.of_block`, and its scalars.
        arrays: Flat arrays of the chunk.
        scalars: Of the block, or of all blocks along a first axis.
        flat: Whether the result has an entry for each of the chunk's, and is to lie as they do.
    """

    def of_block(arrays: Any, scalars: Any) -> Any:
        return function(jax.tree.map(lambda x: x.reshape(layout.of_block), arrays), scalars)

    if not layout.blocks:
        result = of_block(arrays, scalars)
        return result.ravel() if flat else result
    beside = jax.tree.map(lambda x: x.reshape(layout.outer, layout.blocks, -1), arrays)
    each = jax.vmap(of_block, in_axes=(1, 0))(beside, scalars)
    if not flat:
        return each
    return jnp.moveaxis(each.reshape(layout.blocks, layout.outer, -1), 0, 1).ravel()


def _index(start: Any, layout: Layout) -> Any:
    """Where a chunk's entries lie in their block, from the first one's place."""
    words = threefry.range_index(start[0], start[1], math.prod(layout.of_block))
    return tuple(word.reshape(layout.of_block) for word in words)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def count_chunk(
    pipe: Pipeline,
    key: str,
    name: str,
    place: Place,
    layout: Layout,
    experts: Any,
    base: Any,
    scalars: LeafScalars,
    state: Any,
    start: Any,
    size: Any,
    zero: Any,
) -> Any:
    """What a round of a measure counts of the first `size` entries of a chunk's block, or of each of its blocks."""
    stage = pipe.stage(key)
    step, index = stage.round(place, name), _index(start, layout)
    valid = (lax.iota(jnp.uint32, math.prod(layout.of_block)) < size).reshape(layout.of_block)

    def counts(arrays: Any, known: Any) -> Any:
        experts, base = arrays
        scalars, state = known
        return counted(pipe, stage, step, experts, base, scalars, state, index, zero, valid)

    return over_blocks(layout, counts, (experts, base), (scalars, state), flat=False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def merge_chunk(
    pipe: Pipeline,
    dtype: str,
    layout: Layout,
    experts: Any,
    base: Any,
    scalars: LeafScalars,
    start: Any,
    zero: Any,
) -> jax.Array:
    """The merged chunk, flat; `start` is where its first entry lies in its block, as two uint32."""
    index = _index(start, layout)

    def merged(arrays: Any, scalars: Any) -> jax.Array:
        experts, base = arrays
        return merged_leaf(pipe, experts, base, scalars, index, zero, dtype)

    found: jax.Array = over_blocks(layout, merged, (experts, base), scalars, flat=True)
    return found


def start_of(visit: Visit) -> np.ndarray:
    """Where a chunk's first entry lies in its block: high and low word."""
    tensor, start = visit.plan, visit.start
    if visit.block is None:
        start = start // len(tensor.blocks)
    elif tensor.axis is not None:
        inside = max(inside_of(tensor), 1)
        start = start // (inside * len(tensor.blocks)) * inside + start % inside
    return np.array([start >> 32, start & 0xFFFFFFFF], np.uint32)


def size_of(visit: Visit) -> int:
    """Entries of a chunk that are of one block."""
    return visit.size // len(visit.plan.blocks) if visit.block is None else visit.size


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
    merged = [tensor for tensor in plan.tensors if tensor.blocks]
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
    """Whether a tensor needs a measure; where one of the blocks that it stacks does, all have it."""
    pipe = tensor.pipeline
    if pipe is None or stage.key not in {own.key for own in pipe.stages}:
        return False
    return any(stage.needed(pipe, block.settings) for block in tensor.blocks)


def applies(step: Step, tensor: TensorPlan) -> bool:
    """Whether a pass has anything to do for a tensor; of the whole model, whether it counts there."""
    if step == MERGE:
        return True
    stage = next((s for s in tensor.pipeline.stages if s.key == step.stage), None) if tensor.pipeline else None
    return stage is not None and _needs(stage, tensor) and not (tensor.apart and step.scope == "model")


def samples(
    step: Step, model: Sequence[TensorPlan], tensors: Sequence[TensorPlan], chunk_entries: int, multiple: int = 1
) -> Iterator[Visit]:
    """Pieces spread evenly over tensors, about 2²² entries of the model, whatever its size.

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
        unit = max(unit_of(tensor, chunk_entries), 1)
        piece = max(_SAMPLE_BLOCK // unit, 1) * unit
        while due < tensor.output.size:
            start = due // unit * unit
            stop = min(start + piece, tensor.output.size)
            yield from visits(step, tensor, chunk_entries, False, start, stop, multiple)
            due += max(stride, piece)
        due -= tensor.output.size


_Scope = tuple[str, str | None]
"""A measure's key, and a block's name or None for the whole model."""


class Findings:
    """The states of all measures so far, by measure and scope."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._place = place_of(plan)
        self._states: dict[_Scope, tuple[bool, Any]] = {}  # whether it is over, and the state
        self._totals: dict[_Scope, Any] = {}
        self._lock = threading.RLock()  # lanes count together what is of the whole model

    def scalars(self, tensor: TensorPlan, root: np.ndarray, block: int | None = 0) -> LeafScalars:
        """The scalars of a tensor's block as far as they are known; of all blocks, along a first axis, for None."""
        if block is None:
            each = [self.scalars(tensor, root, number) for number in range(len(tensor.blocks))]
            whole: LeafScalars = joined(each)
            return whole
        if tensor.pipeline is None:
            raise ValueError(f"{tensor.output.name} is copied and has no scalars")
        pipe, own = tensor.pipeline, tensor.blocks[block]
        keys = threefry.pair_keys(root, own.key, pipe.num_experts) if pipe.random else None
        scalars = leaf_scalars(pipe, own.settings, tensor.block_shape, keys)
        for stage in pipe.stages:
            state = self._states.get((stage.key, self._scope(stage, own)))
            if state is not None and state[0] and _needs(stage, tensor):
                with about(own.name):
                    scalars = with_found(pipe, scalars, stage, state[1], own.settings)
        return scalars

    def rows(self, scalars: LeafScalars, visit: Visit) -> LeafScalars:
        """The scalars of a chunk with what was found by row cut to its rows.

        Args:
            scalars: Of the chunk's block or blocks.
            visit: The chunk, whose padded rows may reach beyond the last.
        """
        found = {owner: dict(own) for owner, own in scalars.found.items()}
        for stage in visit.plan.pipeline.stages if visit.plan.pipeline is not None else ():
            own = found[stage.owner]
            if stage.measure.scope == "row" and stage.measure.name in own:
                own[stage.measure.name] = _cut(own[stage.measure.name], visit)
        return scalars._replace(found=found)

    @staticmethod
    def _scope(stage: Stage, block: BlockPlan) -> str | None:
        return None if stage.measure.scope == "model" else block.name

    def _state(self, stage: Stage, tensor: TensorPlan, block: int) -> Any:
        """The state of a measure: as it is, or as it begins."""
        scope = self._scope(stage, tensor.blocks[block])
        with self._lock:
            if (stage.key, scope) not in self._states:
                self._states[stage.key, scope] = (False, self._begin(stage, tensor, block))
            return self._states[stage.key, scope][1]

    def _begin(self, stage: Stage, tensor: TensorPlan, block: int) -> Any:
        shape = tensor.block_shape
        entries = total_entries(self._plan.tensors) if stage.measure.scope == "model" else math.prod(shape)
        lines = {"row": (math.prod(shape[:-1]),), "column": (row_size(tensor),)}
        pipe = tensor.pipeline or self._plan.pipeline  # parts of a model may have fewer experts than others
        extent = Extent(entries, lines.get(stage.measure.scope, ()), pipe.num_experts)
        with about(tensor.blocks[block].name):
            return stage.begin(self._plan.pipeline, tensor.blocks[block].settings, extent)

    def measure(self, loaded: Loaded, scalars: LeafScalars, zero: np.uint32) -> Any:
        """Dispatch the measurement of a chunk."""
        visit = loaded.visit
        step, tensor = visit.stage, visit.plan
        experts, base = split(loaded)
        if tensor.pipeline is None:
            raise ValueError(f"{tensor.output.name} is copied and not measured")
        stage = tensor.pipeline.stage(step.stage)
        state: Any = [self._state(stage, tensor, block) for block in _blocks_of(visit)]
        state = joined(state) if visit.block is None else state[0]
        if stage.measure.scope == "row":
            state = _cut(state, visit)
        if tensor.pipeline.rows:
            scalars = self.rows(scalars, visit)
        static = (tensor.pipeline, stage.key, step.round, self._there(stage), layout_of(visit))
        return count_chunk(*static, experts, base, scalars, state, start_of(visit), np.uint32(size_of(visit)), zero)

    def _there(self, stage: Stage) -> Place:
        return self._place if stage.measure.scope == "model" else self._place._replace(entries=0)

    def _round(self, step: Step) -> tuple[Stage, Round]:
        stage = self._plan.pipeline.stage(step.stage)
        return stage, stage.round(self._there(stage), step.round)

    def absorb(self, visit: Visit, measured: Any) -> None:
        """Add a chunk's measurement to the totals of its scopes."""
        stage, each = self._round(visit.stage)
        size = size_of(visit)
        for number, block in enumerate(_blocks_of(visit)):
            own = measured if visit.block is not None else jax.tree.map(lambda x, n=number: x[n], measured)
            place = (stage.key, self._scope(stage, visit.plan.blocks[block]))
            if each.reduction == "gather" or each.finish is not None:
                own = [np.asarray(row).ravel()[:size] for row in own]
            if each.reduction == "gather":
                self._append(place, np.stack(own))
                continue
            counts = np.asarray(own if each.finish is None else each.finish(own))
            if stage.measure.scope == "row":
                self._append(place, counts[: size // row_size(visit.plan)])
                continue
            wide = counts.astype(np.int64)
            with self._lock:
                before = self._totals.get(place)
                self._totals[place] = wide if before is None else _REDUCED[each.reduction](before, wide)

    def _append(self, place: _Scope, found: np.ndarray) -> None:
        with self._lock:
            self._totals.setdefault(place, []).append(found)

    def conclude_model(self, step: Step, processes: Processes) -> None:
        """Let a model-wide measure go on from what all processes have counted."""
        tensor = next((t for t in self._plan.tensors if applies(step, t)), None)
        if tensor is None:
            return
        stage, each = self._round(step)
        total = self._totals.pop((stage.key, None), None)
        if each.reduction == "gather" and total is not None:
            total = np.concatenate(total, axis=1).astype(np.int64)
        state = self._state(stage, tensor, 0)
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
        """Let a measure go on from the totals of the blocks that `visit` was the last of."""
        stage, _ = self._round(visit.stage)
        for block in range(len(visit.plan.blocks)) if visit.plan.axis else _blocks_of(visit):
            name = visit.plan.blocks[block].name
            total = self._totals.pop((stage.key, name))
            total = np.concatenate(total).astype(np.int64) if stage.measure.scope == "row" else total
            state = self._after(stage, visit.stage, self._state(stage, visit.plan, block), total)
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
        over = all(self._needless(stage, each, state) for each in later)
        self._states[stage.key, scope] = (over, jax.tree.map(np.asarray, state))

    def _needless(self, stage: Stage, step: Step, state: Any) -> bool:
        """Whether a pass of a measure can be left out, as its state is."""
        return step.fallback and stage.measure.settled(stage.options(self._plan.pipeline), step.round, state)

    def settled(self, step: Step) -> bool:
        """Whether a pass of a model-wide measure can be left out: the measure is over, or this pass is needless."""
        over, state = self._states.get((step.stage, None), (False, None))
        if step.scope != "model" or state is None:
            return False
        return over or self._needless(self._plan.pipeline.stage(step.stage), step, state)

    def states(self) -> dict[_Scope, Any]:
        """The last states of all measures that are over."""
        return {place: state for place, (over, state) in self._states.items() if over}

    def to_json(self) -> list[Any]:
        """What the merging phase needs of the phases before it."""
        return [
            [key, scope, [[array.dtype.name, list(array.shape), array.ravel().tolist()] for array in _leaves(state)]]
            for (key, scope), state in self.states().items()
        ]

    def of_model(self) -> list[Any]:
        """What `to_json` has of the whole model: a few numbers, from which any tensor can be merged alone."""
        return [entry for entry in self.to_json() if entry[1] is None]

    def knows(self, steps: Sequence[Step], tensor: TensorPlan) -> bool:
        """Whether what these passes measure of a tensor is known."""
        keys = {step.stage for step in steps if applies(step, tensor)}
        places = [(key, block.name) for key in keys for block in tensor.blocks]
        return all(self._states.get(place, (False, None))[0] for place in places)

    def from_json(self, found: Sequence[Any]) -> None:
        """Take over what `to_json` gave in an earlier run or another process.

        Raises:
            ValueError: It is of another merge; so are the other errors of `documents.FAULTS`.
        """
        by_name = {b.name: (tensor, n) for tensor in self._plan.tensors for n, b in enumerate(tensor.blocks)}
        for key, scope, leaves in found:
            stage = {each.key: each for each in self._plan.pipeline.stages}[key]
            of_model = ((tensor, 0) for tensor in self._plan.tensors if _needs(stage, tensor))
            tensor, block = by_name[scope] if scope is not None else next(of_model, (None, 0))
            if tensor is None:
                raise ValueError(f"{key} is not needed")
            begun = self._begin(stage, tensor, block)
            like = [(leaf.dtype.name, list(leaf.shape)) for leaf in _leaves(begun)]
            if [(dtype, shape) for dtype, shape, _ in leaves] != like:
                raise ValueError(f"{key} has other numbers")
            arrays = [np.array(flat, dtype).reshape(shape) for dtype, shape, flat in leaves]
            self._states[key, scope] = (True, jax.tree.unflatten(jax.tree.structure(begun), arrays))


def _blocks_of(visit: Visit) -> Sequence[int]:
    """The blocks that a chunk has entries of."""
    return range(len(visit.plan.blocks)) if visit.block is None else (visit.block,)


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
    return (total >> 32).astype(np.uint32), (total & 0xFFFFFFFF).astype(np.uint32)


def _cut(found: Any, visit: Visit) -> Any:
    """A chunk's rows of arrays that have one for each row of a block, filled up with zeros.

    Of all blocks at once the rows are the second axis.
    """
    row, layout = row_size(visit.plan), layout_of(visit)
    high, low = (int(word) for word in start_of(visit))
    start, count = ((high << 32) + low) // row, layout.of_block[0]
    axis = 1 if visit.block is None else 0

    def cut(array: np.ndarray) -> np.ndarray:
        rows = array[(slice(None),) * axis + (slice(start, start + count),)]
        missing = [(0, 0)] * array.ndim
        missing[axis] = (0, count - rows.shape[axis])
        return np.pad(rows, missing)

    return jax.tree.map(cut, found)


def scope_of(visit: Visit) -> str | None:
    """What a visit's measurement is of: a block, a tensor with all its blocks, or None for the whole model."""
    if visit.stage.scope == "model":
        return None
    tensor = visit.plan
    together = visit.block is None or tensor.axis  # blocks along a later axis than the first end together
    return tensor.output.name if together or not tensor.blocks else tensor.blocks[visit.block or 0].name


def split(loaded: Loaded) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """The experts' arrays of a chunk, and the base's."""
    if loaded.visit.plan.has_base:
        return loaded.arrays[1:], loaded.arrays[0]
    return loaded.arrays, None
