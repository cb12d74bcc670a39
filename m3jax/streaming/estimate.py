"""What a merge will read, write and take, from the headers of its inputs alone."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax.checkpoints import sketch_model
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.recipe import Recipe, load_recipe
from m3jax.streaming.findings import Step, applies, phases_of
from m3jax.streaming.intermediates import outlined
from m3jax.streaming.jobs import Ready, prepared
from m3jax.streaming.lanes import lanes_over
from m3jax.streaming.plan import DrawnWeights, MergePlan, TensorPlan, divide
from m3jax.streaming.reading import HELD_BYTES, chunk_size, held_bytes, widest_entry
from m3jax.text import size_text

# Bytes read and written per second by a process of two cores, from the page cache: DARE and TIES on 1.1 B parameters in
# docs/benchmarks/merge-2-cores.json, as docs/pods.md takes them (linear merging lies between them beside its start-up).
_RATES = (1.3e9, 1.5e9)
RATES_TEXT = "1.3 to 1.5 GB/s per process of 2 cores"
_RUNTIME_BYTES = 250_000_000  # Python, JAX and compiled programs: what the same merges took beside their buffers
_RANKING_BYTES = 200_000_000  # of samples and counts, where magnitudes are ranked (docs/pods.md)
_LANE_BYTES = 40_000_000  # of each lane but the first, whose buffers are smaller for it (docs/performance.md)
_ORBAX_NOTE = "as orbax it is made in parts, of one weight file each, of which the disk holds one twice for a while"
_BUFFERS = 2  # chunks in flight per input, at the least: one that is computed, one that is read


class InputEstimate(NamedTuple):
    """One model.

    Attributes:
        name: As the recipe names it.
        role: "expert", "base", or "template" for a base of which only config and tokenizer are used.
        bytes: Of its tensors.
        parameters: Entries of its tensors.
    """

    name: str
    role: str
    bytes: int
    parameters: int


class PassEstimate(NamedTuple):
    """One reading of the inputs.

    Attributes:
        what: What is done in it.
        bytes: Read.
    """

    what: str
    bytes: int


class TensorEstimate(NamedTuple):
    """The tensors of one shape and dtype.

    Attributes:
        shape: Of each of them.
        dtype: As it is written.
        tensors: How many there are.
        merged: Whether they are merged, not copied.
    """

    shape: tuple[int, ...]
    dtype: str
    tensors: int
    merged: bool


class Estimate(NamedTuple):
    """A merge before it is made.

    Attributes:
        method: What is done, in the recipe's words.
        inputs: The models.
        tensors: What is written, by shape.
        parameters: Entries written.
        passes: The readings, the merge last.
        bytes_read: All passes together.
        bytes_written: Of weights.
        files: Weight files.
        disk_free: Where the output goes; None in object storage.
        peak_memory: Bytes of one process, beside the page cache.
        resident_memory: Bytes of all devices together that `m3jax explore` keeps: the inputs and one merge; None of a
            method that it does not take.
        processes: How many share the work.
        largest_share: Bytes that the busiest process writes.
        seconds: From and to.
        weights: What `mixup` draws, by group; empty where weights are given.
        experts: The models that are merged with them, as the recipe names them.
        notes: Sentences that a reader of the recipe should know.
        intermediates: The merges that it starts from, which are made before it, by name.
    """

    method: str
    inputs: tuple[InputEstimate, ...]
    tensors: tuple[TensorEstimate, ...]
    parameters: int
    passes: tuple[PassEstimate, ...]
    bytes_read: int
    bytes_written: int
    files: int
    disk_free: int | None
    peak_memory: int
    resident_memory: int | None
    processes: int
    largest_share: int
    seconds: tuple[float, float]
    weights: DrawnWeights
    experts: tuple[str, ...]
    notes: tuple[str, ...]
    intermediates: "Mapping[str, Estimate]" = MappingProxyType({})

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **self._asdict(),
            "inputs": [entry._asdict() for entry in self.inputs],
            "tensors": [entry._asdict() for entry in self.tensors],
            "passes": [entry._asdict() for entry in self.passes],
            "rates": list(_RATES),
            "intermediates": {name: each.to_json() for name, each in self.intermediates.items()},
        }


def _read_bytes(ready: Ready, tensor: TensorPlan) -> int:
    """What one reading of a tensor reads of all its sources."""
    positions = tensor.sources if tensor.matrices is None else (*tensor.sources, *tensor.matrices.positions)
    return sum(ready.models[position].checkpoint.tensors[tensor.output.name].nbytes for position in positions)


def _needed(plan: MergePlan) -> list[list[Step]]:
    """The readings that are made, by phase: where a sample brackets a threshold, one more settles it, not two."""
    phases = [[step for step in phase if not step.sampled and not step.fallback] for phase in phases_of(plan)]
    return [phase for phase in phases if phase]


def _passes(ready: Ready, phases: Sequence[Sequence[Step]], lanes: int) -> Iterator[PassEstimate]:
    checkpoints = [model.checkpoint for model in ready.models]
    entries = chunk_size(None, ready.plan, checkpoints, lanes)
    for phase in phases:
        gone_over: set[str] = set()
        for step in phase:
            total = 0
            for tensor in ready.plan.tensors:
                if applies(step, tensor):
                    again = tensor.output.name in gone_over
                    total += _read_bytes(ready, tensor) - (held_bytes(tensor, checkpoints, entries) if again else 0)
                    gone_over.add(tensor.output.name)
            yield PassEstimate(step.label, total)


def _tensors(plan: MergePlan) -> tuple[TensorEstimate, ...]:
    counts: dict[tuple[Any, ...], int] = {}
    for tensor in plan.tensors:
        key = (tensor.output.shape, tensor.output.dtype, tensor.pipeline is not None)
        counts[key] = counts.get(key, 0) + 1
    return tuple(TensorEstimate(shape, dtype, count, merged) for (shape, dtype, merged), count in counts.items())


def _buffers(ready: Ready, phases: Sequence[Sequence[Step]], lanes: int) -> int:
    """Bytes of the chunks in flight, read ahead, computed and written, and of what is kept between readings."""
    checkpoints = [model.checkpoint for model in ready.models]
    in_flight = widest_entry(ready.plan, checkpoints) * len(checkpoints) * _BUFFERS + 4
    several = [t for phase in phases for t in ready.plan.tensors if sum(applies(step, t) for step in phase) > 1]
    held = max((min(_read_bytes(ready, tensor), HELD_BYTES) for tensor in several), default=0)
    chunk = chunk_size(None, ready.plan, checkpoints, lanes)
    return lanes * (chunk * in_flight + held) + (lanes - 1) * _LANE_BYTES + prepared_bytes(ready.plan)


def _widest(plan: MergePlan) -> TensorPlan | None:
    """The tensor with most inputs of those that something is prepared for on the host."""
    tensors = [tensor for tensor in plan.tensors if tensor.matrices is not None]
    return max(tensors, key=lambda tensor: tensor.matrices.width if tensor.matrices is not None else 0, default=None)


def prepared_bytes(plan: MergePlan) -> int:
    """The most that a method takes to prepare something of matrices, and to keep it."""
    widest = _widest(plan)
    if widest is None or widest.matrices is None or widest.pipeline is None:
        return 0
    preparation = widest.pipeline.method.preparation
    return 0 if preparation is None else preparation.nbytes(widest.matrices.width, widest.pipeline.num_experts)


def _notes_on_preparing(plan: MergePlan) -> Iterator[str]:
    widest = _widest(plan)
    if widest is not None and widest.matrices is not None:
        yield (
            f"{plan.pipeline.method.name} prepares matrices of up to {widest.matrices.width:,} inputs "
            f"({widest.output.name}) on the host: {size_text(prepared_bytes(plan))} of the memory, and time that is "
            "not counted here"
        )


def estimate(ready: Ready, method: str, place: Path | None, processes: int = 1, lanes: int | None = None) -> Estimate:
    """What a prepared merge will read, write and take.

    Args:
        ready: Of `streaming.prepared`.
        method: What it is called.
        place: A directory on the disk that the output goes to; None for object storage.
        processes: How many share the work.
        lanes: As in `merge_checkpoint`.
    """
    phases = _needed(ready.plan)
    lanes = lanes_over(lanes, [model.checkpoint for model in ready.models], place is None)
    passes = tuple(_passes(ready, phases, lanes))
    written = sum(tensor.output.nbytes for tensor in ready.plan.tensors)
    read = sum(entry.bytes for entry in passes)
    files = [sum(info.nbytes for info in infos) for _, infos in ready.shards]
    owners = divide(files, processes)
    largest = max(sum(size for size, owner in zip(files, owners, strict=True) if owner == p) for p in range(processes))
    share = (read + written) * (largest / written if written else 0.0)
    resident = sum(_read_bytes(ready, t) if t.pipeline is not None else t.output.nbytes for t in ready.plan.tensors)
    return Estimate(
        method,
        tuple(
            InputEstimate(
                model.input.name,
                model.role,
                sum(info.nbytes for info in model.checkpoint.tensors.values()),
                sum(info.size for info in model.checkpoint.tensors.values()),
            )
            for model in ready.models
        ),
        _tensors(ready.plan),
        sum(tensor.output.size for tensor in ready.plan.tensors),
        passes,
        read,
        written,
        len(files),
        None if place is None else shutil.disk_usage(place).free,
        _RUNTIME_BYTES + _buffers(ready, phases, lanes) + (_RANKING_BYTES if len(passes) > 1 else 0),
        None if ready.plan.pipeline.method.preparation is not None else resident + written,
        processes,
        largest,
        (share / _RATES[1], share / _RATES[0]),
        ready.plan.weights,
        tuple(model.input.name for model in ready.models if model.role == "expert"),
        (
            *ready.plan.notes,
            *ready.notes,
            *_notes_on_preparing(ready.plan),
            *([_ORBAX_NOTE] if ready.orbax is not None else []),
        ),
    )


def estimate_recipe(
    recipe: str | Recipe,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    seed: int | None = None,
    max_shard_size: int | str | None = None,
    processes: int = 1,
    format: str | None = None,
    lanes: int | None = None,
) -> Estimate:
    """What `m3jax merge` with the same arguments will read, write and take; no weights are read.

    Args:
        recipe: Its YAML file, or what was read of it.
        out: Where the output would go; it may be there.
        overrides: As in `load_recipe`.
        seed: As in `load_recipe`.
        max_shard_size: Bytes per file at most.
        processes: How many share the work.
        format: As in `merge_checkpoint`.
        lanes: Likewise.

    Raises:
        M3Error: The merge cannot be made, for the reason that it would give itself.

    Example:
        >>> estimate_recipe("recipe.yaml", "merged").bytes_read  # doctest: +SKIP
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides, seed)
    needed = loaded.needed
    alone = [each.model_copy(update={"intermediates": needed[:number]}) for number, each in enumerate(needed)]
    plain = SAFETENSORS.name
    within = {str(each.name): _estimated(each, out, max_shard_size, processes, plain, lanes) for each in alone}
    return _estimated(loaded, out, max_shard_size, processes, format, lanes)._replace(intermediates=within)


def _estimated(
    loaded: Recipe,
    out: str | os.PathLike[str],
    max_shard_size: int | str | None,
    processes: int,
    format: str | None,
    lanes: int | None,
) -> Estimate:
    method: str = loaded.merge_method
    method += f", {loaded.sparsify.method} before" if loaded.sparsify is not None else ""
    method += ", drawn weights" if loaded.mixup is not None else ""
    place = as_path(out)
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "format": format, "writes": False}
    with prepared(loaded, out, **options, locate=sketch_model, readying=outlined) as ready:
        parent = None if isinstance(place, RemotePath) else place.absolute().parent
        return estimate(ready, method, parent, processes, lanes)
