"""An exploration as a picture: a curve for two experts, a triangle for three, parallel axes beyond."""

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from m3jax.errors import M3Error
from m3jax.evaluation.ownership import PICTURES, check_unmade
from m3jax.evaluation.statistics import wilson_interval
from m3jax.exploration.selection import Result
from m3jax.text import safe_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _GREY, _CHOSEN = "#333333", "#8c8c8c", "#d55e00"
_REFERENCES = (
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8172b3",
    "#937860",
)  # told apart by the colour-blind
_ENDINGS = (".png", ".svg", ".pdf")
_PER_ROW = 3
_DASH = 5.0  # length of a line's strokes, in widths of it
_LEVEL = 0.005  # between lines that would hide each other
_LINE = 11  # letters of a line of it below an axis
_LONGEST = 24  # letters of a model's name
_PER_AXIS = 0.8  # inches between parallel axes, and between their names


class Drawn(NamedTuple):
    """What a picture is made of.

    Attributes:
        choice: The chosen sample.
        results: All samples.
        references: What they are measured against.
        experts: Names, in the order of weights.
        examples: By task, how many scores are of; none for scores that are no shares of them.
    """

    choice: Result
    results: Sequence[Result]
    references: Sequence[Result]
    experts: Sequence[str]
    examples: Mapping[str, int]


class _Panel(NamedTuple):
    """What one picture of several shows: a task, and how many examples it has."""

    task: str
    examples: int


def picture(found: Drawn, path: Path) -> None:
    """Draws every sample's scores against its weights, with 95 % intervals, and what samples are measured against.

    Weights that differ between layers or tensors are drawn at their mean. Samples that were stopped early, or were
    shown a part of the examples only, are not drawn.

    Args:
        found: What is drawn.
        path: The file, whose ending says the format: .png, .svg or .pdf.

    Raises:
        M3Error: It cannot be written.
    """
    _check_place(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_Panel(task, found.examples.get(task, 0)) for task in found.choice.scores]
    columns, rows = min(len(panels), _PER_ROW), math.ceil(len(panels) / _PER_ROW)
    wide = max(4.6, _PER_AXIS * len(found.experts) + 1.6)
    figure = Figure(figsize=(max(wide * columns, 6.4), 4.2 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in places[len(panels) :]:
        unused.remove()
    count = len(_weights(found.choice))
    draw = {1: _curve, 2: _curve, 3: _triangle}.get(count, _parallel)
    for axes, panel in zip(places, panels, strict=False):
        axes.set_title(_title(found, panel), fontsize=10)
        draw(figure, axes, found, panel)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    try:
        figure.savefig(path, dpi=144, metadata=dict(PICTURES[path.suffix[1:]]))
    except OSError as error:
        raise M3Error(f"cannot write {path}: {error.strerror}") from error


def check_picture(path: Path) -> None:
    """Raise M3Error unless a picture can be written there and replaces none but one of ours.

    That is better known before the samples than after.
    """
    _check_place(path)
    check_unmade(path)


def _check_place(path: Path) -> None:
    if path.suffix not in _ENDINGS:
        raise M3Error(f"{path}: a picture's name ends in {', '.join(_ENDINGS)}")
    if not path.parent.is_dir():
        raise M3Error(f"{path}: its parent does not exist: make it")


def _title(found: Drawn, panel: _Panel) -> str:
    examples = f" ({panel.examples} examples)" if panel.examples else ""
    drawn = {*found.experts, *(() if len(_weights(found.choice)) > 2 else ("base",))}  # as lines or beside names
    told = [f"{_shown(r.reference or '')} {r.scores[panel.task]:.2f}, " for r in found.references]
    told = [text for text, r in zip(told, found.references, strict=True) if r.weights or r.reference not in drawn]
    return f"{_shown(panel.task)}{examples}\n{''.join(told)}chosen {found.choice.scores[panel.task]:.2f}"


def _weights(result: Result) -> list[float]:
    """The mean over groups of each weight."""
    groups = list(result.weights.values())
    return [math.fsum(values) / len(groups) for values in zip(*groups, strict=True)]


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _shown(name: str, among: Sequence[str] = ()) -> str:
    """A name as a picture has it: short, and without what would begin a formula.

    Args:
        name: Of a model or task.
        among: Names that it has to be told from, whose common beginning is left out where they are long.
    """
    short, lasts = _last(name), list(map(_last, among))
    if len(short) > _LONGEST and len(lasts) > 1 and short in lasts:
        parts = zip(*(re.split(r"(?<=[-_.])", each) for each in lasts), strict=False)
        shared = sum(len(row[0]) for row in itertools.takewhile(lambda row: len(set(row)) == 1, parts))
        short = "…" + short[shared:] if shared > 1 else short
    half = _LONGEST // 2
    short = short if len(short) <= _LONGEST else f"{short[: half - 1]}…{short[-half:]}"
    return safe_text(short).replace("$", r"\$").replace("_", "\u200b_")


def _whole(found: Drawn) -> list[Result]:
    return [result for result in found.results if result.share == 1.0]


def _spans(results: Sequence[Result], panel: _Panel) -> tuple[list[float], list[float]] | None:
    """How far the interval of each score goes below and above it; none for a score of one's own."""
    if not panel.examples:
        return None
    scores = [result.scores[panel.task] for result in results]
    intervals = [wilson_interval(round(score * panel.examples), panel.examples) for score in scores]
    below = [max(score - low, 0.0) for score, (low, _) in zip(scores, intervals, strict=True)]
    above = [max(high - score, 0.0) for score, (_, high) in zip(scores, intervals, strict=True)]
    return below, above


def _lines_of_references(axes: "Axes", found: Drawn, panel: _Panel) -> None:
    """A level line for each input by itself, in one colour in all panels; those at one height take turns along it.

    The legend has whole lines, as strokes that begin late would be lost in it.
    """
    inputs = [r for r in found.references if not r.weights]
    for colour, result in zip(_REFERENCES, inputs, strict=False):
        height = result.scores[panel.task]
        level = [other for other in inputs if abs(other.scores[panel.task] - height) < _LEVEL]
        turns = (_DASH * level.index(result), (_DASH, _DASH * max(len(level) - 1, 0.5)))
        axes.axhline(height, color=colour, linewidth=1.6, linestyle=turns)
        axes.plot([], [], color=colour, linewidth=1.6, label=_shown(result.reference or "", found.experts))


def _curve(figure: "Figure", axes: "Axes", found: Drawn, panel: _Panel) -> None:
    results = sorted(_whole(found), key=_weights)
    places, scores = [_weights(r)[0] for r in results], [r.scores[panel.task] for r in results]
    _lines_of_references(axes, found, panel)
    axes.errorbar(
        places, scores, yerr=_spans(results, panel), fmt="o-", color=_GREY, ecolor="#d0d0d0", linewidth=1, markersize=4,
        capsize=2, label="samples",
    )  # fmt: skip
    for equal in [r for r in found.references if r.weights]:
        axes.plot(
            _weights(equal)[0],
            equal.scores[panel.task],
            "D",
            color=_INK,
            markersize=7,
            label=equal.reference,
            zorder=4,
            clip_on=False,
        )
    chosen = found.choice
    axes.plot(
        _weights(chosen)[0], chosen.scores[panel.task], "*", color=_CHOSEN, markersize=15, zorder=5, clip_on=False,
        label=f"chosen: sample {chosen.sample}",
    )  # fmt: skip
    single = len(_weights(chosen)) == 1
    mean = ", mean of all groups" if len(chosen.weights) > 1 else ""
    first = found.experts[-1 if single else 0] if found.experts else "the first"
    axes.set(xlabel=("position t" if single else f"weight of {_shown(first, found.experts)}") + mean, ylabel="score")
    if all(0 <= place <= 1 for place in places):
        axes.set_xlim(-0.03, 1.03)
    if panel.examples:
        axes.set_ylim(-0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)


def _at(weights: Sequence[float]) -> tuple[float, float]:
    """Where three weights lie in a triangle whose corners are the experts: left, right, top."""
    total = math.fsum(weights) or 1.0
    _, right, top = (weight / total for weight in weights)
    return right + top / 2, top * math.sqrt(3) / 2


def _triangle(figure: "Figure", axes: "Axes", found: Drawn, panel: _Panel) -> None:
    results = _whole(found)
    corners = [_at(corner) for corner in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    axes.plot(*zip(*corners, corners[0], strict=True), color=_INK, linewidth=1)
    xs, ys = zip(*(_at(_weights(result)) for result in results), strict=True)
    dots = axes.scatter(
        xs, ys, c=[r.scores[panel.task] for r in results], cmap="viridis", s=46, edgecolors="white", linewidths=0.6,
        label="samples", zorder=3,
    )  # fmt: skip
    figure.colorbar(dots, ax=axes, shrink=0.7, label="score")
    for equal in [r for r in found.references if r.weights]:
        axes.plot(
            *_at(_weights(equal)), "D", markerfacecolor="none", color=_INK, markersize=9,
            label=equal.reference, zorder=4,
        )  # fmt: skip
    axes.plot(
        *_at(_weights(found.choice)), "*", markerfacecolor="none", color=_CHOSEN, markersize=18, zorder=5,
        label=f"chosen: sample {found.choice.sample}",
    )  # fmt: skip
    alone = {r.reference: r.scores[panel.task] for r in found.references if not r.weights}
    for corner, name, (dx, dy) in zip(corners, found.experts, ((0, -0.06), (0, -0.06), (0, 0.03)), strict=True):
        score = f"\n{alone[name]:.2f}" if name in alone else ""
        place, lies = (corner[0] + dx, corner[1] + dy), "top" if dy < 0 else "bottom"
        axes.text(*place, _shown(name, found.experts) + score, ha="center", va=lies, fontsize=9)
    axes.set(xlim=(-0.2, 1.2), ylim=(-0.24, 1.08), aspect="equal")
    axes.set_axis_off()


def _parallel(figure: "Figure", axes: "Axes", found: Drawn, panel: _Panel) -> None:
    from matplotlib import cm, colors

    results = sorted(_whole(found), key=lambda result: result.scores[panel.task])  # the best on top
    scores = [result.scores[panel.task] for result in results]
    shade = cm.ScalarMappable(colors.Normalize(min(scores), max(scores)), "viridis")
    for result, score in zip(results, scores, strict=True):
        axes.plot(_weights(result), color=shade.to_rgba(np.asarray(score)), linewidth=1.2, alpha=0.8)
    for equal in [r for r in found.references if r.weights]:
        axes.plot(_weights(equal), color=_INK, linewidth=1.6, linestyle="--", label=equal.reference)
    axes.plot(_weights(found.choice), color=_CHOSEN, linewidth=2.6, label=f"chosen: sample {found.choice.sample}")
    figure.colorbar(shade, ax=axes, shrink=0.8, label="score")
    alone = {r.reference: f"\n{r.scores[panel.task]:.2f}" for r in found.references if not r.weights}
    named = [
        "\n".join(textwrap.wrap(_shown(name, found.experts), _LINE)) + alone.get(name, "") for name in found.experts
    ]
    axes.set_xticks(range(len(found.experts)), named, fontsize=8)
    axes.set(ylabel="weight")
    axes.spines[["top", "right"]].set_visible(False)
