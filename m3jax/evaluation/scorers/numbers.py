"""Numbers as people write them, and the one that an answer states."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from m3jax.evaluation.scorers import quantities
from m3jax.evaluation.scorers.statements import (
    Statement,
    conclusion,
    deciding_part,
    last_line,
    last_sentence,
    statements,
)

_SPACES = dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2005\u2007\u2008\u2009\u200a\u202f\u205f"), " ")
_SIGNS = str.maketrans({"−": "-", "‒": "-", "·": "×", "⋅": "×", "∙": "×", "⁄": "/", "∕": "/", "’": "'"})
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|boxed|fbox|bf|emph|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
        (r"\\[dtc]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" (\1)/(\2) "),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
        (r"(?<=\d)(?:\{,\}|,\\[!,]|\\[,!:;]|\{\\,\})\s*(?=\d{3}(?!\d))", ","),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "×"),
        (r"\\div(?![a-zA-Z])", "÷"),
        (r"\\(?:approx|simeq|sim)(?![a-zA-Z])", "≈"),
        (r"\\pm(?![a-zA-Z])", "±"),
        (r"<=|\\leq?(?:slant)?(?![a-zA-Z])", "≤"),
        (r">=|\\geq?(?:slant)?(?![a-zA-Z])", "≥"),
        (r"!=|=/=|\\neq?(?![a-zA-Z])", "≠"),
        (r"\\(?:left|right|displaystyle|quad|qquad|,|!|;|:| )", " "),
        (r"\^\s*\{?\s*\\circ\s*\}?|°", " "),
        (r"\^\s*\{([^{}]*)\}", r"^\1"),
        (r"(?<=\d)\s*\*\*\s*(?=\d)", "^"),
        (r"(?<=[\d)])\s*(?<!\*)\*(?!\*)\s*(?=[A-Za-z](?![A-Za-z*]))", "×"),
        (r"(?<=[\d)])\s*\*\s*(?=[$€£(]?\d)|(?<=\d)\s*[xX]\s*(?=10\b)|(?<=\d)\s[xX]\s(?=\d)", "×"),
        (r"\*\*|__|[*`]|\\\(|\\\)|\\\[|\\\]|[{}]", " "),
        (r"\\", ""),
        (r"\b(?:negative|minus)\s+(?=[$€£]?\d)", "-"),
        (r"[=-]+>", "= "),
        (r"</?(?:b|strong|i|em|u|mark|span|p|br)\b[^<>]*>", " "),
        (r"<\s*(-?\d[^<>]*)>", r" \1 "),
    )
]  # fmt: skip
_CURRENCY = r"(?:US|CA|AU|C|A|HK|NZ)?[$€£¥₹₱₩]|\b(?:USD|EUR|GBP|CAD|AUD|INR|Rs\.?)"
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:[ ']\d{3})+(?![\d'])"
    r"|\d{1,3}(?:_\d{3})+(?!\d)|\d+)"
)
_NUMBER = re.compile(
    rf"(?<![\w.^])(?P<sign>[-+]?)\s?(?:(?:{_CURRENCY})\s?)*(?P<inner>-?)"
    rf"(?:(?P<mixed>\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\s+|\s+and\s+|-)(?=\d+\s?/\s?\d)(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d.,])"
    rf"|(?P<whole>{_DIGITS})?(?P<decimals>\.\d+|,\d\d(?![\d,]))?(?P<power>[eE][-+]?\d{{1,3}}(?!\w))?)"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "mn": 10**6}
_SCALES |= {"bn": 10**9, "k": 10**3, "mil": 10**6, "dozen": 12, "dozens": 12}
_SCALE = re.compile(r"\s*-?(hundred|thousand|million|billion|trillion|mn|bn|mil|dozens?)\b|(k)\b(?!\w)", re.IGNORECASE)
_LARGE = re.compile(r"([MB])(?![\w.])")
_OF_MONEY = re.compile(r"[MB]\s+(?:dollars|euros|pounds|USD|EUR)\b")
_NOT_ONE = re.compile(
    r"\s*(?:[-–—~]|\.\.+|±|\bto\b|\bthrough\b|\bor\b|\band\b|[,;:&])\s*(?:or\s+|and\s+)?(?:(?:about|around|even|possibly|maybe)\s+)?"
    rf"(?:{_CURRENCY})?\s?-?\.?\d",
    re.IGNORECASE,
)
_OPERATED = re.compile(rf"\s*(?:[A-Za-z]+\s+){{1,3}}[×÷+*]\s*(?:{_CURRENCY})?\s?\d")
_COMPOUND = re.compile(
    r"\s*(?:hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|feet|foot|ft|yards?|pounds?|lbs?|km|meters?|m|quarters?"
    rf"|dozens?|gallons?|dollars|euros)\.?,?\s+(?:and\s+)?(?:a\s+half\b|(?:{_CURRENCY})?\d+(?:\.\d+)?\s*(?!%)[a-z])",
    re.IGNORECASE,
)
_CENTS = re.compile(
    r"\s*(?:dollars?|bucks|euros?|pounds?)?\s*(?:and|,)\s*(\d{1,2})\s*(?:cents?|¢|pence)", re.IGNORECASE
)
_AND_COINS = re.compile(r"\s*(?:dollars|euros|pounds)\s+\d+\b(?!\s*%)")
_ALSO = re.compile(rf"\s*(?:[A-Za-z]+\s+){{1,3}}(?:and|or|to)\s+(?:{_CURRENCY})?\d", re.IGNORECASE)
_ASIDE = re.compile(r"(?<=[\w.%])(?:\s+|(?=[(\[][^()\[\]]*(?:[A-Za-z]{3}|=)))[(\[][^()\[\]]*[)\]](?!\s*[×÷/*^+\d-])")
_REASON = re.compile(
    r"[,;:(]?\s+(?:because|since|as\s+(?:she|he|it|they|the|we|each|there|every|a|an|\d)|so\s+that|which|where|given\s+that|assuming"
    r"|after|considering|due\s+to|based\s+on|when|if|with(?!\s+(?:an?\s+)?remainder)|for\s+a\s+total|rounded|i\.e\.|that\s+is|or\s+simply)\b"
    r"|\s[-–—]{1,2}\s(?=[A-Za-z]{2}|[aAI]\s)|;(?!\s*\$?\d[\d.,]*(?:\s*\w*\s*$|\s*[,;]))",
    re.IGNORECASE,
)
_END = re.compile(r"(?<=[\w)%$*}\]!\"'])[.!?](?=\s|$|[*_\"')$<]|\\[)\]])")
_HEADING = re.compile(r"\W*\d+\s*(?:[.):]|-|–)\s*\**\s*[A-Za-z]|\W*[A-Za-z]{2,}")
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_ONES.split())}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_NAMED_VALUES = re.compile(r"=\s*-?\d[\d.]*\s*(?:,|and|or)\s+(?:and\s+)?[A-Za-z]\w*\s*=")
_COUNTED = re.compile(r"(?<=\d)\s*(?:hundred|thousand|million|billion|dozen)s?\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|percent\b|per\s?cent\b)", re.IGNORECASE)
_WORKED = re.compile(r"(?<=[\d%])\s*\([^()]*=[^()]*\)")  # 18 (that is, 9 * 2 = 18)
_PARTS = re.compile(r"\b(?:half|halves|third|fourth|quarter|fifth|sixth|eighth|tenth|hundredth)s?\b", re.IGNORECASE)
_TOTAL = re.compile(
    r"\b(?:total|amount|result|sum|number|value|profit|cost|price|difference)\b[^.,;:\d]{0,60}"
    rf"\b(?:is|are|was|would\s+be|will\s+be|equals|comes\s+to)\s+(?P<said>-?(?:{_CURRENCY})?\s?(?:{_DIGITS})(?:\.\d+)?(?:\s+[A-Za-z]+)?)\.?$",
    re.IGNORECASE,
)
_LARGEST_POWER = 200
_CLOSED = re.compile(r"(?:\\end\{[a-z]+\*?\}|\\\]|\$\$|\s)+\Z")


class Reading(NamedTuple):
    """The number that a text states.

    Attributes:
        value: It; None where there is none.
        said: The words that state it; empty where none do.
    """

    value: Fraction | None
    said: str


def parse_number(text: str, asked: str = "") -> Fraction | None:
    """The number that a short answer states, exactly; None where it states none, or no single one.

    Currency, thousands separators, units, percent signs, emphasis and LaTeX are read through; mixed numbers, powers of
    ten, plain arithmetic, "18 million" and numbers in words are worth what they say. Ranges ("15 to 18"), lists and
    bounds ("more than 18") are no single number, nor is "half of 18" (see `quantities`). Where the answer is an
    equation, its last side counts.

    Args:
        text: The answer.
        asked: The question that it answers, which may ask for pairs, for a minimum or for per cent; empty where it is
            not known.

    Example:
        >>> parse_number("$1,080.50 per week"), parse_number("x = 3/4"), parse_number("15-18")
        (Fraction(2161, 2), Fraction(3, 4), None)
    """
    text = _plain(text)
    for word in _COUNTED.findall(text):
        if quantities.is_counted_in(asked, word):  # "3 dozen" is 3 where dozens are counted
            text = text.replace(word, "")
    if _NAMED_VALUES.search(text):
        return None
    text = _WORKED.sub(" ", text)
    exact, *_ = [part for part in text.split("≈") if re.search(r"\d", part)] or [text]
    for side in reversed(exact.split("=")):
        if re.search(r"\d", side):
            return _reading(side, asked)
    return number_in_words(text, asked)


def stated_number(text: str, asked: str = "") -> Reading:
    """The number that a worked solution ends in.

    The last statement of the answer that holds a number decides: "The answer is …", a heading "Final Answer", a box,
    "#### 18". A heading of a step ("#### Step 2", "#### 1. Eggs") states nothing, nor does talk about an answer ("if
    the answer is"). Without a statement, a last sentence that concludes ("Therefore, …") or a last line that is a
    number or ends in "= 18 dollars". What follows a next exercise that the model set itself does not count.

    Args:
        text: What the model wrote.
        asked: The question; see `parse_number`.

    Example:
        >>> stated_number("#### Step 1: 3 eggs\\n9 * 2 = 18. The answer is 18.\\n#### Step 2: check 3").value
        Fraction(18, 1)
    """
    return _stated(deciding_part(text, lambda part: _stated(part, asked).said != ""), asked)


def _stated(text: str, asked: str) -> Reading:
    talkative: str | None = None  # "#### 5 eggs of hers" may be a heading: it counts after the others
    for found in reversed(statements(text)):
        phrase = _phrase(found)
        if phrase is None:
            continue
        is_talk = found.kind == "reversed" or len(re.findall(r"[A-Za-z]{2,}", phrase)) > 1
        if found.kind not in ("hashes", "reversed") or not is_talk:
            return Reading(parse_number(phrase, asked), phrase.strip() or found.kind)
        talkative = talkative or phrase
    if talkative is not None:
        return Reading(parse_number(talkative, asked), talkative)
    return _unmarked(text, asked)


def _phrase(found: Statement) -> str | None:
    """The words of a statement that give the number; None where it gives none."""
    said = found.said
    if found.kind in ("boxed", "tagged", "reversed"):
        return said if _has_number(said) else None
    line = _first_line(said)
    if found.kind == "hashes":
        rest = said.split("\n")[0].strip()
        if rest and _HEADING.match(re.sub(r"\\text\s*\{|" + _CURRENCY, "", rest)):
            return None
        return line if _has_number(line) and (rest or _is_only_number(line)) else None
    ended = _END.split(line, maxsplit=1)[0]
    phrase = _REASON.split(ended, maxsplit=1)[0]
    if not _has_number(phrase):
        return None
    words = re.findall(r"[A-Za-z]{2,}", phrase)
    if found.kind == "label" and len(words) > 12 and re.search(r"\d", said[len(ended) :]):
        return None  # "Answer:" before a whole solution
    return phrase


def _first_line(said: str) -> str:
    """The first line that says something; a displayed formula whole."""
    said = said.lstrip(" \t\n*_`:")
    opened = re.match(r"\\\[|\$\$|\\begin\{(?:aligned|align\*?|equation\*?)\}", said)
    if opened is not None:
        closing = {"\\[": "\\]", "$$": "$$"}.get(opened.group(), r"\end{")
        inside = said[opened.end() :].partition(closing)[0].strip()
        return " ".join(inside.split("\n"))
    return next((line.strip() for line in said.split("\n") if re.search(r"\w", line)), "")


def _has_number(text: str) -> bool:
    return re.search(r"\d|[½⅓⅔¼¾⅛⅜⅝⅞]", text) is not None or number_in_words(_plain(text)) is not None


def _is_only_number(line: str) -> bool:
    rest = _NUMBER.sub(" ", _plain(line), count=1)
    return (
        re.search(r"\d", rest) is None
        and len(re.findall(r"[A-Za-z]+", rest)) <= 2
        and re.match(r"\W*(?:[A-Z]{3})?\W*\d", line) is not None
    )


def _unmarked(text: str, asked: str) -> Reading:
    """What a text ends in that marks no answer."""
    text = _CLOSED.sub("", text)
    line = re.sub(r"^[\W_]*[A-Za-z][A-Za-z ]{0,30}[*_]*:[*_]*(?=\s)", "", last_line(text)).strip().lstrip("> ")
    if line and _is_only_number(line):
        return Reading(parse_number(line, asked), line)
    concluded = conclusion(text) or (last_sentence(text) if "=" in text else "")
    if re.search(r"\bnot\b|n['’]t\b|\banswer\b", concluded, re.IGNORECASE):
        return Reading(None, "")
    if concluded and not concluded.rstrip(" *_\"')").endswith("?"):
        bold = [said for said, inside in _bold(concluded) if _has_number(inside)]
        if bold:
            return Reading(parse_number(bold[-1], asked), bold[-1])
        if "=" in concluded:
            return Reading(parse_number(concluded, asked), concluded)
        if len(set(_values(_plain(concluded)))) == 1:
            return Reading(parse_number(concluded, asked), concluded)
    if total := _TOTAL.search(_plain(concluded or line).strip()):  # "After selling 3, the total would be 18."
        return Reading(parse_number(total["said"], asked), total["said"])
    _, equals, right = _END.sub("", line).rpartition("=")
    if equals and _is_only_number(_plain(right).strip(" *_`$\\()[]")):
        return Reading(parse_number(right, asked), right.strip())
    bold = [said for said, inside in _bold(line) if _is_only_number(inside)]
    return Reading(parse_number(bold[-1], asked), bold[-1]) if len(bold) == 1 else Reading(None, "")


def _bold(text: str) -> Iterator[tuple[str, str]]:
    """Each text in bold type, with the words around it that change it, and without."""
    for found in re.finditer(r"\*\*([^*]+)\*\*", text):
        lead, trail = quantities.surroundings(text[: found.start()], text[found.end() :])
        yield f"{lead}{found[1]}{trail}", found[1]


def _values(text: str) -> Iterator[Fraction]:
    for found in _NUMBER.finditer(text):
        value = _value(found, text)
        if value is not None:
            yield value


def _plain(text: str) -> str:
    """The text without LaTeX, emphasis and rare spaces; multiplication as ×, powers as ^."""
    text = text.translate(_SPACES)
    for vulgar, fraction in _VULGAR.items():
        text = text.replace(vulgar, f" {fraction}")
    text = re.sub(r"(?<![\d\s])\s*–\s?(?=\d)|^–", "-", text)
    text = text.translate(_SIGNS)
    for _ in range(2):  # braces inside braces
        for pattern, replacement in _LATEX[:4]:
            text = pattern.sub(replacement, text)
    for pattern, replacement in _LATEX[4:]:
        text = pattern.sub(replacement, text)
    return text


def _reading(side: str, asked: str) -> Fraction | None:
    """The one number of a side of an equation."""
    without = _ASIDE.sub(" ", side)
    side = without if re.search(r"\d", without) else side
    found = next((found for found in _NUMBER.finditer(side) if _has_digits(found)), None)
    if found is None:
        return None
    before, start = side[: found.start()], found.start()
    opened = re.search(r"[-+]?\s?\([\s(]*$", before)
    arithmetic = _Arithmetic(side, opened.start() if opened is not None else start)
    value = arithmetic.value()
    if value is None:
        return None
    after = ("%" if side[arithmetic.place - 1] == "%" else "") + side[arithmetic.place :]
    is_share = _PERCENT.match(after) is not None and asked != "" and not quantities.is_about(asked, "percent")
    if found["sign"] and re.search(r"(?<![A-Za-z])[A-HJ-Za-z]\s*$", before):
        return None  # x + 18
    cents = _CENTS.match(after)
    if cents is not None:
        value += Fraction(int(cents[1]), 100) * (-1 if value < 0 else 1)
        after = after[cents.end() :]
    if is_share or quantities.is_changed(before, after, asked):
        return None
    if value.denominator != 1 and re.match(r"\s+of\s+(?:the\s+)?[$€£]?\d", after):
        return None  # a third of 60
    parts = (_NOT_ONE, _OPERATED, _COMPOUND, _ALSO, _AND_COINS)
    return None if any(pattern.match(after) for pattern in parts) or re.match(r"\.\d", after) else value


def _has_digits(found: re.Match[str]) -> bool:
    return any(found[name] is not None for name in ("mixed", "whole", "decimals"))


def _value(found: re.Match[str], text: str) -> Fraction | None:
    """What a number is worth, with the word of its scale."""
    if not _has_digits(found):
        return None
    if found["mixed"] is not None:
        if int(found["under"]) == 0:
            return None
        value = int(found["mixed"].replace(",", "")) + Fraction(int(found["over"]), int(found["under"]))
    else:
        whole = re.sub(r"[ ,'_]", "", found["whole"] or "0")
        value = Fraction(whole + (found["decimals"] or "").replace(",", ".") + (found["power"] or ""))
    value *= _scale(text[found.end() :], found.group())[0]
    return -value if "-" in (found["sign"], found["inner"]) else value


def _scale(after: str, number: str) -> tuple[int, int]:
    """The factor of the word behind a number, and how long that word is."""
    factor, place = 1, 0
    while scale := _SCALE.match(after[place:]):
        factor *= _SCALES[(scale[1] or scale[2]).lower()]
        place += scale.end()
    large = _LARGE.match(after)
    is_money = re.search(_CURRENCY, number) is not None or _OF_MONEY.match(after) is not None
    if place == 0 and large is not None and is_money:  # $5M; 5M may be metres
        return {"M": 10**6, "B": 10**9}[large[1]], large.end()
    return factor, place


class _Arithmetic:
    """Reads numbers joined by + - × ÷ / ^ and brackets, from left to right, as far as they go."""

    def __init__(self, text: str, place: int) -> None:
        self.text = text
        self.place = place
        self.depth = 0

    def value(self) -> Fraction | None:
        try:
            return self.sum()
        except (ZeroDivisionError, ValueError, RecursionError):
            return None

    def sum(self) -> Fraction:
        value = self.product()
        while True:
            start = self.place
            sign = self.step(r"\s*(\+)\s*(?=[$€£(]*\s?\.?\d)|\s+(-)\s+(?=[$€£(]*\s?\.?\d)|(?<=\))\s*(-)\s*(?=[\d(])")
            if not sign:
                return value
            other = self.product()
            if sign == "-" and self.depth == 0 and other > value > 0:
                self.place = start  # "15 - 18" is a range
                return value
            value = value + other if sign == "+" else value - other

    def product(self) -> Fraction:
        value = self.power()
        while sign := self.step(r"\s*([×÷/])\s*(?=[$€£(-]*\s?\.?\d|\()"):
            other = self.power()
            value = value * other if sign == "×" else value / other
        return value

    def power(self) -> Fraction:
        value = self.atom()
        if self.step(r"\s*(\^)\s*(?=[(-]?\s?\d)"):
            exponent = self.atom()
            if exponent.denominator != 1 or abs(exponent) > _LARGEST_POWER:
                raise ValueError("no power to compute")
            value = Fraction(value ** int(exponent))
        return value

    def atom(self) -> Fraction:
        sign = self.step(r"\s*([-+])\s*(?=\()")
        if self.step(r"\s*(\()"):
            self.depth += 1
            value = self.sum()
            self.depth -= 1
            if not self.step(r"\s*(\))"):
                raise ValueError("an open bracket")
            return -value if sign == "-" else value
        if self.step(r"(\^)\s*") or self.place >= len(self.text):
            raise ValueError("no number")
        found = _NUMBER.match(self.text, self.place) or _NUMBER.match(self.text, self.place + 1)
        found = found if found is not None and _has_digits(found) else _BARE.match(self.text, self.place)
        value_ = _value(found, self.text) if found is not None else None
        if found is None or value_ is None:
            raise ValueError("no number")
        self.place = found.end() + _scale(self.text[found.end() :], found.group())[1]
        if self.text[self.place : self.place + 1] == "%":
            self.place += 1
        return value_

    def step(self, pattern: str) -> str:
        """Step over what comes next if it is this; the part of it that counts."""
        found = re.compile(pattern).match(self.text, self.place)
        if found is None:
            return ""
        self.place = found.end()
        return next(group for group in found.groups() if group)


_BARE = re.compile(_NUMBER.pattern.replace(r"(?<![\w.^])", r"\s*", 1))


def number_in_words(text: str, asked: str = "") -> Fraction | None:
    """A number in words at the beginning of a text: "eighteen", "two hundred and five"."""
    total = current = 0
    seen = False
    end = len(text)
    if _PARTS.search(text):
        return None
    for found in re.finditer(r"[A-Za-z]+|[^\sA-Za-z-]", text):
        low = found.group().lower()
        if low in _WORDS:
            current += _WORDS[low]
        elif low in _SCALES and len(low) > 3 and seen:
            current *= _SCALES[low]
            if low not in ("hundred", "dozen", "dozens"):
                total, current = total + current, 0
        elif not (seen and low == "and"):
            if seen or low not in ("a", "an", "exactly", "about", "only", "just", "total", "of"):
                end = found.start()
                break
            continue
        seen = True
    if not seen or quantities.is_changed("", text[end:], asked):
        return None
    return Fraction(total + current)
