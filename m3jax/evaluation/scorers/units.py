"""Units at the end of an answer."""

import re
from typing import NamedTuple

from m3jax.evaluation.scorers import quantities

_UNITS = {
    "degree": "degrees deg", "radian": "radians rad", "percent": "percents pct", "cent": "cents",
    "dollar": "dollars usd bucks",
    "euro": "euros eur", "pound": "pounds lb lbs", "ounce": "ounces oz", "ton": "tons",
    "inch": "inches in", "foot": "feet ft", "yard": "yards yd yds", "mile": "miles mi",
    "millimeter": "millimeters millimetre millimetres mm", "centimeter": "centimeters centimetre centimetres cm",
    "meter": "meters metre metres m", "kilometer": "kilometers kilometre kilometres km",
    "gram": "grams g", "kilogram": "kilograms kg", "milligram": "milligrams mg", "liter": "liters litre litres l",
    "milliliter": "milliliters ml", "gallon": "gallons gal", "quart": "quarts", "pint": "pints", "acre": "acres",
    "second": "seconds sec secs s", "minute": "minutes min mins", "hour": "hours hr hrs h", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs", "unit": "units", "mph": "",
}  # fmt: skip
_NAMES = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_WORDS = re.compile(r"[A-Za-z]+|\^\s*\{?\s*[23]\s*\}?|/")
_TEXT = re.compile(
    r"(?<=[\d}\w)!])\s*(?:\\[,;: ]|~)?\s*\\(?:text|mbox|mathrm|textrm|rm)\s*\{(?P<said>[^{}]*)\}"
    r"\s*(?P<power>\^\s*\{?\s*\d\s*\}?)?\s*$"
)
_BARE = re.compile(
    r"(?<=[\d}\s)])\s*(?<![\\a-zA-Z])(?P<said>(?:[A-Za-z]{2,}\.?)(?:\s*(?:\s|/)\s*(?:[A-Za-z]{2,}\.?))*)"
    r"\s*(?P<power>\^\s*\{?\s*\d\s*\}?)?$"
)
_LETTER = re.compile(r"(?<=\d)\s+(?P<said>[mgshl])\s*(?P<power>\^\s*\{?\s*[23]\s*\}?)?$")


class Measured(NamedTuple):
    """An answer without its unit.

    Attributes:
        text: The answer.
        unit: The unit in one spelling, such as "centimeter^2"; empty where none is known.
    """

    text: str
    unit: str


def measured(text: str) -> Measured:
    """Take the unit off an answer; words that are no unit ("apples") are taken off too, and count for nothing.

    Example:
        >>> measured(r"15\\mbox{ cm}^2"), measured("864 square inches"), measured("7 apples")
        (Measured(text='15', unit='centimeter^2'), Measured(text='864', unit='inch^2'), Measured(text='7', unit=''))
    """
    text = text.strip()
    if found := re.match(r"\s*(-?)\s*\\\$\s*(?=[-\d.\\])", text):
        return Measured(found[1] + measured(text[found.end() :]).text, "dollar")
    for pattern, unit in (
        (r"\s*\\?%$", "percent"),
        (r"\s*\^\s*\{?\s*\\circ\s*\}?$|\s*\\degrees?$", "degree"),
        (r"\s*\\\$$", "dollar"),
    ):
        if (found := re.search(pattern, text)) and found.start():
            return Measured(text[: found.start()].strip(), unit)
    for form in (_TEXT, _BARE, _LETTER):
        found = form.search(text)
        if found is not None and _is_quantity(text[: found.start()]):
            if form is not _LETTER and re.match(
                r"\s*(?:(?:and|or|nor|not|if|hundred|thousand|million|billion|trillion)\b|(?:base|for)\b)",
                found["said"],
            ):
                continue
            if re.fullmatch(r"\s*[A-Za-z]\s*", found["said"]) and found["said"].strip() not in _NAMES:
                continue  # \mathrm{i}
            if re.search(r"\bof\s*$", found["said"]):
                continue  # 12 percent of w
            if form is not _LETTER and quantities.is_changed("", f" {found['said'].strip()}"):
                continue  # 3 squared, 3 hundredths
            rest = text[: found.start()].strip().rstrip(",")
            return Measured(rest, _unit(f"{found['said']}{found['power'] or ''}"))
    return Measured(text, "")


def _is_quantity(text: str) -> bool:
    """Whether a text ends as what a unit may stand behind: a digit, a bracket, a letter of its own, a command."""
    return re.search(r"(?:[\d)}!]|(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+)\s*$", text) is not None


def agree(one: str, other: str) -> bool:
    """Whether two units may stand for the same; a missing one may stand for any."""
    return not one or not other or one == other or "unit" in (one.partition("^")[0], other.partition("^")[0])


def _unit(said: str) -> str:
    """A unit in one spelling; empty where a word of it is none."""
    if said.replace(".", "").strip().lower() in ("mph", "miles per hour"):
        return "mile/hour"
    parts: list[str] = []
    power, divides = 1, False
    for word in _WORDS.findall(said):
        low = word.lower()
        if word.startswith("^"):
            if parts:
                parts[-1] += "^" + re.sub(r"\D", "", word)
        elif low in ("per", "/"):
            divides = True
        elif low in _POWERS:
            if low.endswith("ed") and parts:
                parts[-1] += f"^{_POWERS[low]}"
            else:
                power = _POWERS[low]
        elif low in _NAMES:
            parts.append(("/" if divides else "") + _NAMES[low] + (f"^{power}" if power > 1 else ""))
            power, divides = 1, False
        elif low not in ("of", "each"):
            return ""
    return "".join(parts)
