"""The program in what a model wrote."""

import ast
import re
import textwrap
import warnings

_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.M | re.S
)
_PYTHON = ("", "python", "python3", "py")
_BEGINS = re.compile(r"^(?:import |from \w+(?:\.\w+)* import |def |class |async def |@)")


def is_python(source: str) -> bool:
    """Whether Python can parse the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stray "\d" is the model's business
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def defines(source: str, name: str) -> bool:
    """Whether the text defines a function or class or assigns a name at its outermost level."""
    pattern = rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*(?::[^=\n]+)?=(?!=)"
    return re.search(pattern, source, re.M) is not None


def extract_code(text: str, name: str | None = None) -> str | None:
    """The Python program in a chat answer.

    Fenced blocks come first: the last one that defines `name` (models that think aloud put the final version last),
    else all Python blocks together. Without a fence, the text from its first import, definition or decorator on, as
    far as it parses.

    Args:
        text: What the model wrote.
        name: The name that the program should define.

    Returns:
        The program, or None where there is none.

    Example:
        >>> extract_code("Sure:\\n```python\\ndef one(): return 1\\n```\\nDone.", "one")
        'def one(): return 1\\n'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    blocks = [textwrap.dedent(found["body"]) for found in _FENCE.finditer(text) if found["language"].lower() in _PYTHON]
    if name is not None:
        defining = [block for block in blocks if defines(block, name)]
        if defining:
            return _with_imports(blocks, defining[-1])
    if blocks:
        return "\n".join(blocks)
    return _unfenced(text)


def _with_imports(blocks: list[str], chosen: str) -> str:
    """The chosen block, with the imports of the blocks before it."""
    before = blocks[: blocks.index(chosen)]
    lines = [line for block in before for line in block.split("\n") if line.startswith(("import ", "from "))]
    lines = [line for line in lines if is_python(line)]
    return "\n".join([*lines, chosen]) if lines else chosen


def _unfenced(text: str) -> str | None:
    lines = text.split("\n")
    if is_python(text) and any(map(_BEGINS.match, lines)):
        return text
    start = next((place for place, line in enumerate(lines) if _BEGINS.match(line)), None)
    if start is None:
        return None
    for end in range(len(lines), start, -1):
        if _may_end(lines, end) and is_python(program := "\n".join(lines[start:end]) + "\n"):
            return program
    return "\n".join(lines[start:])


def _may_end(lines: list[str], end: int) -> bool:
    """Whether a program may end before this line: only where a line of its outermost level begins, or at the end."""
    return end == len(lines) or (lines[end] != "" and not lines[end][0].isspace()) or not lines[end].strip()


def continuation(text: str) -> str:
    """The body that continues a function's header: up to the first line that is no longer indented."""
    lines = text.replace("\r\n", "\n").expandtabs(4).split("\n")
    first = next((place for place, line in enumerate(lines) if line.strip()), len(lines))
    if first < len(lines) and not lines[first][0].isspace():
        lines[first] = "    " + lines[first]  # the prompt's last indentation swallowed the first line's
    end = next(
        (place for place in range(first, len(lines)) if lines[place].strip() and not lines[place][0].isspace()), None
    )
    return "\n".join(lines[:end])
