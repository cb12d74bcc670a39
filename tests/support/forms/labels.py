"""Forms of SST-2's and CoLA's answers."""


def forms(label: str, other: str, sentence: str) -> dict[str, str]:
    """An answer that commits itself to `label` and not to `other`, in every form."""
    title, against = label.title(), other.title()
    echo = f"Classify the sentence as '{label}' or '{other}'. Answer with one word.\n{title}"
    return {
        "word": label,
        "Word.": f"{title}.",
        "WORD": label.upper(),
        "**Word**": f"**{title}**",
        "'word'": f"'{label}'",
        "- word": f"- {label}",
        "own line": f"\n\n{title}\n",
        "The sentiment is": f"The sentiment of the sentence is {label}.",
        "The answer is:": f"The answer is: {title}",
        "Answer: word": f"Answer: {label}",
        "**Label:** word": f"**Label:** {title}",
        "JSON": f'{{"label": "{label}"}}',
        "JSON, reason first": f'{{"reasoning": "one word is {other}", "label": "{label}"}}',
        "<answer>": f"<answer>{label}</answer>",
        "box": f"\\boxed{{\\text{{{label}}}}}",
        "word, then why": f"{title}. The sentence praises the film, though it has some {other} words.",
        "word, not the other": f"{title}, not {other}.",
        "word, other considered": f"{title}. It could seem {other} at first, but it is not.",
        "other considered, then word": f"At first it seems {other}, but overall the sentence is {label}.",
        "although it contains": f"Although it has {other} words, the sentence is {label}.",
        "Not other": f"Not {other}.",
        "is not other": f"The sentence is not {other}.",
        "isn't other": f"It isn't {other}.",
        "isn’t a other review": f"This isn’t a {other} review.",
        "non-other": f"non-{other}",
        "not at all other": f"It is not at all {other}.",
        "far from other": f"The sentence is far from {other}.",
        "I don't think it is other": f"I don't think this is {other}.",
        "doesn't sound other": f"It doesn't sound {other}.",
        "nothing other here": f"There is nothing {other} here.",
        "not only word": f"It is not only {label} but glowing.",
        "word rather than other": f"The sentence is {label} rather than {other}.",
        "'word' rather than 'other'": f"It would be classified as '{label}' rather than '{other}'.",
        "word instead of other": f"I would say {label} instead of {other}.",
        "more word than other": f"It is more {label} than {other}.",
        "not other, it is word": f"It is not {other}, it is {label}.",
        "echoed question": f"Is the sentence {other} or {label}? It is {label}.",
        "echoed question, the other way": f"Is the sentiment {label} or {other}? {title}.",
        "echoed instruction": echo,
        "echoed instruction, the other way": echo.replace(f"'{label}' or '{other}'", f"'{other}' or '{label}'"),
        "options, then answer": f"The options are {other} and {label}. The answer is {label}.",
        "Other/Word: word": f"{against}/{title}: {label}",
        "thought aloud": f"<think>It may be {other}.</think>{title}",
        "step by step": f"Let's think. The word 'dull' is {other}. The word 'bright' outweighs it. Therefore, the "
        f"sentiment is {label}.",
        "corrected": f"The sentiment is {other}. Wait, no. The sentiment is {label}.",
        "I would classify it as": f"I would classify this sentence as {label}.",
        "can be considered": f"This can be considered {label}.",
        "mixed, but overall": f"Mixed, but overall {label}.",
        "next example": f"{title}\n\nSentence: a dull film\nAnswer: {against}",
        "next instruction": f"{title}\n\n### Instruction:\nClassify it.\nSentence: x\n\n### Response: {against}",
        "special token": f"{title}</s>",
        "sentence quoted": f"The sentence '{sentence}' is {label}.",
        "sentence repeated": f"Sentence: {sentence}\nAnswer: {label}",
        "word (not other)": f"{title} (the tone is not {other})",
        "clearly word": f"The review is clearly {label}.",
        "very word": f"very {label}",
        "reason on the next line": f"Classification: {title}\nReason: It has a slightly {other} ring, no more.",
        "answer, although": f"The answer is {label}, although it has {other} words.",
        "leans": f"While some words sound {other}, the text leans {label}.",
        "would be word instead of other": f"The correct label would be {label} instead of {other}.",
        "ticked": f"- [x] {label}\n- [ ] {other}",
        "percent": f"{title}: 92%, {against}: 8%",
        "wait": f"{against}.\n\nWait, reading again, it is {label}.",
        "anything but other": f"This is anything but {other}.",
        "other would be wrong": f"Calling it {other} would be wrong.",
        "I doubt": f"I doubt that it is {other}.",
        "Harmony's channels": f"<|channel|>analysis<|message|>{other}?<|end|><|start|>assistant<|channel|>final"
        f"<|message|>{title}<|return|>",
        "a word statement": f"This is a {label} statement.",
    }


def unclear(label: str, other: str) -> dict[str, str]:
    """Answers that settle on neither."""
    return {
        "Neither.": "Neither.",
        "neither … nor": f"It is neither {label} nor {other}.",
        "neither clearly … nor": f"The sentence is neither clearly {label} nor clearly {other}.",
        "Neutral": "Neutral",
        "mixed": "The sentiment is mixed.",
        "both": f"Both {label} and {other}.",
        "or": f"{label.title()} or {other}.",
        "slash": f"{label}/{other}",
        "even shares": f"50% {label}, 50% {other}",
        "question": f"Is it {label} or {other}?",
        "cannot determine": f"I cannot determine whether it is {label} or {other}.",
        "not necessarily": f"It is not necessarily {label}.",
        "could be either": f"It could be {label}, it could be {other}.",
        "neutral, not … or": f"Neutral: not {label} or {other}.",
    }


def silent() -> dict[str, str]:
    """Answers that name no label."""
    return {"nothing": "", "other words": "A film about trains.", "part of a word": "positively acceptableness"}
