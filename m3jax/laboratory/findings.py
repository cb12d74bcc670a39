"""All that a ledger of experiments says, whole or not: scores, costs, claims, and what is missing."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.laboratory.claims import HELD, Claim, claims_of, verdict_of
from m3jax.laboratory.experiments import (
    AVERAGE,
    DRAW,
    EQUAL,
    M3,
    TASK_ARITHMETIC,
    TUNED,
    Experiment,
    ExperimentSettings,
    jobs_of,
)
from m3jax.laboratory.gains import (
    Curve,
    Expectation,
    Paired,
    WayScores,
    curves_of,
    expectations_of,
    paired_of,
    searches_of,
)
from m3jax.laboratory.models import BASE
from m3jax.laboratory.outcomes import (
    ROUNDING,
    SHARES,
    ArmScores,
    Cell,
    Depth,
    Group,
    Line,
    ModelCell,
    SeedMean,
    Shape,
    cells_of,
    depths_of,
    distinct,
    models_of,
    outcome_of,
    outcomes,
    over_seeds,
    shapes_of,
)

_KINDS = ("models", "merge", "written", "alpha", "curve", "search")
_ARMS = (EQUAL, TUNED, DRAW, M3)


class Cost(NamedTuple):
    """What merges and choices cost.

    Attributes:
        merge: Median seconds of a merge in memory.
        examination: Median seconds of one examination on dev examples.
        evaluations: Examinations for one choice of ratio: arm, number of experts, how many.
    """

    merge: float | None
    examination: float | None
    evaluations: tuple[tuple[str, int, int], ...]


class Alone(NamedTuple):
    """What the base and the best expert scored on a group's skills, neither of them merged.

    Attributes:
        group: The experts.
        measure: Of `SHARES`.
        base: The base's mean over the group's skills.
        expert: Which of the group's experts has the best mean over seeds, found after the fact; empty for none.
        best: Its mean over the group's skills.
    """

    group: Group
    measure: str
    base: SeedMean | None
    expert: str
    best: SeedMean | None


class Surpassed(NamedTuple):
    """In how many merges the best of M³'s draws is above a model that is not merged, in test accuracy.

    Attributes:
        other: "base" or "best expert alone".
        rows: Merges, by group, method and DARE, of which both were measured in one seed at least.
        above: Those that are above it, by means over seeds.
        surely: Those whose difference, paired by seed, has an interval above 0; None where none has an interval.
    """

    other: str
    rows: int
    above: int
    surely: int | None


class LaboratoryFindings(NamedTuple):
    """All that is reported.

    Attributes:
        about: How it was made.
        seeds: Those that were measured.
        missing: Experiments, or arms of them, that were to be done and are not there.
        models: What base and experts scored.
        cells: What every arm scored, by group, method and DARE.
        groups: The same over methods, with DARE and without.
        alone: What base and best expert scored in the same, by group and measure.
        surpassed: How often merges with M³ are above them.
        adversaries: What each skill's adversary did.
        shapes: What each α gave.
        depths: What more draws gave.
        cost: What it cost.
        coinciding: Choices that average merging and task arithmetic both made, and those that scored the same.
        claims: What follows.
        curves: What the curves over λ are like.
        expectations: What draws let expect on them.
        searches: What weights of layers and tensors gave.
        paired: Differences between arms, example by example.
        samples: Of each model, by skill: what was asked, what is right, and what it said.
        written: Each pair's best merge as `write_best` tells it, with its "group" and "seed".
    """

    about: Mapping[str, Any]
    seeds: tuple[int, ...]
    missing: tuple[str, ...]
    models: tuple[ModelCell, ...]
    cells: tuple[Cell, ...]
    groups: tuple[Cell, ...]
    alone: tuple[Alone, ...]
    surpassed: tuple[Surpassed, ...]
    adversaries: Mapping[str, str]
    shapes: tuple[Shape, ...]
    depths: tuple[Depth, ...]
    cost: Cost
    coinciding: tuple[int, int]
    claims: tuple[Claim, ...]
    curves: tuple[Curve, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    searches: tuple[WayScores, ...] = ()
    paired: tuple[Paired, ...] = ()
    samples: Mapping[str, Mapping[str, Sequence[Sequence[str]]]] = MappingProxyType({})
    written: tuple[Line, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {name: _plain(value) for name, value in self._asdict().items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def find(lines: Iterable[Line], about: Mapping[str, Any]) -> LaboratoryFindings:
    """All that is to be reported of a ledger, whole or not.

    Args:
        lines: The ledger.
        about: How it was made.

    Raises:
        M3Error: It holds no experiment.
    """
    there = distinct(lines, *_KINDS)
    if not there:
        raise M3Error("the ledger holds no experiment, so there is nothing to report: run the laboratory first")
    found = outcomes(there)
    unmerged = _unmerged(there, list(dict.fromkeys(one.group for one in found if one.kind == "merge")))
    alone = _alone(unmerged)
    return LaboratoryFindings(
        about=about,
        seeds=tuple(sorted({line["seed"] for line in there})),
        missing=tuple(_missing(there, about)),
        models=tuple(models_of(there)),
        cells=tuple(cells_of(found)),
        groups=tuple(cells_of(found, whole=True)),
        alone=alone,
        surpassed=tuple(_surpassed(found, unmerged, alone)),
        adversaries=_adversaries(there),
        shapes=tuple(shapes_of(there)),
        depths=tuple(depths_of(there)),
        cost=_cost(there),
        coinciding=_coinciding(found),
        claims=claims_of(there),
        curves=tuple(curves_of(there)),
        expectations=tuple(expectations_of(there)),
        searches=tuple(searches_of(there)),
        paired=tuple(paired_of(there)),
        samples=_samples(there),
        written=tuple(
            {"group": line["group"], "seed": line["seed"], **line["written"]}
            for line in distinct(there, "written")
            if line.get("written")
        ),
    )


def _unmerged(lines: Sequence[Line], groups: Sequence[Group]) -> list[ArmScores]:
    """What the base and each group's experts scored on the group's skills, the model's name in place of an arm's."""
    return [
        outcome_of(
            {**line, "group": group},
            model,
            {what: {skill: result[what][skill] for skill in group} for what in ("test", "shifted", "resistance")},
        )
        for line in distinct(lines, "models")
        for group in groups
        for model, result in line["models"].items()
        if model in (BASE, *group) and result["test"].keys() >= set(group)
    ]


def _alone(unmerged: Sequence[ArmScores]) -> tuple[Alone, ...]:
    def scored(group: Group, measure: str) -> dict[str, SeedMean]:
        mine = [one for one in unmerged if one.group == group]
        found = {
            model: over_seeds((one.seed, one.score(measure)) for one in mine if one.arm == model)
            for model in dict.fromkeys(one.arm for one in mine)
        }
        return {model: value for model, value in found.items() if value is not None}

    def of(group: Group, measure: str) -> Alone:
        scores = scored(group, measure)
        expert = max((name for name in group if name in scores), key=lambda name: scores[name].mean, default="")
        return Alone(group, measure, scores.get(BASE), expert, scores.get(expert))

    return tuple(of(group, measure) for group in dict.fromkeys(one.group for one in unmerged) for measure in SHARES)


def _surpassed(
    found: Sequence[ArmScores], unmerged: Sequence[ArmScores], alone: Sequence[Alone]
) -> Iterator[Surpassed]:
    """Of the base and of the best experts in test accuracy."""
    scores = {(one.seed, one.group, one.arm): one.test for one in unmerged}
    experts = {one.group: one.expert for one in alone if one.measure == "test"}
    for other, names in (("base", dict.fromkeys(experts, BASE)), ("best expert alone", experts)):
        rows: dict[tuple[Group, str, bool], list[tuple[int, float]]] = {}
        for one in found:
            score = scores.get((one.seed, one.group, names.get(one.group, "")))
            if one.kind == "merge" and one.arm == M3 and one.test is not None and score is not None:
                rows.setdefault((one.group, one.method, one.dare), []).append((one.seed, one.test - score))
        gains = [gain for values in rows.values() if (gain := over_seeds(values)) is not None]
        surely = [verdict_of(gain) == HELD for gain in gains if gain.low is not None]
        above = sum(gain.mean > ROUNDING for gain in gains)
        yield Surpassed(other, len(gains), above, sum(surely) if surely else None)


def _samples(lines: Sequence[Line]) -> dict[str, Any]:
    """Those of the first seed."""
    models: dict[str, Any] = next((line["models"] for line in distinct(lines, "models")), {})
    return {model: result["samples"] for model, result in models.items() if "samples" in result}


def _adversaries(lines: Sequence[Line]) -> dict[str, str]:
    return {
        skill: one["adversary"]
        for line in lines
        for result in (*line.get("models", {}).values(), *line.get("arms", {}).values())
        for skill, one in result.get("resistance", {}).items()
    }


def _missing(lines: Sequence[Line], about: Mapping[str, Any]) -> Iterator[str]:
    """What the settings, or else the ledger itself, let expect and what is not there."""
    there = {_identity(line): line for line in lines}
    for job in jobs_of(_names(lines), _settings(lines, about)):
        line = there.get(_identity(job._asdict()))
        if line is None:
            yield job.name
        elif job.kind in ("merge", "alpha"):
            arms = line.get("arms", {})
            yield from (f"{job.name}: arm {arm}" for arm in _arms(job) if arm not in arms)
        elif not line.get("searches" if job.kind == "search" else job.kind):
            yield f"{job.name}: its scores"


def _arms(job: Experiment) -> tuple[str, ...]:
    return _ARMS if job.kind == "merge" else (M3,)


def _identity(line: Line) -> tuple[Any, ...]:
    if line["kind"] == "curve":  # one seed is enough
        return (line["kind"], frozenset(line["group"]))
    details = (line["method"], line["dare"], line["alpha"]) if line["kind"] in ("merge", "alpha") else ()
    return (line["kind"], line["seed"], frozenset(line["group"]), *details)


def _names(lines: Sequence[Line]) -> list[str]:
    """All experts, in the order of the largest group."""
    groups = sorted((line["group"] for line in lines), key=len, reverse=True)
    return list(dict.fromkeys(name for group in groups for name in group))


def _settings(lines: Sequence[Line], about: Mapping[str, Any]) -> ExperimentSettings:
    seen: dict[str, Any] = {
        "alphas": tuple(sorted({line["alpha"] for line in lines if line["kind"] == "alpha"})),
    }
    if merges := [line["alpha"] for line in lines if line["kind"] == "merge"]:
        seen["alpha"] = merges[0]
    told = about.get("settings") or {}
    how = ExperimentSettings(**{**seen, **{name: told[name] for name in ExperimentSettings._fields if name in told}})
    seeds = {line["seed"] for line in lines} | set(range(how.first, how.first + how.seeds) if "seeds" in told else ())
    return how._replace(first=min(seeds), seeds=max(seeds) - min(seeds) + 1)


def _cost(lines: Sequence[Line]) -> Cost:
    def typical(what: str) -> float | None:
        seconds = [line["seconds"][what] for line in lines if what in line.get("seconds", {})]
        return statistics.median(seconds) if seconds else None

    evaluations = {
        (arm, len(line["group"]), len(trials)) for line in lines for arm, trials in line.get("trials", {}).items()
    }
    return Cost(typical("merge"), typical("examination"), tuple(sorted(evaluations)))


def _coinciding(found: Sequence[ArmScores]) -> tuple[int, int]:
    """With weights that sum to 1, average merging and task arithmetic are the same model up to rounding."""
    by_choice: dict[tuple[Any, ...], dict[str, float | None]] = {}
    for one in found:
        if one.kind == "merge" and one.arm != EQUAL:
            by_choice.setdefault((one.seed, one.group, one.dare, one.arm), {})[one.method] = one.test
    both = [by for by in by_choice.values() if AVERAGE in by and TASK_ARITHMETIC in by]
    return len(both), sum(by[AVERAGE] == by[TASK_ARITHMETIC] for by in both)
