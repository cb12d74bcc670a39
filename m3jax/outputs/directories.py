"""Directories made, held by one process, and exchanged in one step."""

import ctypes
import errno
import fcntl
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from m3jax.errors import M3Error

_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_LOCKLESS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
_HERE, _EXCHANGE = -100, 2  # Linux's AT_FDCWD and RENAME_EXCHANGE


PRIVATE = 0o700
"""The mode of a directory while files are made in it, which may be of inputs that are closed to others."""


def open_directory(path: Path) -> int:
    """A descriptor of a directory, which is no link."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def make(directory: Path) -> bool:
    """Make a directory that is closed to all but its owner; False if it was there already."""
    try:
        directory.mkdir(PRIVATE)
    except FileExistsError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open directory is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def lock(descriptor: int, directory: Path) -> bool:
    """Lock an open directory; False where the file system has no locks.

    Raises:
        M3Error: Another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise M3Error(
                f"{directory}: another merge is writing there: wait for it, or choose another output"
            ) from None
        if error.errno not in _LOCKLESS:
            raise OSError(error.errno, error.strerror, str(directory)) from error
        return False
    return True


@cache
def _renameat2() -> Any:
    """The system's function that exchanges two names; None where there is none."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2 if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system cannot."""
    function = _renameat2()
    if function is None:
        return False
    names = [ctypes.c_char_p(os.fsencode(path)) for path in (one, other)]
    if function(_HERE, names[0], _HERE, names[1], ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
