"""Figures that sum up many verdicts."""

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054  # standard normal quantile of 0.975


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion by Wilson's score, which keeps within [0, 1] and holds for few examples too.

    Args:
        correct: Number of successes.
        total: Number of trials, at least one.

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    rate, square = correct / total, _Z95 * _Z95
    centre = (rate + square / (2 * total)) / (1 + square / total)
    half = _Z95 / (1 + square / total) * math.sqrt(rate * (1 - rate) / total + square / (4 * total * total))
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return low, high


def matthews_correlation(pairs: Sequence[tuple[str, str | None]]) -> float:
    """Matthews' correlation of two-class predictions, 0 where it is undefined.

    Args:
        pairs: Gold label and predicted label; a prediction of None counts as the label that is wrong.

    References:
        Matthews, "Comparison of the predicted and observed secondary structure of T4 phage lysozyme", 1975.
    """
    labels = sorted({gold for gold, _ in pairs} | {said for _, said in pairs if said is not None})
    if len(labels) != 2:
        return 0.0
    positive, negative = labels[1], labels[0]
    other = {positive: negative, negative: positive}
    counted = [(gold == positive, (said if said is not None else other[gold]) == positive) for gold, said in pairs]
    tp, tn = counted.count((True, True)), counted.count((False, False))
    fp, fn = counted.count((False, True)), counted.count((True, False))
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0
