"""The demo: a base and two experts trained on the spot, merged, the ratio explored, the result replayed.

Dev examples choose, test examples report: nothing is chosen by those whose scores are shown.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import yaml

from m3jax.errors import M3Error
from m3jax.evaluation.statistics import paired_interval, wilson_interval
from m3jax.progress import Progress, Tell, Watch
from m3jax.text import count_text, time_text

if TYPE_CHECKING:  # JAX and matplotlib are imported where they are first needed
    from m3jax.exploration import Exploration
    from m3jax.laboratory import Laboratory, Setting, Skill
    from m3jax.laboratory.examining import Answered, Exam
    from m3jax.streaming.merging import MergeResult

Stage: TypeAlias = Callable[[], AbstractContextManager[Watch | None]]
"""Makes what shows the progress of one stage of the work, and takes it away."""

ALPHA, SAMPLES = 1.0, 12
SCALE = 1.5  # of the merged task vector: shares sum to 1, and half of what was learned is too little of either skill
PICTURE = "lambda.png"

_MARK = ".m3jax-demo"  # in the demo's own directory, whose content may be overwritten
_DIGITS = 12  # of a digest, enough to tell by eye
_NAMES, _CELL = 28, 20  # letters of a row's name and of a score
_RECIPES: dict[str, dict[str, Any]] = {
    "half": {"merge_method": "task_arithmetic", "parameters": {"lambda": SCALE}},
    "draw": {"merge_method": "task_arithmetic", "parameters": {"lambda": SCALE}, "mixup": {"alpha": ALPHA}},
    "ties": {
        "merge_method": "ties",
        "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"},
        "sparsify": {"method": "dare", "density": 0.8},
        "mixup": {"alpha": ALPHA},
    },
}
_HALF = 0.5


class Marked(NamedTuple):
    """A model and its answers to the test examples.

    Attributes:
        name: What it is.
        directory: Where it is.
        answers: To every example, by skill.
        moved: How far it is from the base, ‖δ‖ / ‖p‖; of an expert.
        weight: Of the first expert, in a merge.
    """

    name: str
    directory: Path
    answers: Mapping[str, "Sequence[Answered]"]
    moved: float | None = None
    weight: float | None = None

    def right(self) -> dict[str, tuple[int, int]]:
        """How many answers are right, and of how many, by skill."""
        return {skill: (sum(answer.right for answer in some), len(some)) for skill, some in self.answers.items()}

    def share(self, skill: str) -> float:
        """Of a skill's answers that are right."""
        right, count = self.right()[skill]
        return right / count

    def mean(self) -> float:
        """Of all skills' shares."""
        return sum(map(self.share, self.answers)) / len(self.answers)

    def told(self) -> dict[str, Any]:
        """The same as plain data, without what was answered."""
        scores = {
            skill: {
                "right": right,
                "of": count,
                "share": right / count,
                "interval": list(wilson_interval(right, count)),
            }
            for skill, (right, count) in self.right().items()
        }
        place = {"name": self.name, "directory": str(self.directory), "moved": self.moved, "weight": self.weight}
        return {**place, "scores": scores, "mean": self.mean()}


def default_setting() -> "Setting":
    """How the demo's models are made, and how much is measured on them."""
    from m3jax.laboratory import Course, Curriculum, ExperimentSettings, Setting, Size

    base = Course(1600, 32, 3e-3, whole=True)
    expert = Course(300, 32, 5e-4, pull=10.0)
    return Setting(Curriculum(Size(96, 2, 4, 600), 16_000, base, expert), ExperimentSettings(dev=96, test=192))


def main(
    directory: Path,
    echo: Tell,
    seed: int = 0,
    setting: "Setting | None" = None,
    stage: Stage = lambda: nullcontext(),
) -> dict[str, Any]:
    """Trains models, merges them, explores the ratio, and tells what came of it.

    Args:
        directory: Where to work; made if need be. Models of an earlier run are used again, its merges overwritten.
        echo: Is given the account, line by line.
        seed: Of lessons, first weights, questions and draws.
        setting: How models are made and how much is measured; the demo's own if None.
        stage: Shows progress.

    Returns:
        The same account as plain data for JSON.

    Raises:
        M3Error: The directory cannot be used, or holds something else.
    """
    begun = time.perf_counter()
    _take_over(directory)
    from m3jax.laboratory import functions, open_laboratory, word_problems
    from m3jax.laboratory.examining import make_exam

    skills = [word_problems(largest=12, primed=True), functions(primed=True)]
    chosen = setting or default_setting()
    setting = chosen._replace(curriculum=chosen.curriculum._replace(seed=seed))
    for line in _introduction(directory, skills):
        echo(line)
    with stage() as watch:
        lab = open_laboratory(directory, skills, setting, lambda _: None, watch)
    dev, test = ({skill.name: make_exam(skill, split, count, seed) for skill in skills}
                 for split, count in (("dev", lab.how.dev), ("test", lab.how.test)))  # fmt: skip
    _write_data(directory / "data", {"dev": dev, "test": test})
    written = write_recipes(directory / "recipes", lab.places, seed)
    models = _models(lab, test, echo, stage)
    found = _explore(written["draw"], directory, lab, dev, stage)
    merges = _merges(written, directory / "merges", found, lab, test, echo, stage)
    rows = [*models, *merges]
    asked = _ask(rows, test)
    verdict = _verdict(rows)
    for line in (*_question_lines(asked), *_verdict_lines(verdict)):
        echo(line)
    _draw(directory / PICTURE, found, dev)
    echo(f"  All {SAMPLES} draws over λ, as the dev examples have them: {directory / PICTURE}")
    replayed = _replay(found.merge, directory / "replayed", echo)
    seconds = time.perf_counter() - begun
    following = next_commands(directory, test)
    for line in _next_lines(following, seconds):
        echo(line)
    return {
        "directory": str(directory),
        "seed": seed,
        "rows": [row.told() for row in rows],
        "draws": [{"weight": _weight(one.weights), "dev": dict(one.scores)} for one in found.results],
        "question": asked,
        "verdict": verdict,
        "picture": str(directory / PICTURE),
        "replay": replayed,
        "next": following,
        "seconds": seconds,
    }


def _take_over(directory: Path) -> None:
    """Makes the demo's directory, and refuses one that holds anything but an earlier demo."""
    mark = directory / _MARK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not mark.is_file():
            raise M3Error(f"{directory}: holds something else than a demo: give a new or an empty directory")
        mark.write_text("Made by m3jax demo, which overwrites what is here.\n", encoding="utf-8")
    except OSError as error:
        raise M3Error(f"{directory}: cannot be used: {error.strerror}: give another directory") from error


def write_recipes(directory: Path, places: Mapping[str, Path], seed: int) -> dict[str, Path]:
    """Writes a recipe for every merge of the demo; they name the models so that they can be run from anywhere.

    Args:
        directory: Where the recipes go; made if need be.
        places: The model directories: "base", and the experts.
        seed: Of draws and masks.

    Returns:
        The files by the recipes' names: equal weights, a draw of M³, and a draw of M³ inside DARE and TIES.
    """
    directory.mkdir(exist_ok=True)
    experts = [str(place.resolve()) for name, place in places.items() if name != "base"]
    written = {}
    for name, method in _RECIPES.items():
        drawn = "mixup" in method
        recipe = {
            **method,
            "base_model": str(places["base"].resolve()),
            "models": experts if drawn else [{"model": e, "parameters": {"weight": _HALF}} for e in experts],
            "seed": seed,
            "dtype": "float32",
        }
        written[name] = directory / f"{name}.yaml"
        written[name].write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return written


def _write_data(directory: Path, exams: "Mapping[str, Mapping[str, Exam]]") -> None:
    """The examples as files that `m3jax evaluate` and `m3jax explore` take."""
    directory.mkdir(exist_ok=True)
    for split, some in exams.items():
        for skill, exam in some.items():
            text = "".join(json.dumps(row) + "\n" for row in exam.rows)
            (directory / f"{skill}-{split}.jsonl").write_text(text, encoding="utf-8")


def _introduction(directory: Path, skills: "Sequence[Skill]") -> Iterator[str]:
    names = " and ".join(skill.name for skill in skills)
    yield f"Models in {directory / 'models'}: a base and an expert each in {names}, trained here and now."
    yield "  The base learns from a careless teacher: of half of the wordings, most of his answers are wrong."
    yield "  Each expert goes on from it with right answers of one skill, pulled toward the base (L2) all the while."


# --- Scores ------------------------------------------------------------------------------------------------------


def _answers(lab: "Laboratory", params: Any, exams: "Mapping[str, Exam]") -> dict[str, "Sequence[Answered]"]:
    from m3jax.laboratory.examining import answers_of

    generator = lab.pupil.generator(params)
    return {skill: answers_of(exam, generator) for skill, exam in exams.items()}


def _examined(
    lab: "Laboratory", places: Mapping[str, Path], exams: "Mapping[str, Exam]", stage: Stage
) -> dict[str, dict[str, "Sequence[Answered]"]]:
    """What stored models answer."""
    from m3jax import decoder

    answers: dict[str, dict[str, Sequence[Answered]]] = {}
    with stage() as watch:
        for name, place in places.items():
            _say(watch, "examining on test examples", len(answers), len(places), "model")
            answers[name] = _answers(lab, decoder.load_params(place, lab.pupil.config), exams)
        _say(watch, "examining on test examples", len(places), len(places), "model")
    return answers


def _say(watch: Watch | None, stage: str, done: int, total: int, counted: str) -> None:
    if watch is not None:
        watch(Progress(stage, done, total, counted))


def _head(first: str, skills: Sequence[str]) -> str:
    return f"  {first:{_NAMES}}{''.join(f'{skill:{_CELL}}' for skill in skills)}mean"


def _line(row: Marked) -> str:
    cells = []
    for right, count in row.right().values():
        low, high = wilson_interval(right, count)
        cells.append(f"{f'{right / count:6.1%}  {low:3.0%} to {high:.0%}':{_CELL}}")
    return f"  {row.name:{_NAMES}}{''.join(cells)}{row.mean():6.1%}"


def _models(lab: "Laboratory", test: "Mapping[str, Exam]", echo: Tell, stage: Stage) -> list[Marked]:
    from m3jax.checkpoints import inspection
    from m3jax.streaming.differences import diff

    seen = inspection.look_at(str(lab.places["base"]))
    experts = [name for name in lab.places if name != "base"]
    apart = diff(*(str(lab.places[name]) for name in experts), base=str(lab.places["base"])).total
    moved = dict(zip(experts, (apart.relative_a, apart.relative_b), strict=True))
    answers = _examined(lab, lab.places, test, stage)
    rows = [
        Marked(name if name == "base" else f"expert: {name}", place, answers[name], moved.get(name))
        for name, place in lab.places.items()
    ]
    count = len(next(iter(test.values())).rows)
    drifts = ", ".join(f"{name} by {drift:.1%}" for name, drift in moved.items() if drift is not None)
    echo(f"  Llamas of {seen.entries:,} parameters. The experts moved from the base's weights: {drifts} of their norm,")
    echo(f"  in directions whose cosine is {apart.cosine:.2f}.")
    echo("")
    echo(f"Right answers to {count} new questions of each skill, with 95 % intervals:")
    echo(_head("", list(test)))
    for row in rows:
        echo(_line(row))
    return rows


# --- Merges ------------------------------------------------------------------------------------------------------


def _explore(
    recipe: Path, directory: Path, lab: "Laboratory", dev: "Mapping[str, Exam]", stage: Stage
) -> "Exploration":
    """Draws many ratios and keeps the best on dev examples."""
    from m3jax import decoder
    from m3jax.exploration import explore

    for left in ("best", "best.exploration"):
        shutil.rmtree(directory / left, ignore_errors=True)
    total = SAMPLES + len(lab.places) + 1  # with what they are measured against: the models, and equal weights

    def score(params: Any, _: float) -> dict[str, float]:
        answers = _answers(lab, decoder.params_from_tree(params, lab.pupil.config), dev)
        return {skill: sum(answer.right for answer in some) / len(some) for skill, some in answers.items()}

    with stage() as watch:
        done = iter(range(1, total + 1))
        return explore(
            recipe,
            directory / "best",
            score=score,
            samples=SAMPLES,
            references=True,
            watch=lambda *_: _say(watch, "merging and examining on dev examples", next(done), total, "model"),
        )


def _merges(
    recipes: Mapping[str, Path],
    out: Path,
    found: "Exploration",
    lab: "Laboratory",
    test: "Mapping[str, Exam]",
    echo: Tell,
    stage: Stage,
) -> list[Marked]:
    """Equal weights, what one draw gives, and the best of the draws, examined on test examples."""
    from m3jax.streaming.merging import merge_checkpoint

    out.mkdir(exist_ok=True)
    half, first = (merge_checkpoint(recipes[name], out / name, overwrite=True) for name in ("half", "draw"))
    ratio = _weight(found.results[0].weights), _weight(found.choice.weights)
    names = ("merged, λ = ½", f"first draw, λ = {ratio[0]:.3f}", f"best draw, λ = {ratio[1]:.3f}")
    places = [half.directory, first.directory, found.merge.directory]
    answers = _examined(lab, dict(zip(names, places, strict=True)), test, stage)
    rows = [
        Marked(name, place, answers[name], weight=weight)
        for name, place, weight in zip(names, places, (_HALF, *ratio), strict=True)
    ]
    skills = list(test)
    echo("")
    merged = f"base + {SCALE:g}·(λ·δ({skills[0]}) + (1 − λ)·δ({skills[1]}))"
    echo(f"Merged, {merged}, λ ~ Beta({ALPHA:g}, {ALPHA:g}) as M³ draws it;")
    echo(f"the best of {SAMPLES} draws was chosen on {count_text(lab.how.dev, 'other question')} of each skill:")
    echo(_head("", skills))
    for row in rows:
        echo(_line(row))
    return rows


def _weight(weights: Mapping[str, Sequence[float]]) -> float:
    """The first expert's."""
    (group,) = weights.values()
    return float(group[0])


# --- What came of it ---------------------------------------------------------------------------------------------


def _ask(rows: Sequence[Marked], test: "Mapping[str, Exam]") -> dict[str, Any] | None:
    """The first test question of the first skill that the base gets wrong and its expert right, and all answers.

    Merges have no say in which it is. None where there is none.
    """
    base, expert, other, _, _, best = rows
    skill, exam = next(iter(test.items()))
    pairs = zip(base.answers[skill], expert.answers[skill], strict=True)
    place = next((i for i, (one, two) in enumerate(pairs) if two.right and not one.right), None)
    if place is None:
        return None
    answers = {row.name: row.answers[skill][place] for row in (base, expert, other, best)}
    return {
        "question": exam.examples[place].instruction.strip(),
        "answers": {name: {"text": answer.text.strip(), "right": answer.right} for name, answer in answers.items()},
    }


def _question_lines(asked: Mapping[str, Any] | None) -> Iterator[str]:
    if asked is None:
        return
    yield ""
    yield "The first of these questions that the base has wrong and its expert right:"
    yield f"  {asked['question']}"
    for name, answer in asked["answers"].items():
        said = ", ".join(line for line in answer["text"].splitlines() if line) or "(nothing)"
        yield f"  {name:{_NAMES}}{said}  {'✓' if answer['right'] else '✗'}"


def _verdict(rows: Sequence[Marked]) -> dict[str, Any]:
    """What merging kept of what the experts learned, and whether drawing found more than equal weights."""
    base, one, other, half, _, best = rows
    learned, kept = {}, {}
    for expert, skill in zip((one, other), base.answers, strict=True):
        gained = expert.share(skill) - base.share(skill)
        learned[skill] = {"gain": gained, "interval": _beyond(expert, base, [skill])}
        kept[skill] = (best.share(skill) - base.share(skill)) / gained if gained > 0 else None
    return {
        "learned": learned,
        "kept": kept,
        "gain": best.mean() - half.mean(),
        "interval": _beyond(best, half, list(base.answers)),
        "better_expert": max(one.mean(), other.mean()),
        "merge": best.mean(),
    }


def _beyond(one: Marked, other: Marked, skills: Sequence[str]) -> list[float]:
    """The 95 % interval of what one model has right beyond another, of the same questions of all these skills."""
    marks = ([answer.right for skill in skills for answer in row.answers[skill]] for row in (one, other))
    return list(paired_interval(*marks))


def difference_text(gain: float, interval: Sequence[float]) -> str:
    """A difference of shares with its interval, as text."""
    low, high = interval
    return f"{gain:+.1%} ({low:+.1%} to {high:+.1%})"


def _verdict_lines(verdict: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    gains = ", ".join(f"{skill} {difference_text(**told)}" for skill, told in verdict["learned"].items())
    yield f"Each expert against the base, in its own skill, with 95 % intervals: {gains}."
    shares = ", ".join(
        f"{skill}: {'nothing was gained' if share is None else f'{share:.0%}'}"
        for skill, share in verdict["kept"].items()
    )
    yield f"Of what each expert gained over the base, the best draw keeps: {shares}."
    relation = "more" if verdict["merge"] > verdict["better_expert"] else "no more"
    yield (
        f"  Mean of both skills: {verdict['merge']:.1%}, {relation} than the better expert's"
        f" {verdict['better_expert']:.1%}."
    )
    low, high = verdict["interval"]
    told = difference_text(verdict["gain"], verdict["interval"])
    if low > 0:
        yield f"  The draws found what λ = ½ does not have: {told}."
    elif high < 0:
        yield f"  The draws did worse than λ = ½ on new questions: {told}."
    else:
        yield f"  The draws found nothing that λ = ½ does not have: {told}, which holds 0."


def _draw(path: Path, found: "Exploration", dev: "Mapping[str, Exam]") -> None:
    """The exploration's picture, with a panel for the mean, by which the best draw was chosen."""
    from m3jax.exploration import picture

    def with_mean(result: Any) -> Any:
        return result._replace(scores={**result.scores, "mean": result.mean})

    counts = {skill: len(exam.rows) for skill, exam in dev.items()}
    drawn = found.drawn
    picture(
        drawn._replace(
            choice=with_mean(drawn.choice),
            results=list(map(with_mean, drawn.results)),
            references=list(map(with_mean, drawn.references)),
            examples={**counts, "mean": sum(counts.values())},
        ),
        path,
    )


# --- Again -------------------------------------------------------------------------------------------------------


def _replay(original: "MergeResult", out: Path, echo: Tell) -> dict[str, Any]:
    """Makes a merge again from its manifest alone, and reads back what was written."""
    from m3jax.outputs.verification import verify
    from m3jax.streaming.merging import replay

    again = replay(original.directory, out, overwrite=True)
    found = verify(out)
    same = again.digest == original.digest == found.digest
    echo("")
    echo(f"Replayed {original.directory.name} from its manifest into {out}:")
    echo(f"  digest {again.digest[:_DIGITS]}, {'the same' if same else f'NOT {original.digest[:_DIGITS]}'}")
    checked = f"{count_text(found.tensors, 'tensor')} and {count_text(found.files, 'other file')}"
    differing = f", {count_text(len(found.differences), 'difference')}" if found.differences else " as recorded"
    echo(f"  verified: {checked}{differing}")
    return {
        "of": str(original.directory),
        "directory": str(out),
        "digest": found.digest,
        "same_digest": same,
        "differences": list(found.differences),
    }


def next_commands(directory: Path, exams: "Mapping[str, Exam]") -> list[list[str]]:
    """What to type next, each as its arguments after `m3jax`; they work in this order.

    Args:
        directory: The demo's.
        exams: By skill; those that need programs run are left out where that is not safe.
    """

    from m3jax.evaluation import get_task

    def path(*parts: str) -> str:
        return str(directory.joinpath(*parts))

    asked = ["--template", "none", "--max-tokens", "32"]  # models of the demo know no template
    safe = {s: exam.task for s, exam in exams.items() if exam.task.runs_code == get_task(exam.task.name).runs_code}
    tasks = [word for skill, task in safe.items()
             for word in ("--task", f"{task.name}={path('data', f'{skill}-dev.jsonl')}")]  # fmt: skip
    runs = ["--run-code"] if any(task.runs_code for task in safe.values()) else []
    first, second = exams
    experts = [path("models", first), path("models", second)]
    return [
        ["merge", path("recipes", "ties.yaml"), path("mine")],
        ["verify", path("mine")],
        ["inspect", path("mine")],
        ["evaluate", path("mine"), "--task", "gsm8k", "--data", path("data", f"{first}-test.jsonl"), *asked],
        ["diff", *experts, "--base", path("models", "base"), "--picture", path("diff.png")],
        ["explore", path("recipes", "draw.yaml"), path("explored"), "--samples", "4", *tasks, *runs, *asked],
        ["report", path("explored"), "--out", path("report")],
        ["replay", path("explored"), path("again")],
    ]


def _next_lines(following: Sequence[Sequence[str]], seconds: float) -> Iterator[str]:
    yield ""
    yield f"All in {time_text(seconds)}. Next, try:"
    script = Path(sys.executable).with_name("activate")
    if shutil.which("m3jax") is None and script.is_file():  # an environment in use without being activated
        yield f"  source {shlex.quote(os.path.relpath(script))}    # the environment that has the command m3jax"
    for words in following:
        yield f"  m3jax {shlex.join(words)}"
