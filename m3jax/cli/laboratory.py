"""The laboratory: trains a small base model and experts, runs the M³ paper's tables on them, and writes a report.

    scripts/lab --train sst2_phrases_train.tsv --held-out sst2_phrases_dev.tsv --out lab
    python -m m3jax.laboratory --setting gpu --out lab-gpu      # in an environment with a GPU's JAX: more of everything

The base learns a little of three skills (sentiment of phrases, arithmetic word problems, small programs), each expert
one of them. Merges by average, task arithmetic and TIES, with and without M³ and DARE, are scored in and out of
distribution and under adversaries, over several seeds; ratios are chosen on other examples than are reported, at equal
budgets. Killed at any point, the same command goes on. The data files default to $M3JAX_DATA/sst2_phrases_*.tsv.
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
from m3jax.laboratory.conducting import SETTINGS, conduct
from m3jax.laboratory.skills import Skill, programs, sentiment, word_problems


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
    setting = SETTINGS[arguments.setting]._replace(
        curriculum=curriculum._replace(seed=arguments.seed), experiments=experiments
    )
    if arguments.setting == "gpu" and jax.default_backend() == "cpu":
        print("note: there is no GPU here, and on a CPU this setting takes days", file=sys.stderr)
    _tell("reading phrases")
    skills = [_sentiment(arguments.train, arguments.held_out), word_problems(), programs()]
    command = shlex.join(["scripts/lab", *sys.argv[1:]])
    with resumable(str(arguments.out), "models and experiments that are finished are kept, and not done again"):
        report = conduct(arguments.out, skills, setting, _tell, command)
    _tell(f"report: {report / 'report.md'}")


def _tell(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _sentiment(train: str | Path, held_out: str | Path) -> Skill:
    try:
        return sentiment(train, held_out)
    except M3Error as error:
        raise M3Error(f"{error}; phrases are given with --train and --held-out, or found in $M3JAX_DATA") from error
