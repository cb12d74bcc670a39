"""What the experiments' arms scored, as means over seeds with intervals.

Everything here is a pure function of the ledger's lines. Seeds are what intervals are over: whatever else is averaged
is averaged within a seed first.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from scipy.special import stdtrit

from m3jax.laboratory.experiments import AVERAGE, DRAW, M3

Group: TypeAlias = tuple[str, ...]
Line: TypeAlias = Mapping[str, Any]

MEASURES = ("test", "shifted", "attacked", "pdr")
SHARES = MEASURES[:3]
"""Those that are shares of examples done right."""

ROUNDING = 1e-9
"""Smaller differences are sums in another order."""


# --- Estimates ----------------------------------------------------------------------------------------------------


class SeedMean(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: The mean.
        low: Where its 95 % interval begins; None for one seed, which has none.
        high: Where it ends.
        seeds: How many there are.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None also where all seeds agree, which say nothing of how others would."""
        half = None if self.high is None else self.high - self.mean
        return None if half is None or half <= ROUNDING else half


def estimate(values: Sequence[float]) -> SeedMean | None:
    """The mean with its 95 % interval by Student's t; None of nothing.

    Args:
        values: One for each seed.

    Example:
        >>> mean, low, high, seeds = estimate([1.0, 2.0, 3.0])
        >>> mean, round(low, 4), round(high, 4), seeds
        (2.0, -0.4841, 4.4841, 3)
    """
    count = len(values)
    if count < 2:
        return SeedMean(values[0], None, None, 1) if values else None
    mean = math.fsum(values) / count
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return SeedMean(mean, mean - half, mean + half, count)


def over_seeds(values: Iterable[tuple[int, float | None]]) -> SeedMean | None:
    """Estimates a mean from any number of values per seed, which are averaged first; None counts as not there.

    Args:
        values: Seeds and values.
    """
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    return estimate([math.fsum(some) / len(some) for _, some in sorted(by_seed.items())])


# --- Scores -------------------------------------------------------------------------------------------------------


class ArmScores(NamedTuple):
    """What one arm of one experiment scored.

    Attributes:
        kind: The experiment's, "merge" or "alpha".
        seed: Its seed.
        group: The experts.
        method: How they were merged.
        dare: Whether task vectors were sparsified first.
        alpha: Of Beta(α, α).
        arm: How the ratio was found.
        test: Mean accuracy over the group's skills; None where it was not measured, and so for the others.
        shifted: The same out of distribution.
        attacked: The same under attack or perturbation.
        pdr: Performance drop rate pooled over the group's skills, 1 − Σ attacked / Σ clean; None also where nothing was
            right without adversaries.
    """

    kind: str
    seed: int
    group: Group
    method: str
    dare: bool
    alpha: float
    arm: str
    test: float | None
    shifted: float | None
    attacked: float | None
    pdr: float | None

    def score(self, measure: str) -> float | None:
        """One of `MEASURES`."""
        value: float | None = getattr(self, measure)
        return value


def distinct(lines: Iterable[Line], *kinds: str) -> list[Line]:
    """The lines of some kinds; of a job that stands there twice the last.

    Args:
        lines: The ledger.
        kinds: The kinds of jobs.
    """
    return list({line["job"]: line for line in lines if line["kind"] in kinds}.values())


def outcomes(lines: Iterable[Line]) -> list[ArmScores]:
    """What every arm that is there scored.

    Args:
        lines: The ledger.
    """
    return [
        outcome_of(line, arm, result)
        for line in distinct(lines, "merge", "alpha")
        for arm, result in line.get("arms", {}).items()
    ]


def outcome_of(line: Line, arm: str, result: Mapping[str, Any]) -> ArmScores:
    """What one arm scored.

    Args:
        line: The experiment's.
        arm: The arm.
        result: Its scores on the group's skills.
    """
    group = tuple(line["group"])
    # Adversaries are not let loose on single draws: where one has figures, it is another arm's choice too.
    resistance = [] if arm == DRAW else list(result.get("resistance", {}).values())
    clean, attacked = (math.fsum(one[what] for one in resistance) for what in ("clean", "attacked"))
    return ArmScores(
        *(line["kind"], line["seed"], group, line["method"], line["dare"], line["alpha"], arm),
        test=mean(result["test"].values()) if "test" in result else None,
        shifted=mean(result["shifted"].values()) if "shifted" in result else None,
        attacked=attacked / len(resistance) if resistance else None,
        pdr=1 - attacked / clean if clean else None,
    )


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean.

    Args:
        values: At least one.
    """
    there = list(values)
    return math.fsum(there) / len(there)


class Cell(NamedTuple):
    """What one arm scored over all seeds.

    Attributes:
        group: The experts.
        method: How they were merged; empty where it is the mean over all methods, with DARE and without.
        dare: Whether task vectors were sparsified first.
        arm: How the ratio was found.
        test: Accuracy.
        shifted: Accuracy out of distribution.
        attacked: Accuracy under attack or perturbation.
        pdr: Performance drop rate, pooled over the group's skills.
    """

    group: Group
    method: str
    dare: bool | None
    arm: str
    test: SeedMean | None
    shifted: SeedMean | None
    attacked: SeedMean | None
    pdr: SeedMean | None


def cells_of(found: Iterable[ArmScores], whole: bool = False) -> list[Cell]:
    """The paper's tables: every group, method and arm, with DARE and without.

    Args:
        found: What was scored; only merges are taken.
        whole: One cell for all methods, with DARE and without.
    """
    gathered: dict[tuple[Group, str, bool | None, str], list[ArmScores]] = {}
    for one in found:
        if one.kind == "merge":
            key = (one.group, "", None, one.arm) if whole else (one.group, one.method, one.dare, one.arm)
            gathered.setdefault(key, []).append(one)
    return [
        Cell(*key, *(over_seeds((one.seed, one.score(measure)) for one in some) for measure in MEASURES))
        for key, some in gathered.items()
    ]


class ModelCell(NamedTuple):
    """What the base or an expert scored in one skill.

    Attributes:
        model: The model.
        skill: The skill.
        test: Accuracy.
        shifted: Accuracy out of distribution.
        attacked: Accuracy under its adversary.
        pdr: Performance drop rate; of the seeds in which something was right without the adversary.
        adversary: What that did.
    """

    model: str
    skill: str
    test: SeedMean | None
    shifted: SeedMean | None
    attacked: SeedMean | None
    pdr: SeedMean | None
    adversary: str


def models_of(lines: Iterable[Line]) -> list[ModelCell]:
    """What base and experts scored.

    Args:
        lines: The ledger.
    """
    gathered: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for line in distinct(lines, "models"):
        for model, result in line["models"].items():
            for skill in result["test"]:
                gathered.setdefault((model, skill), []).append((line["seed"], result))
    return [
        ModelCell(
            model,
            skill,
            over_seeds((seed, result["test"][skill]) for seed, result in some),
            over_seeds((seed, result["shifted"][skill]) for seed, result in some),
            over_seeds((seed, result["resistance"][skill]["attacked"]) for seed, result in some),
            over_seeds((seed, _drop_rate(result["resistance"][skill])) for seed, result in some),
            some[0][1]["resistance"][skill]["adversary"],
        )
        for (model, skill), some in gathered.items()
    ]


def _drop_rate(found: Mapping[str, Any]) -> float | None:
    return 1 - found["attacked"] / found["clean"] if found["clean"] else None


# --- The shape of Beta --------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What one α gave on average merging of pairs without DARE.

    Attributes:
        alpha: Of Beta(α, α).
        draws: The most ratios that were drawn for one choice.
        test: Accuracy of the best of them.
        spread: Standard deviation of the ratios drawn for one choice.
        law: The standard deviation of Beta(α, α).
    """

    alpha: float
    draws: int
    test: SeedMean | None
    spread: SeedMean | None
    law: float


class Depth(NamedTuple):
    """What a number of draws gives.

    Attributes:
        draws: Ratios drawn.
        dev: Dev accuracy of the best of them, over all cells; it cannot fall as draws are added.
    """

    draws: int
    dev: SeedMean | None


def averaged_pairs(lines: Iterable[Line]) -> list[Line]:
    """The experiments with average merging of pairs without DARE, for whatever α.

    Args:
        lines: The ledger.
    """
    return [
        line
        for line in distinct(lines, "merge", "alpha")
        if len(line["group"]) == 2 and line["method"] == AVERAGE and not line["dare"]
    ]


def deviation_of(line: Line) -> float | None:
    """The standard deviation of the ratios drawn for one choice; None of fewer than two.

    Args:
        line: An experiment's.
    """
    ratios = [trial["weights"][0] for trial in line.get("trials", {}).get(M3, ())]
    return statistics.stdev(ratios) if len(ratios) > 1 else None


def shapes_of(lines: Iterable[Line]) -> list[Shape]:
    """What each α gave, the smallest first.

    Args:
        lines: The ledger.
    """
    there = averaged_pairs(lines)
    return [
        Shape(
            alpha,
            max(len(line.get("trials", {}).get(M3, ())) for line in mine),
            over_seeds((one.seed, one.test) for one in outcomes(mine) if one.arm == M3),
            over_seeds((line["seed"], deviation_of(line)) for line in mine),
            1 / (2 * math.sqrt(2 * alpha + 1)),
        )
        for alpha in sorted({line["alpha"] for line in there})
        if (mine := [line for line in there if line["alpha"] == alpha])
    ]


def depths_of(lines: Iterable[Line]) -> list[Depth]:
    """Dev accuracy of the best of the first 1, 2, 4, … draws of every merge.

    Args:
        lines: The ledger.
    """
    tried = [
        (line["seed"], [mean(trial["dev"].values()) for trial in trials])
        for line in distinct(lines, "merge")
        if (trials := line.get("trials", {}).get(M3))
    ]
    most = min((len(scores) for _, scores in tried), default=0)
    counts = sorted({*(2**power for power in range(most.bit_length())), most} - {0})
    return [Depth(count, over_seeds((seed, max(scores[:count])) for seed, scores in tried)) for count in counts]
