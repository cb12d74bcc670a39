"""The one exception that a user is meant to read, and what mends an error of the operating system."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NO_DIRECTORY = frozenset({errno.ENOTDIR, errno.EEXIST})


class M3Error(Exception):
    """Bad input, said in one sentence: what is wrong, where, and the mend.

    The command line prints the sentence and exits with code 2; code that calls m3jax catches this type.
    """


def mend(error: OSError) -> str:
    """What a user can do about an output that the operating system does not let us write.

    Example:
        >>> mend(OSError(errno.ENOSPC, "No space left on device"))
        'free space or choose another place'
    """
    if error.errno in _FULL:
        return "free space or choose another place"
    if error.errno == errno.EFBIG:
        return "raise the limit with `ulimit -f`, take a smaller --max-shard-size, or choose another place"
    if error.errno in _TOO_MANY:
        return "raise the limit with `ulimit -n`"
    if error.errno in _REFUSED:
        return "choose a place that you may write to"
    if error.errno in _NO_DIRECTORY:
        return "a file is where a directory is to be: choose another place"
    return "check the place and its disk"


@contextmanager
def saying_what_failed(out: object) -> Iterator[None]:
    """Turns what the operating system refuses into a sentence.

    Args:
        out: What was being made, to be named where the error names no file.

    Raises:
        M3Error: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        place = error.filename if error.filename is not None else out
        raise M3Error(f"{place}: {error.strerror or error}: {mend(error)}") from error
