"""Whether two mathematical answers in LaTeX mean the same.

Answers are taken apart into lists, sets, tuples, intervals, inequalities, unions, matrices, determinants, equations and
numbers with a base or a unit; what remains are expressions, which are equal when they have equal values: exactly where
they are rational, else at several points of their variables. Nothing is ever handed to Python to evaluate.
"""

import re
from fractions import Fraction

from m3jax.evaluation.scorers import quantities, units
from m3jax.evaluation.scorers.brackets import is_wrapped, split, unworded
from m3jax.evaluation.scorers.expressions import (
    UnreadableError,
    agrees_to_its_digits,
    closely_equal,
    proportional,
    values_at_points,
)
from m3jax.evaluation.scorers.notation import cleaned, without_modulus
from m3jax.evaluation.scorers.numbers import number_in_words
from m3jax.evaluation.scorers.shapes import (
    NAME,
    AnswerShape,
    is_asked,
    name_of_inequality,
    rebuilt,
    shape_of,
    value_of_determinant,
)

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[-+]?\d*\.\d+")
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*)?\(?\s*([A-Z])\s*\)?", re.IGNORECASE)
_CHOSEN = re.compile(r"(?:(?:option|choice|answer)\s*)?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.):](?=\s|$))")
_TWO_CHOICES = re.compile(r"\(?[A-Z]\)?\s*(?:,|and|or|&|/)\s*\(?[A-Z]\b")
_WORD = re.compile(r"(?<![\\a-zA-Z])(?:[A-Za-z]{3,}|(?:to|up|of|or|if|no)(?![A-Za-z]))")
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
    (answer, modulus), (gold, modulus_) = without_modulus(answer), without_modulus(gold)
    if modulus and modulus != modulus_:
        is_rest = gold.isdigit() and (not modulus.isdigit() or int(gold) < int(modulus))
        if modulus_ or (asked and not (is_rest and quantities.is_modulus(asked, modulus))):
            return False
    one, other = cleaned(quantities.uncounted(answer, asked)), cleaned(gold)
    unit, is_bare = units.measured(one).unit, not units.measured(other).unit
    if asked and is_bare and unit in ("percent", "degree") and not quantities.is_about(asked, unit):
        return unit == "percent" and _same_shape(f"({units.measured(one).text})/100", other)
    letters = [_CHOICE.fullmatch(unworded(text)) for text in (one, other)]
    for letter, text in ((letters[1], one), (letters[0], other)):
        chosen = _CHOSEN.match(unworded(text))
        if letter is not None and chosen is not None and letter[1].isupper():
            if _TWO_CHOICES.match(unworded(text)):
                return False
            return letter[1] == (chosen[1] or chosen[2])
    return _same(one, other)


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
    if name_of_inequality(one) and name_of_inequality(other) and name_of_inequality(one) != name_of_inequality(other):
        return False
    first, second = shape_of(one), shape_of(other)
    if first.kind != second.kind:
        return _same_across(first, second) or _same_across(second, first)
    if first.kind == "determinant":
        return _same_expression(*(value_of_determinant(shape) for shape in (first, second)))
    if first.mark != second.mark or (first.kind != "equation" and len(first.parts) != len(second.parts)):
        return False
    if first.kind in ("tuple", "matrix", "named", "norm"):
        return all(map(_same, first.parts, second.parts))
    if first.kind in ("set", "union"):
        return _same_unordered(first.parts, second.parts)
    if first.kind == "equation":
        return _same_equation(first.parts, second.parts)
    return first.kind == "based" or _same_expression(first.parts[0], second.parts[0])


def _same_across(one: AnswerShape, other: AnswerShape) -> bool:
    """Whether answers built differently mean the same: {5} and 5, x = 5 and 5, x = 1, y = 2 and (1, 2)."""
    if one.kind == "set" and len(one.parts) == 1:
        return _same(one.parts[0], rebuilt(other))
    if one.kind == "equation":
        return _same_right_side(one, other)
    if one.kind == "determinant" and other.kind == "plain":
        return _same_expression(value_of_determinant(one), other.parts[0])
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


def _same_right_side(one: AnswerShape, other: AnswerShape) -> bool:
    left, right = one.parts[0], one.parts[-1]
    names = [name.strip() for name in left[1:-1].split(",")] if is_wrapped(left, "(", ")") else []
    if len(names) > 1 and all(re.fullmatch(NAME, name) for name in names):
        return _same_named(names, shape_of(right), other)
    if is_asked(left):
        return _same(right, rebuilt(other))
    if other.kind == "plain" and len(one.parts) > 1 and re.search(r"\d", left):  # 2 + 3 = 5
        return all(_same(left, side) for side in one.parts[1:]) and _same(right, rebuilt(other))
    return False


def _same_named(names: list[str], values: AnswerShape, other: AnswerShape) -> bool:
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
        values = AnswerShape("named", ",".join(name for name, _ in pairs), tuple(part for _, part in pairs))
    return _same(rebuilt(values), rebuilt(other))


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
    named = [split(side[0][1:-1], ",") if is_wrapped(side[0], "(", ")") else [] for side in (one, other)]
    if all(len(names) > 1 for names in named):
        ordered = [
            sorted(zip(names, side.parts, strict=True))
            if len(names) == len((side := shape_of(pair[1])).parts)
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
    one, other = unworded(one), unworded(other)
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
