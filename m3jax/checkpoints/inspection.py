"""What a checkpoint holds, and how two checkpoints differ: plain data, found with numpy alone.

Looking at one checkpoint reads headers only. Comparing two reads each weight once, in pieces, so that memory does
not grow with the models.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from m3jax import documents
from m3jax.checkpoints import DTYPES, Checkpoint, TensorInfo, locate_model, sketch_model
from m3jax.checkpoints.adapters import open_model
from m3jax.checkpoints.copying import pieces
from m3jax.checkpoints.locate import step_named
from m3jax.checkpoints.opening import recognise
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.errors import M3Error
from m3jax.progress import Progress
from m3jax.text import shape_text

_PIECE = 1 << 18  # entries read at a time
_BLOCK = 1 << 13  # entries measured at a time: their float64 stays in the nearest cache

Floats: TypeAlias = npt.NDArray[np.float64]


# --- One checkpoint --------------------------------------------------------------------------------------


class ModelFacts(NamedTuple):
    """What config.json says of a model; `None` where it says nothing.

    Attributes:
        model_type: The architecture's short name, such as `llama`.
        architectures: Class names, such as `LlamaForCausalLM`.
        layers: Number of transformer blocks.
        context: Longest sequence, in tokens.
        vocabulary: Number of tokens known.
    """

    model_type: str | None
    architectures: tuple[str, ...]
    layers: int | None
    context: int | None
    vocabulary: int | None


class WeightFile(NamedTuple):
    """A file that holds weights, with its size in bytes."""

    name: str
    bytes: int


class DtypeTotal(NamedTuple):
    """All tensors of one dtype, together."""

    dtype: str
    tensors: int
    entries: int
    bytes: int


class Overview(NamedTuple):
    """One checkpoint, seen without its values.

    Attributes:
        location: Where it is.
        revision: The hub's commit; `None` for a local path.
        format: The name of the format of its weights, such as `safetensors`.
        model: What config.json says; `None` where there is none that can be read.
        metadata: The texts that the weight files carry.
        files: The weight files.
        tensors: The tensors, or those that were asked for, in natural order.
        hidden: How many tensors were not asked for.
        dtypes: Totals of `tensors` for each dtype, the largest first.
        notes: Sentences on what could not be read beside the weights.
    """

    location: str
    revision: str | None
    format: str
    model: ModelFacts | None
    metadata: Mapping[str, str]
    files: tuple[WeightFile, ...]
    tensors: tuple[TensorInfo, ...]
    hidden: int
    dtypes: tuple[DtypeTotal, ...]
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """Number of parameters in `tensors`."""
        return sum(info.size for info in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes that `tensors` take."""
        return sum(info.nbytes for info in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "location": self.location,
            "revision": self.revision,
            "format": self.format,
            "model": self.model._asdict() if self.model else None,
            "metadata": dict(self.metadata),
            "files": [file._asdict() for file in self.files],
            "tensors": [{**info._asdict(), "entries": info.size, "bytes": info.nbytes} for info in self.tensors],
            "hidden": self.hidden,
            "dtypes": [total._asdict() for total in self.dtypes],
            "entries": self.entries,
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


def look_at(name: str, pattern: str | None = None) -> Overview:
    """Tells what a checkpoint holds, from headers and config.json.

    Args:
        name: A model directory, a weight file, a run or a step of one, or a hub id; or `model+adapter`.
        pattern: A regular expression; tensors in whose names it is found are wanted. `None` wants all.

    Returns:
        The overview.

    Raises:
        M3Error: There is no checkpoint of that name, or no tensor is wanted.
    """
    found = sketch_model(name)
    format = recognise(found.path)
    with open_model(found) as checkpoint:
        tensors = _select(checkpoint, pattern)
        if not tensors and checkpoint.tensors:
            raise _nothing_matches(pattern, checkpoint)
        files = tuple(WeightFile(path.name, path.stat().st_size) for path in checkpoint.files())
        model, notes = _read_facts(found.path)
        return Overview(
            location=step_named(name),
            revision=found.revision,
            format=format.name,
            model=model,
            metadata=checkpoint.metadata,
            files=files,
            tensors=tuple(tensors.values()),
            hidden=len(checkpoint.tensors) - len(tensors),
            dtypes=_totals(tensors.values()),
            notes=notes,
        )


def _select(checkpoint: Checkpoint, pattern: str | None) -> dict[str, TensorInfo]:
    """The tensors in whose names a regular expression is found."""
    try:
        wanted = documents.pattern(pattern or "")
    except ValueError as error:
        raise M3Error(f"{pattern!r} is no regular expression ({error}): mend it, as in 'layers\\.0\\.'.") from None
    return {name: info for name, info in checkpoint.tensors.items() if wanted.search(name)}


def _nothing_matches(pattern: str | None, checkpoint: Checkpoint) -> M3Error:
    """The sentence for a filter that leaves nothing."""
    like = next(iter(checkpoint.tensors), None)
    return M3Error(f"{pattern!r} is found in no tensor's name in {checkpoint.location}: names look like {like!r}.")


def _totals(tensors: Iterable[TensorInfo]) -> tuple[DtypeTotal, ...]:
    totals: dict[str, DtypeTotal] = {}
    for info in tensors:
        _, count, entries, size = totals.get(info.dtype, DtypeTotal(info.dtype, 0, 0, 0))
        totals[info.dtype] = DtypeTotal(info.dtype, count + 1, entries + info.size, size + info.nbytes)
    return tuple(sorted(totals.values(), key=lambda total: (-total.bytes, total.dtype)))


def _read_facts(path: Path) -> tuple[ModelFacts | None, tuple[str, ...]]:
    """What config.json says, and a note where it is damaged, which is no reason not to show the weights."""
    file = (path if is_dir(path) else path.parent) / "config.json"
    if not is_file(file):
        return None, ()
    try:
        config = documents.parse_json(read_file(file))
    except OSError:
        return None, ()
    except (ValueError, M3Error):
        config = None
    if not isinstance(config, dict):
        return None, ("config.json is damaged, so what it says of the model is not shown",)
    # Models of text and images keep the language model's settings in a part of their own.
    part = config.get("text_config")
    places = [config, part] if isinstance(part, dict) else [config]
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    model_type = config.get("model_type")
    facts = ModelFacts(
        model_type=model_type if isinstance(model_type, str) else None,
        architectures=tuple(name for name in named if isinstance(name, str)),
        layers=_count_in(places, "num_hidden_layers", "n_layer", "num_layers"),
        context=_count_in(places, "max_position_embeddings", "n_positions", "max_seq_len"),
        vocabulary=_count_in(places, "vocab_size"),
    )
    return facts, ()


def _count_in(places: Iterable[Mapping[str, object]], *keys: str) -> int | None:
    """The first whole number under one of several keys, which families of models name differently."""
    values = (place.get(key) for place in places for key in keys)
    return next((value for value in values if type(value) is int), None)


# --- Two checkpoints -------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How entries a differ from entries b: sums, which add up over pieces and tensors.

    Norms, products and signs are over the entries that are finite in both; tensors of integers count in `entries`
    and `equal` alone.

    Attributes:
        entries: Entries compared.
        equal: Entries of equal value; a NaN equals a NaN, and 0 equals −0.
        finite: Floating-point entries that are finite in both.
        nonfinite_a: NaNs and infinities in a.
        nonfinite_b: NaNs and infinities in b.
        squares_a: Σ a².
        squares_b: Σ b².
        squares: Σ (a − b)².
        products: Σ a·b.
        largest: max |a − b|.
        signed: Entries that are zero in neither.
        same_sign: Those of them whose signs are equal.
    """

    entries: int = 0
    equal: int = 0
    finite: int = 0
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    squares_a: float = 0.0
    squares_b: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    largest: float = 0.0
    signed: int = 0
    same_sign: int = 0

    @property
    def norm_a(self) -> float | None:
        """‖a‖₂; `None` where no entry is a finite floating-point number, as in the others."""
        return _number(math.sqrt(self.squares_a)) if self.finite else None

    @property
    def norm_b(self) -> float | None:
        """‖b‖₂."""
        return _number(math.sqrt(self.squares_b)) if self.finite else None

    @property
    def distance(self) -> float | None:
        """‖a − b‖₂."""
        return _number(math.sqrt(self.squares)) if self.finite else None

    @property
    def cosine(self) -> float | None:
        """a·b / (‖a‖‖b‖); `None` where a norm is zero."""
        # One root, so that equal tensors have a cosine of exactly 1.
        scale = math.sqrt(self.squares_a * self.squares_b)
        return max(-1.0, min(1.0, self.products / scale)) if scale and math.isfinite(scale) else None

    @property
    def max_difference(self) -> float | None:
        """max |a − b|."""
        return _number(self.largest) if self.finite else None

    @property
    def equal_share(self) -> float | None:
        """Share of entries whose values are equal; `None` where there are no entries."""
        return self.equal / self.entries if self.entries else None

    @property
    def sign_agreement(self) -> float | None:
        """Share of the entries that are zero in neither whose signs are equal; `None` where there are none."""
        return self.same_sign / self.signed if self.signed else None

    def to_json(self) -> dict[str, Any]:
        """What people ask for, as plain data for JSON."""
        return {
            "entries": self.entries,
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            "distance": self.distance,
            "cosine": self.cosine,
            "max_difference": self.max_difference,
            "equal": self.equal,
            "equal_share": self.equal_share,
            "sign_agreement": self.sign_agreement,
            "nonfinite_a": self.nonfinite_a,
            "nonfinite_b": self.nonfinite_b,
        }


def _number(value: float) -> float | None:
    """`value`, or `None` where float64 overflowed: JSON has no infinity."""
    return value if math.isfinite(value) else None


class TensorDifference(NamedTuple):
    """How a tensor that both checkpoints have differs."""

    name: str
    difference: Difference


class Mismatch(NamedTuple):
    """A tensor that is described differently: what a says, what b says."""

    name: str
    a: str
    b: str


class Comparison(NamedTuple):
    """Two checkpoints, compared tensor by tensor.

    Attributes:
        a: The first checkpoint's name.
        b: The second one's.
        tensors: Every tensor that could be compared, in natural order.
        total: All of them as if they were one.
        only_a: Names of tensors that b lacks.
        only_b: Names of tensors that a lacks.
        shapes: Tensors whose shapes differ; they are not compared.
        dtypes: Tensors whose dtypes differ; compared by value if both are floating-point, else not at all.
    """

    a: str
    b: str
    tensors: tuple[TensorDifference, ...]
    total: Difference
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[Mismatch, ...]
    dtypes: tuple[Mismatch, ...]

    @property
    def identical(self) -> bool:
        """Whether both have the same tensors with equal values."""
        others = (self.only_a, self.only_b, self.shapes, self.dtypes)
        return self.total.equal == self.total.entries and not any(others)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "identical": self.identical,
            "total": self.total.to_json(),
            "tensors": [{"name": name, **difference.to_json()} for name, difference in self.tensors],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": [mismatch._asdict() for mismatch in self.shapes],
            "dtypes": [mismatch._asdict() for mismatch in self.dtypes],
        }


def compare(
    a: str, b: str, pattern: str | None = None, progress: Callable[[Progress], None] | None = None
) -> Comparison:
    """Measures how two checkpoints differ.

    Args:
        a: A model directory, a weight file or a hub id.
        b: Another one.
        pattern: A regular expression; tensors in whose names it is found are compared. `None` compares all.
        progress: Told, after every piece, how many bytes of both were read.

    Returns:
        The comparison; its sums are in float64, over values widened without rounding.

    Raises:
        M3Error: One of them is no checkpoint or cannot be read, or no tensor is wanted.
    """
    with open_model(locate_model(a)) as first, open_model(locate_model(b)) as second:
        return _compare(a, b, first, second, pattern, progress or (lambda _: None))


def _compare(
    a: str,
    b: str,
    first: Checkpoint,
    second: Checkpoint,
    pattern: str | None,
    progress: Callable[[Progress], None],
) -> Comparison:
    ours, theirs = _select(first, pattern), _select(second, pattern)
    if not ours and not theirs and first.tensors:
        raise _nothing_matches(pattern, first)
    shared = [(info, theirs[name]) for name, info in ours.items() if name in theirs]
    comparable = [(x, y) for x, y in shared if _is_comparable(x, y)]
    total_bytes = sum(x.nbytes + y.nbytes for x, y in comparable)
    tensors, done = [], 0
    for x, y in comparable:
        difference = Difference()
        for size, piece in _pieces(first, second, x, y):
            difference = _joined(difference, piece)
            done += size
            progress(Progress("comparing", done, total_bytes))
        tensors.append(TensorDifference(x.name, difference))
    total = reduce(_joined, (difference for _, difference in tensors), Difference())
    return Comparison(
        a=a,
        b=b,
        tensors=tuple(tensors),
        total=total,
        only_a=tuple(name for name in ours if name not in theirs),
        only_b=tuple(name for name in theirs if name not in ours),
        shapes=tuple(
            Mismatch(x.name, shape_text(x.shape), shape_text(y.shape)) for x, y in shared if x.shape != y.shape
        ),
        dtypes=tuple(Mismatch(x.name, x.dtype, y.dtype) for x, y in shared if x.dtype != y.dtype),
    )


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def _is_comparable(x: TensorInfo, y: TensorInfo) -> bool:
    return x.shape == y.shape and (x.dtype == y.dtype or (_is_float(x.dtype) and _is_float(y.dtype)))


def _pieces(first: Checkpoint, second: Checkpoint, x: TensorInfo, y: TensorInfo) -> Iterator[tuple[int, Difference]]:
    """How a tensor differs, piece by piece, with the bytes that each piece took."""
    measure = _measure_floats if _is_float(x.dtype) else _measure_others
    for a, b in zip(_values(first, x), _values(second, y), strict=True):
        blocks = (slice(at, at + _BLOCK) for at in range(0, a.size, _BLOCK))
        yield a.nbytes + b.nbytes, reduce(_joined, (measure(a[block], b[block]) for block in blocks))


def _values(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[npt.NDArray[Any]]:
    """A tensor's entries in order, a piece at a time, each good until the next."""
    dtype = DTYPES[info.dtype]
    for _, piece in pieces(checkpoint, info.name, 0, info.nbytes, _PIECE * dtype.itemsize):
        yield np.frombuffer(piece, dtype)


def _measure_others(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Difference:
    """Integers, booleans and complex numbers: equal or not."""
    return Difference(entries=a.size, equal=int(np.count_nonzero(a == b)))


# Of the dtypes only float64 can overflow here; `_number` says so where it does.
@np.errstate(over="ignore", invalid="ignore")
def _measure_floats(raw_a: npt.NDArray[Any], raw_b: npt.NDArray[Any]) -> Difference:
    # Float64 holds every value of the narrower dtypes, so nothing is rounded.
    a, b = raw_a.astype(np.float64), raw_b.astype(np.float64)
    equal = int(np.count_nonzero(a == b))
    # A sum of squares is finite only if every entry is: the cheapest check there is.
    if math.isfinite(np.dot(a, a) + np.dot(b, b)):
        return _sums(a, b)._replace(entries=a.size, equal=equal)
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    finite = finite_a & finite_b
    return _sums(a[finite], b[finite])._replace(
        entries=a.size,
        equal=equal + int(np.count_nonzero(np.isnan(a) & np.isnan(b))),
        nonfinite_a=int(a.size - np.count_nonzero(finite_a)),
        nonfinite_b=int(b.size - np.count_nonzero(finite_b)),
    )


def _sums(a: Floats, b: Floats) -> Difference:
    """The sums over finite entries."""
    difference, product = a - b, a * b
    return Difference(
        finite=a.size,
        squares_a=float(np.dot(a, a)),
        squares_b=float(np.dot(b, b)),
        squares=float(np.dot(difference, difference)),
        products=float(np.dot(a, b)),
        largest=float(np.abs(difference).max(initial=0.0)),
        # Products of what was float32 or narrower are too large to vanish in float64, so their signs are right.
        signed=int(np.count_nonzero(product)),
        same_sign=int(np.count_nonzero(product > 0)),
    )


def _joined(x: Difference, y: Difference) -> Difference:
    """Two differences as one."""
    added = Difference._make(ours + theirs for ours, theirs in zip(x, y, strict=True))
    return added._replace(largest=max(x.largest, y.largest))
