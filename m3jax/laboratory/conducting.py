"""The laboratory from beginning to end: models, experiments, report; killed at any point, it goes on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
    Remembered,
    check_settings,
    do,
    jobs_of,
    known_of,
    make_papers,
)
from m3jax.laboratory.experts import Apprenticeship, make_experts, manner_of, notes_of
from m3jax.laboratory.models import BASE, Curriculum, make_models
from m3jax.laboratory.reporting import write_report
from m3jax.laboratory.skills import Skill
from m3jax.laboratory.training import Course, Size
from m3jax.laboratory.tuning import Tuning
from m3jax.laboratory.written import write_best
from m3jax.ledger import Ledger
from m3jax.progress import Tell, Watch
from m3jax.text import count_text, time_text

LEDGER, EXAMINATIONS = "experiments.jsonl", "examinations.jsonl"
"""Finished experiments; and where merges are examined once, each examination, so that a kill costs no more than one."""

_BETWEEN_REPORTS = 300.0  # seconds


class Setting(NamedTuple):
    """How much a laboratory does.

    Attributes:
        curriculum: How models are made: from scratch, or of a base that is given.
        experiments: How much is measured on them.
    """

    curriculum: Curriculum | Apprenticeship
    experiments: ExperimentSettings

    @property
    def needs_base(self) -> bool:
        """Whether experts are made of a base that is given."""
        return isinstance(self.curriculum, Apprenticeship)


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
        "pretrained-cpu": Setting(
            Apprenticeship(8192, Tuning(Course(200, 32, 1e-4), every=25)),
            # About two hours on two cores: a dev examination of such a base takes some 8 s, a whole one less than a
            # minute.
            ExperimentSettings(
                seeds=3, samples=8, dev=64, test=96, attacked=16, points=17, searches=8, recalls=True, writes=True
            ),
        ),
        "pretrained-gpu": Setting(
            Apprenticeship(60_000, Tuning(Course(1500, 64, 5e-5), dtype="bfloat16", every=250)),
            ExperimentSettings(
                seeds=5, samples=16, dev=256, test=512, attacked=64, points=33, searches=32, recalls=True, writes=True
            ),
        ),
    }
)
"""What a laptop does in minutes, what it does in an hour, and what wants a GPU; and the same of a pretrained base."""


def open_laboratory(
    directory: Path,
    skills: Sequence[Skill],
    setting: Setting,
    tell: Tell,
    watch: Watch | None = None,
    base: str | None = None,
) -> Laboratory:
    """The models, trained if they are not there yet.

    Args:
        directory: Where models go.
        skills: What they learn.
        setting: How large they are.
        tell: Told in lines how far it is.
        watch: Told of every step of every model's training.
        base: The model that experts are made of, for a setting that wants one.

    Raises:
        M3Error: There is a base and the setting wants none, or the other way round; or as `make_models`.
    """
    curriculum, models = setting.curriculum, directory / "models"
    if isinstance(curriculum, Apprenticeship):
        if base is None:
            raise M3Error("this setting fine-tunes a base: give its directory with --base DIR")
        places = make_experts(models, base, skills, curriculum, tell)
        config, tokenizer = _of(places[BASE])
        pupil = Pupil(config, tokenizer, manner_of(tokenizer), shares=True)
    else:
        if base is not None:
            raise M3Error("this setting trains its own base, so that --base has no meaning: leave it out")
        places = make_models(models, skills, curriculum, tell, watch)
        pupil = Pupil(*_of(places[BASE]))
    return Laboratory(places, pupil, setting.experiments, directory)


def _of(place: Path) -> tuple[DecoderConfig, Any]:
    return DecoderConfig.from_directory(place), load_tokenizer(str(place), place)


def conduct(
    directory: Path, skills: Sequence[Skill], setting: Setting, tell: Tell, command: str, base: str | None = None
) -> Path:
    """Trains the models, does the experiments and writes the report.

    Args:
        directory: Where everything goes; what is there and belongs to it is not done again.
        skills: What is learned and examined.
        setting: How much.
        tell: Told in lines how far it is.
        command: What was typed, for the report.
        base: The model that experts are made of, for a setting that wants one.

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
        if (directory / "report").exists() and not (directory / LEDGER).exists():
            raise M3Error(f"{directory / 'report'}: is of no laboratory: give a new or an empty directory")
    lab = open_laboratory(directory, skills, setting, tell, base=base)
    identity = {
        "settings": setting.experiments._asdict(),
        "skills": {skill.name: skill.identity() for skill in skills},
        "adversaries": str(ADVERSARIES),
        "models": {name: open_model(str(place)).fingerprint("truncate") for name, place in lab.places.items()},
        "programs are run": why_no_sandbox() is None,
        "version": __version__,
    }
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(directory / LEDGER, identity, "experiment", "with --out DIR"))
        known = None
        if lab.how.recalls:
            notes = Ledger(directory / EXAMINATIONS, identity, "experiment", "with --out DIR")
            known = known_of(stack.enter_context(notes).entries, notes.add)
        about = {
            "command": command,
            "settings": setting.experiments._asdict(),
            "models": _models(lab.places),
            **({"base": _name_of(base)} if base is not None else {}),
            **_tuning(lab.places),
            "machine": _machine(),
            "held_out": "; ".join(f"{skill.name}: {skill.apart}, shifted: {skill.shift}" for skill in skills),
        }

        def report() -> None:
            seconds = sum(line["seconds"]["job"] for line in ledger.entries)
            write_report(ledger.entries, directory / "report", {**about, "seconds": seconds})

        _do_all(lab, skills, ledger, known, tell, report)
        report()
    return directory / "report"


def _do_all(
    lab: Laboratory,
    skills: Sequence[Skill],
    ledger: Ledger,
    known: Remembered | None,
    tell: Tell,
    report: Callable[[], None],
) -> None:
    """Does what is not done; every few minutes, a report tells what is there."""
    jobs = jobs_of([skill.name for skill in skills], lab.how)
    done = {line["job"] for line in ledger.entries}
    left = [job for job in jobs if job.name not in done]
    tell(f"{count_text(len(left), 'experiment')} of {len(jobs)} to do")
    spent: dict[tuple[str, int], list[float]] = {}
    for line in ledger.entries:
        spent.setdefault((line["kind"], len(line["group"])), []).append(line["seconds"]["job"])
    told = time.monotonic()
    for number, job in enumerate(left):
        if number == 0 or job.seed != left[number - 1].seed:
            papers = make_papers(skills, lab.how, job.seed, lab.pupil.manner)
        is_written = job.kind == "written"
        line = write_best(lab, job, papers, ledger.entries) if is_written else do(lab, job, papers, known)
        ledger.add(line)
        spent.setdefault((job.kind, len(job.group)), []).append(line["seconds"]["job"])
        rest = _time_left(left[number + 1 :], spent)
        tell(f"{len(jobs) - len(left) + number + 1} of {len(jobs)}: {job.name}; about {time_text(rest)} left")
        if time.monotonic() - told > _BETWEEN_REPORTS:
            report()
            told = time.monotonic()


def _time_left(jobs: Sequence[Experiment], spent: Mapping[tuple[str, int], Sequence[float]]) -> float:
    """By what jobs of the same kind took; of those of which none is done, by what all took."""
    typical = {kind: statistics.median(seconds) for kind, seconds in spent.items()}
    overall = statistics.fmean(typical.values())
    return sum(typical.get((job.kind, len(job.group)), overall) for job in jobs)


_LONG = ("losses", "drift")  # which are told in a section of their own


def _models(places: Mapping[str, Path]) -> dict[str, Any]:
    """How large the models are and how they were trained."""
    training = {
        name: {what: value for what, value in notes_of(place).items() if what not in _LONG}
        for name, place in places.items()
    }
    return {"parameters": look_at(str(places[BASE])).entries, "training": training}


def _tuning(places: Mapping[str, Path]) -> dict[str, Any]:
    """What is known of the way from base to expert."""
    notes = {name: notes_of(place) for name, place in places.items()}
    told = {name: {what: one[what] for what in _LONG} for name, one in notes.items() if "losses" in one}
    return {"tuning": told} if told else {}


def _name_of(base: str) -> str:
    """A directory by its last name: where it lies is nobody's business."""
    path = Path(base)
    return path.resolve().name if path.is_dir() else base


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
