"""What of an answer in LaTeX stands within brackets, and what outside of them."""

import re

TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname|rm|bf)\s*\{([^{}]*)\}")
_OPENING, _CLOSING = "([{", ")]}"


def unworded(text: str) -> str:
    """The text with what stands in `\\text{…}` and its like as it is, and single spaces."""
    return " ".join(TEXT.sub(r" \1 ", text).split())


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between a separator where it stands outside of all brackets, without space around them.

    Args:
        text: In LaTeX.
        separator: A character or a command, which does not go on behind it.
    """
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


def is_wrapped(text: str, opening: str, closing: str) -> bool:
    """Whether one pair of brackets holds the whole text.

    Args:
        text: In LaTeX.
        opening: The bracket that it has to begin with.
        closing: And to end with.
    """
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth == 0 and place < len(text) - 1:
            return False
    return depth == 0
