"""A picture of what differs between two models: maps of layers and modules, one for each measure."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax.anatomy.roles import ROLES, Role
from m3jax.errors import M3Error
from m3jax.evaluation.ownership import PICTURES, check_unmade
from m3jax.laboratory.figures import INK, write_whole
from m3jax.streaming.differences import Differences, MeasuredGroup, Measures
from m3jax.text import safe_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")

_MODULES: dict[Role, str] = {"mlp": "MLP", "norm": "norms"}
_HATCHED: dict[str, Any] = {"facecolor": "#ececec", "edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0}
_FEW_ROWS = 16  # that have room for numbers
_MOST_LABELS = 34
_LONGEST_NAME = 60
_HEADING = 14  # letters of the heading on an inch


class _Panel(NamedTuple):
    """One map.

    Attributes:
        title: What is drawn.
        value: Of a cell; None where it is not defined.
        middle: Which value means neither of two things, so that it is between two hues; None where there is none.
        limits: Of the colours; those of the values if None.
        scale: What values are shown times: 100 for shares in percent.
    """

    title: str
    value: Callable[[Measures], float | None]
    middle: float | None = None
    limits: tuple[float, float] | None = None
    scale: float = 1.0


def _panels(found: Differences) -> list[_Panel]:
    """The maps that there are."""
    based = found.base is not None
    norms = [_Panel("‖A − B‖ / ‖A‖", lambda told: told.relative)]
    if based:
        norms = [
            _Panel("‖δA‖ / ‖base‖", lambda told: told.relative_a),
            _Panel("‖δB‖ / ‖base‖", lambda told: told.relative_b),
        ]
    of, chance = ("δA and δB", (0.0, 50.0)) if based else ("A and B", (None, None))
    cosine = _Panel(f"cosine of {of}", lambda told: told.cosine, chance[0])
    signs = _Panel(f"equal signs of {of} (%)", lambda told: told.sign_agreement, chance[1], scale=100.0)
    fitted = [
        _Panel("λ of merge ≈ λA + (1−λ)B", lambda told: told.lambda_),
        _Panel("of merge, explained by λ (%)", lambda told: told.explained, None, (0.0, 100.0), 100.0),
    ]
    return [*norms, cosine, signs, *(fitted if found.merge is not None else [])]


def check_picture(path: Path) -> None:
    """Raise M3Error where no picture can be written, or it would replace what is none, before anything is measured."""
    _check_place(path)
    check_unmade(path)


def _check_place(path: Path) -> None:
    if _format_of(path) not in FORMATS:
        raise M3Error(f"{path}: a picture is written as .png or .svg: choose such a name")
    if not path.parent.is_dir():
        raise M3Error(f"{path}: its directory does not exist: make it, or choose another place")


def save_map(found: Differences, path: Path) -> bool:
    """Draws relative norms, cosine, signs and, of a merge, λ: layers from top to bottom, modules from left to right.

    What is not defined is hatched grey; what the models have not is blank.

    Args:
        found: What differs.
        path: The file, .png or .svg.

    Returns:
        Whether there was anything to draw.

    Raises:
        M3Error: It cannot be written.
    """
    _check_place(path)
    cells = found.cells()
    if not cells:
        return False
    rows = list(dict.fromkeys(cell.name for cell in cells))
    modules = [role for role in ROLES if any(cell.module == role for cell in cells)]
    panels = _panels(found)
    figure, axes = _figure(len(panels), len(rows), len(modules))
    undefined = [
        _draw(
            figure,
            axis,
            panel,
            _matrix(cells, rows, modules, panel),
            left=number % _columns(len(panels), len(rows)) == 0,
        )
        for number, (axis, panel) in enumerate(zip(axes, panels, strict=True))
    ]
    for axis in axes:
        axis.set_xticks(range(len(modules)), [_MODULES.get(role, role) for role in modules], rotation=45, ha="right")
    _label(figure, found, any(undefined))
    drawn = io.BytesIO()
    kind = _format_of(path)
    metadata: dict[str, str | None] = {**PICTURES[kind], **({"Date": None} if kind == "svg" else {})}
    figure.savefig(drawn, format=kind, dpi=144, metadata=metadata)
    write_whole(path, drawn.getvalue())
    return True


class _Matrix(NamedTuple):
    """What is drawn in a map.

    Attributes:
        rows: The names of layers.
        values: By row and module; NaN where there is none.
        undefined: The cells, row and column, that the models have but whose value is not defined.
    """

    rows: Sequence[str]
    values: list[list[float]]
    undefined: list[tuple[int, int]]


def _matrix(cells: Sequence[MeasuredGroup], rows: Sequence[str], modules: Sequence[Role], panel: _Panel) -> _Matrix:
    matrix = [[math.nan] * len(modules) for _ in rows]
    undefined = []
    for cell in cells:
        if cell.module is None:
            continue
        value, row, column = panel.value(cell.measures), rows.index(cell.name), modules.index(cell.module)
        if value is None:
            undefined.append((row, column))
        else:
            matrix[row][column] = panel.scale * value
    return _Matrix(rows, matrix, undefined)


def _columns(panels: int, rows: int) -> int:
    """How many maps stand beside each other: deep models are higher than wide."""
    return panels if rows > _FEW_ROWS else 2 if panels == 4 else min(panels, 3)


def _figure(panels: int, rows: int, modules: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(panels, rows)
    lines = math.ceil(panels / columns)
    wide, high = (0.62, 0.34) if rows <= _FEW_ROWS else (0.5, 0.26)
    width, height = (wide * modules + 1.0) * columns + 1.2, (min(max(high * rows, 1.4), 11.0) + 1.5) * lines
    figure = Figure(figsize=(max(width, 8.0), height + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    for axis in axes[:panels]:
        axis.spines[:].set_visible(False)
        axis.tick_params(colors=INK, length=0, labelsize=9)
    return figure, axes[:panels]


def _limits(panel: _Panel, defined: Sequence[float]) -> tuple[float, float]:
    """Which values have the outermost colours."""
    if panel.limits is not None:
        return panel.limits
    low, high = min(defined, default=0.0), max(defined, default=1.0)
    if panel.middle is not None:
        reach = max(abs(low - panel.middle), abs(high - panel.middle)) or 1.0
        return panel.middle - reach, panel.middle + reach
    if high - low <= 1e-9 * abs(high):  # one value: in the middle of the colours
        return low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return low, high


def _draw(figure: "Figure", axis: "Axes", panel: _Panel, matrix: _Matrix, left: bool) -> bool:
    """One map; returns whether something in it is not defined."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    rows, values, undefined = matrix
    defined = [value for row in values for value in row if not math.isnan(value)]
    low, high = _limits(panel, defined)
    colours = "cividis" if panel.middle is None else "PuOr"  # both can be read by people who see few colours
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    for row, column in undefined:
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_HATCHED))
    spread = max(defined, default=1.0) - min(defined, default=0.0)
    finest = 4 if panel.scale == 1.0 else 1
    places = min(max(math.ceil(-math.log10(spread)) + 1, 0), finest) if spread > 0 else finest
    for row, line in enumerate(values if len(rows) <= _FEW_ROWS else []):
        for column, value in enumerate(line):
            if not math.isnan(value):
                ink = _ink_on(image.cmap((value - low) / (high - low)))
                axis.text(column, row, f"{value:.{places}f}", ha="center", va="center", fontsize=7.5, color=ink)
    for place in range(1, len(rows)):
        axis.axhline(place - 0.5, color="white", linewidth=0.6)
    for place in range(1, len(values[0])):
        axis.axvline(place - 0.5, color="white", linewidth=0.6)
    shown = list(range(0, len(rows), math.ceil(len(rows) / _MOST_LABELS)))
    axis.set_yticks(shown, [_drawn(rows[place]) if left else "" for place in shown])
    axis.set_title(panel.title, fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=axis, orientation="horizontal", fraction=0.05, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.ax.tick_params(colors=INK, labelsize=8)
    return bool(undefined)


def _ink_on(colour: Any) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _label(figure: "Figure", found: Differences, undefined: bool) -> None:
    """What is compared, and what grey means."""
    from matplotlib.patches import Patch

    named = [("A", found.a), ("B", found.b), ("base", found.base), ("merge", found.merge)]
    told = [f"{role}: {_drawn(name)}" for role, name in named if name is not None]
    said = "     ".join(told) if sum(map(len, told)) < _HEADING * figure.get_figwidth() else "\n".join(told)
    figure.suptitle(said, fontsize=9, color=INK)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.06)  # type: ignore[union-attr, call-arg]
    if undefined:
        patch = Patch(**_HATCHED, label="not defined (no difference to measure)")
        figure.legend(handles=[patch], loc="outside lower right", fontsize=8, frameon=False, labelcolor=INK)


def _format_of(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _drawn(name: str) -> str:
    """A name as a picture has it, in which dollars would begin a formula."""
    shown = name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME:]}"
    return safe_text(shown).replace("$", r"\$")
