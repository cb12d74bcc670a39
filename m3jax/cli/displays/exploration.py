"""What people see of an exploration: a live table on a terminal, lines elsewhere, and the summary."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from m3jax.text import count_text, safe_text, table, time_text

if TYPE_CHECKING:  # so that --help starts without JAX
    from m3jax.exploration.exploring import Exploration, Watch
    from m3jax.exploration.samples import Weights
    from m3jax.exploration.selection import Result

_SHOWN = 12  # rows of the live table


def weights_text(weights: "Weights") -> str:
    """Weights in a cell: all of them where there is one group, else their spread.

    Example:
        >>> weights_text({"model": (0.25, 0.75)})
        '0.2500 0.7500'
        >>> weights_text({"a": (0.25, 0.75), "b": (0.5, 0.5)})
        '2 groups, 0.25 to 0.50'
    """
    if len(weights) == 1:
        (values,) = weights.values()
        return " ".join(f"{value:.4f}" for value in values)
    firsts = [values[0] for values in weights.values()]
    return f"{len(firsts)} groups, {min(firsts):.2f} to {max(firsts):.2f}"


def _cells(result: "Result") -> list[str]:
    learned = "" if result.optimized is None else f" from {result.optimized}"
    scores = [f"{score:.4f}" for score in result.scores.values()]
    return [
        f"{result.sample}{learned}",
        weights_text(result.weights),
        f"{result.share:g}",
        *scores,
        f"{result.mean:.4f}",
    ]


def _head(result: "Result") -> list[str]:
    return ["sample", "weights", "share", *result.scores, "mean"]


class _Board:
    """The best results so far, and how far the exploration is."""

    def __init__(self, samples: int) -> None:
        self._samples, self._begun = samples, time.monotonic()
        self.results: list[Result] = []
        self._fresh = 0.0

    def add(self, result: "Result", known: bool) -> None:
        self.results.append(result)
        self._fresh += 0.0 if known else result.share

    def state(self) -> str:
        """How much of the budget is spent, and the time left."""
        spent = sum(result.share for result in self.results)
        said = f"{spent:g} of {self._samples} evaluations"
        left = max(self._samples - spent, 0.0)
        if not self._fresh or not left:
            return said
        return f"{said}, {time_text((time.monotonic() - self._begun) / self._fresh * left)} left"

    def best(self) -> "list[Result]":
        """The results to show, the best first."""
        return sorted(self.results, key=lambda r: (-r.share, -r.mean, r.sample))[:_SHOWN]


def _lines(board: _Board, stream: TextIO) -> "Watch":
    def watch(result: "Result", known: bool) -> None:
        board.add(result, known)
        scores = ", ".join(f"{task} {score:.4f}" for task, score in result.scores.items())
        before = " (before)" if known else ""
        part = "" if result.share == 1.0 else f" on {result.share:.3g} of the examples"
        said = f"sample {_cells(result)[0]}{part}: {weights_text(result.weights)}: {scores}{before}; {board.state()}"
        print(safe_text(said), file=stream, flush=True)

    return watch


def _draw(board: _Board, now: str) -> Any:
    from rich.table import Table
    from rich.text import Text  # text as it is: names may hold what rich takes for markup

    said = f"{board.state()}; {now}" if now else board.state()
    shown = Table(caption=Text(safe_text(said)), caption_justify="left")
    rows = board.best()
    for column in _head(rows[0]) if rows else ["sample"]:
        shown.add_column(Text(safe_text(column)), justify="left" if column == "weights" else "right")
    for row in rows:
        shown.add_row(*(Text(safe_text(cell)) for cell in _cells(row)))
    return shown


@contextmanager
def reporter(samples: int, quiet: bool) -> "Iterator[tuple[Watch | None, Callable[[str], None] | None]]":
    """Shows results on stderr as they come.

    Args:
        samples: The budget.
        quiet: Show nothing.

    Yields:
        What to call with each result, and with a line of text; None where nothing is to be shown.
    """
    if quiet:
        yield None, None
        return
    board = _Board(samples)
    if not sys.stderr.isatty():
        yield _lines(board, sys.stderr), lambda line: print(safe_text(line), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), redirect_stdout=False, transient=True, auto_refresh=False) as live:

        def watch(result: "Result", known: bool) -> None:
            board.add(result, known)
            live.update(_draw(board, ""), refresh=True)

        def tell(line: str) -> None:
            live.update(_draw(board, line), refresh=True)

        yield watch, tell


def exploration_json(found: "Exploration") -> dict[str, Any]:
    """An exploration as plain data."""
    return {
        "directory": str(found.merge.directory),
        "digest": found.merge.digest,
        "journal": str(found.journal),
        "choice": _result_json(found.choice),
        "front": list(found.front),
        "cost": found.cost,
        "losses": list(found.losses),
        "seconds": found.seconds,
        "samples": [_result_json(result) for result in found.results],
    }


def _result_json(result: "Result") -> dict[str, Any]:
    weights = {group: list(values) for group, values in result.weights.items()}
    return {**result._asdict(), "weights": weights, "scores": dict(result.scores)}


def exploration_lines(found: "Exploration", width: int | None = None) -> Iterator[str]:
    """An exploration for people: the best samples, the choice, and where things are.

    Args:
        found: The exploration.
        width: Of the terminal.
    """
    best = sorted((r for r in found.results if r.share == 1.0), key=lambda r: (-r.mean, r.sample))
    shown = best[:_SHOWN] + [r for r in best[_SHOWN:] if r == found.choice]
    yield from table(_head(found.choice), [_cells(result) for result in shown], width, left=2)
    if len(best) > len(shown):
        yield f"and {count_text(len(best) - len(shown), 'sample')} more in {found.journal}"
    yield ""
    if len(found.choice.scores) > 1:
        yield f"Pareto front: {', '.join(map(str, found.front))}"
    spent = f"{found.cost:g} evaluations in {time_text(found.seconds)}"
    yield f"{found.merge.directory}: sample {found.choice.sample}, {spent}"
    yield f"digest   {found.merge.digest}"
