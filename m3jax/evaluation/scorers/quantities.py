"""What the words around a number make of it: "at least 18", "18 or more", "half of 18" and "18 squared" are not 18.

Numbers and formulas are read by others; here is only the grammar of what stands before and behind them. Some words
change a number or not by what was asked: "18 pairs" is 18 where pairs are asked for, and "at least 18" is where the
least is.
"""

import re

_NUMBER_WORDS = (
    r"(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen"
    r"|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)\b"
)
_VARIABLE = r"[^()]*(?<![A-Za-z])[a-z](?![A-Za-z])[^()]*\)"
_NUMBER = rf"(?:[$€£]?\s?-?\.?\d|{_NUMBER_WORDS})"
_PARTS = (
    r"(?:(?:ten|hundred)[-\s])?(?:half|halves|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?"
    r"|thousandths?)\b"
)
# Words that may stand between what changes a number and the number: "not exactly 18", "more than just $18".
_FILLERS = (
    r"(?:\s+(?:about|around|exactly|just|only|even|the|an?|some|roughly|approximately|quite|equal\s+to|be|been|a\s+total\s+of"
    r"|(?:a\s+)?(?:value|number|sum)\s+of)\b)*[\s*_`$€£(\[\\]*$"
)
# Nouns between a number and what changes it: "18 large eggs or more".
_NOUNS = (
    r"(?:\s+(?!(?:is|are|was|were|the|an?|for|in|at|per|of|as|and|or|to|which|that|with|has|have|had|leaves?|gives?|goes|will|would|can|must"
    r"|should|when|if|after|before|because|since|while|so|but|who|where|how)\b)[A-Za-z'’-]+){0,3}?"
)

_LEAST_WORDS = (
    r"\b(?:at\s+(?:the\s+)?(?:very\s+)?(?:least|minimum)|min(?:imum)?\s+of|lower\s+(?:bound|limit)\s+of"
    r"|no\s+(?:less|fewer)\s+than)\b"
)
_MOST_WORDS = (
    r"\b(?:at\s+(?:the\s+)?(?:very\s+)?(?:most|maximum)|max(?:imum)?\s+of|upper\s+(?:bound|limit)\s+of"
    r"|no\s+more\s+than|up\s+to|within)\b"
)
_AT_LEAST = re.compile(rf"(?:{_LEAST_WORDS}|\bgeq?\b|≥){_FILLERS}", re.IGNORECASE)
_AT_MOST = re.compile(rf"(?:{_MOST_WORDS}|\bleq?\b|≤){_FILLERS}", re.IGNORECASE)
_AT_LEAST_WORDS = re.compile(rf"(?:an?\s+)?{_LEAST_WORDS}|\bor\s+(?:more|greater|higher|above)\b", re.IGNORECASE)
_AT_MOST_WORDS = re.compile(rf"(?:an?\s+)?{_MOST_WORDS}|\bor\s+(?:less|fewer|lower|below)\b", re.IGNORECASE)
_CHANGED_BEFORE = re.compile(
    r"(?:n['’]t|\b(?:than(?:\s+or\s+equal\s+to)?|as\s+(?:many|much|few|little|high|low|large|big|small|great)\s+as|no\s+(?:longer|more|way)|near"
    r"|(?:un)?likely\s+to|seldom|rarely|scarcely|barely|minimum|maximum|min\.?|max\.?|not|cannot|never|neither|nor|hardly|without|except(?:\s+for)?|excluding|besides|unlike|either|whether"
    r"|instead\s+of|far\s+from|nowhere\s+near|(?:anything|everything|all|any\s+\w+)\s+but|(?:close|opposed|compared|proportional"
    r"|next|added|near)\s+to|from|over|under|above|below|beyond|between|betw\.|exceed(?:s|ing|ed)?|(?:in\s+)?excess\s+of|nearly|almost"
    r"|approaching|(?:may|might|could)(?:\s+well)?\s+be|maybe|perhaps|possibly|(?:nothing|anything|something)\s+like|(?:capped|limited|restricted)\s+(?:at|to)|half|twice|thrice|double|triple|quadruple|times|plus"
    r"|sqrt|neq?|lt|gt|log|ln|mod"
    rf"|(?:{_PARTS}|quarters?|percent(?:age)?|per\s?cent|fraction|multiples?|factors|divisors?|reciprocal|inverse|opposite|negative"
    rf"|square|cube|roots?|logarithm|power|range|limit|short|shy|dozens|hundreds|thousands|millions)\s+of)"
    rf"|(?:\A|(?<=[\w)}}]))[ \t]*(?<![\w\"'/=-])[<>]|[≠√]){_FILLERS}",
    re.IGNORECASE,
)
_OR_MORE = re.compile(
    rf"{_NOUNS}\s*,?\s*(?:(?:or|and)\s+(?:more|greater|higher|above|over|up|upwards?|longer|older|later|larger|bigger|beyond)\b"
    rf"|at\s+(?:the\s+|an?\s+)?(?:very\s+|bare\s+)?(?:least|minimum)\b|minimum\b|upwards?\b)|\+(?!\s*[\d(])",
    re.IGNORECASE,
)
_OR_LESS = re.compile(
    rf"{_NOUNS}\s*,?\s*(?:(?:or|and)\s+(?:less|fewer|lower|below|under|shorter|younger|earlier|smaller)\b"
    rf"|at\s+(?:the\s+|an?\s+)?(?:very\s+)?(?:most|maximum)\b|maximum\b|max\b|tops\b)",
    re.IGNORECASE,
)
_CHANGED_AFTER = re.compile(
    rf"{_NOUNS}\s*(?:and|&)\s+(?:an?\s+|one\s+|two\s+|three\s+)?-?(?:half|thirds?|quarters?|fourths?|fifths?|eighths?)\b"
    rf"|\s*%?\s*(?:%|percent|per\s?cent)\s+of\s+(?:the\s+)?(?:{_NUMBER}|\$|\\\()"
    rf"|{_NOUNS}\s*,?\s*\b(?:or|and)\s+(?:none|nothing|change|something|some\b|a\s+(?:bit|little|few|fraction)|counting|then\s+some|maybe|perhaps|possibly|even|else|also|otherwise)\b"
    rf"|{_NOUNS}\s*,?\s*\b(?:or|to|through|and)\s+(?:about\s+|around\s+|even\s+|possibly\s+|maybe\s+)?{_NUMBER_WORDS}"
    rf"|{_NOUNS}\s+(?:multiplied\s+by|divided\s+by|plus|minus|added\s+to|subtracted\s+from|modulo|mod)\b"
    rf"|\s*times\s+(?:{_NUMBER}|(?:the|as|that|this|what|itself)\b|\W*[b-z]\b|\$\w|\\\()"
    r"|\s*(?:smallest|largest|greatest|biggest|lowest|highest)\b|\s*(?:twice|thrice|(?:two|three|ten)fold)\b|\s*\(?in\s+(?:hundreds|thousands|millions|billions|dozens)\b|\s*(?:squared|cubed|factorial|(?:double|triple|quadruple|halve|quarter)d)\b|\s*(?:raised\s+)?to\s+the\s+(?:\w+\s+)?power\b|\s+point\s+(?=[a-z])"
    rf"|{_NOUNS}\s*,?\s*(?:with\s+)?(?:an?\s+)?(?:remainder|rem\.?|r\.?)\s*(?:of|:)?\s*(?:\d|(?<=\sr)$|(?<=rem)$)|{_NOUNS}\s+(?:short|shy)(?:\s+of)?\b|{_NOUNS}\s+(?:on\s+top\s+of\b|less\s+{_NUMBER})|\s*(?:millions|billions|thousands|hundreds)\b"
    rf"|{_NOUNS}\s+(?:more|less|fewer|greater|higher|lower|larger|smaller|older|younger|longer|shorter)\s+than\s+(?:about\s+)?"
    rf"(?:{_NUMBER}|twice|half|double|\W*[b-z]\b)"
    r"|[-\s]?ish\b|-(?:odd|plus|something)\b|\s+something\b|\s+(?:below|under)\s+(?:zero|freezing|par)\b"
    rf"|\s*(?:<(?!/?[a-z]+>)|[>≤≥≠~²³⁴√‰]|[⅓-⅞¼-¾])|!|'\s?\d|\s+per\s?mill?e\b|\({_VARIABLE}"
    r"|[a-zB-Z](?<![kKmMgGlLsShHCFc])(?![A-Za-z])|\s*[-+×^]\s*\(?(?:[b-zB-HJ-Z]|sqrt|pi)(?![A-Za-z])",
    re.IGNORECASE,
)
_NAMED_AMOUNT = (
    r"(?:total|sum|cost|price|amount|number|value|profit|average|mean|median|age|length|width|height|depth|area|perimeter|weight|mass"
    r"|distance|score|speed|rate|loss|change|difference|income|salary|balance|bill|answer|result|count|quantity|population|volume"
    r"|capacity|budget|savings|time|duration|increase|decrease|discount|tip|fee|tax|payment|grade|percentage|probability|debt|earnings"
    r"|revenue|expenses?|wages?|temperature|factor|ratio|supply|stock|set|group|crowd|collection|solution|maximum|minimum)s?"
)
_REACHES = (
    r"(?:equal|comes?|came|amount(?:s|ed)?|adds?(?:\s+\w+)?|sum(?:s|med)?(?:\s+up)?|evaluates?|simplif(?:y|ies)|round(?:s|ed)?|reduc(?:es?|ed)"
    r"|leads?|ris(?:es?|en)|gr(?:ows?|ew|own)|increas(?:es?|ed)|drops?(?:ped)?|falls?|fell|decreas(?:es?|ed)|down|go(?:es)?|gets?|boils\s+down"
    r"|(?:brings?|brought|works?|turns?)(?:\s+\w+){0,4}|equivalent|answer|corresponds?)"
)
# "of" and "to" before a number, where no amount or no reaching stands before them: "north of 18", "up to 18".
_ODD_OF = re.compile(rf"\bof{_FILLERS}", re.IGNORECASE)
_PLAIN_OF = re.compile(rf"\b{_NAMED_AMOUNT}\s+of{_FILLERS}", re.IGNORECASE)
_ODD_TO = re.compile(rf"\bto{_FILLERS}", re.IGNORECASE)
_PLAIN_TO = re.compile(rf"\b{_REACHES}\s+to{_FILLERS}", re.IGNORECASE)
_LETTER_AND_SIGN = re.compile(r"(?<![A-Za-z])[a-zB-HJ-Z]\s*[-+*/×÷^]\s*[$(]*$")
# A second number behind the first is told of by a preposition, or is the number of something: "for 7 days", "on day 3".
_SECOND = re.compile(r"^(?:[^\d.;()=]|\.(?!\s))*?(?P<word>[^\s\d]*)\s*(?P<number>[$€£]?\s?\d[\d,.]*)", re.IGNORECASE)
_RESTATED = re.compile(r"\s*([A-Za-z]+),?\s+or\s+(?:about\s+)?[\d.,]+\s+(?!\1\b)[A-Za-z]+")  # 2 hours, or 120 minutes
_TOLD_OF = re.compile(
    r"(?:for|in|of|on|after|at|every|per|by|over|during|within|with|each|from|since|until|before|the|all|those|these|his|her|their|its|our"
    r"|my|your|first|last|next|other|remaining|about|around|day|week|month|year|step|number|grade|problem|question|part|round|level|no\.?"
    r"|not|as|so|because|when|if|only|using|that|which|remaining|to|an?|\W+)",
    re.IGNORECASE,
)
_OPERAND = re.compile(r"(?:[\w)}!]|\\pi)\s*(?:\\cdot|\\times|[-+*/×÷^])\s*[{(]?\s*$")  # of a box: 2 \\cdot \\boxed{9}
_COLLECTIVE = re.compile(rf"\s*-?(?P<word>pairs?|couples?|trios?|gross|quarters?|{_PARTS})\b", re.IGNORECASE)
_EACH = re.compile(rf"{_NOUNS}\s+(?:each|apiece)\s*\W*(?:$|[.,;!)])", re.IGNORECASE)
_SHARED = re.compile(r"\b(?:each|every|per|apiece|average|mean|equally|evenly|one|single|share)\b", re.IGNORECASE)
_LEAST = re.compile(r"\b(?:least|minimum|minimal|fewest|smallest|lowest)\b", re.IGNORECASE)
_MOST = re.compile(r"\b(?:most|maximum|maximal|largest|greatest|highest|up\s+to)\b", re.IGNORECASE)
_PERCENT = re.compile(r"%|\b(?:percent\w*|per\s?cent)\b", re.IGNORECASE)
_CLOSED = re.compile(r"^(?:\$|\*|_|\\\)|\\\])+!?")
_MODULAR = re.compile(r"\bmod|remainder|congruen|residue|inverse|divided|divisi|o'clock|units?\s+digit", re.IGNORECASE)
_IN_DEGREES = re.compile(r"degree|\\circ|°|angle|rotat|\barcs?\b|latitude|longitude|temperature", re.IGNORECASE)
_FAR = 80  # letters that are looked at before and behind
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'$\\(])")


def is_changed(before: str, after: str, asked: str = "") -> bool:
    """Whether a number is another quantity, or none, by what stands around it.

    Args:
        before: The words before the number, in its own clause.
        after: The words behind it.
        asked: The question that it answers; empty where none is known.

    Example:
        >>> is_changed("at least ", ""), is_changed("", " or fewer eggs"), is_changed("about ", " eggs")
        (True, True, False)
        >>> is_changed("", " pairs of socks"), is_changed("", " pairs of socks", "How many pairs has she?")
        (True, False)
    """
    wanted = question(asked)
    if _AT_LEAST.search(before) or _OR_MORE.match(after):
        return _LEAST.search(wanted) is None
    if _AT_MOST.search(before) or _OR_LESS.match(after):
        return _MOST.search(wanted) is None
    if _CHANGED_BEFORE.search(before) or _CHANGED_AFTER.match(after) or _LETTER_AND_SIGN.search(before):
        return True
    if (_ODD_OF.search(before) and not _PLAIN_OF.search(before)) or (
        _ODD_TO.search(before) and not _PLAIN_TO.search(before)
    ):
        return True
    second = None if _RESTATED.match(after) else _SECOND.match(after)
    if second is not None and not _TOLD_OF.fullmatch(second["word"]):
        return True
    if _EACH.match(after) and wanted:
        return _SHARED.search(wanted) is None
    found = _COLLECTIVE.match(after)
    return found is not None and not names(asked, found["word"])


def surroundings(before: str, after: str) -> tuple[str, str]:
    """The words right before and right behind a number or formula that make it another quantity; empty where none do.

    Example:
        >>> surroundings("She needs at least $", "$ of them"), surroundings("It is $", "$ or more.")
        (('at least ', ''), ('', ' or more'))
    """
    leads = [
        found
        for pattern in (_AT_LEAST, _AT_MOST, _CHANGED_BEFORE, _OPERAND)
        if (found := pattern.search(before[-_FAR:]))
    ]
    after = _CLOSED.sub("", after[:_FAR])
    behind = (pattern.match(after) for pattern in (_OR_MORE, _OR_LESS, _CHANGED_AFTER, _EACH, _COLLECTIVE))
    lead = leads[0].group().rstrip("*_`$([\\") if leads else ""
    return lead, next((found.group().rstrip() for found in behind if found is not None), "")


def names(asked: str, word: str) -> bool:
    """Whether a question asks for something under a name, in the plural or not.

    Example:
        >>> names("She has 36 eggs. How many dozens are that?", "dozen")
        True
    """
    stem = re.escape(word.lower().removesuffix("s"))
    return re.search(rf"\b{stem}", question(asked).lower()) is not None


def uncounted(text: str, asked: str) -> str:
    """A short answer without the words that its question makes harmless: groups it counts in, the bound it asks for.

    Example:
        >>> uncounted("5 pairs", "How many pairs are there?"), uncounted("5 pairs", "How many shoes are there?")
        ('5', '5 pairs')
        >>> uncounted("at most 5", "What is the greatest number left over?")
        '5'
    """
    for wanted, bound in ((_LEAST, _AT_LEAST_WORDS), (_MOST, _AT_MOST_WORDS)):
        if wanted.search(question(asked)):
            text = bound.sub("", text)
    behind = _COLLECTIVE.search(text) if asked else None
    if behind is not None and names(asked, behind["word"]):
        text = text[: behind.start()] + text[behind.end() :]
    return text.strip()


def is_counted_in(asked: str, word: str) -> bool:
    """Whether a question wants its answer in units of a word: "how many dozen", "in thousands of dollars".

    Example:
        >>> is_counted_in("How many dozen eggs are that?", "dozen"), is_counted_in("Who buys a dozen?", "dozen")
        (True, False)
    """
    stem = re.escape(word.lower().removesuffix("s"))
    return re.search(rf"\b(?:how\s+many|number\s+of|in)\s+{stem}s?\b", question(asked), re.IGNORECASE) is not None


def is_about(asked: str, unit: str) -> bool:
    """Whether a question is about what a sign behind its answer stands for: "percent" or "degree"."""
    return {"percent": _PERCENT, "degree": _IN_DEGREES}[unit].search(asked) is not None


def is_modulus(asked: str, modulus: str) -> bool:
    """Whether a question is about rests, and has the modulus, or asks for last digits.

    Example:
        >>> is_modulus("What is the remainder when 100 is divided by 7?", "7"), is_modulus("What is 4 + 7?", "7")
        (True, False)
    """
    is_digits = modulus.strip("0") == "1" and "digit" in asked
    return is_digits or (_MODULAR.search(asked) is not None and re.search(rf"\b{modulus}\b", asked) is not None)


def question(asked: str) -> str:
    """The sentences of an exercise that ask; its last one where none has a question mark."""
    sentences = [sentence for sentence in _SENTENCE.split(asked.strip()) if sentence]
    return " ".join([sentence for sentence in sentences if "?" in sentence] or sentences[-1:])
