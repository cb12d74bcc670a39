"""The tasks as the M³ paper sets them: its prompts, templates, limits and lengths, and its graders.

The paper (arXiv 2502.15434) is read by its code, github.com/MLGroupJLU/MixupModelMerge at 82147bd: promptbench/sst2.py,
promptbench/cola.py and promptbench/promptbench/models/models.py for SST-2 and CoLA,
inference_llms_instruct_math_code.py and ood_robust_inference.py for the others.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from m3jax.evaluation.data import Field, Row, read_fields
from m3jax.evaluation.protocol import GenerationSettings
from m3jax.evaluation.tasks.base import Example, Judgement, Task, each
from m3jax.evaluation.tasks.livebench import exported

_STOP = ("Instruction:", "Instruction", "Response:", "Response")
_LABELLED = GenerationSettings(max_tokens=1024, stop=_STOP)
_RAW = GenerationSettings(max_tokens=2048)

_SST2 = (
    "As a sentiment classifier, determine whether the following text is 'positive' or 'negative'.\n"
    "Text:{content}\n"
    "Please respond with 'positive' or 'negative'."
)
_COLA = (
    "As a grammar identification system, examine the provided sentence and respond with 'acceptable' for "
    "grammatically correct sentences or 'unacceptable' for incorrect ones.\n"
    "Sentence:{content}\n"
    "Please respond with 'acceptable' or 'unacceptable'."
)
_TYPOS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Text with errors:\n{text}\n\n### Response: the corrected paragraph is:"
)
_LONG_TESTS, _SIGNATURE = "493", "calculate_polygons(startx, starty, endx, endy, radius)"


def as_paper(task: Task) -> Task:
    """A task as the paper sets it; one that the paper sets as we do is the same but for its grader.

    Args:
        task: One of ours.

    Example:
        >>> from m3jax.evaluation.tasks.classification import cola
        >>> paper = as_paper(cola())
        >>> paper.template, paper.limit, paper.settings.max_tokens
        ('none', 10, 1024)
    """
    change = _CHANGES.get(task.name)
    return (task if change is None else change(task))._replace(protocol="m3-paper")


def _asked(prompt: str, limit: int | None) -> Callable[[Task], Task]:
    """A prompt around the sentence as it stands in the file, without a template."""

    def change(task: Task) -> Task:
        def read(rows: Sequence[Row]) -> list[Example]:
            sentences = read_fields(rows, {"sentence": Field(("sentence", "text", "content"))}, task.name)
            return [
                example._replace(instruction=prompt.replace("{content}", str(row["sentence"])))
                for example, row in zip(task.read(rows), sentences, strict=True)
            ]

        return task._replace(read=read, template="none", settings=_LABELLED, limit=limit)

    return change


def _mbpp(task: Task) -> Task:
    """Tabs for spaces; of the problem whose tests are too long the signature only."""

    def ask(example: Example) -> Example:
        text = example.instruction
        if example.id == _LONG_TESTS:
            text = f"{text.partition('Test examples:')[0]}Test examples:\n{_SIGNATURE}"
        return example._replace(instruction=text.replace("    ", "\t"))

    return task._replace(read=_each_asked(task, ask))


def _each_asked(task: Task, ask: Callable[[Example], Example]) -> Callable[[Sequence[Row]], list[Example]]:
    return lambda rows: [ask(example) for example in task.read(rows)]


def _raw(clean: Callable[[str], str]) -> Callable[[Task], Task]:
    """LiveBench's question alone."""
    return lambda task: task._replace(template="none", settings=_RAW, grader="paper", export=exported(clean))


def _tidied(text: str) -> str:
    return text.replace("The answer is:", "").strip(".,!?;: ").strip("\n").strip()


def _typos(task: Task) -> Task:
    """The question's first paragraph as the instruction, the others as the text; the last line is the answer."""

    def ask(example: Example) -> Example:
        instruction, _, text = example.instruction.partition("\n\n")
        return example._replace(instruction=_TYPOS.replace("{instruction}", instruction).replace("{text}", text))

    def judge(example: Example, text: str) -> Judgement:
        lines = [line for line in text.strip().split("\n") if line]
        return Judgement(example.gold in lines[-1], lines[-1]) if lines else Judgement(False, None)

    return task._replace(
        read=_each_asked(task, ask),
        judge=each(judge),
        template="none",
        settings=_RAW._replace(stop=("The answer is:",)),
        grader="paper",
        export=exported(str.strip),
        limit=50,
    )


def _judged_elsewhere(task: Task) -> Task:
    return task._replace(grader="paper")


_CHANGES: Mapping[str, Callable[[Task], Task]] = MappingProxyType(
    {
        "sst2": _asked(_SST2, None),
        "cola": _asked(_COLA, 10),
        "mbpp": _mbpp,
        "livebench_instruction_following": _raw(_tidied),
        "livebench_coding": _raw(str),
        "livebench_typos": _typos,
        "alpaca_eval": _judged_elsewhere,
    }
)
