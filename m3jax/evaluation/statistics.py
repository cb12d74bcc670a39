"""Figures that sum up many verdicts."""

import math
from collections import Counter
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


def difference_interval(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """The 95 % interval of the difference of two proportions, from those of each by Wilson's score.

    For independent samples; where only totals are known of the same examples in both, the true one is narrower.

    Args:
        one: Successes and trials.
        other: Those subtracted.

    Example:
        >>> low, high = difference_interval((56, 70), (48, 80))
        >>> round(low, 4), round(high, 4)
        (0.0524, 0.3339)

    References:
        Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven
        methods", 1998, method 10.
    """
    (low, high), (other_low, other_high) = wilson_interval(*one), wilson_interval(*other)
    p, q = one[0] / one[1], other[0] / other[1]
    below, above = math.hypot(p - low, other_high - q), math.hypot(high - p, q - other_low)
    return p - q - below, p - q + above


def paired_interval(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float]:
    """The 95 % interval of the difference of two proportions of the same examples, from those of each by Wilson.

    The more both agree on which examples are hard, the narrower it is; it is no point where they agree on all.

    Args:
        one: Whether each example is right.
        other: Likewise, of what is subtracted.

    Example:
        >>> one, other = [True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2
        >>> low, high = paired_interval(one, other)
        >>> round(low, 4), round(high, 4)
        (0.0569, 0.3404)

    References:
        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
        1998, method 10.
    """
    total = len(one)
    both = sum(mine and theirs for mine, theirs in zip(one, other, strict=True))
    right, other_right = sum(one), sum(other)
    together = float(both * (total - right - other_right + both) - (right - both) * (other_right - both))
    together = max(together - total / 2, 0.0) if together > 0 else together
    scale = math.sqrt(right * (total - right) * other_right * (total - other_right))
    correlation = together / scale if scale else 0.0
    (low, high), (other_low, other_high) = wilson_interval(right, total), wilson_interval(other_right, total)
    p, q = right / total, other_right / total

    def span(mine: float, theirs: float) -> float:
        return math.sqrt(max(mine * mine - 2 * correlation * mine * theirs + theirs * theirs, 0.0))

    return p - q - span(p - low, other_high - q), p - q + span(high - p, q - other_low)


def matthews_correlation(pairs: Sequence[tuple[str, str | None]]) -> float:
    """Matthews' correlation of predictions, 0 where it is undefined.

    Args:
        pairs: Gold label and predicted label; None, for no prediction, is a class of its own that is never right.

    Example:
        >>> matthews_correlation([("a", "a"), ("b", "b")]), matthews_correlation([("a", None), ("b", None)])
        (1.0, 0.0)

    References:
        Matthews, "Comparison of the predicted and observed secondary structure of T4 phage lysozyme", 1975; for more
        than two classes Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """
    total, right = len(pairs), sum(gold == said for gold, said in pairs)
    golds, answers = Counter(gold for gold, _ in pairs), Counter(said for _, said in pairs)
    below = math.prod(total**2 - sum(count**2 for count in counts.values()) for counts in (golds, answers))
    return (right * total - sum(golds[gold] * answers[gold] for gold in golds)) / math.sqrt(below) if below else 0.0
