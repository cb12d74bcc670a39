"""Stored models on a task, or on the harness's tasks: what `m3jax evaluate` does, from its options to plain data."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from m3jax.errors import M3Error
from m3jax.evaluation.checks import check_choice
from m3jax.evaluation.harness import Showing, check_chat, check_showing, run_harness
from m3jax.evaluation.harness_tasks import load_harness_tasks
from m3jax.evaluation.options import Evaluation, check_evaluation
from m3jax.evaluation.ownership import PART
from m3jax.evaluation.protocol import Overflow
from m3jax.evaluation.records import Reply, count_records, make_directory, open_journal, write_whole
from m3jax.evaluation.runner import check_code, evaluate_task, read_examples
from m3jax.evaluation.tasks import PROTOCOLS, get_task
from m3jax.progress import Tell, progress_lines

if TYPE_CHECKING:
    from m3jax.evaluation.models import StoredModel

_HARNESS_FILE = "harness.json"


class EvaluateOptions(NamedTuple):
    """The options of `m3jax evaluate`, as its help describes them."""

    task: str | None
    data: str | None
    harness: str | None
    include_path: str | None
    showing: Showing
    allow_task_code: bool
    profile: str
    out: Path | None
    resume: bool
    how: Evaluation
    dtype: str | None
    mesh: str | None
    config: str | None = None


def check(wanted: EvaluateOptions) -> None:
    """Raise M3Error for options that cannot be followed, before anything heavy is loaded."""
    if (wanted.task is None) == (wanted.harness is None):
        raise M3Error("give either --task NAME or --harness TASKS")
    check_evaluation(wanted.how, wanted.dtype)
    check_choice("--profile", wanted.profile, PROTOCOLS)
    if wanted.resume and wanted.out is None:
        raise M3Error("--resume needs --out DIR, the directory of the run to go on with")
    if wanted.task is not None:
        _check_task(wanted.task, wanted)
    else:
        _check_harness(wanted)


def _check_task(name: str, wanted: EvaluateOptions) -> None:
    task = get_task(name, wanted.how.grader, wanted.profile)
    showing = wanted.showing
    idle: dict[str, object] = {"--include-path": wanted.include_path, "--allow-task-code": wanted.allow_task_code}
    idle |= {"--num-fewshot": showing.shots is not None, "--apply-chat-template": showing.chat}
    idle |= {"--system-instruction": showing.system, "--fewshot-in-one-turn": not showing.multiturn}
    for option, given in idle.items():
        if given:
            other = ": give --template chat" if option == "--apply-chat-template" else ": leave it out"
            raise M3Error(f"{option} is for --harness{other}")
    if task.judged_elsewhere and wanted.out is None:
        raise M3Error(f"{name} is judged elsewhere, so its answers must be kept: give --out DIR")
    check_code(task, wanted.how.run_code, wanted.how.execution)


def _check_harness(wanted: EvaluateOptions) -> None:
    how = wanted.how
    idle: dict[str, object] = {"--data": wanted.data, "--template": how.template, "--max-tokens": how.max_tokens}
    idle |= {"--run-code": how.run_code, "--overflow": how.overflow != "error"}
    idle |= {"--allow-unsandboxed": how.allow_unsandboxed, "--grader": how.grader}
    idle |= {"--profile": wanted.profile != "m3jax"}
    for option, given in idle.items():
        if given:
            raise M3Error(f"{option} has no meaning with --harness, whose tasks bring their own: leave it out")
    check_showing(wanted.showing)
    if wanted.showing.chat is False and wanted.showing.multiturn is False:
        raise M3Error("--fewshot-in-one-turn is for --apply-chat-template: add that, or leave it out")
    if not _harness_names(wanted):
        raise M3Error("--harness names no task: write such as --harness arc_easy,hellaswag")


def run(name: str, wanted: EvaluateOptions, tell: Tell | None) -> dict[str, Any]:
    """Load and evaluate; weights come last, when all else is known to be right.

    Args:
        name: The model.
        wanted: What is asked for.
        tell: Told in lines how far the work is.

    Returns:
        The summary, or the harness's results, as plain data.

    Raises:
        M3Error: The model, the data or the output directory cannot be used.
    """
    return _run_task(name, wanted, tell) if wanted.harness is None else _run_harness(name, wanted, tell)


def _open(name: str, wanted: EvaluateOptions) -> "StoredModel":
    from m3jax.evaluation import models  # JAX starts when all else is known to be right

    return models.open_model(name, wanted.dtype, models.make_mesh(wanted.mesh), wanted.config)


def _run_task(name: str, wanted: EvaluateOptions, tell: Tell | None) -> dict[str, Any]:
    task, how = get_task(cast(str, wanted.task), wanted.how.grader, wanted.profile), wanted.how
    overflow = cast(Overflow, how.overflow)
    examples = read_examples(task, wanted.data)
    from m3jax.evaluation import models

    stored = _open(name, wanted)
    try:
        summary = evaluate_task(
            task,
            examples,
            models.deferred(lambda: models.make_generator(stored.load(tell), overflow, tell, how.batch_size)),
            out_dir=wanted.out,
            model=name,
            fingerprint=lambda: stored.fingerprint(overflow),
            template=how.template,
            tokenizer=stored.tokenizer,
            settings=how.settings(task),
            limit=how.limit,
            batch_size=how.batch_size,
            resume=wanted.resume,
            run_code=how.run_code,
            execution=how.execution,
            progress=progress_lines(tell),
            check=lambda prompts, settings: models.check_prompts(stored, prompts, settings, overflow),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(wanted.out, "examples")) from None
    return summary._asdict()


def _kept(out: Path | None, what: str) -> str:
    """What an interruption leaves."""
    number = 0 if out is None else count_records(out)
    if number:
        return f"{number} {what} are in {out}, and the same command with --resume goes on"
    return "nothing is kept" + ("; with --out DIR it would be" if out is None else "")


def _run_harness(name: str, wanted: EvaluateOptions, tell: Tell | None) -> dict[str, Any]:
    if wanted.out is not None:
        if (make_directory(wanted.out) / _HARNESS_FILE).exists() and not wanted.resume:
            raise M3Error(f"{wanted.out / _HARNESS_FILE} is already there: give another output directory, or --resume")
        write_whole(wanted.out / f"{_HARNESS_FILE}{PART}", "")  # better now than when the work is done
        (wanted.out / f"{_HARNESS_FILE}{PART}").unlink()
    tasks = load_harness_tasks(_harness_names(wanted), wanted.include_path, tell, wanted.allow_task_code)
    from m3jax.evaluation import models

    stored = _open(name, wanted)
    if wanted.showing.chat:
        check_chat(stored.tokenizer)
    journal = None
    if wanted.out is not None:
        identity = {"model": name, "harness": list(tasks.names), **wanted.showing._asdict(), "limit": wanted.how.limit}
        journal = open_journal(wanted.out, identity, wanted.resume, lambda: stored.fingerprint("truncate"), Reply)
    cuts: Counter[str] = Counter()
    try:
        adapter = models.harness_model(stored.load(tell), cuts, wanted.how.batch_size, tell, journal)
        results = run_harness(adapter, tasks, limit=wanted.how.limit, showing=wanted.showing, tell=tell)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(wanted.out, "requests")) from None
    outcome = {
        "model": name,
        "harness": _plain(results.get("results", {})),
        "shown": {**wanted.showing._asdict(), "shots": _plain(results.get("n-shot", {}))},
        "cut": dict(cuts),
    }
    if journal is not None:
        journal.finish(outcome, _HARNESS_FILE)
    return outcome


def _harness_names(wanted: EvaluateOptions) -> list[str]:
    return [task.strip() for task in (wanted.harness or "").split(",") if task.strip()]


def _plain(value: Any) -> Any:
    """The harness's results as JSON can hold them: other numbers than finite ones, and objects, become their words."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
