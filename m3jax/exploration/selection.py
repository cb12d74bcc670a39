"""Which sample is the best: by the mean over tasks, by one task, or on the Pareto front of all of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.exploration.samples import Weights

MEAN, PARETO = "mean", "pareto"


class Result(NamedTuple):
    """One evaluated sample.

    Attributes:
        sample: Its number.
        weights: Its merging weights, by group.
        share: Of the dev examples that it was evaluated on.
        scores: By task, larger being better.
        seconds: Wall time of merging and evaluating.
        granularity: Of the weights: "model", "layer" or "tensor".
        optimized: The number of the sample that learning started from, for learned weights.
        learning: Digest of how they were learned.
        reference: What it is, where it is no sample but what samples are measured against; its number is below 0.
        most: What it could have reached at most, by task, where it was stopped; its scores are of what it was shown.
    """

    sample: int
    weights: Weights
    share: float
    scores: Mapping[str, float]
    seconds: float
    granularity: str
    optimized: int | None = None
    learning: str | None = None
    reference: str | None = None
    most: Mapping[str, float] | None = None

    @property
    def mean(self) -> float:
        """Over tasks."""
        return sum(self.scores.values()) / len(self.scores)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        weights = {group: list(values) for group, values in self.weights.items()}
        most = None if self.most is None else dict(self.most)
        return {**self._asdict(), "weights": weights, "scores": dict(self.scores), "most": most}


def value(result: Result, select: str) -> float:
    """What a strategy tries to make large; the mean, where the choice is of a front or of a number."""
    return result.scores.get(select, result.mean)


def check_select(select: str, tasks: Sequence[str], most: int | None = None) -> None:
    """Raise M3Error unless a choice can be made this way.

    Args:
        select: How to choose.
        tasks: The tasks' names.
        most: The largest number that a sample will have, where it is known before.
    """
    if select not in (MEAN, PARETO, *tasks) and not select.isdecimal():
        known = ", ".join((MEAN, PARETO, *tasks))
        raise M3Error(f"select is {select!r}, but must be one of {known}, or the number of a sample")
    if select.isdecimal() and most is not None and int(select) > most:
        raise M3Error(f"select: there is no sample {select}: the numbers go to {most}")


def dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether scores are at least as good in every task as others, and better in one.

    Args:
        one: Scores by task.
        other: Of the same tasks.
    """
    pairs = [(one[task], other[task]) for task in one]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """The results that no other one equals or beats in every task; of equals, all.

    Args:
        results: Evaluated on the same examples.
    """
    return [result for result in results if not any(dominates(o.scores, result.scores) for o in results)]


def choose(results: Sequence[Result], select: str) -> Result:
    """The chosen result; ties go to the better mean, then to the smaller number.

    Args:
        results: All of them; those on a part of the examples do not count.
        select: "mean", a task, "pareto" (the front's result whose worst task, relative to the best score found in
            it, is best), or the number of a sample.

    Raises:
        M3Error: There is no such sample.
    """
    whole = [result for result in results if result.share == 1.0]
    if select.isdecimal():
        last = next((result for result in reversed(results) if result.sample == int(select)), None)
        if last is None:
            raise M3Error(f"select: there is no sample {select}: the numbers go to {max(r.sample for r in results)}")
        return last
    if select == PARETO:
        front = pareto_front(whole)
        best = {task: max(result.scores[task] for result in whole) for task in whole[0].scores}

        def worst(result: Result) -> float:
            return min(result.scores[task] / best[task] if best[task] > 0 else 1.0 for task in best)

        return min(front, key=lambda result: (-worst(result), -result.mean, result.sample))
    return min(whole, key=lambda result: (-value(result, select), -result.mean, result.sample))
