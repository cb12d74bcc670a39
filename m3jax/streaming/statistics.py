"""The statistics of experts, for methods that ask for some: opened, and seen as the expert that each is of is seen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax.checkpoints.protocol import Checkpoint
from m3jax.checkpoints.standing_in import CONVERSION
from m3jax.checkpoints.views import renamed, stored_at
from m3jax.errors import M3Error
from m3jax.methods.rows import MethodRow
from m3jax.outputs.statistics import StatisticsRecord, read_record
from m3jax.streaming.opening import OpenedModel, open_model, seen_alike, viewed
from m3jax.streaming.passes import MeasuredModel
from m3jax.streaming.plan import FLOATS, Input, method_of

if TYPE_CHECKING:
    from m3jax.streaming.jobs import MergeJob

ROLE = "statistics"
"""Of an input that is no model."""


class OpenedStatistics(NamedTuple):
    """The statistics of all experts, in their order.

    Attributes:
        models: As they are seen: under the names of the merge.
        sources: As they are stored.
        records: What each tells of itself; None where it tells nothing.
        notes: What a user should know of them.
    """

    models: tuple[OpenedModel, ...] = ()
    sources: tuple[OpenedModel, ...] = ()
    records: tuple[StatisticsRecord | None, ...] = ()
    notes: tuple[str, ...] = ()

    def measured(self, first: int) -> dict[int, MeasuredModel]:
        """What was measured and what was written, by input, as far as they tell it.

        Args:
            first: The position of the first of them among the inputs.
        """
        found = {}
        for i, (each, told) in enumerate(zip(self.models, self.records, strict=True)):
            if told is not None:
                found[i] = MeasuredModel(each.input.name, told.tensors)
                found[first + i] = MeasuredModel(each.input.name, told.digests, itself=True)
        return found

    def identity(self) -> list[Any]:
        """What a merge depends on of what they tell."""
        return [None if told is None else [told.kind, told.adapter, dict(told.tensors)] for told in self.records]


def open_statistics(job: "MergeJob", models: Sequence[OpenedModel], stack: ExitStack) -> OpenedStatistics:
    """The statistics of the experts; none where the method asks for none.

    Args:
        job: The merge.
        models: The inputs of its plan, experts first.
        stack: Keeps what is opened open.

    Raises:
        M3Error: They are of another kind, or of other models.
    """
    row = job.recipe.row
    if not row.statistics:
        return OpenedStatistics()
    experts = [model for model in models if model.role == "expert"]
    names = [str(entry.statistics) for entry in job.recipe.experts]
    sources = [open_model(name, ROLE, job, stack) for name in names]
    pairs = list(zip(sources, experts, strict=True))
    records = tuple(_record_of(source, expert, row) for source, expert in pairs)
    if method_of(job.recipe).preparation is None:
        seen = tuple(_seen_as(source, expert, job) for source, expert in pairs)
    else:
        seen = tuple(_matrices_of(*pair, told, job) for pair, told in zip(pairs, records, strict=True))
    return OpenedStatistics(seen, tuple(sources), records, tuple(_notes(pairs, records)))


def _record_of(statistics: OpenedModel, expert: OpenedModel, row: MethodRow) -> StatisticsRecord | None:
    """What statistics tell of themselves, held against what is asked for."""
    name = statistics.input.name
    if statistics.adapting is not None:
        raise M3Error(f"{name}: names statistics with an adapter: name statistics of the model with its adapter")
    record = read_record(statistics.place.path)
    if record is None:
        return None
    if record.kind != row.statistics:
        raise M3Error(
            f"{name}: holds {record.kind} statistics, but {row.name} needs {row.statistics}: measure those (m3jax "
            f"statistics --kind {row.statistics})"
        )
    if record.adapter != (None if expert.adapting is None else expert.adapting.config_digest):
        raise M3Error(
            f"{name}: was measured of {record.model}, which has another adapter than {expert.input.name}, or only one "
            f"of them has one: measure {expert.input.name}"
        )
    return record


def _seen_as(statistics: OpenedModel, expert: OpenedModel, job: "MergeJob") -> OpenedModel:
    """Statistics under the names and in the layout of their expert, as it is merged."""
    own, _ = seen_alike([statistics._replace(role="expert"), expert._replace(role="base")], job)
    names = _names(own.checkpoint, expert)
    if any(name != stored for name, stored in names.items()):
        own = viewed(own, renamed(own.checkpoint, names), job)
    _check(own, expert)
    return own._replace(role=ROLE, note=None)


def _matrices_of(
    statistics: OpenedModel, expert: OpenedModel, record: StatisticsRecord | None, job: "MergeJob"
) -> OpenedModel:
    """Statistics that are matrices under the names of their expert, as it is merged."""
    own, model = statistics.input.name, expert.input.name
    if expert.note is not None:
        raise M3Error(
            f"{own}: holds matrices, which cannot follow a model that is read under other names or in another layout "
            f"({expert.note}): convert it first (m3jax convert), and measure what comes of it"
        )
    there, shared = statistics.checkpoint.tensors, {} if record is None else record.shared
    anatomy, names, first = expert.input.anatomy, {}, {}
    for name in expert.checkpoint.tensors:
        stored = stored_at(expert.checkpoint, name).name
        found = next((each for each in (shared.get(stored, stored), name) if each in there), None)
        if found is None:
            continue
        if there[found].dtype not in FLOATS:
            raise M3Error(
                f"{found}: is {there[found].dtype} in {own}, but statistics are BF16, F16 or F32: measure anew"
            )
        if anatomy.parts[name].alias_of is not None or name in {part.alias_of for part in anatomy.parts.values()}:
            raise M3Error(f"{name}: is one tensor with another in {model}, but has statistics of one use: leave it out")
        names[name] = found
        if record is not None and record.inputs_first is not None:
            first[name] = stored in record.inputs_first
    if record is None:
        _check_complete(own, expert, names)
    surplus = next((name for name in there if name not in set(names.values())), None)
    if surplus is not None:
        raise M3Error(
            f"{surplus}: is in {own} but not in {model}: give the statistics of this model, such as m3jax statistics "
            f"{model} measures"
        )
    view = renamed(statistics.checkpoint, names)
    seen = Input(own, view.tensors, statistics.input.anatomy, inputs_first=first)
    return statistics._replace(role=ROLE, checkpoint=view, input=seen, note=None)


def _check_complete(own: str, expert: OpenedModel, names: Mapping[str, str]) -> None:
    """Raise M3Error where matrices without a record may be those of other weights too, as some of a block lack one."""
    parts = expert.input.anatomy.parts
    blocks = {group for name in names for group in parts[name].groups}
    for name, info in expert.input.tensors.items():
        part = parts[name]
        dimensions = len(info.shape) - (part.stack_axis is not None)
        if blocks.intersection(part.groups) and name not in names and dimensions == 2 and info.dtype in FLOATS:
            raise M3Error(
                f"{own}: has a matrix for other weights of a block but none for {name}, and no {CONVERSION} that would "
                "tell whether they share one: restore that file, measure again, or give the identity for what is to be "
                "averaged"
            )


def _names(checkpoint: Checkpoint, expert: OpenedModel) -> dict[str, str]:
    """The stored name of each tensor's statistics; what is one tensor has one statistics."""
    anatomy, there = expert.input.anatomy, checkpoint.tensors
    pairs = [(name, part.alias_of) for name, part in anatomy.parts.items() if part.alias_of is not None]
    if expert.given_head and anatomy.head is not None and anatomy.embedding is not None:
        pairs.append((anatomy.head, anatomy.embedding))
    names = {name: name for name in there}
    for copy, original in pairs:
        stored = next((name for name in (original, copy) if name in there), None)
        if stored is not None:
            names |= {copy: stored, original: stored}
    return names


def _check(statistics: OpenedModel, expert: OpenedModel) -> None:
    """Raise M3Error unless there is one float for each entry of the expert's tensors, and for nothing else."""
    own, model, tensors = statistics.input.name, expert.input.name, expert.input.tensors
    mend = f"give the statistics of this model, such as m3jax statistics {model} measures"
    for name, info in statistics.checkpoint.tensors.items():
        if name not in tensors:
            raise M3Error(f"{name}: is in {own} but not in {model}: {mend}")
        if info.shape != tensors[name].shape:
            raise M3Error(f"{name}: is {list(info.shape)} in {own} but {list(tensors[name].shape)} in {model}: {mend}")
        if info.dtype not in FLOATS:
            raise M3Error(f"{name}: is {info.dtype} in {own}, but statistics are BF16, F16 or F32: {mend}")


def _notes(
    pairs: Iterable[tuple[OpenedModel, OpenedModel]], records: Sequence[StatisticsRecord | None]
) -> Iterator[str]:
    for (statistics, expert), record in zip(pairs, records, strict=True):
        if record is None:
            yield (
                f"{statistics.input.name} does not tell of which model its statistics are: they are taken to be of "
                f"{expert.input.name}"
            )
