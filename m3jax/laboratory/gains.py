"""What better choices can gain: the best of draws that a curve lets expect, weights of layers, and paired examples."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from m3jax.laboratory.claims import verdict_of
from m3jax.laboratory.experiments import DRAW, EQUAL, M3, METHODS, TUNED
from m3jax.laboratory.outcomes import Group, Line, SeedMean, distinct, mean, over_seeds
from m3jax.laboratory.searches import GRID
from m3jax.methods.mixup import beta_quantile

ALPHAS = (0.2, 0.5, 1.0, 2.0, 5.0)
DRAWS = (1, 2, 4, 8, 16)
_QUANTILES = 4096
_POINTS = 2.0  # that are to be decided, in %
_SURE = 1.959964  # standard deviations of a 95 % interval


# --- Curves -------------------------------------------------------------------------------------------------------


class Expectation(NamedTuple):
    """What draws let expect on one pair's curve.

    Attributes:
        group: The pair.
        alpha: Of Beta(α, α).
        best: Mean dev accuracy of the best of so many draws, by `DRAWS`.
    """

    group: Group
    alpha: float
    best: tuple[float, ...]


class Curve(NamedTuple):
    """What a pair's curve over λ is like.

    Attributes:
        group: The pair.
        middle: Dev accuracy at λ = ½.
        best: The highest.
        at: The λ of it.
        ends: Of the second expert alone, and of the first.
    """

    group: Group
    middle: float
    best: float
    at: float
    ends: tuple[float, float]


def expected_best(ratios: Sequence[float], scores: Sequence[float], alpha: float, draws: int) -> float:
    """The mean of the best of some draws λ ~ Beta(α, α) on a curve, which is straight between its points.

    Args:
        ratios: λ of the curve's points, rising from 0 to 1.
        scores: At these.
        alpha: Of Beta(α, α).
        draws: How many.

    Example:
        >>> round(expected_best([0.0, 1.0], [0.0, 1.0], 1.0, 3), 3)  # of uniform numbers: n / (n + 1)
        0.75
    """
    p = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    values = np.sort(np.interp(beta_quantile(p, alpha, alpha).astype(np.float64), ratios, scores))
    steps = (np.arange(_QUANTILES + 1) / _QUANTILES) ** draws
    return float(np.sum(values * np.diff(steps)))


def _measured_curves(lines: Iterable[Line]) -> list[Line]:
    return [line for line in distinct(lines, "curve") if line["curve"]]


def _points(line: Line) -> tuple[list[float], list[float]]:
    points = sorted((point["weights"][0], mean(point["dev"].values())) for point in line["curve"])
    return [ratio for ratio, _ in points], [score for _, score in points]


def curves_of(lines: Iterable[Line]) -> list[Curve]:
    """What the pairs' curves are like.

    Args:
        lines: The ledger.
    """
    found = []
    for line in _measured_curves(lines):
        ratios, scores = _points(line)
        top = max(range(len(scores)), key=lambda place: (scores[place], -abs(ratios[place] - 0.5)))
        middle = float(np.interp(0.5, ratios, scores))
        found.append(Curve(tuple(line["group"]), middle, scores[top], ratios[top], (scores[0], scores[-1])))
    return found


def expectations_of(lines: Iterable[Line]) -> list[Expectation]:
    """What draws of each shape let expect on the curves that were measured.

    Args:
        lines: The ledger.
    """
    return [
        Expectation(tuple(line["group"]), alpha, tuple(expected_best(*_points(line), alpha, k) for k in DRAWS))
        for line in _measured_curves(lines)
        for alpha in ALPHAS
    ]


# --- Weights of layers --------------------------------------------------------------------------------------------


class WayScores(NamedTuple):
    """What one way of looking for weights gave.

    Attributes:
        way: Its name.
        evaluations: Merges that it examined, at most.
        steps: Of learning.
        seconds: Median time of these.
        dev: Accuracy on the examples that the choice was made on.
        test: Accuracy on others.
        difference: In test accuracy from the best of one ratio's grid, paired by seed; None for that itself.
        verdict: What its interval says.
    """

    way: str
    evaluations: int
    steps: int
    seconds: float
    dev: SeedMean | None
    test: SeedMean | None
    difference: SeedMean | None
    verdict: str


def searches_of(lines: Iterable[Line]) -> list[WayScores]:
    """What every way of looking for weights gave, over pairs and seeds.

    Args:
        lines: The ledger.
    """
    there = [line for line in distinct(lines, "search") if line.get("searches")]
    ways = dict.fromkeys(way for line in there for way in line["searches"])

    def of(way: str) -> WayScores:
        mine = [(line, line["searches"][way]) for line in there if way in line["searches"]]
        pairs = [
            (line["seed"], mean(one["test"].values()) - mean(line["searches"][GRID]["test"].values()))
            for line, one in mine
            if GRID in line["searches"] and way != GRID
        ]
        difference = over_seeds(pairs)
        return WayScores(
            way,
            max(one["evaluations"] for _, one in mine),
            max(one["steps"] for _, one in mine),
            statistics.median(one["seconds"] for _, one in mine),
            over_seeds((line["seed"], mean(one["dev"].values())) for line, one in mine),
            over_seeds((line["seed"], mean(one["test"].values())) for line, one in mine),
            difference,
            verdict_of(difference) if pairs else "",
        )

    return [of(way) for way in ways]


# --- Paired examples ----------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """A difference between two arms over the same examples.

    Attributes:
        more: One arm.
        less: The other.
        method: Of merging; empty for all.
        examples: Over how many examples, of all seeds, it is.
        disagreeing: The share of them that exactly one of the two does right.
        difference: In test accuracy.
        half: Half of its 95 % interval over examples.
        needed: Examples that decide a difference of 2 points, paired.
        unpaired: The same where each arm had examples of its own.
    """

    more: str
    less: str
    method: str
    examples: int
    disagreeing: float
    difference: float
    half: float
    needed: int
    unpaired: int


def paired_of(lines: Iterable[Line]) -> list[Paired]:
    """Differences between arms, example by example, as far as the ledger holds them.

    Args:
        lines: The ledger.
    """
    there = [line for line in distinct(lines, "merge") if all("marks" in arm for arm in line["arms"].values())]
    asked = ((M3, TUNED), (M3, EQUAL), (DRAW, EQUAL))
    found = [_paired(there, more, less, method) for more, less in asked for method in ("", *METHODS)]
    return [one for one in found if one is not None]


def _paired(lines: Sequence[Line], more: str, less: str, method: str) -> Paired | None:
    rights: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
    for line in lines:
        if method in ("", line["method"]) and more in line["arms"] and less in line["arms"]:
            left, right = line["arms"][more]["marks"], line["arms"][less]["marks"]
            for skill in left:
                for place, (a, b) in enumerate(zip(left[skill], right[skill], strict=True)):
                    rights.setdefault((line["seed"], skill, place), []).append((int(a), int(b)))
    pairs = [pair for some in rights.values() for pair in some]
    if not pairs:
        return None
    disagreeing = sum(a != b for a, b in pairs) / len(pairs)
    first, second = sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)
    # What merges of several methods make of one example is one thing: they are much alike.
    gains = [sum(a - b for a, b in some) / len(some) for some in rights.values()]
    half = _SURE * statistics.pstdev(gains) / math.sqrt(len(gains))
    # Where two arms differ by so much, they disagree at least as often.
    single = max(disagreeing - (first - second) ** 2, _POINTS / 100)
    apart = first * (1 - first) + second * (1 - second)
    return Paired(*(more, less, method, len(gains), disagreeing, first - second, half), _needed(single), _needed(apart))


def _needed(variance: float) -> int:
    """Examples with which a 95 % interval is as wide, on either side, as what is to be decided."""
    return math.ceil(variance * (100 * _SURE / _POINTS) ** 2)
