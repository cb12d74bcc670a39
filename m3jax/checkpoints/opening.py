"""One door to checkpoints of every format."""

import os
from collections.abc import Callable
from pathlib import Path

from m3jax.checkpoints.headers import PICKLES
from m3jax.checkpoints.msgpack import open_msgpack
from m3jax.checkpoints.orbax import is_orbax, open_orbax
from m3jax.checkpoints.protocol import Checkpoint
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.safetensors import open_safetensors
from m3jax.checkpoints.storage import list_names
from m3jax.errors import M3Error

_INDEX = ".index.json"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the weights at a path, in whichever format they are; reads no values.

    A directory with weights in several formats is read as safetensors, else as msgpack.

    Args:
        path: A file or a directory of safetensors, a msgpack file of Flax or a directory that holds one, or a
            directory that Orbax wrote; in remote storage, safetensors.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no weights of a known format, or they are damaged.

    Example:
        >>> import tempfile
        >>> from flax.serialization import to_bytes
        >>> path = Path(tempfile.mkdtemp()) / "flax_model.msgpack"
        >>> _ = path.write_bytes(to_bytes({"kernel": b""}))
        >>> with open_checkpoint(path.parent) as checkpoint:
        ...     print(type(checkpoint).__name__)
        MsgpackCheckpoint
    """
    source = as_path(path)
    if isinstance(source, RemotePath):
        return open_safetensors(source)  # the one format that is read from afar
    opener = _opener_of_directory(source) if source.is_dir() else _opener_of_file(source)
    return opener(source)


def _opener_of_file(file: Path) -> Callable[[Path], Checkpoint]:
    name = file.name.removesuffix(_INDEX)
    if name.endswith(".safetensors") or file.suffix in PICKLES:
        return open_safetensors
    if name.endswith(".msgpack") or _starts_as_msgpack(file):
        return open_msgpack
    return open_safetensors  # whose sentences say what is wrong with the file


def _starts_as_msgpack(file: Path) -> bool:
    """Whether a file without a telling name begins with a map of msgpack and not with a header of safetensors."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
    except (OSError, ValueError):
        return False
    return head[:1] >= b"\x80" and (head[0] < 0x90 or head[0] in (0xDE, 0xDF)) and head[8:] != b"{"


def _opener_of_directory(directory: Path) -> Callable[[Path], Checkpoint]:
    names = [name for name in list_names(directory) if not name.startswith(".")]
    weights = [name.removesuffix(_INDEX) for name in names]
    if any(name.endswith(".safetensors") for name in weights):
        return open_safetensors
    if any(name.endswith(".msgpack") for name in weights):
        return open_msgpack
    if is_orbax(directory):
        return open_orbax
    if any(name.startswith("checkpoint_") and (directory / name).is_file() for name in names):
        return open_msgpack
    if any(name.endswith(PICKLES) for name in names):
        return open_safetensors  # which says why pickles are not opened
    raise M3Error(
        f"{directory} holds no weights: looked for *.safetensors, *.msgpack, Flax's checkpoint_… and Orbax's _METADATA,"
        " manifest.ocdbt, checkpoint, zarr arrays and steps; give the directory that has them."
    )
