"""The search for the worst prompt: which words matter, and what to put in their place.

References:
    Zhu et al., PromptBench: Towards Evaluating the Robustness of Large Language Models on Adversarial Prompts, 2023;
    Morris et al., TextAttack: A Framework for Adversarial Attacks, Data Augmentation, and Adversarial Training in
    NLP, 2020.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from m3jax.evaluation.attacks.sentences import Variants
from m3jax.evaluation.attacks.wording import Candidates, Filter, Wording

Score: TypeAlias = Callable[[Sequence[str]], npt.NDArray[np.float64]]
"""Prompts in, the accuracy under each out, all in one batch."""

Importance: TypeAlias = Literal["unk", "delete"]
"""How a word's weight is found: by a word unknown to the model in its place, or by leaving it out."""

_UNKNOWN = "[UNK]"


class Change(NamedTuple):
    """A word that was replaced.

    Attributes:
        place: Its place among the prompt's words.
        before: The word.
        after: What stands there now.
    """

    place: int
    before: str
    after: str


class Found(NamedTuple):
    """The worst prompt of a search.

    Attributes:
        prompt: The prompt.
        score: The accuracy under it.
        clean: The accuracy under the original.
        queries: Prompts that were scored, the original among them; each counts once.
        exhausted: Whether the budget ended the search.
        candidates: Prompts that could have taken its place; where there was none, nothing was tried.
        changes: The words replaced, in the order in which it was done.
    """

    prompt: str
    score: float
    clean: float
    queries: int
    exhausted: bool
    candidates: int
    changes: tuple[Change, ...] = ()


class _Account:
    """Scores prompts as far as the budget goes; a prompt met again is not scored again."""

    def __init__(self, score: Score, budget: int | None) -> None:
        self._score = score
        self._budget = budget
        self.known: dict[str, float] = {}
        self.exhausted = False

    def scores(self, prompts: Sequence[str]) -> list[float]:
        """The scores of the prompts, or of the first of them that the budget allows."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        left = len(fresh) if self._budget is None else self._budget - len(self.known)
        if len(fresh) > left:
            fresh, self.exhausted = fresh[:left], True
        if fresh:
            self.known |= dict(zip(fresh, map(float, self._score(fresh)), strict=True))
        end = next((i for i, prompt in enumerate(prompts) if prompt not in self.known), len(prompts))
        return [self.known[prompt] for prompt in prompts[:end]]


def try_all(
    prompt: Wording, score: Score, variants: Variants, budget: int | None = None, *, takes_worst: bool = False
) -> Found:
    """The worst of some whole prompts.

    Args:
        prompt: The original.
        score: Scores prompts.
        variants: What is tried in its place, all in one batch.
        budget: Most prompts to score, the original among them; no limit if None.
        takes_worst: Take the worst variant even where the original is worse, and of those that are as bad the first in
            the order of their texts.
    """
    account = _Account(score, budget)
    (clean,) = account.scores([prompt.text])
    tried = variants(prompt) if clean > 0 or takes_worst else []
    tried = sorted(set(tried) - {prompt.text}) if takes_worst else tried
    scores = account.scores(tried)
    found = min(zip(scores, tried, strict=False), key=lambda pair: pair[0], default=(clean, prompt.text))
    worst, text = found if found[0] < clean or takes_worst else (clean, prompt.text)
    return Found(text, worst, clean, len(account.known), account.exhausted, len(tried))


def greedy(
    prompt: Wording,
    score: Score,
    candidates: Candidates,
    importance: Importance,
    *,
    stop_words: frozenset[str] = frozenset(),
    filters: Sequence[Filter] = (),
    positions: tuple[int, ...] | None = None,
    budget: int | None = None,
    without: Callable[[Wording, int], str] = Wording.without,
    takes_worst: bool = False,
) -> Found:
    """Replaces words one by one, the most important first, each by its worst candidate.

    PromptBench's search: the words that may change are ranked by the accuracy without them; in that order each is
    replaced by the candidate under which accuracy is lowest, if that is lower than before. A word is visited once.
    It stops where nothing is left to lose.

    Args:
        prompt: The original; its fixed words stay.
        score: Scores prompts, the candidates of one step in one batch.
        candidates: What may take the place of a word.
        importance: How words are ranked.
        stop_words: Lower-case words that stay.
        filters: Each takes away prompts that are too far from the original.
        positions: Only these of the words that may change, counted from 0; all if None.
        budget: Most prompts to score, the original among them; no limit if None.
        without: How a word is left out.
        takes_worst: As the M³ paper's code does, take the first word's worst candidate even where it is no worse than
            the original, and of candidates that are as bad the first in the order of their texts.
    """
    account = _Account(score, budget)
    (clean,) = account.scores([prompt.text])
    current, changes, candidate_count = prompt, list[Change](), 0
    lowest = math.inf if takes_worst else clean
    open_words = modifiable(prompt, stop_words, positions) if clean > 0 or takes_worst else []
    for index in _ranked(prompt, open_words, importance, account, without):
        if account.exhausted or lowest <= 0:
            break
        tried = [current.replaced(index, word) for word in candidates(current, index)]
        if takes_worst:
            tried.sort(key=lambda one: one.text)
        for near in filters:
            tried = near(prompt, current, index, tried)
        candidate_count += len(tried)
        scores = account.scores([one.text for one in tried])
        if scores and min(scores) < lowest:
            best = scores.index(min(scores))
            lowest, current = scores[best], tried[best]
            changes.append(Change(index, prompt.words[index], current.words[index]))
    score_found = lowest if changes else clean
    return Found(
        current.text, score_found, clean, len(account.known), account.exhausted, candidate_count, tuple(changes)
    )


def modifiable(prompt: Wording, stop_words: frozenset[str], positions: tuple[int, ...] | None = None) -> list[int]:
    """Indices of the words that may change.

    Args:
        prompt: The prompt.
        stop_words: Lower-case words that stay.
        positions: Only these of them, counted from 0; all if None.

    Example:
        >>> modifiable(Wording.of("Is the film good?", ["good"]), frozenset({"the"}))
        [0, 2]
    """
    free = [
        index for index, word in enumerate(prompt.words) if index not in prompt.fixed and word.lower() not in stop_words
    ]
    return free if positions is None else [free[place] for place in positions if place < len(free)]


def _ranked(
    prompt: Wording,
    indices: list[int],
    importance: Importance,
    account: _Account,
    without: Callable[[Wording, int], str],
) -> list[int]:
    """The words whose loss costs most come first; where it costs the same, the first of the prompt."""
    if importance == "unk":
        lacking = [prompt.replaced(index, _UNKNOWN).text for index in indices]
    else:
        lacking = [without(prompt, index) for index in indices]
    scores = account.scores(lacking)
    order = np.argsort(np.array(scores), kind="stable")
    return [indices[place] for place in order]
