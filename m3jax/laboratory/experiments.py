"""The paper's tables on the laboratory's models: every method with and without M³ and DARE, at equal budgets.

Each experiment is one merge method on one group of experts with one seed, which decides the examples, the draws and the
masks. Ratios are chosen on dev examples; what is reported is measured on others.

References:
    Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025.
"""

import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from m3jax import decoder
from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.exploration.resident import Resident, load_resident
from m3jax.exploration.samples import Space, space_of
from m3jax.exploration.samples import drawn as drawn_weights
from m3jax.exploration.strategies import strategy_of
from m3jax.laboratory.examining import Exam, Pupil, answers_of, make_exam, resist, share_of
from m3jax.laboratory.experts import texts_of
from m3jax.laboratory.models import BASE
from m3jax.laboratory.searches import Ground, lesson_batches, plain, ways_of
from m3jax.laboratory.skills import Manner, Skill
from m3jax.recipe import load_recipe
from m3jax.streaming.jobs import prepared
from m3jax.streaming.plan import WHOLE_MODEL

Group = tuple[str, ...]
Weights = tuple[float, ...]
GroupWeights = Mapping[str, Weights]

AVERAGE, TASK_ARITHMETIC, TIES = "average", "task arithmetic", "TIES"
METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        AVERAGE: {"merge_method": "linear"},
        TASK_ARITHMETIC: {"merge_method": "task_arithmetic"},
        TIES: {
            "merge_method": "ties",
            "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"},
        },
    }
)
_DARE = {"sparsify": {"method": "dare", "density": 0.8}}

EQUAL, TUNED, DRAW, M3 = "equal", "tuned", "draw", "m3"
"""How the ratio is found: not at all, on a grid, drawn once, drawn as often as the grid has points."""


class ExperimentSettings(NamedTuple):
    """How much is measured.

    Attributes:
        seeds: Repetitions, each with examples, draws and masks of its own.
        first: The first of the seeds; the others follow.
        samples: Evaluations on dev examples that a choice of ratio may cost at most.
        alpha: Of Beta(α, α).
        alphas: Others, tried on average merging.
        dev: Examples of each skill that ratios are chosen on.
        test: Examples of each skill that are reported, and as many out of distribution.
        attacked: Examples of each skill that adversaries work on, which is what takes longest.
        points: Of the curve over λ.
        searches: Evaluations that each search for weights of layers and tensors may cost; 0 for no such search.
        recalls: Examine merges that are the same up to rounding once: average merging and task arithmetic with
            weights that sum to 1, and a point of the curve that is one of the grid's.
        writes: Write the first seed's best merge of each pair, replay it, and evaluate what is on the disk.
    """

    seeds: int = 5
    first: int = 0
    samples: int = 10
    alpha: float = 0.5
    alphas: tuple[float, ...] = (0.2, 1.0, 5.0)
    dev: int = 48
    test: int = 96
    attacked: int = 32
    points: int = 21
    searches: int = 0
    recalls: bool = False
    writes: bool = False


class Experiment(NamedTuple):
    """One line of the ledger.

    Attributes:
        kind: "models" (base and experts), "merge", "written", "alpha", "curve" or "search".
        seed: Of examples, draws and masks.
        group: The experts.
        method: Of `METHODS`.
        dare: Whether task vectors are sparsified first.
        alpha: Of Beta(α, α).
    """

    kind: str
    seed: int
    group: Group = ()
    method: str = AVERAGE
    dare: bool = False
    alpha: float = 0.5

    @property
    def name(self) -> str:
        """What the ledger knows it by."""
        parts = [self.kind, *("+".join(self.group),), self.method, "DARE" if self.dare else "", f"{self.alpha:g}"]
        told = parts if self.kind == "merge" else [*parts[:2], parts[4]] if self.kind == "alpha" else parts[:2]
        return ", ".join(part for part in [*told, f"seed {self.seed}"] if part)


def groups_of(names: Sequence[str]) -> list[Group]:
    """All pairs of experts, and all of them together.

    Args:
        names: The experts.

    Example:
        >>> groups_of(["a", "b", "c"])
        [('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')]
    """
    pairs: list[Group] = list(itertools.combinations(names, 2))
    return pairs if len(names) == 2 else [*pairs, tuple(names)]


def jobs_of(names: Sequence[str], how: ExperimentSettings) -> list[Experiment]:
    """All that is to be done: what most is to be known of first, each kind one seed after the other.

    Args:
        names: The experts.
        how: How much.
    """
    groups, seeds = groups_of(names), range(how.first, how.first + how.seeds)
    pairs = [group for group in groups if len(group) == 2]
    jobs = [Experiment("models", seed, tuple(names)) for seed in seeds]
    jobs += [Experiment("curve", how.first, group, alpha=how.alpha) for group in pairs]
    jobs += [
        Experiment("merge", seed, group, method, dare, how.alpha)
        for seed, group, method, dare in itertools.product(seeds, groups, METHODS, (False, True))
    ]
    if how.writes:
        jobs += [Experiment("written", how.first, group, alpha=how.alpha) for group in pairs]
    if how.searches:
        jobs += [Experiment("search", seed, group, alpha=how.alpha) for seed in seeds for group in pairs]
    jobs += [
        Experiment("alpha", seed, group, alpha=alpha)
        for seed, group, alpha in itertools.product(seeds, pairs, how.alphas)
    ]
    return jobs


class Papers(NamedTuple):
    """One seed's examinations, by skill.

    Attributes:
        dev: Those that ratios are chosen on.
        test: Those that are reported.
        shifted: Those out of distribution.
        attacked: Those that adversaries work on.
    """

    dev: dict[str, Exam]
    test: dict[str, Exam]
    shifted: dict[str, Exam]
    attacked: dict[str, Exam]


def check_settings(how: ExperimentSettings) -> None:
    """Raise M3Error for what cannot be done."""
    for name, least in (("seeds", 1), ("samples", 1), ("dev", 1), ("test", 1), ("attacked", 1), ("points", 2)):
        number = getattr(how, name)
        if number < least:
            raise M3Error(f"{name}: is {number}, but must be at least {least}")
    if how.searches < 0:
        raise M3Error(f"searches: is {how.searches}, but must be at least 0")
    if how.searches:
        # Whose package is then said to be missing before anything is trained.
        strategy_of("cma", Space((WHOLE_MODEL,), 2, how.alpha, False, threefry.root_key(how.first)), how.searches)
    if how.first < 0:
        raise M3Error(f"seed: is {how.first}, but must be at least 0")


def make_papers(skills: Sequence[Skill], how: ExperimentSettings, seed: int, manner: Manner | None = None) -> Papers:
    """The examinations of a seed.

    Args:
        skills: What is examined.
        how: How large they are.
        seed: Which.
        manner: How models are asked; the instruction alone if None.

    Raises:
        M3Error: There are not as many examples.
    """

    def exams(split: str, count: int) -> dict[str, Exam]:
        return {skill.name: make_exam(skill, split, count, seed, manner=manner) for skill in skills}

    test = exams("test", how.test)
    attacked = exams("test", min(how.attacked, how.test))
    return Papers(exams("dev", how.dev), test, exams("shifted", how.test), attacked)


class Laboratory(NamedTuple):
    """What experiments are done with.

    Attributes:
        places: The model directories: "base", and the experts by skill.
        pupil: What the models share.
        how: How much is measured.
        work: The directory of it all; merges stay in memory but for those that are to be written.
    """

    places: Mapping[str, Path]
    pupil: Pupil
    how: ExperimentSettings
    work: Path


def recipe_of(job: Experiment, places: Mapping[str, Path]) -> dict[str, Any]:
    """The recipe of a job's merges, as `m3jax merge` takes it.

    Args:
        job: The job.
        places: The model directories.
    """
    has_base = job.dare or job.method != AVERAGE
    return {
        **METHODS[job.method],
        **({"base_model": str(places[BASE])} if has_base else {}),
        "models": [str(places[name]) for name in job.group],
        **(_DARE if job.dare else {}),
        "mixup": {"alpha": job.alpha},
        "seed": job.seed,
        "dtype": "float32",
    }


def equal_weights(job: Experiment) -> Weights:
    """What the method takes where nobody chooses: 1 each in task arithmetic, else an even share.

    Args:
        job: The job.
    """
    return (1.0 if job.method == TASK_ARITHMETIC else 1.0 / len(job.group),) * len(job.group)


# --- What is known already ----------------------------------------------------------------------------------------


class Remembered(NamedTuple):
    """What merges scored that were examined before, by what they are up to rounding.

    Attributes:
        dev: Scores on the dev examples.
        outcomes: What is reported.
        note: Is given each examination, as plain data that `known_of` reads.
    """

    dev: dict[str, dict[str, float]]
    outcomes: dict[str, dict[str, Any]]
    note: Callable[[Mapping[str, Any]], None]

    def add_dev(self, key: str, scores: dict[str, float]) -> None:
        """Note an examination on dev examples.

        Args:
            key: Of the merge.
            scores: By skill.
        """
        self.dev[key] = scores
        self.note({"merge": key, "dev": scores})

    def add_outcome(self, key: str, found: dict[str, Any]) -> None:
        """Note what is reported of a merge, or a part of it.

        Args:
            key: Of the merge.
            found: By measure.
        """
        self.outcomes[key] = {**self.outcomes.get(key, {}), **found}
        self.note({"merge": key, "outcome": found})


def known_of(entries: Iterable[Mapping[str, Any]], note: Callable[[Mapping[str, Any]], None]) -> Remembered:
    """What was noted before.

    Args:
        entries: What was given to `note`.
        note: Of what is to come.
    """
    known = Remembered({}, {}, note)
    for entry in entries:
        if "dev" in entry:
            known.dev[entry["merge"]] = entry["dev"]
        else:
            known.outcomes.setdefault(entry["merge"], {}).update(entry["outcome"])
    return known


def _key(job: Experiment, weights: Weights | GroupWeights) -> str:
    """What a merge is up to rounding: sums of experts whose weights sum to 1 are the same with their base."""
    groups = weights if isinstance(weights, Mapping) else {WHOLE_MODEL: weights}
    ratio = groups.get(WHOLE_MODEL)
    is_mean = job.method == TASK_ARITHMETIC and ratio is not None and abs(sum(ratio) - 1) < 1e-6
    method = AVERAGE if is_mean else job.method
    told = [round(weight, 6) for weight in ratio] if ratio is not None else plain(groups)
    return json.dumps([job.seed, list(job.group), method, job.dare, told])


# --- Merges -------------------------------------------------------------------------------------------------------


class _Bench:
    """The merges of one job, made in memory and examined, and how long both took."""

    def __init__(
        self,
        lab: Laboratory,
        job: Experiment,
        papers: Papers,
        resident: Resident,
        space: Space,
        known: Remembered | None,
    ) -> None:
        self.lab, self.job, self.papers, self.resident, self.space = lab, job, papers, resident, space
        self.known = known
        self.merging: list[float] = []
        self.examining: list[float] = []

    def params(self, weights: Weights | GroupWeights) -> Any:
        """The merge with these weights, as the decoder takes it."""
        groups = weights if isinstance(weights, Mapping) else {WHOLE_MODEL: weights}
        begun = time.perf_counter()
        merged: Any = jax.block_until_ready(self.resident.merge(groups))  # type: ignore[no-untyped-call]
        self.merging.append(time.perf_counter() - begun)
        return decoder.params_from_tree(merged, self.lab.pupil.config)

    def dev(self, weights: Weights | GroupWeights) -> dict[str, float]:
        """Scores on the dev examples."""
        key = _key(self.job, weights)
        if self.known is not None and key in self.known.dev:
            return self.known.dev[key]
        generator = self.lab.pupil.generator(self.params(weights))
        begun = time.perf_counter()
        scores = {name: share_of(answers_of(self.papers.dev[name], generator)) for name in self.job.group}
        self.examining.append(time.perf_counter() - begun)
        if self.known is not None:
            self.known.add_dev(key, scores)
        return scores

    def try_all(self, ratios: Sequence[Weights]) -> list[dict[str, Any]]:
        """Ratios with their scores on the dev examples."""
        return [{"weights": list(weights), "dev": self.dev(weights)} for weights in ratios]

    def grid(self) -> list[Weights]:
        """What those try who do not draw."""
        return fixed_ratios(len(self.job.group), self.lab.how.samples)

    def draws(self) -> list[Weights]:
        """As many ratios as the grid has, drawn as `m3jax explore` draws them."""
        return [drawn_weights(self.space, sample)[WHOLE_MODEL] for sample in range(len(self.grid()))]

    def outcome(self, weights: Weights, resists: bool) -> dict[str, Any]:
        """What is reported of a merge, with its adversaries or without."""
        key = _key(self.job, weights)
        there = {} if self.known is None else self.known.outcomes.get(key, {})
        if "shifted" in there and ("resistance" in there or not resists):
            return {**there, "weights": list(weights)}
        found = measure(self.lab, self.params(weights), self.papers, self.job, resists)
        if self.known is not None:
            self.known.add_outcome(key, found)
        return {"weights": list(weights), **found}

    def test(self, weights: Weights | GroupWeights) -> dict[str, Any]:
        """Scores on the test examples alone."""
        key = _key(self.job, weights)
        there = {} if self.known is None else self.known.outcomes.get(key, {})
        if "test" in there:
            return {"test": there["test"]}
        generator = self.lab.pupil.generator(self.params(weights))
        found = {"test": {name: share_of(answers_of(self.papers.test[name], generator)) for name in self.job.group}}
        if self.known is not None:
            self.known.add_outcome(key, found)
        return found

    def seconds(self) -> dict[str, float]:
        """Typical times of one merge and of examining it; the first of each is compiled, and does not count."""
        spent = {"merge": self.merging, "examination": self.examining}
        return {name: statistics.median(times[1:] or times) for name, times in spent.items() if times}


def mean(scores: Mapping[str, float]) -> float:
    """Of the skills' scores.

    Args:
        scores: By skill.
    """
    return sum(scores.values()) / len(scores)


def measure(lab: Laboratory, params: Any, papers: Papers, job: Experiment, resists: bool = True) -> dict[str, Any]:
    """What is reported of a model: its scores on test examples, out of distribution and under its adversaries.

    Args:
        lab: The laboratory.
        params: The decoder's parameters.
        papers: The examinations.
        job: Whose skills are examined.
        resists: Whether adversaries are let loose.
    """
    generator = lab.pupil.generator(params)
    right = {
        split: {name: answers_of(exams[name], generator) for name in job.group}
        for split, exams in (("test", papers.test), ("shifted", papers.shifted))
    }
    scores: dict[str, Any] = {
        **{split: {name: share_of(some) for name, some in by_skill.items()} for split, by_skill in right.items()},
        "marks": {name: "".join("01"[one.right] for one in some) for name, some in right["test"].items()},
    }
    if resists:
        found = {name: resist(papers.attacked[name], generator, job.seed) for name in job.group}
        scores["resistance"] = {name: one._asdict() for name, one in found.items()}
    return scores


def fixed_ratios(num_experts: int, samples: int) -> list[Weights]:
    """An even grid of merges with equal weights among them, and none of an expert alone.

    Args:
        num_experts: How many weights there are.
        samples: How many points there may be at most; there is one at least.

    Example:
        >>> fixed_ratios(2, 4)
        [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
        >>> len(fixed_ratios(2, 10)), len(fixed_ratios(3, 10))
        (9, 10)
    """
    steps = num_experts  # a multiple of it, which has the middle among its points
    while math.comb(steps + num_experts - 1, num_experts - 1) <= samples:
        steps += num_experts
    cuts = itertools.combinations(range(1, steps), num_experts - 1)
    return [
        tuple((after - before) / steps for before, after in itertools.pairwise((0, *inner, steps))) for inner in cuts
    ]


def best(trials: Sequence[Mapping[str, Any]]) -> Weights:
    """The weights with the best mean score; of equals those that are nearest to equal weights.

    Args:
        trials: With their scores on dev examples.
    """

    def worth(trial: Mapping[str, Any]) -> tuple[float, float]:
        return round(mean(trial["dev"]), 9), -sum(weight * weight for weight in trial["weights"])

    return tuple(max(trials, key=worth)["weights"])


def _merge(bench: _Bench) -> dict[str, Any]:
    tuned, drawn = bench.try_all(bench.grid()), bench.try_all(bench.draws())
    chosen = {EQUAL: equal_weights(bench.job), TUNED: best(tuned), DRAW: tuple(drawn[0]["weights"]), M3: best(drawn)}
    resisting = {weights for arm, weights in chosen.items() if arm != DRAW}
    outcomes = {weights: bench.outcome(weights, weights in resisting) for weights in dict.fromkeys(chosen.values())}
    return {"arms": {arm: outcomes[weights] for arm, weights in chosen.items()}, "trials": {TUNED: tuned, M3: drawn}}


def _alpha(bench: _Bench) -> dict[str, Any]:
    drawn = bench.try_all(bench.draws())
    chosen = best(drawn)
    return {"arms": {M3: {"weights": list(chosen), **bench.test(chosen)}}, "trials": {M3: drawn}}


def _curve(bench: _Bench) -> dict[str, Any]:
    points = bench.lab.how.points
    ratios = [place / (points - 1) for place in range(points)]
    return {"curve": bench.try_all([(ratio, 1 - ratio) for ratio in ratios])}


def _search(bench: _Bench) -> dict[str, Any]:
    """Weights of layers and of tensors, by every way of looking for them, beside one ratio."""
    pupil, group = bench.lab.pupil, bench.job.group
    lessons = [texts_of(pupil.tokenizer, pupil.config, bench.papers.dev[name].lessons) for name in group]
    ground = Ground(
        bench.resident,
        bench.space,
        bench.dev,
        functools.partial(fixed_ratios, len(group)),
        lesson_batches(lessons),
        pupil.config,
        bench.lab.how.searches,
    )
    found = {name: look() for name, look in ways_of(ground).items()}
    return {
        "searches": {
            name: {**one._asdict(), "weights": plain(one.weights), **bench.test(one.weights)}
            for name, one in found.items()
        }
    }


_SAMPLES = 2  # answers of each model to each skill's first test examples that the ledger keeps


def _models(lab: Laboratory, papers: Papers, job: Experiment, known: Remembered | None) -> dict[str, Any]:
    """What base and experts score, alone."""
    found = {}
    for name, place in lab.places.items():
        key = json.dumps([job.seed, name])
        there = {} if known is None else known.outcomes.get(key, {})
        found[name] = there or _alone(lab, papers, job, place)
        if known is not None and not there:
            known.add_outcome(key, found[name])
    return {"models": found}


def _alone(lab: Laboratory, papers: Papers, job: Experiment, place: Path) -> dict[str, Any]:
    params = decoder.load_params(place, lab.pupil.config)
    generator = lab.pupil.generator(params)
    exams = [papers.test[skill] for skill in job.group]
    few = [exam._replace(examples=exam.examples[:_SAMPLES], lessons=exam.lessons[:_SAMPLES]) for exam in exams]
    samples = {
        exam.skill: [
            [example.instruction, example.gold, answer.text]
            for example, answer in zip(exam.examples, answers_of(exam, generator), strict=True)
        ]
        for exam in few
    }
    return {**measure(lab, params, papers, job), "samples": samples}


def do(lab: Laboratory, job: Experiment, papers: Papers, known: Remembered | None = None) -> dict[str, Any]:
    """One line of the ledger.

    Args:
        lab: The laboratory.
        job: What is to be done.
        papers: The examinations of the job's seed.
        known: What was examined before and is not examined again; what is examined here is added.
    """
    begun = time.perf_counter()
    told = {"job": job.name, **job._asdict(), "group": list(job.group)}
    if job.kind == "models":
        return {**told, **_models(lab, papers, job, known), "seconds": {"job": time.perf_counter() - begun}}
    recipe = load_recipe(recipe_of(job, lab.places))
    with prepared(recipe, lab.work / "merge") as ready:
        bench = _Bench(lab, job, papers, load_resident(ready, job.seed), space_of(recipe, ready.plan), known)
    done = {"merge": _merge, "alpha": _alpha, "curve": _curve, "search": _search}[job.kind](bench)
    return {**told, **done, "seconds": {**bench.seconds(), "job": time.perf_counter() - begun}}
