"""What was measured on the paper's claims: differences paired by seed, their intervals, and verdicts by rule.

A difference is taken within one seed, whose arms share their examples, and averaged over all cells that it is about.

References:
    Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from m3jax.laboratory.experiments import DRAW, EQUAL, M3, METHODS, TUNED
from m3jax.laboratory.outcomes import (
    ROUNDING,
    ArmScores,
    Group,
    Line,
    SeedMean,
    averaged_pairs,
    deviation_of,
    estimate,
    mean,
    outcomes,
    over_seeds,
    shapes_of,
)

Point: TypeAlias = tuple[bool, str]
"""With DARE or without it, and an arm."""

PLAIN, DARE = False, True
SPREAD = "spread"

HELD, OPPOSITE, UNDECIDED = "held", "did not hold: the opposite was measured", "undecided"
IN_PART, NOT_HELD = "held in part", "did not hold"

CLAIMS = (
    "M³ improves the merged model across tasks",
    "M³ makes the merged model more robust, out of distribution and under attack or perturbation",
    "M³ does more good than DARE, and the two together do more than either",
    "Beta's shape balances how efficiently ratios are explored against how diverse they are",
)
"""What the abstract of the paper says of its method; where it says adversaries, what they do here."""


# --- Comparisons --------------------------------------------------------------------------------------------------


class Contrast(NamedTuple):
    """One difference, oriented so that above 0 speaks for the claim.

    Attributes:
        name: What less what.
        measure: Of `MEASURES`, or "spread"; of PDR, less is better, so its difference is turned round.
        fair: Whether both sides were chosen at the same budget.
        difference: Its mean over seeds; None where nothing was measured.
        verdict: "held" where the interval is above 0, the opposite where it is below, else "undecided".
    """

    name: str
    measure: str
    fair: bool
    difference: SeedMean | None
    verdict: str


def verdict_of(difference: SeedMean | None) -> str:
    """What an interval says.

    Args:
        difference: Oriented so that above 0 speaks for the claim.

    Example:
        >>> verdict_of(SeedMean(0.3, 0.1, 0.5, 5)), verdict_of(SeedMean(0.3, -0.1, 0.7, 5))
        ('held', 'undecided')
    """
    if difference is None or difference.low is None or difference.high is None:
        return UNDECIDED
    if difference.low > ROUNDING:
        return HELD
    return OPPOSITE if difference.high < -ROUNDING else UNDECIDED


def compared(name: str, measure: str, difference: SeedMean | None, fair: bool = False) -> Contrast:
    """A comparison with its verdict.

    Args:
        name: What less what.
        measure: In what.
        difference: What was measured.
        fair: Whether both sides were chosen at the same budget.
    """
    return Contrast(name, measure, fair, difference, verdict_of(difference))


class Table:
    """Outcomes of merges by seed and cell, from which differences are taken."""

    def __init__(self, found: Iterable[ArmScores]) -> None:
        self._points: dict[tuple[int, Group, str], dict[Point, ArmScores]] = {}
        for one in found:
            if one.kind == "merge":
                self._points.setdefault((one.seed, one.group, one.method), {})[one.dare, one.arm] = one

    def difference(self, pairs: Sequence[tuple[Point, Point]], measure: str, method: str = "") -> SeedMean | None:
        """The mean difference over all cells in which both sides were scored.

        Args:
            pairs: What less what.
            measure: Of `MEASURES`.
            method: Of this method alone.
        """
        sign = -1 if measure == "pdr" else 1
        return over_seeds(
            (key[0], sign * (more - less))
            for key, points in self._points.items()
            for left, right in pairs
            if (not method or key[2] == method) and left in points and right in points
            if (more := points[left].score(measure)) is not None
            if (less := points[right].score(measure)) is not None
        )

    def arms(self, more: str, less: str, measure: str = "test", method: str = "") -> SeedMean | None:
        """One arm less another, with DARE and without.

        Args:
            more: The arm.
            less: The other.
            measure: Of `MEASURES`.
            method: Of this method alone.
        """
        return self.difference([((dare, more), (dare, less)) for dare in (PLAIN, DARE)], measure, method)


# --- Claims -------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A claim of the paper, and what was measured on it.

    Attributes:
        number: From 1.
        text: The claim.
        verdict: "held" where all comparisons held, "held in part" where some did, "did not hold", or "undecided".
        comparisons: Those that the verdict follows from.
        beside: Others, which explain but do not count.
        whole: Whether it is held by all comparisons together or not at all.
    """

    number: int
    text: str
    verdict: str
    comparisons: tuple[Contrast, ...]
    beside: tuple[Contrast, ...]
    whole: bool = False


def verdict_on(comparisons: Sequence[Contrast], whole: bool = False) -> str:
    """What comparisons say together: where the fair ones measured the opposite and none of them held, nothing held.

    Args:
        comparisons: At least one.
        whole: Whether each of them alone says nothing for the claim.
    """
    said = [one.verdict for one in comparisons]
    fair = [one.verdict for one in comparisons if one.fair] or said
    if all(verdict == HELD for verdict in said):
        return HELD
    if HELD not in fair and OPPOSITE in fair:
        return NOT_HELD
    if HELD in said and not whole:
        return IN_PART
    return NOT_HELD if OPPOSITE in said else UNDECIDED


def claims_of(lines: Sequence[Line]) -> tuple[Claim, ...]:
    """The paper's four claims on what was measured.

    Args:
        lines: The ledger.
    """
    found = outcomes(lines)
    table = Table(found)
    stated = (_improves(table), _resists(table), _beats_dare(table), _balances(table, lines))
    return tuple(
        Claim(number, text, verdict_on(one.counted, one.whole), tuple(one.counted), tuple(one.beside), one.whole)
        for number, (text, one) in enumerate(zip(CLAIMS, stated, strict=True), 1)
    )


class _Stated(NamedTuple):
    """What is measured on a claim; see `Claim`."""

    counted: list[Contrast]
    beside: list[Contrast]
    whole: bool = False


_NAMES = {M3: "best of M³'s draws", TUNED: "best of a grid", EQUAL: "equal weights", DRAW: "one draw of M³"}


def _less(more: str, less: str) -> str:
    return f"{_NAMES[more]} less {_NAMES[less]}"


def _improves(table: Table) -> _Stated:
    asked = ((M3, EQUAL, False), (M3, TUNED, True), (DRAW, EQUAL, False))
    counted = [compared(_less(a, b), "test", table.arms(a, b), fair) for a, b, fair in asked]
    beside = [
        compared(f"{_less(M3, other)}, {method}", "test", table.arms(M3, other, method=method), other == TUNED)
        for other, method in itertools.product((EQUAL, TUNED), METHODS)
    ]
    return _Stated(counted, beside)


def _resists(table: Table) -> _Stated:
    def against(measure: str) -> list[Contrast]:
        return [
            compared(_less(M3, other), measure, table.arms(M3, other, measure), other == TUNED)
            for other in (EQUAL, TUNED)
        ]

    return _Stated([*against("shifted"), *against("pdr")], against("attacked"))


def _beats_dare(table: Table) -> _Stated:
    nothing, dare, m3 = (PLAIN, EQUAL), (DARE, EQUAL), (PLAIN, M3)

    def of(name: str, more: Point, less: Point, fair: bool = False) -> Contrast:
        return compared(name, "test", table.difference([(more, less)], "test"), fair)

    counted = [  # both sides choose, so that choosing is not taken for drawing
        of("M³ without DARE less a grid with DARE", m3, (DARE, TUNED), fair=True),
        of("M³ with DARE less M³ without", (DARE, M3), m3, fair=True),
        of("M³ with DARE less a grid with DARE", (DARE, M3), (DARE, TUNED), fair=True),
    ]
    beside = [
        of("one draw of M³ without DARE less equal weights with DARE, where nobody examines", (PLAIN, DRAW), dare),
        of("gain of M³ alone", m3, nothing),
        of("gain of DARE alone", dare, nothing),
        of("gain of M³ alone less gain of DARE alone, which compares a choice with none", m3, dare),
    ]
    return _Stated(counted, beside)


# --- The shape of Beta --------------------------------------------------------------------------------------------


def _by_seed(lines: Sequence[Line]) -> dict[float, dict[int, float]]:
    """Test scores by α and seed, over the pairs that all α were tried on in that seed."""
    scores: dict[float, dict[tuple[int, Group], float]] = {}
    for one in outcomes(averaged_pairs(lines)):
        if one.arm == M3 and one.test is not None:
            scores.setdefault(one.alpha, {})[one.seed, one.group] = one.test
    shared = set.intersection(*(set(mine) for mine in scores.values())) if scores else set()
    seeds = sorted({seed for seed, _ in shared})
    return {
        alpha: {seed: mean(mine[key] for key in shared if key[0] == seed) for seed in seeds}
        for alpha, mine in sorted(scores.items())
    }


def _extremes(scores: dict[float, dict[int, float]], seeds: Sequence[int]) -> tuple[float, float]:
    """The α that did best on some seeds, and the one that did worst."""
    totals = {alpha: math.fsum(mine[seed] for seed in seeds) for alpha, mine in scores.items()}
    return max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)


def _contrast(scores: dict[float, dict[int, float]], seeds: Sequence[int], place: int, which: str) -> Contrast:
    """The α's in the middle less one at the end, all of which are told before anything is measured."""
    alphas = list(scores)
    middle, end = alphas[1:-1], alphas[place] if alphas else 0.0
    if not middle:
        return compared(f"the α's in the middle, averaged, less the {which}", "test", None, fair=True)
    told = ", ".join(f"{alpha:g}" for alpha in middle)
    difference = estimate([mean(scores[alpha][seed] for alpha in middle) - scores[end][seed] for seed in seeds])
    return compared(
        f"the α's in the middle ({told}), averaged, less the {which} ({end:g})", "test", difference, fair=True
    )


def _balances(table: Table, lines: Sequence[Line]) -> _Stated:
    scores = _by_seed(lines) if len(shapes_of(lines)) > 1 else {}
    seeds = list(next(iter(scores.values()), {}))
    counted = [_contrast(scores, seeds, 0, "smallest"), _contrast(scores, seeds, -1, "largest")]
    beside = [compared(_less(M3, DRAW), "test", table.arms(M3, DRAW))]
    if seeds:
        best, worst = _extremes(scores, seeds)
        biased = estimate([scores[best][seed] - scores[worst][seed] for seed in seeds])
        name = f"the best α, {best:g}, less the worst, {worst:g}, picked after the fact, which biases this upwards"
        beside.append(compared(name, "test", biased))
        beside.append(_narrows(lines, min(scores), max(scores)))
    return _Stated(counted, beside, whole=True)  # what rises towards one end is no balance


def _narrows(lines: Sequence[Line], small: float, large: float) -> Contrast:
    sign = {small: 1, large: -1}
    found: dict[tuple[int, Group], dict[float, float]] = {}
    for line in averaged_pairs(lines):
        deviation = deviation_of(line)
        if line["alpha"] in sign and deviation is not None:
            found.setdefault((line["seed"], tuple(line["group"])), {})[line["alpha"]] = deviation
    difference = over_seeds(
        (seed, mine[small] - mine[large]) for (seed, _), mine in found.items() if len(mine) == len(sign)
    )
    return compared(f"ratios drawn with α = {small:g} less those with α = {large:g}", SPREAD, difference)
