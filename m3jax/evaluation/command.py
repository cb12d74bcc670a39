"""What `m3jax evaluate` does: load a model, run a task or the harness's tasks, say what came out."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

from m3jax.checkpoints import digest_checkpoint, digest_tensor, locate_model, open_safetensors
from m3jax.errors import M3Error
from m3jax.evaluation.harness import run_harness
from m3jax.evaluation.prompts import TEMPLATE_NAMES
from m3jax.evaluation.runner import evaluate_named
from m3jax.evaluation.tasks import Execution, get_task

_SECONDS_BETWEEN_LINES = 3.0
OVERFLOWS = ("error", "truncate", "skip")
DTYPES = ("float32", "bfloat16", "float16")

Tell = Callable[[str], None]


class Wanted(NamedTuple):
    """The options of the command, as its help describes them."""

    task: str | None
    data: str | None
    harness: str | None
    include_path: str | None
    out: Path | None
    resume: bool
    limit: int | None
    batch_size: int
    max_tokens: int | None
    template: str | None
    overflow: str
    dtype: str | None
    mesh: str | None
    run_code: bool
    allow_unsandboxed: bool


def check(wanted: Wanted) -> None:
    """Raise M3Error for options that cannot be followed, before anything heavy is loaded."""
    if (wanted.task is None) == (wanted.harness is None):
        raise M3Error("give either --task NAME or --harness TASKS")
    if wanted.task is not None:
        get_task(wanted.task)
    for option, value, known in (
        ("--overflow", wanted.overflow, OVERFLOWS),
        ("--template", wanted.template, TEMPLATE_NAMES),
        ("--dtype", wanted.dtype, DTYPES),
    ):
        if value is not None and value not in known:
            raise M3Error(f"{option} is {value!r}, but must be one of {', '.join(known)}")
    for option, number in (
        ("--limit", wanted.limit),
        ("--max-tokens", wanted.max_tokens),
        ("--batch-size", wanted.batch_size),
    ):
        if number is not None and number < 1:
            raise M3Error(f"{option} is {number}, but must be at least 1")
    if wanted.harness is not None:
        idle: dict[str, object] = {
            "--data": wanted.data,
            "--template": wanted.template,
            "--max-tokens": wanted.max_tokens,
        }
        idle |= {"--resume": wanted.resume, "--run-code": wanted.run_code, "--overflow": wanted.overflow != "error"}
        for option, given in idle.items():
            if given:
                raise M3Error(f"{option} has no meaning with --harness, whose tasks bring their own: leave it out")
        if not [task for task in wanted.harness.split(",") if task.strip()]:
            raise M3Error("--harness names no task: write such as --harness arc_easy,hellaswag")
    if wanted.resume and wanted.out is None:
        raise M3Error("--resume needs --out DIR, the directory of the run to go on with")


def run(name: str, wanted: Wanted, tell: Tell | None) -> dict[str, Any]:
    """Load and evaluate.

    Args:
        name: The model.
        wanted: What is asked for.
        tell: Told in lines how far the work is.

    Returns:
        The summary, or the harness's results, as plain data.
    """
    from m3jax.evaluation import models

    model = models.load_model(name, wanted.dtype, models.make_mesh(wanted.mesh) if wanted.mesh else None)
    if wanted.harness is not None:
        tasks = [task.strip() for task in wanted.harness.split(",") if task.strip()]
        cuts: Counter[str] = Counter()
        told = models.harness_model(model, cuts, wanted.batch_size, tell)
        results = run_harness(told, tasks, include_path=wanted.include_path, limit=wanted.limit)
        outcome = {"model": name, "harness": results.get("results", {}), "cut": dict(cuts)}
        if wanted.out is not None:
            wanted.out.mkdir(parents=True, exist_ok=True)
            (wanted.out / "harness.json").write_text(json.dumps(outcome, indent=2, default=str) + "\n")
        return outcome
    task = get_task(cast(str, wanted.task))
    overflow = cast(models.Overflow, wanted.overflow)
    settings = task.settings if wanted.max_tokens is None else task.settings._replace(max_tokens=wanted.max_tokens)
    summary = evaluate_named(
        task.name,
        wanted.data,
        models.make_generator(model, overflow, tell, wanted.batch_size),
        out_dir=wanted.out,
        model=name,
        fingerprint="" if wanted.out is None else models.fingerprint(model, overflow, _weights(name)),
        template=wanted.template,
        tokenizer=model.tokenizer,
        settings=settings,
        limit=wanted.limit,
        batch_size=wanted.batch_size,
        resume=wanted.resume,
        run_code=wanted.run_code,
        execution=Execution(allow_unsandboxed=wanted.allow_unsandboxed),
        progress=_reporter(tell),
    )
    return summary._asdict()


def _weights(name: str) -> str:
    """Digest of a model's weights, whatever their division into files."""
    with open_safetensors(locate_model(name).path) as checkpoint:
        infos = checkpoint.tensors.items()
        return digest_checkpoint({n: (i.dtype, i.shape, digest_tensor(checkpoint, n)) for n, i in infos})


def _reporter(tell: Tell | None) -> Callable[[int, int], None] | None:
    """Lines with rate and time left, a few seconds apart."""
    if tell is None:
        return None
    say, state = tell, {"begun": time.monotonic(), "said": -_SECONDS_BETWEEN_LINES, "first": -1.0}

    def report(done: int, total: int) -> None:
        now = time.monotonic()
        if state["first"] < 0:
            state["first"] = done  # what an earlier run did counts in no rate
        fresh, spent = done - state["first"], now - state["begun"]
        if not fresh or (now - state["said"] < _SECONDS_BETWEEN_LINES and done < total):
            return
        state["said"] = now
        rate = fresh / spent
        say(f"{done} of {total} examples, {rate:.2f}/s, {(total - done) / rate:.0f} s left")

    return report


def lines(outcome: dict[str, Any]) -> Iterable[str]:
    """The outcome for people."""
    if "harness" in outcome:
        for task, metrics in outcome["harness"].items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    yield f"{task:32} {metric:24} {value:.4f}"
        for what, number in outcome["cut"].items():
            if number:
                yield f"{number} {what} cut to fit the context"
        return
    if outcome["accuracy"] is not None:
        low, high = outcome["interval"]
        yield (
            f"{outcome['task']}: {outcome['accuracy']:.1%} ({outcome['correct']} of {outcome['judged']}), "
            f"95 % interval {low:.1%} to {high:.1%}"
        )
    else:
        yield f"{outcome['task']}: {outcome['examples']} examples, judged elsewhere"
    if outcome["correlation"] is not None:
        yield f"Matthews correlation {outcome['correlation']:.3f}"
    counted = [("unparsed", "no answer found"), ("truncated", "cut at the token limit")]
    counted += [("prompts_truncated", "prompts cut"), ("skipped", "prompts skipped")]
    said = [f"{outcome[key]} {words}" for key, words in counted if outcome[key]]
    if said:
        yield ", ".join(said)
    if outcome["answers"]:
        yield f"answers in {outcome['answers']}"
