"""An exploration that was killed when its merge was there, and what it found was not yet told."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3jax.checkpoints.remote import RemotePath, as_path, is_url
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.evaluation.report import EXPLORATION_FILE
from m3jax.exploration.journal import FILE
from m3jax.outputs import manifest
from m3jax.outputs.places import check_free
from m3jax.outputs.remote import check_remote_free
from m3jax.recipe import Recipe
from m3jax.streaming.merging import MergeResult


def made_before(out: str | os.PathLike[str], place: Path, recipe: Recipe) -> MergeResult | None:
    """The merge that an exploration had made when it was killed, before it told of it; None where `out` is free.

    Args:
        out: The output.
        place: The directory of the samples.
        recipe: What is explored.

    Raises:
        M3Error: The output is there, and not of such an exploration.
    """
    if not (place / FILE).exists():  # of no exploration, as whoever makes the merge says
        return None
    output = as_path(out)
    try:
        if isinstance(output, RemotePath):
            check_remote_free(output, False)
        else:
            check_free(output, False)
        return None
    except M3Error as error:
        found = _unfinished(output, place, recipe)
        if found is None:
            raise _taken(out, place, error) from None
        return found


def check_chosen(made: MergeResult, chosen: Recipe, weights: Mapping[str, tuple[float, ...]], place: Path) -> None:
    """Raise M3Error unless a merge is the one that was chosen.

    Args:
        made: A merge that is there.
        chosen: The recipe, with the granularity of the weights.
        weights: By group.
        place: The directory of the samples.
    """
    if made.manifest["recipe"] != _resolved(chosen) or manifest.drawn_weights(made.manifest) != dict(weights):
        raise _taken(str(made.directory), place)


def _taken(out: str | os.PathLike[str], place: Path, error: M3Error | None = None) -> M3Error:
    if error is not None and (is_url(os.fspath(out)) or not Path(out).exists()):
        return error
    return M3Error(
        f"{out}: exists already: pass --overwrite, which keeps the samples in {place}, or choose another output"
    )


def _unfinished(out: Any, place: Path, recipe: Recipe) -> MergeResult | None:
    """A merge of the recipe, whatever its weights, of which the exploration does not tell."""
    try:
        record = manifest.read(out)
    except (M3Error, OSError):
        return None
    told = (str(out), record["output"]["digest"])
    if _without_granularity(record["recipe"]) != _without_granularity(_resolved(recipe)) or _tells(place, told):
        return None
    return MergeResult(out, told[1], record, 0.0, 0, 0, len(record["output"].get("weight_files", ())), (), ())


def _tells(place: Path, told: tuple[str, str]) -> bool:
    """Whether what was found is of this directory and digest."""
    try:
        found = parse_json((place / EXPLORATION_FILE).read_bytes(), halves=True)
        return (found["directory"], found["digest"]) == told
    except (OSError, *FAULTS):
        return False


def _resolved(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a manifest holds it."""
    return dict(json.loads(json.dumps(recipe.resolved())))


def _without_granularity(told: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe but for how fine its weights are, which learning changes."""
    mixup = told.get("mixup")
    return {**told, "mixup": {**mixup, "granularity": None} if isinstance(mixup, dict) else mixup}
