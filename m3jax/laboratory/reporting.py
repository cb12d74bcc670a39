"""The laboratory's report: tables, pictures, and what follows for the paper's claims, said by rule from the numbers."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from m3jax.console import count_text, time_text
from m3jax.errors import M3Error
from m3jax.evaluation.records import make_directory, write_whole
from m3jax.laboratory import figures
from m3jax.laboratory.claims import HELD, IN_PART, SPREAD, UNDECIDED, Claim, Comparison
from m3jax.laboratory.experiments import DRAW, EQUAL, M3, METHODS, TUNED
from m3jax.laboratory.findings import Findings, find
from m3jax.laboratory.outcomes import Cell, Estimate, Group, Line

PICTURES: Mapping[str, Callable[[Sequence[Line], Path], bool]] = MappingProxyType(
    {"curves.png": figures.save_curves, "robustness.png": figures.save_bars, "alphas.png": figures.save_alphas}
)
FILES = ("report.md", "report.json", *PICTURES)

_ARMS = {EQUAL: "equal weights", TUNED: "best of a grid", DRAW: "one draw", M3: "best of M³'s draws"}
_TABLES = {
    "test": "Test accuracy, %",
    "shifted": "Accuracy out of distribution, %",
    "attacked": "Accuracy under adversaries, %",
    "pdr": "Performance drop rate (PDR)",
}
_NOUNS = {
    "test": "test accuracy",
    "shifted": "accuracy out of distribution",
    "attacked": "accuracy under adversaries",
    "pdr": "−PDR",
    SPREAD: "the standard deviation of λ",
}
_CAPTIONS = {
    "curves.png": "dev accuracy over λ",
    "robustness.png": "accuracy and drop rates",
    "alphas.png": "the shape of Beta, and the number of draws",
}
_SHARES = ("test", "shifted", "attacked")
_NAMED = 12  # missing experiments that are told by name


def write_report(
    lines: Iterable[Mapping[str, Any]], directory: Path, about: Mapping[str, Any], overwrite: bool = True
) -> None:
    """Writes `report.md`, `report.json` and the pictures that there is something to draw in.

    Args:
        lines: The ledger, whole or not.
        directory: Where; made if it is not there.
        about: How it was made: "command", "settings", "models", "machine", "seconds", as far as they are known.
        overwrite: Replace a report that is there.

    Raises:
        M3Error: The ledger holds no experiment, a report is there, or it cannot be written.
    """
    ledger = list(lines)
    found = find(ledger, about)
    there = [name for name in FILES if (directory / name).exists()]
    if there and not overwrite:
        raise M3Error(f"{directory / there[0]} is already there: give another directory")
    make_directory(directory)
    drawn = [name for name, save in PICTURES.items() if save(ledger, directory / name)]
    for name in PICTURES.keys() - set(drawn):
        (directory / name).unlink(missing_ok=True)  # of an earlier report
    write_whole(directory / "report.json", json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_whole(directory / "report.md", "\n".join(report_lines(found, drawn)) + "\n")


def report_lines(found: Findings, pictures: Sequence[str] = ()) -> Iterator[str]:
    """The report in Markdown.

    Args:
        found: What is reported.
        pictures: The files that were drawn.
    """
    yield from ("# Mixup Model Merge (M³) measured on small models", "")
    yield from table(["claim of the paper", "verdict"], ([f"{c.number}. {c.text}", _verdict(c)] for c in found.claims))
    yield from ("", "## How it was made", "")
    yield from _about_lines(found)
    yield from _missing_lines(found.missing)
    yield from ("", "## Base and experts", "")
    yield from _model_lines(found)
    for measure in _TABLES:
        yield from ("", f"## {_TABLES[measure]}", "")
        yield from _cell_lines(found.cells, measure, len(found.seeds))
    yield from ("", "## The shape of Beta", "")
    yield from _shape_lines(found)
    yield from ("", "## Cost", "")
    yield from _cost_lines(found)
    yield from ("", "## Pictures", "")
    for name in PICTURES:
        told = f"![{_CAPTIONS[name]}]({name})" if name in pictures else f"Nothing to draw: {_CAPTIONS[name]}."
        yield from (told, "")
    yield from ("## What follows for the paper's claims", "")
    yield from _claim_lines(found)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table.

    Args:
        header: Of its columns.
        rows: Their cells.
    """
    yield _row(header)
    yield "|" + "---|" * len(header)
    for row in rows:
        yield _row(row)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


# --- How it was made ----------------------------------------------------------------------------------------------


def _about_lines(found: Findings) -> Iterator[str]:
    about = found.about
    if about.get("command"):
        yield f"- command: `{about['command']}`"
    yield f"- seeds: {', '.join(map(str, found.seeds))}"
    for name in ("settings", "models", "machine"):
        if about.get(name):
            yield from _told_lines(name, about[name])
    if about.get("seconds") is not None:
        yield f"- time: {time_text(about['seconds'])}"


def _told_lines(name: str, value: Any, depth: int = 0) -> Iterator[str]:
    """One line, or where it holds more than words and numbers, one for each part."""
    if isinstance(value, Mapping) and any(isinstance(one, Mapping) for one in value.values()):
        yield f"{'  ' * depth}- {name}:"
        for part, one in value.items():
            yield from _told_lines(part, one, depth + 1)
    else:
        yield f"{'  ' * depth}- {name}: {_told(value)}"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return "/".join(map(_told, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _missing_lines(missing: Sequence[str]) -> Iterator[str]:
    if missing:
        yield from ("", "## What is missing", "")
        yield f"The ledger is not whole; what follows is of the rest. Not there: {count_text(len(missing), 'piece')}."
        yield ""
        yield from (f"- {name}" for name in missing[:_NAMED])
        if len(missing) > _NAMED:
            yield f"- and {len(missing) - _NAMED:,} more"


# --- Tables -------------------------------------------------------------------------------------------------------


def _model_lines(found: Findings) -> Iterator[str]:
    if not found.models:
        yield "Not measured."
        return
    seeds = len(found.seeds)
    yield "Accuracy in %, ± half the width of the 95 % interval over seeds (Student's t), as in all tables."
    yield ""
    yield from table(
        ["model", "skill", "test", "out of distribution", "under its adversary", "adversary"],
        (
            [one.model, one.skill, *(_entry(getattr(one, what), what, seeds) for what in _SHARES), one.adversary]
            for one in found.models
        ),
    )


def _cell_lines(cells: Sequence[Cell], measure: str, seeds: int) -> Iterator[str]:
    """A row for each group, method and DARE, a column for each arm."""
    if not cells:
        yield "Not measured."
        return
    values: dict[tuple[Group, str, bool | None], dict[str, Estimate | None]] = {}
    for cell in cells:
        values.setdefault((cell.group, cell.method, cell.dare), {})[cell.arm] = getattr(cell, measure)
    groups, methods = [key[0] for key in values], list(METHODS)
    order = sorted(values, key=lambda key: (len(key[0]), groups.index(key[0]), methods.index(key[1]), bool(key[2])))
    yield from table(
        ["experts", "method", "DARE", *_ARMS.values()],
        (
            [" + ".join(key[0]), key[1], "yes" if key[2] else "no"]
            + [_entry(values[key].get(arm), measure, seeds) for arm in _ARMS]
            for key in order
        ),
    )


def _entry(value: Estimate | None, measure: str, seeds: int) -> str:
    """A mean ± half its interval, and the number of seeds where they are fewer than elsewhere."""
    if value is None:
        return "–"
    scale, digits = (100, 1) if measure in _SHARES else (1, 3)
    half = "" if value.half is None else f" ± {scale * value.half:.{digits}f}"
    fewer = "" if value.seeds == seeds else f" ({count_text(value.seeds, 'seed')})"
    return f"{scale * value.mean:.{digits}f}{half}{fewer}"


def _shape_lines(found: Findings) -> Iterator[str]:
    seeds = len(found.seeds)
    if found.shapes:
        yield "Average merging of pairs without DARE; λ is the first expert's weight."
        yield ""
        yield from table(
            ["α", "draws", "test accuracy of the best, %", "standard deviation of λ", "that of Beta(α, α)"],
            (
                [
                    *(f"{one.alpha:g}", str(one.draws)),
                    *(_entry(one.test, "test", seeds), _entry(one.spread, SPREAD, seeds)),
                    f"{one.law:.3f}",
                ]
                for one in found.shapes
            ),
        )
        yield ""
    if found.depths:
        yield "Dev accuracy of the best of the first draws, over all merges; it cannot fall as draws are added:"
        yield ""
        yield from table(
            ["draws", "dev accuracy, %"],
            ([str(one.draws), _entry(one.dev, "test", seeds)] for one in found.depths),
        )
    if not found.shapes and not found.depths:
        yield "Not measured."


def _cost_lines(found: Findings) -> Iterator[str]:
    cost = found.cost
    if cost.merge is not None and cost.examination:
        share = cost.merge / cost.examination
        yield (
            f"- A merge in memory takes {1000 * cost.merge:,.1f} ms, {share:.2%} of one examination on dev examples, "
            f"which takes {1000 * cost.examination:,.1f} ms (medians)."
        )
    counts: dict[str, dict[int, list[int]]] = {}
    for arm, experts, count in cost.evaluations:
        counts.setdefault(arm, {}).setdefault(experts, []).append(count)
    for arm, by_experts in counts.items():
        told = ", ".join(
            f"{'/'.join(map(str, some))} for {experts} experts" for experts, some in sorted(by_experts.items())
        )
        yield f"- Examinations that a choice costs, {_ARMS.get(arm, arm)}: {told}."
    both, same = found.coinciding
    if both:
        yield (
            "- λ·A + (1 − λ)·B is task arithmetic with the weights (λ, 1 − λ) up to rounding, and so it is for more "
            "experts: the rows of average merging and task arithmetic should coincide but for equal weights, which are "
            f"1/n in one and 1 in the other. Here {same} of {both} such pairs of test scores are the same. Means over "
            "methods count these merges twice."
        )


# --- Claims -------------------------------------------------------------------------------------------------------


def _claim_lines(found: Findings) -> Iterator[str]:
    yield (
        "Each figure is a difference within one seed, whose arms share their examples, averaged over all merges that "
        "it is about, then over seeds, with its 95 % interval by Student's t. Where the interval is above 0, it held; "
        "below 0, the opposite was measured; else it is undecided. Of many such intervals about one in twenty misses. "
        "−PDR is the drop rate turned round: above 0, less is lost."
    )
    for claim in found.claims:
        yield from ("", f"### {claim.number}. {claim.text}: {claim.verdict}", "", _paragraph(claim))
        if claim.beside:
            yield from ("", "Beside that, and not counted:", "")
            yield from (f"- {_sentence(one)}" for one in claim.beside)
    yield from ("", "### How sure this is", "", _reach(found))


def _paragraph(claim: Claim) -> str:
    said = "Over all it is undecided." if claim.verdict == UNDECIDED else f"Over all it {_verdict(claim)}."
    return " ".join([*(_sentence(one) for one in claim.comparisons), said])


def _verdict(claim: Claim) -> str:
    """The verdict, and which comparisons held where not all did."""
    if claim.verdict != IN_PART:
        return claim.verdict
    same = len({one.measure for one in claim.comparisons}) == 1

    def names(held: bool) -> str:
        some = [one for one in claim.comparisons if (one.verdict == HELD) == held]
        return "; ".join(one.name if same else f"{one.name} ({_NOUNS[one.measure]})" for one in some)

    return f"{IN_PART}: {names(True)}. Not: {names(False)}"


def _sentence(one: Comparison) -> str:
    fair = " (at equal budget)" if one.fair else ""
    return f"{one.name[0].upper()}{one.name[1:]}{fair}: {_difference(one)}."


def _difference(one: Comparison) -> str:
    value = one.difference
    if value is None:
        return f"not measured, so {one.verdict}"
    scale, digits, unit = (100, 1, "points of") if one.measure in _SHARES else (1, 3, "in")
    of = f"{_signed(scale * value.mean, digits)} {unit} {_NOUNS[one.measure]}"
    if value.low is None or value.high is None:
        return f"{of} (one seed, so no interval): {one.verdict}"
    span = f"{_signed(scale * value.low, digits)} to {_signed(scale * value.high, digits)}"
    return f"{of} (95 % interval {span}, {count_text(value.seeds, 'seed')}): {one.verdict}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _reach(found: Findings) -> str:
    seeds = count_text(len(found.seeds), "seed")
    parameters = (found.about.get("models") or {}).get("parameters")
    size = f"models of {parameters:,} parameters" if isinstance(parameters, int) else "tiny models"
    return (
        f"All intervals are over {seeds}, which vary the examples, the draws and DARE's masks. The models were trained "
        f"once, so that nothing here says how it would be with others; and these are {size}, learning small skills, so "
        "that nothing here says how it is with large ones. Equal weights cost no examination and the others do: only "
        "comparisons at equal budget say what drawing does that choosing does not. In task arithmetic equal weights "
        "sum to the number of experts and drawn ones to 1, so that part of that difference is one of scale."
        + _uneven(found)
    )


def _uneven(found: Findings) -> str:
    """Where budgets differ: a grid of three or more experts does not have any number of points."""
    points = {(arm, experts): count for arm, experts, count in found.cost.evaluations}
    told = [
        f"{points[TUNED, experts]} points against {draws} draws for {experts} experts"
        for (arm, experts), draws in points.items()
        if arm == M3 and points.get((TUNED, experts), draws) < draws
    ]
    return f" The grid is smaller than its budget, which favours M³: {', '.join(told)}." if told else ""
