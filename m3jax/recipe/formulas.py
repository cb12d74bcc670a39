"""Settings that are formulas of depth, the same to the last bit on every machine."""

import functools
import re
from dataclasses import dataclass
from decimal import Decimal, localcontext

_FORMULA = re.compile(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*", re.DOTALL)
_DIGITS = 40
_HALF_PI = Decimal("1.5707963267948966192313216916397514420985846996875529")


@dataclass(frozen=True)
class Formula:
    """A value that goes from one number to another over the depth of a model or slice.

    Attributes:
      name: "linear", or "cosine": slowly at both ends, (1 − cos πt) / 2 of the way.
      first: before and in the first block.
      last: in and after the last block.
    """

    name: str
    first: float
    last: float

    def at(self, t: float) -> float:
        """The value at a position in [0, 1].

        Example:
          >>> Formula("cosine", 0.0, 1.0).at(0.5)
          0.5
        """
        share = min(max(t, 0.0), 1.0)
        if self.name == "cosine":
            share = _cosine_share(share)
        return (1.0 - share) * self.first + share * self.last

    def __str__(self) -> str:
        return f"{self.name}({self.first!r}, {self.last!r})"


NAMES = ("linear", "cosine")
"""The formulas that there are."""


def split_formula(text: str) -> tuple[str, list[str]] | None:
    """The name and the arguments of what looks like a formula; None for other text.

    Example:
      >>> split_formula("linear(0, 1)"), split_formula("1e-3")
      (('linear', ['0', '1']), None)
    """
    found = _FORMULA.fullmatch(text)
    return None if found is None else (found[1], [argument.strip() for argument in found[2].split(",")])


@functools.cache
def _cosine_share(t: float) -> float:
    """(1 − cos πt) / 2, which is sin² of πt/2, by a series in decimals: libraries differ in the last bit."""
    with localcontext() as context:
        context.prec = _DIGITS
        x = _HALF_PI * Decimal(t)
        term, total, number = x, x, 1
        while abs(term) > Decimal(10) ** -_DIGITS:
            number += 2
            term = -term * x * x / (number * (number - 1))
            total += term
        return float(total * total)
