"""The tasks, by name."""

from collections.abc import Callable

from m3jax.evaluation.checks import check_name
from m3jax.evaluation.tasks.alpaca_eval import alpaca_eval
from m3jax.evaluation.tasks.base import GRADERS, Example, Execution, Judgement, Task, graded_by
from m3jax.evaluation.tasks.classification import classification, cola, sst2
from m3jax.evaluation.tasks.livebench import livebench_coding, livebench_instruction_following, livebench_typos
from m3jax.evaluation.tasks.mathematics import gsm8k, math
from m3jax.evaluation.tasks.paper import as_paper
from m3jax.evaluation.tasks.programming import humaneval, mbpp

__all__ = [
    "GRADERS",
    "PAPER",
    "PROTOCOLS",
    "TASKS",
    "Example",
    "Execution",
    "Judgement",
    "Task",
    "classification",
    "get_task",
    "graded_by",
]

PAPER = "m3-paper"
PROTOCOLS = ("m3jax", PAPER)
"""Whose words, settings and limits a task has: ours, or the M³ paper's."""

TASKS: dict[str, Callable[[], Task]] = {
    "gsm8k": gsm8k,
    "math": math,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "alpaca_eval": alpaca_eval,
    "livebench_instruction_following": livebench_instruction_following,
    "livebench_coding": livebench_coding,
    "livebench_typos": livebench_typos,
    "sst2": sst2,
    "cola": cola,
}


def get_task(name: str, grader: str | None = None, profile: str = "m3jax") -> Task:
    """The task of that name.

    Args:
        name: What users call it.
        grader: Whose rule judges, one of `GRADERS`; the profile's own if None.
        profile: Under "m3-paper" the task is as the M³ paper sets it, and judged so; under any other it is ours.

    Raises:
        M3Error: There is none, or the grader cannot judge it.

    Example:
        >>> get_task("gsm8k").template
        'wizardmath'
    """
    check_name("task", name, TASKS)
    task = TASKS[name]()
    if profile == PAPER:
        return graded_by(as_paper(task), "paper" if grader is None else grader)
    return graded_by(task, "m3jax" if grader is None else grader)
