"""The best merge as its users have it: written by what `m3jax merge` calls, replayed, and evaluated from the disk."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m3jax.errors import saying_what_failed
from m3jax.evaluation.models import make_generator, open_model
from m3jax.evaluation.runner import evaluate_task, read_examples
from m3jax.laboratory.examining import Exam
from m3jax.laboratory.experiments import M3, Experiment, Laboratory, Papers, mean, recipe_of
from m3jax.laboratory.outcomes import Line
from m3jax.recipe import load_recipe
from m3jax.streaming.merging import merge_checkpoint, replay
from m3jax.streaming.plan import WHOLE_MODEL

WRITTEN = "written"
"""Below the laboratory's directory, where the models are, a directory for each group."""


def write_best(lab: Laboratory, job: Experiment, papers: Papers, lines: Iterable[Line]) -> dict[str, Any]:
    """Writes the best of a seed's draws, over all methods, and has it prove itself.

    Args:
        lab: The laboratory.
        job: Of the kind "written".
        papers: The examinations of the job's seed.
        lines: The ledger: the merges of the job's seed and group among them.

    Returns:
        A line of the ledger. Under "written": the "method", "dare" and "weights" of the merge, what was "reported" of
        it, what an evaluation of the model on the disk gives ("test"), its "digest" and that of its replay ("again").

    Raises:
        M3Error: It cannot be written.
    """
    begun = time.perf_counter()
    merges = [
        line for line in lines if (line["kind"], line["seed"], tuple(line["group"])) == ("merge", job.seed, job.group)
    ]
    best = max(merges, key=_worth)  # of equals the first
    reported = best["arms"][M3]
    place = lab.work / WRITTEN / "+".join(job.group)
    with saying_what_failed(place):
        place.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(recipe_of(job._replace(method=best["method"], dare=best["dare"]), lab.places))
    weights = {WHOLE_MODEL: reported["weights"]}
    merged = merge_checkpoint(recipe, place / "model", weights=weights, overwrite=True)
    again = replay(place / "model", place / "again", overwrite=True)
    found = {
        **{name: best[name] for name in ("method", "dare")},
        "weights": reported["weights"],
        "reported": reported["test"],
        "test": _evaluated(place, [papers.test[name] for name in job.group]),
        "digest": merged.digest,
        "again": again.digest,
    }
    told = {"job": job.name, **job._asdict(), "group": list(job.group)}
    return {**told, "written": found, "seconds": {"job": time.perf_counter() - begun}}


def _worth(line: Line) -> float:
    """Of the best of a merge's draws, on dev examples."""
    chosen = line["arms"][M3]["weights"]
    return round(max(mean(one["dev"]) for one in line["trials"][M3] if one["weights"] == chosen), 9)


def _evaluated(place: Path, exams: Iterable[Exam]) -> dict[str, float]:
    """What `m3jax evaluate` gives of the written model, on examples in files."""
    generator = make_generator(open_model(str(place / "model")).load(), "error")
    scores = {}
    for exam in exams:
        data = place / f"{exam.skill}.jsonl"
        with saying_what_failed(data):
            data.write_text("".join(json.dumps(row) + "\n" for row in exam.rows), encoding="utf-8")
        summary = evaluate_task(
            exam.task,
            read_examples(exam.task, data),
            generator,
            template=exam.manner.template,
            tokenizer=exam.manner.tokenizer,
            settings=exam.settings,
            run_code=exam.task.runs_code,
        )
        scores[exam.skill] = summary.correct / len(exam.rows)
    return scores
