"""The laboratory's report: tables, pictures, and what follows for the paper's claims, said by rule from the numbers."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from m3jax.errors import M3Error
from m3jax.evaluation.attacks import ATTACKS
from m3jax.evaluation.records import make_directory, write_whole
from m3jax.laboratory import figures
from m3jax.laboratory.claims import SPREAD
from m3jax.laboratory.conclusions import claim_lines, verdict_text
from m3jax.laboratory.details import (
    expectation_lines,
    paired_lines,
    sample_lines,
    search_lines,
    tuning_lines,
    written_lines,
)
from m3jax.laboratory.experiments import DRAW, EQUAL, M3, METHODS, TUNED
from m3jax.laboratory.findings import Alone, LaboratoryFindings, find
from m3jax.laboratory.markdown import table
from m3jax.laboratory.outcomes import SHARES, Group, Line, SeedMean
from m3jax.text import count_text, time_text

PICTURES: Mapping[str, Callable[[Sequence[Line], Path], bool]] = MappingProxyType(
    {"curves.png": figures.save_curves, "robustness.png": figures.save_bars, "alphas.png": figures.save_alphas}
)
LOSSES = "losses.png"
FILES = ("report.md", "report.json", *PICTURES, LOSSES)

_ARMS = {EQUAL: "equal weights", TUNED: "best of a grid", DRAW: "one draw", M3: "best of M³'s draws"}
_TABLES = {
    "test": "Test accuracy, %",
    "shifted": "Accuracy out of distribution, %",
    "attacked": "Accuracy under attack or perturbation, %",
    "pdr": "Performance drop rate (PDR)",
}
_CAPTIONS = {
    "curves.png": "dev accuracy over λ",
    "robustness.png": "accuracy and drop rates",
    "alphas.png": "the shape of Beta, and the number of draws",
}
_NAMED = 12  # missing experiments that are told by name


def write_report(
    lines: Iterable[Mapping[str, Any]], directory: Path, about: Mapping[str, Any], overwrite: bool = True
) -> None:
    """Writes `report.md`, `report.json` and the pictures that there is something to draw in.

    Args:
        lines: The ledger, whole or not.
        directory: Where; made if it is not there.
        about: How it was made: "command", "settings", "models", "machine", "seconds" of the experiments, "held_out"
            for what the examples of examinations are; as far as they are known.
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
    if found.about.get("tuning"):
        figures.save_losses(found.about["tuning"], directory / LOSSES)
        drawn.append(LOSSES)
    for name in {*PICTURES, LOSSES} - set(drawn):
        (directory / name).unlink(missing_ok=True)  # of an earlier report
    write_whole(directory / "report.json", json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_whole(directory / "report.md", "\n".join(report_lines(found, drawn)) + "\n")


def report_lines(found: LaboratoryFindings, pictures: Sequence[str] = ()) -> Iterator[str]:
    """The report in Markdown.

    Args:
        found: What is reported.
        pictures: The files that were drawn.
    """
    base = found.about.get("base")
    yield from (f"# Mixup Model Merge (M³) measured on {f'experts of {base}' if base else 'small models'}", "")
    yield from table(
        ["claim of the paper", "verdict"], ([f"{c.number}. {c.text}", verdict_text(c)] for c in found.claims)
    )
    yield from ("", "## How it was made", "")
    yield from _about_lines(found)
    yield from _missing_lines(found.missing)
    yield from ("", "## Base and experts", "")
    yield from _model_lines(found)
    if found.about.get("tuning"):
        yield from ("", "## Fine-tuning", "", *tuning_lines(found.about["tuning"]))
        yield from ("", f"![losses over steps]({LOSSES})") if LOSSES in pictures else ()
    if found.samples:
        yield from ("", "## Answers", "", *sample_lines(found.samples))
    for measure in _TABLES:
        yield from ("", f"## {_TABLES[measure]}", "")
        yield from _cell_lines(found, measure)
    if found.written:
        yield from ("", "## The best merges, written", "", *written_lines(found.written))
    yield from ("", "## The shape of Beta", "")
    yield from _shape_lines(found)
    if found.expectations and found.about.get("base"):
        yield from ("", "## What the curve lets expect", "", *expectation_lines(found.curves, found.expectations))
    if found.searches:
        yield from ("", "## Weights of layers and tensors", "", *search_lines(found.searches, found.cost.examination))
    if found.paired:
        yield from ("", "## How many examples decide", "", *paired_lines(found.paired))
    yield from ("", "## Cost", "")
    yield from _cost_lines(found)
    yield from ("", "## Pictures", "")
    for name in PICTURES:
        told = f"![{_CAPTIONS[name]}]({name})" if name in pictures else f"Nothing to draw: {_CAPTIONS[name]}."
        yield from (told, "")
    yield from ("## What follows for the paper's claims", "")
    yield from claim_lines(found)


# --- How it was made ----------------------------------------------------------------------------------------------


def _about_lines(found: LaboratoryFindings) -> Iterator[str]:
    about = found.about
    if about.get("command"):
        yield f"- command: `{about['command']}`"
    yield f"- seeds: {', '.join(map(str, found.seeds))}"
    for name in ("settings", "models", "machine"):
        if about.get(name):
            yield from _told_lines(name, about[name])
    if about.get("held_out"):
        yield f"- held out: {about['held_out']}"
    training = ((about.get("models") or {}).get("training") or {}).values()
    spent = {"training": sum(one.get("seconds", 0) for one in training), "experiments": about.get("seconds")}
    if any(spent.values()):
        yield f"- time: {', '.join(f'{what} {time_text(seconds)}' for what, seconds in spent.items() if seconds)}"


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


def _model_lines(found: LaboratoryFindings) -> Iterator[str]:
    if not found.models:
        yield "Not measured."
        return
    seeds, measures = len(found.seeds), (*SHARES, "pdr")
    yield "Accuracy in %, ± half the width of the 95 % interval over seeds (Student's t), as in all tables."
    yield "There is none where all seeds agree."
    yield ""
    yield from table(
        ["model", "skill", "test", "out of distribution", "under its adversary", "PDR", "adversary"],
        (
            [one.model, one.skill, *(_entry(getattr(one, what), what, seeds) for what in measures), one.adversary]
            for one in found.models
        ),
    )


def _cell_lines(found: LaboratoryFindings, measure: str) -> Iterator[str]:
    """A row for each group, method and DARE, a column for each arm and, where known, for base and best expert."""
    if not found.cells:
        yield "Not measured."
        return
    values: dict[tuple[Group, str, bool | None], dict[str, SeedMean | None]] = {}
    for cell in found.cells:
        values.setdefault((cell.group, cell.method, cell.dare), {})[cell.arm] = getattr(cell, measure)
    groups, methods = [key[0] for key in values], list(METHODS)
    order = sorted(values, key=lambda key: (len(key[0]), groups.index(key[0]), methods.index(key[1]), bool(key[2])))
    seeds = len(found.seeds)
    arms = [arm for arm in _ARMS if any(mine.get(arm) is not None for mine in values.values())]
    alone = {one.group: _alone_entries(one, seeds) for one in found.alone if one.measure == measure}
    yield from table(
        ["experts", "method", "DARE", *(_ARMS[arm] for arm in arms), *(("base", "best expert alone") if alone else ())],
        (
            [" + ".join(key[0]), key[1], "yes" if key[2] else "no"]
            + [_entry(values[key].get(arm), measure, seeds) for arm in arms]
            + (alone.get(key[0], ["–", "–"]) if alone else [])
            for key in order
        ),
    )
    if measure == "test" and alone:
        yield from ("", _surpassed(found))
    if measure == "pdr" and found.adversaries:
        yield from ("", _adversaries(found.adversaries))


def _alone_entries(one: Alone, seeds: int) -> list[str]:
    expert = _entry(one.best, one.measure, seeds)
    return [_entry(one.base, one.measure, seeds), f"{one.expert}: {expert}" if one.expert else expert]


def _surpassed(found: LaboratoryFindings) -> str:
    """In how many rows merging beats not merging."""
    told = [
        "Base and experts are not merged, and stand in each row of a group with their means over its skills. The best "
        "expert is the group's with the best mean over seeds in the same table: it is chosen after the fact, which "
        "favours it."
    ]
    for one in found.surpassed:
        surely = "no row has an interval" if one.surely is None else f"the paired interval is above 0 in {one.surely}"
        if one.rows:
            told.append(
                f"The best of M³'s draws is above the {one.other} in {one.above} of {count_text(one.rows, 'row')} by "
                f"its mean; {surely}."
            )
    return " ".join(told)


def _adversaries(adversaries: Mapping[str, str]) -> str:
    """Which skills are attacked and which perturbed."""

    def told(attacked: bool) -> str:
        return ", ".join(f"{skill} ({what})" for skill, what in adversaries.items() if (what in ATTACKS) == attacked)

    attacks = f"An attack on the prompt, which keeps the worst that it finds: {told(True) or 'no skill'}."
    others = f"A perturbation of the input, whatever the model makes of it: {told(False) or 'no skill'}."
    return (
        f"{attacks} {others} The PDR of a group is pooled, 1 − Σ attacked / Σ clean over its skills, where the paper "
        "gives it for each task; base and experts have it for each skill above."
    )


def _entry(value: SeedMean | None, measure: str, seeds: int) -> str:
    """A mean ± half its interval, and the number of seeds where they are fewer than elsewhere."""
    if value is None:
        return "–"
    scale, digits = (100, 1) if measure in SHARES else (1, 3)
    half = "" if value.half is None else f" ± {scale * value.half:.{digits}f}"
    fewer = "" if value.seeds == seeds else f" ({count_text(value.seeds, 'seed')})"
    return f"{scale * value.mean:.{digits}f}{half}{fewer}"


def _shape_lines(found: LaboratoryFindings) -> Iterator[str]:
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


def _cost_lines(found: LaboratoryFindings) -> Iterator[str]:
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
