"""Real test sets, gold answers as a model would give them, and models that are not there."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from m3jax.evaluation import Completion, Example, GenerationSettings, Generator, get_task, load_rows

FILES = {
    "gsm8k": "gsm8k_test.jsonl",
    "math": "math500_test.jsonl",
    "humaneval": "HumanEval.jsonl.gz",
    "mbpp": "mbpp_test.jsonl",
    "sst2": "sst2_phrases_dev.tsv",
}


def real_file(task: str) -> Path:
    """The task's real test set, or skip."""
    place = os.environ.get("M3JAX_DATA")
    if not place:
        pytest.skip("M3JAX_DATA does not name the directory of the real test sets")
    path = Path(place, FILES[task])
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def real_examples(task: str) -> list[Example]:
    return get_task(task).read(load_rows(real_file(task)))


def _fenced(code: str) -> str:
    return f"Here is the solution:\n\n```python\n{code}\n```\n\nIt handles every case."


# Each way in which a model may put the right answer.
GOLD: dict[str, list[Callable[[Example], str]]] = {
    "gsm8k": [
        lambda example: f"First 3 + 4 = 7, then more. The answer is: {example.gold}",
        lambda example: f"Step 1: 12.\n#### {example.gold}",
        lambda example: f"So we get $\\boxed{{{example.gold}}}$.",
        lambda example: f"The answer is: ${example.gold}.00.\n\nI hope that helps, 100 %.",
    ],
    "math": [
        lambda example: f"Since $x = 1$ we are done. The answer is: ${example.gold}$.",
        lambda example: f"Hence \\[\\boxed{{{example.gold}}}\\]\nas claimed.",
        lambda example: f"$\\boxed{{0}}$ is wrong. The answer is: $\\boxed{{{example.gold}}}$.",
    ],
    "humaneval": [
        lambda example: example.gold,
        lambda example: _fenced(example.extra["prompt"] + example.gold),
    ],
    "mbpp": [
        lambda example: _fenced(example.gold),
        lambda example: example.gold,
    ],
    "sst2": [lambda example: f"{example.gold.title()}."],
}


def corrupted(task: str, example: Example) -> str:
    """A completion like the first gold one with another answer."""
    if task in ("humaneval", "mbpp"):
        changed = Example(example.id, example.instruction, _other_program(example.gold), example.extra)
    elif task == "sst2":
        changed = example._replace(gold="negative" if example.gold == "positive" else "positive")
    else:
        changed = example._replace(gold=_other_answer(example.gold))
    return GOLD[task][0](changed)


def _other_program(code: str) -> str:
    """Every function returns what no test expects."""
    return re.sub(r"\b(return|yield)\b(?:[ \t]+from)?", r"\1 'neither here nor there',", code)


def _other_answer(answer: str) -> str:
    digits = [found for found in re.finditer(r"\d", answer) if answer[found.start() - 1 : found.start()] != "_"]
    if digits:
        place = digits[0].start()
        return answer[:place] + str(int(answer[place]) % 9 + 1) + answer[place + 1 :]
    return r"\text{neither}" if r"\text" in answer else answer + " + 1"


def answering(texts: dict[str, str]) -> Generator:
    """A model that gives the text whose key the prompt contains."""

    def generate(prompts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        return [Completion(text := _chosen(texts, prompt), len(text.split()), finished=True) for prompt in prompts]

    return generate


def _chosen(texts: dict[str, str], prompt: str) -> str:
    return next((text for key, text in texts.items() if key in prompt), "")
