"""The mathematical answer that a worked solution states."""

import re
from collections.abc import Iterator

from m3jax.evaluation.scorers import quantities, units
from m3jax.evaluation.scorers.latex import equivalent
from m3jax.evaluation.scorers.statements import (
    Statement,
    boxes,
    conclusion,
    deciding_part,
    last_line,
    last_sentence,
    statements,
)

_END = re.compile(
    r"[.!?](?:\*\*|[*_\"')\]])*\s*\n|\n\s*\n|[.!?](?:\*\*|[*_\"')\]])*\s+(?=[A-Z][a-z]*\b|\*\*|\\boxed)|\n(?=\s*(?:[-*#]|\d+\.)\s)"
)
_REASON = re.compile(
    r"[,;:(]?\s*(?<![A-Za-z\\{])(?:since|because|as\s+(?:desired|required|claimed|expected|shown|well|we|the|it|there|they|this|[a-z]\s)|where|which|given\s+that"
    r"|so\s+that|when|whenever|due\s+to|for\s+all|for\s+every|for\s+some|for\s+any|after|by\s+the|using|obtained|i\.e\.|or\s+equivalently"
    r"|equivalently|in\s+simplest\s+form|in\s+lowest\s+terms)(?![A-Za-z])|,\s+(?:so|and\s+so|thus|hence|therefore|but|not)\b|\s[—–]\s",
    re.IGNORECASE,
)
_OPENED = re.compile(r"\$\$|(?<!\\)\$|\\\[|\\\(")
_CLOSING = {
    opening: re.compile(closing)
    for opening, closing in (("$$", r"\$\$"), ("$", r"(?<!\\)\$"), (r"\[", r"\\\]"), (r"\(", r"\\\)"))
}
_JOINT = re.compile(r"\s*(?P<word>,\s*(?:and|or)\b|,|;|\band\b|\bor\b|\\quad|\bunion\b)\s*(?=\$|\\\(|\\\[|\\boxed)")
_LED_BOX = re.compile(r"^\\text\s*\{\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*\}", re.IGNORECASE)
_SCALE = re.compile(r"\s*(?:hundred|thousand|million|billion|trillion|dozens?)\b")
_SUCH_THAT = re.compile(r"\s*(?:such\s+that|for\s+which|satisfying|with|where)\s*(?=\$|\\\(|\\\[)", re.IGNORECASE)
_BASE = re.compile(r"\s*\(?(?:in\s+)?base[\s-]+\$?(?P<base>\d+|[a-z]+)\$?\)?", re.IGNORECASE)
_LABEL = re.compile(
    r"^[\W_]*(?:the\s+)?(?:final\s+)?(?:solution|result|value|total|conclusion)[*_]*\s*[:=][*_]*(?=\s)", re.IGNORECASE
)
_ENDED = re.compile(  # "The solution is $x = 2$."
    r"\b(?:is|are|equals?|be|get|gives?|obtain|have|becomes)\s*:?\s*(?P<said>\$[^$]+\$|\\\(.+?\\\)|-?\d[\d,.]*\d|-?\d|-?\\[dt]?frac\s*\{[^{}]*\}\{[^{}]*\})[\s.*!∎]*$",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|cannot|never|wrong|incorrect|false|if|suppose|assume|whether)\b|n['’]t\b", re.IGNORECASE
)
_LEADING = re.compile(
    r"(?:(?:then|therefore|thus|simply|just|the|that|an?|is|are|value|values|number|interval|point|equation|function|matrix|vector"
    r"|set|option|choice|exactly|of|be|given|by|expression|polynomial|ordered|pair|triple|we|have|get|x|n|k|it|equal|to|area|all"
    r"|domain|range|solutions?|roots?|only|following|approximately|about|probability|ratio|closed|form)\b[\s:,]*)+",
    re.IGNORECASE,
)
_MATHEMATICAL = re.compile(r"[-+]?[\\\d.({\[|$]|[A-Za-z](?:\b|_|\^)")
_PURE = re.compile(r"[-+\d.,/\s%°^(){}\[\]|\\$=<>a-zA-Z_*!:]*\d[-+\d.,/\s%°^(){}\[\]|\\$=a-zA-Z_*!]*")


def marked_answer(text: str) -> str | None:
    """The answer that a worked solution states; None where it states none.

    The last statement that holds an answer counts: "The answer is: …", "The final answer is $…$. I hope it is
    correct.", a heading "Final Answer" with the answer below, \\boxed{…}. Reasons behind it ("since …") are left out.
    "The answer is" without a colon may also be mere talk about an answer, so it counts after the others unless a
    formula follows. Without a statement, the formula of a last sentence that concludes, or a last line that is one.

    Example:
        >>> marked_answer("So 2 + 2 = 4. The answer is: $4$.")
        '$4$'
    """
    return _marked(deciding_part(text, lambda part: _marked(part) is not None))


def _marked(text: str) -> str | None:
    talk: str | None = None
    for statement in reversed(statements(text)):
        phrase = _phrase(statement)
        if phrase is not None and _is_firm(statement, phrase):
            return phrase
        talk = talk or phrase
    return talk if talk is not None else _unmarked(text)


def _is_firm(statement: Statement, phrase: str) -> bool:
    if statement.kind == "reversed":
        return False
    if statement.kind == "hashes":
        return not re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", phrase))
    return statement.is_firm or _MATHEMATICAL.match(phrase) is not None


def _phrase(statement: Statement) -> str | None:
    """The answer in a statement, without what is said about it; None where there is none."""
    said = statement.said
    if statement.kind in ("boxed", "tagged"):
        return _LED_BOX.sub("", said.strip().strip("*").strip()).strip() or None
    if statement.kind == "hashes":
        line = said.split("\n")[0].strip()
        if not _MATHEMATICAL.match(line) or re.match(r"\d+\s*[.):]\s*\**[A-Za-z]|[A-Za-z]{2,}", line):
            return None
    if statement.kind == "reversed":
        return _last_formula(said)
    first = re.match(r"(?:[ \t]*(?:[*_#>-]*|\\begin\{center\}|The\s+answer\s+is:?)[ \t]*\n)*", said)
    said = said[first.end() if first is not None else 0 :].lstrip(" \t:*_`\"'\n")
    return _formula(said)


def _formula(said: str) -> str | None:
    """The formulas that a sentence begins with, or else its words."""
    lead = _LEADING.match(said)
    behind = said[lead.end() :] if lead is not None else ""
    if _OPENED.match(behind) or re.match(r"\**\(?[A-Z]\)", behind):
        said = behind
    sentence = _END.split(said, maxsplit=1)[0]
    boxed = [found.said for found in statements(sentence) if found.kind == "boxed"] if "box" in sentence else []
    if boxed:
        return boxed[-1]
    if _OPENED.match(said):
        return _run(said)
    words = _REASON.split(sentence, maxsplit=1)[0].strip().rstrip(".*_`").strip()
    words = words.split("\n")[0].strip() if not re.match(r"\\begin|\(|\[", words) else words
    return words.rstrip(".*_`\"'").strip() or None


def _run(said: str) -> str:
    """Formulas joined by commas, "and" and "or", with the unit behind them."""
    parts: list[str] = []
    place = end = 0
    joint = ""
    while opened := _OPENED.match(said, place):
        closed = _CLOSING[opened.group()].search(said, opened.end())
        if closed is None:
            if not parts:
                return _END.split(said, maxsplit=1)[0].strip()
            break
        inside = said[opened.end() : closed.start()].strip()
        if not ("or" in joint and parts and equivalent(inside, parts[-1])):  # 1/2 or 0.5
            parts.append(inside)
            end = closed.end()
        place = closed.end()
        joined = _JOINT.match(said, place)
        if joined is None:
            break
        joint, place = joined["word"], joined.end()
    if len(parts) == 1:
        behind = _SUCH_THAT.match(said, end)
        if behind is not None and re.fullmatch(r"\\?[A-Za-z]+", parts[0]):  # all $x$ such that $x > 2$
            return _run(said[behind.end() :])
        return said[:end].strip() + _words_behind(said[end:])
    separator = " or " if "or" in joint else ", "
    return "$" + separator.join(part.strip(" ,.") for part in parts) + "$" + _words_behind(said[place:])


def _runs(text: str) -> Iterator[str]:
    """The formulas of a sentence, those that are joined together."""
    place = 0
    while (opened := _OPENED.search(text, place)) is not None:
        closed = _CLOSING[opened.group()].search(text, opened.end())
        if closed is None:
            return
        place = closed.end()
        while (joined := _JOINT.match(text, place)) is not None:
            begun = _OPENED.match(text, joined.end())
            ended = _CLOSING[begun.group()].search(text, begun.end()) if begun is not None else None
            if ended is None:
                break
            place = ended.end()
        lead, trail = quantities.surroundings(text[: opened.start()], text[place:])
        yield f"{lead}{_run(text[opened.start() : place])}{trail}"


def _last_formula(said: str) -> str | None:
    """The last formula of a few words, or the number that they end in."""
    runs = list(_runs(said))
    if runs:
        return runs[-1]
    plain = re.search(r"(?:^|\s)([-+]?[\d.,/]*\d)$", said)
    return plain[1] if plain is not None else None


def _words_behind(rest: str) -> str:
    """The words behind a formula that belong to it: what changes it, or its unit."""
    return quantities.surroundings("", f"${rest}")[1] or _unit_behind(rest)


def _unit_behind(rest: str) -> str:
    based = _BASE.match(rest)
    if based is not None:
        return f" base {based['base']}"
    if (scale := _SCALE.match(rest)) is not None:
        return f" {scale.group().strip()}{_unit_behind(rest[scale.end() :])}"
    words = re.match(r"\\?%|\s+(?:[A-Za-z]+(?:\^\d)?(?:\s+|(?=[.,;!?]|$))){1,3}", rest)
    if words is None:
        return ""
    if "%" in words.group():
        return words.group()
    known = list(words.group().split())
    if known[-1:] == ["in"] and re.match(r"\s*[.,;!?]|\s*$", rest[words.end() :]) is None:
        known.pop()  # no inch
    while known and not units.measured(f"1 {' '.join(known)}").unit:
        known.pop()
    return f" {' '.join(known)}" if known else ""


def _unmarked(text: str) -> str | None:
    """What a text ends in that marks no answer."""
    concluded = conclusion(text)
    if concluded is not None and not concluded.rstrip(" *$").endswith("?"):
        runs = list(_runs(concluded))
        if runs:
            return runs[-1].removeprefix("$").removesuffix("$").strip()
        plain = re.search(r"(?:=|\bis|\bare|\bequals)\s+([^=]*\d[^=]*)$", _END.split(concluded + "\n\n", maxsplit=1)[0])
        if plain is not None:
            return _REASON.split(plain[1], maxsplit=1)[0].strip().rstrip(".*").strip()
    if (ended := _ENDED.search(last_sentence(text))) is not None and not _DENIED.search(ended.string):
        return next(_runs(ended["said"]), ended["said"])
    line = _LABEL.sub("", last_line(text).strip("*_ ").rstrip(".")).strip("*_ ")
    display = re.search(r"(?:\$\$|\\\[)\s*([^$]+?)\s*(?:\$\$|\\\])[\s.*]*$", text)
    if display is not None:
        return display[1].strip()
    if re.fullmatch(r"(?<!\\)\$[^$]+\$|\\\(.+\\\)", line):
        return line
    is_pure = _PURE.fullmatch(line) is not None and not re.search(
        r"(?<!\\)\b[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+|\{[^{}]*\}", " ", line)
    )
    is_pure = is_pure and line.count("{") == line.count("}")
    return line if is_pure and (line == text.strip(" .*_\n") or len(line) < 40) and line else None


def last_boxed(text: str) -> str | None:
    """The contents of the last \\boxed or \\fbox, with its braces balanced; None where there is none that closes.

    Example:
        >>> last_boxed(r"so $x = \\boxed{\\frac{1}{2}}$.")
        '\\\\frac{1}{2}'
    """
    found = [box.inside for box in boxes(text)]
    return found[-1] if found else None
