"""Merges that are interrupted after they have finished a file, which another thread than the one that is told does."""

import time
from collections.abc import Callable
from pathlib import Path

from m3jax.progress import Progress

_PATIENCE = 60.0  # seconds: the machine may be busy


def interruption(staging: Path, share: float, stage: str = "merging") -> Callable[[Progress], None]:
    """A callback that interrupts a merge beyond that share of a stage, once one of its files is finished.

    Args:
        staging: Where the merge keeps what is not published yet.
        share: Of the stage's bytes.
        stage: Its label.
    """

    def interrupt(step: Progress) -> None:
        if step.stage == stage and step.done > share * step.total:
            _wait_for_a_file(staging)
            raise KeyboardInterrupt

    return interrupt


def _wait_for_a_file(staging: Path) -> None:
    """Until the thread that writes has finished a file, and said so in the journal behind its first line."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if any(len(journal.read_text().splitlines()) > 1 for journal in staging.glob("m3jax-journal*.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError("no file was finished within a minute")
