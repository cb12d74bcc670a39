"""Values of mathematical expressions in LaTeX, by recursive descent."""

import cmath
import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

Value: TypeAlias = Fraction | complex

_POINTS = 3
_TOLERANCE = 1e-9
_LARGEST_POWER = 4096
_DEEPEST = 60
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_SUBSCRIPT = re.compile(r"_(?:\{(\w+)\}|(\w))")
_MIXED = re.compile(r"\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_TIMES = (r"\cdot", r"\times", "*")
_OVER = (r"\div", "/")
_GREEK = re.compile(
    r"(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega)"
    r"|ell|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "ln": cmath.log,
    "log": cmath.log,
    "exp": cmath.exp,
}


class UnreadableError(Exception):
    """The text is not an expression that this module knows."""


def values_at_points(text: str) -> list[Value]:
    """An expression's values where its variables take a few fixed, unrelated positive values.

    Raises:
        UnreadableError: The text is no expression, or has no value there.
    """
    return [_value(text, point) for point in range(_POINTS)]


def closely_equal(one: Sequence[Value], other: Sequence[Value]) -> bool:
    """Whether values are pairwise equal: exactly if rational, else to nine digits."""
    return all(map(_equal, one, other))


def proportional(one: str, other: str) -> bool:
    """Whether one expression is a constant, not zero, times the other; so two equations have the same solutions."""
    ratios = [_divide(a, b) for a, b in zip(values_at_points(one), values_at_points(other), strict=True)]
    return ratios[0] != 0 and all(_equal(ratios[0], ratio) for ratio in ratios)


def _equal(one: Value, other: Value) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    return cmath.isclose(_complex(one), _complex(other), rel_tol=_TOLERANCE, abs_tol=1e-12)


def _complex(value: Value) -> complex:
    try:
        return complex(value)
    except OverflowError as error:
        raise UnreadableError("a number too large") from error


def _value(text: str, point: int) -> Value:
    reader = _Reader(text, point)
    try:
        value = reader.sum()
        reader.end()
        if not isinstance(value, Fraction) and not cmath.isfinite(value):
            raise UnreadableError("no finite value")
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise UnreadableError(str(error)) from error
    return value


def _divide(one: Value, other: Value) -> Value:
    if other == 0:
        raise UnreadableError("division by zero")
    return one / other


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _LARGEST_POWER:
            raise UnreadableError("a power too large")
        if base == 0 and exponent < 0:
            raise UnreadableError("division by zero")
        return Fraction(base ** int(exponent))
    if base == 0:
        return Fraction(0)
    return _complex(base) ** _complex(exponent)


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 400:
        raise UnreadableError("no factorial")
    return Fraction(math.factorial(int(value)))


def _binomial(above: Value, below: Value) -> Value:
    for value in (above, below):
        if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 2000:
            raise UnreadableError("no binomial coefficient")
    return Fraction(math.comb(int(above.real), int(below.real)))


class _Reader:
    """Reads one expression from left to right, at one point of its variables."""

    def __init__(self, text: str, point: int) -> None:
        self.text = text
        self.place = 0
        self.point = point
        self.depth = 0

    def rest(self) -> str:
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1
        return self.text[self.place :]

    def take(self, *words: str) -> bool:
        """Step over one of these words, if it comes next."""
        rest = self.rest()
        for word in words:
            if rest.startswith(word) and not (word[-1].isalpha() and rest[len(word) : len(word) + 1].isalpha()):
                self.place += len(word)
                return True
        return False

    def demand(self, word: str) -> None:
        if not self.take(word):
            raise UnreadableError(f"no {word}")

    def end(self) -> None:
        if self.rest():
            raise UnreadableError(f"cannot read {self.rest()!r}")

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UnreadableError("nested too deep")
        value = self.product()
        while True:
            if self.take("+"):
                value = value + self.product()
            elif self.take("-"):
                value = value - self.product()
            else:
                self.depth -= 1
                return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.take(*_TIMES):
                value = value * self.signed()
            elif self.take(*_OVER):
                value = _divide(value, self.signed())
            elif self.begins_factor():
                value = value * self.power()
            else:
                return value

    def begins_factor(self) -> bool:
        rest = self.rest()
        if rest.startswith("\\"):
            command = _COMMAND.match(rest)
            return command is not None and command[1] not in ("cdot", "times", "div", "pm", "cup", "in", "le", "ge")
        return bool(rest) and (rest[0].isalnum() or rest[0] in "({[.")

    def signed(self) -> Value:
        sign = 1
        while True:
            if self.take("-"):
                sign = -sign
            elif not self.take("+"):
                return self.power() * sign

    def power(self) -> Value:
        value = self.atom()
        while self.take("!"):
            value = _factorial(value)
        if self.take("^"):
            return _power(value, self.argument(signed=True))
        return value

    def argument(self, signed: bool = False) -> Value:
        """What a command or a power applies to: a group, or the one letter, digit or command that follows."""
        rest = self.rest()
        if rest[:1] in ("{", "("):
            return self.atom()
        if signed and self.take("-"):
            return -self.argument()
        if rest[:1].isdigit():
            self.place += 1
            return Fraction(int(rest[0]))
        return self.atom()

    def group(self, closing: str) -> Value:
        value = self.sum()
        self.demand(closing)
        return value

    def atom(self) -> Value:
        rest = self.rest()
        number = _NUMBER.match(rest)
        if number:
            return self.number(number)
        if rest.startswith("\\"):
            return self.command()
        for opening, closing in ("()", "{}", "[]"):
            if self.take(opening):
                return self.group(closing)
        if self.take("|"):
            inside = self.group("|")
            return abs(inside) if isinstance(inside, Fraction) else complex(abs(inside))
        if rest[:1].isalpha():
            self.place += 1
            return self.letter(rest[0])
        raise UnreadableError(f"cannot read {rest!r}")

    def number(self, found: re.Match[str]) -> Value:
        self.place += found.end()
        value = Fraction(found.group().rstrip(".") or "0")
        mixed = _MIXED.match(self.text[self.place :])
        if mixed and value.denominator == 1 and "." not in found.group():  # 1\frac{4}{5} is a mixed number
            above, below = int(mixed[1] or mixed[2]), int(mixed[3] or mixed[4])
            if 0 < above < below:
                self.place += mixed.end()
                return value + Fraction(above, below)
        if self.text.startswith("_", self.place):
            raise UnreadableError("a number in another base")
        return value

    def letter(self, name: str) -> Value:
        subscript = _SUBSCRIPT.match(self.text[self.place :])
        if subscript:
            self.place += subscript.end()
            name += "_" + (subscript[1] or subscript[2])
        if name == "i":
            return 1j
        if name == "e":
            return complex(math.e)
        return complex(random.Random(f"{name} {self.point}").uniform(0.5, 2.0))

    def command(self) -> Value:
        found = _COMMAND.match(self.rest())
        if found is None:
            raise UnreadableError(f"cannot read {self.rest()!r}")
        name = found[1]
        self.place += found.end()
        if name == "frac":
            above = self.argument()
            return _divide(above, self.argument())
        if name == "binom":
            above = self.argument()
            return _binomial(above, self.argument())
        if name == "sqrt":
            degree: Value = Fraction(2)
            if self.take("["):
                degree = self.group("]")
            return self.root(self.argument(), degree)
        if name == "pi":
            return complex(math.pi)
        if name in _FUNCTIONS:
            return self.function(name)
        if _GREEK.fullmatch(name):
            return self.letter(name)
        raise UnreadableError(f"unknown command {name}")

    def root(self, value: Value, degree: Value) -> Value:
        if isinstance(value, Fraction) and degree == 2 and value >= 0:
            above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
            if above * above == value.numerator and below * below == value.denominator:
                return Fraction(above, below)
        return _power(value, _divide(Fraction(1), degree))

    def function(self, name: str) -> Value:
        base: Value | None = None
        if name == "log" and self.take("_"):
            base = self.argument()
        exponent = self.argument(signed=True) if self.take("^") else None
        given = self.power()
        while self.begins_factor() and not self.rest().startswith(("(", "\\")):
            given = given * self.power()  # \sin 2x
        value = _FUNCTIONS[name](_complex(given))
        if base is not None:
            value /= cmath.log(_complex(base))
        return value if exponent is None else _power(value, exponent)
