"""Evaluations and attacks of several models in one table and one picture."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.evaluation.records import make_directory, write_whole
from m3jax.text import safe_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTACK_FILE, SUMMARY_FILE = "attack.json", "summary.json"
FILES = ("report.md", "report.json", "report.png")
_CLEAN = "clean"
_MOST = 1e6  # of a figure: accuracies are shares, drop rates may be below 0, but not by much
_LONGEST_NAME = 80  # in a picture
_WIDEST = 18.0  # inches; wider, letters shrink too much on a screen
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


class Line(NamedTuple):
    """One model on one task under one condition.

    Attributes:
        model: The model.
        task: The task.
        condition: "clean", or the name of an attack, its profile behind it unless it is PromptBench's, or of a shift.
        kind: "clean", "attack" or "shift".
        examples: Examples that accuracies are over.
        clean: Clean accuracy; None where none could be judged.
        accuracy: Accuracy under the condition.
        accuracy_interval: Its 95 % interval, where the run gives one.
        pdr: Performance drop rate; None where it is undefined, or the condition is clean.
        pdr_interval: Its 95 % interval.
        queries: Prompts scored.
        profile: Of the attack.
        prompt: The prompt under the condition, where it is known.
        source: The directory that it was read from.
        data: Where the test set was from, where the run says it.
        limit: Only the first so many examples were taken; None for all, or where the run does not say it.
        complete: Whether the run did all that it was to do; an attack may have been interrupted.
    """

    model: str
    task: str
    condition: str
    kind: str
    examples: int
    clean: float | None
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    pdr: float | None
    pdr_interval: tuple[float, float] | None
    queries: int | None
    profile: str | None
    prompt: str | None
    source: str
    data: str | None = None
    limit: int | None = None
    complete: bool = True


class Report(NamedTuple):
    """What several runs found.

    Attributes:
        lines: One for each model, task and condition.
    """

    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {"lines": [line._asdict() for line in self.lines]}


def collect(directories: Sequence[Path]) -> Report:
    """Reads the results in output directories of `m3jax evaluate` and `m3jax attack`.

    Args:
        directories: The directories.

    Raises:
        M3Error: One holds no results, or others than these commands write.
    """
    lines = [line for directory in directories for line in _read(directory)]
    if not lines:
        raise M3Error("there are no results to report: give output directories of m3jax evaluate and m3jax attack")
    return Report(tuple(lines))


def _read(directory: Path) -> list[Line]:
    found = [name for name in (SUMMARY_FILE, ATTACK_FILE) if (directory / name).is_file()]
    if not found:
        raise M3Error(
            f"{directory} holds neither {SUMMARY_FILE} nor {ATTACK_FILE}: "
            "give an output directory (--out) of m3jax evaluate or m3jax attack that is finished"
        )
    lines: list[Line] = []
    for name in found:
        try:
            content = parse_json((directory / name).read_text(encoding="utf-8"), halves=True)
            lines += _attack_lines(content, directory) if name == ATTACK_FILE else [_clean_line(content, directory)]
        except (OSError, *FAULTS) as error:
            said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise M3Error(f"cannot read {directory / name}: {said}; make it again with m3jax") from error
    return lines


def _pair(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = value
    return _finite(low), _finite(high)


def _number(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    """A figure; bars of a picture have to be drawn of it, which no program means to be longer than this."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
        raise ValueError(f"{value!r:.50} where a figure is due")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.50} where a count is due")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _clean_line(content: dict[str, Any], directory: Path) -> Line:
    accuracy, data, limit = _number(content["accuracy"]), content.get("data"), content.get("limit")
    return Line(
        model=str(content["model"]),
        task=str(content["task"]),
        condition=_CLEAN,
        kind=_CLEAN,
        examples=_count(content["examples"]),
        clean=accuracy,
        accuracy=accuracy,
        accuracy_interval=_pair(content["interval"]),
        pdr=None,
        pdr_interval=None,
        queries=None,
        profile=_text_or_none(content.get("profile")),
        prompt=_text_or_none(content.get("prompt")),
        source=str(directory),
        data=_text_or_none(data),
        limit=None if limit is None else _count(limit),
        complete=bool(content.get("complete", True)),
    )


def _attack_lines(content: dict[str, Any], directory: Path) -> list[Line]:
    first = _clean_line(content, directory)._replace(profile=None)
    lines = [first]
    for kind in ("attack", "shift"):
        for entry in content[f"{kind}s"]:
            drop = entry["drop"]
            lines.append(
                first._replace(
                    condition=_condition(str(entry[kind]), kind, str(content["profile"])),
                    kind=kind,
                    clean=_finite(drop["clean"]),
                    accuracy=_finite(drop["attacked"]),
                    accuracy_interval=None,
                    pdr=_number(drop["pdr"]),
                    pdr_interval=_pair(drop["interval"]),
                    queries=None if entry.get("queries") is None else _count(entry["queries"]),
                    profile=str(content["profile"]) if kind == "attack" else None,
                    prompt=_text_or_none(entry.get("prompt")),
                )
            )
    return lines


def _condition(name: str, kind: str, profile: str) -> str:
    return f"{name} ({profile})" if kind == "attack" and profile != "promptbench" else name


# --- The table ---------------------------------------------------------------------------------------------------


def table_lines(report: Report) -> Iterator[str]:
    """The report in Markdown: a table of all figures, the data of each run, each attacked prompt below its original.

    Args:
        report: The report.
    """
    yield "| model | task | condition | examples | accuracy | PDR | 95 % interval | queries |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in report.lines:
        interval = line.accuracy_interval if line.kind == _CLEAN else line.pdr_interval
        cells = [_model_name(line), line.task, line.condition, f"{line.examples:,}", _share(line.accuracy)]
        cells += [_pdr(line), _interval(interval, line.kind), "" if line.queries is None else f"{line.queries:,}"]
        yield f"| {' | '.join(map(_cell, cells))} |"
    yield from _data_lines(report)
    changed = [line for line in report.lines if line.kind == "attack"]
    originals = {(line.source, line.kind): line.prompt for line in report.lines}
    for line in changed:
        yield ""
        yield safe_text(f"{line.model}, {line.task}, {line.condition}:")
        yield f"- original: `{_code(originals[line.source, _CLEAN])}`"
        yield f"- attacked: `{_code(line.prompt)}`"


def _model_name(line: Line) -> str:
    return line.model if line.complete else f"{line.model} (incomplete)"


def _data_lines(report: Report) -> Iterator[str]:
    """What each run was on, and whether it came to its end, as far as the runs say it."""
    told = [line for line in report.lines if line.kind == _CLEAN and (line.data is not None or not line.complete)]
    if told:
        yield ""
    for line in told:
        parts = [] if line.data is None else [f"data `{_code(line.data)}`"]
        parts += [] if line.limit is None else [f"limit {line.limit:,}"]
        parts += [f"{line.examples:,} examples measured"]
        parts += [] if line.complete else ["incomplete: the attack was interrupted"]
        yield f"- {safe_text(f'{line.model}, {line.task} ({line.source})')}: {', '.join(parts)}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _pdr(line: Line) -> str:
    if line.kind == _CLEAN:
        return ""
    return "undefined (clean accuracy is 0)" if line.pdr is None else f"{line.pdr:.3f}"


def _interval(interval: tuple[float, float] | None, kind: str) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{low:.1%} to {high:.1%}" if kind == _CLEAN else f"{low:.3f} to {high:.3f}"


def _cell(text: str) -> str:
    return safe_text(text.replace("|", "\\|").replace("\n", " "))


def _code(text: str | None) -> str:
    return "" if text is None else safe_text(text.replace("\n", "⏎").replace("`", "'"))


# --- The files ---------------------------------------------------------------------------------------------------


def write(report: Report, directory: Path, overwrite: bool = False) -> None:
    """Writes `report.md`, `report.json` and `report.png`.

    Args:
        report: The report.
        directory: Where; made if it is not there.
        overwrite: Replace a report that is there.

    Raises:
        M3Error: A report is there, or it cannot be written.
    """
    there = [name for name in FILES if (directory / name).exists()]
    if there and not overwrite:
        raise M3Error(f"{directory / there[0]} is already there: give another directory, or --overwrite")
    make_directory(directory)
    table, data, picture = (directory / name for name in FILES)
    save_picture(report, picture)
    write_whole(data, json.dumps(report.to_json(), indent=2) + "\n")
    write_whole(table, "\n".join([*table_lines(report), "", f"![accuracy and drop rates]({picture.name})", ""]))


def save_picture(report: Report, path: Path) -> None:
    """Draws clean and attacked accuracy as bars, and the drop rates below, a group for each condition.

    Args:
        report: The report.
        path: The PNG file.

    Raises:
        M3Error: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = list(dict.fromkeys((line.model, line.task, line.source) for line in report.lines))
    conditions = list(dict.fromkeys(line.condition for line in report.lines))
    width = min(max(6.4, 0.7 * len(conditions) * max(2, len(runs) / 2) + 2), _WIDEST)
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw(above, report, runs, conditions, "accuracy")
    _draw(below, report, runs, [one for one in conditions if one != _CLEAN], "pdr")
    above.set(ylabel="accuracy", ylim=(0, 1))
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    below.set(ylabel="PDR")
    below.axhline(0, color="black", linewidth=0.8)
    try:
        figure.savefig(path, dpi=144)
    except OSError as error:
        raise M3Error(f"cannot write {path}: {error.strerror}; give another directory") from error


def _drawn(name: str) -> str:
    """A name as a picture has it, in which dollars would begin a formula and a first _ would hide a label."""
    shown = safe_text(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…").replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _labels(runs: Sequence[tuple[str, str, str]]) -> list[str]:
    """What the bars of each run are called: its model and task, and its directory where that is not enough."""
    short = [f"{Path(model).name or model}, {task}" for model, task, _ in runs]
    return [name if short.count(name) == 1 else f"{name} ({run[2]})" for name, run in zip(short, runs, strict=True)]


def _draw(
    axes: "Axes", report: Report, runs: Sequence[tuple[str, str, str]], conditions: Sequence[str], measure: str
) -> None:
    """A bar with its interval for each run in each condition."""
    width = 0.8 / len(runs)
    labels = _labels(runs)
    for number, run in enumerate(runs):
        mine = {line.condition: line for line in report.lines if (line.model, line.task, line.source) == run}
        there = [
            (place, mine[condition])
            for place, condition in enumerate(conditions)
            if condition in mine and getattr(mine[condition], measure) is not None
        ]
        incomplete = "" if all(line.complete for line in mine.values()) else " (incomplete)"
        heights = [getattr(line, measure) for _, line in there]
        intervals = [getattr(line, f"{measure}_interval") for _, line in there]
        # Where there is no interval, nothing is drawn: a span of 0 would look like certainty.
        spans = [
            (max(height - pair[0], 0), max(pair[1] - height, 0)) if pair else (math.nan, math.nan)
            for height, pair in zip(heights, intervals, strict=True)
        ]
        axes.bar(
            [place + (number - (len(runs) - 1) / 2) * width for place, _ in there],
            heights,
            width,
            yerr=list(zip(*spans, strict=True)) if spans else None,
            capsize=2,
            label=f"{_drawn(labels[number])}{incomplete}",
            color=_COLOURS[number % len(_COLOURS)],
        )
    axes.set_xlim(-0.5, max(len(conditions), 1) - 0.5)
    axes.set_xticks(range(len(conditions)), list(map(_drawn, conditions)), rotation=20, ha="right")
