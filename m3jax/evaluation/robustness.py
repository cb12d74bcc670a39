"""How robust a model is: attacks on its prompt and shifts of its inputs, of models in memory and of stored ones."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.evaluation import attack_journal, models
from m3jax.evaluation.attack_journal import FILE
from m3jax.evaluation.attacks import FLOOR, PROFILES, Sources, get_profile, make_attack, read_embeddings
from m3jax.evaluation.attacks.likeness import load_encoder, load_tagger
from m3jax.evaluation.attacks.masked_lm import load_masked_words
from m3jax.evaluation.attacks.trial import AttackPlan, Robustness, attack_task
from m3jax.evaluation.checks import check_choice, check_count, check_type
from m3jax.evaluation.data import Row, source_text
from m3jax.evaluation.options import Evaluation, check_evaluation
from m3jax.evaluation.protocol import GenerationSettings, Overflow
from m3jax.evaluation.records import digest, make_directory, write_whole
from m3jax.evaluation.runner import check_code, find_source, read_rows
from m3jax.evaluation.shifts import make_shift
from m3jax.evaluation.tasks import Execution, Task, get_task
from m3jax.progress import Tell

DEFAULT_ATTACKS = ("deepwordbug", "textbugger", "stresstest", "checklist")  # those that need no further files
BATCH_SIZE = 64
_OVERFLOWS = ("error", "truncate")
# Options of the command that `make_plan` takes as they are.
_PLANNED = ("attacks", "shifts", "profile", "search_examples", "budget", "masked_lm", "embeddings", "encoder")
_LIKENESS = ("tagger", "least_similarity")
_CHOSEN = ("profile", "seed", "search_examples", "budget", "floor", "least_similarity")
_SOURCES = ("masked_lm", "embeddings", "encoder", "tagger")


def make_plan(
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    shifts: Sequence[str] = (),
    profile: str = "promptbench",
    key: Any = 0,
    limit: int | None = None,
    search_examples: int | None = None,
    budget: int | None = None,
    masked_lm: str | None = None,
    embeddings: str | Path | None = None,
    encoder: str | None = None,
    tagger: str | None = None,
    least_similarity: float | None = None,
    task: str | None = None,
    floor: float = FLOOR,
) -> AttackPlan:
    """Checks what is asked for, and reads the attacks' sources; the arguments are those of `attack`.

    Raises:
        M3Error: A name, number, key or file will not do.
    """
    chosen = get_profile(profile)
    attacks, shifts = _listed("attacks", attacks), _listed("shifts", shifts)
    for name, number in (("limit", limit), ("number of search examples", search_examples), ("budget", budget)):
        check_count(name, number, optional=True)
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1:
        raise M3Error(f"the floor of clean accuracy is {floor!r}, but must be a number from 0 on and below 1")
    if not attacks and not shifts:
        raise M3Error("there is nothing to try: name attacks with --attack, shifts with --shift, or both")
    shifted = tuple(make_shift(text) for text in dict.fromkeys(shifts))
    words = threefry.key_words(key)
    if words.shape != (2,):
        raise M3Error(f"the key cannot be used: it is {words.size // 2} keys, of which one is wanted")
    _check_likeness(attacks, encoder, tagger, least_similarity)
    sources = Sources(
        None if masked_lm is None else load_masked_words(masked_lm),
        None if embeddings is None else read_embeddings(embeddings),
        task,
        None if encoder is None else load_encoder(encoder),
        None if tagger is None else load_tagger(tagger),
        least_similarity,
    )
    tried = tuple(make_attack(name, words, chosen, sources) for name in dict.fromkeys(attacks))
    return AttackPlan(tried, shifted, profile, np.asarray(words), limit, search_examples, budget, floor)


def _check_likeness(
    attacks: Sequence[str], encoder: str | None, tagger: str | None, least_similarity: float | None
) -> None:
    """Refuses what would have no effect, before a model is read."""
    encoded = tuple(PROFILES["promptbench"].likeness)
    if encoder is not None and not set(attacks) & set(encoded):
        raise M3Error(f"--encoder has no effect on these attacks: try {', '.join(encoded)}, or leave it out")
    if tagger is not None and "textfooler" not in attacks:
        raise M3Error("--tagger has no effect on these attacks: try textfooler, or leave it out")
    if least_similarity is None:
        return
    if encoder is None:
        raise M3Error("--least-similarity is of a sentence encoder: give one with --encoder MODEL, or leave it out")
    if not -1 <= least_similarity <= 1:
        raise M3Error(f"the least similarity is {least_similarity}: it must be from -1 to 1")


def _listed(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Several names, or one that was given without a list."""
    if not isinstance(names, Iterable):
        raise M3Error(f"{what} is {names!r}, but must be names in a list")
    return (names,) if isinstance(names, str) else tuple(names)


def attack(
    params: Any,
    config: Any,
    tokenizer: Any,
    task: str,
    *,
    data: str | Path | None = None,
    prompt: str | None = None,
    protect: Sequence[str] = (),
    template: str | None = None,
    settings: GenerationSettings | None = None,
    apply_fn: Any = None,
    overflow: Overflow = "error",
    batch_size: int = BATCH_SIZE,
    run_code: bool = False,
    execution: Execution | None = None,
    grader: str | None = None,
    profile: str = "promptbench",
    model: str = "parameters in memory",
    tell: Tell | None = None,
    **plan: Any,
) -> Robustness:
    """Attack the prompt of a model in memory, and shift its inputs.

    Args:
        params: As of `m3jax.evaluate`.
        config: As of `m3jax.evaluate`.
        tokenizer: A transformers tokenizer.
        task: A task's name, as in `m3jax attack --task`.
        data: Its data file, a hub data set, or None for the task's own on the hub.
        prompt: What is attacked, with {content} where the example is to stand; the task's own words if None.
        protect: Words that are never touched, beside the labels.
        template: The template around the prompt; the task's own if None.
        settings: How to generate; the task's own if None.
        apply_fn: A model of your own, as of `m3jax.evaluate`.
        overflow: What becomes of prompts that leave no room for their answer: "error" or "truncate".
        batch_size: Prompts that run together.
        run_code: Allow running programs that the model wrote.
        execution: How they are run.
        grader: Whose rule judges: "m3jax", "paper" or "math_verify"; the profile's if None.
        profile: "promptbench", or "m3-paper" for the whole protocol of the M³ paper.
        model: What the model is called.
        tell: Told in lines how far the work is, such as `print`.
        **plan: `attacks` and `shifts` by name; `key`, an integer seed or a
            threefry2x32 JAX key, of every random choice; `limit`, the first so many examples; `search_examples`, so
            many of which the searches see, to measure on the others; `budget`, the most prompts that an attack may
            score; `floor`, the clean accuracy below which drop rates are undefined and nothing is attacked;
            `masked_lm`, a BERT by path or hub id, for bertattack; `embeddings`, a text file of word vectors, for
            textfooler and textbugger; `encoder`, a sentence encoder, and `tagger`, a tagger of parts of speech, both
            BERTs by path or hub id, which keep prompts near the original; `least_similarity` of the encoder.

    Returns:
        Clean accuracy, and for each attack and shift the accuracy under it and the performance drop rate with its
        interval; the worst prompt of each attack.

    Raises:
        M3Error: The task, the data, an option or the parameters cannot be used.

    Example:
        `m3jax.attack(params, config, tokenizer, "sst2", data="dev.tsv", attacks=["deepwordbug"], key=0)`

    References:
        Zhu et al., PromptBench: Towards Evaluating the Robustness of Large Language Models on Adversarial Prompts,
        2023.
    """
    check_choice("overflow", overflow, _OVERFLOWS)
    check_count("batch size", batch_size)
    check_type("settings", settings, GenerationSettings, optional=True)
    chosen = get_task(task, grader, profile)
    check_code(chosen, run_code, execution or Execution())
    made = make_plan(**plan, profile=profile, task=task)
    load = models.in_memory(params, config, tokenizer, apply_fn, model, tell)
    return attack_task(
        chosen,
        read_rows(chosen, data),
        models.deferred(lambda: models.make_generator(load(), overflow, tell, batch_size)),
        made,
        prompt=prompt,
        protect=_listed("protect", protect),
        template=template,
        tokenizer=tokenizer,
        settings=settings,
        execution=execution,
        model=model,
        tell=tell,
        data=source_text(find_source(chosen, data)),
    )


# --- The command -------------------------------------------------------------------------------------------------


class AttackOptions(NamedTuple):
    """The options of `m3jax attack`, as its help describes them."""

    task: str
    data: str | None
    attacks: tuple[str, ...]
    shifts: tuple[str, ...]
    profile: str
    seed: int
    search_examples: int | None
    budget: int | None
    prompt: str | None
    protect: tuple[str, ...]
    masked_lm: str | None
    embeddings: str | None
    encoder: str | None
    tagger: str | None
    least_similarity: float | None
    floor: float
    out: Path | None
    overwrite: bool
    how: Evaluation
    dtype: str | None
    mesh: str | None
    config: str | None = None
    resume: bool = False


def _check(wanted: AttackOptions) -> None:
    check_evaluation(wanted.how, wanted.dtype, _OVERFLOWS)
    if wanted.resume and wanted.out is None:
        raise M3Error("--resume needs --out DIR, the directory of the attack to go on with")
    if wanted.resume and wanted.overwrite:
        raise M3Error("--resume goes on with what is there, and --overwrite replaces it: leave one of them out")
    if wanted.out is not None:
        attack_journal.check_free(wanted.out, wanted.overwrite, wanted.resume)


def _identity(name: str, wanted: AttackOptions, task: Task, plan: AttackPlan, rows: Sequence[Row]) -> dict[str, Any]:
    """What must agree for two attacks to be the same one, but for the weights."""
    how = wanted.how
    examples = [[one.id, one.instruction, one.gold, dict(one.extra)] for one in task.read(rows)]
    return {
        "task": task.name,
        "grader": task.grader,
        "model": name,
        "attacks": [one.name for one in plan.attacks],
        "shifts": [one.name for one in plan.shifts],
        **{key: getattr(wanted, key) for key in (*_CHOSEN, "prompt", "protect")},
        "limit": how.limit,
        "template": how.template or task.template,
        "settings": how.settings(task)._asdict(),
        "overflow": how.overflow,
        "code limits": how.execution.limits._asdict() if task.runs_code else None,
        "data": digest(examples),
        **{key: attack_journal.source_digest(getattr(wanted, key)) for key in _SOURCES},
    }


def run(name: str, wanted: AttackOptions, tell: Tell | None) -> dict[str, Any]:
    """Load a model and attack it; weights come last, when all else is known to be right.

    Args:
        name: The model.
        wanted: What is asked for.
        tell: Told in lines how far the work is.

    Returns:
        What came out as plain data, as in `attack.json`.

    Raises:
        M3Error: The model, the data, an option or the output directory cannot be used.
    """
    _check(wanted)
    task, how = get_task(wanted.task, wanted.how.grader, wanted.profile), wanted.how
    overflow = cast(Overflow, how.overflow)
    check_code(task, how.run_code, how.execution)
    chosen = {field: getattr(wanted, field) for field in (*_PLANNED, *_LIKENESS, "floor")}
    plan = make_plan(**chosen, key=wanted.seed, limit=how.limit, task=wanted.task)
    rows = read_rows(task, wanted.data)
    stored = models.open_model(name, wanted.dtype, models.make_mesh(wanted.mesh), wanted.config)
    identity, done = None, None
    if wanted.out is not None:
        make_directory(wanted.out)
        told = _identity(name, wanted, task, plan, rows)
        identity, done = attack_journal.read_run(wanted.out, told, lambda: stored.fingerprint(overflow), wanted.resume)
    if done is not None and done.complete:
        return done.to_json()
    with _keeping(wanted.out, identity) as keep:
        found = attack_task(
            task,
            rows,
            models.deferred(lambda: models.make_generator(stored.load(tell), overflow, tell, how.batch_size)),
            plan,
            prompt=wanted.prompt,
            protect=wanted.protect,
            template=how.template,
            tokenizer=stored.tokenizer,
            settings=how.settings(task),
            execution=how.execution,
            model=name,
            tell=tell,
            keep=keep,
            data=source_text(find_source(task, wanted.data)),
            done=done,
        )
    return found.to_json()


@contextmanager
def _keeping(out: Path | None, identity: Mapping[str, Any] | None = None) -> Iterator[Callable[[Robustness], None]]:
    """Writes what is finished as it comes, with what it is of, and says of an interruption what it leaves."""
    written = 0

    def keep(known: Robustness) -> None:
        nonlocal written
        if out is not None:
            if identity is not None:
                attack_journal.write_run(out, identity, known)
            write_whole(out / FILE, json.dumps(known.to_json(), indent=2) + "\n")
            written = len(known.attacks) + len(known.shifts)

    if out is not None:
        make_directory(out)
    try:
        yield keep
    except KeyboardInterrupt:
        nothing = "nothing is kept" + ("; with --out DIR what is finished would be" if out is None else "")
        finished = f"what is finished ({written} of the attacks and shifts) is in {out}"
        finished += ", and the same command with --resume goes on"
        raise KeyboardInterrupt(finished if written else nothing) from None
