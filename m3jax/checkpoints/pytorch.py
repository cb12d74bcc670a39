"""The zip checkpoints of PyTorch (`pytorch_model.bin`), read byte range by byte range, without torch.

Files are those of `torch.save` since PyTorch 1.6, in one file or in several with an index. What they hold is a pickle
of names and places, which `pytorch_pickle` reads as plain data, and the tensors' bytes beside it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief  # what a file says may be long or deep without end
from typing import Any, NamedTuple

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
from m3jax.checkpoints.formats import PYTORCH
from m3jax.checkpoints.headers import damaged
from m3jax.checkpoints.protocol import (
    DTYPES,
    Checkpoint,
    Closing,
    FileFingerprint,
    TensorInfo,
    in_natural_order,
    natural_key,
    room_for,
)
from m3jax.checkpoints.pytorch_archive import Archive, read_archive, read_entry
from m3jax.checkpoints.pytorch_pickle import Plain, StoredTensor, read_pickle, tensors_within
from m3jax.checkpoints.remote import Identity, as_path
from m3jax.checkpoints.storage import ByteSource, first_bytes, is_dir, list_names, open_source, unreadable
from m3jax.checkpoints.strided import in_order, read_strided
from m3jax.errors import M3Error

_STATES = ("state_dict", "model", "module", "model_state_dict")
"""The keys under which training scripts keep a model beside other things."""

_OTHERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|tokenizer|adapter)[^/]*")
"""What the names of files begin with that trainers leave beside a model."""

_LONGEST_TEXT = 1024  # characters of a text that is worth keeping


class PytorchCheckpoint(Closing):
    """One or several files of PyTorch as one checkpoint; made by `open_pytorch`.

    Attributes:
        location: The path that was opened.
        tensors: Every tensor by name, in natural order.
        metadata: Numbers and short texts that stand beside the tensors, such as an epoch, the first file first.
    """

    def __init__(self, location: str, root: Path, contents: "Mapping[str, Content]") -> None:
        """Joins files whose content is known.

        Args:
            location: What the checkpoint is called.
            root: The directory that the files are in.
            contents: Of each file, by its name under `root`; no tensor is in two of them.
        """
        self._places = {
            name: (file, place) for file, content in contents.items() for name, place in content.tensors.items()
        }
        self.location = location
        self.tensors = in_natural_order(
            {name: TensorInfo(name, tensor.shape, tensor.dtype) for name, (_, (tensor, _)) in self._places.items()}
        )
        self.metadata = joined_metadata(content.metadata for content in contents.values())
        seen = {file: Seen(content.identity, content.digest) for file, content in contents.items()}
        self._files = WeightFiles(location, root, seen, _look)

    def read_into(self, name: str, start: int, out: memoryview | npt.NDArray[np.uint8]) -> None:
        """Fills `out` with the tensor's little-endian bytes from `start` on; see `Checkpoint.read_into`."""
        view = room_for(self, name, start, out)
        file, (tensor, begin) = self._places[name]
        size = DTYPES[tensor.dtype].itemsize
        if in_order(tensor.shape, tensor.strides):
            self._files.read(file, name, view, begin + start, begin + self.tensors[name].nbytes)
            return

        def read(piece: memoryview, at: int) -> None:
            self._files.read(file, name, piece, begin + at, begin + at + len(piece))

        read_strided(read, tensor.shape, tensor.strides, size, start, view)

    @property
    def sequential(self) -> bool:
        """See `Sequential`."""
        return self._files.sequential

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return self._files.paths()

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """What the files look like now, by name; the pickle and the directory count as header."""
        return self._files.fingerprint()

    def close(self) -> None:
        """Releases the open files; reading afterwards is an error."""
        self._files.close()


def is_pytorch(path: Path) -> bool:
    """Whether a path whose name does not tell is of this format.

    Args:
        path: A file, which then begins as zip archives do; or a directory, which then has files that names tell of.
    """
    if is_dir(path):
        return any(map(PYTORCH.names, list_names(path)))
    return first_bytes(path, 4) == b"PK\3\4"


def open_pytorch(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens PyTorch's weights at a path; reads names and places only, and runs nothing of what a file says.

    A file holds a dictionary of tensors, or one that has such a dictionary as `state_dict`, `model`, `module` or
    `model_state_dict`; what stands beside that (an optimizer's state, say) is left out.

    Args:
        path: A file that `torch.save` wrote, an index, or a directory, where the files are taken that
            `pytorch_model.bin.index.json` lists, else `pytorch_model.bin`, else all `pytorch_model-….bin`, else the
            only other file; here, or as `s3://bucket/path` or `gs://bucket/path`.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        M3Error: There are no such weights; or a file is of another format, damaged, asks for Python objects that
            tensors do not need, or does not agree with the others.
    """
    root, told = read_files(as_path(path), PYTORCH, _choose, read_content)
    return PytorchCheckpoint(str(path), root, told)


def _choose(directory: Path) -> list[str]:
    """The files of a directory that has no index to follow."""
    names = sorted((name for name in list_names(directory) if PYTORCH.names(name)), key=natural_key)
    names = [name for name in names if name.endswith(PYTORCH.endings) and not name.startswith(".")]
    if PYTORCH.single_file in names:
        return [PYTORCH.single_file]
    stem = PYTORCH.single_file.removesuffix(".bin")
    shards = [name for name in names if re.fullmatch(rf"{stem}-[0-9]+-of-[0-9]+\.bin", name)]
    if shards:
        check_numbering(directory, shards)
        return shards
    others = [name for name in names if not _OTHERS.fullmatch(name)]
    if len(others) != 1:
        found = f"{len(others)} files that may be PyTorch's weights" if others else "no weights of PyTorch"
        raise M3Error(f"{directory} holds {found} and no {PYTORCH.single_file}: give one file's path.")
    return others


# --- What one file holds ---------------------------------------------------------------------------------


class TensorPlace(NamedTuple):
    """A tensor, and the offset of its first entry from the start of the file."""

    tensor: StoredTensor
    begin: int


class Content(NamedTuple):
    """What one file says of itself.

    Attributes:
        tensors: By name.
        metadata: Numbers and short texts that stand beside them.
        identity: What differs when another file takes the name.
        digest: BLAKE3 of the pickle and of the places in the archive, hexadecimal.
    """

    tensors: dict[str, TensorPlace]
    metadata: dict[str, str]
    identity: Identity
    digest: str


def read_content(path: Path) -> Content:
    """Reads everything of a file but the tensors' values.

    Raises:
        M3Error: It is no zip archive of PyTorch, is damaged, has what tensors do not need, or cannot be read.
    """
    source = open_source(path)
    try:
        return content_of(source, path)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        source.close()


def content_of(source: ByteSource, path: Path) -> Content:
    """As `read_content`, of a file that is open.

    Raises:
        OSError: It cannot be read.
    """
    archive = read_archive(source, path)
    if "constants.pkl" in archive.entries:
        raise M3Error(f"{path} is TorchScript, a program and not only weights: save the model's state_dict() instead.")
    order = read_entry(source, archive, "byteorder", path) if "byteorder" in archive.entries else b"little"
    pickle = read_entry(source, archive, "data.pkl", path)
    if order != b"little":
        raise M3Error(
            f"{path} has its bytes in the order {brief(order.decode(errors='replace'))}, not little: save it on another"
            " machine."
        )
    told = read_pickle(pickle, f"the pickle in {path}")
    state, beside = _state_of(told, path)
    tensors = {name: _placed(name, value, archive, path) for name, value in state.items()}
    digest = blake3(pickle)
    digest.update(archive.digest.encode())
    return Content(tensors, beside, source.identity, digest.hexdigest())


def _look(path: Path) -> Seen:
    content = read_content(path)
    return Seen(content.identity, content.digest)


def _state_of(told: Plain, path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by their names, and what is worth keeping of what stands beside them.

    Raises:
        M3Error: There is no dictionary of tensors, or more than one that could be meant.
    """
    if not isinstance(told, dict):
        raise damaged(f"{path} holds no dictionary of tensors by their names")
    keys = [key for key in _STATES if isinstance(told.get(key), dict) and _direct(told[key])]
    if not _direct(told) and len(keys) == 1:
        state = told[keys[0]]
    elif not keys:
        state = told
    else:
        places = [repr(key) for key in keys] + (["its front"] if _direct(told) else [])
        raise M3Error(f"{path} has tensors in several places, {', '.join(places)}: save the one that is meant alone.")
    seen: set[int] = set()
    for key, value in state.items():
        if not isinstance(value, StoredTensor) and next(tensors_within(value, seen), None) is not None:
            raise M3Error(f"{path} has tensors inside of {brief(key)}, which is no tensor: save a state_dict() alone.")
        if isinstance(value, StoredTensor) and not isinstance(key, str):
            raise M3Error(f"{path} calls a tensor {brief(key)}, which is no text: save a state_dict().")
    return _direct(state), {**_texts(told), **_texts(state)}


def _direct(entries: Mapping[Any, Plain]) -> dict[str, StoredTensor]:
    """Those entries of a dictionary that are tensors."""
    return {key: value for key, value in entries.items() if isinstance(value, StoredTensor)}


def _texts(entries: Mapping[Any, Plain]) -> dict[str, str]:
    """Those entries of a dictionary that are numbers or short texts, as texts."""
    named = ((key, value) for key, value in entries.items() if _is_short(key))
    return {key: str(value) for key, value in named if _is_short(value) or isinstance(value, int | float)}


def _is_short(value: Plain) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _placed(name: str, tensor: StoredTensor, archive: Archive, path: Path) -> TensorPlace:
    """Where a tensor begins in the file, whose storage must be there and have the size that the pickle says."""
    entry = archive.entries.get(f"data/{tensor.storage.key}")
    if entry is None:
        raise damaged(f"{path} lacks the storage {brief(tensor.storage.key)} of tensor {name!r}")
    if entry.size != tensor.storage.nbytes:
        raise damaged(
            f"tensor {name!r} in {path} is to lie in a storage of {tensor.storage.nbytes:,} bytes, and it has"
            f" {entry.size:,}"
        )
    return TensorPlace(tensor, entry.offset + tensor.offset * DTYPES[tensor.dtype].itemsize)
