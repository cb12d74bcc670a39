"""The anatomy of a checkpoint where it is stored: with its config.json and what its trainer wrote beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.anatomy.building import anatomy_of
from m3jax.anatomy.types import Anatomy, Overrides
from m3jax.checkpoints import Checkpoint, TensorInfo, sketch_model
from m3jax.checkpoints.adapters import open_model
from m3jax.checkpoints.locate import CONFIG, read_config
from m3jax.checkpoints.orbax_tree import is_orbax
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.documents import LARGEST_FILE, parse_json, read_bounded
from m3jax.errors import M3Error

_RUN_DEPTH = 3  # directories of a run above an item: its step, `checkpoints`, and the run
_STEP_METADATA = "_CHECKPOINT_METADATA"  # of Orbax, in the directory of a step, beside its items


def step_metadata(path: Path) -> dict[str, str]:
    """What a trainer had Orbax write beside a step, such as MaxText's `scan_layers`; nothing where there is nothing.

    Args:
        path: Of a checkpoint: a step, or one of its items.
    """
    for place in (path, path.parent):
        try:
            told = parse_json(_content(place / _STEP_METADATA))
        except (OSError, ValueError):
            continue
        custom = told.get("custom_metadata") if isinstance(told, dict) else None
        if isinstance(custom, dict):
            return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in custom.items()}
    return {}


def _content(file: Path) -> bytes:
    """The whole of a small file, here or in remote storage; raises OSError where it is none."""
    if not is_file(file):
        raise FileNotFoundError(str(file))
    return read_file(file)


class Home(NamedTuple):
    """Where a model's configuration is.

    Attributes:
        directory: That of the configuration, and of a tokenizer if there is one.
        config: What it says; None where there is none.
        file: The file itself; None where there is none.
    """

    directory: Path
    config: dict[str, Any] | None
    file: Path | None


def find_home(path: Path, config: Path | None = None) -> Home:
    """The configuration of a model: the given one, the one beside its weights, or that of the run which they are of.

    Args:
        path: Of the checkpoint.
        config: A configuration in Hugging Face's terms, or the directory that holds one as config.json.

    Raises:
        M3Error: The given one is absent; or one cannot be read, or is not a JSON object.
    """
    beside = path if is_dir(path) else path.parent
    if config is not None and config.name != CONFIG and not is_dir(config):
        return Home(beside, _read_config(config), config)
    if config is not None:
        directory = config if is_dir(config) else config.parent
        found = read_config(directory)
        if found is None:
            raise M3Error(f"{directory / CONFIG}: is not there: give Hugging Face's config.json of the model")
        return Home(directory, found, directory / CONFIG)
    above = () if isinstance(path, RemotePath) or not is_orbax(path) else tuple(beside.parents)[:_RUN_DEPTH]
    for directory in (beside, *above):
        found = read_config(directory)
        if found is not None:
            return Home(directory, found, directory / CONFIG)
    return Home(beside, None, None)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_bounded(file, LARGEST_FILE))
    except OSError as error:
        raise M3Error(
            f"{file}: cannot be read: {error.strerror}: give Hugging Face's config.json of the model"
        ) from error
    except ValueError as error:
        raise M3Error(f"{file}: is not JSON ({error}): restore the file") from None
    if not isinstance(found, dict):
        raise M3Error(f"{file}: is not a JSON object: restore the file")
    return found


def stored_anatomy(
    checkpoint: Checkpoint, path: Path, config: Mapping[str, Any] | None, overrides: Overrides | None = None
) -> Anatomy:
    """What the tensors of an opened checkpoint, or of a view of one, are.

    Args:
        checkpoint: Open.
        path: Where it is stored.
        config: Its config.json.
        overrides: What a recipe says.

    Raises:
        M3Error: As `anatomy_of`.
    """
    return anatomy_of(checkpoint.tensors, config, {**checkpoint.metadata, **step_metadata(path)}, overrides)


def inspect_anatomy(name: str) -> tuple[Anatomy, Mapping[str, TensorInfo]]:
    """The anatomy of a model, from headers and small files alone.

    Args:
        name: A model directory, a weight file or a hub id.

    Returns:
        It, and the tensors that it is of.

    Raises:
        M3Error: There is no such model, or it cannot be read.
    """
    place = sketch_model(name)
    directory = place.path if is_dir(place.path) else place.path.parent
    try:
        config = parse_json(read_file(directory / "config.json"))
    except (OSError, ValueError, M3Error):
        config = None
    with open_model(place) as checkpoint:
        found = stored_anatomy(checkpoint, place.path, config if isinstance(config, dict) else None)
        return found, dict(checkpoint.tensors)
