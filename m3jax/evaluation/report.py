"""Evaluations, attacks and explorations of several models in one table and one picture."""

import itertools
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax.checkpoints.storage import read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.evaluation.ownership import PICTURES
from m3jax.evaluation.records import make_directory, write_whole
from m3jax.evaluation.statistics import wilson_interval
from m3jax.text import count_text, safe_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTACK_FILE, SUMMARY_FILE, EXPLORATION_FILE = "attack.json", "summary.json", "exploration.json"
FILES = ("report.md", "report.json", "report.png")
_CLEAN = "clean"
_EXPLORED = "dev examples of an exploration"
_WHOLE = (_CLEAN, "explored")  # kinds that are of accuracy, and not of what is lost of it
_MOST = 1e6  # of a figure: accuracies are shares, drop rates may be below 0, but not by much
_LONGEST_NAME = 80  # in a picture
_LEGEND = 60  # letters of a line in it
_HATCHES = ("", "//", "..", "xx", "--", "oo")  # of tasks
_WIDEST = 18.0  # inches; wider, letters shrink too much on a screen
_LETTER = 0.1  # inches of one below an axis
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


class Line(NamedTuple):
    """One model on one task under one condition.

    Attributes:
        model: The model.
        task: The task.
        condition: "clean", or the name of an attack, its profile behind it unless it is PromptBench's, or of a shift;
            of an exploration, that these are the examples that chose.
        kind: "clean", "attack", "shift" or "explored".
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


class Explored(NamedTuple):
    """What is to be said of an exploration beside its scores.

    Attributes:
        source: The directory that it was read from.
        strategy: How it looked.
        samples: How many it tried.
        stopped: How many of them it stopped early.
        chosen: The number of the sample that it chose.
        weights: Of that one, by expert, where there is one ratio for the whole model.
        remarks: What its scores cannot tell.
    """

    source: str
    strategy: str
    samples: int
    stopped: int
    chosen: int
    weights: dict[str, float]
    remarks: tuple[str, ...]


class Report(NamedTuple):
    """What several runs found.

    Attributes:
        lines: One for each model, task and condition.
        explorations: Those that some lines are of.
        notes: Why a model was not attacked.
    """

    lines: tuple[Line, ...]
    explorations: tuple[Explored, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        explored = [one._asdict() for one in self.explorations]
        return {"lines": [line._asdict() for line in self.lines], "explorations": explored, "notes": list(self.notes)}


def collect(directories: Sequence[Path]) -> Report:
    """Reads the results in output directories of `m3jax evaluate` and `m3jax attack`, and where explorations are kept.

    Args:
        directories: The directories.

    Raises:
        M3Error: One holds no results, or others than these commands write.
    """
    read = [_read(directory) for directory in directories]
    if not any(each.lines for each in read):
        raise M3Error("there are no results to report: give output directories of m3jax evaluate and m3jax attack")
    return Report(*(tuple(itertools.chain.from_iterable(parts)) for parts in zip(*read, strict=True)))


def _read(directory: Path) -> Report:
    names = (SUMMARY_FILE, ATTACK_FILE, EXPLORATION_FILE)
    beside = directory.with_name(f"{directory.name}.exploration")  # where a merge was explored, not its samples
    if not any((directory / name).is_file() for name in names) and (beside / EXPLORATION_FILE).is_file():
        directory = beside
    found = [name for name in names if (directory / name).is_file()]
    if not found:
        raise M3Error(
            f"{directory} holds neither {SUMMARY_FILE} nor {ATTACK_FILE} nor {EXPLORATION_FILE}: "
            "give an output directory (--out) of m3jax evaluate or m3jax attack that is finished, "
            "or OUT.exploration of m3jax explore"
        )
    lines: list[Line] = []
    explored: list[Explored] = []
    notes: list[str] = []
    for name in found:
        try:
            content = parse_json(read_file(directory / name), halves=True)
            if name == EXPLORATION_FILE:
                lines += _explored_lines(content, directory)
                explored.append(_explored(content, directory))
            elif name == ATTACK_FILE:
                lines += _attack_lines(content, directory)
                why = content.get("undefined")
                notes += [] if why is None else [f"{content['model']}, {content['task']} was not attacked: {why}"]
            else:
                lines.append(_clean_line(content, directory))
        except (OSError, *FAULTS) as error:
            said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise M3Error(f"cannot read {directory / name}: {said}; make it again with m3jax") from error
    return Report(tuple(lines), tuple(explored), tuple(notes))


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


def _explored_lines(content: dict[str, Any], directory: Path) -> list[Line]:
    """Base, experts, equal weights and the chosen sample, on the examples that chose it."""
    counts = {str(task): _count(count) for task, count in content["examples"].items()}
    if not counts:
        raise ValueError("its samples were compared by a score of one's own, and not by tasks, of which a report is")
    known = [(str(result["reference"]), result["scores"]) for result in content["references"]]
    lines = []
    for model, scores in [*known, (str(content["directory"]), content["choice"]["scores"])]:
        for task, count in counts.items():
            score = _finite(scores[task])
            lines.append(
                Line(
                    model=model,
                    task=task,
                    condition=_EXPLORED,
                    kind="explored",
                    examples=count,
                    clean=None,
                    accuracy=score,
                    accuracy_interval=wilson_interval(min(max(round(score * count), 0), count), count),
                    pdr=None,
                    pdr_interval=None,
                    queries=None,
                    profile=None,
                    prompt=None,
                    source=str(directory),
                )
            )
    return lines


def _explored(content: dict[str, Any], directory: Path) -> Explored:
    groups = [[_finite(weight) for weight in weights] for weights in content["choice"]["weights"].values()]
    experts = [str(name) for name in content["experts"]]
    same = len(groups) == 1 and len(groups[0]) == len(experts)
    return Explored(
        source=str(directory),
        strategy=str(content["strategy"]),
        samples=len(content["samples"]),
        stopped=sum(result["most"] is not None for result in content["samples"]),
        chosen=_count(content["choice"]["sample"]),
        weights=dict(zip(experts, groups[0], strict=True)) if same else {},
        remarks=tuple(str(remark) for remark in content["remarks"]),
    )


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
        interval = line.accuracy_interval if line.kind in _WHOLE else line.pdr_interval
        cells = [_model_name(line), line.task, line.condition, f"{line.examples:,}", _share(line.accuracy)]
        cells += [_pdr(line), _interval(interval, line.kind), "" if line.queries is None else f"{line.queries:,}"]
        yield f"| {' | '.join(map(_cell, cells))} |"
    yield from _data_lines(report)
    yield from _exploration_lines(report)
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


def _exploration_lines(report: Report) -> Iterator[str]:
    """What each exploration did, and why a model was not attacked."""
    if report.explorations or report.notes:
        yield ""
    for one in report.explorations:
        parts = [f"{count_text(one.samples, 'sample')} by {one.strategy}"]
        parts += [f"{one.stopped:,} stopped early"] if one.stopped else []
        parts += [f"sample {one.chosen} chosen"]
        parts += [f"{Path(name).name or name} {weight:.4f}" for name, weight in one.weights.items()]
        yield safe_text(f"- {one.source}: {', '.join(parts)}")
        for remark in one.remarks:
            yield safe_text(f"    - {remark}")
    for note in report.notes:
        yield safe_text(f"- {note}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _pdr(line: Line) -> str:
    if line.kind in _WHOLE:
        return ""
    return "undefined (too little is right)" if line.pdr is None else f"{line.pdr:.3f}"


def _interval(interval: tuple[float, float] | None, kind: str) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{low:.1%} to {high:.1%}" if kind in _WHOLE else f"{low:.3f} to {high:.3f}"


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

    runs = _runs(report)
    conditions = list(dict.fromkeys(line.condition for line in report.lines))
    lost = list(dict.fromkeys(line.condition for line in report.lines if line.kind not in _WHOLE))
    width = min(max(6.4, 0.7 * len(conditions) * max(2, len(runs) / 2) + 2), _WIDEST)
    labels = [textwrap.fill(label, _LEGEND) for label in map(_drawn, _labels(runs))]
    letters = max(max(map(len, label.splitlines())) for label in labels)
    columns = max(1, int(width / (0.085 * letters + 0.6)))  # inches of a letter, and of what stands before it
    told = sum(max(label.count("\n") + 1 for label in labels[row::columns]) for row in range(min(columns, len(labels))))
    figure = Figure(figsize=(width, (6.4 if lost else 4.0) + 0.2 * told / columns), layout="constrained")
    FigureCanvasAgg(figure)
    above, *below = figure.subplots(2 if lost else 1, 1, height_ratios=(3, 2) if lost else None, squeeze=False)[:, 0]
    _draw(above, report, runs, conditions, "accuracy", width)
    above.set(ylabel="accuracy", ylim=(0, 1))
    figure.legend(
        above.get_legend_handles_labels()[0], labels, loc="outside upper center", ncols=columns, fontsize="small"
    )
    for axes in below:
        _draw(axes, report, runs, lost, "pdr", width)
        axes.set(ylabel="PDR")
        axes.axhline(0, color="black", linewidth=0.8)
    try:
        figure.savefig(path, dpi=144, metadata=dict(PICTURES["png"]))
    except OSError as error:
        raise M3Error(f"cannot write {path}: {error.strerror}; give another directory") from error


def _runs(report: Report) -> list[tuple[str, str, str]]:
    """Model, task and directory of each set of bars; no directory where all of a model's conditions differ."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in report.lines:
        found.setdefault((line.model, line.task), []).append(line)
    runs = []
    for (model, task), lines in found.items():
        apart = len({line.condition for line in lines}) < len(lines)
        runs += [(model, task, source) for source in dict.fromkeys(line.source if apart else "" for line in lines)]
    return runs


def _colours(runs: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """One colour for each model, in all its runs."""
    from matplotlib.colors import hsv_to_rgb

    models = list(dict.fromkeys(model for model, _, _ in runs))
    if len(models) <= len(_COLOURS):
        return dict(zip(models, _COLOURS, strict=False))
    return {
        model: hsv_to_rgb((place / len(models), 0.7, 0.85 if place % 2 else 0.55)) for place, model in enumerate(models)
    }


def _drawn(name: str) -> str:
    """A name as a picture has it, in which dollars would begin a formula and a first _ would hide a label."""
    shown = safe_text(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…").replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _labels(runs: Sequence[tuple[str, str, str]]) -> list[str]:
    """What the bars of each run are called: its model and task, and its directory where that is not enough."""
    short = [f"{Path(model).name or model}, {task}" for model, task, _ in runs]
    return [name if short.count(name) == 1 else f"{name} ({run[2]})" for name, run in zip(short, runs, strict=True)]


def _draw(
    axes: "Axes",
    report: Report,
    runs: Sequence[tuple[str, str, str]],
    conditions: Sequence[str],
    measure: str,
    across: float,
) -> None:
    """A bar with its interval for each run in each condition, in a picture so many inches across."""
    width = 0.8 / len(runs)
    labels, colours = _labels(runs), _colours(runs)
    tasks = list(dict.fromkeys(task for _, task, _ in runs))
    for number, run in enumerate(runs):
        mine = {
            line.condition: line
            for line in report.lines
            if (line.model, line.task) == run[:2] and run[2] in ("", line.source)
        }
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
        moved = (number - (len(runs) - 1) / 2) * width
        for place, condition in enumerate(conditions):
            if condition in mine and getattr(mine[condition], measure) is None:
                axes.text(place + moved, 0.01, "undefined", rotation=90, ha="center", va="bottom", fontsize=7)
        axes.bar(
            [place + moved for place, _ in there],
            heights,
            width,
            yerr=list(zip(*spans, strict=True)) if spans else None,
            capsize=2,
            label=f"{_drawn(labels[number])}{incomplete}",
            color=colours[run[0]],
            hatch=_HATCHES[tasks.index(run[1]) % len(_HATCHES)],
            edgecolor="white",
        )
    axes.set_xlim(-0.5, max(len(conditions), 1) - 0.5)
    named = list(map(_drawn, conditions))
    level = all(_LETTER * len(name) < (across - 1) / len(named) for name in named)
    axes.set_xticks(range(len(named)), named, rotation=0 if level else 20, ha="center" if level else "right")
