"""How an answer in LaTeX is built: a list, set, tuple, interval, inequality, union, matrix, determinant, equation, or
a number with a base; what is nothing of these is plain.
"""

import re
from typing import NamedTuple

from m3jax.evaluation.scorers.brackets import TEXT, is_wrapped, split, unworded
from m3jax.evaluation.scorers.expressions import UnreadableError, values_at_points

_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE_WORDS |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_BASED = re.compile(
    r"\(?([0-9A-Z]+)\)?\s*(?:_\s*\{?\s*(?:\\text\s*\{)?\s*\(?\s*([0-9]+|[a-z]+)\s*\)?\s*\}?\s*\}?|\(?\s*(?:in\s+)?base[\s-]+([0-9]+|[a-z]+)\s*\)?)"
)
_NAMED = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?")
NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?"
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbvBV]?(?:small)?matrix\*?|array)\}(?:\[[^\]]*\]|\{[lcr|@\s]*\})?(?P<body>.*)\\end\{(?P=kind)\}",
    re.S,
)
_PLAIN_MATRIX = re.compile(r"\\(?P<kind>[pbvBV]?matrix)\s*\{(?P<body>.*)\}", re.S)
_ROWS = re.compile(r"\\\\(?:\s*\[[^\]]*\])?|\\cr(?![a-z])|\\newline")
COMPARED = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|<|>")
_FLIPPED = {r"\le": r"\ge", r"\ge": r"\le", "<": ">", ">": "<"}
_MOST_MATRIX = 5


class AnswerShape(NamedTuple):
    """How an answer is built: its kind, what must agree literally, and its parts."""

    kind: str
    mark: str
    parts: tuple[str, ...]


def shape_of(text: str) -> AnswerShape:
    """How an answer is built.

    Args:
        text: In one spelling, as `notation.cleaned` gives it.
    """
    for implied in (r"\implies", r"\Rightarrow", r"\Longrightarrow", r"\to"):
        if len(pieces := split(text, implied)) > 1 and pieces[-1]:
            return shape_of(pieces[-1])
    if (matrix := _matrix(text)) is not None:
        return matrix
    pieces = split(text, r"\cup")
    if len(pieces) > 1:
        return AnswerShape("union", "", tuple(pieces))
    if is_wrapped(text, "{", "}"):
        pieces = split(text[1:-1], ",")
        return AnswerShape("set", "", _alternatives(pieces)) if len(pieces) > 1 else shape_of(text[1:-1].strip())
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = text[2:-2]
        if built := re.match(r"\s*[a-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)\s*", inside):
            return shape_of(inside[built.end() :].strip())
        return AnswerShape("set", "", _alternatives(split(inside, ",")))
    pieces = split(text, ",")
    if len(pieces) > 1 or r"\pm" in text:
        return _tuple(text) or _list(pieces)
    if (found := _tuple(text)) is not None:
        return found
    if len(pieces := split(text, r"\in")) == 2 and _NAMED.fullmatch(pieces[0].replace(" ", "")):
        return shape_of(pieces[1])
    if (interval := _inequality(text)) is not None:
        return interval
    if len(pieces := split(text, r"\ne")) == 2 and all(pieces):
        return AnswerShape("union", "", (rf"(-\infty,{pieces[1]})", rf"({pieces[1]},\infty)"))
    pieces = split(text, "=")
    if len(pieces) >= 2 and all(pieces):
        return AnswerShape("equation", "", tuple(pieces))
    if (based := _based(text)) is not None:
        return based
    return AnswerShape("plain", "", (text,))


def _tuple(text: str) -> AnswerShape | None:
    for opening in "([":
        for closing in ")]":
            if is_wrapped(text, opening, closing):
                inside = split(text[1:-1], ",")
                if len(inside) > 1:
                    return AnswerShape("tuple", _interval_marks(opening, closing, inside), tuple(inside))
    return None


def _interval_marks(opening: str, closing: str, parts: list[str]) -> str:
    """The brackets; at infinity an interval is open, however it is written."""
    if len(parts) == 2:
        opening = "(" if re.fullmatch(r"-\s*\\infty\s*", parts[0]) else opening
        closing = ")" if re.fullmatch(r"\+?\s*\\infty\s*", parts[1]) else closing
    return opening + closing


def _list(pieces: list[str]) -> AnswerShape:
    """A list: of named values, of inequalities that hold together, or of alternatives."""
    intervals = [_inequality(piece) for piece in pieces]
    if len(pieces) == 2 and all(interval is not None for interval in intervals):
        return _together([interval for interval in intervals if interval is not None])
    sides = [split(piece, "=") for piece in pieces]
    names = [side[0].replace(" ", "") for side in sides]
    if all(len(side) == 2 and re.fullmatch(NAME, name) for side, name in zip(sides, names, strict=True)):
        if len(pieces) > 1 and len(set(names)) == len(names):
            ordered = sorted(zip(names, (side[1] for side in sides), strict=True))
            return AnswerShape("named", ",".join(name for name, _ in ordered), tuple(value for _, value in ordered))
        return AnswerShape("set", "", _alternatives([side[1] for side in sides]))
    if len(sides[0]) == 2 and is_asked(sides[0][0]) and all(len(side) == 1 for side in sides[1:]):
        pieces = [sides[0][1], *pieces[1:]]  # x = 1, 2
    return AnswerShape("set", "", _alternatives(pieces))


def _together(intervals: list[AnswerShape]) -> AnswerShape:
    """Two inequalities of one variable: what lies between them, or what lies outside."""
    lower = next((shape for shape in intervals if shape.parts[1] == r"\infty"), None)
    upper = next((shape for shape in intervals if shape.parts[0] == r"-\infty"), None)
    if lower is not None and upper is not None and (order := _order(lower.parts[0], upper.parts[1])) is not None:
        if order:
            return AnswerShape("tuple", lower.mark[0] + upper.mark[1], (lower.parts[0], upper.parts[1]))
        return AnswerShape("union", "", tuple(map(rebuilt, intervals)))
    return AnswerShape("set", "", tuple(map(rebuilt, intervals)))


def _order(one: str, other: str) -> bool | None:
    """Whether one value is below the other."""
    try:
        first, second = values_at_points(one)[0].value, values_at_points(other)[0].value
    except UnreadableError:
        return None
    return None if first is None or second is None else first.real < second.real


def _inequality(text: str) -> AnswerShape | None:
    """An inequality of one variable as the interval it describes."""
    if not text or split(text, ",")[1:] or (text[0] in "([" and is_wrapped(text, text[0], text[-1])):
        return None
    signs = [found.group() for found in COMPARED.finditer(text)]
    sides = [side.strip() for side in COMPARED.split(text)]
    if not 1 <= len(signs) <= 2 or not all(sides):
        return None
    if len(signs) == 2:
        if signs[0] in (">", r"\ge"):
            signs, sides = [_FLIPPED[sign] for sign in signs[::-1]], sides[::-1]
        if signs[0] in (">", r"\ge") or signs[1] in (">", r"\ge") or not re.fullmatch(NAME, sides[1].replace(" ", "")):
            return None
        marks = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return AnswerShape("tuple", _interval_marks(marks[0], marks[1], [sides[0], sides[2]]), (sides[0], sides[2]))
    if re.fullmatch(NAME, sides[1].replace(" ", "")) and not re.fullmatch(NAME, sides[0].replace(" ", "")):
        signs, sides = [_FLIPPED[signs[0]]], sides[::-1]
    if not re.fullmatch(NAME, sides[0].replace(" ", "")):
        return None
    if signs[0] in (">", r"\ge"):
        return AnswerShape("tuple", ("(" if signs[0] == ">" else "[") + ")", (sides[1], r"\infty"))
    return AnswerShape("tuple", "(" + (")" if signs[0] == "<" else "]"), (r"-\infty", sides[1]))


def _matrix(text: str) -> AnswerShape | None:
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
        if not is_asked(factor[:-1]):
            return None
        factor = factor[:-1] if not factor else ""
    elif "=" in factor:
        return None
    rows = [[cell.strip() for cell in split(row, "&")] for row in _ROWS.split(found["body"].strip()) if row.strip()]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    rows = [list(column) for column in zip(*rows, strict=True)] if turned is not None else rows
    if found["kind"].startswith("V"):
        return AnswerShape("norm", f"{len(rows)}", tuple(cell for row in rows for cell in row))
    if found["kind"].startswith("v") or around == "|":
        return AnswerShape("determinant", f"{len(rows)}", tuple(cell for row in rows for cell in row))
    factor = factor.removesuffix(r"\cdot").removesuffix("*").removesuffix(r"\times").strip()
    factor = {"-": "-1", "+": ""}.get(factor, factor)
    cells = tuple(f"({factor})*({cell})" if factor else cell for row in rows for cell in row)
    return AnswerShape("matrix", f"{len(rows)}x{len(rows[0])}", cells)


def _nested_lists(text: str) -> AnswerShape | None:
    """A matrix as [[1, 2], [3, 4]]."""
    if not re.fullmatch(r"\[\s*\[.*\]\s*\]", text, re.S) or not is_wrapped(text, "[", "]"):
        return None
    rows = [split(row[1:-1], ",") for row in split(text[1:-1], ",") if is_wrapped(row, "[", "]")]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    return AnswerShape("matrix", f"{len(rows)}x{len(rows[0])}", tuple(cell for row in rows for cell in row))


def _determinant(cells: list[list[str]]) -> str:
    """The expression of a determinant, by its first row."""
    if len(cells) == 1:
        return f"({cells[0][0]})"
    terms = [
        f"{'-' if place % 2 else '+'}({cell})*{_determinant([row[:place] + row[place + 1 :] for row in cells[1:]])}"
        for place, cell in enumerate(cells[0])
    ]
    return f"({''.join(terms)})"


def _based(text: str) -> AnswerShape | None:
    """Digits with the base that they are written in."""
    found = _BASED.fullmatch(unworded(text).replace("\\", "")) or _BASED.fullmatch(text)
    if found is None:
        return None
    named = found[2] or found[3]
    base = int(named) if named.isdigit() else _BASE_WORDS.get(named, 0)
    if not 2 <= base <= 36 or not any(map(str.isdigit, found[1])) or any(int(digit, 36) >= base for digit in found[1]):
        return None
    if base == 10:
        return AnswerShape("plain", "", (found[1],))
    return AnswerShape("based", f"{found[1].lstrip('0') or '0'}_{base}", ())


def _alternatives(parts: list[str]) -> tuple[str, ...]:
    """Write out each \\pm as two parts."""
    out: list[str] = []
    for part in parts:
        if r"\pm" in part:
            out += [part.replace(r"\pm", "+"), part.replace(r"\pm", "-")]
        elif part:
            out.append(part)
    return tuple(out)


def is_asked(side: str) -> bool:
    """Whether the left side of an equation only says what its right side is: x, f(2), AB, P(X = 2), x + y."""
    side = re.sub(r"_\{[^{}]*\}|_\w|\^\{[^{}]*\}|\^\w|(?<=[A-Za-z\s])\((?:[^()]|\([^()]*\))*\)", "", side)
    side = TEXT.sub(" a ", side).strip()
    return bool(side) and not re.search(r"\d|[<>]|^-|\\frac", side) and bool(re.search(r"[A-Za-z]", side))


def name_of_inequality(text: str) -> str:
    """The variable of an inequality; empty where there is none."""
    if _inequality(text) is None:
        return ""
    sides = [side.replace(" ", "") for side in COMPARED.split(text)]
    return next((side for side in sides if re.fullmatch(NAME, side)), "")


def value_of_determinant(shape: AnswerShape) -> str:
    """The expression of a determinant; what nothing reads where it is not square or too large."""
    size = int(shape.mark)
    if size * size != len(shape.parts) or size > _MOST_MATRIX:
        return r"\none"
    return _determinant([list(shape.parts[place : place + size]) for place in range(0, size * size, size)])


def rebuilt(shape: AnswerShape) -> str:
    """The text of an answer that is built so."""
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
