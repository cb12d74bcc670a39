"""What long work tells whoever watches it."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from m3jax.text import time_text

SECONDS_BETWEEN_LINES = 3.0

Tell: TypeAlias = Callable[[str], None]
"""Is given one line of text at a time."""


class Progress(NamedTuple):
    """How far a stage of long work has come.

    Attributes:
        stage: What is being done, in a few words.
        done: Bytes gone through so far, or whatever else is counted.
        total: All of them.
        counted: What is counted, in the singular; bytes if empty.
    """

    stage: str
    done: int
    total: int
    counted: str = ""


Watch: TypeAlias = Callable[[Progress], None]
"""Is told how far long work is."""


def progress_lines(tell: Tell | None, what: str = "examples") -> Callable[[int, int], None] | None:
    """What a run reports, as lines with rate and time left, a few seconds apart.

    What is done first has programs compiled, so that the time left is told from what comes after it.

    Args:
        tell: Told the lines; nothing is reported without it.
        what: What is counted.
    """
    if tell is None:
        return None
    say, state = tell, {"begun": time.monotonic(), "said": time.monotonic(), "first": -1.0}
    warm: list[tuple[float, int]] = []  # when the first of this run was done, and how many were then

    def report(done: int, total: int) -> None:
        now = time.monotonic()
        if state["first"] < 0:
            state.update(first=done, begun=now)  # what an earlier run did counts in no rate
            if done:
                say(f"{done} of {total} {what} were done before")
        fresh, spent = done - state["first"], now - state["begun"]
        if fresh and not warm:
            warm.append((now, done))
        if not fresh or (now - state["said"] < SECONDS_BETWEEN_LINES and done < total):
            return
        state["said"] = now
        if done >= total:
            say(f"{done} of {total} {what}, {fresh / max(spent, 1e-6):.2f}/s in {time_text(spent)}")
            return
        since, before = warm[0]
        if done == before:
            say(f"{done} of {total} {what}")
            return
        rate = (done - before) / max(now - since, 1e-6)
        say(f"{done} of {total} {what}, {rate:.2f}/s, {time_text((total - done) / rate)} left")

    return report
