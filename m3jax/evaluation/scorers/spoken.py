"""What of a completion is its answer: without thinking aloud, special tokens, and exercises of the model's own."""

import itertools
import json
import re
from collections.abc import Collection

_SPECIAL = re.compile(
    r"<\|(?:im_end|end|return|eot_id|endoftext|end_of_text|eom_id|begin_of_text)\|>|</?s>|<pad>|<(?:bos|eos)>"
    r"|<(?:end|start)_of_turn>|[\ufeff\u200b]"
)
# Harmony's channels (gpt-oss): all before the last message of the final one is thought.
_CHANNELS = re.compile(r"\A.*<\|channel\|>final[^<]*<\|message\|>", re.DOTALL)
_USERS_TURN = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|start\|>)\s*user\b|<\|user\|>|\[INST\]"
)
_OBJECT = re.compile(
    r"^[ \t]*(?:```(?:json)?[ \t]*\n\s*)?(?P<object>\{.*\})\s*(?:```)?\s*\Z", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_NO_ESCAPE = re.compile(r'\\(?!["\\/bfnrt]|u[\da-fA-F]{4})')
_THOUGHT = re.compile(
    r"<(?P<tag>think|thinking|thought|reasoning|scratchpad)>.*?</(?P=tag)>|\A.*?</(?:think|thinking)>", re.DOTALL
)
_NEXT = re.compile(
    r"^[ \t]*(?:\#{1,6}[ \t]*|\*\*|__|<\|?|\[)?[ \t]*"
    r"(?:(?:new |next |another |following )?(?:question|problem|instruction|exercise|input|sentence|review|user|human"
    r"|inst|im_start|start_header_id)\b[ \t]*\#?\d*|Q\d*)[ \t]*(?:\*\*|__)?[ \t]*(?:[:.\]>]|\|>)"
    r"|^[ \t]*\#{1,6}[ \t]*(?:next\s+|new\s+)?(?:question|problem|exercise)[ \t]*\#?\d+[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_TURN = re.compile(r"(?<=[\s.!?])(?:USER|HUMAN|Human|User):\s")


def spoken(text: str) -> str:
    """The text without what was thought aloud and without special tokens, its line ends those of Unix.

    Example:
        >>> spoken("<think>Is it 4?</think>It is 5.<|im_end|>")
        'It is 5.'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    asked = next(
        (found.start() for found in _USERS_TURN.finditer(text) if _SPECIAL.sub("", text[: found.start()]).strip()), None
    )
    text = _CHANNELS.sub("", text[:asked])
    said = _THOUGHT.sub("", text)
    return _SPECIAL.sub("", said if said.strip() else text)


def turns(text: str) -> list[str]:
    """The text cut where a model goes on with an exercise of its own: "Question: …", "### Instruction", "USER: …".

    Example:
        >>> turns("It is 5.\\n\\nQuestion: And now?\\nIt is 7.")
        ['It is 5.\\n\\n', 'Question: And now?\\nIt is 7.']
    """
    places = sorted({found.start() for pattern in (_NEXT, _TURN) for found in pattern.finditer(text)} - {0})
    bounds = [0, *places, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds) if text[start:end].strip()]


def field(text: str, names: Collection[str]) -> str | None:
    """What a JSON object at the end of a text holds under one of some names.

    Args:
        text: What the model wrote.
        names: The names in lower case; the last of the object's that is among them counts.

    Returns:
        Strings and numbers as they are written; None where there is no such object, or no such name in it.

    Example:
        >>> field('{"why": "3 + 2", "answer": 5}', ("answer",))
        '5'
    """
    written = _OBJECT.search(spoken(text))
    if written is None:
        return None
    for given in (written["object"], _NO_ESCAPE.sub(r"\\\\", written["object"])):  # "\sqrt" is LaTeX, and no JSON
        try:
            found = json.loads(given, strict=False, parse_int=str, parse_float=str)
        except (ValueError, RecursionError):
            continue
        values = [value for name, value in found.items() if name.lower() in names and isinstance(value, str)]
        return values[-1] if values else None
    return None
