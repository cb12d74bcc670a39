"""What a task is: how its examples are read, put to a model, judged, and handed on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.checks import check_name
from m3jax.evaluation.data import HubSet, Row
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.sandbox import Limits
from m3jax.evaluation.scorers.verified import why_no_math_verify


class Example(NamedTuple):
    """One example of a test set.

    Attributes:
        id: Its name in the test set.
        instruction: What the model is asked, before any template.
        gold: The right answer in the words of the test set; empty where only a judge elsewhere knows.
        extra: What judging or handing on needs besides.
    """

    id: str
    instruction: str
    gold: str
    extra: Mapping[str, Any] = {}


class Judgement(NamedTuple):
    """What a completion is worth.

    Attributes:
        correct: Whether it is right; None where only a judge elsewhere can say.
        parsed: The answer found in it; None where none was found, which counts as wrong.
        detail: Why it is wrong, where more is known.
        unclear: Whether it answers, but says no one thing: a range, two labels, neither. It counts as wrong.
    """

    correct: bool | None
    parsed: str | None
    detail: str = ""
    unclear: bool = False


class Execution(NamedTuple):
    """How code that a model wrote is run, once the caller has allowed it.

    Attributes:
        allow_unsandboxed: Go on where the system allows no sandbox; see `m3jax.evaluation.sandbox.run_program`.
        workers: Programs at a time; the number of usable cores if None.
        limits: What each program may use.
    """

    allow_unsandboxed: bool = False
    workers: int | None = None
    limits: Limits = Limits()


class Answer(NamedTuple):
    """A finished example, for tasks that hand answers on to a judge elsewhere."""

    example: Example
    text: str
    tokens: int


Judge = Callable[[Sequence[Example], Sequence[str], Execution], list[Judgement]]
Export = Callable[[Sequence[Answer], str, Path], Path]


class Task(NamedTuple):
    """A task: pure functions, made by a factory that closes over its settings.

    Attributes:
        name: What users call it.
        read: Turns the rows of a test set into examples.
        judge: Judges completions of examples, both in the same order.
        template: The prompt template of the paper's evaluation.
        settings: How to generate.
        hub: Where its test set is on the Hugging Face hub, None if it must be given as a file.
        columns: Columns of its TSV or CSV files that have no header line.
        runs_code: Whether judging runs what the model wrote.
        has_correlation: Whether the summary gives Matthews' correlation too.
        judged_elsewhere: Whether only another program can judge, so that no verdict is given here.
        export: Writes the answers as a judge elsewhere reads them: given the answers, the model's name and a directory.
        grader: Whose rule `judge` follows, one of `GRADERS`.
        graders: The judges that follow the rules of others, by name.
        limit: The first so many examples are taken where nothing else is said; all if None.
        protocol: Whose words, settings and limit these are: ours, or the M³ paper's.
    """

    name: str
    read: Callable[[Sequence[Row]], list[Example]]
    judge: Judge
    template: str
    settings: GenerationSettings
    hub: HubSet | None = None
    columns: tuple[str, ...] = ()
    runs_code: bool = False
    has_correlation: bool = False
    judged_elsewhere: bool = False
    export: Export | None = None
    grader: str = "m3jax"
    graders: Mapping[str, Judge] = {}
    limit: int | None = None
    protocol: str = "m3jax"


GRADERS = ("m3jax", "paper", "math_verify")
"""Whose rule decides what the answer is and whether it is right: ours, the M³ paper's, or the package math-verify's."""


def graded_by(task: Task, grader: str) -> Task:
    """The task, judged by another's rule.

    Args:
        task: The task.
        grader: One of `GRADERS`.

    Raises:
        M3Error: There is no such grader, it has no rule for this task, or its package is missing.
    """
    check_name("grader", grader, GRADERS)
    if grader == task.grader:
        return task
    if grader not in task.graders:
        own = ", ".join([task.grader, *task.graders])
        raise M3Error(f"the grader {grader} has no rule for {task.name}; choose among {own}")
    if grader == "math_verify" and (why_not := why_no_math_verify()) is not None:
        raise M3Error(f"the grader math_verify {why_not}")
    return task._replace(judge=task.graders[grader], grader=grader)


def each(judge_one: Callable[[Example, str], Judgement]) -> Judge:
    """A judge of many from a judge of one that runs no code."""

    def judge(examples: Sequence[Example], texts: Sequence[str], _: Execution) -> list[Judgement]:
        return list(map(judge_one, examples, texts))

    return judge
