"""Running a task: prompts to the model, completions to the judge, verdicts to the journal, a summary at the end."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.checks import check_choice, check_count, check_type
from m3jax.evaluation.data import HubSet, Row, load_rows
from m3jax.evaluation.prompts import render
from m3jax.evaluation.protocol import Completion, GenerationSettings, Generator
from m3jax.evaluation.records import Record, RunJournal, digest, open_journal
from m3jax.evaluation.sandbox import UnsandboxedWarning, why_no_sandbox
from m3jax.evaluation.statistics import matthews_correlation, wilson_interval
from m3jax.evaluation.tasks import PROTOCOLS, Example, Execution, Task, get_task
from m3jax.evaluation.tasks.base import Answer
from m3jax.text import count_text

Progress = Callable[[int, int], None]
"""Called with the number of examples done and their total, at the start and after each batch."""


class Summary(NamedTuple):
    """The result of a run.

    Attributes:
        task: Name of the task.
        model: Name of the model.
        examples: Examples of the run.
        judged: Those with a verdict; `accuracy` is over these.
        correct: Those found right.
        accuracy: Share of the judged that is right; None where none was judged.
        interval: Its 95 % interval, by Wilson's score.
        unparsed: Those in which no answer was found; they count as wrong.
        truncated: Those whose completion hit its limit of tokens.
        prompts_truncated: Those whose prompt did not fit and was cut.
        skipped: Those whose prompt did not fit and which were left out of `judged`.
        tokens: Tokens generated.
        correlation: Matthews' correlation, for classification.
        answers: The file written for a judge elsewhere.
        unclear: Those whose answer says no one thing: neither label, a range; they count as wrong, and not as unparsed.
        grader: Whose rule judged.
        protocol: Whose words, settings and limit the task had.
    """

    task: str
    model: str
    examples: int
    judged: int
    correct: int
    accuracy: float | None
    interval: tuple[float, float] | None
    unparsed: int
    truncated: int
    prompts_truncated: int
    skipped: int
    tokens: int
    correlation: float | None
    answers: str | None
    unclear: int = 0
    grader: str = "m3jax"
    protocol: str = "m3jax"


def evaluate_task(
    task: Task,
    examples: Sequence[Example],
    generator: Generator,
    *,
    out_dir: str | Path | None = None,
    model: str = "model",
    fingerprint: str | Callable[[], str] = "",
    template: str | None = None,
    tokenizer: Any = None,
    settings: GenerationSettings | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    resume: bool = False,
    run_code: bool = False,
    execution: Execution | None = None,
    progress: Progress | None = None,
    check: Callable[[Sequence[str], GenerationSettings], None] | None = None,
) -> Summary:
    """Have a model do a task, and judge it.

    Args:
        task: The task.
        examples: Its examples, from `task.read`.
        generator: The model.
        out_dir: Where to write one record per example (`records.jsonl`), `summary.json`, and what a judge elsewhere
            reads; nothing is written without it.
        model: What the model is called in the summary; part of what makes a run the same run.
        fingerprint: Text that identifies what the name does not: weights, dtype, what becomes of long prompts; part of
            what makes a run the same run. A function that gives it is called only where all else agrees.
        template: Name of a prompt template; the task's own if not given.
        tokenizer: For the template "chat".
        settings: How to generate; the task's own if not given.
        limit: Do the first so many examples only; as many as the task says if None.
        batch_size: Prompts given to the model at a time. Prompts of like length go together; verdicts do not depend
            on it as long as the model's completions do not.
        resume: Go on with the run in `out_dir`, if there is one.
        run_code: Allow running programs that the model wrote.
        execution: How they are run; in a sandbox with the default limits if not given.
        progress: Told how far the run is.
        check: Given all prompts before the first is answered; raises M3Error for what cannot be.

    Raises:
        M3Error: The task runs code and `run_code` is false, or no sandbox is possible; an option cannot be followed;
            `out_dir` holds another run or cannot be written; all prompts were skipped, of which nothing is kept.
    """
    execution = execution or Execution()
    check_code(task, run_code, execution)
    check_count("batch size", batch_size)
    check_count("limit", limit, optional=True)
    check_type("settings", settings, GenerationSettings, optional=True)
    template = template or task.template
    settings = settings or task.settings
    examples = list(examples[: task.limit if limit is None else limit])
    if not examples:
        raise M3Error(f"{task.name}: there are no examples to evaluate")
    prompts = [render(template, example.instruction, tokenizer) for example in examples]
    if check is not None:
        check(prompts, settings)
    journal = None
    if out_dir is not None:
        identity = _identity(task, model, template, settings, execution, examples, prompts)
        journal = open_journal(Path(out_dir), identity, resume, lambda: _text(fingerprint), Record)
    done = dict(journal.done) if journal is not None else {}

    if progress is not None:
        progress(len(done), len(examples))
    for records in answered(task, examples, prompts, generator, settings, execution, batch_size, done):
        done |= {record.number: record for record in records}
        if journal is not None:
            journal.add(records)
        if progress is not None:
            progress(len(done), len(examples))
    records = [done[index] for index in sorted(done)]
    if all(record.skipped for record in records):
        if journal is not None:
            journal.discard()
        raise M3Error(
            f"{task.name}: none of {count_text(len(records), 'prompt')} fits in the context of {model}, so all were "
            "skipped and nothing is judged: take a model with a larger context, or --overflow truncate"
        )
    return _concluded(task, model, examples, records, journal)


def answered(
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[str],
    generator: Generator,
    settings: GenerationSettings,
    execution: Execution,
    batch_size: int,
    done: Collection[int] = (),
) -> Iterator[list[Record]]:
    """Has a model answer prompts, batch after batch, and judges what it says.

    Args:
        task: The task.
        examples: Its examples.
        prompts: As the model is shown them.
        generator: The model.
        settings: How to generate.
        execution: How programs are run.
        batch_size: Prompts given to the model at a time; those of like length go together.
        done: Numbers of examples that are left out.
    """
    for batch in _batches(prompts, done, batch_size):
        yield _run_batch(task, batch, examples, prompts, generator, settings, execution)


def evaluate_named(
    name: str,
    source: str | Path | None,
    generator: Generator,
    *,
    grader: str | None = None,
    profile: str = "m3jax",
    max_tokens: int | None = None,
    **options: Any,
) -> Summary:
    """Load a task's test set and evaluate: what the command line does.

    Args:
        name: Name of the task.
        source: A data file, a hub data set, or None for the task's own on the hub.
        generator: The model.
        grader: Whose rule judges: "m3jax", "paper" or "math_verify"; the profile's if None.
        profile: "m3jax", or "m3-paper" for the task as the M³ paper sets it.
        max_tokens: Most tokens of an answer; as the settings say if None.
        **options: As of `evaluate_task`.
    """
    check_choice("profile", profile, PROTOCOLS)
    task = get_task(name, grader, profile)
    check_count("max tokens", max_tokens, optional=True)
    if max_tokens is not None:
        options["settings"] = (options.get("settings") or task.settings)._replace(max_tokens=max_tokens)
    check_code(task, options.get("run_code", False), options.get("execution") or Execution())
    return evaluate_task(task, read_examples(task, source), generator, **options)


def read_examples(task: Task, source: str | Path | None) -> list[Example]:
    """A task's test set.

    Args:
        task: The task.
        source: A data file, a hub data set, or None for the task's own on the hub.

    Raises:
        M3Error: It is not there, or not of this task.
    """
    return task.read(read_rows(task, source))


def read_rows(task: Task, source: str | Path | None) -> list[Row]:
    """A task's test set, as its file has it.

    Args:
        task: The task.
        source: A data file, a hub data set, or None for the task's own on the hub.

    Raises:
        M3Error: It is not there.
    """
    return load_rows(find_source(task, source), task.columns)


def find_source(task: Task, source: str | Path | None) -> str | Path | HubSet:
    """Where a task's test set is: where it is said to be, or else the task's own on the hub.

    Args:
        task: The task.
        source: What was said, if anything.

    Raises:
        M3Error: Nothing was said, and the task has none of its own.
    """
    found = task.hub if source is None else source
    if found is None:
        raise M3Error(f"the task {task.name} needs a data file; give it with --data")
    return found


def check_code(task: Task, run_code: bool, execution: Execution) -> None:
    """Check that what a task runs may be run, and can be.

    Args:
        task: The task.
        run_code: Whether programs that the model wrote may be run.
        execution: How they are run.

    Raises:
        M3Error: The task runs code, and it is not allowed or there is no sandbox for it.
    """
    if not task.runs_code:
        return
    if not run_code:
        raise M3Error(
            f"{task.name} runs programs that the model wrote, which must be allowed: pass --run-code (run_code=True)"
        )
    why_not = why_no_sandbox()
    if why_not is not None and not execution.allow_unsandboxed:
        raise M3Error(
            f"{task.name} runs programs that the model wrote, and this system does not allow a sandbox for them "
            f"({why_not}); pass --allow-unsandboxed to run them with limits only"
        )
    if why_not is not None:
        warnings.warn(UnsandboxedWarning(why_not), stacklevel=1)  # of one place, so that it is said once


def _text(given: str | Callable[[], str]) -> str:
    return given if isinstance(given, str) else given()


def _identity(
    task: Task,
    model: str,
    template: str,
    settings: GenerationSettings,
    execution: Execution,
    examples: Sequence[Example],
    prompts: Sequence[str],
) -> dict[str, Any]:
    """What must agree for two runs to be the same run."""
    data = digest([[example.id, example.gold, dict(example.extra)] for example in examples])
    return {
        "task": task.name,
        "grader": task.grader,
        "model": model,
        "template": template,
        "settings": settings._asdict(),
        "code limits": execution.limits._asdict() if task.runs_code else None,
        "examples": len(examples),
        "data": data,
        "prompts": digest(list(prompts)),
    }


def _batches(prompts: Sequence[str], done: Collection[int], size: int) -> Iterator[list[int]]:
    """Indices of the examples still to do, prompts of like length together, the longest first.

    The longest first, so that what does not fit in memory fails at once.
    """
    left = sorted((index for index in range(len(prompts)) if index not in done), key=lambda index: -len(prompts[index]))
    for start in range(0, len(left), size):
        yield left[start : start + size]


def _run_batch(
    task: Task,
    batch: Sequence[int],
    examples: Sequence[Example],
    prompts: Sequence[str],
    generator: Generator,
    settings: GenerationSettings,
    execution: Execution,
) -> list[Record]:
    completions = list(generator([prompts[index] for index in batch], settings))
    if len(completions) != len(batch):
        raise ValueError(f"the generator answered {len(batch)} prompts with {len(completions)} completions")
    judged = [place for place, completion in enumerate(completions) if not completion.skipped]
    judgements = task.judge(
        [examples[batch[place]] for place in judged], [completions[place].text for place in judged], execution
    )
    verdicts = dict(zip(judged, judgements, strict=True))
    records = []
    for place, index in enumerate(batch):
        example, completion, verdict = examples[index], completions[place], verdicts.get(place)
        records.append(
            Record(
                number=index,
                id=example.id,
                prompt=prompts[index],
                completion=completion.text,
                parsed=verdict.parsed if verdict is not None else None,
                gold=example.gold,
                correct=verdict.correct if verdict is not None else None,
                unparsed=verdict is not None and verdict.parsed is None and not verdict.unclear,
                truncated=_is_truncated(completion),
                prompt_truncated=completion.prompt_truncated,
                skipped=completion.skipped,
                tokens=completion.tokens,
                detail=verdict.detail if verdict is not None else "the prompt does not fit in the model's context",
                unclear=verdict is not None and verdict.unclear,
            )
        )
    return records


def _is_truncated(completion: Completion) -> bool:
    return not completion.finished and not completion.skipped


def _concluded(
    task: Task, model: str, examples: Sequence[Example], records: Sequence[Record], journal: RunJournal[Record] | None
) -> Summary:
    verdicts = [record.correct for record in records if record.correct is not None]
    correct, judged = sum(verdicts), len(verdicts)
    answers = None
    if task.export is not None and journal is not None:
        finished = [
            Answer(examples[record.number], record.completion, record.tokens)
            for record in records
            if not record.skipped
        ]
        answers = str(task.export(finished, model, journal.directory))
    summary = Summary(
        task=task.name,
        model=model,
        examples=len(records),
        judged=judged,
        correct=correct,
        accuracy=correct / judged if judged else None,
        interval=wilson_interval(correct, judged) if judged else None,
        unparsed=sum(record.unparsed for record in records),
        truncated=sum(record.truncated for record in records),
        prompts_truncated=sum(record.prompt_truncated for record in records),
        skipped=sum(record.skipped for record in records),
        tokens=sum(record.tokens for record in records),
        correlation=_correlation(task, records),
        answers=answers,
        unclear=sum(record.unclear for record in records),
        grader=task.grader,
        protocol=task.protocol,
    )
    if journal is not None:
        journal.finish(summary._asdict())
    return summary


def _correlation(task: Task, records: Sequence[Record]) -> float | None:
    if not task.has_correlation:
        return None
    return matthews_correlation([(record.gold, record.parsed) for record in records if record.correct is not None])
