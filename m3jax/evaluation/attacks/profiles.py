"""The attacks by name, and how hard each profile tries."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.attacks import textattack
from m3jax.evaluation.attacks.edits import deepwordbug, levenshtein, textbugger
from m3jax.evaluation.attacks.likeness import Bound, Encode, Tag, keeps_meaning, keeps_part_of_speech
from m3jax.evaluation.attacks.search import Found, Importance, Score, greedy, try_all
from m3jax.evaluation.attacks.semantic import PROMPTS
from m3jax.evaluation.attacks.sentences import Variants, checklist, stresstest
from m3jax.evaluation.attacks.wording import CONTENT, Candidates, Filter, Wording
from m3jax.evaluation.attacks.words import STOP_WORDS, Embeddings, synonyms
from m3jax.evaluation.checks import check_name

Level = Literal["character", "word", "sentence", "semantics"]

MaskedWords = Callable[[int, bool], Candidates]
"""A masked language model as a source: given how many candidates of each token it may take, and whether they are to be
TextAttack's to the letter, its candidates."""


class Profile(NamedTuple):
    """How hard the attacks try.

    Attributes:
        name: What users call it.
        positions: Only these of the words that may change, counted from 0; all if None.
        to_the_letter: Whether words, candidates, sentences and ties are those of the M³ paper's code, see `textattack`.
        masked_candidates: BERT-Attack's candidates of each token.
        synonyms: TextFooler's candidates of each word.
        near_words: TextBugger's candidates of like meaning.
        least_cosine: TextFooler's bound on their nearness.
        max_distance: DeepWordBug's bound on the edit distance of the prompts.
        likeness: What a sentence encoder, if one is given, must find of each attack's prompts.
    """

    name: str
    positions: tuple[int, ...] | None = None
    to_the_letter: bool = False
    masked_candidates: int = 48
    synonyms: int = 50
    near_words: int = 5
    least_cosine: float = 0.6
    max_distance: int = 30
    # github.com/microsoft/promptbench at fcda538, promptbench/prompt_attack/__init__.py and attack.py. TextFooler's
    # bound is 1 - 0.5 / π: its own code leaves out the division of the angle by π (TextAttack, recipes).
    likeness: Mapping[str, Bound] = MappingProxyType(
        {
            "textbugger": Bound(0.8),
            "bertattack": Bound(0.8),
            "textfooler": Bound(0.840845057, "angular", window=15),
        }
    )


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # The configuration in PromptBench's repository.
        "promptbench": Profile("promptbench"),
        # As the repository of the M³ paper has it: the third, fourth and seventh of the words, two candidates.
        "m3-paper": Profile("m3-paper", positions=(2, 3, 6), to_the_letter=True, masked_candidates=2),
    }
)


class Attack(NamedTuple):
    """An attack on a prompt.

    Attributes:
        name: What users call it.
        level: What it changes.
        run: Searches for the worst prompt: given the prompt, the function that scores prompts, and the most prompts
            to score, or None.
        read: Takes a prompt apart: given its text and the words that are never touched.
    """

    name: str
    level: Level
    run: Callable[[Wording, Score, int | None], Found]
    read: Callable[[str, Sequence[str]], Wording] = Wording.of


class Sources(NamedTuple):
    """Where attacks take words from.

    Attributes:
        masked_words: For BERT-Attack.
        embeddings: For TextFooler, and for TextBugger's synonyms.
        task: Whose prompts the semantic attack tries.
        encode: A sentence encoder, which keeps TextBugger, BERT-Attack and TextFooler near the original.
        tag: A tagger, which keeps TextFooler to a word's part of speech.
        least_similarity: Of the encoder, in place of the profile's bounds.
    """

    masked_words: MaskedWords | None = None
    embeddings: Embeddings | None = None
    task: str | None = None
    encode: Encode | None = None
    tag: Tag | None = None
    least_similarity: float | None = None


def _greedy(
    name: str,
    level: Level,
    candidates: Candidates,
    importance: Importance,
    profile: Profile,
    filters: Sequence[Filter] = (),
) -> Attack:
    def run(prompt: Wording, score: Score, budget: int | None) -> Found:
        return greedy(
            prompt,
            score,
            candidates,
            importance,
            stop_words=frozenset() if profile.to_the_letter else STOP_WORDS,
            filters=filters,
            positions=profile.positions,
            budget=budget,
            without=textattack.without if profile.to_the_letter else Wording.without,
            takes_worst=profile.to_the_letter,
        )

    return Attack(name, level, run, _reader(profile))


def _near(most: int) -> Filter:
    """Prompts within an edit distance of the original."""

    def keep(original: Wording, current: Wording, index: int, tried: Sequence[Wording]) -> list[Wording]:
        return [one for one in tried if levenshtein(original.text, one.text) <= most]

    return keep


def _likeness(name: str, profile: Profile, sources: Sources) -> list[Filter]:
    """What a sentence encoder takes away of an attack's prompts; nothing where none is given."""
    if sources.encode is None:
        return []
    bound = profile.likeness[name]
    if sources.least_similarity is not None:
        bound = bound._replace(least=sources.least_similarity)
    return [keeps_meaning(sources.encode, bound)]


def _reader(profile: Profile) -> Callable[[str, Sequence[str]], Wording]:
    return textattack.read_prompt if profile.to_the_letter else Wording.of


def _by_sentences(name: str, variants: Variants, profile: Profile, level: Level = "sentence") -> Attack:
    def run(prompt: Wording, score: Score, budget: int | None) -> Found:
        return try_all(prompt, score, variants, budget, takes_worst=profile.to_the_letter)

    return Attack(name, level, run, _reader(profile))


def _deepwordbug(key: Any, profile: Profile, sources: Sources) -> Attack:
    edits = textattack.deepwordbug(key) if profile.to_the_letter else deepwordbug(key)
    return _greedy("deepwordbug", "character", edits, "unk", profile, [_near(profile.max_distance)])


def _textbugger(key: Any, profile: Profile, sources: Sources) -> Attack:
    near = None if sources.embeddings is None else synonyms(sources.embeddings, profile.near_words)
    return _greedy(
        "textbugger", "character", textbugger(key, near), "delete", profile, _likeness("textbugger", profile, sources)
    )


def _bertattack(key: Any, profile: Profile, sources: Sources) -> Attack:
    if sources.masked_words is None:
        raise M3Error("bertattack takes its words from a masked language model: give a BERT with --masked-lm MODEL")
    likely = sources.masked_words(profile.masked_candidates, profile.to_the_letter)
    return _greedy("bertattack", "word", likely, "unk", profile, _likeness("bertattack", profile, sources))


def _textfooler(key: Any, profile: Profile, sources: Sources) -> Attack:
    if sources.embeddings is None:
        raise M3Error("textfooler takes its words from word vectors: give a text file of them with --embeddings FILE")
    near = synonyms(sources.embeddings, profile.synonyms, profile.least_cosine)
    filters = [] if sources.tag is None else [keeps_part_of_speech(sources.tag)]
    filters += _likeness("textfooler", profile, sources)
    return _greedy("textfooler", "word", near, "delete", profile, filters)


def _stresstest(key: Any, profile: Profile, sources: Sources) -> Attack:
    return _by_sentences("stresstest", textattack.stresstest if profile.to_the_letter else stresstest, profile)


def _checklist(key: Any, profile: Profile, sources: Sources) -> Attack:
    return _by_sentences("checklist", textattack.checklist if profile.to_the_letter else checklist(key), profile)


def _semantic(key: Any, profile: Profile, sources: Sources) -> Attack:
    prompts = PROMPTS.get(sources.task or "", ())
    if not prompts:
        raise M3Error(f"semantic has prompts for {', '.join(PROMPTS)} only: leave it out, or take one of these tasks")
    return _by_sentences("semantic", lambda prompt: [f"{one} {CONTENT}" for one in prompts], profile, "semantics")


_MAKERS: Mapping[str, Callable[[Any, Profile, Sources], Attack]] = MappingProxyType(
    {
        "deepwordbug": _deepwordbug,
        "textbugger": _textbugger,
        "bertattack": _bertattack,
        "textfooler": _textfooler,
        "stresstest": _stresstest,
        "checklist": _checklist,
        "semantic": _semantic,
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
