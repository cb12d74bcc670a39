"""One spelling for what has many in the LaTeX of an answer: symbols, styles, words, lists and sets of numbers."""

import re

from m3jax.evaluation.scorers.brackets import is_wrapped, split, unworded
from m3jax.evaluation.scorers.expressions import UnreadableError, closely_equal, values_at_points
from m3jax.evaluation.scorers.shapes import COMPARED, is_asked

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "∞": r"\infty ", "°": r"^\circ ", "²": "^2", "³": "^3", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "½": r"\frac12 ",
    "¼": r"\frac14 ", "¾": r"\frac34 ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "ℝ": r"\mathbb{R}",
    "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "⁴": "^4", "⁵": "^5", "ⁿ": "^n", "₁": "_1", "₂": "_2", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_PLAIN_NAMES = re.compile(
    r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|theta|infty|infinity|inf)(?![a-zA-Z])"
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\[(?!\d+(?:pt|ex|em|mm))|(?<!\\)\\\]|\\\(|\\\)", " "),
        (r"(?<!\\)\$", ""),
        (r"\*\*(?=[^*\d]|\d+\*\*)|(?<=[^\d\s])\*\*$|__|`", ""),
        (r"(?<=\d),?\\[!,]\s*(?=\d{3})", ""),
        (r",\\!\s*", ""),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"\\left\s*\.|\\right\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"(?<=\d)\s*\\q?quad\s*(?=-?\d)", ","),
        (r"\\(?:displaystyle|textstyle|limits|qquad|quad|hfill|hline)(?![a-zA-Z])|(?<!\\)\\[!,;: ]", " "),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\^\s*\{\s*\\text\{o\}\s*\}", r"^\\circ "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq(?![a-zA-Z])|!=|\\not\s*=", r"\\ne "),
        (r"\\infinity", r"\\infty"),
        (r"(^|[,(\[])\s*\+\s*(?=\\infty)", r"\1"),
        (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:vec|mathbf|boldsymbol|overrightarrow|bm|hat|overleftrightarrow|mathcal)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:overline|widehat)\s*\{([A-Za-z]+)\}", r"\1"),
        (r"(?<=\d)\s*[eE]([-+]?\d+)(?![\w.])", r"\\times 10^{\1}"),
        (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"\{([^{}]*)\\choose\b([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"~", " "),
        (r"\bper\s+cent\b", "percent"),
        (r"\\(?:text|mbox)\s*\{\s*\}", " "),
        (r"\\text\s*\{\s*\\?%\s*\}", r"\\%"),
    )
]
_MODULUS = re.compile(
    r"[\s,]*\(?\s*(?:\\[pb]?mod|(?:\\text\s*\{\s*)?\b(?:mod(?:ulo)?)\b(?:\s*\})?)\s*\{?\s*(?P<modulus>\w+)\s*\}?\s*\)?[\s$.]*$"
)
_GROUPED = re.compile(r"(?:\\?\$)?\d{1,3}(?:,(?:\\!)?\d{3})+(?:\.\d+)?")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?)")
_STYLE = re.compile(
    r"\\(?:text)?color\s*(?:\[\w+\])?\s*\{\w+\}|\\[hv]?phantom\s*\{[^{}]*\}|\\(?:mathstrut|strut|nonumber|notag|tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
    r"|\\(?:boldsymbol|mathbf|bm|pmb)\s*(?=\{[^{}]*(?:[^\w{}]|\{))"
)
_ALIGNED = re.compile(
    r"\\begin\{(?P<kind>aligned|align\*?|gathered|split|equation\*?)\}(?P<body>.*)\\end\{(?P=kind)\}", re.DOTALL
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_APPROXIMATELY = re.compile(
    r"\\(?:approx|simeq|doteq)(?![a-zA-Z])|,?\s*\(?\b(?:approximately|which\s+is\s+(?:about|approximately)|or\s+about|roughly)\b"
)
_SCALED = re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?(hundred|thousand|million|billion|trillion|dozens?)\b(\s*\})?")
_SCALES = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9", "trillion": "10^{12}"}
_SCALES |= {"dozen": "12", "dozens": "12"}
_REAL = re.compile(
    r"(?:all\s+)?(?:the\s+)?real\s+numbers?|\\mathbb\s*\{?R\}?|\\R|all\s+(?:real\s+)?(?:[a-z]|\\in)?\s*\\?i?n?\s*\\mathbb\{R\}"
)


def without_modulus(text: str) -> tuple[str, str]:
    """3 \\pmod 7 as 3 and 7; the modulus is empty where there is none."""
    found = _MODULUS.search(text)
    if found is None or not text[: found.start()].strip(" $("):
        return text, ""
    return text[: found.start()], found["modulus"]


def cleaned(text: str) -> str:
    """The text with one spelling for what has many."""
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    text = _BOXED.sub(r"\1", _unstyled(text.strip()))
    if text.count("$") % 2 and re.match(r"-?\$\d", text):
        text = text.replace("$", r"\$", 1)  # one alone is no delimiter, but a currency
    text = text.rstrip(".").strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _SCALED.sub(lambda found: rf"\times {_SCALES[found[1]]} ", text)
    text = _real_sets(text.strip())
    text = _exact(text)
    text = _PLAIN_NAMES.sub(r"\\\1 ", text).replace(r"\infinity", r"\infty").replace(r"\inf ", r"\infty ")
    text = _joined(text)
    text = text.strip().rstrip(".,;").strip()
    if french := re.fullmatch(r"([\[\]])([^\[\],;]+)[,;]([^\[\],;]+)([\[\]])", text):  # ]1, 2[ is (1, 2)
        text = f"{'[' if french[1] == '[' else '('}{french[2]},{french[3]}{']' if french[4] == ']' else ')'}"
    return text


def _unstyled(text: str) -> str:
    """The text without colour, bold type and the alignment of lines."""
    aligned = _ALIGNED.fullmatch(text.strip(" $."))
    if aligned is not None:
        lines = (line if r"\begin" in line else line.replace("&", " ") for line in split(aligned["body"], "\\\\"))
        text = ",".join(line.strip() for line in lines if line.strip())
    text = _STYLE.sub("", text).strip()
    while is_wrapped(text, "{", "}") and not re.search(r"\\(?:over|choose)\b", text):
        inside = text[1:-1].strip()
        if len(split(inside, ",")) > 1 and not _GROUPED.fullmatch(inside):
            break  # a set
        text = inside
    return text


def _real_sets(text: str) -> str:
    if _REAL.fullmatch(unworded(text)):
        return r"(-\infty,\infty)"
    if excepted := re.fullmatch(r"all\s+real\s+numbers?\s+(?:except|but|other\s+than)\s+(.+)", unworded(text)):
        return rf"x \ne {excepted[1]}"
    text = re.sub(r"^[a-z]\s*\\in\s*\\mathbb\s*\{?R\}?\s*,\s*(?=[a-z]\s*\\ne)", "", text)
    if re.fullmatch(
        r"(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+)?solutions?(?:\s+exist)?", unworded(text), re.IGNORECASE
    ):
        return r"\emptyset"
    if without := re.fullmatch(r"\\mathbb\s*\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\}", text):
        return rf"x \ne {without[1]}"
    return text


def _exact(text: str) -> str:
    """The exact value of one that is given with an approximation."""
    mark = _APPROXIMATELY.search(text)
    if mark is None:
        return text
    before, after = text[: mark.start()].strip().rstrip("(,;").strip(), text[mark.end() :]
    if before and (not is_asked(before) or _is_constant(before)):
        return before
    return _APPROXIMATELY.split(after, maxsplit=1)[0].strip()


def _is_constant(text: str) -> bool:
    try:
        samples = values_at_points(text)
    except UnreadableError:
        return False
    return closely_equal(samples, samples[1:] + samples[:1])


def _joined(text: str) -> str:
    """Lists joined by commas, whatever joined them."""
    text = re.sub(r"\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(and|or|if|with|where)\s*\}", r" \1 ", text)
    if COMPARED.search(text) and re.search(r"(?<=[\w})])\s*,?\s*\bor\b\s*(?=\S)", text):
        text = re.sub(r"\s*,?\s*\bor\b\s*", r" \\cup ", text)
    text = re.sub(r"^\s*(?:either|both)\s+(?=\S)", "", text)
    text = re.sub(r"(?<=[\d}\w)|!])\s*,?\s+(?:or|and)\s+(?=\S)", ",", text)
    return re.sub(r"(?<=\S)\s*;\s*(?=\S)", ",", text)
