"""Values of mathematical expressions in LaTeX, by recursive descent."""

import cmath
import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

Value: TypeAlias = Fraction | complex

_POINTS = 10
_FEWEST = 2  # points at which both must have a value
_TOLERANCE = 1e-9
_LARGEST_POWER = 4096
_DEEPEST = 60
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_SUBSCRIPT = re.compile(r"_(?:\{(\w+)\}|(\w))")
_MIXED = re.compile(r"\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|\s+(\d+)/(\d+)")
_REPEATING = re.compile(r"\\(?:overline|bar)\s*(?:\{(\d{1,30})\}|(\d))")
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
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "cis": lambda x: cmath.exp(1j * x),
    "ln": cmath.log,
    "log": cmath.log,
    "lg": cmath.log10,
    "exp": cmath.exp,
}


class UnreadableError(Exception):
    """The text is not an expression that this module knows."""


class _NoValueError(Exception):
    """The expression has no value at this point."""


class Sample(NamedTuple):
    """An expression's value at one point.

    Attributes:
        value: It; None where there is none there, or none that is real.
        scale: The size of what was added up on the way; rounding errors are relative to it.
    """

    value: Value | None
    scale: float = 0.0


def values_at_points(text: str) -> list[Sample]:
    """An expression's values where its variables take a few fixed, unrelated values: positive, negative and whole.

    Raises:
        UnreadableError: The text is no expression, or has no value at any of them.
    """
    samples = [_sample(text, point) for point in range(_POINTS)]
    if all(sample.value is None for sample in samples):
        raise UnreadableError("no value")
    return samples


def closely_equal(one: Sequence[Sample], other: Sequence[Sample]) -> bool:
    """Whether values are pairwise equal: exactly if rational, else to nine digits, where both have one."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.value is not None and b.value is not None]
    return len(pairs) >= _FEWEST and all(_equal(a, b) for a, b in pairs)


def proportional(one: str, other: str) -> bool:
    """Whether one expression is a constant, not zero, times the other; so two equations have the same solutions."""
    pairs = list(zip(values_at_points(one), values_at_points(other), strict=True))
    ratios = [
        Sample(_divide(a.value, b.value), 0.0)
        for a, b in pairs
        if a.value is not None and b.value is not None and b.value != 0
    ]
    return len(ratios) > _FEWEST and ratios[0].value != 0 and all(_equal(ratios[0], ratio) for ratio in ratios)


def agrees_to_its_digits(decimal: str, samples: Sequence[Sample]) -> bool:
    """Whether a decimal number is an irrational value rounded to the digits that are written, and to nine at least."""
    value, written = samples[0].value, Fraction(decimal)
    if value is None or isinstance(value, Fraction):
        return False
    half = 0.5 * 10.0 ** -len(decimal.partition(".")[2])
    error = abs(complex(value) - float(written))
    return error <= max(half, 4e-16 * abs(value)) and error <= _TOLERANCE * abs(value)


def _equal(one: Sample, other: Sample) -> bool:
    if isinstance(one.value, Fraction) and isinstance(other.value, Fraction):
        return one.value == other.value
    if one.value is None or other.value is None:
        return False
    rounding = 1e-12 * max(one.scale, other.scale)
    return cmath.isclose(_complex(one.value), _complex(other.value), rel_tol=_TOLERANCE, abs_tol=rounding)


def _complex(value: Value) -> complex:
    try:
        return complex(value)
    except OverflowError as error:
        raise UnreadableError("a number too large") from error


def _sample(text: str, point: int) -> Sample:
    reader = _Reader(text, point)
    try:
        value = reader.sum()
        reader.end()
        if not isinstance(value, Fraction) and not cmath.isfinite(value):
            raise _NoValueError
    except (_NoValueError, ArithmeticError, ValueError):
        return Sample(None)
    except RecursionError as error:
        raise UnreadableError(str(error)) from error
    real = isinstance(value, Fraction) or abs(value.imag) <= _TOLERANCE * abs(value)
    if (reader.leaves_reals or not real) and reader.has_variables and not reader.has_imaginary:
        return Sample(None)  # outside of the domain of a real function
    return Sample(value, reader.scale)


def _divide(one: Value, other: Value) -> Value:
    if other == 0:
        raise _NoValueError
    return one / other


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _LARGEST_POWER:
            raise UnreadableError("a power too large")
        if base == 0 and exponent < 0:
            raise _NoValueError
        return Fraction(base ** int(exponent))
    if base == 0:
        return Fraction(0)
    return _complex(base) ** _complex(exponent)


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 400:
        raise _NoValueError
    return Fraction(math.factorial(int(value)))


def _binomial(above: Value, below: Value) -> Value:
    for value in (above, below):
        if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 2000:
            raise _NoValueError
    return Fraction(math.comb(int(above.real), int(below.real)))


def _is_whole(value: Value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


def _is_odd(degree: Value) -> bool:
    return isinstance(degree, Fraction) and degree.denominator == 1 and int(degree) % 2 == 1


class _Reader:
    """Reads one expression from left to right, at one point of its variables."""

    def __init__(self, text: str, point: int) -> None:
        self.text = text
        self.place = 0
        self.point = point
        self.depth = 0
        self.scale = 0.0
        self.has_variables = False
        self.has_imaginary = False
        self.leaves_reals = False

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
                value = self.added(value, self.product())
            elif self.take("-"):
                value = self.added(value, -self.product())
            else:
                self.depth -= 1
                return value

    def added(self, one: Value, other: Value) -> Value:
        if not (isinstance(one, Fraction) and isinstance(other, Fraction)):
            self.scale = max(self.scale, abs(_complex(one)), abs(_complex(other)))
        return one + other

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
            return command is not None and command[1] not in (
                "cdot",
                "times",
                "div",
                "pm",
                "cup",
                "in",
                "le",
                "ge",
                "rfloor",
                "rceil",
                "ne",
            )
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
            exponent = self.argument(signed=True)
            self.leaves_reals |= value.real < 0 and not _is_whole(exponent)
            return _power(value, exponent)
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
        if rest.startswith("\\") and not rest.startswith((r"\lfloor", r"\lceil")):
            return self.command()
        for opening, closing in ("()", "{}", "[]"):
            if self.take(opening):
                return self.group(closing)
        if self.take("|"):
            inside = self.group("|")
            return abs(inside) if isinstance(inside, Fraction) else complex(abs(inside))
        for opening, closing, rounded in ((r"\lfloor", r"\rfloor", math.floor), (r"\lceil", r"\rceil", math.ceil)):
            if self.take(opening):
                return Fraction(rounded(self.group(closing).real))
        if rest[:1].isalpha():
            self.place += 1
            return self.letter(rest[0])
        raise UnreadableError(f"cannot read {rest!r}")

    def number(self, found: re.Match[str]) -> Value:
        self.place += found.end()
        value = Fraction(found.group().rstrip(".") or "0")
        repeating = _REPEATING.match(self.text[self.place :])
        if repeating and "." in found.group():  # 0.1\overline{6}
            self.place += repeating.end()
            digits, places = repeating[1] or repeating[2], len(found.group().partition(".")[2])
            value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
        mixed = _MIXED.match(self.text[self.place :])
        if mixed and value.denominator == 1 and "." not in found.group():  # 1\frac{4}{5} is a mixed number
            above, below = int(mixed[1] or mixed[2] or mixed[5]), int(mixed[3] or mixed[4] or mixed[6])
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
            self.has_imaginary = True
            return 1j
        if name == "e":
            return complex(math.e)
        self.has_variables = True
        draw = random.Random(f"{name} {self.point}")
        if self.point < 3:
            return complex(draw.uniform(0.5, 2.0))
        if self.point < 8:
            return complex(draw.uniform(0.5, 9.0) * (-1 if self.point == 3 else draw.choice((-1, 1))))
        return Fraction(draw.randint(3, 12))  # whole, for factorials

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
        if _is_odd(degree) and (isinstance(value, Fraction) or value.imag == 0) and value.real < 0:
            return -self.root(-value, degree)
        if isinstance(value, Fraction) and isinstance(degree, Fraction) and degree.denominator == 1 and value > 0:
            roots = [round(part ** (1 / int(degree))) for part in (value.numerator, value.denominator)]
            if 2 < degree < 100 and all(
                root ** int(degree) == part
                for root, part in zip(roots, (value.numerator, value.denominator), strict=True)
            ):
                return Fraction(roots[0], roots[1])
        self.leaves_reals |= value.real < 0
        return _power(value, _divide(Fraction(1), degree))

    def function(self, name: str) -> Value:
        base: Value | None = None
        if name == "log" and self.take("_"):
            base = self.argument()
        exponent = self.argument(signed=True) if self.take("^") else None
        given = self.power()
        while self.begins_factor() and not self.rest().startswith(("(", "\\")):
            given = given * self.power()  # \sin 2x
        if exponent == -1 and f"arc{name}" in _FUNCTIONS:  # \\sin^{-1} x
            name, exponent = f"arc{name}", None
        self.leaves_reals |= name in ("ln", "log", "lg") and given.real < 0
        value = _FUNCTIONS[name](_complex(given))
        self.scale = max(self.scale, 1.0)
        if base is not None:
            value /= cmath.log(_complex(base))
        return value if exponent is None else _power(value, exponent)
