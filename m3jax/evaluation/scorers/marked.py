"""Answers that a text marks as such: "The answer is: …" or \\boxed{…}."""

import re

_STRICT = re.compile(r"\banswer\s+is\s*:|\bfinal\s+answer\s*:|^\W*answer\s*:", re.IGNORECASE | re.MULTILINE)
_LOOSE = re.compile(r"\bthe\s+(?:\w+\s+)?answer\s+is\b", re.IGNORECASE)
_END = re.compile(r"\.\s*\n|\n\s*\n|\.\s+(?=[A-Z][a-z]+\b)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def marked_answer(text: str) -> str | None:
    """The answer that a text marks as such; None where it marks none.

    What follows the last "The answer is:" counts, else the last \\boxed{}, else what follows "the answer is" without a
    colon, which may also be mere talk about an answer.

    Example:
        >>> marked_answer("So 2 + 2 = 4. The answer is: $4$.")
        '$4$'
    """
    said = _following(_STRICT, text)
    if said is not None:
        return last_boxed(said) or said
    boxed = last_boxed(text)
    return boxed if boxed is not None else _following(_LOOSE, text)


def _following(marker: re.Pattern[str], text: str) -> str | None:
    """The rest of the sentence after the last place of the marker."""
    found = list(marker.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip(" \t:*").strip()
    return _END.split(rest, maxsplit=1)[0].strip().rstrip(".*").strip() or None


def last_boxed(text: str) -> str | None:
    """The contents of the last \\boxed or \\fbox, with its braces balanced; None where there is none that closes.

    Example:
        >>> last_boxed(r"so $x = \\boxed{\\frac{1}{2}}$.")
        '\\\\frac{1}{2}'
    """
    for found in reversed(list(_BOX.finditer(text))):
        rest = text[found.end() :]
        if not rest.startswith("{"):
            word = re.match(r"[^\s$.,]+", rest)  # \boxed 5
            if word:
                return word.group()
            continue
        end = _closing_brace(rest)
        if end is not None:
            return rest[1:end].strip()
    return None


def _closing_brace(text: str) -> int | None:
    """The place of the brace that closes the one the text begins with."""
    depth, skip = 0, False
    for place, letter in enumerate(text):
        if skip:
            skip = False
        elif letter == "\\":
            skip = True  # \{ and \} are letters, not braces
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == 0:
                return place
    return None
