"""What is attacked: the words that all examples of a task share, apart from the examples themselves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.errors import M3Error
from m3jax.evaluation.attacks.wording import CONTENT, Wording
from m3jax.evaluation.data import Row
from m3jax.evaluation.prompts import CHAT, render
from m3jax.evaluation.protocol import GenerationSettings, Generator
from m3jax.evaluation.tasks import Example, Execution, Task

_MARK = "\ue000content\ue000"  # letters that no test set uses

_MOST_LABELS = 256

Verdicts = Callable[[Sequence[str]], npt.NDArray[np.bool_]]
"""Prompts with a place for an example in, whether each example [prompts, examples] is right under each out."""


class Subject(NamedTuple):
    """A task's examples and the prompt that they share.

    Attributes:
        prompt: The prompt, with {content} where the example stands.
        template: The template around the prompt.
        examples: The examples.
        contents: What stands in the place of {content}, for each example.
        labels: The classes' words, for a task of naming a class.
        folded: Whether the prompt is the words of the template, as the task has none of its own.
    """

    prompt: str
    template: str
    examples: tuple[Example, ...]
    contents: tuple[str, ...]
    labels: tuple[str, ...]
    folded: bool = False


def find_subject(
    task: Task,
    rows: Sequence[Row],
    template: str | None = None,
    prompt: str | None = None,
    limit: int | None = None,
) -> Subject:
    """Takes a task's examples apart into what they share and what each has of its own.

    The task's own words around its examples are the prompt. Where a task has none, as where the instruction is the
    example, the words of the template are.

    Args:
        task: The task.
        rows: Its test set.
        template: The template around the prompt; the task's own if None.
        prompt: A prompt of the user's, with {content} in it once; the task's own if None.
        limit: Take the first so many examples only.

    Raises:
        M3Error: The rows are not of the task, or the prompt has no one place for an example.
    """
    template = template or task.template
    examples = tuple(task.read(rows)[:limit])
    if not examples:
        raise M3Error(f"{task.name}: there are no examples to evaluate")
    own = _shared_prompt(task, rows, examples)
    before, _, after = own.partition(CONTENT)
    contents = tuple(example.instruction[len(before) : len(example.instruction) - len(after)] for example in examples)
    if prompt is not None:
        if not isinstance(prompt, str) or prompt.count(CONTENT) != 1:
            raise M3Error(f"the prompt {prompt!r} should have {CONTENT} in it once, where the example is to stand")
        own = prompt
    folded = not Wording.of(own).words and template != CHAT
    if folded:
        own, template = render(template, own), "none"
    return Subject(own, template, examples, contents, _labels(task, rows[0]), folded)


def _shared_prompt(task: Task, rows: Sequence[Row], examples: Sequence[Example]) -> str:
    """The task's words around its examples, found by reading a row whose text is a mark."""
    found = {_instruction(task, {**rows[0], field: _MARK}) for field in rows[0]}
    prompts = [text.replace(_MARK, CONTENT) for text in found if text.count(_MARK) == 1]
    for prompt in prompts:
        before, _, after = prompt.partition(CONTENT)
        room = len(before) + len(after)
        fits = (
            len(text) >= room and text.startswith(before) and text.endswith(after)
            for text in (example.instruction for example in examples)
        )
        if all(fits):
            return prompt
    return CONTENT


def _instruction(task: Task, row: Row) -> str:
    """What a row asks; nothing where it is no longer one of the task."""
    try:
        return next((example.instruction for example in task.read([row])), "")
    except (M3Error, ValueError, TypeError):
        return ""


def _labels(task: Task, row: Row) -> tuple[str, ...]:
    """The classes' words, which a task of naming classes numbers from 0."""
    found: list[str] = []
    for number in range(_MOST_LABELS if task.has_correlation else 0):
        try:
            found += [task.read([{**row, "label": number}])[0].gold]
        except M3Error:
            break
    return tuple(found)


def make_verdicts(
    task: Task,
    subject: Subject,
    generator: Generator,
    settings: GenerationSettings,
    tokenizer: Any = None,
    execution: Execution | None = None,
) -> Verdicts:
    """What a model makes of the examples under other prompts; a prompt met again is not put to it again.

    Args:
        task: The task.
        subject: Its examples.
        generator: The model.
        settings: How it generates.
        tokenizer: For the template "chat".
        execution: How programs that it wrote are run.
    """
    known: dict[str, npt.NDArray[np.bool_]] = {}
    number = len(subject.examples)

    def verdicts(prompts: Sequence[str]) -> npt.NDArray[np.bool_]:
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        texts = [
            render(subject.template, prompt.replace(CONTENT, content), tokenizer)
            for prompt in fresh
            for content in subject.contents
        ]
        right = judge(task, subject.examples * len(fresh), texts, generator, settings, execution)
        known.update(zip(fresh, right.reshape(len(fresh), number), strict=True))
        return np.stack([known[prompt] for prompt in prompts]) if prompts else np.zeros((0, number), bool)

    return verdicts


def judge(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    generator: Generator,
    settings: GenerationSettings,
    execution: Execution | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether a model answers each text as its example wants, all in one batch.

    Args:
        task: The task.
        examples: An example for each text.
        texts: Whole prompts.
        generator: The model.
        settings: How it generates.
        execution: How programs that it wrote are run.

    Raises:
        M3Error: The task is judged elsewhere.
    """
    if not texts:
        return np.zeros(0, bool)
    answers = [completion.text for completion in generator(texts, settings)]
    found = [judgement.correct for judgement in task.judge(examples, answers, execution or Execution())]
    if None in found:
        raise M3Error(f"{task.name} is judged elsewhere, so that no accuracy can be attacked: take another task")
    return np.array(found, bool)
