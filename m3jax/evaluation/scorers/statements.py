"""Where a text states its answer: "The answer is: …", a heading, \\boxed{…}, "#### …", or a conclusion at its end."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from m3jax.evaluation.scorers import quantities
from m3jax.evaluation.scorers.spoken import field, spoken, turns

_NAMES = ("answer", "final_answer", "final answer", "result", "final_result")  # of what a JSON object says
# Escapes of JSON that LaTeX meant: \\frac, \\binom, \\times, \\rho.
_ESCAPES = str.maketrans({"\f": r"\f", "\b": r"\b", "\t": r"\t", "\r": r"\r"})
_COMPARED = re.compile(r"[^\n]*?(?<![-=<>])(?P<sign>[<>]=?)\s*")  # "is > 5"; a ">" behind a line's end quotes
_NEAR = 100  # letters around a box that may change what it says
_LONGEST = 3000  # letters of a statement; a text may say "the answer is" a thousand times
_DECOR = r"[\s*_`\"'“”‘’:=➜→>|-]*"
_KIND = (
    r"(?:(?:correct|final|right|exact|simplified|required|desired|numerical|numeric|best|overall|resulting|my|our)\s+)*"
)
_SAYS = re.compile(
    rf"\b(?:{_KIND}answer|final\s+(?:result|value|total))(?:\s+(?:to|for|of)\s+[^.:\n]{{0,120}}?)?\s*\W{{0,3}}?"
    r"(?:,\s+(?:then|therefore|thus|hence|of\s+course|finally|in\s+(?:short|conclusion)),\s+)?"
    r"(?:is|are|(?:would|will|should|must)(?:\s+(?:therefore|thus|then|hence|now))?\s+be|becomes|equals|comes\s+(?:out\s+)?to|comes\s+to\s+be|comes\s+out\s+(?:as|at)|turns\s+out\s+to\s+be|works\s+out\s+(?:to(?:\s+be)?|as|at))\b"
    r"(?:\s+(?:therefore|thus|then|hence|indeed|simply|just|now|still|given\s+by|as\s+follows|clearly|below(?=\s*[:.\n])))*"
    r"\s*(?P<colon>:)?",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:^|(?<=[.!?\n])|(?<=[.!?]\s))[ \t>#*_`{\[(\"'✅🎯💡📌-]*"
    r"(?:\d+[.)]\s*)?(?:the\s+|so\s+(?:the\s+)?)?"
    r"(?:(?:correct|final|right|short|direct|numerical|my)\s+)*(?:answer|ans|final[\s_]+(?:answer|result|value|solution))"
    r"(?:\s*\([^()\n]{0,40}\))?[ \t*_`\"'\])]*"
    r"(?P<mark>[:=：➜→]|(?<=\s)[-–—](?=\s)|\.(?=[\s*_])|(?<=\*\*\s)(?=[$\\\d])|[ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
_OF = re.compile(
    r"\b(?:a|our|my|the)\s+final\s+(?:answer|result|total|value)\s+of(?=\W{1,4}[\d\\(\[A-Za-z])", re.IGNORECASE
)
_ALONE = re.compile(
    r"(?:\A|\n[ \t]*\n)\s*(?P<said>\S[^\n]{0,80})\n\s*[#*_]*(?:explanation|reason(?:ing)?|because|why|here['’]?s"
    r"|step[\s-]+(?:by|1)|working|justification)\b",
    re.IGNORECASE,
)
_PLAIN_WORDS = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
_INNER_LABEL = re.compile(r"\bfinal[\s_]+answer[ \t*_`\"']*[:=]|\banswer[*_`\"']*\s*:", re.IGNORECASE)
_CHINESE = re.compile(r"答案[*_\s]*(?:[：:]|是|为)")
_BRACKETED = re.compile(r"\[(?:final\s+)?answer\][ \t:]*", re.IGNORECASE)
_ROW = re.compile(
    r"^[ \t]*\|[ \t*_]*(?:final\s+)?answer[ \t*_:]*\|(?=[^|\n]*[\d\\$][^|\n]*\|[ \t]*$)", re.IGNORECASE | re.MULTILINE
)
_INSTEAD = re.compile(
    r"\banswer\s+(?:is\s+not|isn['’]t)\s[^\n]{1,120}?(?:\bbut(?:\s+rather)?|\bit(?:['’]s|\s+is)(?:\s+actually)?)\s+"
    r"(?=\W{0,4}(?:\d|\$|\\[(\[a-z]))",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(?:final_)?answer>(?P<said>.*?)</(?:final_)?answer>", re.IGNORECASE | re.DOTALL)
_HASHES = re.compile(r"^[ \t>*]*(?:####(?!#)|#{2,6}(?=[ \t]*[$€£*]*-?\d[\d,.]*[ \t*]*$))[ \t]*", re.MULTILINE)
_DENIED = re.compile(
    r"(?:\b(?:if|whether|suppos\w+|assum\w+|unless|until|when|once|why|how|what|verify|check|sure|confirm|guess)\b[^.\n]{0,40}$)"
    r"|(?:\b(?:wrong|incorrect|false|untrue|mistaken?)\s+(?:that|to\s+\w+)\b[^.,;:\n]{0,20}$)"
    r"|(?:\b(?:no\s+way|impossible|unlikely|doubt\w*)\b[^.,;:\n]{0,30}$)"
    r"|(?:\b(?:not|cannot|never|hard\s+to|impossible\s+to|unable\s+to)|n['’]t)\s+(?:\w+\s+)?(?:say|conclude|claim|tell|know|prove|believe|think|mean"
    r"|determine|state|follow|imply|see)\b[^.,;:\n]{0,40}$"
    r"|(?:\b(?:wrong|incorrect|previous|first|earlier|initial)\s+$)",
    re.IGNORECASE,
)
_NO = re.compile(
    r"\s*(?:not\b|n['’]t\b|correct\b|right\b|reasonable\b|wrong\b|incorrect\b|verified\b|unknown\b|in\s+the\b)", re.I
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox|ovalbox)\s*")
_REVERSED = re.compile(
    r"(?<![^\s.!?])(?P<said>[^\n.!?]{1,60}?)\s+(?:is|are|as)\s+(?:the|our|my)\s+(?:(?:final|correct|right)\s+)?answer\b",
    re.IGNORECASE,
)
_JOINS_BOXES = re.compile(
    r"\s*\$?\s*(?:[,;]|,?\s*(?:and|or|\\text\s*\{\s*(?:and|or)\s*\}))\s*\$?\s*(?:[A-Za-z]\w*\s*=\s*)?"
)
_TAKEN_BACK = re.compile(r"\b(?:not|than|instead\s+of)\s*\W{0,3}\s*\\(?:boxed|fbox)\s*$")
_ASKED = re.compile(r"^\s*Q(?:uestion)?\s*\d*\s*:", re.MULTILINE)
_REPLY = re.compile(r"^[ \t*]*A[*]*\s*:", re.MULTILINE)
_CONCLUDES = re.compile(
    r"(?:^|(?<=[.!?:]\s)|(?<=\n))[ \t*_>#-]*"
    r"(?:therefore|thus|hence|so|in\s+total|altogether|in\s+conclusion|finally|consequently|overall|as\s+a\s+result"
    r"|this\s+means|that\s+means|in\s+all|we\s+conclude|it\s+follows)\b[\s,:]*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])(?:[*_\"')\]]|\\\))*\s+(?=[A-Z\"'(*$\\#_])|\n\s*\n|\n(?=\s*[-*#])")


class Statement(NamedTuple):
    """A place where a text states its answer.

    Attributes:
        said: The words that state it, to the end of the text.
        place: Where they begin.
        kind: "boxed", "tagged", "hashes", "label", "sentence", or "reversed": "5 is the answer".
        is_firm: Whether it can be nothing but the answer, not mere talk about one.
    """

    said: str
    place: int
    kind: str
    is_firm: bool


def statements(text: str) -> list[Statement]:
    """The places where a text states its answer, in their order.

    Example:
        >>> [found.kind for found in statements("The answer is 5.\\n#### 5")]
        ['sentence', 'hashes']
    """
    return sorted(_all(text), key=lambda found: found.place)


def deciding_part(text: str, is_answer: Callable[[str], bool]) -> str:
    """The part of a text that holds its answer: up to where the model goes on with an exercise of its own.

    Args:
        text: What the model wrote.
        is_answer: Whether a part states an answer.
    """
    given = field(text, _NAMES)
    if given is not None and "\n" not in given.strip():
        return f"The answer is: {given.translate(_ESCAPES)}"
    kept = ""
    for part in turns(re.sub(r"[ \t]{20,}", " ", spoken(text))):
        if kept and is_answer(kept):
            break
        kept += part
    return kept


def _all(text: str) -> Iterator[Statement]:
    for found in _TAG.finditer(text):
        yield Statement(found["said"], found.start("said"), "tagged", True)
    for box in _joined_boxes(text):
        if not _TAKEN_BACK.search(text[max(0, box.place - 40) : box.place]):
            lead, trail = quantities.surroundings(text[max(0, box.start - _NEAR) : box.start], text[box.end :][:_NEAR])
            yield Statement(f"{lead}{box.inside}{trail}", box.place, "boxed", True)
    if _ASKED.search(text):
        for found in _REPLY.finditer(text):
            yield _following(text, found.end(), "label", True)
    for found in _HASHES.finditer(text):
        if text[found.end() : found.end() + _LONGEST].strip():
            yield Statement(text[found.end() : found.end() + _LONGEST], found.end(), "hashes", False)
    for found in _REVERSED.finditer(text):
        if not _DENIED.search(text[max(0, found.start() - 60) : found.start("said")]):
            yield Statement(found["said"], found.start("said"), "reversed", False)
    for found in _SAYS.finditer(text):
        if not _is_talk(text, found.start(), found.end()):
            yield _following(text, found.end(), "sentence", found["colon"] is not None)
    for found in _LABEL.finditer(text):
        yield _following(text, found.end(), "label", True)
    for found in _ALONE.finditer(text):  # the answer, and then why
        if re.search(r"[\d\\]", found["said"]) and len(_PLAIN_WORDS.findall(found["said"])) < 3:
            yield Statement(found["said"], found.start("said"), "label", True)
    for pattern in (_CHINESE, _BRACKETED, _ROW, _INSTEAD, _OF):
        for found in pattern.finditer(text):
            yield _following(text, found.end(), "label", True)
    boxed = [(box.place, box.end) for box in boxes(text)] if "box" in text else []
    for found in _INNER_LABEL.finditer(text):
        is_boxed = any(start < found.start() < end for start, end in boxed)
        if not is_boxed and not _is_talk(text, found.start(), found.end()):
            yield _following(text, found.end(), "label", True)


def _following(text: str, place: int, kind: str, is_firm: bool) -> Statement:
    decor = re.match(_DECOR, text[place : place + _LONGEST])
    start = place + (decor.end() if decor is not None else 0)
    if decor is not None and "-" in decor.group():  # a minus sign is no decoration
        sign = decor.group().rfind("-")
        is_bullet = decor.group()[sign + 1 :].startswith((" ", "\t")) and "\n" in decor.group()[:sign]
        if not decor.group()[sign + 1 :].strip("*_ ") and not is_bullet:
            start = place + sign
    compared = None if decor is None or kind == "label" else _COMPARED.fullmatch(decor.group())
    if compared is not None:
        start = place + compared.start("sign")
    if text[start : start + 1] == "}":  # \\text{Answer: } 5
        start += 1
    return Statement(text[start : start + _LONGEST], place, kind, is_firm)


def _is_talk(text: str, start: int, end: int) -> bool:
    """Whether the words only talk about an answer: "if the answer is", "the answer is not"."""
    return _DENIED.search(text[max(0, start - 60) : start]) is not None or _NO.match(text[end:]) is not None


class Box(NamedTuple):
    """A \\boxed{…}: where it begins, where its contents do, where it ends, and what it holds."""

    start: int
    place: int
    end: int
    inside: str


def boxes(text: str) -> Iterator[Box]:
    """Each \\boxed{…}, with its braces balanced."""
    for found in _BOX.finditer(text):
        rest = text[found.end() :]
        if not rest.startswith("{"):
            word = re.match(r"[^\s$.,{}\\]+", rest)  # \boxed 5
            if word:
                yield Box(found.start(), found.end(), found.end() + word.end(), word.group())
            continue
        end = closing_brace(rest)
        if end is not None:
            yield Box(found.start(), found.end(), found.end() + end + 1, rest[1:end].strip())


def _joined_boxes(text: str) -> Iterator[Box]:
    """Boxes; those that "and", "or" or a comma joins are one list."""
    together: list[Box] = []
    for box in boxes(text):
        if together and not _JOINS_BOXES.fullmatch(text[together[-1].end : box.start]):
            yield _joined(together)
            together = []
        together.append(box)
    if together:
        yield _joined(together)


def _joined(together: list[Box]) -> Box:
    inside = ", ".join(dict.fromkeys(box.inside for box in together))
    return Box(together[0].start, together[-1].place, together[-1].end, inside)


def closing_brace(text: str) -> int | None:
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


def conclusion(text: str) -> str | None:
    """The last sentence, where it concludes: "Therefore, she makes $18."."""
    sentences = [sentence.strip() for sentence in _SENTENCE.split(text.strip()) if sentence.strip()]
    for sentence in reversed(sentences[-2:]):
        opened = _CONCLUDES.match(str(sentence))
        if opened is not None:
            return str(sentence)[opened.end() :]
    return None


def last_sentence(text: str) -> str:
    """The last sentence of a text that has several."""
    sentences = [sentence.strip() for sentence in _SENTENCE.split(text.strip()) if re.search(r"\w", sentence)]
    return str(sentences[-1]) if len(sentences) > 1 else ""


def last_line(text: str) -> str:
    """The last line that holds more than marks."""
    lines = [line.strip() for line in text.split("\n") if re.search(r"\w", line)]
    return lines[-1] if lines else ""
