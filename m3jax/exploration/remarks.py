"""What the scores of an exploration cannot tell."""

from collections.abc import Mapping, Sequence

from m3jax.evaluation.statistics import difference_interval
from m3jax.exploration.references import EQUAL
from m3jax.exploration.selection import Result
from m3jax.text import count_text

_FEW = 2  # right answers, below which the order of samples is chance


def are_told_apart(one: Result, other: Result, examples: Mapping[str, int]) -> bool:
    """Whether two results differ in a task by more than the 95 % interval of their difference.

    Args:
        one: On all examples.
        other: Likewise.
        examples: By task, how many there are.
    """
    for task, count in examples.items():
        right = [(round(result.scores[task] * count), count) for result in (one, other)]
        low, high = difference_interval(right[0], right[1])
        if low > 0 or high < 0:
            return True
    return False


def _alone(choice: Result, experts: Sequence[str]) -> str | None:
    """The expert that has all the weight, in every group, to the digits that are shown."""
    found = set()
    for values in choice.weights.values():
        weights = (1 - values[0], values[0]) if len(values) == 1 else values  # a position between two
        if len(weights) != len(experts):
            return None
        found.add(tuple(round(weight / (sum(weights) or 1.0), 4) for weight in weights))
    only = next(iter(found), ())
    return experts[only.index(1)] if len(found) == 1 and len(only) > 1 and only.count(0) == len(only) - 1 else None


def _is_no_worse(one: Result, other: Result) -> bool:
    """Whether a result is at least as good as another in every task."""
    return all(one.scores[task] >= score for task, score in other.scores.items())


def remarks_on(
    choice: Result,
    results: Sequence[Result],
    references: Sequence[Result],
    examples: Mapping[str, int],
    experts: Sequence[str] = (),
) -> tuple[str, ...]:
    """Sentences, of which none is needed where the choice is beyond doubt.

    Args:
        choice: The chosen sample.
        results: All samples.
        references: What they are measured against.
        examples: By task, how many a whole evaluation is on; of a score of one's own nothing is said.
        experts: What the recipe calls them, in the order of weights.
    """
    whole = [result for result in results if result.share == 1.0]
    found = []
    for task, count in examples.items():
        most = max(round(result.scores[task] * count) for result in whole)
        if most <= _FEW:
            found.append(
                f"{task}: no sample has more than {count_text(most, 'right answer')} of {count}, so their order is"
                " chance: take more examples, or a task that the experts can do"
            )
    equal = next((result for result in references if result.reference == EQUAL), None)
    if equal is not None and examples and not are_told_apart(choice, equal, examples):
        sizes = ", ".join(f"{count_text(count, 'example')} of {task}" for task, count in examples.items())
        found.append(f"on {sizes} the chosen sample cannot be told apart from equal weights (95 %)")
    alone = _alone(choice, experts)
    matched = [r.reference for r in references if r.reference and not r.weights and _is_no_worse(r, choice)]
    if alone is not None:
        found.append(f"the chosen sample has all its weight on {alone}: nothing of the others is merged into it")
    elif matched and examples and choice.share == 1.0:
        found.append(f"the chosen sample is in no task better than {' or '.join(matched)} by itself")
    if examples and len(results) > 1:  # those that were stopped were compared as well
        found.append("its scores are of the examples that chose it, so they flatter it: evaluate it on others")
    return tuple(found)
