"""Shifts: a task's inputs as they might also be written, without new data. Their answers stay what they were.

References:
    Ribeiro et al., Beyond Accuracy: Behavioral Testing of NLP Models with CheckList, 2020 (invariance tests);
    Pruthi et al., Combating Adversarial Misspellings with Robust Word Recognition, 2019 (kinds of typing errors).
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.attacks.draws import Draw, stream
from m3jax.evaluation.checks import check_name

_PARTS = 1_000_000  # probabilities are counted in these
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BLANKS = ("  ", "   ", "\t")
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
# A whole number that stands alone: no sign, currency, decimals, unit or percentage, and no part of an expression.
_NUMBER = re.compile(r"(?<![\w.,$€£+\-*/^=%\\{#])(?:\d{1,3}(?:,\d{3})+|\d+)(?![\w%$€£+\-*/^=\\}]|[.,:]\d)")
_PARAPHRASES = (
    "Please do the following.\n{}",
    "Here is what I would like you to do.\n{}",
    "Could you help me with this?\n{}",
    "Read this with care, then reply.\n{}",
    "Your task is given below.\n\n{}",
    "I have a question for you.\n{}",
)


class Shift(NamedTuple):
    """A way to write the same input differently.

    Attributes:
        name: What users call it.
        apply: From a text and its choices to the text written differently.
        whole: Whether the whole instruction is shifted, not just the example in it.
        keeps_code: Whether programs in the text stay what they are.
    """

    name: str
    apply: Callable[[str, Draw], str]
    whole: bool = False
    keeps_code: bool = False


def typos(text: str, draw: Draw, rate: float) -> str:
    """Typing errors: letters swapped with the next, left out, doubled, or missed for the key beside.

    Args:
        text: The text; only letters of the English keyboard are missed, and no digits.
        draw: Its choices.
        rate: Share of letters that is hit.
    """
    made, at = [], 0
    while at < len(text):
        letter = text[at]
        if not _is_letter(letter) or draw(3 * at, _PARTS) >= rate * _PARTS:
            made.append(letter)
            at += 1
            continue
        following = text[at + 1] if at + 1 < len(text) and _is_letter(text[at + 1]) else ""
        near = _beside(letter)
        ways = [following + letter, "", letter * 2, near[draw(3 * at + 2, len(near))]]
        way = draw(3 * at + 1, 4)
        made.append(ways[way])
        at += 2 if way == 0 and following else 1
    return "".join(made)


def _is_letter(letter: str) -> bool:
    return letter.isascii() and letter.isalpha()


def _beside(letter: str) -> str:
    """The letters left and right of one on the keyboard, in its case."""
    row = next(row for row in _ROWS if letter.lower() in row)
    at = row.index(letter.lower())
    near = row[max(at - 1, 0) : at] + row[at + 1 : at + 2]
    return near.upper() if letter.isupper() else near


def mixed_case(text: str, draw: Draw) -> str:
    """Every letter large or small by chance.

    Args:
        text: The text.
        draw: Its choices.
    """
    return "".join(letter.upper() if draw(at, 2) else letter.lower() for at, letter in enumerate(text))


def whitespace(text: str, draw: Draw, rate: float) -> str:
    """Single spaces as two, three or a tab.

    Args:
        text: The text.
        draw: Its choices.
        rate: Share of spaces that is changed.
    """

    def change(match: re.Match[str]) -> str:
        hit = draw(2 * match.start(), _PARTS) < rate * _PARTS
        return _BLANKS[draw(2 * match.start() + 1, len(_BLANKS))] if hit else match[0]

    return re.sub(r"(?<=\S) (?=\S)", change, text)


def number_format(text: str, draw: Draw) -> str:
    """Whole numbers that stand alone in another form of the same value: grouped or not, and up to twelve in words.

    Args:
        text: The text.
        draw: Not needed: there is one other form.

    Example:
        >>> number_format("He has 3 farms, 1200 cows, 1,500 hens and $5.", lambda number, below: 0)
        'He has three farms, 1,200 cows, 1500 hens and $5.'
    """

    def change(match: re.Match[str]) -> str:
        digits = match[0].replace(",", "")
        if "," in match[0]:
            return digits
        if digits.startswith("0") and digits != "0":
            return digits
        value = int(digits)
        return _NUMBER_WORDS[value] if value < len(_NUMBER_WORDS) else f"{value:,}"

    return _NUMBER.sub(change, text)


def paraphrase(text: str, draw: Draw) -> str:
    """The instruction behind one of some introductions.

    Args:
        text: The instruction.
        draw: Its choices.
    """
    return _PARAPHRASES[draw(0, len(_PARAPHRASES))].replace("{}", text)


_RATED: Mapping[str, tuple[Callable[[str, Draw, float], str], float]] = MappingProxyType(
    {"typos": (typos, 0.05), "whitespace": (whitespace, 0.3)}
)
_PLAIN: Mapping[str, Shift] = MappingProxyType(
    {
        "lowercase": Shift("lowercase", lambda text, _: text.lower()),
        "uppercase": Shift("uppercase", lambda text, _: text.upper()),
        "mixed-case": Shift("mixed-case", mixed_case),
        "number-format": Shift("number-format", number_format),
        "paraphrase": Shift("paraphrase", paraphrase, whole=True, keeps_code=True),
    }
)
SHIFTS = (*_RATED, *_PLAIN)


def make_shift(text: str) -> Shift:
    """The shift of that name; typos and whitespace may have a rate behind it.

    Args:
        text: A name of `SHIFTS`, or such as "typos=0.1".

    Raises:
        M3Error: There is none, or its rate is no share.

    Example:
        >>> make_shift("uppercase").apply("a film", lambda number, below: 0)
        'A FILM'
    """
    name, equals, given = str(text).partition("=")
    check_name("shift", name, SHIFTS)
    if name in _PLAIN:
        if equals:
            raise M3Error(f"the shift {name} has no rate: write just {name}")
        return _PLAIN[name]
    function, rate = _RATED[name]
    if equals:
        rate = _rate(text, given)
    return Shift(text, lambda one, draw: function(one, draw, rate))


def _rate(text: str, given: str) -> float:
    try:
        rate = float(given)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:
        raise M3Error(f"the shift {text} should have a rate above 0 and up to 1, as in {text.partition('=')[0]}=0.1")
    return rate


def shift_text(shift: Shift, text: str, key: Any, example: str) -> str:
    """A text as a shift writes it.

    Args:
        shift: The shift.
        text: The text.
        key: Of its choices: an integer seed or a threefry2x32 JAX key.
        example: The example's name; each has choices of its own.
    """
    return shift.apply(text, stream(key, f"{shift.name}\n{example}"))
