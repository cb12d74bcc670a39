"""What `m3jax diff` says."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3jax.text import Row, count_text, number_text, safe_text, share_text, table

if TYPE_CHECKING:  # JAX takes longer to import than --help may take
    from m3jax.streaming.differences import By, Differences, Measures

_SHOWN = 6
_PARTS = 10**9


def difference_lines(found: "Differences", by: "By", width: int | None = None) -> Iterator[str]:
    """How two models differ: a row for each layer, module or tensor, all together last."""
    named = [("a", found.a), ("b", found.b), ("base", found.base), ("merge", found.merge)]
    yield from (f"{role + ':':<7}{safe_text(name)}" for role, name in named if name is not None)
    if found.tensors:
        based, merged = found.base is not None, found.merge is not None
        rows = [[safe_text(line.name), *_cells(line.measures, based, merged)] for line in found.lines(by)]
        total = ["all", *_cells(found.total, based, merged)]
        yield ""
        yield from table([by, *_head(based, merged)], [*rows, total], width)
        yield from _meaning(based, merged)
    if found.left_out:
        yield ""
        yield f"{count_text(len(found.left_out), 'tensor')} not compared:"
        yield from (f"  {safe_text(name)} ({safe_text(why)})" for name, why in found.left_out[:_SHOWN])
        if len(found.left_out) > _SHOWN:
            yield f"  … and {len(found.left_out) - _SHOWN:,} more; --json has all"
    yield ""
    yield _verdict(found)


def _head(based: bool, merged: bool) -> Row:
    deltas = ["‖δa‖", "to base", "‖δb‖", "to base"] if based else []
    fitted = ["λ", "explained"] if merged else []
    return [*deltas, "‖a−b‖", "to base" if based else "to a", "cosine", "same sign", "equal", *fitted]


def _cells(told: "Measures", based: bool, merged: bool) -> Row:
    deltas = [told.delta_a, told.relative_a, told.delta_b, told.relative_b] if based else []
    cells = [number_text(value) for value in (*deltas, told.distance, told.relative)]
    cells.append("–" if told.cosine is None else f"{told.cosine:.6f}")
    cells += [_share(told.sign_agreement), share_text(told.equal, told.entries)]
    if merged:
        cells += ["–" if told.lambda_ is None else f"{told.lambda_:.6f}", _share(told.explained)]
    return cells


def _share(value: float | None) -> str:
    return "–" if value is None else share_text(int(value * _PARTS), _PARTS)


def _meaning(based: bool, merged: bool) -> Iterator[str]:
    """What the columns are of, where a reader could take it for something else."""
    yield ""
    compared = "δa = a − base and δb = b − base" if based else "a and b themselves, as there is no --base"
    yield f"cosine and same sign are of {compared}"
    if merged:
        yield "λ is that of λ·a + (1−λ)·b nearest to merge; explained is how much of merge that is"


def _verdict(found: "Differences") -> str:
    size = f"{count_text(found.compared, 'tensor')}, {found.entries:,} entries"
    if found.identical:
        return f"the same, bit for bit: {size}"
    changed = found.entries - found.total.equal
    if not changed:
        return f"the same values, in other bits: {size}"
    nonfinite = found.total.nonfinite
    left = f"; {nonfinite:,} that are not finite are left out of norms" if nonfinite else ""
    return f"different: {changed:,} of the {found.entries:,} entries of {count_text(found.compared, 'tensor')}{left}"
