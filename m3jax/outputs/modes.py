"""Permissions: an output opens to nobody what its inputs keep closed."""

import os
import stat
from collections.abc import Iterable
from functools import reduce
from operator import and_
from pathlib import Path

from m3jax.checkpoints.remote import RemotePath

_OWNER_FILE, _OWNER_DIRECTORY = 0o600, 0o700  # what whoever makes an output needs, and is theirs anyway


def copy_mode(source: Path, target: Path) -> None:
    """Takes from a copy the permissions that its source does not give.

    Args:
        source: A local file.
        target: The copy.

    Raises:
        OSError: The operating system fails.
    """
    target.chmod(stat.S_IMODE(target.stat().st_mode) & (stat.S_IMODE(source.stat().st_mode) | _OWNER_FILE))


def narrow(output: Path, sources: Iterable[Path]) -> None:
    """Gives a finished output its permissions, and takes from all that is in it those that some input does not give.

    Until then its directory is closed to others, so that nothing in it is open to them, whatever has written it.

    Args:
        output: The directory that is made.
        sources: The files that it is made of; those in remote storage have no permissions.

    Raises:
        OSError: The operating system fails.
    """
    local = [source for source in sources if not isinstance(source, RemotePath)]
    files = reduce(and_, (path.stat().st_mode for path in local), 0o777) | _OWNER_FILE
    places = {place for path in local for place in (path.parent, path.resolve().parent)}  # of a link and of its file
    directories = reduce(and_, (place.stat().st_mode for place in places), 0o777) | _OWNER_DIRECTORY
    for path in output.rglob("*"):
        if not path.is_symlink():
            allowed = directories if path.is_dir() else files
            path.chmod(stat.S_IMODE(path.stat().st_mode) & stat.S_IMODE(allowed))
    output.chmod(0o777 & ~_umask() & stat.S_IMODE(directories))  # last, as it opens what is in it


def _umask() -> int:
    """What the process takes from the permissions of new files; meanwhile, what others must not have."""
    found = os.umask(0o077)
    os.umask(found)
    return found
