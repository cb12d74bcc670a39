"""What `m3jax merge` says of the merges of several seeds."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m3jax.cli.displays.exploration import weights_text
from m3jax.cli.displays.merges import estimate_lines, merge_json
from m3jax.cli.displays.recipes import explanation_lines
from m3jax.text import count_text, size_text, table

if TYPE_CHECKING:  # JAX takes longer to import than --help may take
    from m3jax.streaming.seeds import SeedMerge, SeedsEstimate, SeedsExplanation

_DIGITS = 16  # of a digest, by which people tell merges apart


def _drawn(weights: Mapping[str, Sequence[float]]) -> str:
    return weights_text({group: tuple(values) for group, values in weights.items()}) if weights else "as given"


def seeds_lines(made: "Sequence[SeedMerge]", width: int | None = None) -> Iterator[str]:
    """Finished merges, a row for each seed."""
    rows = [
        [
            str(one.directory),
            str(one.seed),
            _drawn(_recorded(one)),
            "kept" if one.kept else "merged",
            one.digest[:_DIGITS],
        ]
        for one in made
    ]
    yield from table(["directory", "seed", "weights", "is", "digest"], rows, width)
    yield ""
    yield f"replay   m3jax replay {shlex.quote(str(made[0].directory))} NEW_DIRECTORY, and the others likewise"


def _recorded(one: "SeedMerge") -> dict[str, list[float]]:
    weights = one.manifest.get("weights", {})
    return {group: [float(value) for value in told["decimal"]] for group, told in weights.items()}


def seeds_json(made: "Sequence[SeedMerge]") -> list[dict[str, Any]]:
    """Finished merges as plain data: what each says by itself, or where it is if it was kept."""
    return [{**_as_json(one), "seed": one.seed, "kept": one.kept} for one in made]


def _as_json(one: "SeedMerge") -> dict[str, Any]:
    if one.result is not None:
        return merge_json(one.result)
    place = one.directory
    weights = one.manifest.get("weights", {})
    return {"directory": str(place), "digest": one.digest, "manifest": str(place / "m3jax.json"), "weights": weights}


def seeds_estimate_lines(found: "SeedsEstimate", width: int | None = None) -> Iterator[str]:
    """What merges would take: one of them whole, then each, then all together."""
    yield from estimate_lines(found.first._replace(weights={}), width)
    yield ""
    rows = [
        [str(one.directory), str(one.seed), _drawn(one.weights), "is there" if one.finished else "to be made"]
        for one in found.seeds
    ]
    yield from table(["directory", "seed", "weights", "state"], rows, width)
    yield ""
    missing = sum(not one.finished for one in found.seeds)
    together = f"{size_text(found.bytes_written)} (free there: {size_text(found.disk_free)})"
    yield f"{count_text(missing, 'merge')} to be made, {together}; what is there is kept where it is the same merge"


def seeds_explanation_lines(found: "SeedsExplanation", width: int | None = None) -> Iterator[str]:
    """What merges would do: the first of them whole, then what each seed draws."""
    yield from explanation_lines(found.first, width)
    yield ""
    drawn = {seed: one.drawn for seed, one in found.each.items()}
    if not any(drawn.values()):
        yield f"{count_text(len(drawn), 'seed')}: weights are given, and each seed draws masks of its own"
        return
    if all(len(groups) == 1 for groups in drawn.values()):
        cells = {seed: [f"{weight:.6f}" for weight in next(iter(groups.values()))] for seed, groups in drawn.items()}
        count = len(next(iter(cells.values())))
        head = ["seed", *(str(number + 1) for number in range(count))]
        yield from table(head, [[str(seed), *values] for seed, values in cells.items()], width)
        return
    yield from table(["seed", "drawn"], [[str(seed), _drawn(groups)] for seed, groups in drawn.items()], width, left=2)
