"""Strategies of exploration at equal budgets, on the laboratory's models; killed at any point, it goes on.

Merges stay in memory; what each example of each merge is worth is kept in a ledger by its weights, so that strategies
that try the same weights share their price. Weights are chosen on dev examples; what is reported is of others.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3jax import decoder
from m3jax.arithmetic import threefry
from m3jax.errors import M3Error, saying_what_failed
from m3jax.evaluation.models import open_model
from m3jax.evaluation.prompts import render
from m3jax.evaluation.runner import answered
from m3jax.evaluation.tasks import Execution
from m3jax.exploration.optimizing import DevBatch, Optimization, dev_loss, learn
from m3jax.exploration.resident import Resident, load_resident
from m3jax.exploration.samples import Space, Weights, equal_weights, space_of, to_hex
from m3jax.exploration.scoring import seeded_order
from m3jax.exploration.selection import MEAN, Result, choose
from m3jax.exploration.strategies import STRATEGIES, Trial, pursue, strategy_of
from m3jax.laboratory.conducting import Setting, open_laboratory
from m3jax.laboratory.examining import BATCH_SIZE, Exam, make_exam
from m3jax.laboratory.experiments import Group, Laboratory
from m3jax.laboratory.skills import TEMPLATE, Skill
from m3jax.laboratory.training import encode
from m3jax.ledger import Ledger
from m3jax.progress import Tell
from m3jax.recipe import load_recipe
from m3jax.streaming.jobs import prepared
from m3jax.text import count_text, time_text

GRADIENT = "gradient"
"""Adam on the cross-entropy of the dev examples' answers, from equal weights."""

RUNS, SCORES = "runs", "scores"
_UNKNOWN = "?"
_STEP = 3.0  # evaluations of an example that a step costs for each in its batch: there, and twice as much back


class Contest(NamedTuple):
    """How much is compared.

    Attributes:
        seeds: Repetitions, each with examples and draws of its own.
        first_seed: The number of the first of them.
        budgets: Evaluations on all dev examples that a choice may cost.
        dev: Examples of each skill that ratios are chosen on.
        test: Examples of each skill that are reported.
        alpha: Of Beta(α, α).
        learning: How gradients are followed; the budget says for how many steps.
    """

    seeds: int = 5
    first_seed: int = 0
    budgets: tuple[int, ...] = (8, 16, 32, 64)
    dev: int = 32
    test: int = 128
    alpha: float = 1.0
    learning: Optimization = Optimization()


class Arena(NamedTuple):
    """Where strategies meet.

    Attributes:
        group: The experts.
        granularity: Of their weights.
    """

    group: Group
    granularity: str = "model"

    @property
    def name(self) -> str:
        """What the ledgers know it by."""
        return f"{' + '.join(self.group)}, {self.granularity}"


def arenas_of(names: Sequence[str]) -> list[Arena]:
    """The last two experts and all of them with one ratio, and the last two with a ratio for each layer.

    Args:
        names: The experts, two or more.
    """
    last = tuple(names[-2:])
    return [*(Arena(group) for group in dict.fromkeys((last, tuple(names)))), Arena(last, "layer")]


def _seeds(how: Contest) -> range:
    return range(how.first_seed, how.first_seed + how.seeds)


def compare(
    directory: Path, skills: Sequence[Skill], setting: Setting, how: Contest, tell: Tell
) -> list[dict[str, Any]]:
    """Has every strategy choose at every budget, and measures what it chose.

    Args:
        directory: Where the models and ledgers go; what is there is not done again.
        skills: What the experts know.
        setting: How the models are made.
        how: How much is compared.
        tell: Told in lines how far it is.

    Returns:
        One line for each arena, seed, strategy and budget.

    Raises:
        M3Error: The directory holds another comparison, or cannot be used.
    """
    if how.seeds < 1 or not how.budgets or min(how.budgets) < 3 or min(how.dev, how.test) < 1:
        raise M3Error("a comparison needs a seed, budgets of 3 or more, and examples: give more of them")
    with saying_what_failed(directory):
        directory.mkdir(parents=True, exist_ok=True)
    lab = open_laboratory(directory, skills, setting, tell)
    models = {name: open_model(str(place)).fingerprint("truncate") for name, place in lab.places.items()}
    identity = {
        "models": models,
        "examples": [how.dev, how.test],
        "alpha": how.alpha,
    }
    by_name = {skill.name: skill for skill in skills}
    names = [*STRATEGIES, GRADIENT]
    jobs = sorted(
        itertools.product(_seeds(how), arenas_of(list(by_name))), key=lambda job: job[1].granularity != "model"
    )
    with (
        _ledger(directory, SCORES, identity) as scores,
        _ledger(directory, RUNS, {**identity, "learning": how.learning._asdict()}) as runs,
    ):
        done = {(r["arena"], r["seed"], r["strategy"], r["budget"]) for r in runs.entries}
        known = {(e["arena"], e["seed"], e["split"], e["weights"]): e["right"] for e in scores.entries}
        begun, fresh = time.perf_counter(), 0
        for number, (seed, arena) in enumerate(jobs):
            left = [
                (name, budget)
                for name, budget in itertools.product(names, how.budgets)
                if (arena.name, seed, name, budget) not in done
            ]
            if left:
                bench = _bench(lab, arena, seed, [by_name[name] for name in arena.group], how, scores, known)
                for name, budget in left:
                    runs.add(bench.line(name, budget))
                fresh += 1
                rest = (len(jobs) - number - 1) * (time.perf_counter() - begun) / fresh
                tell(f"{number + 1} of {len(jobs)}: seed {seed}, {arena.name}; about {time_text(rest)} left")
        tell(f"{count_text(len(runs.entries), 'choice')}, of {count_text(len(scores.entries), 'evaluation')}")
        return [run for run in runs.entries if run["seed"] in _seeds(how)]


def _ledger(directory: Path, name: str, identity: Mapping[str, Any]) -> Ledger:
    return Ledger(directory / name / "ledger.jsonl", identity, "comparison", "with --out DIR")


class _Paper(NamedTuple):
    """One skill's examples.

    Attributes:
        exam: The examples.
        order: In which parts of them are taken.
    """

    exam: Exam
    order: list[int]


class _Bench(NamedTuple):
    """One arena with one seed."""

    lab: Laboratory
    arena: Arena
    seed: int
    how: Contest
    resident: Resident
    space: Space
    papers: Mapping[str, Mapping[str, _Paper]]
    batches: Sequence[DevBatch]
    scores: Ledger
    known: dict[tuple[str, int, str, str], dict[str, str]]

    def right(self, split: str, weights: Weights, share: float = 1.0) -> dict[str, list[bool]]:
        """By skill, which examples of a part a merge does right, in the order of parts."""
        digest = hashlib.sha256(repr(sorted(to_hex(weights).items())).encode()).hexdigest()[:16]
        key = (self.arena.name, self.seed, split, digest)
        papers = self.papers[split]
        parts = {skill: paper.order[: math.ceil(share * len(paper.order))] for skill, paper in papers.items()}
        known = self.known.get(key) or {skill: _UNKNOWN * len(paper.order) for skill, paper in papers.items()}
        left = {skill: [i for i in part if known[skill][i] == _UNKNOWN] for skill, part in parts.items()}
        if any(left.values()):
            params = decoder.params_from_tree(self.resident.merge(weights), self.lab.pupil.config)
            for skill, places in left.items():
                letters = list(known[skill])
                for place, correct in zip(places, self._answers(papers[skill].exam, places, params), strict=True):
                    letters[place] = "01"[correct]
                known = {**known, skill: "".join(letters)}
            names = dict(zip(("arena", "seed", "split", "weights"), key, strict=True))
            self.scores.add({**names, "right": known})
            self.known[key] = known
        return {skill: [known[skill][place] == "1" for place in part] for skill, part in parts.items()}

    def _answers(self, exam: Exam, places: Sequence[int], params: Any) -> list[bool]:
        examples = [exam.examples[place] for place in places]
        prompts = [render(TEMPLATE, example.instruction) for example in examples]
        generator = self.lab.pupil.generator(params)
        batches = answered(exam.task, examples, prompts, generator, exam.settings, Execution(), BATCH_SIZE)
        found = {record.number: bool(record.correct) for record in itertools.chain.from_iterable(batches)}
        return [found[number] for number in range(len(places))]

    def tried(self, trial: Trial) -> Result:
        """A trial on its share of the dev examples."""
        found = self.right("dev", trial.weights, trial.share)
        scores = {skill: sum(verdicts) / len(verdicts) for skill, verdicts in found.items()}
        return Result(trial.sample, trial.weights, trial.share, scores, 0.0, self.arena.granularity)

    def followed(self, strategy: str, budget: int) -> list[Result]:
        """All results of a strategy."""
        if strategy == GRADIENT:
            return self.learned(budget)
        results: list[Result] = []

        def worth(trial: Trial) -> float:
            results.append(self.tried(trial))
            return results[-1].mean

        pursue(strategy_of(strategy, self.space, budget), worth)
        return results

    def learned(self, budget: int) -> list[Result]:
        """Equal weights, and what as many steps from there give as the budget pays for beside both evaluations."""
        how, start = self.how.learning, equal_weights(self.space)
        examples = sum(len(paper.order) for paper in self.papers["dev"].values())
        steps = max(int((budget - 2) * examples / (_STEP * how.batch_size)), 1)
        params = decoder.params_from_tree(self.resident.merge(start), self.lab.pupil.config)
        loss = dev_loss(how, self.lab.pupil.config, params, None)
        found = learn(self.resident, start, self.arena.granularity, loss, self.batches, steps, how.learning_rate)
        return [self.tried(Trial(0, start)), self.tried(Trial(1, found.weights))]

    def line(self, strategy: str, budget: int) -> dict[str, Any]:
        """What a strategy chose at a budget, and what that is worth."""
        results = self.followed(strategy, budget)
        chosen = choose(results, MEAN)
        test = {skill: sum(verdicts) / len(verdicts) for skill, verdicts in self.right("test", chosen.weights).items()}
        return {
            "arena": self.arena.name,
            "seed": self.seed,
            "strategy": strategy,
            "budget": budget,
            "sample": chosen.sample,
            "weights": [[round(w, 4) for w in values] for _, values in sorted(chosen.weights.items())],
            "dev": round(chosen.mean, 6),
            "test": round(sum(test.values()) / len(test), 6),
        }


def _bench(
    lab: Laboratory,
    arena: Arena,
    seed: int,
    skills: Sequence[Skill],
    how: Contest,
    scores: Ledger,
    known: dict[tuple[str, int, str, str], dict[str, str]],
) -> _Bench:
    recipe = load_recipe(
        {
            "merge_method": "linear",
            "models": [str(lab.places[name]) for name in arena.group],
            "mixup": {"alpha": how.alpha, "granularity": arena.granularity},
            "seed": seed,
            "dtype": "float32",
        }
    )
    with prepared(recipe, lab.work / "merge") as ready:
        resident, space = load_resident(ready, seed), space_of(recipe, ready.plan)
    root = threefry.root_key(seed)

    def papers(split: str, count: int) -> dict[str, _Paper]:
        # Programs count by their text: thousands of merges write too many to run.
        exams = {skill.name: make_exam(skill, split, count, seed, run_code=False) for skill in skills}
        return {name: _Paper(exam, seeded_order(len(exam.rows), root, name)) for name, exam in exams.items()}

    both = {"dev": papers("dev", how.dev), "test": papers("test", how.test)}
    batches = _lessons(lab, skills, both["dev"], how.learning.batch_size)
    return _Bench(lab, arena, seed, how, resident, space, both, batches, scores, known)


def _lessons(lab: Laboratory, skills: Sequence[Skill], papers: Mapping[str, _Paper], batch_size: int) -> list[DevBatch]:
    """The dev examples with their answers as lessons have them, all skills in each batch."""
    texts = [encode(lab.pupil.tokenizer, skill.lessons(papers[skill.name].exam.rows)) for skill in skills]
    mixed = [text for row in itertools.zip_longest(*texts) for text in row if text is not None]
    length = max(len(text.tokens) for text in mixed)
    batches = []
    for begin in range(0, len(mixed), batch_size):
        tokens, counted = (np.zeros((batch_size, length), kind) for kind in (np.int32, np.float32))
        lengths = np.ones(batch_size, np.int32)
        for row, text in enumerate(mixed[begin : begin + batch_size]):
            tokens[row, : len(text.tokens)], lengths[row] = text.tokens, len(text.tokens)
            counted[row, text.prompt - 1 : len(text.tokens) - 1] = 1
        batches.append(DevBatch(tokens, lengths, counted))  # type: ignore[arg-type]
    return batches
