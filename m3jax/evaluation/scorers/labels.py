"""Class names in what a model wrote."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from m3jax.evaluation.scorers.spoken import field, spoken, turns

_CLAUSES = re.compile(
    r"[,.;:!?\n()]|\s[–—-]{1,2}\s"
    r"|\b(?:(?<!anything )(?<!everything )(?<!all )but|however|although|though|while|whereas|yet|because|since|instead"
    r"|despite|(?<!go )so|as\s+it)\b",
    re.IGNORECASE,
)
_NEGATIONS = re.compile(
    r"\b(?:not|never|cannot|neither|nor|nobody|none|nowhere|little|doubt(?:s|ed|ful)?|hardly|barely|scarcely|no|nothing|devoid\s+of|without|lacks?|(?:is|was|are|were|do|does|did|would|could|should|ca|wo)n['’]?t"
    r"|far\s+from|anything\s+but|rules?\s+out|fails?\s+to\s+be|opposite\s+of|contrary\s+of"
    r"|(?:wrong|incorrect|(?:a\s+)?mistaken?|inaccurate|misleading|unfair|absurd|an\s+error|hard|difficult|tough|impossible"
    r"|reluctant|refus\w+|hesita\w+|declin\w+|a\s+stretch)\s+to\s+(?:see|call|label|say|consider|classify|describe"
    r"|rate|judge|regard|deem|think)|(?:false|untrue|incorrect|wrong|inaccurate)\s+that|too\s+\w+\s+to\s+be|everything\s+but|reverse\s+of"
    r"|antithesis\s+of|short\s+of|miss(?:es|ed)\s+being|reject\w*|den(?:y|ies)|disput\w+|disagree\w*|disbeliev\w+"
    r"|avoid\w*|dismiss\w*|exclud\w+)\b|\bnon[- ]?$",
    re.IGNORECASE,
)
_NO_NEGATION = re.compile(
    r"\bcould(?:n['’]t|\s+not)\s+be\s+(?=(?:any\s+)?less)|\bnot\s+(?:only|just|merely|solely|simply)\b|\bno\s+(?:doubt|question)\b|\bwithout\s+(?:a\s+)?(?:doubt|question)\b|\bnot\s+surprising\w*",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:not\s+(?:necessarily|sure|clear(?:\s+(?:if|whether))?|certain|obvious|possible)|unclear|uncertain|unsure|whether|if(?!\s+anything)|could\s+be|might|may\s+(?:be|look|seem|appear|sound|read)|perhaps|argu\w+|either"
    r"|cannot\s+(?:tell|say|determine|decide|classify)|ambiguous|needs?\s+more|not\s+enough|insufficient|too\s+little)\b",
    re.IGNORECASE,
)
_FINAL = re.compile(
    r"(?:\b(?:answer|sentiment|label|classification|class|category|verdict|conclusion|prediction|judge?ment|output|result|grammar)\b"
    r"[^.\n,;]{0,40}?(?:\bis\b|\bwould\s+be\b|\bshould\s+be\b|\bas\b|:|=|->|→)"
    r"|\b(?:classif\w+|label\w*|judged?|rated?|consider\w*|describ\w+|call\w*|choose|say)\b[^.\n,;]{0,40}?(?:\bas\b|\bit\b|:|\bto\s+be\b|['\"*]|\bis\b)"
    r"|\b(?:leans?|settle\s+on|go\s+with|opt\s+for|pick)\b"
    r"|\b(?:wait|correction|actually|scratch\s+that|on\s+second\s+thought|on\s+reflection|reconsidering|re-?reading)\b"
    r"|\b(?:overall|therefore|thus|hence|in\s+(?:short|sum|summary|conclusion)|ultimately|finally|all\s+in\s+all|on\s+balance|so)\b)",
    re.IGNORECASE,
)
_NEITHER = re.compile(
    r"\b(?:neutral|mixed|neither|ambiguous|both|undetermined|undecided|unclear|cannot|can['’]t|unable)\b", re.IGNORECASE
)
_AGAINST = re.compile(
    r"(?:\b(?:rather|other|more|instead)\s+(?:\w+\s+)?(?:than|of)|\bthan|\bvs\.?|\bversus|\bas\s+opposed\s+to)\s+"
    r"(?:an?\s+)?['\"“‘]?$",
    re.IGNORECASE,
)
_CONCEDED = re.compile(
    r"\b(?:though|although|despite|in\s+spite\s+of|notwithstanding|even\s+if|while|whereas|because|since)\b",
    re.IGNORECASE,
)
_UNTICKED = re.compile(r"^\W*?(?:\[\s?\]|☐|⬜).*$", re.MULTILINE)
_WRONG = re.compile(
    r"[\s'\"”’]*(?:(?:would\s+be|is|was|seems?|looks|sounds|feels)\s+(?:(?:the\s+)?wrong|generous|harsh|unfair|an\s+overstatement|too\s+\w+|off\b|out\b|an\s+exaggeration|a\s+stretch|incorrect|a\s+mistake|inaccurate|misleading|false|untrue|excluded|rejected"
    r"|out\s+of\s+the\s+question)\b|(?:can|must|should|may|is|was)\s+(?:be\s+)?(?:ruled\s+out|rejected|excluded|dismissed)\b"
    r"|,?\s*(?:it|this|that|but|yet)\s+(?:it\s+|really\s+)?(?:is\s+not|isn['’]t)\b|\s?[:=]\s*(?:no|false|✗|❌)(?!\w)"
    r"|(?:(?:is|was|does|do|did|would|could|can|may|will|should)(?:\s+not|n['’]t)|cannot|can['’]t|won['’]t)\b(?!\s+(?:only|just|merely)\b))",
    re.IGNORECASE,
)
_IN_PART = re.compile(
    r"-(?:sounding|looking|seeming|ish)\b|\s+(?:in\s+(?:part\b|(?:some|other|certain)\s+(?:ways|parts|places|respects))|to\s+(?:a|some)\s+(?:degree|extent)"
    r"|half\s+(?:of\s+)?the\s+time|(?:some|at)\s*times)",
    re.IGNORECASE,
)
# A label of which something is said is the answer where that is praise: "Positive fits", "Positive is the right label".
_SUBJECT = re.compile(
    r"['\"”’]?\s+(?:would|could|might|may|can|must|should|seems?|looks|sounds|feels|is|was)\b", re.IGNORECASE
)
_PRAISED = re.compile(
    r"['\"”’]?\s+(?:(?:would|should|must|could|can)\s+)?(?:be|seems?|looks|sounds|feels|is|was)\s+(?:clearly\s+|indeed\s+)?(?:the\s+|my\s+|a\s+)?"
    r"(?:more\s+|most\s+|much\s+)?(?:right|correct|best|better|answer|label|choice|pick|verdict|good|fit\w*|apt|accurate|appropriate|true"
    r"|natural|likely|what|how|where|clear|obvious|overall|here|because|since|as|in|and|at|by)\b",
    re.IGNORECASE,
)
_ON_CONDITION = re.compile(r"[^.!?\n]{0,40}?\b(?:if|had|unless|were)\b(?!\s+anything)", re.IGNORECASE)
_NAMES: tuple[str, ...] = (
    "label",
    "sentiment",
    "answer",
    "final_answer",
    "classification",
    "prediction",
    "class",
    "category",
    "output",
)
_NAMES += ("result", "judgment", "judgement", "verdict", "acceptability", "grammaticality")  # of a JSON object
_LONGEST = 300  # letters of a sentence or a quotation
_WOULD = re.compile(r"\bwould\s+(?:then\s+|only\s+)?be\s+$", re.IGNORECASE)
_LESS = re.compile(r"(?<!\bor )\bless\s+$|(?<!\bat )\bleast\s+$", re.IGNORECASE)
# Whom the answer only tells of: "Some say positive."
_OTHERS = re.compile(
    r"\b(?:some|others|people|many|critics|few|only\s+an?\s+\w+)\b[^.,;:!?\n]{0,30}\b(?:say|call|think|argue|consider|find|see)"
    r"\b[^.,;:!?\n]{0,20}$"
    r"|\bI\s+(?:had\s+|have\s+)?(?:considered|weighed|entertained|thought\s+(?:of|about))\s+['\"]?$",
    re.IGNORECASE,
)


class Label(NamedTuple):
    """What a text says of a class.

    Attributes:
        word: The class that it commits itself to; None where it does not.
        is_unclear: Whether it speaks of classes, or says that it cannot tell, without committing itself to one.
    """

    word: str | None
    is_unclear: bool = False


class _Mention(NamedTuple):
    word: str | None
    place: int
    is_final: bool
    is_conceded: bool


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text commits itself to; None where it commits itself to none. See `read_label`.

    Example:
        >>> parse_label("The sentiment is **Positive**.", ("negative", "positive"))
        'positive'
        >>> parse_label("Not acceptable", ("unacceptable", "acceptable"))
        'unacceptable'
    """
    return read_label(text, labels).word


def read_label(text: str, labels: Sequence[str]) -> Label:
    """The label that a text finally commits itself to.

    Labels are whole words, negated ("not", "isn't", "non-", "far from") or not: of two, what is not the one is the
    other. An echo of the choice ("positive or negative?") and what is only compared ("rather than negative") is no
    commitment. The last explicit statement ("the answer is", "overall") counts, else the label that the text begins
    with, else what all mentions agree on.

    Args:
        text: What the model wrote.
        labels: The labels' words.

    Returns:
        The label; unclear where the text speaks of several and settles on none, or says "neither", "mixed", "neutral".

    Example:
        >>> read_label("Is it positive or negative? It is not positive.", ("negative", "positive"))
        Label(word='negative', is_unclear=False)
        >>> read_label("Neither.", ("negative", "positive"))
        Label(word=None, is_unclear=True)
    """
    words = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    named = re.compile(rf"(?<![\w-])(?:non[- ]?)?(?P<label>{words})(?!\w)", re.IGNORECASE)
    text = field(text, _NAMES) or text
    kept = ""
    for part in turns(re.sub(r"[ \t]{20,}", " ", spoken(text))):
        if kept and _read(kept, labels, named) != Label(None):
            break
        kept += part
    return _read(kept, labels, named)


def _read(text: str, labels: Sequence[str], named: re.Pattern[str]) -> Label:
    text = re.sub(r"[*_`]+", "", text)
    if re.search(r"\[[xX✓✔]\]|☑|✅|☒", text):
        text = _UNTICKED.sub("", text)
    label = named.pattern.replace("(?P<label>", "(?:")
    text = re.sub(  # what is quoted and names no label is the sentence, or a word of it
        rf"(?<!\w)['\"“‘](?:(?!{label})[^\n]){{1,{_LONGEST}}}['\"”’](?=[\s.,;:!?)]|$)",
        "quoted",
        text,
        flags=re.IGNORECASE,
    )
    plain = _without_echoes(text, named)
    mentions = list(_mentions(plain, labels, named))
    final = [mention for mention in mentions if mention.is_final]
    committed = [mention for mention in mentions if mention.word is not None]
    if final and final[-1].word is not None:
        return Label(final[-1].word)
    if (shares := _shares(text, labels)) is not None:
        likeliest = max(shares)
        return Label(
            labels[shares.index(likeliest)] if shares.count(likeliest) == 1 else None, shares.count(likeliest) > 1
        )
    first = re.match(r"[\W\d]*(?:(?:it(?:['’]s|\s+is)|this\s+is|the\s+sentence\s+is|sentence\s+is)\s+)?", plain)
    start = first.end() if first is not None else 0
    if committed and committed[0].place <= start:
        return Label(committed[0].word)
    committed = [mention for mention in committed if not mention.is_conceded] or committed
    if committed and len({mention.word for mention in committed}) == 1:
        return Label(committed[0].word)
    return Label(None, is_unclear=bool(named.search(text)) or _NEITHER.search(text) is not None)


def _shares(text: str, labels: Sequence[str]) -> list[float] | None:
    """How likely a text calls each label: "Positive: 92%, Negative: 8%"; None where it doesn't say so of all."""
    shares = []
    for label in labels:
        word = rf"(?<![\w-]){re.escape(label)}(?!\w)"
        said = re.findall(
            rf"{word}['\"”]?\s*(?:[:=(-]|is)?\s*(\d+(?:\.\d+)?\s*%|0?\.\d+)|(\d+(?:\.\d+)?)\s*%\s+{word}",
            text,
            re.IGNORECASE,
        )
        if len(said) != 1:
            return None
        number = (said[0][0] or f"{said[0][1]}%").replace(" ", "")
        shares.append(float(number.rstrip("%")) / (100 if number.endswith("%") else 1))
    return shares


def _without_echoes(text: str, named: re.Pattern[str]) -> str:
    """The text without questions and without the choice itself: "positive or negative", "neither … nor …"."""
    label = named.pattern.replace("(?P<label>", "(?:")
    asked = (
        rf"(?:\b(?:is|was|does|would|could|should)\b|(?:^|(?<=[.!?\n]))\s*(?={label}))(?P<asked>[^.!?\n]{{0,80}}?{label})(?P<rest>[^.!?\n]{{0,40}})"
        r"\?\s*(?P<reply>yes|nope|no|hardly|(?:definitely|certainly)\s+not|not\s+at\s+all)\b"
    )
    text = re.sub(  # "Is it positive? No."
        asked,
        lambda found: (
            found.group()
            if re.search(label, found["rest"], re.IGNORECASE)
            else f"It is{'' if found['reply'].lower() == 'yes' else ' not'} {found['asked']}."
        ),
        text,
        flags=re.IGNORECASE,
    )
    quoted = rf"['\"“”‘’]?{label}['\"“”‘’]?"
    joint = r"\s*(?:,|/|\||\bor\b|\bnor\b|\band\b|\bvs\.?|\bversus\b|&)\s*(?:or\s+|nor\s+|and\s+)?(?:as\s+)?"
    choice = rf"(?:neither|either|both|between|not)?\s*\(?{quoted}(?:{joint}{quoted})+\)?"
    text = re.sub(
        rf"\bneither\b[^.!?\n]{{0,60}}?{label}[^.!?\n]{{0,60}}?\bn?or\b[^.!?\n]{{0,60}}?{label}",
        " mixed ",
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(
        choice,
        lambda found: " " * 3 if "neither" not in found.group().lower() else " mixed ",
        text,
        flags=re.IGNORECASE,
    )
    return re.sub(rf"[^.!?\n]{{0,{_LONGEST}}}?{label}[^.!?\n]{{0,{_LONGEST}}}\?", " ", text, flags=re.IGNORECASE)


def _mentions(text: str, labels: Sequence[str], named: re.Pattern[str]) -> Iterator[_Mention]:
    last = 0
    for found in named.finditer(text):
        before, begins, last = text[: found.start("label")], last, found.end()
        if _AGAINST.search(before) or re.match(
            r"[\s'\"]*(?:and|or|but)?\s*(?:aspects|elements|parts|words|connotations?|tone\s+words|side|points)\b",
            text[found.end() :],
        ):
            continue
        clauses = list(_CLAUSES.finditer(before))
        clause = before[max(clauses[-1].end() if clauses else 0, begins) :]
        word: str | None = next(label for label in labels if label.lower() == found["label"].lower())
        after = next(
            (other for other in named.finditer(text, found.end()) if not _AGAINST.search(text[: other.start()])), None
        )
        is_weak = _WOULD.search(before) is not None and (
            begins > 0 or after is not None or _ON_CONDITION.match(text, found.end()) is not None
        )
        negations = len(_NEGATIONS.findall(_NO_NEGATION.sub("", clause))) + bool(_LESS.search(clause))
        is_negated = (negations + bool(_WRONG.match(text, found.end()))) % 2 == 1
        is_told = _OTHERS.search(before) is not None and not is_negated
        is_told |= _SUBJECT.match(text, found.end()) is not None and not (
            is_negated or _PRAISED.match(text, found.end())
        )
        if _HEDGE.search(clause) or is_weak or is_told or _IN_PART.match(text, found.end()):
            word = None  # what would be so is not, where something else is said to be
        elif is_negated:
            word = labels[1 - list(labels).index(str(word))] if len(labels) == 2 else None
        sentence = re.split(r"[.!?]\s|\n", before)[-1]
        between = sentence[max(0, begins - len(before) + len(sentence)) :]
        is_conceded = len(between) < len(sentence) and _CONCEDED.search(between) is not None
        is_aside = bool(clauses) and _CONCEDED.fullmatch(clauses[-1].group()) is not None
        yield _Mention(word, found.start(), not is_conceded and _FINAL.search(sentence) is not None, is_aside)
