"""What people see of an exploration: a live table on a terminal, lines elsewhere, and the summary."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def short_names(names: Sequence[str]) -> list[str]:
    """Names of models as columns are headed: the last part of each path, where that tells them apart.

    Example:
        >>> short_names(["org/math-7b", "org/code-7b"]), short_names(["a/final", "b/final"])
        (['math-7b', 'code-7b'], ['a/final', 'b/final'])
    """
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return last if len(set(last)) == len(names) else list(names)


def _named(result: "Result") -> str:
    if result.reference is not None:
        return result.reference if result.weights else short_names([result.reference])[0]
    return f"{result.sample}" if result.optimized is None else f"{result.sample} from {result.optimized}"


def _weight_cells(result: "Result", experts: Sequence[str]) -> list[str]:
    """Weights under the experts' names where there is one group with one for each, else in one cell."""
    if not experts:
        return [weights_text(result.weights) if result.weights else ""]
    if not result.weights:
        return [""] * len(experts)
    firsts = next(iter(result.weights.values()))
    if set(result.weights.values()) != {firsts}:  # of a layer each
        return [weights_text(result.weights), *[""] * (len(experts) - 1)]
    return [f"{weight:.4f}" for weight in firsts]


def score_text(score: float, examples: int | None) -> str:
    """A score with its 95 % interval, where it is known of how many examples.

    Example:
        >>> score_text(0.5, None), score_text(0.5, 32)
        ('0.5000', '0.5000 [0.34, 0.66]')
    """
    if not examples:
        return f"{score:.4f}"
    from m3jax.evaluation.statistics import wilson_interval

    low, high = wilson_interval(round(score * examples), examples)
    return f"{score:.4f} [{low:.2f}, {high:.2f}]"


def _cells(result: "Result", experts: Sequence[str], examples: Mapping[str, int], chosen: bool = False) -> list[str]:
    counts = {task: math.ceil(result.share * count) for task, count in examples.items()}
    scores = [score_text(score, counts.get(task)) for task, score in result.scores.items()]
    return [
        _named(result) + " *" * chosen,
        *_weight_cells(result, experts),
        *([] if experts else [f"{result.share:.3g}" + " stopped" * (result.most is not None)]),
        *scores,
        *([f"{result.mean:.4f}"] if len(scores) > 1 else []),
    ]


def _head(result: "Result", experts: Sequence[str]) -> list[str]:
    means = ["mean"] if len(result.scores) > 1 else []
    return ["sample", *(short_names(experts) or ["weights", "share"]), *result.scores, *means]


def _spent(result: "Result") -> float:
    """Of the budget; what was stopped has had its turn."""
    return 1.0 if result.most is not None else result.share


def _stopped_text(result: "Result") -> str:
    """On how many examples a result is, where it is not on all."""
    if result.most is not None:
        most = ", ".join(f"{task} {score:.4f}" for task, score in result.most.items())
        return f" stopped at {result.share:.3g} of the examples (at most {most})"
    return "" if result.share == 1.0 else f" on {result.share:.3g} of the examples"


class _Board:
    """The best results so far, and how far the exploration is."""

    def __init__(self, samples: int) -> None:
        self._samples, self._begun = samples, math.inf
        self.references: list[Result] = []
        self.results: list[Result] = []
        self._fresh = 0.0

    def add(self, result: "Result", known: bool) -> None:
        if result.reference is not None:
            self.references.append(result)
            return
        self.results.append(result)
        if known or result.optimized is not None:
            return
        if self._begun == math.inf:  # in the first sample of a run programs are compiled, which tells of no other
            self._begun = time.monotonic()
        else:
            self._fresh += _spent(result)

    def state(self) -> str:
        """How much of the budget is spent, what was learned beside it, and the time left once it can be known."""
        learned = sum(result.optimized is not None for result in self.results)
        spent = sum(_spent(result) for result in self.results if result.optimized is None)
        beside = f" and {learned} learned" if learned else ""
        said = f"{spent:g} of {self._samples} evaluations{beside}"
        left = max(self._samples - spent, 0.0)
        if not self._fresh or not left or learned:
            return said
        return f"{said}, {time_text((time.monotonic() - self._begun) / self._fresh * left)} left"

    def best(self) -> "list[Result]":
        """The results to show: what samples are measured against, then the best samples first."""
        return self.references + sorted(self.results, key=lambda r: (-r.share, -r.mean, r.sample))[:_SHOWN]


def _lines(board: _Board, stream: TextIO) -> "Watch":
    def watch(result: "Result", known: bool) -> None:
        board.add(result, known)
        scores = ", ".join(f"{task} {score:.4f}" for task, score in result.scores.items())
        before = " (before)" if known else ""
        part = _stopped_text(result)
        named = _named(result) if result.reference is not None else f"sample {_named(result)}"
        weights = f": {weights_text(result.weights)}" if result.weights else ""
        state = "" if result.reference is not None else f"; {board.state()}"
        said = f"{named}{part}{weights}: {scores}{before}{state}"
        print(safe_text(said), file=stream, flush=True)

    return watch


def _draw(board: _Board, now: str) -> Any:
    from rich.table import Table
    from rich.text import Text  # text as it is: names may hold what rich takes for markup

    said = f"{board.state()}; {now}" if now else board.state()
    shown = Table(caption=Text(safe_text(said)), caption_justify="left")
    rows = board.best()
    for column in _head(rows[0], ()) if rows else ["sample"]:
        shown.add_column(Text(safe_text(column)), justify="left" if column == "weights" else "right")
    for row in rows:
        shown.add_row(*(Text(safe_text(cell)) for cell in _cells(row, (), {})))
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


def _cost_text(cost: float) -> str:
    """What samples amount to, in whole evaluations.

    Example:
        >>> _cost_text(3.91667), _cost_text(16.0), _cost_text(1.0)
        ('3.9 evaluations', '16 evaluations', '1 evaluation')
    """
    shown = f"{cost:.1f}".removesuffix(".0")
    return f"{shown} evaluation{'s' * (shown != '1')}"


def exploration_lines(found: "Exploration", width: int | None = None) -> Iterator[str]:
    """An exploration for people: what samples are measured against, the best of them, the choice, and what is in doubt.

    Args:
        found: The exploration.
        width: Of the terminal.
    """
    best = sorted((r for r in found.results if r.share == 1.0), key=lambda r: (-r.mean, r.sample))
    shown = best[:_SHOWN] + [r for r in best[_SHOWN:] if r == found.choice]
    chosen = [result == found.choice for result in shown]
    rows = [_cells(result, found.experts, found.examples) for result in found.references]
    rows += [_cells(r, found.experts, found.examples, is_it) for r, is_it in zip(shown, chosen, strict=True)]
    yield from table(_head(found.choice, found.experts), rows, width, left=1)
    if len(best) > len(shown):
        yield f"and {count_text(len(best) - len(shown), 'sample')} more in {found.journal}"
    stopped = sum(result.most is not None for result in found.results)
    if stopped:
        were = "was" if stopped == 1 else "were"
        yield f"{count_text(stopped, 'sample')} {were} stopped early, as no answers that were left could make up for it"
    yield ""
    if len(found.choice.scores) > 1:
        yield f"Pareto front: {', '.join(map(str, found.front))}"
    spent = f"{_cost_text(found.cost)} in {time_text(found.seconds)}"
    yield f"{found.merge.directory}: sample {found.choice.sample}, {spent}"
    yield f"digest   {found.merge.digest}"
    for remark in found.remarks:
        yield f"note: {remark}"
    if found.examples:
        task = next(iter(found.examples))
        yield f"next: m3jax evaluate {found.merge.directory} --task {task} --data OTHER_EXAMPLES"
