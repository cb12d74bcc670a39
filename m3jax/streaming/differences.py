"""What differs between two models, out of core: seen as a merge sees them, measured in sums that no chunk decides.

Entries are measured in float64, in segments of 4,096 that lie in each block's tensor as they do whatever chunks it is
read in. The sums of a segment depend on no order (`arithmetic.segments`), and those of all segments are added exactly.

With a base P, δ is what each model has beyond it: δA = A − P and δB = B − P. Without one, what is compared are A and B.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from m3jax.anatomy import MODEL_KINDS, Anatomy
from m3jax.anatomy.agreement import notes_on_configurations
from m3jax.anatomy.roles import ROLES, Role, role_of
from m3jax.arithmetic import segments
from m3jax.arithmetic.segments import SEGMENT, Floats
from m3jax.checkpoints import DTYPES, Checkpoint, TensorInfo, digest_tensor
from m3jax.checkpoints.locate import read_config
from m3jax.checkpoints.protocol import check_unchanged
from m3jax.checkpoints.views_stacked import BlockPlace, Stacking, restacked
from m3jax.errors import M3Error
from m3jax.progress import Progress
from m3jax.recipe import Recipe, load_recipe
from m3jax.recipe.settings import nearest
from m3jax.streaming.aligning import notes_on_numbers
from m3jax.streaming.jobs import MergeJob
from m3jax.streaming.opening import OpenedModel, open_models
from m3jax.streaming.plan import TensorPlan, make_plan
from m3jax.streaming.reading import ChunkReader, Loaded, Visit, checked_chunk_entries, default_chunk_entries, visits
from m3jax.streaming.steps import with_steps

By: TypeAlias = Literal["layer", "module", "tensor"]

CHANGEABLE = ("anatomy", "exclude", "only", "tokenizer", "tokenizer_source")
"""The keys of recipes that say how models are seen, and which of their tensors."""

_AT_ONCE = 4 * SEGMENT  # entries: their float64 stays in a near cache
_THREADS = min(os.cpu_count() or 1, 8)
_OUTSIDE = {-1: "before layers", None: "outside layers"}
_AFTER = 2**31  # orders what follows the layers behind all of them


class Sums(NamedTuple):
    """What was counted and added up over entries; the same over several tensors is `added`.

    Attributes:
        entries: All that were compared.
        equal: Those of equal value in A and B; a NaN equals a NaN, and 0 equals −0.
        measured: Floating-point entries that are finite in all models; what follows is over these.
        nonfinite: Floating-point entries that are not.
        signed: Entries of δA and δB that are zero in neither.
        same_sign: Those of them whose signs are equal.
        square_a: Σ δA².
        square_b: Σ δB².
        product: Σ δA·δB.
        distance: Σ (A − B)².
        along: Σ (M − B)·(A − B).
        merge: Σ (M − B)².
        base: Σ P².
    """

    entries: int = 0
    equal: int = 0
    measured: int = 0
    nonfinite: int = 0
    signed: int = 0
    same_sign: int = 0
    square_a: float = 0.0
    square_b: float = 0.0
    product: float = 0.0
    distance: float = 0.0
    along: float = 0.0
    merge: float = 0.0
    base: float = 0.0


def added(parts: Sequence[Sums]) -> Sums:
    """The sums over several tensors, whatever their order."""
    columns = zip(*parts, strict=True) if parts else ([] for _ in Sums._fields)
    kinds = Sums.__annotations__.values()
    return Sums._make(
        sum(column) if kind is int else math.fsum(column) for kind, column in zip(kinds, columns, strict=True)
    )


class Measures(NamedTuple):
    """How entries of A and B differ; None where it is not defined.

    Attributes:
        entries: How many were compared.
        equal: How many of them are equal.
        equal_share: The same as a share.
        nonfinite: How many are not finite in all models, and left out of the rest.
        delta_a: ‖δA‖ = ‖A − P‖; with a base only, as the next three.
        relative_a: ‖δA‖ / ‖P‖.
        delta_b: ‖δB‖.
        relative_b: ‖δB‖ / ‖P‖.
        distance: ‖A − B‖.
        relative: ‖A − B‖ / ‖P‖, or ‖A − B‖ / ‖A‖ without a base.
        cosine: δA·δB / (‖δA‖‖δB‖); without a base of A and B.
        sign_agreement: The share of equal signs where neither δA nor δB is zero; without a base of A and B.
        lambda_: The λ for which λA + (1−λ)B is nearest to the merge M: (M−B)·(A−B) / ‖A−B‖².
        explained: 1 − ‖M − (λA + (1−λ)B)‖² / max(‖M−A‖², ‖M−B‖²).
    """

    entries: int
    equal: int
    equal_share: float | None
    nonfinite: int
    delta_a: float | None
    relative_a: float | None
    delta_b: float | None
    relative_b: float | None
    distance: float | None
    relative: float | None
    cosine: float | None
    sign_agreement: float | None
    lambda_: float | None
    explained: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {name.rstrip("_"): value for name, value in self._asdict().items()}


def measures_of(found: Sums, based: bool, merged: bool) -> Measures:
    """What sums say.

    Args:
        found: Over some entries.
        based: Whether there is a base.
        merged: Whether there is a merge.
    """
    there = found.measured > 0
    reference = math.sqrt(found.base if based else found.square_a)
    lengths = math.sqrt(found.square_a) * math.sqrt(found.square_b)
    one_root = math.sqrt(found.square_a * found.square_b) or lengths  # equal vectors have a cosine of exactly 1

    def root(square: float, asked: bool = True) -> float | None:
        return math.sqrt(square) if asked and there else None

    def relative(square: float, asked: bool = True) -> float | None:
        return math.sqrt(square) / reference if asked and reference else None

    ratio = found.along / found.distance if merged and found.distance else None
    explained = None
    if ratio is not None:
        rest = max(found.merge - found.along * ratio, 0.0)
        farther = max(found.merge, found.merge - 2 * found.along + found.distance)
        explained = max(1.0 - rest / farther, 0.0)
    return Measures(
        entries=found.entries,
        equal=found.equal,
        equal_share=found.equal / found.entries if found.entries else None,
        nonfinite=found.nonfinite,
        delta_a=root(found.square_a, based),
        relative_a=relative(found.square_a, based),
        delta_b=root(found.square_b, based),
        relative_b=relative(found.square_b, based),
        distance=root(found.distance),
        relative=relative(found.distance),
        cosine=max(-1.0, min(1.0, found.product / one_root)) if one_root else None,
        sign_agreement=found.same_sign / found.signed if found.signed else None,
        lambda_=ratio,
        explained=explained,
    )


class TensorSums(NamedTuple):
    """One tensor, of a block if it is in one.

    Attributes:
        name: What it is called; the block's own where it is stored with others.
        tower: The tower that it is of; None if it is of none.
        layer: Its block; −1 before the blocks, more than any block behind them, None where it is of no tower.
        role: What it does.
        sums: What was found.
    """

    name: str
    tower: str | None
    layer: int | None
    role: Role
    sums: Sums


class MeasuredGroup(NamedTuple):
    """Tensors that are told together.

    Attributes:
        name: What they are called.
        tower: Theirs; None where they are of several or of none.
        layer: The number of their block; None outside blocks, and where they are of several.
        module: What they do; None where they do several things.
        tensors: How many there are.
        measures: What was found.
    """

    name: str
    tower: str | None
    layer: int | None
    module: Role | None
    tensors: int
    measures: Measures

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**self._asdict(), "measures": self.measures.to_json()}


class Differences(NamedTuple):
    """What differs between two models.

    Attributes:
        a: The first model.
        b: The second.
        base: What task vectors are differences from.
        merge: The model that is held against the line through both.
        identical: Whether all that was compared is equal bit for bit.
        tensors: Each that was compared; none where both are identical and nothing else is asked for.
        compared: How many were compared.
        entries: How many entries they have.
        left_out: Tensors that are not compared, with the reason.
        notes: What a reader should know of how the models are seen.
    """

    a: str
    b: str
    base: str | None
    merge: str | None
    identical: bool
    tensors: tuple[TensorSums, ...]
    compared: int
    entries: int
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> Measures:
        """All tensors as if they were one."""
        return self._measures([tensor.sums for tensor in self.tensors])

    def _measures(self, parts: Sequence[Sums]) -> Measures:
        return measures_of(added(parts), self.base is not None, self.merge is not None)

    def lines(self, by: By) -> tuple[MeasuredGroup, ...]:
        """The tensors together by layer or by module, or each by itself."""
        return self._lines({"layer": _by_layer, "module": _by_role, "tensor": _by_itself}[by])

    def cells(self) -> tuple[MeasuredGroup, ...]:
        """The tensors together by layer and module."""
        return self._lines(lambda tensor: (*_by_layer(tensor), tensor.role))

    def _lines(self, key: Callable[[TensorSums], tuple[Any, ...]]) -> tuple[MeasuredGroup, ...]:
        several = len({tensor.tower for tensor in self.tensors}) > 1
        groups: dict[tuple[Any, ...], list[TensorSums]] = {}
        for tensor in sorted(self.tensors, key=_order):
            groups.setdefault(key(tensor), []).append(tensor)
        return tuple(self._line(found, several, key) for found in groups.values())

    def _line(self, found: Sequence[TensorSums], several: bool, key: Callable[..., Any]) -> MeasuredGroup:
        first = found[0]
        layers, roles, towers = ({t.layer for t in found}, {t.role for t in found}, {t.tower for t in found})
        layer = layers.pop() if len(layers) == 1 else None
        role = roles.pop() if len(roles) == 1 else None
        tower = towers.pop() if len(towers) == 1 else None
        words = [tower] if several and tower is not None else []
        if key is _by_itself:
            words = [first.name]
        elif key is _by_role:
            words.append(first.role)
        else:
            words.append(layer_name(first.layer))
        number = layer if layer is not None and 0 <= layer < _AFTER else None
        measured = self._measures([tensor.sums for tensor in found])
        return MeasuredGroup(" ".join(words), tower, number, role, len(found), measured)

    def to_json(self, by: By = "layer") -> dict[str, Any]:
        """As plain data; see docs/diff.md."""
        return {
            "a": self.a,
            "b": self.b,
            "base": self.base,
            "merge": self.merge,
            "identical": self.identical,
            "tensors": self.compared,
            "entries": self.entries,
            "total": self.total.to_json() if self.tensors else None,
            "by": by,
            "rows": [line.to_json() for line in self.lines(by)],
            "cells": [line.to_json() for line in self.cells()],
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


def layer_name(layer: int | None) -> str:
    """What people call a layer, or what is outside of them."""
    if layer is None or layer < 0:
        return _OUTSIDE[layer]
    return "after layers" if layer == _AFTER else f"layer {layer}"


def _by_layer(tensor: TensorSums) -> tuple[Any, ...]:
    return tensor.tower, tensor.layer


def _by_role(tensor: TensorSums) -> tuple[Any, ...]:
    return tensor.tower, tensor.role


def _by_itself(tensor: TensorSums) -> tuple[Any, ...]:
    return (tensor.name,)


def _order(tensor: TensorSums) -> tuple[Any, ...]:
    layer = -1 if tensor.layer is None else tensor.layer
    return tensor.tower is None, tensor.tower or "", layer, ROLES.index(tensor.role)


# --- What is compared --------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor to compare, and what it is."""

    plan: TensorPlan
    tower: str | None
    layer: int | None
    role: Role


class _Compared(NamedTuple):
    """The models as they are compared: blocks one by one.

    Attributes:
        checkpoints: A, B, the merge if there is one, the base if there is one.
        tensors: What all have.
        left_out: What is not compared, with the reason.
        notes: What a reader should know.
    """

    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[_Tensor, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def _recipe(
    a: str, b: str, base: str | None, merge: str | None, changes: Sequence[str]
) -> tuple[Recipe, tuple[str, ...]]:
    """A merge that reads these models, whose views and refusals are those of the comparison."""
    for change in changes:
        key = change.partition("=")[0].partition(".")[0].strip()
        if key not in CHANGEABLE:
            raise M3Error(f"--set {change}: only {', '.join(CHANGEABLE)} matter here; {nearest(key, CHANGEABLE)}")
    experts = [model for model in (a, b, merge) if model is not None]
    if base in experts:
        raise M3Error(f"{base}: is the base, and one of the models compared with it: leave --base out")
    asked: dict[str, Any] = {"merge_method": "linear", "models": experts, "dequantize": True}
    if base is not None:
        asked |= {"merge_method": "task_arithmetic", "base_model": base}
    recipe, notes = with_steps(load_recipe(asked, changes))
    if len(recipe.experts) != len(experts):
        several = next(model for model in experts if model not in {entry.model for entry in recipe.experts})
        raise M3Error(f"{several}: is several steps of a run, and one model is compared: name one step of it")
    return recipe, notes


def _opened(recipe: Recipe, notes: tuple[str, ...], stack: ExitStack) -> _Compared:
    job = MergeJob(recipe, Path(), False, 0, None, None, True, None)
    opened = open_models(job, stack)
    models = opened.models
    base = models[-1].input if models[-1].role != "expert" else None
    plan = make_plan(recipe, [model.input for model in models if model.role == "expert"], base)
    configs = [(source.input.name, read_config(source.place.path)) for source in opened.sources]
    notes += tuple(note.partition("; their weights are merged")[0] for note in notes_on_configurations(configs))
    notes += tuple(model.note for model in models if model.note is not None)
    if opened.vocabulary is None:
        notes += tuple(
            note.replace("are merged", "are compared") for note in notes_on_numbers(models, recipe, job.scheme)
        )
    else:
        notes += opened.vocabulary.united.notes
    anatomy = models[0].input.anatomy
    kept = [tensor for tensor in plan.tensors if len(tensor.sources) > 1 and not _is_copy(tensor, anatomy)]
    views = tuple(_unstacked(model, kept) for model in models)
    tensors = tuple(found for tensor in kept for found in _tensors(tensor, anatomy, views))
    compared = {tensor.output.name for tensor in kept}
    reasons = {tensor.output.name: tensor.why for tensor in plan.tensors}
    return _Compared(views, tensors, tuple(_left_out(models, compared, reasons)), notes)


def _is_copy(tensor: TensorPlan, anatomy: Anatomy) -> bool:
    """Whether a tensor is another name of one that counts already."""
    return anatomy.parts[tensor.output.name].alias_of is not None


def _left_out(
    models: Sequence[OpenedModel], compared: set[str], reasons: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """What is not compared, and why."""
    told = set(compared)
    for model in models:
        anatomy = model.input.anatomy
        for name, part in anatomy.parts.items():
            if name in told:
                continue
            told.add(name)
            if part.kind not in MODEL_KINDS:
                yield name, f"training state ({part.kind})"
            elif part.alias_of is not None or (name == anatomy.head and anatomy.ties_embeddings):
                yield name, f"one tensor with {part.alias_of or anatomy.embedding}"
            else:
                yield name, reasons.get(name) or f"{part.kind}, not in all models"


def _unstacked(model: OpenedModel, kept: Sequence[TensorPlan]) -> Checkpoint:
    """A model's tensors with each block by itself."""
    seen: dict[str, Stacking] = {}
    for tensor in kept:
        name = tensor.output.name
        if tensor.axis is None:
            seen[name] = Stacking((BlockPlace(name),))
        else:
            own = (block.name for block in tensor.blocks)
            seen |= {each: Stacking((BlockPlace(name, tensor.axis, at),)) for at, each in enumerate(own)}
    return restacked(model.checkpoint, seen)


def _tensors(tensor: TensorPlan, anatomy: Anatomy, views: Sequence[Checkpoint]) -> Iterator[_Tensor]:
    """A tensor, or the blocks that it stacks."""
    name = tensor.output.name
    part = anatomy.parts[name]
    lost = not anatomy.towers or (part.tower is None and len(anatomy.towers) > 1)
    outside = None if lost else -1 if part.position <= 0.0 else _AFTER
    stacked = (
        zip([block.name for block in tensor.blocks], part.blocks, strict=True) if tensor.axis is not None else None
    )
    tower = part.tower or (next(iter(anatomy.towers)) if len(anatomy.towers) == 1 else None)
    for own, block in stacked or [(name, part.block)]:
        plan = TensorPlan(views[0].tensors[own], tuple(range(len(views))), tensor.pipeline)
        yield _Tensor(plan, tower, outside if block is None else block, role_of(anatomy, name, own))


# --- What is measured --------------------------------------------------------------------------------------------

_Entries: TypeAlias = tuple[npt.NDArray[Any], ...]


class _Found(NamedTuple):
    """What was found of some segments.

    Attributes:
        counts: int64[4]: entries that are equal, that are not finite, that are signed, that agree.
        products: float64[rows, products]: Σ δA², δB², δA·δB, (A−B)², then (M−B)·(A−B), (M−B)², then P².
    """

    counts: npt.NDArray[np.int64]
    products: Floats


def _widened(entries: npt.NDArray[Any]) -> Floats:
    """Entries as float64, in rows of a segment; no value is changed."""
    if entries.dtype == DTYPES["BF16"]:
        entries = (entries.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return entries.astype(np.float64).reshape(-1, SEGMENT)


@np.errstate(over="ignore", invalid="ignore")  # of entries that are not finite, which are looked at
def _measure(arrays: _Entries, size: int, based: bool, merged: bool) -> _Found:
    """What is found of whole segments, in which entries from `size` on count for nothing."""
    values = [_widened(array) for array in arrays]
    beyond = values[0].size - size
    for each in values:
        each.reshape(-1)[size:] = 0.0
    a, b = values[:2]
    equal = int(np.count_nonzero(a == b)) - beyond
    nonfinite = 0
    if not all(np.isfinite(segments.largest(each)).all() for each in values):
        equal += int(np.count_nonzero(np.isnan(a) & np.isnan(b)))
        finite = functools.reduce(np.logical_and, map(np.isfinite, values))
        nonfinite = finite.size - int(np.count_nonzero(finite))
        a, b, *others = (np.where(finite, each, 0.0) for each in values)
        values = [a, b, *others]
    apart = a - b
    delta_a, delta_b = (a - values[-1], b - values[-1]) if based else (a, b)
    pairs = [(delta_a, delta_a), (delta_b, delta_b), (delta_a, delta_b), (apart, apart)]
    if merged:
        beyond_b = values[2] - b
        pairs += [(beyond_b, apart), (beyond_b, beyond_b)]
    if based:
        pairs.append((values[-1], values[-1]))
    room = np.empty_like(a)
    found, counts = np.empty((len(a), len(pairs))), np.array([equal, nonfinite, 0, 0], np.int64)
    for number, (x, y) in enumerate(pairs):
        np.multiply(x, y, out=room)
        if x is delta_a and y is delta_b:
            counts[2:] = np.count_nonzero(room), np.count_nonzero(room > 0)  # no product of float32 vanishes in float64
        found[:, number] = segments.sums_of(room)
    return _Found(counts, found)


def _pieces(loaded: Loaded) -> Iterator[tuple[_Entries, int]]:
    """The segments of a chunk that are measured at once, and how many of their entries count."""
    for start in range(0, loaded.visit.size, _AT_ONCE):
        stop = min(start + _AT_ONCE, loaded.visit.padded)
        yield tuple(array[start:stop] for array in loaded.arrays), min(loaded.visit.size - start, stop - start)


def _sums(info: TensorInfo, found: Sequence[_Found], based: bool, merged: bool) -> Sums:
    """All that was found of a tensor together."""
    equal, nonfinite, signed, same_sign = np.sum([each.counts for each in found], axis=0).tolist()
    columns = np.concatenate([each.products for each in found]).T
    square_a, square_b, product, distance, *rest = (math.fsum(column.tolist()) for column in columns)
    along, merge = (rest.pop(0), rest.pop(0)) if merged else (0.0, 0.0)
    base = rest.pop(0) if based else 0.0
    counted = info.size, equal, info.size - nonfinite, nonfinite, signed, same_sign
    return Sums(*counted, square_a, square_b, product, distance, along, merge, base)


def _equal_entries(loaded: Loaded) -> int:
    """How many entries of A and B have the same bytes, of a tensor that is no floating-point one."""
    one, other = (array[: loaded.visit.size].reshape(-1, 1).view(np.uint8) for array in loaded.arrays[:2])
    return int(np.count_nonzero((one == other).all(axis=1)))


def _measured(
    compared: _Compared,
    based: bool,
    merged: bool,
    chunk_entries: int,
    progress: Callable[[Progress], None] | None,
) -> Iterator[TensorSums]:
    """The sums of each tensor, in one reading of all models."""
    checkpoints = dict(enumerate(compared.checkpoints))
    schedule = [each for t in compared.tensors for each in visits("compare", t.plan, chunk_entries, False)]
    total, done = sum(_bytes_of(compared, visit) for visit in schedule), 0
    tensors = {tensor.plan.output.name: tensor for tensor in compared.tensors}
    found: list[_Found] = []
    equal = 0
    reader = ChunkReader(checkpoints, schedule, lambda *_: None, allow_nonfinite=True)
    with reader, ThreadPoolExecutor(_THREADS) as threads:
        for loaded in reader:
            visit, info = loaded.visit, loaded.visit.plan.output
            if visit.plan.pipeline is None:
                equal += _equal_entries(loaded)
            else:
                work = [threads.submit(_measure, *piece, based, merged) for piece in _pieces(loaded)]
                found += [each.result() for each in work]
            reader.release(loaded)
            done += _bytes_of(compared, visit)
            if progress is not None:
                progress(Progress("comparing", done, total))
            if visit.last:
                own = _sums(info, found, based, merged) if found else Sums(entries=info.size, equal=equal)
                tensor, found, equal = tensors[info.name], [], 0
                yield TensorSums(info.name, tensor.tower, tensor.layer, tensor.role, own)


def _bytes_of(compared: _Compared, visit: Visit) -> int:
    infos = (checkpoint.tensors[visit.plan.output.name] for checkpoint in compared.checkpoints)
    return visit.size * sum(DTYPES[info.dtype].itemsize for info in infos)


def _are_identical(compared: _Compared, progress: Callable[[Progress], None] | None) -> bool:
    """Whether A and B are equal bit for bit; ends at the first tensor that is not."""
    one, other = compared.checkpoints[:2]
    names = [tensor.plan.output.name for tensor in compared.tensors]
    if any(one.tensors[name] != other.tensors[name] for name in names):
        return False
    total, done = 2 * sum(one.tensors[name].nbytes for name in names), 0
    for name in sorted(names, key=lambda name: one.tensors[name].nbytes):  # where something differs, little is read
        if digest_tensor(one, name) != digest_tensor(other, name):
            return False
        done += 2 * one.tensors[name].nbytes
        if progress is not None:
            progress(Progress("comparing digests", done, total))
    return True


def diff(
    a: str,
    b: str,
    *,
    base: str | None = None,
    merge: str | None = None,
    changes: Sequence[str] = (),
    chunk_entries: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Differences:
    """What differs between two models: norms, cosine, signs, equal entries; and the λ of a merge of both.

    The models may be all that a merge reads, in different formats, layouts and namings; memory does not grow with
    them, and what is found depends on no chunk.

    Args:
        a: A model directory, weight file, run or step of one, hub id, or `model+adapter`.
        b: Another one.
        base: What both were trained from, so that their task vectors are compared.
        merge: A merge of both, of which λ is found.
        changes: How models are seen, as a recipe says it: "tokenizer_source=union".
        chunk_entries: Entries of the largest chunk, a power of two of at least 65,536.
        progress: Told, after every chunk, how many bytes were read.
        tell: Told at once if both models are identical.

    Raises:
        M3Error: A model is not there or damaged, or they are not of one architecture; which tensor, and the mend.

    Example:
        >>> diff("model", "tuned", base="base").total.cosine  # doctest: +SKIP
    """
    recipe, notes = _recipe(a, b, base, merge, changes)
    with ExitStack() as stack:
        compared = _opened(recipe, notes, stack)
        before = [each.fingerprint() for each in compared.checkpoints]
        identical = _are_identical(compared, progress)
        if identical and tell is not None:
            tell(f"{a} and {b} are the same, bit for bit")
        tensors: tuple[TensorSums, ...] = ()
        if not (identical and base is None and merge is None):
            entries = _chunk_entries(compared) if chunk_entries is None else checked_chunk_entries(chunk_entries)
            tensors = tuple(_measured(compared, base is not None, merge is not None, entries, progress))
        for each, seen in zip(compared.checkpoints, before, strict=True):
            check_unchanged(each, seen, "compared: compare")
        size = sum(tensor.plan.output.size for tensor in compared.tensors)
        told = len(compared.tensors), size, compared.left_out, compared.notes
    return Differences(a, b, base, merge, identical, tensors, *told)


def _chunk_entries(compared: _Compared) -> int:
    infos = [checkpoint.tensors[t.plan.output.name] for t in compared.tensors for checkpoint in compared.checkpoints]
    width = max((DTYPES[info.dtype].itemsize for info in infos if info.dtype in ("F32", "BF16", "F16")), default=2)
    return default_chunk_entries(len(compared.checkpoints), width)


def read_by(text: str) -> By:
    """What differences are told by.

    Raises:
        M3Error: It is none of the three.
    """
    for known in get_args(By):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise M3Error(f"--by {text}: differences are told by {', '.join(get_args(By))}; choose one of them")
