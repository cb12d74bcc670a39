"""Attacks on letters: DeepWordBug's and TextBugger's, as PromptBench sets them up.

References:
    Gao et al., Black-box Generation of Adversarial Text Sequences to Evade Deep Learning Classifiers, 2018;
    Li et al., TextBugger: Generating Adversarial Text Against Real-world Applications, 2019;
    Zhu et al., PromptBench: Towards Evaluating the Robustness of Large Language Models on Adversarial Prompts, 2023.
"""

import string
from types import MappingProxyType
from typing import Any

from m3jax.evaluation.attacks.draws import stream
from m3jax.evaluation.attacks.wording import Candidates, Wording

LETTERS = string.ascii_letters

# Letters of other alphabets that look alike: TextAttack's table of homoglyphs.
HOMOGLYPHS = MappingProxyType(
    dict(zip("abcdefghijklmnopqrstuvwxyz", "ɑЬϲԁе𝚏ɡհіϳ𝒌ⅼｍոорԛⲅѕ𝚝սѵԝ×уᴢ", strict=True))
    | dict(zip("0123456789-'", "OlᒿƷᏎƼб𝟕Ȣ৭˗`", strict=True))
)

_SLOTS = 8  # choices set aside for each word


def swap(word: str, at: int) -> str:
    """The word with the letters at `at` and `at + 1` in each other's place.

    Example:
        >>> swap("word", 1)
        'wrod'
    """
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def substitute(word: str, at: int, letter: str) -> str:
    """The word with another letter at `at`.

    Example:
        >>> substitute("word", 0, "f")
        'ford'
    """
    return word[:at] + letter + word[at + 1 :]


def delete(word: str, at: int) -> str:
    """The word without its letter at `at`.

    Example:
        >>> delete("word", 2)
        'wod'
    """
    return word[:at] + word[at + 1 :]


def insert(word: str, at: int, letter: str) -> str:
    """The word with a letter put before that at `at`.

    Example:
        >>> insert("word", 3, "l")
        'world'
    """
    return word[:at] + letter + word[at:]


def look_alikes(word: str) -> list[str]:
    """The words with one letter of another alphabet that looks alike, from the first letter to the last.

    Example:
        >>> [[hex(ord(letter)) for letter in word] for word in look_alikes("oe")]
        [['0x43e', '0x65'], ['0x6f', '0x435']]
    """
    return [substitute(word, at, HOMOGLYPHS[letter]) for at, letter in enumerate(word) if letter in HOMOGLYPHS]


def deepwordbug(key: Any) -> Candidates:
    """DeepWordBug's four edits of a word, one of each in a random place.

    Args:
        key: Of the random places and letters: an integer seed or a threefry2x32 JAX key.

    Returns:
        Two neighbours swapped, a letter substituted by another, deleted, and inserted; of one-letter words only what
        is possible.
    """
    draw = stream(key, "deepwordbug")

    def candidates(prompt: Wording, index: int) -> list[str]:
        word = prompt.words[index]
        size = len(word)

        def choose(slot: int, below: int) -> int:
            return draw(index * _SLOTS + slot, below)

        at = choose(1, size)
        others = LETTERS.replace(word[at], "")
        made = [swap(word, choose(0, size - 1))] if size > 1 else []
        made += [substitute(word, at, others[choose(2, len(others))])]
        made += [delete(word, choose(3, size))] if size > 1 else []
        made += [insert(word, choose(4, size + 1), LETTERS[choose(5, len(LETTERS))])]
        return changed(word, made)

    return candidates


def textbugger(key: Any, synonyms: Candidates | None = None) -> Candidates:
    """TextBugger's edits of a word; the first and the last letter stay but for look-alikes.

    Args:
        key: Of the random places: an integer seed or a threefry2x32 JAX key.
        synonyms: Its fifth kind of bug, words of like meaning; without it the attack is on letters alone.

    Returns:
        A space inserted, a letter deleted, two neighbours swapped, each in one random place; every letter in turn as
        one that looks alike; and the synonyms.
    """
    draw = stream(key, "textbugger")

    def candidates(prompt: Wording, index: int) -> list[str]:
        word = prompt.words[index]
        inner = len(word) - 2

        def choose(slot: int, below: int) -> int:
            return 1 + draw(index * _SLOTS + slot, below)

        made = [insert(word, choose(0, inner + 1), " ")] if len(word) > 1 else []
        made += [delete(word, choose(1, inner))] if inner > 0 else []
        made += [swap(word, choose(2, inner - 1))] if inner > 1 else []
        made += look_alikes(word)
        made += [] if synonyms is None else synonyms(prompt, index)
        return changed(word, made)

    return candidates


def changed(word: str, made: list[str]) -> list[str]:
    """Those that differ from the word and from each other, in their order."""
    return [other for other in dict.fromkeys(made) if other != word]


def levenshtein(a: str, b: str) -> int:
    """Letters inserted, deleted or substituted to get from one text to the other: a swap counts two.

    Args:
        a: A text.
        b: Another.

    Example:
        >>> levenshtein("kitten", "sitting"), levenshtein("word", "wrod")
        (3, 2)

    References:
        Levenshtein, Binary codes capable of correcting deletions, insertions and reversals, 1966; computed a column at
        a time as in Myers, A fast bit-vector algorithm for approximate string matching, 1999, and Hyyrö, 2003.
    """
    if not a or not b:
        return len(a) + len(b)
    whole, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    rises, falls, distance = whole, 0, len(a)  # down a column of the table of distances
    for letter in b:
        equal = places.get(letter, 0)
        across = (((equal & rises) + rises) ^ rises) | equal
        up, down = falls | ~(across | rises) & whole, rises & across
        distance += bool(up & last) - bool(down & last)
        up, down = up << 1 | 1, down << 1
        rises, falls = (down | ~(equal | falls | up)) & whole, up & (equal | falls) & whole
    return distance
