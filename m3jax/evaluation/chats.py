"""Conversations as a model's own chat template puts them, within bounds: a template is a program of a stranger."""

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from m3jax.documents import failing_plainly
from m3jax.errors import M3Error

_MEND = "mend it, or choose another prompt with --template"
_MOST_STEPS = 1_000_000  # lines of Python that a template may take; published ones take some thousands
_STEPS_TO_COMPILE = 200  # and for each of its letters when it is new; measured: 73
_MOST_MEMORY = 1 << 18  # KiB by which it may make the process grow
_LARGEST_NUMBER = 1_000_000
_EVERY = 64  # steps from one look at the memory to the next


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
    """A conversation as text.

    Transformers renders in a sandbox that keeps templates from Python's objects; here they are also kept from taking
    time and memory without end.

    Args:
        tokenizer: Of transformers, with a chat template.
        messages: What was said, with "role" and "content".
        **options: For `apply_chat_template`.

    Raises:
        M3Error: The template refuses the conversation, fails, or takes too much.
    """
    texts = _texts(getattr(tokenizer, "chat_template", None))
    for text in texts:
        _check_numbers(text)
    steps = _MOST_STEPS + _STEPS_TO_COMPILE * sum(map(len, texts))
    with failing_plainly("the model's chat template fails", _MEND), _bounded(steps):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _texts(template: Any) -> list[str]:
    """A tokenizer's template, or all of those that have names."""
    found = template.values() if isinstance(template, dict) else [template]
    return [text for text in found if isinstance(text, str)]


def _check_numbers(text: str) -> None:
    """Raise M3Error where a single step of a template could take without end: powers, and products of large numbers."""
    from jinja2 import Environment

    with failing_plainly("the model's chat template is no Jinja text", _MEND):
        tokens = list(Environment().lex(text))
    for line, kind, word in tokens:
        large = kind == "integer" and (len(word) > 99 or int(word.replace("_", ""), 0) > _LARGEST_NUMBER)
        if large or (kind == "operator" and word == "**"):
            said = f"the model's chat template reckons with {word:.20} in line {line}"
            raise M3Error(f"{said}, which could not end: {_MEND}")


@contextmanager
def _bounded(most_steps: int) -> Iterator[None]:
    """Counts what Python does meanwhile, line by line, and raises TimeoutError or MemoryError at the bounds."""
    steps, most = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + _MOST_MEMORY

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > most_steps:
            raise TimeoutError(f"more than {most_steps:,} steps")
        if steps % _EVERY == 0 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most:
            raise MemoryError("more memory than any conversation")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
