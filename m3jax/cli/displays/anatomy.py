"""What `m3jax inspect --anatomy` says."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3jax.text import count_text, safe_text, table

if TYPE_CHECKING:
    from m3jax.anatomy import AnatomySummary


def anatomy_lines(found: "AnatomySummary", width: int | None = None) -> Iterator[str]:
    """Towers and their blocks, kinds of tensors, tensors that are one, axes of tokens, and what cannot be told."""
    yield safe_text(found.family or "no known family")
    if found.quantisation:
        yield f"weights are quantised: {found.quantisation}"
    yield ""
    rows = [
        [
            safe_text(row.name or "outside towers"),
            f"{row.depth:,}" if row.depth else "",
            "stacked" if row.stacked else "",
            f"{row.tensors:,}",
            f"{row.entries.get('parameter', 0):,}",
        ]
        for row in found.towers
    ]
    yield from table(["tower", "blocks", "stored", "tensors", "parameters"], rows, width, left=1)
    yield ""
    kinds = [[kind, f"{count:,}", f"{entries:,}"] for kind, (count, entries) in found.kinds.items()]
    yield from table(["kind", "tensors", "entries"], kinds, width, left=1)
    if found.aliases or found.vocabulary:
        yield ""
    for name, original in found.aliases.items():
        yield f"{safe_text(name)} is {safe_text(original)}"
    for name, axis in found.vocabulary.items():
        yield f"{safe_text(name)}: axis {axis} is of tokens"
    if found.ties_embeddings and not found.aliases:
        yield "the output embedding is the input embedding"
    if found.notes:
        yield ""
        yield f"{count_text(len(found.notes), 'note')}:"
        yield from map(safe_text, found.notes)
