"""What an attack has finished so far, on disk after each attack and shift, with what it is of, so that it goes on."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m3jax.checkpoints import digest_file, locate_model
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.evaluation.attacks.measure import Drop
from m3jax.evaluation.attacks.search import Change
from m3jax.evaluation.attacks.trial import Attacked, Robustness, Shifted
from m3jax.evaluation.ownership import check_entries
from m3jax.evaluation.records import check_identity, write_whole

FILE = "attack.json"
RUN = "attack-run.json"
_ENTRIES = ("identity", "found")  # of the file of a run


def check_free(out: Path, overwrite: bool, resume: bool) -> None:
    """Raise M3Error where an output directory holds what was not to be replaced or gone on with.

    Args:
        out: The directory.
        overwrite: Replace an attack that is there.
        resume: Go on with it.
    """
    file, run = out / FILE, out / RUN
    check_entries(run, _ENTRIES)
    if overwrite or not (file.exists() or run.exists()):
        return
    if resume and not run.exists():
        raise M3Error(f"{file} is of an attack that cannot be gone on with, as {RUN} is not beside it: --overwrite it")
    if not resume and _is_finished(file):
        raise M3Error(f"{file} is already there: give another output directory, or --overwrite")
    if not resume:
        raise M3Error(
            f"{out} holds an attack that is not finished: pass --resume to go on with it, --overwrite to begin anew, "
            "or give another output directory"
        )


def _is_finished(file: Path) -> bool:
    """Whether an attack is, as far as its result says; one that says nothing is not to be gone on with."""
    try:
        return bool(parse_json(file.read_bytes(), halves=True)["complete"])
    except FileNotFoundError:
        return False
    except (OSError, *FAULTS):
        return True


def source_digest(name: str | None) -> str | dict[str, str] | None:
    """What an attack's model or word vectors hold, which is read again where an attack goes on.

    Args:
        name: A file, a model directory or a hub id; None of what was not given.
    """
    if name is None:
        return None
    path = Path(name) if Path(name).is_file() else locate_model(name).path
    if path.is_file():
        return digest_file(path)
    files = sorted(each for each in (*path.glob("*"), *path.glob("*/*.json")) if each.is_file())
    return {str(each.relative_to(path)): digest_file(each) for each in files}


def read_run(
    out: Path, identity: Mapping[str, Any], weights: Callable[[], str], resume: bool
) -> tuple[dict[str, Any], Robustness | None]:
    """What the run in a directory is of, and what it has finished; nothing finished where none is there.

    Args:
        out: The directory.
        identity: What the run is of: JSON data.
        weights: Identifies the weights, which may take long; asked for when all else is known to agree.
        resume: Whether to go on with a run that is there.

    Raises:
        M3Error: It is another run, or damaged.
    """
    path = out / RUN
    if not resume or not path.exists():
        return {**identity, "weights": weights()}, None
    try:
        told = parse_json(path.read_bytes(), halves=True)
        known, found = dict(told["identity"]), _robustness(told["found"])
    except (OSError, *FAULTS) as error:
        raise M3Error(f"{path} is of no attack that could be gone on with ({error}): --overwrite it") from error
    check_identity(out, known, {**identity, "weights": known.get("weights")})
    whole = {**identity, "weights": weights()}
    check_identity(out, known, whole)
    return whole, found


def write_run(out: Path, identity: Mapping[str, Any], found: Robustness) -> None:
    """Keeps what is finished.

    Args:
        out: The directory.
        identity: What the run is of.
        found: What is finished.

    Raises:
        M3Error: It cannot be written.
    """
    write_whole(out / RUN, json.dumps({"identity": dict(identity), "found": found.to_json()}, indent=2) + "\n")


# --- From plain data ---------------------------------------------------------------------------------------------


def _robustness(told: Any) -> Robustness:
    """What `Robustness.to_json` gave; raises of every kind if it is something else."""
    attacks, shifts = tuple(map(_attacked, told["attacks"])), tuple(map(_shifted, told["shifts"]))
    found = Robustness(**{**told, "attacks": attacks, "shifts": shifts})
    found = found._replace(interval=_pair(found.interval), protected=tuple(map(_text, found.protected)))
    for number in (found.examples, found.searched, found.accuracy):
        _number(number)
    if type(found.complete) is not bool:
        raise TypeError("it does not say whether it is complete")
    return found


def _attacked(told: Any) -> Attacked:
    changes = tuple(Change(**one) for one in told["changes"])
    found = Attacked(**{**told, "drop": _drop(told["drop"]), "changes": changes})
    for text in (found.attack, found.level, found.prompt, *(text for one in changes for text in one[1:])):
        _text(text)
    for number in (found.queries, found.candidates, *(one.place for one in changes)):
        _number(number)
    return found


def _shifted(told: Any) -> Shifted:
    found = Shifted(**{**told, "drop": _drop(told["drop"])})
    _text(found.shift)
    _number(found.changed)
    return found


def _drop(told: Any) -> Drop:
    found = Drop(**told)
    for number in (found.examples, found.clean, found.attacked, *([] if found.pdr is None else [found.pdr])):
        _number(number)
    return found if found.interval is None else found._replace(interval=_pair(found.interval))


def _pair(told: Any) -> tuple[float, float]:
    low, high = map(_number, told)
    return low, high


def _number(told: Any) -> float:
    if type(told) not in (int, float) or not math.isfinite(told):
        raise TypeError(f"{told!r:.50} is no number")
    return float(told)


def _text(told: Any) -> str:
    if not isinstance(told, str):
        raise TypeError(f"{told!r:.50} is no text")
    return told
