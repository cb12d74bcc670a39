"""Forms of GSM8K's answers."""

import re

_STEPS = "Janet's first count is 16 - 3 = 13.\nThen 13 * 4 = 52 and 52 / 2 = 26.\n"
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def forms(gold: str, asked: str) -> dict[str, str]:
    """The number, as the test set writes it, in every form that fits it and the question."""
    number = int(gold.replace(",", ""))
    said = _statements(gold) | _endings(gold) | _run_ons(gold) | _spellings(number, gold) | _thousands(number)
    if _asks_for_percent(asked):
        said["n%"] = f"{_STEPS}The answer is: {gold}%"
    return said


def _asks_for_percent(asked: str) -> bool:
    return re.search(r"%|\bper ?cent", asked) is not None


def _statements(gold: str) -> dict[str, str]:
    return {
        "The answer is: n": f"{_STEPS}The answer is: {gold}",
        "The answer is n. More sentences": f"{_STEPS}The answer is {gold}. I hope it is correct. It took 3 steps.",
        "So the answer is $n per week": f"{_STEPS}So the answer is ${gold} per week, for 7 days.",
        "#### n": f"{_STEPS}#### {gold}",
        "#### n, words after": f"{_STEPS}#### {gold}\n\nI hope this helps! Ask me 2 more questions.",
        "#### before steps": "#### Step 1: Count the 3 eggs\n16 - 3 = 13\n#### Step 2: Multiply by 4\n13 * 4 = 52\n"
        f"The answer is: {gold}\n\n#### Step 3: Check 7 times",
        "#### before numbered headings": f"The answer is: {gold}\n#### 1. Eggs\n13\n#### 2) Muffins\n7",
        "#### headings behind the answer": f"**Answer: {gold}**\n\n#### 5 checks of it\nWe check 5 * 5 = 25.\n"
        "#### Verification\nIt holds for 12.",
        "### Final Answer, next line": f"{_STEPS}### Final Answer\n{gold}",
        "## Final Answer:, blank line, bold": f"{_STEPS}## Final Answer:\n\n**{gold}**\n",
        "### Final Answer:, displayed box": f"{_STEPS}### Final Answer:\n$$\n\\boxed{{{gold}}}\n$$",
        "### Answer, with unit": f"{_STEPS}### Answer\n\n{gold} eggs",
        "**Final Answer**": f"{_STEPS}**Final Answer**\n\n{gold}",
        "**Answer:** n": f"{_STEPS}**Answer:** {gold}",
        "Answer: **n**": f"{_STEPS}Answer: **{gold}**",
        "Answer: a whole sentence": f"{_STEPS}**Answer:** Janet makes **${gold}** every day.",
        "Final Answer: The final answer is $n$.": f"{_STEPS}Final Answer: The final answer is ${gold}$. I hope it is "
        "correct.",
        "**The answer is n.**": f"{_STEPS}**The answer is {gold}.**",
        "The answer is **n dollars**.": f"{_STEPS}The answer is **{gold} dollars**.",
        "box": f"{_STEPS}$\\boxed{{{gold}}}$",
        "displayed box with \\text": f"{_STEPS}\\[\n\\boxed{{{gold}\\text{{ dollars}}}}\n\\]",
        "box with bold and dollar": f"{_STEPS}$\\boxed{{\\textbf{{\\${gold}}}}}$",
        "a box in the middle": f"First $\\boxed{{9999991}}$ eggs. The answer is {gold}.",
        "\\(n\\)": f"{_STEPS}The answer is \\({gold}\\).",
        "\\[n\\] on lines of its own": f"{_STEPS}The answer is:\n\\[\n{gold}\n\\]",
        "The answer is: 9 * 2 = n dollars": f"{_STEPS}The answer is: 9 * 2 = {gold} dollars.",
        "$x = n$": f"{_STEPS}The answer is $x = {gold}$.",
        "The answer to the question is n": f"{_STEPS}The answer to the question is {gold}.",
        "the correct answer should be n": f"{_STEPS}So the correct answer should be {gold} eggs.",
        "aside in brackets": f"{_STEPS}The answer is: {gold} (that is 9 * 2 with 3 left)",
        "because behind": f"{_STEPS}The answer is {gold}, because 16 - 3 - 4 = 9 eggs are sold.",
        "since behind": f"{_STEPS}The answer is {gold} since 9 * 2 = 17 + 1.",
        "talk of answers behind": f"{_STEPS}The answer is {gold}. If the answer is 5 then we had erred. I checked "
        "whether the answer is 6.",
        "denied before": f"The answer is not 5. The answer is {gold}.",
        "corrected": f"The answer is 9999991. Wait, that is wrong. The answer is {gold}.",
        "Ans: n cm": f"{_STEPS}Ans: {gold} cm",
        "Final answer → n": f"{_STEPS}Final answer → {gold}",
        "JSON": f'{{"reasoning": "3 + 4", "answer": {gold.replace(",", "")}}}',
        "JSON in a fence, words": f'```json\n{{"steps": ["3 + 4"], "final_answer": "{gold} dollars"}}\n```',
        "<answer>": f"3 + 4 = 7\n<answer>{gold}</answer>",
        "<b>": f"{_STEPS}The answer is <b>{gold}</b>.",
        "the answer is not … but": f"{_STEPS}The answer is not 9999991 but {gold}.",
        "the answer isn't …; it's": f"{_STEPS}So the answer isn't 9999991; it's {gold}.",
        "Chinese": f"{_STEPS}答案：{gold}",
        "The answer, then, is n": f"{_STEPS}The answer, then, is {gold}.",
        "should therefore be": f"{_STEPS}The answer should therefore be {gold}.",
        "[Answer] n": f"{_STEPS}[Answer] {gold}",
        "n, then why": f"{gold}\n\nExplanation: 16 - 3 = 13, and 13 * 4 = 52.",
        "sums in brackets": f"{_STEPS}The answer is {gold} (16 - 3 = 13, 13 * 4 = 52).",
        "sums behind ;": f"{_STEPS}The answer is {gold}; 28 plus 9 makes that.",
        "more than someone": f"{_STEPS}The answer is {gold} more than Leo has.",
        "n, not m": f"{_STEPS}The answer is {gold}, not 9999991.",
        "row of a table": f"| Step | Value |\n|---|---|\n| 1 | 13 |\n| **Answer** | **{gold}** |",
        "Harmony's channels": "<|channel|>analysis<|message|>The answer is 9999991.<|end|><|start|>assistant"
        f"<|channel|>final<|message|>The answer is {gold}.<|return|>",
    }


def _endings(gold: str) -> dict[str, str]:
    return {
        "n alone": gold,
        "**n** on the last line": f"{_STEPS}\n**{gold}**",
        "### n": f"{_STEPS}### {gold}",
        "last line an equation": f"{_STEPS}Total = 9 * 2 = {gold} dollars",
        "Therefore, one number": f"{_STEPS}Therefore, Janet makes ${gold} every day at the market.",
        "Therefore, bold number": f"{_STEPS}Therefore, with 2 eggs Janet makes **${gold}** every day.",
        "So … = n": f"{_STEPS}So she makes 9 * 2 = ${gold} every day.",
        "aligned equations": f"\\begin{{align*}}\n\\text{{Total}} &= 9 * 2 \\\\\n&= {gold}\n\\end{{align*}}",
        "displayed equation": f"{_STEPS}\\[\n\\text{{Total}} = 9 * 2 = \\textbf{{{gold}}}\n\\]",
        "the total would be": f"After selling 9999991 of them, the total amount would be {gold}.",
        "quotation": f"{_STEPS}\n> **{gold}**",
        "last sentence, unmarked": f"{_STEPS}\nJanet makes ${gold} every day at the market.",
    }


def _run_ons(gold: str) -> dict[str, str]:
    return {
        "thought aloud": f"<think>The answer is 9999991. #### 9999991</think>The answer is {gold}.",
        "run-on Question:": f"{_STEPS}The answer is: {gold}\n\nQuestion: Tom has 3 apples. How many?\n"
        "Answer: He has 3.\nThe answer is: 3",
        "run-on ### Instruction:": f"{_STEPS}#### {gold}\n\n### Instruction:\nTom has 4 apples.\n\n"
        "### Response: The answer is: 4",
        "run-on Q:": f"{_STEPS}The answer is {gold}.\n\nQ: Tom has 3?\nA: The answer is 3.",
        "run-on **Problem 2:**": f"{_STEPS}The answer is {gold}.\n\n**Problem 2:** Tom has 3?\n#### 3",
        "run-on USER:": f"{_STEPS}The answer is {gold}. USER: And Tom's? ASSISTANT: The answer is 3.",
        "question repeated first": f"Question: Janet has 3 eggs. How many?\n\n{_STEPS}The answer is {gold}.",
        "special token": f"{_STEPS}The answer is: {gold}</s>",
    }


def _spellings(number: int, gold: str) -> dict[str, str]:
    said = {
        "n €": f"{gold} €",
        "USD n": f"USD {gold}",
        "US$n": f"US${gold}",
        "$n.00": f"${gold}.00",
        "2n/2": f"{2 * number}/2",
        "\\frac{3n}{3}": f"$\\frac{{{3 * number}}}{{3}}$",
        "scientific, e": f"{number / 10:.12g}e1",
        "scientific, × 10^2": f"${number / 100:.12g} \\times 10^{{2}}$",
        "n ≈ n.0": f"{gold} ≈ {gold}.0",
        "plain \\text": f"$\\text{{{gold}}}$",
    }
    if number > 1:
        said["mixed number"] = f"{number - 1} 2/2"
    if 0 <= number < 10**6:
        said["in words"] = in_words(number)
    return {name: f"{_STEPS}The answer is: {text}" for name, text in said.items()}


def _thousands(number: int) -> dict[str, str]:
    if abs(number) < 1000:
        return {}
    marks = {"comma": ",", "space": " ", "thin space": "\u202f", "LaTeX space": "\\,", "\\!": ",\\!", "apostrophe": "'"}
    marks |= {"braced comma": "{,}", "underscore": "_"}
    said = {f"thousands by {name}": f"{number:,}".replace(",", mark) for name, mark in marks.items()}
    said["n thousand"] = f"{number / 1000:.12g} thousand dollars"
    if abs(number) >= 10**6:
        said["n million"] = f"{number / 10**6:.12g} million"
    return {name: f"{_STEPS}The answer is: {text}" for name, text in said.items()}


def in_words(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{_ONES[number // 100]} hundred" + (f" and {in_words(number % 100)}" if number % 100 else "")
    return f"{in_words(number // 1000)} thousand" + (f" {in_words(number % 1000)}" if number % 1000 else "")


def other(gold: str) -> str:
    """The next number, written as the gold one is."""
    return f"{int(gold.replace(',', '')) + 1:,}" if "," in gold else str(int(gold) + 1)


def neighbours(gold: str, asked: str) -> dict[str, str]:
    """Completions that state something else, in whose words the right number stands."""
    said = {name: f"{_STEPS}The answer is {text}." for name, text in _modified(gold, asked).items()}
    return _neighbours(gold) | said


def _neighbours(gold: str) -> dict[str, str]:
    plain = gold.replace(",", "")
    number = int(plain)
    said = {
        "range n-m": f"{gold}-{number + 3}.",
        "range n – m": f"{gold} – {number + 3}.",
        "range n to m": f"{gold} to {number + 3} dollars.",
        "range l to n": f"{number - 3} to {gold} dollars.",
        "between n and m": f"between {gold} and {number + 3}.",
        "between l and n": f"between {number - 3} and {gold}.",
        "n or m": f"{gold} or {number + 3}.",
        "m or n": f"{number + 3} or {gold}.",
        "n and m": f"{gold} and {number + 3}.",
        "more than n": f"more than {gold}.",
        "not n": f"not {gold}.",
        "n.5": f"{plain}.5",
        "n 1/2": f"{gold} 1/2",
        "n + 1 =": f"{gold} + 1 = {number + 1}",
        "m, not n": f"{number + 7}, not {gold}.",
        "m (not n)": f"{number + 7} (not {gold})",
        "n ± 2": f"{gold} ± 2",
        "n hours and 20 minutes": f"{gold} hours and 20 minutes.",
        "n dollars and 50 cents": f"{gold} dollars and 50 cents.",
        "ratio n:m": f"{gold}:{number + 1}.",
    }
    if number:
        said |= {
            "10 n": f"{number * 10}",
            "-n": f"{-number}",
            "n million": f"{gold} million.",
            "n thousand": f"{gold} thousand dollars.",
            "$nk": f"${gold}k.",
            "n/2": f"{gold}/2",
            "half of n": f"half of {gold}.",
            "twice n": f"twice {gold}.",
            "not equal to n": f"$x \\neq {gold}$",
            "n * 2": f"{gold} * 2",
            "ne3": f"{plain}e3",
            "n × 10^3": f"${plain} \\times 10^3$",
        }
    if number > 1:
        said["root"] = f"$\\sqrt{{{gold}}}$"
    return {name: f"{_STEPS}The answer is {text}" for name, text in said.items()} | {
        "> n in a box": f"$\\boxed{{> {gold}}}$",
        "not n but m": f"{_STEPS}The answer is not {gold} but {number + 7}.",
        "user's next turn": f"The answer is {number + 7}.<|im_end|>\n<|im_start|>user\nAgain?\nThe answer is {gold}.",
        "n only in the steps": f"16 + 2 = {gold}\nThe answer is: {number + 7}",
        "n only in a heading": f"The answer is: {number + 7}\n#### Step {gold}: check",
        "n in the next exercise": f"{_STEPS}The answer is: {number + 7}\n\nQuestion: Tom?\nThe answer is: {gold}",
        "n only thought": f"<think>The answer is {gold}.</think>The answer is {number + 7}.",
        "if the answer is n": f"If the answer is {gold}, we erred. The answer is {number + 7}.",
    }


# What changes a number, by kind: bounds, parts, multiples, algebra, negations, remainders.
_MODIFIERS = (
    "fewer than {}", "one more than {}", "nearly {}", "just under {}", "in excess of {}", "{}-ish", "anything but {}",
    "never {}", "{} seats and a half", "nothing like {}", "capped at {}", "{} or even more", "north of {}",
    "upwards of {}", "less than or equal to {}", "{} < x < 9999",
    "{} items, 7 cards", "either {} or 999", "{} or none", "{}:30", "{} and a half hours", "{} and three quarters",
)  # fmt: skip
_ARITHMETIC = (
    "a third of {}", "half the {} seats", "{} twice over", "{} seats, rem. 3", "{} doubled", "{}²", "{}!", "{}b",
    "x + {}", "{} * x", "{}(x+1)", "{} less 4",
    "twice as many as {}", "ten times {}", "{} hundredths", "{} times 3", "{} plus 5", "{} divided by 4", "{}x",
    "{} + x",
    "{} remainder 3", "{}% of 50", "{} more than 20", "{}K", "{} hundred", "{}M dollars",
)  # fmt: skip
_POWERS = ("the square root of {}", "{} squared", "{} cubed", "{} to the power of 3")
_LOWER = (
    "at least {}", "{} upwards", "{} seats at a minimum", "a minimum of {}", "{} items or more", "{}+",
    "no less than {}", "$\\geq {}$", "≥ {}", "{} at least",
)  # fmt: skip
_UPPER = (
    "at most {}", "a maximum of {}", "{} items or fewer", "up to {}", "no more than {}", "$\\leq {}$", "≤ {}",
    "{} tops",
)  # fmt: skip
# Words that change a number unless the question has them itself.
_BY_QUESTION = {
    "{} dozen eggs": "dozen",
    "{} pairs": "pair",
    "{} each": "each|every|per|apiece|average|mean|equally|evenly|one|single|share",
    "{}%": "%|per ?cent",
}


def _modified(gold: str, asked: str) -> dict[str, str]:
    """The number with words that make another quantity of it, unless the question asks for just such a one."""
    low, number = asked.lower(), int(gold.replace(",", ""))
    chosen = [*_MODIFIERS]
    if not re.search("least|minim|fewest|smallest|lowest", low):
        chosen += _LOWER
    if not re.search("most|maxim|largest|greatest|highest|up to", low):
        chosen += _UPPER
    if number:
        chosen += [*_ARITHMETIC, *(form for form, words in _BY_QUESTION.items() if not re.search(words, low))]
    if number > 1:
        chosen += _POWERS
    return {form.format("n"): form.format(gold) for form in chosen}
