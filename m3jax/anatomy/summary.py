"""An anatomy as plain rows, to be printed or written as JSON."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from m3jax.anatomy.types import KINDS, Anatomy
from m3jax.checkpoints.protocol import TensorInfo


class TowerRow(NamedTuple):
    """One tower, or all tensors that are of none.

    Attributes:
        name: The tower's name; None for what is of no tower.
        depth: How many blocks it has.
        stacked: Whether leaves stack its blocks.
        tensors: How many tensors are of it.
        entries: How many entries they have, by kind; only kinds that there are.
    """

    name: str | None
    depth: int
    stacked: bool
    tensors: int
    entries: Mapping[str, int]


class AnatomySummary(NamedTuple):
    """What is said of a checkpoint's anatomy.

    Attributes:
        family: The architecture or layout.
        quantisation: The scheme of quantised weights.
        ties_embeddings: Whether the output embedding is the input embedding.
        towers: Rows of the towers, then of what is of none.
        kinds: How many tensors and entries are of each kind.
        aliases: Stored copies and their originals.
        vocabulary: Tensors with an axis of tokens, and the axis.
        notes: What was assumed, what disagrees and what cannot be told.
    """

    family: str | None
    quantisation: str | None
    ties_embeddings: bool | None
    towers: tuple[TowerRow, ...]
    kinds: Mapping[str, tuple[int, int]]
    aliases: Mapping[str, str]
    vocabulary: Mapping[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "family": self.family,
            "quantisation": self.quantisation,
            "ties_embeddings": self.ties_embeddings,
            "towers": [{**row._asdict(), "entries": dict(row.entries)} for row in self.towers],
            "kinds": {kind: {"tensors": count, "entries": size} for kind, (count, size) in self.kinds.items()},
            "aliases": dict(self.aliases),
            "vocabulary": dict(self.vocabulary),
            "notes": list(self.notes),
        }


def summarise(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> AnatomySummary:
    """Adds up an anatomy.

    Args:
        anatomy: The anatomy.
        tensors: The tensors it was made from.

    Example:
        >>> from m3jax.anatomy import anatomy_of
        >>> tensors = {name: TensorInfo(name, (8, 4), "F32") for name in ("h.0.w.weight", "h.1.w.weight")}
        >>> summarise(anatomy_of(tensors), tensors).towers
        (TowerRow(name='model', depth=2, stacked=False, tensors=2, entries={'parameter': 64}),)
    """
    counts: dict[str | None, int] = {}
    sizes: dict[str | None, dict[str, int]] = {}
    kinds: dict[str, tuple[int, int]] = {}
    for name, part in anatomy.parts.items():
        size = tensors[name].size
        count, total = kinds.get(part.kind, (0, 0))
        kinds[part.kind] = (count + 1, total + size)
        counts[part.tower] = counts.get(part.tower, 0) + 1
        own = sizes.setdefault(part.tower, {})
        own[part.kind] = own.get(part.kind, 0) + size
    rows = [
        TowerRow(tower.name, tower.depth, tower.stacked, counts.get(tower.name, 0), sizes.get(tower.name, {}))
        for tower in anatomy.towers.values()
    ]
    if None in counts:
        rows.append(TowerRow(None, 0, False, counts[None], sizes[None]))
    return AnatomySummary(
        family=anatomy.family,
        quantisation=anatomy.quantisation,
        ties_embeddings=anatomy.ties_embeddings,
        towers=tuple(rows),
        kinds={kind: kinds[kind] for kind in KINDS if kind in kinds},
        aliases={name: part.alias_of for name, part in anatomy.parts.items() if part.alias_of is not None},
        vocabulary={n: part.vocabulary_axis for n, part in anatomy.parts.items() if part.vocabulary_axis is not None},
        notes=anatomy.notes,
    )
