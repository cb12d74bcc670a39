"""Answers judged by the package math-verify (Kydlíček, Hugging Face), to compare figures with those of its users."""

import importlib.util
import logging
import threading

_SECONDS = 5
_INSTALL = "pip install 'm3jax[math-verify]'"


def why_no_math_verify() -> str | None:
    """Why answers cannot be judged by math-verify here, as the end of a sentence; None where they can."""
    if importlib.util.find_spec("math_verify") is None:
        return f"needs the package math-verify, which is not installed: {_INSTALL}"
    return None


def verified(text: str, gold: str) -> tuple[bool, str | None]:
    """Whether math-verify finds the gold answer in a completion, with its settings as they come.

    Args:
        text: What the model wrote.
        gold: The right answer, in LaTeX.

    Returns:
        The verdict, and what it read for the answer; None where it read nothing.
    """
    import math_verify  # type: ignore[import-not-found, import-untyped, unused-ignore]

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each text that it cannot read
    # Its time limits are signals, which only the main thread may set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    answer = math_verify.parse(text, parsing_timeout=seconds)
    if not answer:
        return False, None
    right = math_verify.parse(f"${gold}$", parsing_timeout=seconds)
    return bool(math_verify.verify(right, answer, timeout_seconds=seconds)), str(answer[-1])
