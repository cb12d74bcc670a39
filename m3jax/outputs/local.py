"""The output directory: made beside its place, published by one rename, resumable until then.

Several processes may fill one directory: process 0 opens and publishes it, each keeps a journal of its own.

A directory is a merge's own as long as its journal is in it, so the journal is the last thing to go: out of an output
once that has its name, and out of a directory that is given up. A crash at any moment leaves the old output or the new
one whole, and what the next command needs to go on or to tidy up.
"""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.checkpoints import TensorInfo, digest_tensor, open_safetensors
from m3jax.checkpoints.shards import WEIGHTS_METADATA, appearing, sync
from m3jax.errors import M3Error
from m3jax.outputs import directories
from m3jax.outputs.journal import (
    Entry,
    Journal,
    Journalled,
    append,
    files_of,
    finished_in,
    is_weights,
    line_of,
    read_journal,
    weights_in,
)
from m3jax.outputs.places import (
    ASIDE,
    JOURNAL,
    REPLACES,
    TAKEN,
    check_replaceable,
    check_space,
    exactly,
    exists_already,
    foreign,
    is_own,
    is_taken,
    partial_directory,
    published_identity,
    remove_journals,
    replaced_by,
)
from m3jax.outputs.spent import SPENT, is_spent, remove_spent

_VISIBLE_SECONDS, _LOOK_SECONDS = 40, 0.2


def settle(out: Path, identity: str) -> None:
    """Tidies up beside an output that a crash ended the making of, which stays as it is.

    Args:
        out: The output.
        identity: Of the merge that has made it.
    """
    with Staging(out, identity, 0):  # which removes what it has replaced
        remove_journals(out)


def holds_tensors(file: Path, infos: Sequence[TensorInfo], digests: Mapping[str, str]) -> bool:
    """Whether a weight file that a merge has finished is as it was.

    Args:
        file: The file.
        infos: What it holds.
        digests: Of each tensor, by name.
    """
    try:
        with open_safetensors(file) as checkpoint:
            told = {info.name: info for info in infos}
            if dict(checkpoint.tensors) != told or dict(checkpoint.metadata) != dict(WEIGHTS_METADATA):
                return False
            return all(digest_tensor(checkpoint, name) == digests.get(name) for name in told)
    except M3Error:
        return False


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
        self.out = out
        self._journal = self.path / f"m3jax-journal-{index}.jsonl"
        if not _appears(self.path / JOURNAL):
            raise M3Error(
                f"{out}: process {index} does not see the directory that process 0 made: "
                "the output must be on storage that all processes share"
            )
        self._begin(Journal(identity, []))

    def _begin(self, journal: Journal) -> None:
        """Write the journal anew: a line that a crash cut would otherwise swallow the next one."""
        lines = [{"identity": journal.identity, "names": list(journal.names)}, *journal.entries]
        with appearing(self._journal) as file:
            file.write("".join(map(line_of, lines)).encode())

    def holds(self, file: str) -> bool:
        """Whether a finished weight file, or what was made of it, is still there."""
        entry = weights_in(self.finished).get(file)
        return entry is not None and all((self.path / name).is_file() for name in files_of(entry))

    def _store(self, entry: Entry) -> Entry:
        """Add an entry to the journal; the weight file that it tells of is on the disk."""
        append(self._journal, entry)
        return entry


class Staging(Workplace):
    """The directory in which an output is made, with a journal of what is finished.

    The journal's first line identifies the merge and names its files; a directory left by another merge is emptied.
    Leaving the context by an exception keeps what is finished if anything is, and removes the directory otherwise,
    unless something is in it that is not ours. The directory itself is locked, so that the lock goes where a rename
    takes it.
    """

    def __init__(
        self,
        out: Path,
        identity: str,
        space_needed: int,
        overwrite: bool = False,
        shared: bool = False,
        names: Collection[str] = ("model.safetensors",),
    ) -> None:
        """Open or make the directory.

        Args:
            out: Where the output is to appear.
            identity: Digest of everything that the output's bytes depend on.
            space_needed: Bytes that will be written.
            overwrite: Replace what is there when the output appears.
            shared: Other processes write there too, so that it is never this one's to remove.
            names: Patterns of the files that will be made.

        Raises:
            M3Error: Another merge is at work there, something else is there, or the disk is too small.
        """
        Journalled.__init__(self, partial_directory(out), [])
        self.out = out
        self._journal = self.path / JOURNAL
        self._names = tuple(names)
        self._overwrite = overwrite
        self._shared = shared
        self._mark: Path | None = None
        self._opened = self._published = False
        self._lock = self._take()
        try:
            self._settle(identity)
            self._resume(identity)
            written = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())
            check_space(self.out, space_needed - written)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    # --- Opening --------------------------------------------------------------------------------------------------

    def _take(self) -> int:
        """A lock on the directory, made if it is missing."""
        while True:
            is_new = directories.make(self.path)
            try:
                lock = directories.open_directory(self.path)
            except FileNotFoundError:  # given up by another merge just now
                continue
            try:
                locked = directories.lock(lock, self.path)
                # Whoever held the lock before may have renamed or removed the directory: then this is not it.
                if directories.is_at(lock, self.path):
                    if is_new or replaced_by(self.out, self.out) != self.path:
                        self._mark = None if locked else _mark(self.path)
                        return lock
                    # An old output whose place a new one has taken; a crash came before it was removed.
                    shutil.rmtree(self.path)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _settle(self, identity: str) -> None:
        """Bring `out` to rest after a crash while something was published there, and see that it may be replaced."""
        old = replaced_by(self.path, self.out)
        if old is not None and not os.path.lexists(self.out):  # between the two renames where one does not do
            os.rename(old, self.out)
        published = published_identity(self.out)
        if published and self._tidy():
            # What this very merge has published is replaced by the same, so that no other command is needed.
            self._overwrite = self._overwrite or published == identity
            if not self._overwrite:
                remove_journals(self.out)
        if self._overwrite:
            check_replaceable(self.out)
        elif is_taken(self.out):
            raise exists_already(self.out)

    def _tidy(self) -> bool:
        """Remove what the output that is there has replaced; False if whoever published it is still at that."""
        lock = directories.open_directory(self.out)
        try:
            directories.lock(lock, self.out)
            remove_spent(self.out)
            old = replaced_by(self.out, self.out)
            if old is not None:
                if old != self.path:  # that one is new, and has but the number of one that is gone
                    shutil.rmtree(old)
                append(self.out / JOURNAL, {REPLACES: None})
        except M3Error:
            return False
        finally:
            os.close(lock)
        return True

    def _resume(self, identity: str) -> None:
        """Take over what all journals tell, if they are this merge's, and empty the directory otherwise."""
        own = read_journal(self._journal)
        journals = [path for path in sorted(self.path.iterdir()) if is_own(path.name) and path.name != TAKEN]
        self.finished = finished_in(map(read_journal, journals), identity)
        self.finished = [entry for entry in self.finished if not {REPLACES, SPENT} & entry.keys()]
        self._check_own((*self._names, *own.names))
        self._opened = True
        with suppress(PermissionError):  # of a directory that another user has made
            self.path.chmod(directories.PRIVATE)
        if own.identity != identity or not self.finished:
            self.finished = []
            _empty(self.path)
        for cut in self.path.glob("*.tmp"):
            cut.unlink()
        self._begin(Journal(identity, self.finished, self._names))
        for journal in journals:
            if journal != self._journal:
                journal.unlink()

    def _check_own(self, names: Collection[str]) -> None:
        """Raise M3Error if something is in the directory that is neither to be published nor ours to remove."""
        odd = foreign(self.path, names)
        if odd is not None:
            raise M3Error(
                f"{self.path / odd}: is no part of the merge that is made there: move it away, then start again"
            ) from OSError(errno.ENOTEMPTY, "Directory not empty")

    # --- Publishing -----------------------------------------------------------------------------------------------

    def files(self) -> list[str]:
        """All files that are there but journals, by their paths in the directory."""
        every = (path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        names = sorted(path.relative_to(self.path).as_posix() for path in every)
        return [name for name in names if not is_own(name)]

    def publish(self, names: Collection[str] | None = None, spent: bool = False) -> None:
        """Make the directory the output, in one step where the system has one.

        Args:
            names: The files that it is made of; whatever the patterns that were announced match if None.
            spent: It started from merges that are to go when it is there, by `conclude`.

        Raises:
            M3Error: A file is missing, or one is there that is not the merge's; `out` was taken meanwhile.
            OSError: The operating system fails.
        """
        gone = next((name for name in names or () if not (self.path / name).is_file()), None)
        if gone is not None:
            raise M3Error(f"{self.path / gone}: has gone since it was made: start again") from OSError()
        self._check_own(self._names if names is None else exactly(names))
        _sync_files(self.path)
        if spent:
            append(self._journal, {SPENT: True})
        if not is_taken(self.out):
            self._rename()  # which replaces an empty directory
            self._appeared(None)
            return
        if not self._overwrite:
            raise exists_already(self.out) from OSError(errno.EEXIST, "File exists")
        check_replaceable(self.out)
        old = directories.open_directory(self.out)
        try:
            directories.lock(old, self.out)  # also for whoever finds it where this merge was made
            self._appeared(self._replace(os.fstat(old).st_ino))
        finally:
            os.close(old)

    def _replace(self, inode: int) -> Path:
        """Take the place of what is there; returns where that is now."""
        # Names without what they name could be anybody's: the inode goes where a rename takes the directory.
        append(self._journal, {REPLACES: {"name": self.path.name, "inode": inode}})
        if directories.exchange(self.path, self.out):
            return self.path
        aside = self.out.with_name(f"{self.out.name}{ASIDE}{secrets.token_hex(4)}")
        append(self._journal, {REPLACES: {"name": aside.name, "inode": inode}})
        os.rename(self.out, aside)
        try:
            self._rename()
        except M3Error:
            os.rename(aside, self.out)
            raise
        return aside

    def _rename(self) -> None:
        try:
            os.rename(self.path, self.out)
        except OSError as error:
            raise M3Error(f"{self.out}: cannot be made: {error.strerror}: check the place") from error

    def _appeared(self, old: Path | None) -> None:
        """Make the new name last, and remove what is not needed any more, the journal at the end."""
        self._published = True
        sync(self.out.parent)
        if old is not None:
            shutil.rmtree(old)
        if not is_spent(self.out):  # else whoever has read them closes them first; see `conclude`
            remove_journals(self.out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What can be mended without changing the merge (space, an interrupt) is worth resuming from.
        mendable = error is not None and (not isinstance(error, M3Error) or isinstance(error.__cause__, OSError))
        kept = self._shared or (mendable and bool(self.finished)) or replaced_by(self.path, self.out) is not None
        try:
            with suppress(OSError):
                if not self._published and directories.is_at(self._lock, self.path):
                    if self._opened and not kept and foreign(self.path, self._names) is None:
                        _empty(self.path)
                        remove_journals(self.path)
                    elif self._mark is not None:
                        self._mark.unlink(missing_ok=True)
                    if not self._shared:
                        self.path.rmdir()  # where nothing is in it
        finally:
            os.close(self._lock)


def _empty(directory: Path) -> None:
    """Remove everything but the journals, which tell until the end that it was ours to remove."""
    for path in directory.iterdir():
        if not is_own(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _mark(directory: Path) -> Path:
    """Say in a file that a directory is taken, where the file system has no locks.

    Going on without would mix two merges, refusing would shut out file systems that merge well otherwise. A file is
    made by one process alone on all of them; unlike a lock it does not go with a process that is killed.
    """
    mark = directory / TAKEN
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        raise M3Error(
            f"{directory}: its file system has no locks, and {TAKEN} in it says that another merge is writing there: "
            "if none is, remove that file and start again"
        ) from None
    return mark


def _appears(path: Path) -> bool:
    """Whether a file that another machine has just made is seen, within the time that network file systems take."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _sync_files(directory: Path) -> None:
    """Sync every small file and every directory; weight files were synced when they were finished."""
    for path in sorted(directory.rglob("*")):
        if not path.is_symlink() and not is_weights(path.name):
            sync(path)
    sync(directory)
