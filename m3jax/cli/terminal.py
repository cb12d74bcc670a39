"""What a terminal shows while work goes on: its width, and progress as bars or lines."""

import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from m3jax.text import count_text, safe_text, size_text, time_text

if TYPE_CHECKING:  # nothing that --help has no use for is imported
    from m3jax.progress import Progress


def width() -> int | None:
    """Columns of the terminal that stdout is; `None` where it is none, and lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


# --- Progress ---------------------------------------------------------------------------------------------------------

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
        print(f"{safe_text(step.stage)}: {_state(step, pace)}", file=self._stream, flush=True)


def _state(step: "Progress", pace: Pace) -> str:
    """How far a stage is, how fast, and what is left, as far as it is known."""
    finished = step.done >= step.total
    rate = pace.overall() if finished else pace.rate()
    whole = count_text(step.total, step.counted) if step.counted else size_text(step.total)
    if finished:
        parts = [f"{whole} in {time_text(pace.elapsed())}"]
    else:
        parts = [f"{100 * pace.done // step.total} % of {whole}"]
    if rate is not None:
        parts.append(f"{rate:.3g}/s" if step.counted else f"{size_text(rate)}/s")
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
            self._tasks[step.stage] = self.live.add_task(safe_text(step.stage), total=total, state="")
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
