"""The msgpack checkpoints of Flax, read byte range by byte range.

Files are those of `flax.serialization` (`to_bytes`, `msgpack_serialize`), of `flax.training.checkpoints`
(`checkpoint_123`), and `flax_model.msgpack` as transformers 4 wrote it, in one file or in several with an index.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3jax.checkpoints.files import Seen, WeightFiles, find_index, joined_metadata, read_index
from m3jax.checkpoints.formats import MSGPACK
from m3jax.checkpoints.msgpack_tree import ArrayPlace, Structure, read_structure
from m3jax.checkpoints.msgpack_writer import write_msgpack
from m3jax.checkpoints.protocol import (
    Checkpoint,
    Closing,
    FileFingerprint,
    TensorInfo,
    in_natural_order,
    natural_key,
    room_for,
)
from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.storage import first_bytes, is_dir, is_file, list_names
from m3jax.errors import M3Error

__all__ = ["MsgpackCheckpoint", "is_msgpack", "open_msgpack", "write_msgpack"]


class MsgpackCheckpoint(Closing):
    """One or several msgpack files of Flax as one checkpoint; made by `open_msgpack`.

    Attributes:
        location: The path that was opened.
        tensors: Every array by its path joined with ".", in natural order.
        metadata: Numbers and short texts among the arrays, such as a step count, the first file first.
    """

    def __init__(self, location: str, root: Path, structures: Mapping[str, Structure]) -> None:
        """Joins files whose structure is known.

        Args:
            location: What the checkpoint is called.
            root: The directory that the files are in.
            structures: Of each file, by its name under `root`.

        Raises:
            M3Error: Two arrays have one name.
        """
        self._places: dict[str, tuple[str, ArrayPlace]] = {}
        for file, structure in structures.items():
            for keys, place in structure.arrays.items():
                name = ".".join(keys)
                if name in self._places:
                    raise M3Error(
                        f"{root / file} has a second tensor of the name {name!r}: rename one, as names are"
                        ' the keys joined by ".".'
                    )
                self._places[name] = file, place
        self.location = location
        self.tensors = in_natural_order(
            {name: TensorInfo(name, place.shape, place.dtype) for name, (_, place) in self._places.items()}
        )
        self.metadata = joined_metadata(structure.metadata for structure in structures.values())
        seen = {file: Seen(structure.identity, structure.digest) for file, structure in structures.items()}
        self._files = WeightFiles(location, root, seen, _look)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        file, place = self._places[name]
        for offset, size in place.spans:
            if not len(view):
                return
            wanted = view[: max(0, size - start)]
            self._files.read(file, name, wanted, offset + start, offset + size)
            start = max(0, start - size)
            view = view[len(wanted) :]

    @property
    def sequential(self) -> bool:
        """See `Sequential`."""
        return self._files.sequential

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self._files.paths()

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name; everything but the arrays' values counts as header."""
        return self._files.fingerprint()

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""
        self._files.close()


def _look(path: Path) -> Seen:
    structure = read_structure(path)
    return Seen(structure.identity, structure.digest)


def is_msgpack(path: Path) -> bool:
    """Whether a path whose name does not tell is of this format.

    Args:
        path: A file, which then begins with a map of msgpack and not with a header of safetensors; or a directory,
            which then has steps of `flax.training.checkpoints`.
    """
    if is_dir(path):
        return any(name.startswith("checkpoint_") and is_file(path / name) for name in list_names(path))
    head = first_bytes(path, 9)
    return head[:1] >= b"\x80" and (head[0] < 0x90 or head[0] in (0xDE, 0xDF)) and head[8:] != b"{"


def open_msgpack(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the msgpack weights of Flax at a path; reads their structure only.

    Arrays and numpy scalars are tensors, named by their keys joined with "." (entries of lists count as keys "0",
    "1", …). Numbers, truth values and short texts are found in `metadata`; other leaves are left out.

    Args:
        path: A msgpack file of any name, an index, or a directory, where the files are taken that
            `flax_model.msgpack.index.json` lists, else `flax_model.msgpack`, else the only `*.msgpack` file, else the
            `checkpoint_…` file with the highest number.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no such weights, or a file is damaged or does not agree with the index.

    Example:
        >>> import tempfile
        >>> from flax.serialization import to_bytes
        >>> path = Path(tempfile.mkdtemp()) / "flax_model.msgpack"
        >>> _ = path.write_bytes(to_bytes({"dense": {"kernel": np.ones((2, 3), np.float32)}, "step": 7}))
        >>> with open_msgpack(path) as checkpoint:
        ...     print(checkpoint.tensors["dense.kernel"], dict(checkpoint.metadata))
        TensorInfo(name='dense.kernel', shape=(2, 3), dtype='F32') {'step': '7'}
    """
    source = as_path(path)
    index = find_index(source, MSGPACK)
    if index is None:
        root, file = (source, _choose(source)) if is_dir(source) else (source.parent, source.name)
        return MsgpackCheckpoint(str(path), root, {file: read_structure(root / file)})
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()), key=natural_key)
    structures = {file: read_structure(index.parent / file) for file in files}
    _check_index(index, weight_map, structures)
    return MsgpackCheckpoint(str(path), index.parent, structures)


def _check_index(index: Path, weight_map: Mapping[str, str], structures: Mapping[str, Structure]) -> None:
    """Checks that files hold the arrays that the index places in them, and no others."""
    holders = {"/".join(keys): file for file, structure in structures.items() for keys in structure.arrays}
    for name in sorted(holders.keys() | weight_map.keys(), key=natural_key):
        if holders.get(name) != weight_map.get(name):
            placed, found = (repr(where.get(name, "no file")) for where in (weight_map, holders))
            raise M3Error(
                f"{index} places tensor {name!r} in {placed}, but it is in {found}: the two are not of one"
                " model, so download it again."
            )


def _choose(directory: Path) -> str:
    """The file of a directory that has no index to follow."""
    names = sorted((name for name in list_names(directory) if not name.startswith(".")), key=natural_key)
    if MSGPACK.single_file in names:
        return MSGPACK.single_file
    files = [name for name in names if name.endswith(MSGPACK.endings)]
    if len(files) > 1:
        raise M3Error(
            f"{directory} holds {len(files)} .msgpack files and no {MSGPACK.index_file} that joins them: give one"
            " file's path or download the index."
        )
    return files[0] if files else _latest(directory, names)


def _latest(directory: Path, names: Sequence[str]) -> str:
    """The last checkpoint of `flax.training.checkpoints`; those that are directories are Orbax's."""
    steps = [name for name in names if re.fullmatch(r"checkpoint_[0-9.]+", name) and is_file(directory / name)]
    if not steps:
        raise M3Error(
            f"{directory} holds no {MSGPACK.single_file} and no checkpoint_… file of Flax: give the one that does."
        )
    return steps[-1]
