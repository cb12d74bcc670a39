"""The attacks by name, and how hard each profile tries."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.attacks.edits import deepwordbug, levenshtein, textbugger
from m3jax.evaluation.attacks.search import Found, Importance, Score, greedy, try_all
from m3jax.evaluation.attacks.sentences import Variants, checklist, stresstest
from m3jax.evaluation.attacks.wording import Candidates, Wording
from m3jax.evaluation.attacks.words import STOP_WORDS, Embeddings, synonyms
from m3jax.evaluation.checks import check_name

Level = Literal["character", "word", "sentence"]

MaskedWords = Callable[[int], Candidates]
"""A masked language model as a source: given how many candidates of each token it may take, its candidates."""


class Profile(NamedTuple):
    """How hard the attacks try.

    Attributes:
        name: What users call it.
        positions: Only these of the words that may change, counted from 0; all if None.
        limit: Examples used where the user says nothing; all if None.
        masked_candidates: BERT-Attack's candidates of each token.
        synonyms: TextFooler's candidates of each word.
        near_words: TextBugger's candidates of like meaning.
        least_cosine: TextFooler's bound on their nearness.
        max_distance: DeepWordBug's bound on the edit distance of the prompts.
    """

    name: str
    positions: tuple[int, ...] | None = None
    limit: int | None = None
    masked_candidates: int = 48
    synonyms: int = 50
    near_words: int = 5
    least_cosine: float = 0.6
    max_distance: int = 30


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # The configuration in PromptBench's repository.
        "promptbench": Profile("promptbench"),
        # As the repository of the M³ paper changes it: the third, fourth and seventh of the words, two candidates.
        "m3-paper": Profile("m3-paper", positions=(2, 3, 6), limit=10, masked_candidates=2),
    }
)


class Attack(NamedTuple):
    """An attack on a prompt.

    Attributes:
        name: What users call it.
        level: What it changes.
        run: Searches for the worst prompt: given the prompt, the function that scores prompts, and the most prompts
            to score, or None.
    """

    name: str
    level: Level
    run: Callable[[Wording, Score, int | None], Found]


class Sources(NamedTuple):
    """Where attacks take words from.

    Attributes:
        masked_words: For BERT-Attack.
        embeddings: For TextFooler, and for TextBugger's synonyms.
    """

    masked_words: MaskedWords | None = None
    embeddings: Embeddings | None = None


def _greedy(
    name: str,
    level: Level,
    candidates: Candidates,
    importance: Importance,
    profile: Profile,
    max_distance: int | None = None,
) -> Attack:
    def near(original: str, changed: str) -> bool:
        return max_distance is None or levenshtein(original, changed) <= max_distance

    def run(prompt: Wording, score: Score, budget: int | None) -> Found:
        return greedy(
            prompt,
            score,
            candidates,
            importance,
            stop_words=STOP_WORDS,
            allowed=near,
            positions=profile.positions,
            budget=budget,
        )

    return Attack(name, level, run)


def _by_sentences(name: str, variants: Variants) -> Attack:
    return Attack(name, "sentence", lambda prompt, score, budget: try_all(prompt, score, variants, budget))


def _deepwordbug(key: Any, profile: Profile, sources: Sources) -> Attack:
    return _greedy("deepwordbug", "character", deepwordbug(key), "unk", profile, profile.max_distance)


def _textbugger(key: Any, profile: Profile, sources: Sources) -> Attack:
    near = None if sources.embeddings is None else synonyms(sources.embeddings, profile.near_words)
    return _greedy("textbugger", "character", textbugger(key, near), "delete", profile)


def _bertattack(key: Any, profile: Profile, sources: Sources) -> Attack:
    if sources.masked_words is None:
        raise M3Error("bertattack takes its words from a masked language model: give a BERT with --masked-lm MODEL")
    return _greedy("bertattack", "word", sources.masked_words(profile.masked_candidates), "unk", profile)


def _textfooler(key: Any, profile: Profile, sources: Sources) -> Attack:
    if sources.embeddings is None:
        raise M3Error("textfooler takes its words from word vectors: give a text file of them with --embeddings FILE")
    near = synonyms(sources.embeddings, profile.synonyms, profile.least_cosine)
    return _greedy("textfooler", "word", near, "delete", profile)


def _stresstest(key: Any, profile: Profile, sources: Sources) -> Attack:
    return _by_sentences("stresstest", stresstest)


def _checklist(key: Any, profile: Profile, sources: Sources) -> Attack:
    return _by_sentences("checklist", checklist(key))


_MAKERS: Mapping[str, Callable[[Any, Profile, Sources], Attack]] = MappingProxyType(
    {
        "deepwordbug": _deepwordbug,
        "textbugger": _textbugger,
        "bertattack": _bertattack,
        "textfooler": _textfooler,
        "stresstest": _stresstest,
        "checklist": _checklist,
    }
)
ATTACKS = tuple(_MAKERS)


def get_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        M3Error: There is none.

    Example:
        >>> get_profile("m3-paper").positions
        (2, 3, 6)
    """
    check_name("profile", name, PROFILES)
    return PROFILES[name]


def make_attack(
    name: str, key: Any, profile: Profile = PROFILES["promptbench"], sources: Sources | None = None
) -> Attack:
    """The attack of that name.

    Args:
        name: One of `ATTACKS`.
        key: Of its random choices: an integer seed or a threefry2x32 JAX key.
        profile: How hard it tries.
        sources: Where it takes words from.

    Raises:
        M3Error: There is no such attack, or it lacks its source.

    Example:
        >>> make_attack("stresstest", key=0).level
        'sentence'
    """
    check_name("attack", name, ATTACKS)
    return _MAKERS[name](key, profile, sources or Sources())
