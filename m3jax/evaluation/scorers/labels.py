"""Class names in what a model wrote."""

import re
from collections.abc import Sequence


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The first label named in the text, as a whole word; "not" before one of two labels names the other.

    Args:
        text: What the model wrote.
        labels: The labels' words.

    Returns:
        The label, or None where the text names none.

    Example:
        >>> parse_label("The sentiment is **Positive**.", ("negative", "positive"))
        'positive'
        >>> parse_label("Not acceptable", ("unacceptable", "acceptable"))
        'unacceptable'
    """
    words = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    found = re.search(rf"(?P<negated>\b(?:not|isn['’]t)\s+(?:an?\s+)?)?\b(?P<label>{words})\b", text, re.IGNORECASE)
    if found is None:
        return None
    label = next(label for label in labels if label.lower() == found["label"].lower())
    if found["negated"] is not None and len(labels) == 2:
        return labels[1 - list(labels).index(label)]
    return label
