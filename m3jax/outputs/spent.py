"""The merges that an output started from, which go once it is there, also where a crash ended that."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from m3jax.checkpoints.remote import RemotePath
from m3jax.outputs import directories
from m3jax.outputs.journal import append, read_journal
from m3jax.outputs.places import (
    JOURNAL,
    foreign,
    intermediates_directory,
    made_files,
    published_identity,
    remove_journals,
)
from m3jax.outputs.provenance import FILE_NAME

SPENT = "spent"  # of the entry that tells whether the merges that an output started from are to go
_IDENTITY = ".identity"  # ends the name of a file that tells of which merge the directory beside it is
_INTERMEDIATE = re.compile(r"\d+-.*")
_DIGEST = re.compile("[0-9a-f]{64}")


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
    if partial.is_symlink() or not (partial / JOURNAL).is_file():
        return False
    return foreign(partial, read_journal(partial / JOURNAL).names) is None


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
    published = published_identity(out)
    if not published:
        return False
    lock = directories.open_directory(out)
    try:
        directories.lock(lock, out)
        remove_spent(out)
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
    remove_spent(out)
    remove_journals(out)


def left_beside(out: Path) -> str | None:
    """What a merge that was stopped as it ended has left beside an output; None where it has left nothing."""
    if isinstance(out, RemotePath) or not is_spent(out) or not intermediates_directory(out).is_dir():
        return None
    return (
        f"{intermediates_directory(out)}: is left of a merge that was stopped as it ended: the same command removes it"
    )


def is_spent(out: Path) -> bool:
    """Whether the journal in an output tells that what it started from is to go."""
    told = [entry[SPENT] for entry in read_journal(out / JOURNAL).entries if SPENT in entry]
    return bool(told) and told[-1] is True


def remove_spent(out: Path) -> None:
    """Removes what an output started from, if that is to go, and tells its journal of that."""
    if is_spent(out):
        remove_intermediates(out)
        append(out / JOURNAL, {SPENT: False})
