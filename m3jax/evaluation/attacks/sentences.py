"""Attacks that put something behind the prompt: StressTest and CheckList, as PromptBench sets them up.

References:
    Naik et al., Stress Test Evaluation for Natural Language Inference, 2018;
    Ribeiro et al., Beyond Accuracy: Behavioral Testing of NLP Models with CheckList, 2020;
    Zhu et al., PromptBench: Towards Evaluating the Robustness of Large Language Models on Adversarial Prompts, 2023.
"""

import string
from collections.abc import Callable
from typing import Any, TypeAlias

from m3jax.evaluation.attacks.draws import stream
from m3jax.evaluation.attacks.wording import Wording

Variants: TypeAlias = Callable[[Wording], list[str]]
"""Whole prompts that are tried in place of one."""

TAUTOLOGIES = (" and true is true", " and false is not true", " and true is true" * 5)
_SIGNS = string.ascii_uppercase + string.ascii_lowercase + string.digits


def stresstest(prompt: Wording) -> list[str]:
    """The prompt with each of PromptBench's three tautologies behind its last word.

    Args:
        prompt: The prompt. Where a placeholder comes last, the tautology goes behind it, not into it.
    """
    return [prompt.followed_by(tautology) for tautology in TAUTOLOGIES]


def checklist(key: Any, count: int = 50, length: int = 10) -> Variants:
    """The prompt with random letters and digits behind its last word.

    Args:
        key: Of the letters: an integer seed or a threefry2x32 JAX key.
        count: How many variants; PromptBench has 50.
        length: Letters of each; PromptBench has 10.

    Example:
        >>> [variant[:7] for variant in checklist(0, count=2)(Wording.of("Answer."))]
        ['Answer ', 'Answer ']
    """
    draw = stream(key, "checklist")
    numbers = (range(start, start + length) for start in range(0, count * length, length))
    additions = ["".join(_SIGNS[draw(number, len(_SIGNS))] for number in each) for each in numbers]

    def variants(prompt: Wording) -> list[str]:
        return [prompt.followed_by(f" {addition}") for addition in additions]

    return variants
