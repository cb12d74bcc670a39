"""PyTorch's weights on the hub, of which headers are all that is wanted."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from m3jax.checkpoints.formats import PYTORCH, Format
from m3jax.checkpoints.pytorch import content_of
from m3jax.checkpoints.remote import Identity
from m3jax.checkpoints.shards import write_exactly


class HubSource:
    """A file on the hub; whatever is read of it is written to an outline of it on this disk, which else has holes."""

    def __init__(self, address: str, outline: Path) -> None:
        """Asks for the file's size.

        Args:
            address: As the hub's file system has it: `org/name@commit/file`.
            outline: Where the outline goes.
        """
        from huggingface_hub import HfFileSystem

        self._system, self._address = HfFileSystem(), address
        size = self._system.info(address)["size"]
        self.identity = Identity(address, size, 0)
        self._descriptor = os.open(outline, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.truncate(self._descriptor, size)

    def read_into(self, out: memoryview, offset: int, until: int) -> int:
        """See `ByteSource.read_into`; raises what the hub's client raises."""
        end = min(offset + len(out), self.identity.size)
        if offset >= end:
            return 0
        content: bytes = self._system.cat_file(self._address, start=offset, end=end)
        out[: len(content)] = content
        write_exactly(self._descriptor, memoryview(content), offset)
        return len(content)

    def close(self) -> None:
        """Closes the outline."""
        os.close(self._descriptor)


def outline_pytorch(repo: str, commit: str | None, directory: Path, before: tuple[Format, ...]) -> bool:
    """Writes outlines of a hub model's PyTorch files: sparse, with all that is read when they are opened.

    Args:
        repo: The model.
        commit: Its revision.
        directory: Where they go.
        before: Formats that are taken where the model has them.

    Returns:
        Whether the model is read in this format.

    Raises:
        M3Error: A file is not as PyTorch writes it.
    """
    from huggingface_hub import HfFileSystem

    place = repo if commit is None else f"{repo}@{commit}"
    names = [str(path).rpartition("/")[2] for path in HfFileSystem().ls(place, detail=False)]
    files = [name for name in names if any(fnmatchcase(name, pattern) for pattern in PYTORCH.published)]
    if not files or any(format.names(name) for format in before for name in names):
        return False
    for file in files:
        source = HubSource(f"{place}/{file}", directory / file)
        try:
            content_of(source, directory / file)
        finally:
            source.close()
    return True
