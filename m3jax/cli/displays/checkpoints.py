"""What `m3jax inspect` says: one checkpoint, or how two of them differ."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3jax.text import Row, count_text, number_text, safe_text, shape_text, share_text, size_text, table

if TYPE_CHECKING:  # numpy takes longer to import than --help may take
    from m3jax.checkpoints.inspection import Comparison, Difference, Mismatch, ModelFacts, Overview


def overview_lines(overview: "Overview", width: int | None = None) -> Iterator[str]:
    """One checkpoint: what it is, every tensor, and totals last, where a long listing leaves the eye."""
    yield safe_text(overview.location) + (f" at {overview.revision}" if overview.revision else "")
    if overview.model:
        yield from _facts(overview.model)
    for key, text in overview.metadata.items():
        yield f"{safe_text(key)}: {safe_text(text)}"
    yield ""
    yield from table(
        ["tensor", "dtype", "shape", "entries", "bytes"],
        [
            [safe_text(info.name), info.dtype, shape_text(info.shape), f"{info.size:,}", size_text(info.nbytes)]
            for info in overview.tensors
        ],
        width,
        left=3,
        spare=3,  # the shape says it
    )
    yield ""
    totals = [[kind, f"{count:,}", f"{entries:,}", size_text(size)] for kind, count, entries, size in overview.dtypes]
    if len(totals) != 1:
        totals.append(["all", f"{len(overview.tensors):,}", f"{overview.entries:,}", size_text(overview.bytes)])
    yield from table(["dtype", "tensors", "parameters", "bytes"], totals)
    files = size_text(sum(file.bytes for file in overview.files))
    yield f"{count_text(len(overview.files), f'{overview.format} file')}, {files}"
    if overview.hidden:
        yield f"{count_text(overview.hidden, 'more tensor')} not matched by the filter"
    yield from (f"note: {safe_text(note)}" for note in overview.notes)


def _facts(model: "ModelFacts") -> Iterator[str]:
    known = [
        *([safe_text(model.model_type)] if model.model_type else []),
        *map(safe_text, model.architectures),
        *([count_text(model.layers, "layer")] if model.layers is not None else []),
        *([f"context {model.context:,}"] if model.context is not None else []),
        *([f"vocabulary {model.vocabulary:,}"] if model.vocabulary is not None else []),
    ]
    if known:
        yield ", ".join(known)


def comparison_lines(comparison: "Comparison", width: int | None = None) -> Iterator[str]:
    """Two checkpoints: every tensor, then all together, then what could not be compared."""
    yield f"a: {safe_text(comparison.a)}"
    yield f"b: {safe_text(comparison.b)}"
    yield ""
    if comparison.tensors:
        rows = [_difference_row(safe_text(name), difference) for name, difference in comparison.tensors]
        total = _difference_row(f"all {len(rows):,}", comparison.total)
        head = ["tensor", "‖a‖", "‖b‖", "‖a−b‖", "cosine", "max |a−b|", "equal", "same sign"]
        yield from table(head, [*rows, total], width)
    yield from _nonfinite(comparison)
    yield from _listed("only in a", map(safe_text, comparison.only_a))
    yield from _listed("only in b", map(safe_text, comparison.only_b))
    yield from _listed("shapes differ", map(_mismatch, comparison.shapes))
    yield from _listed("dtypes differ", map(_mismatch, comparison.dtypes))
    yield ""
    yield _verdict(comparison)


def _difference_row(name: str, difference: "Difference") -> Row:
    return [
        name,
        number_text(difference.norm_a),
        number_text(difference.norm_b),
        number_text(difference.distance),
        "–" if difference.cosine is None else f"{difference.cosine:.6f}",
        number_text(difference.max_difference),
        share_text(difference.equal, difference.entries),
        share_text(difference.same_sign, difference.signed),
    ]


def _nonfinite(comparison: "Comparison") -> Iterator[str]:
    """The tensors with NaNs and infinities, which the norms leave out."""
    found = [
        f"{safe_text(name)}: {difference.nonfinite_a:,} in a, {difference.nonfinite_b:,} in b"
        for name, difference in comparison.tensors
        if difference.nonfinite_a or difference.nonfinite_b
    ]
    yield from _listed("entries that are not finite, left out of the norms", iter(found))


def _mismatch(mismatch: "Mismatch") -> str:
    return f"{safe_text(mismatch.name)}: {mismatch.a} in a, {mismatch.b} in b"


def _listed(heading: str, lines: Iterator[str]) -> Iterator[str]:
    entries = list(lines)
    if entries:
        yield ""
        yield f"{heading} ({len(entries):,}):"
        yield from (f"  {entry}" for entry in entries)


def _verdict(comparison: "Comparison") -> str:
    total = comparison.total
    if comparison.identical:
        return f"the same: {total.entries:,} entries, all equal"
    if not comparison.tensors:
        return "different: no tensor can be compared"
    changed = total.entries - total.equal
    return f"different: {changed:,} of the {total.entries:,} entries compared"
