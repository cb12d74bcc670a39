"""Attacks and shifts carried out on a model: what is left of its accuracy."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m3jax.arithmetic import threefry
from m3jax.errors import M3Error
from m3jax.evaluation.attacks.measure import FLOOR, Drop, measure_drop
from m3jax.evaluation.attacks.profiles import Attack, Level
from m3jax.evaluation.attacks.search import Change, Score
from m3jax.evaluation.attacks.subject import Subject, Verdicts, find_subject, judge, make_verdicts
from m3jax.evaluation.attacks.wording import CONTENT, Wording
from m3jax.evaluation.data import Row
from m3jax.evaluation.prompts import render
from m3jax.evaluation.protocol import GenerationSettings, Generator
from m3jax.evaluation.shifts import Shift, shift_text
from m3jax.evaluation.statistics import wilson_interval
from m3jax.evaluation.tasks import Execution, Task
from m3jax.progress import SECONDS_BETWEEN_LINES, Tell


class Attacked(NamedTuple):
    """What one attack did.

    Attributes:
        attack: Its name.
        level: What it changes: characters, words or sentences.
        drop: Accuracy clean and attacked, and the performance drop rate.
        queries: Prompts that were scored, each on all examples of the search.
        exhausted: Whether the budget ended the search.
        candidates: Prompts that could have been tried; 0 says that the attack had nothing to try.
        prompt: The worst prompt found.
        changes: The words that were replaced.
    """

    attack: str
    level: Level
    drop: Drop
    queries: int
    exhausted: bool
    candidates: int
    prompt: str
    changes: tuple[Change, ...]


class Shifted(NamedTuple):
    """What one shift did.

    Attributes:
        shift: Its name.
        drop: Accuracy clean and shifted, and the performance drop rate.
        changed: Examples that the shift changes.
    """

    shift: str
    drop: Drop
    changed: int


class Robustness(NamedTuple):
    """How robust a model is on a task.

    Attributes:
        model: Its name.
        task: The task.
        data: Where its test set is from; None where that was not said.
        limit: Only the first so many examples were taken; None for all.
        examples: Examples that accuracies are over.
        searched: Examples that the searches saw; where they are others, `examples` are those held out.
        accuracy: Clean accuracy.
        interval: Its 95 % interval, by Wilson's score.
        profile: How hard the attacks tried.
        seed: Of every random choice.
        budget: Most prompts that an attack was to score; None without a limit.
        template: The template around the prompt.
        prompt: The prompt, with {content} where the example stands.
        protected: Words that were never touched.
        grader: Whose rule judged.
        complete: Whether all attacks and shifts that were asked for are done.
        attacks: What each attack did.
        shifts: What each shift did.
        undefined: Why nothing was attacked, where drop rates would have been undefined.
    """

    model: str
    task: str
    data: str | None
    limit: int | None
    examples: int
    searched: int
    accuracy: float
    interval: tuple[float, float]
    profile: str
    seed: int
    budget: int | None
    template: str
    prompt: str
    protected: tuple[str, ...]
    grader: str
    complete: bool
    attacks: tuple[Attacked, ...] = ()
    shifts: tuple[Shifted, ...] = ()
    undefined: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        attacks = [
            {**one._asdict(), "drop": one.drop._asdict(), "changes": [change._asdict() for change in one.changes]}
            for one in self.attacks
        ]
        shifts = [{**one._asdict(), "drop": one.drop._asdict()} for one in self.shifts]
        return {**self._asdict(), "attacks": attacks, "shifts": shifts}


class AttackPlan(NamedTuple):
    """What is to be tried.

    Attributes:
        attacks: The attacks.
        shifts: The shifts.
        profile: Name of the attacks' profile.
        key: Two words of a threefry2x32 key, of every random choice.
        limit: Take the first so many examples only; as many as the task says if None.
        search_examples: So many of them the searches see, to measure on the others; None for all, to measure on them.
        budget: Most prompts that an attack may score.
        floor: Clean accuracy below which nothing is attacked, as drop rates are undefined.
    """

    attacks: tuple[Attack, ...]
    shifts: tuple[Shift, ...]
    profile: str
    key: npt.NDArray[np.uint32]
    limit: int | None
    search_examples: int | None
    budget: int | None
    floor: float = FLOOR


def attack_task(
    task: Task,
    rows: Sequence[Row],
    generator: Generator,
    plan: AttackPlan,
    *,
    prompt: str | None = None,
    protect: Sequence[str] = (),
    template: str | None = None,
    tokenizer: Any = None,
    settings: GenerationSettings | None = None,
    execution: Execution | None = None,
    model: str = "model",
    tell: Tell | None = None,
    keep: Callable[[Robustness], None] | None = None,
    data: str | None = None,
    done: Robustness | None = None,
) -> Robustness:
    """Attack the prompt that a model is given, and shift its inputs.

    Args:
        task: The task.
        rows: Its test set.
        generator: The model.
        plan: What is tried.
        prompt: As of `m3jax.attack`.
        protect: As of `m3jax.attack`.
        template: As of `m3jax.attack`.
        tokenizer: For the template "chat".
        settings: As of `m3jax.attack`.
        execution: As of `m3jax.attack`.
        model: What the model is called.
        tell: Told in lines how far the work is.
        keep: Given what is known so far after each attack and shift.
        data: Where the rows are from, for the record.
        done: What an earlier run of the same has finished, which is not done again.

    Raises:
        M3Error: The task has no prompt to attack, is judged elsewhere, or the shifts would break its programs.
    """
    limit = task.limit if plan.limit is None else plan.limit
    subject = find_subject(task, rows, template, prompt, limit)
    _check(task, subject, plan)
    bench = _make_bench(task, subject, generator, plan, settings or task.settings, tokenizer, execution)
    protected = tuple(dict.fromkeys((*subject.labels, *protect)))
    known = _before(task, subject, bench, plan)._replace(model=model, data=data, limit=limit, protected=protected)
    if tell is not None:
        tell(f"clean: {known.accuracy:.1%} of {known.examples} examples")
    if known.accuracy < plan.floor:
        why = f"clean accuracy is {known.accuracy:.1%}, and below {plan.floor:.1%} drop rates are undefined"
        if tell is not None:
            tell(f"{why}: nothing is attacked")
        known = known._replace(undefined=why, complete=True)
        if keep is not None:
            keep(known)
        return known
    attacks = {} if done is None else {one.attack: one for one in done.attacks}
    shifts = {} if done is None else {one.shift: one for one in done.shifts}
    for one in plan.attacks:
        attacked = attacks.get(one.name)
        if attacked is None:
            attacked = _attack(one, one.read(subject.prompt, protected), bench, plan.budget, tell)
        known = _noted(known._replace(attacks=(*known.attacks, attacked)), plan, keep)
    for shift in plan.shifts:
        shifted = shifts.get(shift.name)
        if shifted is None:
            shifted = _shift(shift, bench, plan.key, tokenizer, tell)
        known = _noted(known._replace(shifts=(*known.shifts, shifted)), plan, keep)
    return known


class _Bench(NamedTuple):
    """What attacks and shifts are measured with.

    Attributes:
        measured: The examples that accuracies are over.
        verdicts: Of the model on these.
        searched: Those that the searches see.
        search: Of the model on those.
        judge: Of the model on whole prompts of the measured examples.
        clean: Whether each measured example is right under the original prompt.
        seed: Of resampling.
        floor: Clean accuracy below which drop rates are undefined.
    """

    measured: Subject
    verdicts: Verdicts
    searched: Subject
    search: Verdicts
    judge: Callable[[Sequence[str]], npt.NDArray[np.bool_]]
    clean: npt.NDArray[np.bool_]
    seed: int
    floor: float

    def drop(self, after: npt.NDArray[np.bool_]) -> Drop:
        """What is lost where the measured examples come out so."""
        return measure_drop(self.clean.tolist(), after.tolist(), self.seed, floor=self.floor)


def _make_bench(
    task: Task,
    subject: Subject,
    generator: Generator,
    plan: AttackPlan,
    settings: GenerationSettings,
    tokenizer: Any,
    execution: Execution | None,
) -> _Bench:
    measured, searched = _split(subject, plan.search_examples)
    verdicts = make_verdicts(task, measured, generator, settings, tokenizer, execution)
    search = verdicts
    if searched is not measured:
        search = make_verdicts(task, searched, generator, settings, tokenizer, execution)

    def judged(texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        return judge(task, measured.examples, texts, generator, settings, execution)

    clean = verdicts([subject.prompt])[0]
    seed = int(threefry.fold_in_name(plan.key, "bootstrap")[0])
    return _Bench(measured, verdicts, searched, search, judged, clean, seed, plan.floor)


def _before(task: Task, subject: Subject, bench: _Bench, plan: AttackPlan) -> Robustness:
    """What is known before anything is attacked."""
    return Robustness(
        model="",
        task=task.name,
        data=None,
        limit=None,
        examples=len(bench.measured.examples),
        searched=len(bench.searched.examples),
        accuracy=float(bench.clean.mean()),
        interval=wilson_interval(int(bench.clean.sum()), bench.clean.size),
        profile=plan.profile,
        seed=int(plan.key[0]) << 32 | int(plan.key[1]),
        budget=plan.budget,
        template=subject.template,
        prompt=subject.prompt,
        protected=(),
        grader=task.grader,
        complete=not plan.attacks and not plan.shifts,
    )


def _noted(known: Robustness, plan: AttackPlan, keep: Callable[[Robustness], None] | None) -> Robustness:
    """What is known, marked as complete where nothing is left to do, and kept."""
    left = len(plan.attacks) + len(plan.shifts) - len(known.attacks) - len(known.shifts)
    known = known._replace(complete=left == 0)
    if keep is not None:
        keep(known)
    return known


def _attack(one: Attack, prompt: Wording, bench: _Bench, budget: int | None, tell: Tell | None) -> Attacked:
    found = one.run(prompt, _telling(bench.search, one.name, len(bench.searched.examples), tell), budget)
    drop = bench.drop(bench.verdicts([found.prompt])[0])
    if tell is not None:
        tell(f"{one.name}: {drop.attacked:.1%} of {drop.examples} examples, {found.queries} prompts scored")
    return Attacked(
        one.name, one.level, drop, found.queries, found.exhausted, found.candidates, found.prompt, found.changes
    )


def _shift(shift: Shift, bench: _Bench, key: Any, tokenizer: Any, tell: Tell | None) -> Shifted:
    texts, changed = _shifted_texts(bench.measured, shift, key, tokenizer)
    drop = bench.drop(bench.judge(texts))
    if tell is not None:
        tell(f"{shift.name}: {drop.attacked:.1%} of {drop.examples} examples")
    return Shifted(shift.name, drop, changed)


def _check(task: Task, subject: Subject, plan: AttackPlan) -> None:
    if plan.attacks and not Wording.of(subject.prompt).words:
        raise M3Error(f"{task.name} has no words of its own to attack: give such with --prompt, {CONTENT} in them")
    if task.judged_elsewhere:
        raise M3Error(f"{task.name} is judged elsewhere, so that no accuracy can be attacked: take another task")
    breaking = [shift.name for shift in plan.shifts if task.runs_code and not shift.keeps_code]
    if breaking:
        raise M3Error(f"{breaking[0]} would break the programs in {task.name}: of the shifts, take paraphrase only")
    if plan.search_examples is not None and plan.search_examples >= len(subject.examples):
        raise M3Error(
            f"the searches are to see {plan.search_examples} of {len(subject.examples)} examples, "
            "which leaves none to measure on: let them see fewer"
        )


def _split(subject: Subject, search_examples: int | None) -> tuple[Subject, Subject]:
    """The examples that are measured on, and those that the searches see: the same, or the first so many."""
    if search_examples is None:
        return subject, subject
    cut = search_examples
    rest = subject._replace(examples=subject.examples[cut:], contents=subject.contents[cut:])
    return rest, subject._replace(examples=subject.examples[:cut], contents=subject.contents[:cut])


def _telling(verdicts: Verdicts, name: str, examples: int, tell: Tell | None) -> Score:
    """Scores prompts by their accuracy, and says how far the search is."""
    state = {"begun": time.monotonic(), "said": time.monotonic(), "prompts": 0.0, "worst": 1.0}

    def score(prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        scores: npt.NDArray[np.float64] = verdicts(prompts).mean(axis=1)
        now = time.monotonic()
        state["prompts"] += len(prompts)
        state["worst"] = min(state["worst"], float(scores.min(initial=1.0)))
        if tell is not None and now - state["said"] >= SECONDS_BETWEEN_LINES:
            state["said"] = now
            rate = state["prompts"] / (now - state["begun"])
            tell(f"{name}: {state['prompts']:.0f} prompts of {examples} examples, {rate:.2f}/s, {state['worst']:.1%}")
        return scores

    return score


def _shifted_texts(subject: Subject, shift: Shift, key: Any, tokenizer: Any) -> tuple[list[str], int]:
    """Whole prompts with the examples shifted, and how many of them differ."""
    texts, changed = [], 0
    for example, content in zip(subject.examples, subject.contents, strict=True):
        plain = subject.prompt.replace(CONTENT, content)
        if shift.whole and not subject.folded:
            text = shift_text(shift, plain, key, example.id)
        else:
            text = subject.prompt.replace(CONTENT, shift_text(shift, content, key, example.id))
        changed += text != plain
        texts.append(render(subject.template, text, tokenizer))
    return texts, changed
