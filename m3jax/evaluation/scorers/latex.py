"""Whether two mathematical answers in LaTeX mean the same.

Answers are taken apart into lists, sets, tuples, intervals, inequalities, unions, matrices, determinants, equations and
numbers with a base or a unit; what remains are expressions, which are equal when they have equal values: exactly where
they are rational, else at several points of their variables. Nothing is ever handed to Python to evaluate.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from m3jax.evaluation.scorers import quantities, units
from m3jax.evaluation.scorers.expressions import (
    UnreadableError,
    agrees_to_its_digits,
    closely_equal,
    proportional,
    values_at_points,
)
from m3jax.evaluation.scorers.numbers import number_in_words

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "∞": r"\infty ", "°": r"^\circ ", "²": "^2", "³": "^3", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "½": r"\frac12 ",
    "¼": r"\frac14 ", "¾": r"\frac34 ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "ℝ": r"\mathbb{R}",
    "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "⁴": "^4", "⁵": "^5", "ⁿ": "^n", "₁": "_1", "₂": "_2", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_PLAIN_NAMES = re.compile(
    r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|theta|infty|infinity|inf)(?![a-zA-Z])"
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\[(?!\d+(?:pt|ex|em|mm))|(?<!\\)\\\]|\\\(|\\\)", " "),
        (r"(?<!\\)\$", ""),
        (r"\*\*(?=[^*\d]|\d+\*\*)|(?<=[^\d\s])\*\*$|__|`", ""),
        (r"(?<=\d),?\\[!,]\s*(?=\d{3})", ""),
        (r",\\!\s*", ""),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"\\left\s*\.|\\right\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"(?<=\d)\s*\\q?quad\s*(?=-?\d)", ","),
        (r"\\(?:displaystyle|textstyle|limits|qquad|quad|hfill|hline)(?![a-zA-Z])|(?<!\\)\\[!,;: ]", " "),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\^\s*\{\s*\\text\{o\}\s*\}", r"^\\circ "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq(?![a-zA-Z])|!=|\\not\s*=", r"\\ne "),
        (r"\\infinity", r"\\infty"),
        (r"(^|[,(\[])\s*\+\s*(?=\\infty)", r"\1"),
        (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:vec|mathbf|boldsymbol|overrightarrow|bm|hat|overleftrightarrow|mathcal)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:overline|widehat)\s*\{([A-Za-z]+)\}", r"\1"),
        (r"(?<=\d)\s*[eE]([-+]?\d+)(?![\w.])", r"\\times 10^{\1}"),
        (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"\{([^{}]*)\\choose\b([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"~", " "),
        (r"\bper\s+cent\b", "percent"),
        (r"\\(?:text|mbox)\s*\{\s*\}", " "),
        (r"\\text\s*\{\s*\\?%\s*\}", r"\\%"),
    )
]
_MODULUS = re.compile(
    r"[\s,]*\(?\s*(?:\\[pb]?mod|(?:\\text\s*\{\s*)?\b(?:mod(?:ulo)?)\b(?:\s*\})?)\s*\{?\s*(?P<modulus>\w+)\s*\}?\s*\)?[\s$.]*$"
)
_GROUPED = re.compile(r"(?:\\?\$)?\d{1,3}(?:,(?:\\!)?\d{3})+(?:\.\d+)?")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?)")
_STYLE = re.compile(
    r"\\(?:text)?color\s*(?:\[\w+\])?\s*\{\w+\}|\\[hv]?phantom\s*\{[^{}]*\}|\\(?:mathstrut|strut|nonumber|notag|tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
    r"|\\(?:boldsymbol|mathbf|bm|pmb)\s*(?=\{[^{}]*(?:[^\w{}]|\{))"
)
_ALIGNED = re.compile(
    r"\\begin\{(?P<kind>aligned|align\*?|gathered|split|equation\*?)\}(?P<body>.*)\\end\{(?P=kind)\}", re.DOTALL
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname|rm|bf)\s*\{([^{}]*)\}")
_APPROXIMATELY = re.compile(
    r"\\(?:approx|simeq|doteq)(?![a-zA-Z])|,?\s*\(?\b(?:approximately|which\s+is\s+(?:about|approximately)|or\s+about|roughly)\b"
)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[-+]?\d*\.\d+")
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE_WORDS |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_BASED = re.compile(
    r"\(?([0-9A-Z]+)\)?\s*(?:_\s*\{?\s*(?:\\text\s*\{)?\s*\(?\s*([0-9]+|[a-z]+)\s*\)?\s*\}?\s*\}?|\(?\s*(?:in\s+)?base[\s-]+([0-9]+|[a-z]+)\s*\)?)"
)
_NAMED = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?")
_NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?"
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbvBV]?(?:small)?matrix\*?|array)\}(?:\[[^\]]*\]|\{[lcr|@\s]*\})?(?P<body>.*)\\end\{(?P=kind)\}",
    re.S,
)
_PLAIN_MATRIX = re.compile(r"\\(?P<kind>[pbvBV]?matrix)\s*\{(?P<body>.*)\}", re.S)
_ROWS = re.compile(r"\\\\(?:\s*\[[^\]]*\])?|\\cr(?![a-z])|\\newline")
_COMPARED = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|<|>")
_FLIPPED = {r"\le": r"\ge", r"\ge": r"\le", "<": ">", ">": "<"}
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*)?\(?\s*([A-Z])\s*\)?", re.IGNORECASE)
_CHOSEN = re.compile(r"(?:(?:option|choice|answer)\s*)?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.):](?=\s|$))")
_TWO_CHOICES = re.compile(r"\(?[A-Z]\)?\s*(?:,|and|or|&|/)\s*\(?[A-Z]\b")
_SCALED = re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?(hundred|thousand|million|billion|trillion|dozens?)\b(\s*\})?")
_SCALES = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9", "trillion": "10^{12}"}
_SCALES |= {"dozen": "12", "dozens": "12"}
_WORD = re.compile(r"(?<![\\a-zA-Z])(?:[A-Za-z]{3,}|(?:to|up|of|or|if|no)(?![A-Za-z]))")
_REAL = re.compile(
    r"(?:all\s+)?(?:the\s+)?real\s+numbers?|\\mathbb\s*\{?R\}?|\\R|all\s+(?:real\s+)?(?:[a-z]|\\in)?\s*\\?i?n?\s*\\mathbb\{R\}"
)
_OPENING, _CLOSING = "([{", ")]}"
_MOST_MATRIX = 5
_MOST_WORDS = 6


def equivalent(answer: str, gold: str, asked: str = "") -> bool:
    """Whether two answers mean the same.

    A missing unit, currency, degree or percent sign is read through, one that differs is not; a fraction equals its
    decimal where they are equal exactly, an irrational number its decimal where that is right to every digit written,
    and to nine at least; the order of a list or set does not matter, that of a tuple does. Where the question is
    known, a percent or degree sign or a modulus behind the answer, of which the gold one has none, is read through only
    if the question is about such.

    Args:
        answer: The answer.
        gold: The right one.
        asked: The question; empty where it is not known.

    Example:
        >>> equivalent("1/2", r"\\frac{1}{2}"), equivalent("0.333", r"\\frac13"), equivalent("(1, 2]", "(1,2]")
        (True, False, True)
    """
    (answer, modulus), (gold, modulus_) = _without_modulus(answer), _without_modulus(gold)
    if modulus and modulus != modulus_:
        is_rest = gold.isdigit() and (not modulus.isdigit() or int(gold) < int(modulus))
        if modulus_ or (asked and not (is_rest and quantities.is_modulus(asked, modulus))):
            return False
    one, other = _cleaned(quantities.uncounted(answer, asked)), _cleaned(gold)
    unit, is_bare = units.measured(one).unit, not units.measured(other).unit
    if asked and is_bare and unit in ("percent", "degree") and not quantities.is_about(asked, unit):
        return unit == "percent" and _same_shape(f"({units.measured(one).text})/100", other)
    letters = [_CHOICE.fullmatch(_unworded(text)) for text in (one, other)]
    for letter, text in ((letters[1], one), (letters[0], other)):
        chosen = _CHOSEN.match(_unworded(text))
        if letter is not None and chosen is not None and letter[1].isupper():
            if _TWO_CHOICES.match(_unworded(text)):
                return False
            return letter[1] == (chosen[1] or chosen[2])
    return _same(one, other)


def _without_modulus(text: str) -> tuple[str, str]:
    """3 \\pmod 7 as 3 and 7; the modulus is empty where there is none."""
    found = _MODULUS.search(text)
    if found is None or not text[: found.start()].strip(" $("):
        return text, ""
    return text[: found.start()], found["modulus"]


def _unworded(text: str) -> str:
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def _cleaned(text: str) -> str:
    """The text with one spelling for what has many."""
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    text = _BOXED.sub(r"\1", _unstyled(text.strip()))
    if text.count("$") % 2 and re.match(r"-?\$\d", text):
        text = text.replace("$", r"\$", 1)  # one alone is no delimiter, but a currency
    text = text.rstrip(".").strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _SCALED.sub(lambda found: rf"\times {_SCALES[found[1]]} ", text)
    text = _real_sets(text.strip())
    text = _exact(text)
    text = _PLAIN_NAMES.sub(r"\\\1 ", text).replace(r"\infinity", r"\infty").replace(r"\inf ", r"\infty ")
    text = _joined(text)
    text = text.strip().rstrip(".,;").strip()
    if french := re.fullmatch(r"([\[\]])([^\[\],;]+)[,;]([^\[\],;]+)([\[\]])", text):  # ]1, 2[ is (1, 2)
        text = f"{'[' if french[1] == '[' else '('}{french[2]},{french[3]}{']' if french[4] == ']' else ')'}"
    return text


def _unstyled(text: str) -> str:
    """The text without colour, bold type and the alignment of lines."""
    aligned = _ALIGNED.fullmatch(text.strip(" $."))
    if aligned is not None:
        lines = (line if r"\begin" in line else line.replace("&", " ") for line in _split(aligned["body"], "\\\\"))
        text = ",".join(line.strip() for line in lines if line.strip())
    text = _STYLE.sub("", text).strip()
    while _is_wrapped(text, "{", "}") and not re.search(r"\\(?:over|choose)\b", text):
        inside = text[1:-1].strip()
        if len(_split(inside, ",")) > 1 and not _GROUPED.fullmatch(inside):
            break  # a set
        text = inside
    return text


def _real_sets(text: str) -> str:
    if _REAL.fullmatch(_unworded(text)):
        return r"(-\infty,\infty)"
    if excepted := re.fullmatch(r"all\s+real\s+numbers?\s+(?:except|but|other\s+than)\s+(.+)", _unworded(text)):
        return rf"x \ne {excepted[1]}"
    text = re.sub(r"^[a-z]\s*\\in\s*\\mathbb\s*\{?R\}?\s*,\s*(?=[a-z]\s*\\ne)", "", text)
    if re.fullmatch(
        r"(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+)?solutions?(?:\s+exist)?", _unworded(text), re.IGNORECASE
    ):
        return r"\emptyset"
    if without := re.fullmatch(r"\\mathbb\s*\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\}", text):
        return rf"x \ne {without[1]}"
    return text


def _exact(text: str) -> str:
    """The exact value of one that is given with an approximation."""
    mark = _APPROXIMATELY.search(text)
    if mark is None:
        return text
    before, after = text[: mark.start()].strip().rstrip("(,;").strip(), text[mark.end() :]
    if before and (not _is_asked(before) or _is_constant(before)):
        return before
    return _APPROXIMATELY.split(after, maxsplit=1)[0].strip()


def _is_constant(text: str) -> bool:
    try:
        samples = values_at_points(text)
    except UnreadableError:
        return False
    return closely_equal(samples, samples[1:] + samples[:1])


def _joined(text: str) -> str:
    """Lists joined by commas, whatever joined them."""
    text = re.sub(r"\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(and|or|if|with|where)\s*\}", r" \1 ", text)
    if _COMPARED.search(text) and re.search(r"(?<=[\w})])\s*,?\s*\bor\b\s*(?=\S)", text):
        text = re.sub(r"\s*,?\s*\bor\b\s*", r" \\cup ", text)
    text = re.sub(r"^\s*(?:either|both)\s+(?=\S)", "", text)
    text = re.sub(r"(?<=[\d}\w)|!])\s*,?\s+(?:or|and)\s+(?=\S)", ",", text)
    return re.sub(r"(?<=\S)\s*;\s*(?=\S)", ",", text)


class _Shape(NamedTuple):
    """How an answer is built: its kind, what must agree literally, and its parts."""

    kind: str
    mark: str
    parts: tuple[str, ...]


def _split(text: str, separator: str) -> list[str]:
    """Split where the separator stands outside of all brackets."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        if text.startswith(r"\begin", place):
            depth += 1
        elif text.startswith(r"\end", place):
            depth -= 1
        elif text[place] in _OPENING:
            depth += 1
        elif text[place] in _CLOSING:
            depth -= 1
        elif (
            depth == 0 and text.startswith(separator, place) and not _continues(text, place + len(separator), separator)
        ):
            parts.append(text[start:place].strip())
            start = place + len(separator)
            place = start
            continue
        place += 1
    return [*parts, text[start:].strip()]


def _continues(text: str, place: int, separator: str) -> bool:
    """Whether a command goes on behind what looks like a shorter one: \\infty is not \\in."""
    return separator[-1].isalpha() and text[place : place + 1].isalpha()


def _is_wrapped(text: str, opening: str, closing: str) -> bool:
    """Whether one pair of brackets holds the whole text."""
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth == 0 and place < len(text) - 1:
            return False
    return depth == 0


def _shape(text: str) -> _Shape:
    for implied in (r"\implies", r"\Rightarrow", r"\Longrightarrow", r"\to"):
        if len(pieces := _split(text, implied)) > 1 and pieces[-1]:
            return _shape(pieces[-1])
    if (matrix := _matrix(text)) is not None:
        return matrix
    pieces = _split(text, r"\cup")
    if len(pieces) > 1:
        return _Shape("union", "", tuple(pieces))
    if _is_wrapped(text, "{", "}"):
        pieces = _split(text[1:-1], ",")
        return _Shape("set", "", _alternatives(pieces)) if len(pieces) > 1 else _shape(text[1:-1].strip())
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = text[2:-2]
        if built := re.match(r"\s*[a-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)\s*", inside):
            return _shape(inside[built.end() :].strip())
        return _Shape("set", "", _alternatives(_split(inside, ",")))
    pieces = _split(text, ",")
    if len(pieces) > 1 or r"\pm" in text:
        return _tuple(text) or _list(pieces)
    if (found := _tuple(text)) is not None:
        return found
    if len(pieces := _split(text, r"\in")) == 2 and _NAMED.fullmatch(pieces[0].replace(" ", "")):
        return _shape(pieces[1])
    if (interval := _inequality(text)) is not None:
        return interval
    if len(pieces := _split(text, r"\ne")) == 2 and all(pieces):
        return _Shape("union", "", (rf"(-\infty,{pieces[1]})", rf"({pieces[1]},\infty)"))
    pieces = _split(text, "=")
    if len(pieces) >= 2 and all(pieces):
        return _Shape("equation", "", tuple(pieces))
    if (based := _based(text)) is not None:
        return based
    return _Shape("plain", "", (text,))


def _tuple(text: str) -> _Shape | None:
    for opening in "([":
        for closing in ")]":
            if _is_wrapped(text, opening, closing):
                inside = _split(text[1:-1], ",")
                if len(inside) > 1:
                    return _Shape("tuple", _interval_marks(opening, closing, inside), tuple(inside))
    return None


def _interval_marks(opening: str, closing: str, parts: list[str]) -> str:
    """The brackets; at infinity an interval is open, however it is written."""
    if len(parts) == 2:
        opening = "(" if re.fullmatch(r"-\s*\\infty\s*", parts[0]) else opening
        closing = ")" if re.fullmatch(r"\+?\s*\\infty\s*", parts[1]) else closing
    return opening + closing


def _list(pieces: list[str]) -> _Shape:
    """A list: of named values, of inequalities that hold together, or of alternatives."""
    intervals = [_inequality(piece) for piece in pieces]
    if len(pieces) == 2 and all(interval is not None for interval in intervals):
        return _together([interval for interval in intervals if interval is not None])
    sides = [_split(piece, "=") for piece in pieces]
    names = [side[0].replace(" ", "") for side in sides]
    if all(len(side) == 2 and re.fullmatch(_NAME, name) for side, name in zip(sides, names, strict=True)):
        if len(pieces) > 1 and len(set(names)) == len(names):
            ordered = sorted(zip(names, (side[1] for side in sides), strict=True))
            return _Shape("named", ",".join(name for name, _ in ordered), tuple(value for _, value in ordered))
        return _Shape("set", "", _alternatives([side[1] for side in sides]))
    if len(sides[0]) == 2 and _is_asked(sides[0][0]) and all(len(side) == 1 for side in sides[1:]):
        pieces = [sides[0][1], *pieces[1:]]  # x = 1, 2
    return _Shape("set", "", _alternatives(pieces))


def _together(intervals: list[_Shape]) -> _Shape:
    """Two inequalities of one variable: what lies between them, or what lies outside."""
    lower = next((shape for shape in intervals if shape.parts[1] == r"\infty"), None)
    upper = next((shape for shape in intervals if shape.parts[0] == r"-\infty"), None)
    if lower is not None and upper is not None and (order := _order(lower.parts[0], upper.parts[1])) is not None:
        if order:
            return _Shape("tuple", lower.mark[0] + upper.mark[1], (lower.parts[0], upper.parts[1]))
        return _Shape("union", "", tuple(map(_rebuilt, intervals)))
    return _Shape("set", "", tuple(map(_rebuilt, intervals)))


def _order(one: str, other: str) -> bool | None:
    """Whether one value is below the other."""
    try:
        first, second = values_at_points(one)[0].value, values_at_points(other)[0].value
    except UnreadableError:
        return None
    return None if first is None or second is None else first.real < second.real


def _inequality(text: str) -> _Shape | None:
    """An inequality of one variable as the interval it describes."""
    if not text or _split(text, ",")[1:] or (text[0] in "([" and _is_wrapped(text, text[0], text[-1])):
        return None
    signs = [found.group() for found in _COMPARED.finditer(text)]
    sides = [side.strip() for side in _COMPARED.split(text)]
    if not 1 <= len(signs) <= 2 or not all(sides):
        return None
    if len(signs) == 2:
        if signs[0] in (">", r"\ge"):
            signs, sides = [_FLIPPED[sign] for sign in signs[::-1]], sides[::-1]
        if signs[0] in (">", r"\ge") or signs[1] in (">", r"\ge") or not re.fullmatch(_NAME, sides[1].replace(" ", "")):
            return None
        marks = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return _Shape("tuple", _interval_marks(marks[0], marks[1], [sides[0], sides[2]]), (sides[0], sides[2]))
    if re.fullmatch(_NAME, sides[1].replace(" ", "")) and not re.fullmatch(_NAME, sides[0].replace(" ", "")):
        signs, sides = [_FLIPPED[signs[0]]], sides[::-1]
    if not re.fullmatch(_NAME, sides[0].replace(" ", "")):
        return None
    if signs[0] in (">", r"\ge"):
        return _Shape("tuple", ("(" if signs[0] == ">" else "[") + ")", (sides[1], r"\infty"))
    return _Shape("tuple", "(" + (")" if signs[0] == "<" else "]"), (r"-\infty", sides[1]))


def _matrix(text: str) -> _Shape | None:
    """A matrix, with a factor before it or none, or a determinant."""
    start = re.search(r"\\begin\{|\\[pbvBV]?matrix\s*\{", text)
    if start is None:
        return _nested_lists(text)
    factor, rest = text[: start.start()].strip(), text[start.start() :].strip()
    turned = re.search(r"\^\s*\{?\s*(?:T|\\top|t|\\mathsf\{T\})\s*\}?$", rest)
    rest = rest[: turned.start()].strip() if turned is not None else rest
    around = ""
    if factor[-1:] in ("(", "[", "|") and rest[-1:] in (")", "]", "|"):
        around, factor, rest = factor[-1], factor[:-1].strip(), rest[:-1].strip()
    found = _MATRIX.fullmatch(rest) or _PLAIN_MATRIX.fullmatch(rest)
    if found is None or "\\begin" in found["body"]:
        return None
    if factor.endswith("="):
        if not _is_asked(factor[:-1]):
            return None
        factor = factor[:-1] if not factor else ""
    elif "=" in factor:
        return None
    rows = [[cell.strip() for cell in _split(row, "&")] for row in _ROWS.split(found["body"].strip()) if row.strip()]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    rows = [list(column) for column in zip(*rows, strict=True)] if turned is not None else rows
    if found["kind"].startswith("V"):
        return _Shape("norm", f"{len(rows)}", tuple(cell for row in rows for cell in row))
    if found["kind"].startswith("v") or around == "|":
        return _Shape("determinant", f"{len(rows)}", tuple(cell for row in rows for cell in row))
    factor = factor.removesuffix(r"\cdot").removesuffix("*").removesuffix(r"\times").strip()
    factor = {"-": "-1", "+": ""}.get(factor, factor)
    cells = tuple(f"({factor})*({cell})" if factor else cell for row in rows for cell in row)
    return _Shape("matrix", f"{len(rows)}x{len(rows[0])}", cells)


def _nested_lists(text: str) -> _Shape | None:
    """A matrix as [[1, 2], [3, 4]]."""
    if not re.fullmatch(r"\[\s*\[.*\]\s*\]", text, re.S) or not _is_wrapped(text, "[", "]"):
        return None
    rows = [_split(row[1:-1], ",") for row in _split(text[1:-1], ",") if _is_wrapped(row, "[", "]")]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    return _Shape("matrix", f"{len(rows)}x{len(rows[0])}", tuple(cell for row in rows for cell in row))


def _determinant(cells: list[list[str]]) -> str:
    """The expression of a determinant, by its first row."""
    if len(cells) == 1:
        return f"({cells[0][0]})"
    terms = [
        f"{'-' if place % 2 else '+'}({cell})*{_determinant([row[:place] + row[place + 1 :] for row in cells[1:]])}"
        for place, cell in enumerate(cells[0])
    ]
    return f"({''.join(terms)})"


def _based(text: str) -> _Shape | None:
    """Digits with the base that they are written in."""
    found = _BASED.fullmatch(_unworded(text).replace("\\", "")) or _BASED.fullmatch(text)
    if found is None:
        return None
    named = found[2] or found[3]
    base = int(named) if named.isdigit() else _BASE_WORDS.get(named, 0)
    if not 2 <= base <= 36 or not any(map(str.isdigit, found[1])) or any(int(digit, 36) >= base for digit in found[1]):
        return None
    if base == 10:
        return _Shape("plain", "", (found[1],))
    return _Shape("based", f"{found[1].lstrip('0') or '0'}_{base}", ())


def _alternatives(parts: list[str]) -> tuple[str, ...]:
    """Write out each \\pm as two parts."""
    out: list[str] = []
    for part in parts:
        if r"\pm" in part:
            out += [part.replace(r"\pm", "+"), part.replace(r"\pm", "-")]
        elif part:
            out.append(part)
    return tuple(out)


def _is_asked(side: str) -> bool:
    """Whether the left side of an equation only says what its right side is: x, f(2), AB, P(X = 2), x + y."""
    side = re.sub(r"_\{[^{}]*\}|_\w|\^\{[^{}]*\}|\^\w|(?<=[A-Za-z\s])\((?:[^()]|\([^()]*\))*\)", "", side)
    side = _TEXT.sub(" a ", side).strip()
    return bool(side) and not re.search(r"\d|[<>]|^-|\\frac", side) and bool(re.search(r"[A-Za-z]", side))


def _same(one: str, other: str) -> bool:
    if re.sub(r"\s", "", one) == re.sub(r"\s", "", other):
        return bool(one)
    (one, unit), (other, unit_) = units.measured(one), units.measured(other)
    if not units.agree(unit, unit_):
        return False
    one, other = (_THOUSANDS.sub(_closed, text) if _THOUSANDS.fullmatch(text) else text for text in (one, other))
    one, other = (text.replace(" ", "") if _SPACED.fullmatch(text) else text for text in (one, other))
    if "percent" in (unit, unit_) and unit != unit_:
        return _same_percent(one, other) if unit else _same_percent(other, one)
    return _same_shape(one.strip(), other.strip())


def _closed(found: re.Match[str]) -> str:
    return found.group().replace(",", "")


def _same_percent(percent: str, plain: str) -> bool:
    """50 % is 50 where the sign was left out, or 0.5; but 0.5 % is not 0.5."""
    if _same_shape(f"({percent})/100", plain):
        return True
    try:
        value = values_at_points(plain)[0].value
    except UnreadableError:
        return _same_shape(percent, plain)
    return value is not None and abs(complex(value)) >= 1 and _same_shape(percent, plain)


def _same_shape(one: str, other: str) -> bool:
    if re.sub(r"\s", "", one) == re.sub(r"\s", "", other):
        return bool(one)
    if not one or not other:
        return False
    if (
        _name_of_inequality(one)
        and _name_of_inequality(other)
        and _name_of_inequality(one) != _name_of_inequality(other)
    ):
        return False
    first, second = _shape(one), _shape(other)
    if first.kind != second.kind:
        return _same_across(first, second) or _same_across(second, first)
    if first.kind == "determinant":
        return _same_expression(*(_value_of_determinant(shape) for shape in (first, second)))
    if first.mark != second.mark or (first.kind != "equation" and len(first.parts) != len(second.parts)):
        return False
    if first.kind in ("tuple", "matrix", "named", "norm"):
        return all(map(_same, first.parts, second.parts))
    if first.kind in ("set", "union"):
        return _same_unordered(first.parts, second.parts)
    if first.kind == "equation":
        return _same_equation(first.parts, second.parts)
    return first.kind == "based" or _same_expression(first.parts[0], second.parts[0])


def _name_of_inequality(text: str) -> str:
    """The variable of an inequality; empty where there is none."""
    if _inequality(text) is None:
        return ""
    sides = [side.replace(" ", "") for side in _COMPARED.split(text)]
    return next((side for side in sides if re.fullmatch(_NAME, side)), "")


def _value_of_determinant(shape: _Shape) -> str:
    size = int(shape.mark)
    if size * size != len(shape.parts) or size > _MOST_MATRIX:
        return r"\none"
    return _determinant([list(shape.parts[place : place + size]) for place in range(0, size * size, size)])


def _same_across(one: _Shape, other: _Shape) -> bool:
    """Whether answers built differently mean the same: {5} and 5, x = 5 and 5, x = 1, y = 2 and (1, 2)."""
    if one.kind == "set" and len(one.parts) == 1:
        return _same(one.parts[0], _rebuilt(other))
    if one.kind == "equation":
        return _same_right_side(one, other)
    if one.kind == "determinant" and other.kind == "plain":
        return _same_expression(_value_of_determinant(one), other.parts[0])
    if one.kind == "named" and other.kind == "tuple":
        return other.mark == "()" and len(one.parts) == len(other.parts) and all(map(_same, one.parts, other.parts))
    if one.kind == "named" and other.kind == "set":
        return len(one.parts) == len(other.parts) and _same_unordered(one.parts, other.parts)
    if one.kind == "matrix" and other.kind == "tuple":  # a vector is a column
        return (
            one.mark.endswith("x1")
            and other.mark == "()"
            and len(one.parts) == len(other.parts)
            and all(map(_same, one.parts, other.parts))
        )
    return False


def _same_right_side(one: _Shape, other: _Shape) -> bool:
    left, right = one.parts[0], one.parts[-1]
    names = [name.strip() for name in left[1:-1].split(",")] if _is_wrapped(left, "(", ")") else []
    if len(names) > 1 and all(re.fullmatch(_NAME, name) for name in names):
        return _same_named(names, _shape(right), other)
    if _is_asked(left):
        return _same(right, _rebuilt(other))
    if other.kind == "plain" and len(one.parts) > 1 and re.search(r"\d", left):  # 2 + 3 = 5
        return all(_same(left, side) for side in one.parts[1:]) and _same(right, _rebuilt(other))
    return False


def _same_named(names: list[str], values: _Shape, other: _Shape) -> bool:
    """(x, y) = (1, 2) against (1, 2), or x = 1, y = 2."""
    if values.kind != "tuple" or len(names) != len(values.parts):
        return False
    if other.kind == "equation":
        return False
    if (
        other.kind == "tuple"
        and all(map(str.isalpha, names))
        and names != sorted(names)
        and len(set(names)) == len(names)
    ):
        values = values._replace(parts=tuple(part for _, part in sorted(zip(names, values.parts, strict=True))))
    if other.kind == "named":
        pairs = sorted(zip(names, values.parts, strict=True))
        values = _Shape("named", ",".join(name for name, _ in pairs), tuple(part for _, part in pairs))
    return _same(_rebuilt(values), _rebuilt(other))


def _rebuilt(shape: _Shape) -> str:
    if shape.kind == "plain":
        return shape.parts[0]
    if shape.kind == "equation":
        return "=".join(shape.parts)
    if shape.kind == "named":
        return ",".join(f"{name}={part}" for name, part in zip(shape.mark.split(","), shape.parts, strict=True))
    if shape.kind == "union":
        return r"\cup ".join(shape.parts)
    if shape.kind == "based":
        return shape.mark
    if shape.kind in ("matrix", "determinant"):
        width = int(shape.mark.partition("x")[2] or shape.mark)
        rows = [shape.parts[place : place + width] for place in range(0, len(shape.parts), width)]
        kind = "matrix" if shape.kind == "matrix" else "vmatrix"
        return rf"\begin{{{kind}}}" + r"\\".join("&".join(row) for row in rows) + rf"\end{{{kind}}}"
    inside = ",".join(shape.parts)
    if shape.kind == "tuple":
        return shape.mark[0] + inside + shape.mark[1]
    return inside if shape.kind == "set" else ""


def _same_unordered(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    left = list(other)
    for part in one:
        match = next((place for place, candidate in enumerate(left) if _same(part, candidate)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _same_equation(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    if len(one) == len(other) and all(map(_same, one, other)):
        return True
    if len(one) > 2 or len(other) > 2:  # y = 2(x + 1) = 2x + 2
        return _same(one[0], other[0]) and _same(one[-1], other[-1])
    named = [_split(side[0][1:-1], ",") if _is_wrapped(side[0], "(", ")") else [] for side in (one, other)]
    if all(len(names) > 1 for names in named):
        ordered = [
            sorted(zip(names, side.parts, strict=True))
            if len(names) == len((side := _shape(pair[1])).parts)
            else [("", "")]
            for names, pair in zip(named, (one, other), strict=True)
        ]
        return len(ordered[0]) == len(ordered[1]) and all(
            a == b and _same(c, d) for (a, c), (b, d) in zip(ordered[0], ordered[1], strict=True)
        )
    try:
        return proportional(f"({one[0]})-({one[1]})", f"({other[0]})-({other[1]})")
    except UnreadableError:
        return False


def _same_expression(one: str, other: str) -> bool:
    one, other = _unworded(one), _unworded(other)
    if _WORD.search(one) or _WORD.search(other):
        return _words(one) == _words(other) or _spelled(one, other) or _spelled(other, one)
    try:
        first, second = values_at_points(one), values_at_points(other)
    except UnreadableError:
        return _words(one) == _words(other)
    for decimal, samples, own in ((one, second, first), (other, first, second)):
        compact = decimal.replace(" ", "")
        if (
            _DECIMAL.fullmatch(compact)
            and not isinstance(samples[0].value, Fraction)
            and isinstance(own[0].value, Fraction)
        ):
            return agrees_to_its_digits(compact, samples)
    return closely_equal(first, second)


def _spelled(one: str, other: str) -> bool:
    """Whether one is a number in words and the other that number."""
    if not re.fullmatch(r"[A-Za-z\s-]+", one) or not re.fullmatch(r"-?\d+", other):
        return False
    return number_in_words(one) == int(other) and len(one.split()) <= _MOST_WORDS


def _words(text: str) -> str:
    """A verbal answer without case, spaces, articles and the brackets of a choice such as (C)."""
    return re.sub(r"^(?:the|an?|on)(?=\s)|[\s{}()]", "", text.strip(), flags=re.IGNORECASE).lower()
