"""What of a completion is its answer: without thinking aloud, special tokens, and exercises of the model's own."""

import itertools
import re

_SPECIAL = re.compile(
    r"<\|(?:im_end|end|eot_id|endoftext|end_of_text|eom_id|begin_of_text)\|>|</?s>|<pad>|<(?:bos|eos)>|<(?:end|start)_of_turn>"
)
_THOUGHT = re.compile(
    r"<(?P<tag>think|thinking|thought|reasoning|scratchpad)>.*?</(?P=tag)>|\A.*?</(?:think|thinking)>", re.DOTALL
)
_NEXT = re.compile(
    r"^[ \t]*(?:\#{1,6}[ \t]*|\*\*|__|<\|?|\[)?[ \t]*"
    r"(?:(?:new |next |another |following )?(?:question|problem|instruction|exercise|input|sentence|review|user|human"
    r"|inst|im_start|start_header_id)\b[ \t]*\#?\d*|Q\d*)[ \t]*(?:\*\*|__)?[ \t]*(?:[:.\]>]|\|>)",
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
