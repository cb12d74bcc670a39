"""Evaluation: the paper's tasks, their scoring, a sandbox for generated code, and lm-evaluation-harness's tasks."""

from m3jax.evaluation.data import HubSet, load_rows
from m3jax.evaluation.harness import make_harness_model, run_harness
from m3jax.evaluation.harness_tasks import HarnessTasks, load_harness_tasks
from m3jax.evaluation.prompts import TEMPLATE_NAMES, render
from m3jax.evaluation.protocol import Completion, GenerationSettings, Generator, LogLikelihood, Pair, Scorer
from m3jax.evaluation.records import Record
from m3jax.evaluation.runner import Progress, Summary, evaluate_named, evaluate_task
from m3jax.evaluation.sandbox import Limits, Outcome, Program, run_program, run_programs, why_no_sandbox
from m3jax.evaluation.tasks import GRADERS, TASKS, Example, Execution, Judgement, Task, classification, get_task

__all__ = [
    "GRADERS",
    "TASKS",
    "TEMPLATE_NAMES",
    "Completion",
    "Example",
    "Execution",
    "GenerationSettings",
    "Generator",
    "HarnessTasks",
    "HubSet",
    "Judgement",
    "Limits",
    "LogLikelihood",
    "Outcome",
    "Pair",
    "Program",
    "Progress",
    "Record",
    "Scorer",
    "Summary",
    "Task",
    "classification",
    "evaluate_named",
    "evaluate_task",
    "get_task",
    "load_harness_tasks",
    "load_rows",
    "make_harness_model",
    "render",
    "run_harness",
    "run_program",
    "run_programs",
    "why_no_sandbox",
]
