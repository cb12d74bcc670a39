"""Ledgers whose truth is known, made from a seed instead of models."""

import itertools
import random

from m3jax.laboratory.experiments import DRAW, EQUAL, M3, TASK_ARITHMETIC, TUNED, ExperimentSettings, best, jobs_of

SKILLS = ("sentiment", "arithmetic", "programs")
SETTINGS = ExperimentSettings(samples=8, alphas=(0.2, 1.0, 2.0, 5.0))
ADVERSARIES = {"sentiment": "deepwordbug", "arithmetic": "typos", "programs": "paraphrase"}
LEVEL = 0.6


def make_ledger(arms=None, *, dare=0.0, resistance=None, alphas=None, noise=0.01, how=SETTINGS, names=SKILLS):
    """A line for every job.

    Args:
        arms: What each arm adds to test scores.
        dare: What DARE adds to them.
        resistance: What share of clean accuracy each arm keeps under adversaries.
        alphas: What each α adds to the score of its best draw.
        noise: Standard deviation of each score.
        how: How much is measured.
        names: The skills.
    """
    arms, resistance, alphas = arms or {}, resistance or {}, alphas or {}

    def line(job):
        chance = random.Random(job.name)
        told = {"job": job.name, **job._asdict(), "group": list(job.group)}
        seconds = {"merge": 0.002, "examination": 0.5, "job": 30.0}
        if job.kind == "models":
            models = {name: measured(job, 0.3 + 0.1 * i, 0.8, chance) for i, name in enumerate(("base", *names))}
            return {**told, "models": models, "seconds": {"job": 9.0}}
        if job.kind == "curve":
            ratios = [place / (how.points - 1) for place in range(how.points)]
            curve = [{"weights": [ratio, 1 - ratio], "dev": dev(job, (ratio, 1 - ratio))} for ratio in ratios]
            return {**told, "curve": curve, "seconds": seconds}
        drawn = [trial(job, weights(job, chance)) for _ in range(how.samples)]
        if job.kind == "alpha":
            outcome = scored(job, M3, alphas.get(job.alpha, 0.0), best(drawn), chance)
            arm = {name: outcome[name] for name in ("weights", "test")}
            return {**told, "arms": {M3: arm}, "trials": {M3: drawn}, "seconds": seconds}
        grid = [trial(job, one) for one in lattice(len(job.group), how.samples)]
        even = (1.0 if job.method == TASK_ARITHMETIC else 1 / len(job.group),) * len(job.group)
        chosen = {EQUAL: even, TUNED: best(grid), DRAW: drawn[0]["weights"], M3: best(drawn)}
        outcomes = {arm: scored(job, arm, arms.get(arm, 0.0) + dare * job.dare, chosen[arm], chance) for arm in chosen}
        return {**told, "arms": outcomes, "trials": {TUNED: grid, M3: drawn}, "seconds": seconds}

    def measured(job, level, kept, chance):
        def near(value):
            return min(max(value + chance.gauss(0, noise), 0.0), 1.0)

        return {
            "test": {name: near(level) for name in job.group},
            "shifted": {name: near(level - 0.1) for name in job.group},
            "resistance": {
                name: {"adversary": ADVERSARIES[name], "clean": level, "attacked": near(level * kept)}
                for name in job.group
            },
        }

    def scored(job, arm, gain, chosen, chance):
        return {"weights": list(chosen), **measured(job, LEVEL + gain, resistance.get(arm, 0.7), chance)}

    return [line(job) for job in jobs_of(names, how)]


def weights(job, chance):
    shares = [chance.gammavariate(job.alpha, 1) + 1e-12 for _ in job.group]
    return tuple(share / sum(shares) for share in shares)


def lattice(count, points):
    """As many ratios as there are draws, none of them an expert alone."""
    cuts = itertools.combinations(range(1, points + count), count - 1)
    inner = [tuple(b - a for a, b in itertools.pairwise((0, *cut, points + count))) for cut in cuts]
    return [tuple(part / (points + count) for part in inner[len(inner) * i // points]) for i in range(points)]


def dev(job, ratios):
    """Each skill grows with its expert's weight; the mean is best near the middle; other seeds, other examples."""
    luck = random.Random(f"dev {job.seed}").gauss(0, 0.03)
    return {
        name: round(min(max(0.15 + 0.75 * ratio**0.4 + luck, 0), 1), 4)
        for name, ratio in zip(job.group, ratios, strict=True)
    }


def trial(job, ratios):
    return {"weights": list(ratios), "dev": dev(job, ratios)}


def without(lines, **fields):
    """The ledger less the lines with these fields."""
    return [line for line in lines if any(line[name] != value for name, value in fields.items())]
