"""Pictures of what experiments found: scores over λ, robustness of the arms, and the shape of Beta."""

import contextlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.ownership import PART, PICTURES
from m3jax.laboratory.experiments import AVERAGE, EQUAL, M3, TUNED, best
from m3jax.laboratory.outcomes import (
    Cell,
    Group,
    Line,
    SeedMean,
    Shape,
    averaged_pairs,
    cells_of,
    depths_of,
    distinct,
    mean,
    outcomes,
    shapes_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, _BLUE, _ORANGE, _GREY = "#333333", "#4c72b0", "#dd8452", "#8c8c8c"
_SKILLS = ("#55a868", "#8172b3", "#c44e52", "#937860", "#da8bc3")
_ARMS = {EQUAL: ("equal weights", _GREY), TUNED: ("best of a grid", _BLUE), M3: ("best of M³'s draws", _ORANGE)}
_PER_ROW = 3  # panels


def make_figure(panels: int, height: float = 4.4) -> "tuple[Figure, list[Axes]]":
    """A figure with some panels, side by side and in rows.

    Args:
        panels: How many.
        height: Of each, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = min(panels, _PER_ROW), math.ceil(panels / _PER_ROW)
    figure = Figure(figsize=(max(4.3 * columns, 6.4), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for left in axes[panels:]:
        left.remove()
    for panel in axes[:panels]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK)
    return figure, axes[:panels]


def finish_figure(figure: "Figure", axes: "Sequence[Axes]", path: Path, first: Sequence[str] = ()) -> None:
    """Saves a figure with one legend for all its panels, outside of them.

    Args:
        figure: The figure.
        axes: Its panels.
        path: The PNG file.
        first: Labels that come first in the legend.
    """
    shown = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    shown = {label: shown[label] for label in dict.fromkeys([*first, *shown]) if label in shown}
    for columns in (3, 2, 1) if shown else ():
        place: Any = {"loc": "outside upper center", "ncols": columns, "fontsize": 9, "frameon": False}
        legend = figure.legend(shown.values(), shown.keys(), **place)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=144, metadata=dict(PICTURES["png"]))
    write_whole(path, drawn.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        M3Error: It cannot be written.
    """
    beside = path.with_name(path.name + PART)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise M3Error(f"cannot write {path}: {error.strerror}; give another directory") from error


# --- Fine-tuning --------------------------------------------------------------------------------------------------


def save_losses(tuning: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws the loss of every expert's training over its steps.

    Args:
        tuning: Of each expert "losses", one a step.
        path: The PNG file.

    Raises:
        M3Error: It cannot be written.
    """
    figure, (axes,) = make_figure(1)
    for number, (name, one) in enumerate(tuning.items()):
        losses, width = one["losses"], max(len(one["losses"]) // 40, 1)
        means = [mean(losses[max(place - width, 0) : place + width + 1]) for place in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), means, color=_SKILLS[number % len(_SKILLS)], label=name)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("cross-entropy of answers", color=INK)
    axes.set_ylim(bottom=0)
    finish_figure(figure, [axes], path)


# --- Over λ -------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """What is known of a pair's ratios: the curve, and the trials by seed."""

    curve: Sequence[Any]
    seed: int
    drawn: dict[int, Sequence[Any]]
    grid: dict[int, Sequence[Any]]


def _pairs(lines: Iterable[Line]) -> dict[Group, _Pair]:
    there = list(lines)
    merges = [line for line in averaged_pairs(there) if line["kind"] == "merge"]
    curves = {
        tuple(line["group"]): line
        for line in sorted(distinct(there, "curve"), key=lambda line: line["seed"], reverse=True)
    }
    groups = dict.fromkeys([*curves, *(tuple(line["group"]) for line in merges)])

    def trials(group: Group, arm: str) -> dict[int, Sequence[Any]]:
        mine = [line for line in merges if tuple(line["group"]) == group]
        return {line["seed"]: some for line in mine if (some := line.get("trials", {}).get(arm))}

    found = {
        group: _Pair(
            curves[group].get("curve", ()) if group in curves else (),
            curves[group]["seed"] if group in curves else 0,
            trials(group, M3),
            trials(group, TUNED),
        )
        for group in groups
    }
    return {group: pair for group, pair in found.items() if pair.curve or pair.drawn or pair.grid}


def save_curves(lines: Iterable[Line], path: Path) -> bool:
    """Draws dev accuracy over λ for every pair, with the ratios that were drawn and those that were chosen.

    Args:
        lines: The ledger.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.

    Raises:
        M3Error: It cannot be written.
    """
    pairs = _pairs(lines)
    if not pairs:
        return False
    skills = list(dict.fromkeys(skill for group in pairs for skill in group))
    figure, axes = make_figure(len(pairs))
    for panel, (group, pair) in zip(axes, pairs.items(), strict=True):
        _draw_curve(panel, group, pair, skills)
    for panel in axes[::_PER_ROW]:
        panel.set_ylabel("accuracy on dev examples", color=INK)
    finish_figure(figure, axes, path, first=skills)
    return True


def _draw_curve(axes: "Axes", group: Group, pair: _Pair, skills: Sequence[str]) -> None:
    ratios = [point["weights"][0] for point in pair.curve]
    for skill in group if ratios else ():
        colour = _SKILLS[skills.index(skill) % len(_SKILLS)]
        axes.plot(ratios, [point["dev"][skill] for point in pair.curve], color=colour, linewidth=1, label=skill)
    if ratios:
        axes.plot(*_points(pair.curve), color=INK, linewidth=2.2, label=f"mean of both, seed {pair.seed}")
    axes.axvline(0.5, color=_GREY, linestyle="--", linewidth=1.2, zorder=0, label="equal weights, λ = ½")
    others = [one for seed, trials in pair.drawn.items() if seed != pair.seed for one in trials]
    _draw_points(axes, others, "o", 16, _ORANGE, "M³'s draws, other seeds (other examples)", alpha=0.35)
    drawn, grid = pair.drawn.get(pair.seed, ()), pair.grid.get(pair.seed, ())
    _draw_points(axes, drawn, "o", 32, _ORANGE, f"M³'s draws, seed {pair.seed}")
    _draw_points(axes, _chosen(drawn), "*", 220, _ORANGE, f"the best of them, seed {pair.seed}", edge=INK)
    _draw_points(axes, _chosen(grid), "D", 55, _BLUE, f"best of a grid, seed {pair.seed}")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title(" and ".join(group), color=INK, fontsize=11)
    axes.set_xlabel(f"λ, weight of {group[0]}", color=INK)


def _points(trials: Iterable[Any]) -> tuple[list[float], list[float]]:
    there = list(trials)
    return [one["weights"][0] for one in there], [mean(one["dev"].values()) for one in there]


def _chosen(trials: Sequence[Any]) -> list[Any]:
    weights = best(trials) if trials else ()
    return [one for one in trials if tuple(one["weights"]) == weights][:1]


def _draw_points(
    axes: "Axes",
    trials: Sequence[Any],
    marker: str,
    area: float,
    colour: str,
    label: str,
    *,
    alpha: float = 1.0,
    edge: str = "white",
) -> None:
    if trials:
        axes.scatter(
            *_points(trials),
            s=area,
            c=colour,
            marker=marker,
            alpha=alpha,
            edgecolors=edge,
            linewidths=0.7,
            label=label,
            zorder=3,
        )


# --- Bars ---------------------------------------------------------------------------------------------------------


def save_bars(lines: Iterable[Line], path: Path) -> bool:
    """Draws what the arms scored and lost in every group, as means over methods with DARE and without.

    Args:
        lines: The ledger.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.

    Raises:
        M3Error: It cannot be written.
    """
    cells = [cell for cell in cells_of(outcomes(lines), whole=True) if cell.arm in _ARMS]
    if not cells:
        return False
    groups = sorted(dict.fromkeys(cell.group for cell in cells), key=len)
    figure, axes = make_figure(3, height=4.8)
    said = (("test", "accuracy, test"), ("shifted", "accuracy, out of distribution"), ("pdr", "performance drop rate"))
    for panel, (measure, title) in zip(axes, said, strict=True):
        _draw_bars(panel, cells, groups, measure)
        panel.set_title(title, color=INK, fontsize=11)
    for panel in axes[:2]:
        panel.set_ylim(0, 1)
    axes[0].set_ylabel("accuracy, share of examples", color=INK)
    axes[2].set_ylabel("PDR, share of clean accuracy lost", color=INK)
    axes[2].axhline(0, color=INK, linewidth=0.8)
    finish_figure(figure, axes, path)
    return True


def _draw_bars(axes: "Axes", cells: Sequence[Cell], groups: Sequence[Group], measure: str) -> None:
    width = 0.8 / len(_ARMS)
    for number, (arm, (label, colour)) in enumerate(_ARMS.items()):
        there: list[tuple[float, SeedMean]] = [
            (groups.index(cell.group) + (number - (len(_ARMS) - 1) / 2) * width, value)
            for cell in cells
            if cell.arm == arm and (value := getattr(cell, measure)) is not None
        ]
        axes.bar(
            [place for place, _ in there],
            [value.mean for _, value in there],
            width,
            # Where there is no interval, nothing is drawn: a span of 0 would look like certainty.
            yerr=[math.nan if value.half is None else value.half for _, value in there] if there else None,
            error_kw={"ecolor": INK, "elinewidth": 1.2},
            capsize=3,
            label=label,
            color=colour,
        )
    axes.set_xticks(range(len(groups)), ["\n+ ".join(group) for group in groups], fontsize=8.5)
    axes.tick_params(axis="x", length=0)


# --- The shape of Beta --------------------------------------------------------------------------------------------


def save_alphas(lines: Iterable[Line], path: Path) -> bool:
    """Draws by α what the best of the draws scored and how far the draws spread, and what more draws give.

    Args:
        lines: The ledger.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.

    Raises:
        M3Error: It cannot be written.
    """
    there = list(lines)
    shapes, depths = shapes_of(there), depths_of(there)
    if not shapes and not depths:
        return False
    figure, (score, spread, depth) = make_figure(3)
    _draw_estimates(
        score, [(shape.alpha, shape.test) for shape in shapes], _ORANGE, "mean and 95 % interval over seeds"
    )
    _draw_estimates(spread, [(shape.alpha, shape.spread) for shape in shapes], _ORANGE)
    _draw_law(spread, shapes)
    _draw_estimates(depth, [(one.draws, one.dev) for one in depths], _ORANGE)
    for panel in (score, spread):
        panel.set_xlabel("α of Beta(α, α)", color=INK)
        _mark(panel, [shape.alpha for shape in shapes])
    depth.set_xlabel("number of draws", color=INK)
    _mark(depth, [one.draws for one in depths])
    spread.set_ylim(0, max(0.55, spread.get_ylim()[1]))
    for panel in (score, depth):
        low, high = panel.get_ylim()
        panel.set_ylim(max(low, 0), min(high, 1))
    score.set_ylabel(f"test accuracy, {AVERAGE} merging of pairs", color=INK)
    spread.set_ylabel("standard deviation of λ", color=INK)
    depth.set_ylabel("dev accuracy, mean of all merges", color=INK)
    for panel, title in (
        (score, "best of the draws"),
        (spread, "spread of the draws"),
        (depth, "best of the first draws"),
    ):
        panel.set_title(title, color=INK, fontsize=11)
    finish_figure(figure, (score, spread, depth), path)
    return True


def _draw_estimates(
    axes: "Axes", points: Sequence[tuple[float, SeedMean | None]], colour: str, label: str | None = None
) -> None:
    there = [(place, value) for place, value in points if value is not None]
    if there:
        axes.errorbar(
            [place for place, _ in there],
            [value.mean for _, value in there],
            yerr=[math.nan if value.half is None else value.half for _, value in there],
            color=colour,
            ecolor=INK,
            elinewidth=1.2,
            capsize=3,
            marker="o",
            label=label,
        )


def _draw_law(axes: "Axes", shapes: Sequence[Shape]) -> None:
    """How far ratios from Beta(α, α) spread."""
    if shapes:
        low, high = shapes[0].alpha, shapes[-1].alpha
        grid = [low * (high / low) ** (place / 100) for place in range(101)]
        law = [1 / (2 * math.sqrt(2 * alpha + 1)) for alpha in grid]
        axes.plot(grid, law, color=_BLUE, linestyle="--", label="Beta's own standard deviation")


def _mark(axes: "Axes", places: Sequence[float]) -> None:
    """A logarithmic axis with ticks where there are points, and nowhere else."""
    from matplotlib.ticker import NullLocator

    if places:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlim(min(places) / 1.25, max(places) * 1.25)
