"""The laboratory from beginning to end: models, experiments, report; killed at any point, it goes on."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from m3jax import __version__
from m3jax.checkpoints.inspection import look_at
from m3jax.decoder import DecoderConfig
from m3jax.errors import M3Error, saying_what_failed
from m3jax.evaluation import why_no_sandbox
from m3jax.evaluation.models import open_model
from m3jax.evaluation.tokens import load_tokenizer
from m3jax.laboratory.examining import ADVERSARIES, Pupil
from m3jax.laboratory.experiments import (
    Experiment,
    ExperimentSettings,
    Laboratory,
    check_settings,
    do,
    jobs_of,
    make_papers,
)
from m3jax.laboratory.models import BASE, TRAINING, Curriculum, make_models
from m3jax.laboratory.reporting import write_report
from m3jax.laboratory.skills import Skill
from m3jax.laboratory.training import Course, Size
from m3jax.ledger import Ledger
from m3jax.progress import Tell, Watch
from m3jax.text import count_text, time_text

LEDGER = "experiments.jsonl"


class Setting(NamedTuple):
    """How much a laboratory does.

    Attributes:
        curriculum: How models are made.
        experiments: How much is measured on them.
    """

    curriculum: Curriculum
    experiments: ExperimentSettings


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "small": Setting(
            Curriculum(Size(96, 2, 4, 600), 20_000, Course(1500, 32, 3e-3, whole=True), Course(400, 32, 6e-4)),
            ExperimentSettings(seeds=2, samples=4, dev=32, test=64, attacked=32, points=11),
        ),
        "laptop": Setting(
            Curriculum(Size(128, 4, 4, 800), 50_000, Course(2500, 32, 2e-3, whole=True), Course(1000, 32, 5e-4)),
            ExperimentSettings(),
        ),
        "gpu": Setting(
            Curriculum(Size(512, 8, 8, 4000), 400_000, Course(8000, 256, 1e-3, whole=True), Course(2000, 256, 2e-4)),
            # As many examples as SST-2 has phrases.
            ExperimentSettings(seeds=10, samples=16, dev=128, test=110, attacked=110, points=41),
        ),
    }
)
"""What a laptop does in minutes, what it does in an hour, and what wants a GPU."""


def open_laboratory(
    directory: Path, skills: Sequence[Skill], setting: Setting, tell: Tell, watch: Watch | None = None
) -> Laboratory:
    """The models, trained if they are not there yet.

    Args:
        directory: Where models go.
        skills: What they learn.
        setting: How large they are.
        tell: Told in lines how far it is.
        watch: Told of every step of every model's training.
    """
    places = make_models(directory / "models", skills, setting.curriculum, tell, watch)
    pupil = Pupil(DecoderConfig.from_directory(places[BASE]), load_tokenizer(str(places[BASE]), places[BASE]))
    return Laboratory(places, pupil, setting.experiments, directory)


def conduct(directory: Path, skills: Sequence[Skill], setting: Setting, tell: Tell, command: str) -> Path:
    """Trains the models, does the experiments and writes the report.

    Args:
        directory: Where everything goes; what is there and belongs to it is not done again.
        skills: What is learned and examined.
        setting: How much.
        tell: Told in lines how far it is.
        command: What was typed, for the report.

    Returns:
        The directory of the report.

    Raises:
        M3Error: The directory holds another laboratory's experiments, or cannot be used.
    """
    check_settings(setting.experiments)
    make_papers(skills, setting.experiments, setting.experiments.first)  # what is lacking is said before training
    with saying_what_failed(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / "models").is_dir():
            raise M3Error(f"{directory}: holds something else than a laboratory: give a new or an empty directory")
    lab = open_laboratory(directory, skills, setting, tell)
    identity = {
        "settings": setting.experiments._asdict(),
        "skills": {skill.name: skill.identity() for skill in skills},
        "adversaries": str(ADVERSARIES),
        "models": {name: open_model(str(place)).fingerprint("truncate") for name, place in lab.places.items()},
        "programs are run": why_no_sandbox() is None,
        "version": __version__,
    }
    with Ledger(directory / LEDGER, identity, "experiment", "with --out DIR") as ledger:
        _do_all(lab, skills, ledger, tell)
        about = {
            "command": command,
            "settings": setting.experiments._asdict(),
            "models": _models(lab.places),
            "machine": _machine(),
            "seconds": sum(line["seconds"]["job"] for line in ledger.entries),
            "held_out": "; ".join(f"{skill.name}: {skill.apart}, shifted: {skill.shift}" for skill in skills),
        }
        write_report(ledger.entries, directory / "report", about)
    return directory / "report"


def _do_all(lab: Laboratory, skills: Sequence[Skill], ledger: Ledger, tell: Tell) -> None:
    jobs = jobs_of([skill.name for skill in skills], lab.how)
    done = {line["job"] for line in ledger.entries}
    left = [job for job in jobs if job.name not in done]
    tell(f"{count_text(len(left), 'experiment')} of {len(jobs)} to do")
    spent: dict[tuple[str, int], list[float]] = {}
    for line in ledger.entries:
        spent.setdefault((line["kind"], len(line["group"])), []).append(line["seconds"]["job"])
    for number, job in enumerate(left):
        if number == 0 or job.seed != left[number - 1].seed:
            papers = make_papers(skills, lab.how, job.seed)
        line = do(lab, job, papers)
        ledger.add(line)
        spent.setdefault((job.kind, len(job.group)), []).append(line["seconds"]["job"])
        rest = _time_left(left[number + 1 :], spent)
        tell(f"{len(jobs) - len(left) + number + 1} of {len(jobs)}: {job.name}; about {time_text(rest)} left")


def _time_left(jobs: Sequence[Experiment], spent: Mapping[tuple[str, int], Sequence[float]]) -> float:
    """By what jobs of the same kind took; of those of which none is done, by what all took."""
    typical = {kind: statistics.median(seconds) for kind, seconds in spent.items()}
    overall = statistics.fmean(typical.values())
    return sum(typical.get((job.kind, len(job.group)), overall) for job in jobs)


def _models(places: Mapping[str, Path]) -> dict[str, Any]:
    """How large the models are and how they were trained."""
    training = {name: json.loads((place / TRAINING).read_text(encoding="utf-8")) for name, place in places.items()}
    return {"parameters": look_at(str(places[BASE])).entries, "training": training}


def _machine() -> str:
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{os.cpu_count()} cores of {_processor()}"
    sandbox = "" if why_no_sandbox() is None else "; no sandbox, so programs count by their text"
    return f"{count_text(jax.device_count(), 'device')} ({kind}), jax {jax.__version__}{sandbox}"


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
