"""The answers that the M³ paper's evaluation finds, and when it takes them for right.

The paper (arXiv 2502.15434) evaluates with the code of DARE (Yu et al., arXiv 2311.03099; github.com/yule-BUAA/MergeLM,
utils/evaluate_llms_utils.py and inference_llms_instruct_math_code.py at 0dbd199), whose rule for MATH is that of
Hendrycks et al. (2021), and labels with PromptBench (Zhu et al., 2023; github.com/microsoft/promptbench,
promptbench/utils/dataprocess.py at 059985e). What follows are their rules in words of our own, odd ones included.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_MARK = "The answer is: "
_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")
_EDGES = ",._\"'-+=!?()&^%$#@:\\|{}[]<>/`\n\t\r\v\f "


class _Unusual(Exception):  # noqa: N818
    """A text at which the rule gives up; it then compares what was written."""


def paper_number(text: str) -> int | None:
    """GSM8K: the first number after the last "The answer is: ", rounded to an integer; None where there is none.

    Only one comma, point or stroke is read: "1,234,567" is 1234.

    Example:
        >>> paper_number("The answer is: 17.6"), paper_number("#### 18")
        (18, None)
    """
    _, mark, after = text.rpartition(_MARK)
    found = _NUMBER.search(after) if mark else None
    if found is None:
        return None
    above, stroke, below = found.group().replace(",", "").partition("/")
    if not stroke:
        return round(float(above))
    if not above.lstrip("+-"):
        return None
    return round(float(above)) if below == "0" else _quotient(above, below)


def _quotient(above: str, below: str) -> int | None:
    return None if int(below) == 0 else round(float(Fraction(int(above), int(below))))


def paper_answer(text: str) -> str | None:
    """MATH: what follows the last "The answer is: ", up to a full stop at the end of a line; None without that mark."""
    _, mark, after = text.rpartition(_MARK)
    return after.split(".\n")[0].strip().removesuffix(".").strip() if mark else None


def paper_equal(answer: str, gold: str) -> bool:
    """MATH: whether two answers are the same text after a fixed list of replacements.

    Example:
        >>> paper_equal(r"\\dfrac12", r"\\frac{1}{2}"), paper_equal("1/2", r"\\frac{1}{2}"), paper_equal("2/4", "1/2")
        (True, True, False)
    """
    try:
        return _plain(answer) == _plain(gold)
    except _Unusual:
        return answer == gold


def _plain(text: str) -> str:
    for part, instead in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")):
        text = text.replace(part, instead)
    for part in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(part, "")
    if (units := text.count("\\text{ ")) > 1:
        raise _Unusual
    text = text.partition("\\text{ ")[0] if units else text
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _stroke("\\frac{1}{2}" if text == "0.5" else text)


def _braced_roots(text: str) -> str:
    """\\sqrt3 as \\sqrt{3}."""
    first, *rest = text.split("\\sqrt")
    if not all(rest):
        raise _Unusual
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    """\\frac12 as \\frac{1}{2}, \\frac1{2} as well."""
    first, *rest = text.split("\\frac")
    out = first
    for part in rest:
        if not part:
            raise _Unusual
        if part[0] == "{":
            out += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            out += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            out += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return out


def _stroke(text: str) -> str:
    """3/4 as \\frac{3}{4}, of whole numbers only."""
    above, stroke, below = text.partition("/")
    if not stroke or "/" in below:
        return text
    try:
        whole = (int(above), int(below))
    except ValueError as error:
        raise _Unusual from error
    return f"\\frac{{{whole[0]}}}{{{whole[1]}}}" if text == f"{whole[0]}/{whole[1]}" else text


def paper_program(text: str, task: str) -> str:
    """HumanEval and MBPP: the program of a completion, cut at fixed marks.

    Args:
        text: What the model wrote.
        task: "humaneval" or "mbpp", which differ a little.

    Returns:
        The program; for HumanEval it is put behind the prompt.
    """
    code = text.split("### Response:")[-1].replace("\t", "    ")
    code = (code.replace("\r", "") if task == "humaneval" else code).strip()
    if "```python" in code:
        code = code[code.index("```python") :].replace("```python", "")
        code = _until(code, "```" if task == "humaneval" else "\n```")
    if '__name__ == "__main__"' in code:
        code = _until(code, 'if __name__ == "__main__":')
    for mark in ("# Example usage", *(("# Test examples",) if task == "mbpp" else ())):
        code = _until(code, mark)
    for mark in ("The solution is:", "The answer is:"):
        if mark in code:
            code = _until(code[code.index(mark) :].replace(mark, ""), "\n\nThe answer is:").strip()
    return code


def _until(text: str, mark: str) -> str:
    return text.partition(mark)[0].strip() if mark in text else text


def paper_label(text: str, labels: Sequence[str]) -> str | None:
    """SST-2 and CoLA: the last word, without what stands at its edges and without apostrophes, if it is a label.

    The apostrophes are the paper's own addition to PromptBench's rule (promptbench/promptbench/utils/dataprocess.py in
    github.com/MLGroupJLU/MixupModelMerge at 82147bd).

    Example:
        >>> paper_label("The sentiment is: Positive.", ("negative", "positive"))
        'positive'
        >>> paper_label("It is 'positive'.", ("negative", "positive"))
        'positive'
        >>> paper_label("Positive, I think.", ("negative", "positive")) is None
        True
    """
    said = text.lower().replace("<pad>", "").replace("</s>", "").strip(_EDGES).split(" ")[-1].replace("'", "")
    return next((label for label in labels if label.lower() == said), None)
