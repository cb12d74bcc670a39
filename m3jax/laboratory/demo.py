"""The demo: a base and two experts trained on the spot, merged, the ratio explored, the result replayed."""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from m3jax.errors import M3Error
from m3jax.progress import Tell
from m3jax.text import count_text, time_text

if TYPE_CHECKING:  # JAX and matplotlib are imported where they are first needed
    from m3jax.laboratory import Laboratory, Setting
    from m3jax.laboratory.experiments import Papers
    from m3jax.streaming.merging import MergeResult

Scores: TypeAlias = dict[str, float]

ALPHA, SEED, SAMPLES = 1.0, 7, 12
PICTURE = "lambda.png"

_MARK = ".m3jax-demo"  # in the demo's own directory, whose content may be overwritten
_DIGITS = 12  # of a digest, enough to tell by eye
_RECIPES: dict[str, dict[str, Any]] = {
    "average": {"merge_method": "linear"},
    "task-arithmetic-dare": {"merge_method": "task_arithmetic", "sparsify": {"method": "dare", "density": 0.8}},
    "ties": {
        "merge_method": "ties",
        "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"},
    },
}
_EXPLORED = "average"


def write_recipes(directory: Path, places: Mapping[str, Path]) -> dict[str, Path]:
    """Writes a recipe for every merge of the demo; they name the models so that they can be run from anywhere.

    Args:
        directory: Where the recipes go; it exists.
        places: The model directories: "base", and the experts.

    Returns:
        The files by the merges' names.
    """
    written = {}
    for name, method in _RECIPES.items():
        recipe = {
            **method,
            "base_model": str(places["base"].resolve()),
            "models": [str(place.resolve()) for expert, place in places.items() if expert != "base"],
            "mixup": {"alpha": ALPHA},
            "seed": SEED,
            "dtype": "float32",
        }
        written[name] = directory / f"{name}.yaml"
        written[name].write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return written


def main(directory: Path, echo: Tell, setting: "Setting | None" = None) -> dict[str, Any]:
    """Trains models, merges them, explores the ratio, and tells what came of it.

    Args:
        directory: Where to work; made if need be. Models of an earlier run are used again, its merges overwritten.
        echo: Is given the account, line by line.
        setting: How much the laboratory does; its smallest setting if None.

    Returns:
        The same account as plain data for JSON.

    Raises:
        M3Error: The directory cannot be used, or holds something else.
    """
    begun = time.perf_counter()
    _take_over(directory)
    from m3jax.laboratory import SETTINGS, open_laboratory, programs, word_problems
    from m3jax.laboratory.experiments import make_papers

    skills = [word_problems(), programs()]
    setting = setting or SETTINGS["small"]
    echo(f"Models in {directory / 'models'}: a base that learns a little of two skills, and an expert in each.")
    lab = open_laboratory(directory, skills, setting, lambda line: echo(f"  {line}"))
    papers = make_papers(skills, lab.how, SEED)
    _write_data(directory / "data", papers)
    account: dict[str, Any] = {"directory": str(directory)}
    account["models"] = _models(lab, papers, echo)
    (directory / "recipes").mkdir(exist_ok=True)
    written = write_recipes(directory / "recipes", lab.places)
    account["merges"] = _merges(written, directory / "merges", lab, papers, echo)
    account["exploration"], best = _explore(written[_EXPLORED], directory, lab, papers, echo)
    _say_means(account, echo)
    account["replay"] = _replay(best, directory / "replayed", echo)
    account["seconds"] = time.perf_counter() - begun
    _say_next(directory, account["seconds"], echo)
    return account


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


def _write_data(directory: Path, papers: "Papers") -> None:
    """The examples as files that `m3jax evaluate` and `m3jax explore` take."""
    directory.mkdir(exist_ok=True)
    for split, exams in (("dev", papers.dev), ("test", papers.test)):
        for skill, exam in exams.items():
            text = "".join(json.dumps(row) + "\n" for row in exam.rows)
            (directory / f"{skill}-{split}.jsonl").write_text(text, encoding="utf-8")


# --- Scores ------------------------------------------------------------------------------------------------------


def _scores(lab: "Laboratory", params: Any, exams: Mapping[str, Any]) -> Scores:
    from m3jax.laboratory.examining import examine

    generator = lab.pupil.generator(params)
    return {skill: examine(exam, generator) for skill, exam in exams.items()}


def _scores_of(lab: "Laboratory", place: Path, papers: "Papers") -> Scores:
    from m3jax import decoder

    return _scores(lab, decoder.load_params(place, lab.pupil.config), papers.test)


def _cells(scores: Scores) -> str:
    return "  ".join(f"{scores[skill]:>{max(len(skill), 6)}.1%}" for skill in scores)


def _models(lab: "Laboratory", papers: "Papers", echo: Tell) -> dict[str, Any]:
    from m3jax.checkpoints import inspection

    seen = inspection.look_at(str(lab.places["base"]))
    count = len(next(iter(papers.test.values())).rows)
    echo("")
    echo(f"Each is a Llama of {seen.entries:,} parameters. Right answers to {count} new problems of each skill:")
    echo(f"  {'':22}{'  '.join(f'{skill:>6}' for skill in papers.test)}")
    scores = {}
    for name, place in lab.places.items():
        scores[name] = _scores_of(lab, place, papers)
        echo(f"  {name:22}{_cells(scores[name])}")
    return {
        "directories": {name: str(place) for name, place in lab.places.items()},
        "parameters": seen.entries,
        "scores": scores,
    }


# --- Merges ------------------------------------------------------------------------------------------------------


def _merges(
    recipes: Mapping[str, Path], out: Path, lab: "Laboratory", papers: "Papers", echo: Tell
) -> list[dict[str, Any]]:
    from m3jax.streaming.merging import merge_checkpoint

    out.mkdir(exist_ok=True)
    echo("")
    echo(f"Merged by M³ into {out}, one draw of λ ~ Beta({ALPHA:g}, {ALPHA:g}) with seed {SEED}:")
    done = []
    for name, recipe in recipes.items():
        result = merge_checkpoint(recipe, out / name, overwrite=True)
        scores = _scores_of(lab, result.directory, papers)
        done.append(_told(result, scores))
        echo(f"  {name:22}{_cells(scores)}  λ = {_ratio(result):.3f}, digest {result.digest[:_DIGITS]}")
    return done


def _ratio(result: "MergeResult") -> float:
    """The weight of the first expert."""
    (group,) = result.manifest["weights"].values()
    return float(group["decimal"][0])


def _told(result: "MergeResult", scores: Scores) -> dict[str, Any]:
    return {
        "name": result.directory.name,
        "directory": str(result.directory),
        "ratio": _ratio(result),
        "seconds": result.seconds,
        "digest": result.digest,
        "scores": scores,
    }


# --- The ratio ---------------------------------------------------------------------------------------------------


def _explore(
    recipe: Path, directory: Path, lab: "Laboratory", papers: "Papers", echo: Tell
) -> tuple[dict[str, Any], "MergeResult"]:
    """Draws many ratios, keeps the best on dev examples, and draws its curve."""
    from m3jax import decoder
    from m3jax.exploration import explore

    def score(params: Any, _: float) -> Scores:
        return _scores(lab, decoder.params_from_tree(params, lab.pupil.config), papers.dev)

    for left in ("best", "best.exploration"):
        shutil.rmtree(directory / left, ignore_errors=True)
    echo("")
    echo(f"One draw may be a bad one. Drawing {SAMPLES}, each merged in memory; the best mean on other problems is:")
    found = explore(recipe, directory / "best", score=score, samples=SAMPLES)
    ratio = _ratio(found.merge)
    scores = _scores_of(lab, found.merge.directory, papers)
    echo(f"  {'best':22}{_cells(scores)}  λ = {ratio:.3f}, digest {found.merge.digest[:_DIGITS]}")
    trials = [{"weights": list(result.weights["model"]), "dev": dict(result.scores)} for result in found.results]
    _draw_curve(directory / PICTURE, lab, papers, trials)
    echo(f"  {count_text(lab.how.points, 'ratio')} and the draws among them: {directory / PICTURE}")
    return {**_told(found.merge, scores), "trials": trials, "picture": str(directory / PICTURE)}, found.merge


def _say_means(account: Mapping[str, Any], echo: Tell) -> None:
    """Whether merging was worth it, whatever came out."""
    models = {name: _mean(scores) for name, scores in account["models"]["scores"].items()}
    experts = {name: mean for name, mean in models.items() if name != "base"}
    better = max(experts, key=experts.__getitem__)
    merged = _mean(account["exploration"]["scores"])
    verdict = "more" if merged > max(models.values()) else "no more"
    echo(
        f"  Mean of both skills: base {models['base']:.1%}, better expert ({better}) {experts[better]:.1%}, best merge"
        f" {merged:.1%}: {verdict} than any model that went into it."
    )


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _draw_curve(path: Path, lab: "Laboratory", papers: "Papers", trials: Sequence[Mapping[str, Any]]) -> None:
    from m3jax.laboratory.experiments import AVERAGE, M3, Experiment, do
    from m3jax.laboratory.figures import save_curves

    group = tuple(papers.dev)
    curve = do(lab, Experiment("curve", SEED, group, alpha=ALPHA), papers)
    draws = Experiment("merge", SEED, group, AVERAGE, alpha=ALPHA)
    drawn = {"job": draws.name, **draws._asdict(), "group": list(group), "arms": {}, "trials": {M3: list(trials)}}
    save_curves([curve, drawn], path)


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


def _say_next(directory: Path, seconds: float, echo: Tell) -> None:
    def path(*parts: str) -> str:
        return shlex.quote(str(directory.joinpath(*parts)))

    # An environment may be in use without being activated, as scripts/demo does.
    command = "m3jax" if shutil.which("m3jax") else shlex.quote(str(Path(sys.executable).with_name("m3jax")))
    echo("")
    echo(f"All in {time_text(seconds)}. Next, try:")
    echo(f"  {command} merge {path('recipes', 'ties.yaml')} {path('mine')} --seed {SEED + 1}")
    data = f"--data {path('data', 'arithmetic-test.jsonl')} --template none --max-tokens 32"
    echo(f"  {command} evaluate {path('mine')} --task gsm8k {data}")
    echo(f"  {command} inspect {path('best')} {path('models', 'arithmetic')}")
