"""The laboratory: trains a small base model and experts, runs the M³ paper's tables on them, and writes a report.

    scripts/lab --train sst2_phrases_train.tsv --held-out sst2_phrases_dev.tsv --out lab
    python -m m3jax.laboratory --setting gpu --out lab-gpu      # in an environment with a GPU's JAX: more of everything
    scripts/lab --base DIR --setting pretrained-cpu --out lab-pretrained     # experts of a Hugging Face model

The base learns a little of three skills (sentiment of phrases, arithmetic word problems, small programs), each expert
one of them; or experts are fine-tuned from a given base, asked in its own chat template. Merges by average, task
arithmetic and TIES, with and without M³ and DARE, are scored in and out of distribution and under adversaries, over
several seeds; ratios are chosen on other examples than are reported, at equal budgets. Killed at any point, the same
command goes on. The data files default to $M3JAX_DATA/sst2_phrases_*.tsv.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import jax

from m3jax.cli.shell import reported, resumable, wants_debug
from m3jax.errors import M3Error
from m3jax.laboratory.conducting import SETTINGS, Setting, conduct
from m3jax.laboratory.experts import Apprenticeship
from m3jax.laboratory.skills import Skill, brief_word_problems, programs, sentiment, word_problems

_WITH_BASE = [name for name, setting in SETTINGS.items() if setting.needs_base]
_TUNING = ("rank", "parts", "dtype")


def _skills(setting: str) -> list[Skill]:
    """What is learned beside sentiment; answers of a pretrained model are kept short where there is no GPU."""
    if setting == "pretrained-cpu":
        return [brief_word_problems()]
    return [brief_word_problems() if setting in _WITH_BASE else word_problems(), programs()]


def _parse() -> argparse.Namespace:
    """What was asked for."""
    data = Path(os.environ.get("M3JAX_DATA", "."))
    parser = argparse.ArgumentParser(
        "scripts/lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", default=data / "sst2_phrases_train.tsv", help="SST-2's phrases to learn")
    parser.add_argument("--held-out", default=data / "sst2_phrases_dev.tsv", help="others, to examine with")
    parser.add_argument("--out", type=Path, required=True, help="the directory for models, experiments and report")
    parser.add_argument("--setting", choices=SETTINGS, default="laptop")
    parser.add_argument("--base", help="a model to fine-tune, with a setting that begins with pretrained")
    parser.add_argument("--rank", type=int, help="fine-tune low-rank factors of this rank in place of all parameters")
    parser.add_argument("--parts", type=int, help="cut each of its batches into so many, which takes less memory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of its arithmetic; parameters are float32")
    parser.add_argument("--seed", type=int, default=0, help="of training, and the first of the experiments' seeds")
    parser.add_argument("--seeds", type=int, help="how many there are")
    parser.add_argument("--samples", type=int, help="evaluations that a choice of ratio may cost")
    return parser.parse_args()


def run() -> NoReturn:
    """The command as the shell calls it."""
    sys.exit(reported(main, wants_debug()))


def main() -> None:
    """Run the laboratory."""
    arguments = _parse()
    curriculum, experiments = SETTINGS[arguments.setting]
    experiments = experiments._replace(
        first=arguments.seed,
        seeds=experiments.seeds if arguments.seeds is None else arguments.seeds,
        samples=experiments.samples if arguments.samples is None else arguments.samples,
    )
    curriculum = curriculum._replace(seed=arguments.seed)
    tuning = {name: value for name in _TUNING if (value := getattr(arguments, name)) is not None}
    if isinstance(curriculum, Apprenticeship):
        curriculum = curriculum._replace(tuning=curriculum.tuning._replace(**tuning))
    elif tuning:
        raise M3Error(f"--{next(iter(tuning))} is of fine-tuning: it goes with {' and '.join(_WITH_BASE)}")
    setting = Setting(curriculum, experiments)
    if setting.needs_base != (arguments.base is not None):
        wanted = "needs --base DIR, the model to fine-tune" if setting.needs_base else "trains its own base"
        raise M3Error(f"--setting {arguments.setting} {wanted}: --base goes with {' and '.join(_WITH_BASE)}")
    if arguments.setting in ("gpu", "pretrained-gpu") and jax.default_backend() == "cpu":
        print("note: there is no GPU here, and on a CPU this setting takes days", file=sys.stderr)
    _tell("reading phrases")
    skills = [_sentiment(arguments.train, arguments.held_out), *_skills(arguments.setting)]
    command = shlex.join(["scripts/lab", *map(_without_place, sys.argv[1:])])
    with resumable(str(arguments.out), "models and experiments that are finished are kept, and not done again"):
        report = conduct(arguments.out, skills, setting, _tell, command, arguments.base)
    _tell(f"report: {report / 'report.md'}")


def _without_place(word: str) -> str:
    """An argument as a report tells it: where files lie on a machine is nobody's business."""
    option, sign, value = word.rpartition("=")
    return f"{option}{sign}{Path(value).name}" if Path(value).is_absolute() else word


def _tell(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _sentiment(train: str | Path, held_out: str | Path) -> Skill:
    try:
        return sentiment(train, held_out)
    except M3Error as error:
        raise M3Error(f"{error}; phrases are given with --train and --held-out, or found in $M3JAX_DATA") from error
