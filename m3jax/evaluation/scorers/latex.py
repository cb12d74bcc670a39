"""Whether two mathematical answers in LaTeX mean the same.

Answers are taken apart into lists, sets, tuples, intervals, unions, matrices and equations; what remains are
expressions, which are equal when they have equal values: exactly where they are rational, else at several points of
their variables. Nothing is ever handed to Python to evaluate.
"""

import re
from typing import NamedTuple

from m3jax.evaluation.scorers.expressions import (
    UnreadableError,
    closely_equal,
    proportional,
    values_at_points,
)

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ",
    "°": "", "²": "^2", "³": "^3", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "½": r"\frac12 ",
    "≤": r"\le ", "≥": r"\ge ",
    "\u00a0": " ",
}  # fmt: skip
_PLAIN_NAMES = re.compile(r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|cot|sec|csc|ln|log|infty|infinity)(?![a-zA-Z])")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\[|\\\]|\\\(|\\\)", " "),
        (r"(?<!\\)\$|\\\$", ""),
        (r",\\!\s*", ""),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"\\left\s*\.|\\right\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r"\\(?:displaystyle|textstyle|limits|qquad|quad)(?![a-zA-Z])|(?<!\\)\\[!,;: ]", " "),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])", ""),
        (r"\\?%", ""),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"\\(?:leq)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq)(?![a-zA-Z])", r"\\ge"),
        (r"\\infinity", r"\\infty"),
        (r"(^|[,(\[])\s*\+\s*(?=\\infty)", r"\1"),
        (r"(?<=\d)[eE]([-+]?\d+)(?![\w.])", r"\\times 10^{\1}"),
        (r"~", " "),
    )
]
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}\s])\s*(?<!\\)\b(?:[a-z]{2,}\.?)(?:\s+(?:[a-z]{2,}\.?|/))*\s*(?:\^\s*\{?\d\}?)?$")
_TEXT_UNIT = re.compile(r"(?<=[\d}\w)])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}\s*(?:\^\s*\{?\d\}?)?\s*$")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_NAMED = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.S)
_CHAIN = re.compile(r"([^<=>]+?)(\\le|\\lt|<=?)\s*[A-Za-z]\s*(\\le|\\lt|<=?)([^<=>]+)")
_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{3,}")
_STRICT = ("<", r"\lt")
_OPENING, _CLOSING = "([{", ")]}"


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers mean the same.

    Units, currency, degree and percent signs are ignored; a fraction equals its decimal where they are equal exactly;
    the order of a list or set does not matter, that of a tuple does.

    Example:
        >>> equivalent("1/2", r"\\frac{1}{2}"), equivalent("0.333", r"\\frac13"), equivalent("(1, 2]", "(1,2]")
        (True, False, True)
    """
    return _same(_cleaned(answer), _cleaned(gold))


def _cleaned(text: str) -> str:
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    text = text.strip().rstrip(".").strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _TEXT_UNIT.sub("", text.strip())
    text = _TEXT.sub(r" \1 ", text).strip()
    text = _PLAIN_NAMES.sub(r"\\\1 ", text)
    text = re.sub(r"(?<=[\d}\w)])\s+(?:or|and)\s+(?=\S)", ",", text)
    text = _UNIT.sub("", text.strip()).strip().rstrip(".,").strip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return text


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
        elif depth == 0 and text.startswith(separator, place):
            parts.append(text[start:place].strip())
            start = place + len(separator)
            place = start
            continue
        place += 1
    return [*parts, text[start:].strip()]


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
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [_split(row, "&") for row in re.split(r"\\\\|\\cr(?![a-z])", matrix[2].strip()) if row.strip()]
        return _Shape("matrix", f"{len(rows)}", tuple(cell for row in rows for cell in row))
    pieces = _split(text, r"\cup")
    if len(pieces) > 1:
        return _Shape("union", "", tuple(pieces))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _Shape("set", "", _alternatives(_split(text[2:-2], ",")))
    pieces = _split(text, ",")
    if len(pieces) > 1 or r"\pm" in text:
        for opening in "([":
            for closing in ")]":
                if _is_wrapped(text, opening, closing):
                    return _Shape("tuple", opening + closing, tuple(_split(text[1:-1], ",")))
        return _Shape("set", "", _alternatives(pieces))
    for opening in "([":
        for closing in ")]":
            if _is_wrapped(text, opening, closing):
                inside = _split(text[1:-1], ",")
                if len(inside) > 1:
                    return _Shape("tuple", opening + closing, tuple(inside))
    if len(pieces := _split(text, r"\in ")) == 2 and _NAMED.fullmatch(pieces[0].replace(" ", "")):
        return _shape(pieces[1])
    if chain := _CHAIN.fullmatch(text):  # 1 < x \le 2 is the interval (1, 2]
        opening, closing = "(" if chain[2] in _STRICT else "[", ")" if chain[3] in _STRICT else "]"
        return _Shape("tuple", opening + closing, (chain[1].strip(), chain[4].strip()))
    if len(pieces := _split(text, "=")) == 2 and all(pieces):
        return _Shape("equation", "", tuple(pieces))
    if based := _BASED.fullmatch(text.replace(" ", "")):
        return _Shape("based", f"{based[1]}_{based[2]}", ()) if based[1].isdigit() else _Shape("plain", "", (text,))
    return _Shape("plain", "", (text,))


def _alternatives(parts: list[str]) -> tuple[str, ...]:
    """Write out each \\pm as two parts."""
    out: list[str] = []
    for part in parts:
        if r"\pm" in part:
            out += [part.replace(r"\pm", "+"), part.replace(r"\pm", "-")]
        else:
            out.append(part)
    return tuple(out)


def _same(one: str, other: str) -> bool:
    if re.sub(r"\s", "", one) == re.sub(r"\s", "", other):
        return bool(one)
    if not one or not other:
        return False
    first, second = _shape(one), _shape(other)
    if first.kind != second.kind:
        return _same_across(first, second) or _same_across(second, first)
    if first.mark != second.mark or len(first.parts) != len(second.parts):
        return False
    if first.kind in ("tuple", "matrix"):
        return all(map(_same, first.parts, second.parts))
    if first.kind in ("set", "union"):
        return _same_unordered(first.parts, second.parts)
    if first.kind == "equation":
        return _same_equation(first.parts, second.parts)
    return first.kind == "based" or _same_expression(one, other)


def _same_across(one: _Shape, other: _Shape) -> bool:
    """Whether answers built differently mean the same: {5} and 5, x = 5 and 5."""
    if one.kind == "set" and len(one.parts) == 1:
        return _same(one.parts[0], _rebuilt(other))
    if one.kind == "equation":
        return bool(_NAMED.fullmatch(one.parts[0].replace(" ", ""))) and _same(one.parts[1], _rebuilt(other))
    return False


def _rebuilt(shape: _Shape) -> str:
    if shape.kind == "plain":
        return shape.parts[0]
    if shape.kind == "equation":
        return "=".join(shape.parts)
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
    return True


def _same_equation(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    if _same(one[0], other[0]) and _same(one[1], other[1]):
        return True
    try:
        return proportional(f"({one[0]})-({one[1]})", f"({other[0]})-({other[1]})")
    except UnreadableError:
        return False


def _same_expression(one: str, other: str) -> bool:
    if _WORD.search(one) or _WORD.search(other):
        return _words(one) == _words(other)
    try:
        return closely_equal(values_at_points(one), values_at_points(other))
    except UnreadableError:
        return _words(one) == _words(other)


def _words(text: str) -> str:
    """A verbal answer without case, spaces and the brackets of a choice such as (C)."""
    return re.sub(r"[\s{}()]", "", text).lower()
