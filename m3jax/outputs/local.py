"""The output directory: made beside its place, published by one rename, resumable until then.

Several processes may fill one directory: process 0 opens and publishes it, each keeps a journal of its own.

A directory is a merge's own as long as its journal is in it, so the journal is the last thing to go: out of an output
once that has its name, and out of a directory that is given up. A crash at any moment leaves the old output or the new
one whole, and what the next command needs to go on or to tidy up.
"""

import errno
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m3jax.checkpoints import ModelDirectory, TensorInfo, digest_tensor, open_safetensors
from m3jax.checkpoints.orbax_names import LOCKED
from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.shards import WEIGHTS_METADATA, appearing, sync
from m3jax.checkpoints.standing_in import CONVERSION
from m3jax.checkpoints.storage import is_dir, read_file
from m3jax.documents import FAULTS, parse_json
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
from m3jax.outputs.patterns import directories as directories_of
from m3jax.outputs.patterns import matcher
from m3jax.outputs.provenance import FILE_NAME
from m3jax.outputs.written import varying_patterns

_JOURNAL = "m3jax-journal.jsonl"
_TAKEN = "m3jax-journal.taken"
_OWN = re.compile(r"m3jax-journal(-\d+)?\.jsonl|m3jax-journal\.taken")
_ASIDE = ".replaced-"  # behind its name, and before eight digits: where an old output goes
_REPLACES = "replaces"  # the key of the entry that names what an output takes the place of
_FIRST_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
"""Weight files as the first manifests, which do not list them, had them."""
_SPENT = "spent"  # of the entry that tells whether the merges that an output started from are to go
_IDENTITY = ".identity"  # ends the name of a file that tells of which merge the directory beside it is
_INTERMEDIATE = re.compile(r"\d+-.*")
_DIGEST = re.compile("[0-9a-f]{64}")
_VISIBLE_SECONDS, _LOOK_SECONDS = 40, 0.2
_SPARE = 2**20  # bytes beyond those announced


def is_own(name: str) -> bool:
    """Whether a file of an output's directory is one of those in which a merge keeps what it has done."""
    return _OWN.fullmatch(name) is not None


def partial_directory(out: Path) -> Path:
    """Where a merge is made before it becomes `out`."""
    return out.with_name(out.name + ".partial")


def intermediates_directory(out: Path) -> Path:
    """Where the merges are made and kept that the merge of `out` starts from."""
    return out.with_name(out.name + ".intermediates")


def told_of_intermediate(made: Path) -> Path:
    """The file that says of which merge a directory in `intermediates_directory` is."""
    return made.with_name(made.name + _IDENTITY)


def remove_intermediates(out: Path) -> None:
    """Removes the merges that an output started from, wherever a crash ended that; what else is there stays.

    Args:
        out: The output.

    Raises:
        OSError: The operating system fails.
    """
    place = intermediates_directory(out)
    if place.is_symlink() or not place.is_dir():
        return
    for made in sorted(path for path in place.iterdir() if _INTERMEDIATE.fullmatch(path.name)):
        if made.name.endswith(".partial") and _is_begun(made):
            shutil.rmtree(made)
        elif _tells_identity(made) and _clear(made.with_name(made.name.removesuffix(_IDENTITY))):
            made.unlink()
    with suppress(OSError):  # where something else is in it
        place.rmdir()


def _tells_identity(file: Path) -> bool:
    if not file.name.endswith(_IDENTITY) or file.is_symlink() or not file.is_file():
        return False
    with open(file, "rb") as opened:
        return _DIGEST.fullmatch(opened.read(99).decode(errors="replace")) is not None


def _is_begun(partial: Path) -> bool:
    """Whether a directory is an unfinished merge, and nothing else is in it."""
    if partial.is_symlink() or not (partial / _JOURNAL).is_file():
        return False
    return foreign(partial, read_journal(partial / _JOURNAL).names) is None


def _clear(output: Path) -> bool:
    """Remove an output, what tells of its files last; False where something in it is not the output's."""
    if not os.path.lexists(output):
        return True
    if output.is_symlink() or not output.is_dir():
        return False
    made = made_files(output)
    if (made is None and any(output.iterdir())) or (made is not None and foreign(output, made) is not None):
        return False
    for path in output.iterdir():
        if path.name != FILE_NAME:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (output / FILE_NAME).unlink(missing_ok=True)
    output.rmdir()
    return True


def finish(out: Path, identity: str) -> bool:
    """Whether an output is there that a crash ended the making of; the merges that it started from are removed.

    Args:
        out: The output.
        identity: Of the merge.

    Raises:
        M3Error: Whoever makes it is still at that.
    """
    published = _published(out)
    if not published:
        return False
    lock = directories.open_directory(out)
    try:
        directories.lock(lock, out)
        _remove_spent(out)
    finally:
        os.close(lock)
    return published == identity


def conclude(out: Path) -> None:
    """Removes the merges that a published output started from, and the journal that told of that.

    Args:
        out: The output.

    Raises:
        OSError: The operating system fails.
    """
    _remove_spent(out)
    _remove_journals(out)


def settle(out: Path, identity: str) -> None:
    """Tidies up beside an output that a crash ended the making of, which stays as it is.

    Args:
        out: The output.
        identity: Of the merge that has made it.
    """
    with Staging(out, identity, 0):  # which removes what it has replaced
        _remove_journals(out)


def left_beside(out: Path) -> str | None:
    """What a merge that was stopped as it ended has left beside an output; None where it has left nothing."""
    if isinstance(out, RemotePath) or not _is_spent(out) or not intermediates_directory(out).is_dir():
        return None
    return (
        f"{intermediates_directory(out)}: is left of a merge that was stopped as it ended: the same command removes it"
    )


def _is_spent(out: Path) -> bool:
    told = [entry[_SPENT] for entry in read_journal(out / _JOURNAL).entries if _SPENT in entry]
    return bool(told) and told[-1] is True


def _remove_spent(out: Path) -> None:
    if _is_spent(out):
        remove_intermediates(out)
        append(out / _JOURNAL, {_SPENT: False})


def check_apart(out: Path, model: ModelDirectory, files: Iterable[Path] = ()) -> None:
    """Checks that an output neither takes the place of what it is made of nor is made inside it.

    Args:
        out: Where the output is to appear, here or in remote storage.
        model: A model that is read.
        files: Its weight files, which may be links.

    Raises:
        M3Error: It does; links are followed.
    """
    parts = [part for part in (model, model.adapter) if part is not None]
    for part in parts:
        target = next((made for made in _made_at(out) if _is_in(part.path.resolve(), made)), None)
        if target is not None:
            raise M3Error(f"{target}: is one of the models, or holds {model.name}: choose another output")
        holds = any(_is_in(made, part.path.resolve()) for made in _made_at(out))
        if holds and (isinstance(part.path, RemotePath) or is_dir(part.path)):
            raise M3Error(f"{out}: would be made inside {model.name}, which is read: choose another output")
    for file in _linked(files):
        if any(_is_in(file.resolve(), made) for made in _made_at(out)):
            raise M3Error(f"{out}: holds the file that {file} of {model.name} leads to: choose another output")


def _made_at(out: Path) -> list[Path]:
    """Where an output appears and where it is made, without links."""
    return [out] if isinstance(out, RemotePath) else [out.resolve(), partial_directory(out).resolve()]


def _is_in(inner: Path, outer: Path) -> bool:
    return inner == outer or outer in inner.parents


def _linked(files: Iterable[Path]) -> list[Path]:
    """Those of some files that may be elsewhere than the directory of their model: links, and what is in one."""
    here = [path for path in files if not isinstance(path, RemotePath)]
    return [path for path in here if path.is_symlink() or path.parent.is_symlink()]


def check_place(out: Path) -> None:
    """Raise M3Error if `out` is no name for a directory, or its parent is not there."""
    if not out.name or out.name == "..":
        raise M3Error(f"{out}: is not a name for a new directory: give one")
    if not out.parent.is_dir():
        state = "is a file" if out.parent.exists() else "does not exist"
        raise M3Error(f"{out}: its parent {state}: make the directory {out.parent}, or choose another place")


def check_free(out: Path, overwrite: bool) -> None:
    """Raise M3Error if `out` is taken, if its parent is not there, or if `OUT.partial` is not a merge's.

    An output that a crash left with its journal may be this very merge's, which `Staging` knows.
    """
    check_place(out)
    if overwrite:
        _check_replaceable(out)
    elif _is_taken(out) and not _published(out):
        raise _exists(out)
    partial = partial_directory(out)
    if partial.is_symlink() or (partial.exists() and not _is_ours(partial) and _replaced_by(out, out) != partial):
        raise M3Error(f"{partial}: is where the merge would be made, but holds something else: move it away")


def unfinished(out: Path) -> str | None:
    """What a crash has left of an output that is not there, and the mend; None where nothing is."""
    partial = partial_directory(out)
    if isinstance(out, RemotePath) or os.path.lexists(out) or not _is_ours(partial):
        return None
    old = _replaced_by(partial, out)
    kept = "" if old is None else f", and what it was to replace is in {old}"
    return f"an interrupted merge is in {partial}{kept}: run the same command again to go on"


def _published(out: Path) -> str:
    """The identity of the merge that a crash ended just after its output had appeared; empty where none did."""
    return "" if out.is_symlink() else read_journal(out / _JOURNAL).identity


def _exists(out: Path) -> M3Error:
    return M3Error(f"{out}: exists already: choose another output, or pass --overwrite")


def _is_taken(out: Path) -> bool:
    """Whether something is there that a rename would not replace: all but an empty directory."""
    return out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))


def _check_replaceable(out: Path) -> None:
    """Raise M3Error if what is at `out` is not a directory that m3jax has made."""
    if not _is_taken(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise M3Error(f"{out}: is not a directory, and only a directory is overwritten: choose another output")
    made = made_files(out)
    if made is None:
        raise M3Error(
            f"{out}: holds no {FILE_NAME} of an output, and only what m3jax has made is overwritten: choose another "
            "output, or move it away"
        )
    other = foreign(out, made, at_work=False)
    if other is not None:
        raise M3Error(f"{out}: holds {other}, which is not of the output that is to be replaced: move it away")


def made_files(out: Path) -> tuple[str, ...] | None:
    """Patterns of the files of an output, as its manifest or a conversion's mark tells; None without.

    Args:
        out: The output, here or in remote storage.
    """
    manifest, mark = (_told_in(out / name) for name in (FILE_NAME, CONVERSION))
    output = manifest.get("output")
    if isinstance(output, dict) and isinstance(output.get("files"), dict):
        weights = output.get("weight_files")
        first = exactly(weights) if isinstance(weights, dict) else _FIRST_WEIGHTS
        links = output.get("links")
        others = exactly([*output["files"], *(links if isinstance(links, dict) else ()), FILE_NAME])
        return (*first, *varying_patterns(output), *others)
    told = mark.get("output")
    files = list(told["files"]) if isinstance(told, dict) and isinstance(told.get("files"), dict) else mark.get("files")
    if isinstance(files, list) and all(isinstance(name, str) for name in files):
        return exactly([*files, CONVERSION])
    return None


def _told_in(file: Path) -> dict[str, Any]:
    """What a file of JSON tells; nothing where it is none."""
    try:
        told = parse_json(read_file(file))
    except (M3Error, *FAULTS):
        return {}
    return told if isinstance(told, dict) else {}


def _is_ours(directory: Path) -> bool:
    """Whether a directory is an unfinished merge, or holds no more than the beginning of a journal."""
    return directory.is_dir() and ((directory / _JOURNAL).is_file() or foreign(directory, ()) is None)


def foreign(directory: Path, names: Collection[str], at_work: bool = True) -> str | None:
    """The first thing in a directory that m3jax has not put there; None if all is its own.

    Args:
        directory: Where an output is made, or is.
        names: Patterns of the files that may be there beside journals.
        at_work: Whether they may be there as they are being written (`.tmp`, `.__lock`), too.
    """
    known = tuple(names)
    is_known, is_place = matcher(known), matcher(directories_of(known))
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        written = name.removesuffix(".tmp").removesuffix(LOCKED)  # a journal is written anew in an output as well
        if path.is_dir() and not path.is_symlink():
            own = any(path.iterdir()) or is_known(name) or is_place(name)
        else:
            own = is_own(written) or is_known(written if at_work else name)
        if not own:
            return name
    return None


def exactly(names: Collection[str]) -> tuple[str, ...]:
    """The patterns that match these names and no others."""
    return tuple(glob.escape(name) for name in names)


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
        self.out = out
        self._journal = self.path / f"m3jax-journal-{index}.jsonl"
        if not _appears(self.path / _JOURNAL):
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
        self._journal = self.path / _JOURNAL
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
                    if is_new or _replaced_by(self.out, self.out) != self.path:
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
        old = _replaced_by(self.path, self.out)
        if old is not None and not os.path.lexists(self.out):  # between the two renames where one does not do
            os.rename(old, self.out)
        published = _published(self.out)
        if published and self._tidy():
            # What this very merge has published is replaced by the same, so that no other command is needed.
            self._overwrite = self._overwrite or published == identity
            if not self._overwrite:
                _remove_journals(self.out)
        if self._overwrite:
            _check_replaceable(self.out)
        elif _is_taken(self.out):
            raise _exists(self.out)

    def _tidy(self) -> bool:
        """Remove what the output that is there has replaced; False if whoever published it is still at that."""
        lock = directories.open_directory(self.out)
        try:
            directories.lock(lock, self.out)
            _remove_spent(self.out)
            old = _replaced_by(self.out, self.out)
            if old is not None:
                if old != self.path:  # that one is new, and has but the number of one that is gone
                    shutil.rmtree(old)
                append(self.out / _JOURNAL, {_REPLACES: None})
        except M3Error:
            return False
        finally:
            os.close(lock)
        return True

    def _resume(self, identity: str) -> None:
        """Take over what all journals tell, if they are this merge's, and empty the directory otherwise."""
        own = read_journal(self._journal)
        journals = [path for path in sorted(self.path.iterdir()) if is_own(path.name) and path.name != _TAKEN]
        self.finished = finished_in(map(read_journal, journals), identity)
        self.finished = [entry for entry in self.finished if not {_REPLACES, _SPENT} & entry.keys()]
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
            append(self._journal, {_SPENT: True})
        if not _is_taken(self.out):
            self._rename()  # which replaces an empty directory
            self._appeared(None)
            return
        if not self._overwrite:
            raise _exists(self.out) from OSError(errno.EEXIST, "File exists")
        _check_replaceable(self.out)
        old = directories.open_directory(self.out)
        try:
            directories.lock(old, self.out)  # also for whoever finds it where this merge was made
            self._appeared(self._replace(os.fstat(old).st_ino))
        finally:
            os.close(old)

    def _replace(self, inode: int) -> Path:
        """Take the place of what is there; returns where that is now."""
        # Names without what they name could be anybody's: the inode goes where a rename takes the directory.
        append(self._journal, {_REPLACES: {"name": self.path.name, "inode": inode}})
        if directories.exchange(self.path, self.out):
            return self.path
        aside = self.out.with_name(f"{self.out.name}{_ASIDE}{secrets.token_hex(4)}")
        append(self._journal, {_REPLACES: {"name": aside.name, "inode": inode}})
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
        if not _is_spent(self.out):  # else whoever has read them closes them first; see `conclude`
            _remove_journals(self.out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What can be mended without changing the merge (space, an interrupt) is worth resuming from.
        mendable = error is not None and (not isinstance(error, M3Error) or isinstance(error.__cause__, OSError))
        kept = self._shared or (mendable and bool(self.finished)) or _replaced_by(self.path, self.out) is not None
        try:
            with suppress(OSError):
                if not self._published and directories.is_at(self._lock, self.path):
                    if self._opened and not kept and foreign(self.path, self._names) is None:
                        _empty(self.path)
                        _remove_journals(self.path)
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


def _remove_journals(directory: Path) -> None:
    """Remove all journals, process 0's last."""
    own = [path for path in directory.iterdir() if is_own(path.name)]
    for path in sorted(own, key=lambda path: path.name == _JOURNAL):
        path.unlink()
    sync(directory)


# --- What crashes leave -------------------------------------------------------------------------------------------


def _mark(directory: Path) -> Path:
    """Say in a file that a directory is taken, where the file system has no locks.

    Going on without would mix two merges, refusing would shut out file systems that merge well otherwise. A file is
    made by one process alone on all of them; unlike a lock it does not go with a process that is killed.
    """
    mark = directory / _TAKEN
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        raise M3Error(
            f"{directory}: its file system has no locks, and {_TAKEN} in it says that another merge is writing there: "
            "if none is, remove that file and start again"
        ) from None
    return mark


def _replaced_by(directory: Path, out: Path) -> Path | None:
    """What an output has replaced or was about to, as the journal in a directory names it, if that is still there.

    Whoever wrote the journal, it is one of the two places beside `out` where what is replaced is put.
    """
    told = [entry[_REPLACES] for entry in read_journal(directory / _JOURNAL).entries if _REPLACES in entry]
    if not told or not isinstance(told[-1], dict):
        return None
    name = str(told[-1].get("name"))
    aside = name.startswith(f"{out.name}{_ASIDE}") and re.fullmatch("[0-9a-f]{8}", name[len(out.name + _ASIDE) :])
    if name != partial_directory(out).name and not aside:
        return None
    try:
        place = out.with_name(name)
        return place if place.lstat().st_ino == told[-1].get("inode") else None
    except (FileNotFoundError, ValueError):  # or no name at all
        return None


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
