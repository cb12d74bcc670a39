"""Pickled weights, which are known so that they can be refused: to unpickle is to run what the file says."""

from pathlib import Path

from m3jax.checkpoints.formats import PICKLE
from m3jax.checkpoints.protocol import Checkpoint
from m3jax.checkpoints.storage import is_dir, list_names
from m3jax.errors import M3Error


def pickles_among(names: list[str]) -> list[str]:
    """Those of some names that pickles have."""
    return [name for name in names if name.endswith(PICKLE.endings)]


def holds_pickles(path: Path) -> bool:
    """Whether a path is a directory with pickles in it."""
    return is_dir(path) and bool(pickles_among(list_names(path)))


def open_pickle(path: Path) -> Checkpoint:
    """Refuses a pickle, or the first of a directory.

    Raises:
        M3Error: Always.
    """
    raise refused(path / min(pickles_among(list_names(path))) if is_dir(path) else path)


def refused(path: Path) -> M3Error:
    """The sentence for weights that only unpickling would open."""
    return M3Error(
        f"{path} is pickled, and pickles are never opened because they run code: load the model once in"
        " transformers and convert it with `model.save_pretrained(directory, safe_serialization=True)`."
    )
