"""The output directory: made beside its place, published by one rename, resumable until then.

Several processes may fill one directory: process 0 opens and publishes it, each keeps a journal of its own.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.checkpoints.remote import RemotePath
from m3jax.errors import M3Error
from m3jax.outputs.journal import Entry, Journal, Journalled, finished_in, is_weights

_JOURNAL = "m3jax-journal.jsonl"
_JOURNALS = "m3jax-journal*.jsonl"
_VISIBLE_SECONDS, _LOOK_SECONDS = 40, 0.2
_SPARE = 2**20  # bytes beyond those announced


def partial_directory(out: Path) -> Path:
    """Where a merge is made before it becomes `out`."""
    return out.with_name(out.name + ".partial")


def replaced_with(out: Path, place: Path) -> Path | None:
    """The directory that goes when an output is made, if a model that is read is in it.

    Args:
        out: Where the output is to appear, here or in remote storage.
        place: The model.

    Returns:
        `out`, or where it is made, if that is the model's place or holds it; else None.
    """
    targets = [out] if isinstance(out, RemotePath) else [out.resolve(), partial_directory(out).resolve()]
    inside = place.resolve()
    return next((target for target in targets if target == inside or target in inside.parents), None)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise M3Error if `out` is taken, if its parent is not there, or if `OUT.partial` is not a merge's."""
    if not out.name or out.name == "..":
        raise M3Error(f"{out}: is not a name for a new directory: give one")
    if not out.parent.is_dir():
        state = "is a file" if out.parent.exists() else "does not exist"
        raise M3Error(f"{out}: its parent {state}: make a directory there, or choose another place")
    taken = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    if taken and not overwrite:
        raise M3Error(f"{out}: exists already: choose another output, or pass --overwrite")
    if taken and (out.is_symlink() or not out.is_dir()):
        raise M3Error(f"{out}: is not a directory, and only a directory is overwritten: choose another output")
    partial = partial_directory(out)
    if partial.is_symlink() or (partial.exists() and not _is_ours(partial)):
        raise M3Error(f"{partial}: is where the merge would be made, but holds something else: move it away")


def _is_ours(directory: Path) -> bool:
    """Whether a directory is an unfinished merge, or empty."""
    return directory.is_dir() and ((directory / _JOURNAL).is_file() or not any(directory.iterdir()))


def check_space(place: Path, needed: int) -> None:
    """Raise M3Error if the disk of a directory, or of what is to be made beside it, has too few bytes free."""
    missing = needed + _SPARE
    free = shutil.disk_usage(place if place.is_dir() else place.parent).free
    if missing > free:
        raise M3Error(
            f"{place}: the disk has {free:,} bytes free, but {missing:,} are needed: free space or choose another place"
        ) from OSError(errno.ENOSPC, "No space left on device")


class Workplace(Journalled):
    """A directory in which an output is made, for one of the processes that fill it."""

    def __init__(self, out: Path, identity: str, finished: Sequence[Mapping[str, Any]], index: int) -> None:
        """Join at work in a directory that process 0 has opened.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            finished: What was done before.
            index: This process.

        Raises:
            M3Error: The directory is not there.
        """
        super().__init__(partial_directory(out), finished)
        self._journal = self.path / f"m3jax-journal-{index}.jsonl"
        if not _appears(self.path / _JOURNAL):
            raise M3Error(
                f"{out}: process {index} does not see the directory that process 0 made: "
                "the output must be on storage that all processes share"
            )
        self._begin(Journal(identity, []))

    def _begin(self, journal: Journal) -> None:
        """Write the journal anew: a line that a crash cut would otherwise swallow the next one."""
        whole = self._journal.with_name(self._journal.name + ".tmp")
        lines = [{"identity": journal.identity}, *journal.entries]
        whole.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        whole.replace(self._journal)

    def holds(self, file: str) -> bool:
        """Whether a finished weight file is still there."""
        return (self.path / file).is_file()

    def _store(self, entry: Entry) -> Entry:
        """Add an entry to the journal; the weight file that it tells of is on the disk."""
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        return entry


class Staging(Workplace):
    """The directory in which an output is made, with a journal of what is finished.

    The journal's first line identifies the merge; a directory left by another merge is emptied. Leaving the context
    by an exception keeps what is finished if anything is, and removes the directory otherwise. The directory itself
    is locked, so that the lock goes where a rename takes it.
    """

    def __init__(
        self, out: Path, identity: str, space_needed: int, overwrite: bool = False, shared: bool = False
    ) -> None:
        """Open or make the directory.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            space_needed: Bytes that will be written.
            overwrite: Replace what is there when the output appears.
            shared: Other processes write there too, so that it is never this one's to remove.

        Raises:
            M3Error: Another merge is at work there, something else is there, or the disk is too small.
        """
        Journalled.__init__(self, partial_directory(out), [])
        self.out = out
        self._journal = self.path / _JOURNAL
        self._overwrite = overwrite
        self._shared = shared
        self._lock = self._take()
        self._published = False
        try:
            self.finished = self._resume(identity)
            written = sum(f.stat().st_size for f in self.path.iterdir() if is_weights(f.name))
            check_space(self.out, space_needed - written)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _take(self) -> int:
        """A lock on the directory, made if it is missing."""
        while True:
            self.path.mkdir(exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise M3Error(
                    f"{self.path}: another merge is writing there: wait for it, or choose another output"
                ) from None
            # Whoever held the lock before may have renamed or removed the directory: then this is not it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.path)):
                    return lock
            os.close(lock)

    def _resume(self, identity: str) -> list[Entry]:
        """What all journals tell, if they are this merge's."""
        finished = finished_in(map(_read_journal, sorted(self.path.glob(_JOURNALS))), identity)
        if _read_journal(self._journal).identity != identity:
            if not _is_ours(self.path):
                raise M3Error(f"{self.path}: holds something else than an unfinished merge: move it away")
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            finished = []
        for unfinished in self.path.glob("*.tmp"):
            unfinished.unlink()
        self._begin(Journal(identity, finished))
        for journal in self.path.glob(_JOURNALS):
            if journal != self._journal:
                journal.unlink()
        return finished

    def publish(self) -> None:
        """Make the directory the output, by one rename."""
        _sync_files(self.path)
        for journal in self.path.glob(_JOURNALS):
            journal.unlink()
        replaced = None
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()
        elif self._overwrite and self.out.exists():
            replaced = Path(tempfile.mkdtemp(prefix=self.out.name + ".replaced-", dir=self.out.parent))
            self.out.rename(replaced / self.out.name)
        try:
            self.path.rename(self.out)
        except OSError as error:
            if replaced is not None:
                (replaced / self.out.name).rename(self.out)
                replaced.rmdir()
            raise M3Error(f"{self.out}: cannot be made: {error.strerror}: check the place") from error
        self._published = True
        _sync(self.out.parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What can be mended without changing the merge (space, an interrupt) is worth resuming from.
        mendable = error is not None and (not isinstance(error, M3Error) or isinstance(error.__cause__, OSError))
        removable = not self._shared and not (mendable and self.finished)
        if not self._published and removable and _is_ours(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _appears(path: Path) -> bool:
    """Whether a file that another machine has just made is seen, within the time that network file systems take."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _read_journal(journal: Path) -> Journal:
    """What a journal's whole lines tell, the first its identity; a last line cut by a crash is left out."""
    lines: list[Any] = []
    with suppress(OSError, ValueError):
        for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    first, *entries = [line for line in lines if isinstance(line, dict)] or [{}]
    return Journal(str(first.get("identity", "")), entries)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_files(directory: Path) -> None:
    """Sync every small file and the directory; weight files were synced when they were finished."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not is_weights(path.name):
            _sync(path)
    _sync(directory)
