"""Forms of MATH's answers: where a solution states it, how it may be spelled, and what means something else."""

import json
import re

_WORK = "First $a = 3$, so $b = 4$ and $a + b = 7$.\n"
_DIGIT_NAMES = dict(zip("23456789", ["two", "three", "four", "five", "six", "seven", "eight", "nine"], strict=True))


def _is_scalar(gold: str) -> bool:
    return not re.search(r"\\text|,|\\pm|\\begin|\\in\b|=|\\cup|_\d|_\{|\\mbox|\\infty|\\\{", gold)


def _is_constant(gold: str) -> bool:
    return _is_scalar(gold) and not re.search("[a-z]", re.sub(r"\\[a-z]+", "", gold))


def statements(gold: str) -> dict[str, str]:
    """Worked solutions that state an answer."""
    said = _plain_statements(gold) | _other_statements(gold)
    if _is_scalar(gold):
        said |= {
            "$f(2) = X$": f"The answer is: $f(2)={gold}$.",
            "$x = X$": f"The answer is: $x = {gold}$.",
            "$S = T = X$": f"The answer is: $S = T = {gold}$.",
            "X, which is approximately": f"The answer is ${gold}$, which is approximately $3.14$.",
            "X (approximately …)": f"The answer is: ${gold}$ (approximately $3.14$).",
            "Thus, $x = X$.": f"Thus, $x = {gold}$.",
        }
    if _is_constant(gold):
        said["X \\approx"] = f"The answer is ${gold} \\approx 3.14$."
    return {form: _WORK + text for form, text in said.items()} | {"formula alone": f"${gold}$"}


def _plain_statements(gold: str) -> dict[str, str]:
    return {
        "The answer is: $X$.": f"The answer is: ${gold}$.",
        "The answer is: X, no delimiters": f"The answer is: {gold}",
        "The answer is: \\[X\\]": f"The answer is:\n\\[{gold}\\]",
        "Final Answer: The final answer is $X$. I hope": f"Final Answer: The final answer is ${gold}$. I hope it is "
        "correct.",
        "The final answer is $X$. I hope": f"The final answer is ${gold}$. I hope it is correct.",
        "so the correct answer is \\(X\\)": f"so the correct answer is \\({gold}\\).",
        "The answer to the problem is": f"The answer to the problem is ${gold}$.",
        "box": f"Hence $\\boxed{{{gold}}}$.",
        "displayed box": f"\\[\n\\boxed{{{gold}}}\n\\]\nThis is our answer.",
        "bold box": f"The final answer is: **$\\boxed{{{gold}}}$**",
        "box, talk behind": f"\\boxed{{{gold}}}, so the answer is correct. Check: the answer is in the list.",
        "box in the middle": f"$\\boxed{{9999}}$ is wrong. The answer is: $\\boxed{{{gold}}}$.",
        "### Final Answer": f"### Final Answer\n\n$${gold}$$",
        "### Final Answer:, several lines": f"### Final Answer:\n\n$$\n{gold}\n$$\n",
        "## Answer": f"## Answer\n${gold}$",
        "**Final Answer**": f"**Final Answer**\n\n\\(\\displaystyle {gold}\\)",
        "**Answer:**": f"**Answer:** ${gold}$",
        "Answer: box": f"Answer: $\\boxed{{{gold}}}$",
        "#### $X$": f"#### ${gold}$",
        "<answer>": f"<answer>${gold}$</answer>",
        "JSON": json.dumps({"reasoning": "first $9999$", "answer": gold}),
        "JSON, box": json.dumps({"answer": f"\\boxed{{{gold}}}"}),
        "label in \\text": f"\\[\\text{{Answer: }} {gold}\\]",
        "label in the box": f"$\\boxed{{\\text{{Answer: }}{gold}}}$",
        "row of a table": f"| step | value |\n|---|---|\n| 1 | $9999$ |\n| **Answer** | **${gold}$** |",
        "Chinese": f"答案：${gold}$",
        "**Answer.**": f"**Answer.** ${gold}$",
        "[ANSWER]": f"[ANSWER] ${gold}$",
        "final answer of": f"This gives a final answer of ${gold}$.",
        "The solution is": f"The solution is ${gold}$.",
        "Solution: at the end": f"**Solution:** ${gold}$",
        "quoted box": f"> $\\boxed{{{gold}}}$",
        "explained behind": f"\n${gold}$\n\n**Explanation:** we used $a = 3$.",
        "\\large": f"$\\boxed{{\\large {gold}}}$",
        "run-on ## Problem 2": f"The answer is ${gold}$.\n\n## Problem 2\nCompute $1+1$.\n\n$\\boxed{{2222}}$",
        "the answer is not … but": f"The answer is not $9999$ but ${gold}$.",
    }


def _other_statements(gold: str) -> dict[str, str]:
    return {
        "since behind": f"The answer is ${gold}$ since $a + b = 7$.",
        "because behind": f"The answer is: ${gold}$, because $3 + 4 = 7$ and $7 > 0$.",
        "where behind": f"The answer is ${gold}$, where we used $a = 3$.",
        "as required": f"So the final answer is ${gold}$, as required.",
        "Therefore": f"Therefore, the value we want is ${gold}$.",
        "display at the end": f"Putting all together,\n\\[{gold}\\]",
        "corrected": f"The answer is: $9999$.\nWait, I made a mistake. The answer is: ${gold}$.",
        "talk of answers behind": f"The answer is ${gold}$. If the answer is $5$, we would get $6$.",
        "thought aloud": f"<think>Maybe \\boxed{{9999}}?</think>\nThe answer is $\\boxed{{{gold}}}$.",
        "run-on Problem:": f"The answer is: ${gold}$.\n\nProblem: What is $1+1$?\nThe answer is: $2222$.",
        "run-on ### Instruction:": f"$\\boxed{{{gold}}}$\n\n### Instruction:\nWhat is $1+1$?\n\n"
        "### Response: $\\boxed{2222}$",
        "special token": f"The answer is: ${gold}$.<|eot_id|>",
    }


def spellings(gold: str) -> dict[str, str]:
    """Other ways to write the same."""
    return (
        _styles(gold)
        | _typography(gold)
        | _fractions(gold)
        | _matrices(gold)
        | _numbers(gold)
        | _choices(gold)
        | _tuples(gold)
        | _intervals(gold)
        | _lists(gold)
        | _equations(gold)
    )


def _styles(gold: str) -> dict[str, str]:
    return {
        "braces": f"{{{gold}}}",
        "\\boldsymbol": f"\\boldsymbol{{{gold}}}",
        "\\color": f"\\color{{red}}{{{gold}}}",
        "\\textcolor": f"\\textcolor{{red}}{{{gold}}}",
        "aligned": f"\\begin{{aligned}} {gold} \\end{{aligned}}",
        "\\phantom": f"{gold}\\phantom{{.}}",
    }


def _typography(gold: str) -> dict[str, str]:
    said = {"X.": f"{gold}.", "\\displaystyle": f"\\displaystyle {gold}"}
    if not re.search(r"\\!|\\,|\\text|mbox", gold):
        if not re.fullmatch(r"[\d,]+", gold):
            said["more spaces"] = re.sub(r"([-+=,])", r" \1 ", gold)
        said["fewer spaces"] = re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", "", gold)
    if re.fullmatch(r"\(.*\)", gold):
        said["\\left \\right"] = f"\\left{gold[:-1]}\\right)"
    if _is_scalar(gold) and not re.search(r"circ|\$|mbox", gold):
        if not re.fullmatch(r"[\d,.]+", gold) and "!" not in gold:
            said["(X)"] = f"({gold})"
        if not re.search(r"\d ?\\frac", gold):
            said["X + 0"] = f"{gold} + 0"
        if re.search(r"\d\}?$", gold):
            said["X \\text{ cm}"] = f"{gold}\\text{{ cm}}"
    if word := re.fullmatch(r"\\text\{([^{}()]*)\}", gold):
        said |= {
            "\\textbf": f"\\textbf{{{word[1]}}}",
            "plain word": word[1].lower(),
            "\\mathrm": f"\\mathrm{{{word[1]}}}",
        }
    return said


def _fractions(gold: str) -> dict[str, str]:
    said = {}
    if "frac" in gold:
        said["\\dfrac"] = re.sub(r"\\[dt]?frac", r"\\dfrac", gold)
    if re.search(r"frac\{[^{}]*\}\{[^{}]*\}", gold) and not re.match(r"\d+ ?\\frac", gold):
        said["stroke"] = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", gold)
    if plain := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        sign, above, below = plain.groups()
        said["not reduced"] = f"{sign}\\frac{{{2 * int(above)}}}{{{2 * int(below)}}}"
        if sign:
            said["sign in the numerator"] = f"\\frac{{-{above}}}{{{below}}}"
    return said


def _matrices(gold: str) -> dict[str, str]:
    if "pmatrix" not in gold:
        return {}
    body = re.sub(r"\\(?:begin|end)\{pmatrix\}", "", gold).strip()
    rows = [row.strip() for row in body.split("\\\\")]
    crossed = body.replace("\\\\", "\\cr ")
    said = {
        "bmatrix": gold.replace("pmatrix", "bmatrix"),
        "array in \\left( \\right)": f"\\left(\\begin{{array}}{{cc}}{body}\\end{{array}}\\right)",
        "array in \\left[ \\right]": f"\\left[\\begin{{array}}{{r}}{body}\\end{{array}}\\right]",
        "smallmatrix": f"\\left(\\begin{{smallmatrix}}{body}\\end{{smallmatrix}}\\right)",
        "\\pmatrix{…\\cr…}": f"\\pmatrix{{{crossed}}}",
        "bmatrix*": f"\\begin{{bmatrix*}}[r]{body}\\end{{bmatrix*}}",
        "\\\\[4pt]": gold.replace("\\\\", "\\\\[4pt]"),
        "on several lines": gold.replace("\\\\", "\\\\\n"),
        "\\mathbf{v} =": f"\\mathbf{{v}} = {gold}",
        "nested lists": "[" + ", ".join(f"[{', '.join(row.split('&'))}]" for row in rows) + "]",
        "factor 2 before": "\\frac{1}{2}\\begin{pmatrix}"
        + "\\\\".join("&".join(f"2({cell})" for cell in row.split("&")) for row in rows)
        + "\\end{pmatrix}",
    }
    if "&" not in gold:
        said["column as a tuple"] = f"({', '.join(rows)})"
        said["row, transposed"] = f"\\begin{{pmatrix}}{' & '.join(rows)}\\end{{pmatrix}}^T"
    return said


def _numbers(gold: str) -> dict[str, str]:
    said = {}
    if based := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        digits, base = based.groups()
        said["base in braces"] = f"{digits}_{{{base}}}"
        said["\\text{ base }"] = f"{digits} \\text{{ base }} {base}"
        said["base in words"] = f"{digits}_{{\\text{{{_DIGIT_NAMES[base]}}}}}"
        said["(X)_b"] = f"({digits})_{{{base}}}"
    if angle := re.fullmatch(r"(\d+)\^\\circ", gold):
        said |= {"degrees": f"{angle[1]} degrees", "\\text{ degrees}": f"{angle[1]}\\text{{ degrees}}"}
        said |= {"°": f"{angle[1]}°", "degrees left out": angle[1]}
    if re.fullmatch(r"-?\d{4,}", gold):
        for name, mark in {"comma": ",", "{,}": "{,}", "\\,": "\\,", ",\\!": ",\\!"}.items():
            said[f"thousands by {name}"] = f"{int(gold):,}".replace(",", mark)
    if re.fullmatch(r"\d{1,4}", gold):
        said["scientific"] = f"{int(gold) / 10:g} \\times 10^1"
    return said


def _choices(gold: str) -> dict[str, str]:
    found = re.fullmatch(r"\\text\{\((.)\)\}", gold)
    if found is None:
        return {}
    letter = found[1]
    return {
        "letter": letter,
        "(C)": f"({letter})",
        "\\textbf{(C)}": f"\\textbf{{({letter})}}",
        "(C) with its text": f"\\textbf{{({letter}) }} 12x",
        "Option C": f"\\text{{Option {letter}}}",
    }


def _pair(gold: str) -> tuple[str, str] | None:
    found = re.fullmatch(r"\((.+),(.+)\)", re.sub(r"\\left|\\right", "", gold))
    if found is None or "," in found[1] or "infty" in gold or "cup" in gold:
        return None
    return found[1].strip(), found[2].strip()


def _tuples(gold: str) -> dict[str, str]:
    pair = _pair(gold)
    if pair is None:
        return {}
    one, other = pair
    return {
        "(x, y) = (…)": f"(x, y) = ({one},{other})",
        "x = …, y = …": f"x = {one}, y = {other}",
        "x = … and y = …": f"x = {one} \\text{{ and }} y = {other}",
        "y = …, x = …": f"y = {other}, x = {one}",
        "\\langle … \\rangle": f"\\langle {one},{other} \\rangle",
    }


def _bounds(gold: str) -> re.Match[str] | None:
    found = re.fullmatch(r"\s*([\[(])(.+),(.+)([\])])\s*", re.sub(r"\\left|\\right", "", gold))
    return found if found is not None and ("infty" in gold or found[1] + found[4] != "()") else None


def _inequality(bounds: re.Match[str]) -> str:
    opening, low, high, closing = (part.strip() for part in bounds.groups())
    below, above = "<" if closing == ")" else r"\le", ">" if opening == "(" else r"\ge"
    if "-\\infty" in low:
        return f"x {below} {high}"
    if "infty" in high:
        return f"x {above} {low}"
    return f"{low} {'<' if opening == '(' else 'BELOW'} x {below} {high}".replace("BELOW", r"\le")


def _intervals(gold: str) -> dict[str, str]:
    if "\\cup" in gold:
        parts = gold.split("\\cup")
        whole = [re.fullmatch(r"\s*([\[(])(.+),(.+)([\])])\s*", part) for part in parts]
        said = {"union, the other way": " \\cup ".join(parts[::-1])}
        return said | {"x … or …": " \\text{ or } ".join(_inequality(part) for part in whole if part is not None)}
    bounds = _bounds(gold)
    if bounds is None:
        return {}
    return {
        "inequality": _inequality(bounds),
        "x \\in": f"x \\in {gold}",
        "\\{x : …\\}": f"\\{{x : {_inequality(bounds)}\\}}",
    }


def _list(gold: str) -> list[str]:
    is_list = re.fullmatch(r"-?\d+(?:,\s*-?\d+)+", gold) and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", gold)
    return [part.strip() for part in gold.split(",")] if is_list else []


def _lists(gold: str) -> dict[str, str]:
    if re.fullmatch(r"[^{]*\\pm.*", gold):
        return {"\\pm written out": ", ".join(gold.replace("\\pm", sign) for sign in "+-")}
    parts = _list(gold)
    if not parts:
        return {}
    head = ", ".join(parts[:-1])
    return {
        "… and …": f"{head} \\text{{ and }} {parts[-1]}",
        "…, and …": f"{head}, \\text{{ and }} {parts[-1]}",
        "x = … or x = …": " \\text{ or } ".join(f"x = {part}" for part in parts),
        "list, the other way": ", ".join(parts[::-1]),
        "\\{…\\}": f"\\{{{', '.join(parts)}\\}}",
    }


def _equations(gold: str) -> dict[str, str]:
    found = re.fullmatch(r"([^=]+)=([^=]+)", gold)
    if found is None:
        return {}
    left, right = found.groups()
    return {
        "sides swapped": f"{right} = {left}",
        "all on one side": f"{left} - ({right}) = 0",
        "doubled": f"2({left}) = 2({right})",
    }


def neighbours(gold: str, asked: str) -> dict[str, str]:
    """Answers near to the gold one that mean something else."""
    said = _other_digits(gold) | _other_values(gold) | _other_structures(gold) | _other_kinds(gold)
    return said | _modified(gold, asked)


# What changes a number, by kind: relations, lists, algebra, negations.
_MODIFIERS = (
    r"\ge {}", "x > {}", r"\neq {}", r"\not= {}", r"\text{{less than }} {}", r"\text{{not }} {}",
    r"\text{{anything but }} {}",
    "{} + x", "{} + C", "({}, 77777)", r"\pm {} \pm 1", r"{} \text{{ to }} 77777", r"{} \text{{ or perhaps }} 77777",
    r"{} \text{{ and a half}}", "{}, {}, 77777",
)  # fmt: skip
_MULTIPLES = (
    r"{} \pi", "{} k", r"{} \text{{ dozen}}", r"{} \text{{ hundredths}}", r"{} \text{{ ten-thousandths}}",
    r"\text{{half of }} {}",
    r"\text{{a multiple of }} {}", r"{} \text{{ times }} x", r"{} \text{{ doubled}}", r"{} \mathrm{{i}}",
    r"2 \cdot {}", "{} : 5",
)  # fmt: skip
# Signs that change a number unless the question is about such.
_SIGNS = {
    r"percent|\\%|%": (r"{}\%", r"{} \text{{ percent}}", r"{}\text{{%}}"),
    r"degree|circ|angle|arc|triang|sin|cos|tan|theta|rotat|°": (r"{}^\circ", r"{} \text{{ degrees}}"),
    r"remainder|mod|congruen|residue|clock|divi|inverse|digit": (r"{} \pmod{{7}}", r"{} \text{{ (mod }} 9)"),
}


def _modified(gold: str, asked: str) -> dict[str, str]:
    if not re.fullmatch(r"\d+|\\d?frac\{\d+\}\{\d+\}", gold):
        return {}
    chosen = [*_MODIFIERS]
    if gold != "0":
        chosen += _MULTIPLES
        chosen += [form for words, forms in _SIGNS.items() if not re.search(words, asked.lower()) for form in forms]
    if gold not in ("0", "1"):
        chosen.append(r"{} \text{{ squared}}")
    return {form.format("X", "X"): form.format(gold, gold) for form in chosen}


def wrong(gold: str) -> str:
    """Some wrong answer like the gold one."""
    return next(iter(neighbours(gold, "").values()))


def _other_digits(gold: str) -> dict[str, str]:
    said = {}
    places = [found.start() for found in re.finditer(r"\d", gold) if gold[found.start() - 1 : found.start()] != "_"]
    for name, place in (("first digit", places[0]), ("last digit", places[-1])) if places else ():
        changed = gold[:place] + str(int(gold[place]) % 9 + 1) + gold[place + 1 :]
        said[name] = changed
    return said


def _other_values(gold: str) -> dict[str, str]:
    if not _is_scalar(gold) or re.search(r"\$|mbox|circ", gold):
        return {}
    said = {"X + 1": f"{gold} + 1", "2x = X": f"2x = {gold}"}
    if gold != "0":
        said["X or none"] = f"{gold} \\text{{ or none}}"
        said |= {"-(X)": f"-({gold})", "X/2": f"({gold})/2"}
    if gold not in ("0", "1", "-1") and not re.match(r"\d+ ?\\frac", gold):
        said["1/X"] = f"\\frac{{1}}{{{gold}}}"
    if re.fullmatch(r"[1-9]\d*", gold):
        said |= {"0.X": f"0.{gold}", "X_8": f"{gold}_{{8}}", "X \\times 10^{-3}": f"{gold} \\times 10^{{-3}}"}
        said["X to Y"] = f"{gold}, {int(gold) + 3}"
    return said


def _other_structures(gold: str) -> dict[str, str]:
    said = {}
    bounds = re.fullmatch(r"([\[(])(.+),(.+)([\])])", re.sub(r"\\left|\\right", "", gold))
    if bounds is not None and "cup" not in gold:
        opening, one, other, closing = bounds.groups()
        said["and 99"] = f"{gold} \\cup \\{{99\\}}"
        if "-\\infty" not in one:
            said["other bracket"] = f"{'[' if opening == '(' else '('}{one},{other}{closing}"
        if "," not in one and one.strip() != other.strip():
            said["ends swapped"] = f"{opening}{other},{one}{closing}"
    if (pair := _pair(gold)) is not None and pair[0] != pair[1]:
        said["named, swapped"] = f"x = {pair[1]}, y = {pair[0]}"
    if parts := _list(gold):
        said["part of the list"] = parts[0]
        said["one twice"] = f"{gold}, {parts[0]}"
    if "pmatrix" in gold:
        rows = re.sub(r"\\(?:begin|end)\{pmatrix\}", "", gold).split("\\\\")
        said["determinant"] = gold.replace("pmatrix", "vmatrix")
        said["-matrix"] = f"-{gold}"
        said["rows swapped"] = "\\begin{pmatrix}" + "\\\\".join(rows[::-1]) + "\\end{pmatrix}"
        if "&" not in gold:
            said["transposed"] = gold.replace("\\\\", "&")
    if "=" in gold:
        said["other constant"] = f"{gold} + 1"
    return said


def _other_kinds(gold: str) -> dict[str, str]:
    said = {}
    if based := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        digits, base = based.groups()
        said |= {"base left out": digits, "next base": f"{digits}_{{{int(base) + 1}}}"}
        said["value in base ten"] = str(int(digits, int(base)))
    if choice := re.fullmatch(r"\\text\{\((.)\)\}", gold):
        said["other choice"] = f"\\text{{({chr((ord(choice[1]) - 64) % 5 + 65)})}}"
        said["two choices"] = f"(A) \\text{{ or }} ({choice[1]})" if choice[1] != "A" else "(A) \\text{ or } (B)"
    if angle := re.fullmatch(r"(\d+)\^\\circ", gold):
        said["radians"] = f"{angle[1]} \\text{{ radians}}"
    if re.search("inches|cents|cm", gold):
        said["other unit"] = gold.replace("inches", "feet").replace("cents", "dollars").replace("cm", "m")
    if re.fullmatch(r"\\text\{[^{}()]*\}", gold):
        said["other word"] = r"\text{other}"
    if _is_scalar(gold) and re.search(r"[a-z]", re.sub(r"\\[a-z]+", "", gold)):
        said["other letter"] = re.sub(r"(?<!\\)\b([a-hj-z])\b", "w", gold, count=1)
    return {name: text for name, text in said.items() if text != gold}
