"""What people see: sizes, tables, summaries and the progress of long work."""

import os
import shlex
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:  # numpy and rich take longer to import than --help may take
    from m3jax.checkpoints.inspection import Comparison, Difference, Mismatch, ModelFacts, Overview
    from m3jax.outputs.conversion import ConvertResult
    from m3jax.outputs.manifest import Verification
    from m3jax.progress import Progress
    from m3jax.streaming.merging import MergeResult

Row = Sequence[str]

# --- Numbers and names -----------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """A number of bytes in decimal units.

    Example:
        >>> size_text(999), size_text(2_200_000_000)
        ('999 B', '2.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or (unit == "B" and count < 1000):
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """A span of time as people say it.

    Example:
        >>> time_text(0.21), time_text(4.4), time_text(200), time_text(4000)
        ('0.2 s', '4 s', '3 min 20 s', '1 h 06 min')
    """
    if seconds < 3:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share_text(part: int, whole: int) -> str:
    """A share in percent, of which 0 % and 100 % are said only where they are exact.

    Example:
        >>> share_text(1, 3), share_text(999_999, 1_000_000), share_text(5, 5)
        ('33.33 %', '99.99 %', '100 %')
    """
    if not whole:
        return "–"
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"


def number_text(value: float | None) -> str:
    """A measured number to four digits; a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def count_text(count: int, noun: str) -> str:
    """A count with its noun: `1 tensor`, `2,000 tensors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def safe_text(text: str) -> str:
    """`text` with control characters escaped, so that no file can steer a terminal by the names it holds."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


# --- Tables ----------------------------------------------------------------------------------------------


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; `None` where it is none, and lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    head: Row, rows: Sequence[Row], width: int | None = None, left: int = 1, spare: int | None = None
) -> Iterator[str]:
    """Aligned lines.

    Args:
        head: The columns' names.
        rows: Their values.
        width: Longest line wanted; where rows would be longer, the first column has lines of its own.
        left: How many columns, from the first, are aligned to the left.
        spare: A column to leave out first where rows would be too long.

    Yields:
        The lines.

    Example:
        >>> print("\\n".join(table(["name", "bytes"], [["bias", "8 B"], ["weight", "128 B"]])))
        name    bytes
        bias      8 B
        weight  128 B
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    stacked = width is not None and sum(widths) + 2 * (len(widths) - 1) > width
    if stacked and spare is not None:
        narrower = [[*row[:spare], *row[spare + 1 :]] for row in (head, *rows)]
        yield from table(narrower[0], narrower[1:], width, left)
        return
    for row in (head, *rows):
        cells = [
            cell.ljust(room) if index < left else cell.rjust(room)
            for index, (cell, room) in enumerate(zip(row, widths, strict=True))
        ]
        if stacked:
            yield row[0]
            yield "    " + "  ".join(cells[1:]).rstrip()
        else:
            yield "  ".join(cells).rstrip()


# --- Checkpoints -----------------------------------------------------------------------------------------


def overview_lines(overview: "Overview", width: int | None = None) -> Iterator[str]:
    """One checkpoint: what it is, every tensor, and totals last, where a long listing leaves the eye."""
    yield safe_text(overview.location) + (f" at {overview.revision}" if overview.revision else "")
    if overview.model:
        yield from _facts(overview.model)
    for key, text in overview.metadata.items():
        yield f"{safe_text(key)}: {safe_text(text)}"
    yield ""
    yield from table(
        ["tensor", "dtype", "shape", "entries", "bytes"],
        [
            [safe_text(info.name), info.dtype, _shape(info.shape), f"{info.size:,}", size_text(info.nbytes)]
            for info in overview.tensors
        ],
        width,
        left=3,
        spare=3,  # the shape says it
    )
    yield ""
    totals = [[kind, f"{count:,}", f"{entries:,}", size_text(size)] for kind, count, entries, size in overview.dtypes]
    if len(totals) != 1:
        totals.append(["all", f"{len(overview.tensors):,}", f"{overview.entries:,}", size_text(overview.bytes)])
    yield from table(["dtype", "tensors", "parameters", "bytes"], totals)
    files = size_text(sum(file.bytes for file in overview.files))
    yield f"{count_text(len(overview.files), f'{overview.format} file')}, {files}"
    if overview.hidden:
        yield f"{count_text(overview.hidden, 'more tensor')} not matched by the filter"


def _facts(model: "ModelFacts") -> Iterator[str]:
    known = [
        *([safe_text(model.model_type)] if model.model_type else []),
        *map(safe_text, model.architectures),
        *([count_text(model.layers, "layer")] if model.layers is not None else []),
        *([f"context {model.context:,}"] if model.context is not None else []),
        *([f"vocabulary {model.vocabulary:,}"] if model.vocabulary is not None else []),
    ]
    if known:
        yield ", ".join(known)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def comparison_lines(comparison: "Comparison", width: int | None = None) -> Iterator[str]:
    """Two checkpoints: every tensor, then all together, then what could not be compared."""
    yield f"a: {safe_text(comparison.a)}"
    yield f"b: {safe_text(comparison.b)}"
    yield ""
    if comparison.tensors:
        rows = [_difference_row(safe_text(name), difference) for name, difference in comparison.tensors]
        total = _difference_row(f"all {len(rows):,}", comparison.total)
        head = ["tensor", "‖a‖", "‖b‖", "‖a−b‖", "cosine", "max |a−b|", "equal", "same sign"]
        yield from table(head, [*rows, total], width)
    yield from _nonfinite(comparison)
    yield from _listed("only in a", map(safe_text, comparison.only_a))
    yield from _listed("only in b", map(safe_text, comparison.only_b))
    yield from _listed("shapes differ", map(_mismatch, comparison.shapes))
    yield from _listed("dtypes differ", map(_mismatch, comparison.dtypes))
    yield ""
    yield _verdict(comparison)


def _difference_row(name: str, difference: "Difference") -> Row:
    return [
        name,
        number_text(difference.norm_a),
        number_text(difference.norm_b),
        number_text(difference.distance),
        "–" if difference.cosine is None else f"{difference.cosine:.6f}",
        number_text(difference.max_difference),
        share_text(difference.equal, difference.entries),
        share_text(difference.same_sign, difference.signed),
    ]


def _nonfinite(comparison: "Comparison") -> Iterator[str]:
    """The tensors with NaNs and infinities, which the norms leave out."""
    found = [
        f"{safe_text(name)}: {difference.nonfinite_a:,} in a, {difference.nonfinite_b:,} in b"
        for name, difference in comparison.tensors
        if difference.nonfinite_a or difference.nonfinite_b
    ]
    yield from _listed("entries that are not finite, left out of the norms", iter(found))


def _mismatch(mismatch: "Mismatch") -> str:
    return f"{safe_text(mismatch.name)}: {mismatch.a} in a, {mismatch.b} in b"


def _listed(heading: str, lines: Iterator[str]) -> Iterator[str]:
    entries = list(lines)
    if entries:
        yield ""
        yield f"{heading} ({len(entries):,}):"
        yield from (f"  {entry}" for entry in entries)


def _verdict(comparison: "Comparison") -> str:
    total = comparison.total
    if comparison.identical:
        return f"the same: {total.entries:,} entries, all equal"
    if not comparison.tensors:
        return "different: no tensor can be compared"
    changed = total.entries - total.equal
    return f"different: {changed:,} of the {total.entries:,} entries compared"


# --- Merges ----------------------------------------------------------------------------------------------

_SHOWN_GROUPS = 4


def merge_lines(result: "MergeResult") -> Iterator[str]:
    """A finished merge: where it is, what it took, what was drawn, and how to have it again."""
    moved = result.bytes_read + result.bytes_written
    rate = f", {size_text(moved / result.seconds)}/s" if result.seconds > 0 else ""
    resumed = f", {count_text(result.resumed_shards, 'shard')} kept from before" if result.resumed_shards else ""
    place = shlex.quote(str(result.directory))
    yield f"merged   {place}"
    yield (
        f"took     {time_text(result.seconds)}: {size_text(result.bytes_read)} read,"
        f" {size_text(result.bytes_written)} written{rate}{resumed}"
    )
    for index, line in enumerate(_weights(result.manifest)):
        yield f"{'' if index else 'weights':<7}  {line}"
    yield f"digest   {result.digest}"
    yield f"replay   m3jax replay {place} NEW_DIRECTORY"


def _weights(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The weights drawn: one line for each expert where there is one group, else for each of the first groups."""
    groups: Mapping[str, Mapping[str, Any]] = manifest.get("weights", {})
    if len(groups) == 1:
        (group,) = groups.values()
        names = _expert_names(manifest.get("recipe", {}), len(group["decimal"]))
        rows = zip(group["decimal"], names, strict=True)
        yield from (f"{_decimal(weight)}  {safe_text(name)}" for weight, name in rows)
        return
    for name, group in list(groups.items())[:_SHOWN_GROUPS]:
        yield f"{'  '.join(map(_decimal, group['decimal']))}  {safe_text(name)}"
    if len(groups) > _SHOWN_GROUPS:
        yield f"… and {len(groups) - _SHOWN_GROUPS:,} more groups, in the manifest"


def _decimal(weight: object) -> str:
    return f"{float(str(weight)):.6f}"


def _expert_names(recipe: Mapping[str, Any], count: int) -> list[str]:
    """The experts' names as the recipe lists them, with or without a base among them."""
    models = [str(entry["model"]) for entry in recipe.get("models", ())]
    others = [model for model in models if model != recipe.get("base_model")]
    numbered = [f"expert {index}" for index in range(count)]
    return next((names for names in (models, others) if len(names) == count), numbered)


def merge_json(result: "MergeResult") -> dict[str, Any]:
    """A finished merge as plain data; the whole manifest is in the directory."""
    return {
        **result._asdict(),
        "directory": str(result.directory),
        "manifest": str(result.directory / "m3jax.json"),
        "seed": result.manifest.get("seed"),
        "weights": result.manifest.get("weights", {}),
    }


def verification_lines(found: "Verification") -> Iterator[str]:
    """A directory compared with its manifest."""
    checked = f"{count_text(found.tensors, 'tensor')} and {count_text(found.files, 'other file')}"
    yield from map(safe_text, found.differences)
    if found.differences:
        yield f"{found.directory}: not as recorded, {count_text(len(found.differences), 'difference')} in {checked}"
    else:
        yield f"{found.directory}: as recorded, {checked}"
    yield f"digest   {found.digest}"


def verification_json(found: "Verification") -> dict[str, Any]:
    """The same as plain data for JSON."""
    return {**found._asdict(), "directory": str(found.directory), "as_recorded": not found.differences}


# --- Conversions -----------------------------------------------------------------------------------------


def convert_lines(result: "ConvertResult") -> Iterator[str]:
    """A finished conversion in a line."""
    yield (
        f"converted {count_text(result.tensors, 'tensor')}, {size_text(result.bytes)}, to {result.format} in"
        f" {shlex.quote(str(result.directory))} in {time_text(result.seconds)}: digest {result.digest}"
    )


def convert_json(result: "ConvertResult") -> dict[str, Any]:
    """The same as plain data for JSON."""
    return {**result._asdict(), "directory": str(result.directory)}


# --- Progress --------------------------------------------------------------------------------------------

_WINDOW = 30.0  # seconds over which a rate is taken: long enough to be steady, short enough to follow a change


class Pace:
    """How fast one stage goes.

    Attributes:
        done: Bytes so far; never falls, though reports of several threads may come out of order.
    """

    def __init__(self, now: float, done: int) -> None:
        """Starts at what is already done, so that a resumed merge does not look fast."""
        self.done = done
        self._first = (now, done)
        self._recent = deque([self._first])

    def update(self, now: float, done: int) -> None:
        """Takes in a report."""
        self.done = max(self.done, done)
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] < now - _WINDOW:
            self._recent.popleft()

    def rate(self) -> float | None:
        """Bytes per second of late, `None` while nothing is known."""
        return _rate(self._recent[0], self._recent[-1])

    def overall(self) -> float | None:
        """Bytes per second from the beginning."""
        return _rate(self._first, self._recent[-1])

    def elapsed(self) -> float:
        """Seconds from the first report to the last."""
        return self._recent[-1][0] - self._first[0]


def _rate(begin: tuple[float, int], end: tuple[float, int]) -> float | None:
    seconds, amount = end[0] - begin[0], end[1] - begin[1]
    return amount / seconds if seconds > 0 and amount > 0 else None


class Display(Protocol):
    """Where progress is drawn."""

    def interval(self, elapsed: float) -> float:
        """Seconds to the next drawing, `elapsed` after the first report."""

    def draw(self, step: "Progress", pace: Pace) -> None:
        """Shows how far a stage is."""


class Reporter:
    """Takes reports from any thread, as often as they come, and passes on what is worth drawing."""

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        self._display = display
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock()
        self._due = self._began + display.interval(0.0)
        self._paces: dict[str, Pace] = {}
        self._finished: set[str] = set()
        self._shown: set[str] = set()

    def __call__(self, step: "Progress") -> None:
        """Takes one report."""
        now = self._clock()
        # Looked at without the lock: at worst a report waits for one that has just been drawn.
        if now < self._due and step.done < step.total and step.stage in self._paces:
            return
        with self._lock:
            if step.stage not in self._finished:
                self._take(step, now)

    def _take(self, step: "Progress", now: float) -> None:
        pace = self._paces.setdefault(step.stage, Pace(now, step.done))
        pace.update(now, step.done)
        if step.done >= step.total:
            self._finished.add(step.stage)
        # What was shown is shown to its end; what was over before anyone could wonder is not shown.
        if now < self._due and not (step.stage in self._finished and step.stage in self._shown):
            return
        self._shown.add(step.stage)
        self._due = now + self._display.interval(now - self._began)
        self._display.draw(step, pace)


class Lines:
    """Progress as plain lines, for logs: every few seconds at first, then once a minute."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def interval(self, elapsed: float) -> float:
        """See `Display.interval`."""
        return min(max(3.0, elapsed / 10), 60.0)

    def draw(self, step: "Progress", pace: Pace) -> None:
        """Writes a line."""
        print(f"{step.stage}: {_state(step, pace)}", file=self._stream, flush=True)


def _state(step: "Progress", pace: Pace) -> str:
    """How far a stage is, how fast, and what is left, as far as it is known."""
    finished = step.done >= step.total
    rate = pace.overall() if finished else pace.rate()
    if finished:
        parts = [f"{size_text(step.total)} in {time_text(pace.elapsed())}"]
    else:
        parts = [f"{100 * pace.done // step.total} % of {size_text(step.total)}"]
    if rate is not None:
        parts.append(f"{size_text(rate)}/s")
        parts += [] if finished else [f"{time_text((step.total - pace.done) / rate)} left"]
    return ", ".join(parts)


class Bars:
    """Progress as bars on a terminal, one for each stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[state]}"))
        # Results may go to stdout meanwhile; rich is to draw on stderr only.
        # Bars vanish at the end: the summary that follows says what they said.
        self.live = RichProgress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True)
        self._tasks: dict[str, Any] = {}

    def interval(self, elapsed: float) -> float:
        """See `Display.interval`."""
        return 0.1

    def draw(self, step: "Progress", pace: Pace) -> None:
        """Moves the stage's bar."""
        # An empty stage is a full bar: rich would show one of unknown length.
        total, completed = (step.total, pace.done) if step.total else (1, 1)
        if step.stage not in self._tasks:
            self._tasks[step.stage] = self.live.add_task(step.stage, total=total, state="")
        self.live.update(self._tasks[step.stage], total=total, completed=completed, state=_state(step, pace))


@contextmanager
def progress_reporter(quiet: bool = False) -> Iterator[Callable[["Progress"], None] | None]:
    """Shows the progress of long work on stderr: bars on a terminal, else lines.

    Args:
        quiet: Show nothing.

    Yields:
        What to call with each report; `None` where nothing is to be shown.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        bars = Bars()
        with bars.live:
            yield Reporter(bars)
    else:
        yield Reporter(Lines(sys.stderr))
