"""One door to checkpoints of every format."""

import os
from pathlib import Path

from m3jax.checkpoints import formats
from m3jax.checkpoints.formats import Format
from m3jax.checkpoints.protocol import Checkpoint
from m3jax.checkpoints.remote import RemotePath, as_path
from m3jax.checkpoints.storage import is_dir, list_names
from m3jax.errors import M3Error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the weights at a path, in whichever format they are; reads no values.

    A directory with weights in several formats is read as safetensors, else as msgpack; PyTorch's files are read where
    there are no others.

    Args:
        path: A file or a directory of safetensors or of PyTorch's zip files, a msgpack file of Flax or a directory that
            holds one, or a directory that Orbax wrote; in remote storage, all but msgpack.

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
    return recognise(source).open(source)


def recognise(path: Path) -> Format:
    """The format of the weights at a path.

    Args:
        path: A file or a directory, here or in remote storage.

    Returns:
        The format that names tell of, else the one that the content resembles; for a file that tells nothing the first,
        whose reader says what is wrong with it.

    Raises:
        M3Error: A directory holds no weights, or remote ones are of a format that is read from a disk only.
    """
    if isinstance(path, RemotePath):
        return _of_remote(path)
    if is_dir(path):
        return _of_directory(path)
    named = _named(path.name)
    return named or next((format for format in formats.FORMATS if _resembles(format, path)), formats.FORMATS[0])


def _named(file: str) -> Format | None:
    return next((format for format in formats.FORMATS if format.names(file)), None)


def _resembles(format: Format, path: Path) -> bool:
    return format.resembles is not None and format.resembles(path)


def _of_remote(path: RemotePath) -> Format:
    """The format that a name tells of, or those of a directory's files, or which it resembles by their names."""
    format = _named(path.name) or _of_remote_directory(path)
    if not format.remote:
        raise M3Error(f"{path} is {format.name}, which is read from this disk only: download it first.")
    return format


def _of_remote_directory(directory: RemotePath) -> Format:
    able = [format for format in formats.FORMATS if format.remote]
    place = directory.remembering()
    if not is_dir(place):
        return able[0]
    names = list_names(place)
    named = next((format for format in able if any(map(format.names, names))), None)
    return named or next((format for format in able if _resembles(format, place)), able[0])


def _of_directory(directory: Path) -> Format:
    names = [name for name in list_names(directory) if not name.startswith(".")]
    for format in formats.FORMATS:
        if not format.yields and any(map(format.names, names)):
            return format
    for format in formats.FORMATS:
        if _resembles(format, directory):
            return format
    traces = ", ".join(format.traces for format in formats.FORMATS if format.traces)
    raise M3Error(f"{directory} holds no weights: looked for {traces}; give the directory that has them.")
