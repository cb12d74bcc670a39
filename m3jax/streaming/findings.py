"""What a merge must know of more than one entry: thresholds, majority signs and angles, measured chunk by chunk.

Each measurement is a pass over a tensor or over the model whose results add up in any order.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from m3jax.arithmetic import exact, threefry
from m3jax.cluster.processes import Buffer, Processes, add_up
from m3jax.methods import leaf, magnitude, slerp, ties
from m3jax.methods.base import Scalars, Values
from m3jax.methods.leaf import Pipeline
from m3jax.streaming.plan import Plan, TensorPlan, total_entries
from m3jax.streaming.reading import Loaded, Visit, visits


class Stage(NamedTuple):
    """A pass over a tensor or over the model.

    Attributes:
        kind: "sparsify", "trim" (rankings), "signs", "largest", "sums" (slerp), or "merge".
        scope: "tensor" or "model": over what its result holds.
        step: Of a ranking: "sample", "guess", "coarse" or "fine".
    """

    kind: str
    scope: str = "tensor"
    step: str = ""

    @property
    def label(self) -> str:
        """What the stage does, for people."""
        return _LABELS[self.kind]

    @property
    def shift(self) -> int:
        """The shift of a ranking's bins."""
        return magnitude.COARSE if self.step == "coarse" else magnitude.FINE


_LABELS = {
    "sparsify": "ranking magnitudes",
    "trim": "ranking magnitudes",
    "signs": "counting signs",
    "largest": "measuring angles",
    "sums": "measuring angles",
    "merge": "merging",
}
MERGE = Stage("merge")

_WORTH_SAMPLING = 2**24  # entries from which a sample's cost is small against the pass that it saves
_SAMPLED = 2**22  # entries of a sample: enough that its quantile falls inside a bracket around the model's
_SAMPLE_BLOCK = 2**12


# --- jitted functions of chunks -----------------------------------------------------------------------------------


def _ranked(pipe: Pipeline, kind: str, experts: Any, base: Any, scalars: Scalars, start: Any, zero: Any) -> Values:
    if kind == "sparsify":
        return leaf.ranked_by_sparsifier(pipe, experts, base)
    index = threefry.range_index(start[0], start[1], experts[0].shape[0])
    return leaf.ranked_by_trim(pipe, experts, base, scalars, index, zero)


@functools.partial(jax.jit, static_argnums=(0, 1))
def magnitudes_chunk(
    pipe: Pipeline, kind: str, experts: Any, base: Any, scalars: Scalars, start: Any, zero: Any
) -> list[jax.Array]:
    """The ranked magnitudes of a chunk as integers, one array per expert."""
    return [exact.magnitude_bits(v) for v in _ranked(pipe, kind, experts, base, scalars, start, zero)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def bins_chunk(
    pipe: Pipeline, kind: str, shift: int, experts: Any, base: Any, scalars: Scalars, start: Any, low: Any, zero: Any
) -> list[jax.Array]:
    """The bin of every magnitude of a chunk, one array per expert."""
    return magnitude.bins(_ranked(pipe, kind, experts, base, scalars, start, zero), low, shift)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def tally_chunk(
    pipe: Pipeline,
    kind: str,
    shift: int,
    experts: Any,
    base: Any,
    scalars: Scalars,
    start: Any,
    low: Any,
    size: Any,
    zero: Any,
) -> jax.Array:
    """How many magnitudes of a chunk's first `size` entries fall into each bin."""
    valid = lax.iota(jnp.uint32, experts[0].shape[0]) < size
    return magnitude.tally(magnitude.bins(_ranked(pipe, kind, experts, base, scalars, start, zero), low, shift), valid)


@functools.partial(jax.jit, static_argnums=0)
def signs_chunk(
    pipe: Pipeline, experts: Any, base: Any, scalars: Scalars, start: Any, size: Any, zero: Any
) -> jax.Array:
    """By how many more entries of a chunk elect + than −, as int32 (chunks are shorter than 2³¹)."""
    padded = experts[0].shape[0]
    index = threefry.range_index(start[0], start[1], padded)
    values = leaf.sparse_values(pipe, experts, base, scalars, index, zero)
    positive, negative = ties.sign_counts(values, scalars, zero)
    signs = positive.astype(jnp.int32) - negative.astype(jnp.int32)
    return jnp.sum(jnp.where(lax.iota(jnp.uint32, padded) < size, signs, 0))


@jax.jit
def largest_chunk(experts: Any, size: Any, zero: Any) -> jax.Array:
    """`slerp.largest` of a chunk."""
    valid = lax.iota(jnp.uint32, experts[0].shape[0]) < size
    return slerp.largest(tuple(exact.widen(x) for x in experts), zero, valid)


@jax.jit
def sums_chunk(experts: Any, largest: Any, size: Any, zero: Any) -> jax.Array:
    """`slerp.integer_sums` of a chunk."""
    valid = lax.iota(jnp.uint32, experts[0].shape[0]) < size
    return slerp.integer_sums(tuple(exact.widen(x) for x in experts), largest, zero, valid)


# --- passes -------------------------------------------------------------------------------------------------------


def _ranking(kind: str, scope: str, plan: Plan) -> list[Stage]:
    steps = ["coarse", "fine"]
    if scope == "model" and total_entries(plan.tensors) >= _WORTH_SAMPLING:
        steps = ["sample", "guess", *steps]
    return [Stage(kind, scope, step) for step in steps]


def phases_of(plan: Plan) -> list[list[Stage]]:
    """The passes: each phase goes over all tensors before the next; the last one ends with the merge."""
    pipe, merged = plan.pipeline, [t for t in plan.tensors if t.settings is not None]
    stages: list[Stage] = []
    sparsifier = pipe.sparsifier
    if sparsifier is not None and sparsifier.name == "magnitude":
        stages += _ranking("sparsify", sparsifier.scope, plan)
    if any(t.trim and min(t.trim) < 1 for t in merged):
        stages += _ranking("trim", pipe.method.trim_scope, plan)
    if pipe.method.sign_election == "unweighted":
        stages.append(Stage("signs", "model"))
    if pipe.method.interpolates:
        stages += [Stage("largest"), Stage("sums")]
    phases: list[list[Stage]] = []
    for stage in [*stages, MERGE]:
        if stage.scope == "model" or not phases or phases[-1][-1].scope == "model":
            phases.append([stage])
        else:
            phases[-1].append(stage)
    return phases


def applies(stage: Stage, tensor: TensorPlan) -> bool:
    """Whether a stage has anything to do for a tensor."""
    if stage == MERGE:
        return True
    if tensor.settings is None or (stage.kind == "trim" and min(tensor.trim, default=1.0) == 1.0):
        return False
    return stage.kind != "sparsify" or stage.scope == "model" or min(tensor.settings.densities) < 1.0


def samples(
    stage: Stage, model: Sequence[TensorPlan], tensors: Sequence[TensorPlan], chunk_entries: int, multiple: int = 1
) -> Iterator[Visit]:
    """Blocks spread evenly over tensors, about 2²² entries of the model, whatever its size.

    Args:
        stage: The ranking.
        model: All tensors.
        tensors: Those to sample.
        chunk_entries: As in `visits`.
        multiple: As in `visits`.
    """
    stride = max(_SAMPLE_BLOCK, total_entries([t for t in model if applies(stage, t)]) // _SAMPLED * _SAMPLE_BLOCK)
    due = 0
    for tensor in [t for t in tensors if applies(stage, t)]:
        while due < tensor.output.size:
            stop = min(due + _SAMPLE_BLOCK, tensor.output.size)
            (visit,) = visits(stage, tensor, chunk_entries, False, due, stop, multiple)
            yield visit
            due += stride
        due -= tensor.output.size


class Findings:
    """Thresholds, signs and angles found so far, by stage and tensor (None: of the whole model)."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.thresholds: dict[tuple[str, str | None], np.ndarray] = {}
        self.tie_sign = 1
        self._totals: dict[tuple[Stage, str | None], Any] = {}
        self._searches: dict[tuple[str, str | None], magnitude.Search] = {}
        self._largest: dict[str, np.ndarray] = {}
        self._arcs: dict[str, np.ndarray] = {}

    def scalars(self, tensor: TensorPlan, root: np.ndarray) -> Scalars:
        """The scalars of a tensor as far as they are known."""
        if tensor.pipeline is None or tensor.settings is None:
            raise ValueError(f"{tensor.output.name} is copied and has no scalars")
        name, pipe = tensor.output.name, tensor.pipeline
        masked = pipe.sparsifier is not None and pipe.sparsifier.name == "dare"
        keys = threefry.pair_keys(root, name, pipe.num_experts) if masked else None
        scalars = leaf.leaf_scalars(pipe, tensor.settings, keys)
        for kind, field in (("sparsify", "drop_below"), ("trim", "trim_below")):
            found = self.thresholds.get((kind, None), self.thresholds.get((kind, name)))
            if found is not None:
                scalars = scalars._replace(**{field: found})
        if name in self._arcs:
            scalars = scalars._replace(coefficients=self._arcs[name])
        return scalars._replace(tie_sign=np.int32(self.tie_sign))

    def measure(self, loaded: Loaded, scalars: Scalars, start: np.ndarray, zero: np.uint32) -> Any:
        """Dispatch the measurement of a chunk."""
        visit = loaded.visit
        stage, tensor = visit.stage, visit.plan
        experts, base = split(loaded)
        if tensor.pipeline is None:
            raise ValueError(f"{tensor.output.name} is copied and not measured")
        size = np.uint32(visit.size)
        if stage.kind == "signs":
            return signs_chunk(tensor.pipeline, experts, base, scalars, start, size, zero)
        if stage.kind == "largest":
            return largest_chunk(experts, size, zero)
        if stage.kind == "sums":
            return sums_chunk(experts, self._largest[tensor.output.name], size, zero)
        low = self._search(stage, tensor).low
        if stage.step == "sample":
            return magnitudes_chunk(tensor.pipeline, stage.kind, experts, base, scalars, start, zero)
        if self._sparse_on_host(stage):
            return bins_chunk(tensor.pipeline, stage.kind, stage.shift, experts, base, scalars, start, low, zero)
        return tally_chunk(tensor.pipeline, stage.kind, stage.shift, experts, base, scalars, start, low, size, zero)

    @staticmethod
    def _sparse_on_host(stage: Stage) -> bool:
        """Whether bins are counted by numpy: on a CPU that is faster where few are inside the bracket."""
        return stage.step in ("guess", "fine") and jax.default_backend() == "cpu"

    def absorb(self, visit: Visit, measured: Any) -> None:
        """Add a chunk's measurement to the totals of its scope."""
        stage, scope = visit.stage, scope_of(visit)
        before = self._totals.get((stage, scope))
        if stage.step == "sample":
            rows = [np.asarray(row)[: visit.size] for row in measured]
            self._totals[stage, scope] = [[row] for row in rows] if before is None else _appended(before, rows)
            return
        if self._sparse_on_host(stage):
            measured = magnitude.tally_sparse([np.asarray(row)[: visit.size] for row in measured])
        counts = np.asarray(measured)
        if stage.kind == "largest":
            total: Any = counts if before is None else np.maximum(before, counts)
        elif stage.kind == "sums":
            total = slerp.to_integers(counts) + (0 if before is None else before)
        else:
            total = counts.astype(np.int64) + (0 if before is None else before)
        self._totals[stage, scope] = total

    def conclude_model(self, stage: Stage, processes: Processes) -> None:
        """Draw the conclusion of a model-wide measurement from what all processes have counted."""
        tensor = next((t for t in self._plan.tensors if applies(stage, t)), None)
        if tensor is None:
            return
        total, experts = self._totals.pop((stage, None), None), self._plan.pipeline.num_experts
        if stage.step == "sample":
            self._bracket(stage, tensor, total, processes)
            return
        shape = () if stage.kind == "signs" else (experts, magnitude.BINS)
        counted = add_up(processes, np.zeros(shape, np.int64) if total is None else total)
        if stage.kind == "signs":
            self.tie_sign = int(np.sign(counted))
        else:
            self._narrow(stage, None, tensor, counted)

    def conclude(self, visit: Visit) -> None:
        """Draw the conclusion from the totals of the tensor that `visit` was the last of."""
        stage, tensor = visit.stage, visit.plan
        name = tensor.output.name
        total = self._totals.pop((stage, name))
        if stage.kind == "largest":
            self._largest[name] = total
        elif stage.kind == "sums":
            products = slerp.inner_products(self._largest.pop(name), total)
            (position,) = tensor.settings.weights if tensor.settings else (0.5,)
            self._arcs[name] = np.asarray(slerp.arc_coefficients(products, position))
        else:
            self._narrow(stage, name, tensor, total)

    def _bracket(
        self, stage: Stage, tensor: TensorPlan, total: list[list[np.ndarray]] | None, processes: Processes
    ) -> None:
        """Take from samples of all processes where a model-wide ranking looks first."""
        search, size = self._search(stage, tensor), self._ranked_entries(None, tensor)
        experts = self._plan.pipeline.num_experts

        def guess(given: Sequence[Buffer]) -> Buffer:
            samples = [np.frombuffer(rows, np.dtype("<u4")).reshape(experts, -1) for rows in given]
            whole = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=1)
            return bytes(magnitude.guess(search, size, list(whole)).low.astype("<u4").tobytes())

        rows = np.zeros((experts, 0), np.uint32) if total is None else np.stack([np.concatenate(row) for row in total])
        low = np.frombuffer(processes.exchange(rows.astype("<u4", copy=False).data, guess), np.dtype("<u4"))
        self._searches[stage.kind, None] = search._replace(low=low.astype(np.uint32))

    def _narrow(self, stage: Stage, scope: str | None, tensor: TensorPlan, total: Any) -> None:
        """Take one step of a ranking."""
        search = self._search(stage, tensor)
        narrowed, inside = magnitude.advance(search, _words(total), stage.shift)
        if stage.step == "guess" and not np.all(inside):
            del self._searches[stage.kind, scope]  # the bracket missed: coarse and fine find what it did not
            return
        self._searches[stage.kind, scope] = narrowed
        if stage.step != "coarse":
            self.thresholds[stage.kind, scope] = np.asarray(self._searches.pop((stage.kind, scope)).low)

    def settled(self, stage: Stage) -> bool:
        """Whether a model-wide ranking is over before this step of it."""
        return stage.scope == "model" and (stage.kind, None) in self.thresholds

    def _ranked_entries(self, scope: str | None, tensor: TensorPlan) -> int:
        return total_entries(self._plan.tensors if scope is None else [tensor])

    def _search(self, stage: Stage, tensor: TensorPlan) -> magnitude.Search:
        scope = None if stage.scope == "model" else tensor.output.name
        if (stage.kind, scope) not in self._searches:
            kept = tensor.trim if stage.kind == "trim" else tensor.settings.densities if tensor.settings else ()
            size = self._ranked_entries(scope, tensor)
            self._searches[stage.kind, scope] = magnitude.start(size, tuple(kept))
        return self._searches[stage.kind, scope]

    def to_json(self) -> dict[str, Any]:
        """What the merging phase needs of the phases before it."""
        found = [[kind, scope, value.tolist()] for (kind, scope), value in self.thresholds.items()]
        return {"thresholds": found, "tie_sign": self.tie_sign}

    def from_json(self, found: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave in an earlier run."""
        for kind, scope, value in found["thresholds"]:
            self.thresholds[kind, scope] = np.array(value, np.uint32)
        self.tie_sign = int(found["tie_sign"])


def _appended(before: list[list[np.ndarray]], rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    return [[*parts, row] for parts, row in zip(before, rows, strict=True)]


def _words(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (total >> 32).astype(np.uint32), (total & 0xFFFFFFFF).astype(np.uint32)


def scope_of(visit: Visit) -> str | None:
    """The tensor that a visit's measurement is of; None for the whole model."""
    return None if visit.stage.scope == "model" else visit.plan.output.name


def split(loaded: Loaded) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """The experts' arrays of a chunk, and the base's."""
    if loaded.visit.plan.has_base:
        return loaded.arrays[1:], loaded.arrays[0]
    return loaded.arrays, None
