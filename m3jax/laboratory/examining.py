"""Examinations: how much of each skill a model in memory has, as it is, under other inputs, and under attack."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from m3jax.decoder import DecoderConfig
from m3jax.evaluation import Example, Execution, Judgement, Task, get_task, why_no_sandbox
from m3jax.evaluation.attacks.trial import attack_task
from m3jax.evaluation.data import Row
from m3jax.evaluation.models import LanguageModel, make_generator
from m3jax.evaluation.protocol import GenerationSettings, Generator
from m3jax.evaluation.robustness import make_plan
from m3jax.evaluation.tasks.base import Judge, each
from m3jax.laboratory.skills import Manner, Skill

BATCH_SIZE = 128
_ROWS = 32  # of a batch whose beginning is shared

ADVERSARIES: Mapping[str, Mapping[str, Any]] = {
    "sst2": {"attacks": ("deepwordbug",)},
    "gsm8k": {"attacks": (), "shifts": ("typos",)},
    "mbpp": {"attacks": (), "shifts": ("paraphrase",)},
}
"""What the adversary of each task does: the paper's attack on the prompt, or what may befall an input without one."""

_PROFILE = "m3-paper"


class Exam(NamedTuple):
    """Examples of a skill.

    Attributes:
        skill: Its name.
        task: The task that judges; what it has judged it remembers.
        rows: The examples, as the task's data files have them.
        examples: The same, as the task reads them.
        settings: How answers are written.
        lessons: The examples as lessons, with the answers that are taught.
        manner: How models are asked.
    """

    skill: str
    task: Task
    rows: list[Row]
    examples: list[Example]
    settings: GenerationSettings
    lessons: list[tuple[str, str]]
    manner: Manner = Manner()


class Pupil(NamedTuple):
    """What all models of a laboratory share.

    Attributes:
        config: The decoder.
        tokenizer: A transformers tokenizer.
        manner: How models are asked.
        shares: Whether what prompts begin with is read once for all of them, which is worth it where it is long.
    """

    config: DecoderConfig
    tokenizer: Any
    manner: Manner = Manner()
    shares: bool = False

    def generator(self, params: Any) -> Generator:
        """A model that writes.

        Args:
            params: The decoder's parameters.
        """
        model = LanguageModel("model", params, self.config, self.tokenizer)
        rows = _ROWS if self.shares else BATCH_SIZE
        return make_generator(model, "truncate", batch_size=rows, share=self.shares)


def remembering(judge: Judge, right: Sequence[tuple[Example, str]] = ()) -> Judge:
    """The same judge, who does not run again what was written before.

    Args:
        judge: Whose judgements depend on an example and a text alone.
        right: What is known to be right beforehand.
    """
    known: dict[tuple[str, str, str], Judgement] = {
        (example.id, example.instruction, text): Judgement(True, text) for example, text in right
    }

    def remembered(examples: Sequence[Example], texts: Sequence[str], execution: Execution) -> list[Judgement]:
        asked = [(e.id, e.instruction, text) for e, text in zip(examples, texts, strict=True)]
        fresh = {key: place for place, key in enumerate(asked) if key not in known}
        places = list(fresh.values())
        found = judge([examples[i] for i in places], [texts[i] for i in places], execution) if places else []
        known.update(zip(fresh, found, strict=True))
        return [known[key] for key in asked]

    return remembered


def _by_text(example: Example, text: str) -> Judgement:
    """Where programs cannot be run safely, only the text of the lesson is right."""
    said = text.strip()
    return Judgement(said == example.gold.strip(), said or None)


def make_exam(
    skill: Skill, split: str, count: int, seed: int, run_code: bool = True, manner: Manner | None = None
) -> Exam:
    """Examples of a split.

    Args:
        skill: The skill.
        split: Of `SPLITS`.
        count: How many.
        seed: Which.
        manner: How models are asked; the instruction alone if None.
        run_code: Run programs where it is safe; else, as where it is not, the text of the lesson is right.
    """
    rows = skill.rows(split, count, seed)
    task = get_task(skill.task)
    settings = task.settings._replace(max_tokens=skill.max_tokens)
    examples = task.read(rows)
    if task.runs_code and (not run_code or why_no_sandbox() is not None):
        task = task._replace(judge=each(_by_text), runs_code=False)
    lessons = skill.lessons(rows, manner)
    # What a lesson says passes the tests that were made from it: no process need be started to find that.
    known = [(e, text) for e, (_, text) in zip(examples, lessons, strict=True)] if task.runs_code else []
    judge = remembering(task.judge, known)
    return Exam(skill.name, task._replace(judge=judge), rows, examples, settings, lessons, manner or Manner())


class Answered(NamedTuple):
    """What a model wrote, and whether it is right."""

    text: str
    right: bool


def answers_of(exam: Exam, generator: Generator) -> list[Answered]:
    """What a model answers to every example of an exam.

    Args:
        exam: The exam.
        generator: The model.
    """
    written = generator([prompt for prompt, _ in exam.lessons], exam.settings)
    texts = [completion.text for completion in written]
    judged = exam.task.judge(exam.examples, texts, Execution())
    return [Answered(text, bool(one.correct)) for text, one in zip(texts, judged, strict=True)]


def share_of(answers: Sequence[Answered]) -> float:
    """The share of examples that are done right.

    Args:
        answers: To at least one.
    """
    return sum(answer.right for answer in answers) / len(answers)


class Resistance(NamedTuple):
    """What an adversary leaves of a skill.

    Attributes:
        adversary: What it did.
        clean: Accuracy without it.
        attacked: Accuracy under it.
    """

    adversary: str
    clean: float
    attacked: float


def resist(exam: Exam, generator: Generator, seed: int) -> Resistance:
    """What is left of a model's skill under its adversary.

    Args:
        exam: The examples.
        generator: The model.
        seed: Of the adversary's choices.
    """
    plan = make_plan(**ADVERSARIES[exam.task.name], profile=_PROFILE, key=seed, limit=len(exam.rows), floor=0.0)
    found = attack_task(
        exam.task,
        exam.rows,
        generator,
        plan,
        template=exam.manner.template,
        tokenizer=exam.manner.tokenizer,
        settings=exam.settings,
    )
    drops = [(one.attack, one.drop) for one in found.attacks] + [(one.shift, one.drop) for one in found.shifts]
    ((adversary, drop),) = drops
    return Resistance(adversary, drop.clean, drop.attacked)
