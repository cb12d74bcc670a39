"""Numbers as people write them."""

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+]?)\s?(?:[$€£]\s?)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?(?:\s*/\s*(?P<below>\d+(?:\.\d+)?))?"
)
_CLUTTER = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "*": "", "`": "", "\\": ""})
_LATEX = (
    (re.compile(r"\\text\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}"), r" \1/\2 "),
    (re.compile(r"\{,\}|,\\!|\\,"), ","),
)


def parse_number(text: str) -> Fraction | None:
    """The number that a short answer states, exactly; None where there is none.

    Currency, thousands separators, units, percent signs, emphasis and a LaTeX fraction are read through. Where the
    answer is an equation, its last side counts; else the first number does.

    Example:
        >>> parse_number("$1,080.50 per week"), parse_number("x = 3/4"), parse_number("none")
        (Fraction(2161, 2), Fraction(3, 4), None)
    """
    text = text.replace("−", "-").replace("–", "-")
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.translate(_CLUTTER)
    for side in reversed(text.split("=")):
        for found in _NUMBER.finditer(side):
            value = _value(found)
            if value is not None:
                return value
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    whole, decimals, below = found["whole"], found["decimals"], found["below"]
    if whole is None and decimals is None:
        return None
    value = Fraction((whole or "0").replace(",", "") + (decimals or ""))
    if below is not None:
        divisor = Fraction(below)
        if divisor == 0:
            return None
        value /= divisor
    return -value if found["sign"] == "-" else value
