"""Lines for people: how far the work is, and what came of it."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from m3jax.console import time_text

if TYPE_CHECKING:
    from m3jax import decoder

Tell = Callable[[str], None]
"""Is given one line of text at a time."""

SECONDS_BETWEEN_LINES = 3.0


def compile_lines(tell: Tell | None) -> "Callable[[decoder.Progress], None] | None":
    """What a decoder reports, as lines about what it compiles.

    Args:
        tell: Told the lines; nothing is reported without it.
    """
    if tell is None:
        return None
    say = tell

    def watch(event: "decoder.Progress") -> None:
        if event.event == "compile":
            say(f"compiling {event.stage} for {event.batch} x {event.length} tokens")

    return watch


def progress_lines(tell: Tell | None, what: str = "examples") -> Callable[[int, int], None] | None:
    """What a run reports, as lines with rate and time left, a few seconds apart.

    Args:
        tell: Told the lines; nothing is reported without it.
        what: What is counted.
    """
    if tell is None:
        return None
    say, state = tell, {"begun": time.monotonic(), "said": time.monotonic(), "first": -1.0}

    def report(done: int, total: int) -> None:
        now = time.monotonic()
        if state["first"] < 0:
            state.update(first=done, begun=now)  # what an earlier run did counts in no rate
            if done:
                say(f"{done} of {total} {what} were done before")
        fresh, spent = done - state["first"], now - state["begun"]
        if not fresh or (now - state["said"] < SECONDS_BETWEEN_LINES and done < total):
            return
        state["said"] = now
        rate = fresh / max(spent, 1e-6)
        left = f", {time_text((total - done) / rate)} left" if done < total else f" in {time_text(spent)}"
        say(f"{done} of {total} {what}, {rate:.2f}/s{left}")

    return report


def outcome_lines(outcome: dict[str, Any]) -> Iterable[str]:
    """The outcome of `command.run`."""
    if "harness" in outcome:
        yield from _harness_lines(outcome)
        return
    if outcome["accuracy"] is not None:
        low, high = outcome["interval"]
        yield (
            f"{outcome['task']}: {outcome['accuracy']:.1%} ({outcome['correct']} of {outcome['judged']}), "
            f"95 % interval {low:.1%} to {high:.1%}"
        )
    elif outcome["answers"]:
        yield f"{outcome['task']}: {outcome['examples']} examples, to be judged elsewhere"
    else:
        yield f"{outcome['task']}: {outcome['examples']} examples, none judged"
    if outcome["correlation"] is not None:
        yield f"Matthews correlation {outcome['correlation']:.3f}"
    counted = [("unparsed", "no answer found"), ("unclear", "unclear"), ("truncated", "cut at the token limit")]
    counted += [("prompts_truncated", "prompts cut"), ("skipped", "prompts skipped")]
    said = [f"{outcome[key]} {words}" for key, words in counted if outcome[key]]
    if said:
        yield ", ".join(said)
    if outcome["answers"]:
        yield f"answers in {outcome['answers']}"


def _harness_lines(outcome: dict[str, Any]) -> Iterable[str]:
    named = [
        (task, metric, value, metrics.get(_error_name(metric)))
        for task, metrics in outcome["harness"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr," not in metric
    ]
    width = max((len(task) for task, *_ in named), default=0)
    for task, metric, value, error in named:
        # The harness writes "metric,filter"; the filter "none" is none.
        shown = metric.removesuffix(",none").replace(",", " ")
        yield f"{task:{width}}  {shown} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
    for what, number in outcome["cut"].items():
        if number:
            yield f"{number} {what} cut to fit the context"


def _error_name(metric: str) -> str:
    """The harness's name of a metric's standard error."""
    name, comma, kept = metric.partition(",")
    return f"{name}_stderr{comma}{kept}"
