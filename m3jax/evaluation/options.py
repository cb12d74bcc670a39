"""The options that evaluating, attacking and exploring have in common."""

from collections.abc import Collection
from typing import NamedTuple

from m3jax.evaluation.checks import check_choice, check_count
from m3jax.evaluation.prompts import TEMPLATE_NAMES
from m3jax.evaluation.protocol import OVERFLOWS, GenerationSettings
from m3jax.evaluation.tasks import GRADERS, Execution, Task

DTYPES = ("float32", "bfloat16", "float16")


class Evaluation(NamedTuple):
    """How models are evaluated, in the words of `m3jax evaluate`.

    Attributes:
        limit: Use the first N examples of each task only.
        batch_size: Prompts that run together.
        max_tokens: Most tokens of an answer.
        template: Prompt template.
        overflow: What becomes of prompts that leave an answer no room.
        run_code: Run programs that the model wrote, sandboxed.
        allow_unsandboxed: Run them with limits only where no sandbox is possible.
        grader: Whose rule judges answers; that of the profile if None.
    """

    limit: int | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    template: str | None = None
    overflow: str = "error"
    run_code: bool = False
    allow_unsandboxed: bool = False
    grader: str | None = None

    @property
    def execution(self) -> Execution:
        """How programs that the model wrote are run."""
        return Execution(allow_unsandboxed=self.allow_unsandboxed)

    def settings(self, task: Task) -> GenerationSettings:
        """How to generate for a task: as it says itself, but for the number of tokens.

        Args:
            task: The task.
        """
        return task.settings if self.max_tokens is None else task.settings._replace(max_tokens=self.max_tokens)


def check_evaluation(how: Evaluation, dtype: str | None = None, overflows: Collection[str] = OVERFLOWS) -> None:
    """Check options, before anything heavy is loaded.

    Args:
        how: The options.
        dtype: Of the weights; their own if None.
        overflows: What may become of prompts that leave an answer no room.

    Raises:
        M3Error: They cannot be followed.
    """
    check_choice("--overflow", how.overflow, overflows)
    if how.grader is not None:
        check_choice("--grader", how.grader, GRADERS)
    if how.template is not None:
        check_choice("--template", how.template, TEMPLATE_NAMES)
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    check_count("--limit", how.limit, optional=True)
    check_count("--max-tokens", how.max_tokens, optional=True)
    check_count("--batch-size", how.batch_size)
