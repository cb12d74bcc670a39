"""What `m3jax evaluate` and `m3jax attack` say."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from m3jax.text import count_text, size_text, time_text

if TYPE_CHECKING:
    from m3jax.evaluation.measuring import StatisticsResult

# --- Evaluations -------------------------------------------------------------------------------------------------


def evaluation_lines(outcome: dict[str, Any]) -> Iterator[str]:
    """What came of an evaluation, or of the harness's tasks."""
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


def _harness_lines(outcome: dict[str, Any]) -> Iterator[str]:
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


# --- Attacks -----------------------------------------------------------------------------------------------------


def attack_lines(outcome: dict[str, Any]) -> Iterator[str]:
    """What came of an attack: each attacked prompt below the original."""
    low, high = outcome["interval"]
    yield f"{outcome['task']}: {outcome['accuracy']:.1%} clean, 95 % interval {low:.1%} to {high:.1%}"
    yield f"prompt         {outcome['prompt']!r}"
    if outcome["undefined"] is not None:
        yield f"note: {outcome['undefined']}, so nothing was attacked or shifted; --floor 0 does it all the same"
    for one in outcome["attacks"]:
        ended = ", budget spent" if one["exhausted"] else ""
        if not one["candidates"] and one["drop"]["clean"] > 0 and not one["exhausted"]:
            ended += ", nothing tried: no word has a candidate"
        yield f"{one['attack']:<14} {_drop_text(one['drop'])}; {count_text(one['queries'], 'prompt')} scored{ended}"
        if one["prompt"] != outcome["prompt"]:
            yield f"{'':<14} {one['prompt']!r}"
    for one in outcome["shifts"]:
        yield f"{one['shift']:<14} {_drop_text(one['drop'])}; {count_text(one['changed'], 'example')} changed"


def _drop_text(drop: dict[str, Any]) -> str:
    said = f"{drop['attacked']:.1%} right"
    if drop["pdr"] is None:
        return f"{said}, PDR undefined, as too little was right before"
    low, high = drop["interval"]
    return f"{said}, PDR {drop['pdr']:.3f} (95 % interval {low:.3f} to {high:.3f})"


# --- Statistics --------------------------------------------------------------------------------------------------


def statistics_lines(result: "StatisticsResult") -> Iterator[str]:
    """Measured statistics in a line."""
    place, skipped = shlex.quote(str(result.directory)), f" ({result.skipped} skipped)" if result.skipped else ""
    if result.reused:
        yield f"{place} holds these {result.kind} statistics already: digest {result.digest}"
        return
    yield (
        f"measured {result.kind} statistics of {count_text(result.tensors, 'tensor')} on "
        f"{count_text(result.examples, 'example')}{skipped}, {size_text(result.bytes)}, to {place} in "
        f"{time_text(result.seconds)}: digest {result.digest}"
    )
