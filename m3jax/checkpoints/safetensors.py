"""Reading safetensors, byte range by byte range, from one file or several, here or in remote storage."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from m3jax.checkpoints.files import (
    Seen,
    WeightFiles,
    check_numbering,
    joined_metadata,
    read_files,
)
from m3jax.checkpoints.formats import SAFETENSORS
from m3jax.checkpoints.headers import Header, read_header, read_raw_header
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
from m3jax.checkpoints.storage import is_file, list_names
from m3jax.errors import M3Error

# --- Files -----------------------------------------------------------------------------------------------


def _look(path: Path) -> Seen:
    raw, identity = read_raw_header(path)
    return Seen(identity, blake3(raw).hexdigest())


def _straight_ends(tensors: Iterable[TensorInfo], places: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """For each tensor, the offset in its file up to which the tensors after it follow without a gap.

    Args:
        tensors: In the order in which they are read.
        places: The file and the first offset of each.
    """
    ends: dict[str, int] = {}
    after, beyond = ("", 0), 0  # where the next tensor is, and how far straight reading goes from there
    for info in reversed(list(tensors)):
        file, begin = places[info.name]
        end = begin + info.nbytes
        beyond = beyond if after == (file, end) else end
        ends[info.name] = beyond
        after = (file, begin)
    return ends


# --- Reading ---------------------------------------------------------------------------------------------


class SafetensorsCheckpoint(Closing):
    """One or several safetensors files as one checkpoint; made by `open_safetensors`.

    Attributes:
        location: The path that was opened.
        tensors: Every tensor by name, in natural order.
        metadata: The files' `__metadata__`, the first file first.
    """

    def __init__(self, location: str, root: Path, headers: Mapping[str, Header]) -> None:
        """Joins files whose headers are known.

        Args:
            location: What the checkpoint is called.
            root: The directory that the files are in.
            headers: Of each file, by its name under `root`; no tensor is in two of them.
        """
        self.location = location
        self.tensors = in_natural_order(
            {name: info for header in headers.values() for name, info in header.tensors.items()}
        )
        self.metadata = joined_metadata(header.metadata for header in headers.values())
        self._places = {
            name: (file, offset) for file, header in headers.items() for name, offset in header.offsets.items()
        }
        self._straight_ends = _straight_ends(self.tensors.values(), self._places)
        seen = {file: Seen(header.identity, header.blake3) for file, header in headers.items()}
        self._files = WeightFiles(location, root, seen, _look)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        file, offset = self._places[name]
        self._files.read(file, name, view, offset + start, self._straight_ends[name])

    @property
    def sequential(self) -> bool:
        """See `Sequential`."""
        return self._files.sequential

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self._files.paths()

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name under the checkpoint's directory."""
        return self._files.fingerprint()

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""
        self._files.close()


def open_safetensors(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the safetensors weights at a path; reads headers only.

    Args:
        path: A `.safetensors` file, an index, or a model directory, where the files are taken that
            `model.safetensors.index.json` lists, else `model.safetensors`, else all `*.safetensors` files; here, or
            as `s3://bucket/path` or `gs://bucket/path`.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no such weights, or a file is damaged or does not agree with the others.
    """
    root, told = read_files(as_path(path), SAFETENSORS, _list_weights, read_header)
    return SafetensorsCheckpoint(str(path), root, told)


def _list_weights(directory: Path) -> list[str]:
    """The weight files of a directory that has no index to follow."""
    if is_file(directory / SAFETENSORS.single_file):
        return [SAFETENSORS.single_file]
    names = sorted(list_names(directory), key=natural_key)
    # Names that start with a dot are other systems' side files.
    files = [name for name in names if name.endswith(SAFETENSORS.endings) and not name.startswith(".")]
    if not files:
        raise M3Error(f"{directory} holds no .safetensors files: give the directory that does.")
    check_numbering(directory, files)
    return files
