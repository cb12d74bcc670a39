"""What a sample is worth: the existing evaluation on dev examples, on all of them or on a seeded part."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jax.sharding import Mesh

from m3jax import decoder
from m3jax.arithmetic import threefry
from m3jax.checkpoints.views_permuted import Permuted
from m3jax.decoder import ApplyFn, DecoderConfig
from m3jax.errors import M3Error
from m3jax.evaluation.models import LanguageModel, make_generator
from m3jax.evaluation.options import Evaluation as Evaluation
from m3jax.evaluation.options import check_evaluation
from m3jax.evaluation.prompts import render
from m3jax.evaluation.protocol import GenerationSettings, Overflow
from m3jax.evaluation.records import Record, digest
from m3jax.evaluation.runner import answered, check_code, read_examples
from m3jax.evaluation.tasks import Example, Task, get_task
from m3jax.exploration.resident import Params
from m3jax.exploration.selection import MEAN, PARETO
from m3jax.progress import Tell
from m3jax.trees.moving import moved

Score = Callable[[Params, float], Mapping[str, float]]
"""From merged arrays by tensor name and a share of the dev examples to scores by task, larger being better."""


class Scored(NamedTuple):
    """What a merge scored.

    Attributes:
        scores: By task, larger being better; of a merge that was stopped, of what it was shown.
        share: Of the dev examples that it was shown.
        most: Of a merge that was stopped, what it could have reached at most, by task; else None.
    """

    scores: Mapping[str, float]
    share: float
    most: Mapping[str, float] | None = None


Hopeless = Callable[[Mapping[str, float]], bool]
"""From what a merge can reach at most, by task, to whether there is no point in going on."""

Scorer = Callable[[Params, float, Hopeless | None], Scored]
"""From merged arrays, a share of the dev examples, and when to stop, to what they scored."""


class _Tally(NamedTuple):
    """How a merge does in one task so far."""

    right: int
    judged: int
    left: int

    def after(self, records: Sequence[Record]) -> "_Tally":
        judged = [record.correct for record in records if record.correct is not None]
        return _Tally(self.right + sum(judged), self.judged + len(judged), self.left - len(records))

    @property
    def score(self) -> float:
        return self.right / max(self.judged, 1)

    @property
    def most(self) -> float:
        """If all that is left were right."""
        return (self.right + self.left) / max(self.judged + self.left, 1)


class Dev(NamedTuple):
    """The dev set of one task.

    Attributes:
        task: The task.
        examples: All of them.
        order: Seeded; a part of the examples is a prefix of it.
        template: The prompt template.
        settings: How to generate.
    """

    task: Task
    examples: list[Example]
    order: list[int]
    template: str
    settings: GenerationSettings

    def part(self, share: float) -> list[Example]:
        """The first examples of the order, in their own; larger parts hold smaller ones."""
        count = math.ceil(share * len(self.examples))
        return [self.examples[i] for i in sorted(self.order[:count])]

    def prompts(self, tokenizer: Any) -> list[str]:
        """What the model is shown."""
        return [render(self.template, example.instruction, tokenizer) for example in self.examples]

    def identity(self) -> str:
        """Digest of all that the scores depend on beside the model."""
        told = [[example.id, example.instruction, example.gold, dict(example.extra)] for example in self.examples]
        others = [] if self.task.grader == "m3jax" else [self.task.grader]
        return digest([self.task.name, self.template, self.settings._asdict(), told, *others])


def read_devs(tasks: Mapping[str, str | Path | None], how: Evaluation, root: threefry.Words) -> list[Dev]:
    """The dev sets of some tasks, checked.

    Args:
        tasks: By name, the data file, a hub data set, or None for the task's own on the hub.
        how: How they are evaluated.
        root: uint32[2], the recipe's root key.

    Raises:
        M3Error: A task is unknown or judged elsewhere, its data cannot be used, or it may not run code.
    """
    check_evaluation(how)
    devs = []
    for name, source in tasks.items():
        task = get_task(name, how.grader)
        if task.judged_elsewhere or name in (MEAN, PARETO):
            raise M3Error(f"{name} is judged elsewhere, so samples cannot be compared by it: take another task")
        check_code(task, how.run_code, how.execution)
        examples = read_examples(task, source)[: how.limit]
        if not examples:
            raise M3Error(f"{name}: there are no examples to evaluate")
        order, template = seeded_order(len(examples), root, name), how.template or task.template
        devs.append(Dev(task, examples, order, template, how.settings(task)))
    return devs


def seeded_order(count: int, root: threefry.Words, name: str) -> list[int]:
    """A seeded order, so that a part of a file that is sorted by label has all labels.

    Args:
        count: How many examples there are.
        root: uint32[2], the recipe's root key.
        name: The task.
    """
    key = threefry.fold_in_name(threefry.fold_in(root, threefry.SUBSETS), name)
    numbers = np.arange(count, dtype=np.uint32)
    with np.errstate(over="ignore"):
        high, low = threefry.threefry2x32((key[0], key[1]), (np.zeros_like(numbers), numbers))
    return [int(i) for i in np.lexsort((low, high))]


def make_score(
    devs: Sequence[Dev],
    how: Evaluation,
    config: DecoderConfig | None,
    tokenizer: Any,
    mesh: Mesh | None = None,
    apply_fn: ApplyFn | None = None,
    tell: Tell | None = None,
    theirs: Mapping[str, Permuted] | None = None,
) -> Scorer:
    """The existing evaluation as a function of merged arrays.

    Args:
        devs: The dev sets.
        how: How they are evaluated.
        config: The decoder; None where only `apply_fn` knows.
        tokenizer: A transformers tokenizer.
        mesh: Where the decoder's parameters lie.
        apply_fn: A model to run in place of the decoder, given the merged arrays.
        tell: Told what is compiled.
        theirs: How Hugging Face's arrays are made of the merged ones, where those are another library's.

    Returns:
        A function that gives each task's accuracy, or stops where there is no point in going on.
    """

    def score(params: Params, share: float, hopeless: Hopeless | None = None) -> Scored:
        model = LanguageModel("sample", own_params(params, config, mesh, apply_fn, theirs), config, tokenizer, apply_fn)
        generator = make_generator(model, cast(Overflow, how.overflow), tell, how.batch_size)
        answers, tallies = {}, {}
        for dev in devs:
            examples = dev.part(share)
            prompts = [render(dev.template, example.instruction, tokenizer) for example in examples]
            tallies[dev.task.name] = _Tally(0, 0, len(examples))
            answers[dev.task.name] = answered(
                dev.task, examples, prompts, generator, dev.settings, how.execution, how.batch_size
            )
        total = sum(tally.left for tally in tallies.values())
        while answers:  # a batch of each task in turn, so that what is seen early is of all of them
            for task, batches in list(answers.items()):
                records = next(batches, None)
                if records is None:
                    del answers[task]
                else:
                    tallies[task] = tallies[task].after(records)
            left, most = sum(tally.left for tally in tallies.values()), {t: tally.most for t, tally in tallies.items()}
            if left and hopeless is not None and hopeless(most):
                seen = {task: tally.score for task, tally in tallies.items()}
                return Scored(seen, share * (1 - left / total), most)
        for task, tally in tallies.items():
            if not tally.judged:
                raise M3Error(f"{task}: no prompt fits in the model's context: take --overflow truncate")
        return Scored({task: tally.score for task, tally in tallies.items()}, share)

    return score


def as_scorer(score: Score) -> Scorer:
    """A score of one's own, which is of a whole merge.

    Args:
        score: What was given.
    """
    return lambda params, share, hopeless: Scored(score(params, share), share)


def own_params(
    params: Params,
    config: DecoderConfig | None,
    mesh: Mesh | None,
    apply_fn: ApplyFn | None,
    theirs: Mapping[str, Permuted] | None = None,
) -> Any:
    """What runs: the decoder's parameters, or the arrays by name that an `apply_fn` takes."""
    if config is None or apply_fn is not None:
        return params
    return decoder.params_from_tree(params if theirs is None else moved(params, theirs), config, mesh=mesh)
