"""Where bytes come from: files on this disk and remote objects, read by ranges from several threads at once."""

import errno
import os
import stat
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from m3jax.checkpoints.remote import Identity, RemotePath, changed, range_reader, saying
from m3jax.documents import LARGEST_FILE
from m3jax.errors import M3Error

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_FIRST = 2**16  # bytes: the header of most files, in one request
_WIDEST = 2**24  # bytes of one request while reading goes straight on
_AHEAD = 3  # requests that go ahead of what is being read
_BLOCKS = 8  # of one object in memory at a time
_REQUESTS = 16  # at a time, of this process


def exists(path: Path | str) -> bool:
    """Whether there is something at a local or remote path.

    Raises:
        M3Error: Nobody can tell: the disk fails, or a directory is closed to us. So of the two below.
    """
    return path.exists() if isinstance(path, RemotePath) else _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether a local or remote path is a file; see `exists`."""
    if isinstance(path, RemotePath):
        return path.is_file()
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_dir(path: Path) -> bool:
    """Whether a local or remote path is a directory; see `exists`."""
    if isinstance(path, RemotePath):
        return path.is_dir()
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path | str) -> int | None:
    """What a path leads to; None where there is nothing, which is not said of what cannot be looked at."""
    try:
        return os.stat(path).st_mode
    except ValueError:  # a name that nothing has
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise unreadable(path, error) from error


def list_names(directory: Path) -> list[str]:
    """The names of what is directly in a local or remote directory.

    Raises:
        M3Error: The directory cannot be listed.
    """
    if isinstance(directory, RemotePath):
        return [path.name for path in directory.iterdir()]
    try:
        return os.listdir(directory)
    except OSError as error:
        raise M3Error(f"{directory} cannot be listed: {error.strerror}; check the path and its mode.") from error


# --- Files on this disk ----------------------------------------------------------------------------------


def identity(file: os.stat_result) -> Identity:
    """What tells a file from others, from what the operating system says of it."""
    return Identity(file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns)


def unreadable(path: Path | str, error: OSError | ValueError) -> M3Error:
    """The sentence for a file that the operating system does not give us."""
    if isinstance(error, FileNotFoundError):
        return M3Error(f"{path} does not exist: check the path.")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return M3Error(f"{path} cannot be opened, too many files are: raise the limit with `ulimit -n`.")
    reason = error.strerror if isinstance(error, OSError) else error
    return M3Error(f"{path} cannot be read: {reason}; check the path, its mode and the disk.")


def open_file(path: Path) -> int:
    """Opens a regular file for reading.

    Args:
        path: The file.

    Returns:
        Its descriptor.

    Raises:
        M3Error: It is absent, no regular file, or closed to us.
    """
    try:
        # Not to wait for the other end of a pipe before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise M3Error(f"{path} is not a regular file: give one, or a model directory.")
    return descriptor


def first_bytes(path: Path, count: int) -> bytes:
    """So many bytes of the beginning of a file on this disk; none where it is no regular file that we may read."""
    try:
        source = LocalSource(path)
    except M3Error:
        return b""
    try:
        head = bytearray(count)
        return bytes(head[: source.read_into(memoryview(head), 0, count)])
    except OSError:
        return b""
    finally:
        source.close()


def read_exactly(descriptor: int, out: memoryview, offset: int) -> int:
    """Fills `out` from `offset` on, in as many reads as it takes; returns how much came before the end."""
    done = 0
    while done < len(out):
        got = os.preadv(descriptor, [out[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


# --- Sources of bytes ------------------------------------------------------------------------------------


class ByteSource(Protocol):
    """An open file or object."""

    identity: Identity

    def read_into(self, out: memoryview, offset: int, until: int) -> int:
        """Fills `out` from `offset` on.

        Args:
            out: Writable flat bytes.
            offset: The first byte wanted, from the start of the file.
            until: Where reading in order may go on to; what is beyond is not read ahead.

        Returns:
            How many bytes came before the end of the file.
        """

    def close(self) -> None:
        """Releases what is held."""


class LocalSource:
    """A file on this disk; its operating system reads ahead."""

    def __init__(self, path: Path) -> None:
        """Opens the file."""
        self._descriptor = open_file(path)
        self.identity = identity(os.fstat(self._descriptor))

    def read_into(self, out: memoryview, offset: int, until: int) -> int:
        """See `ByteSource.read_into`; raises OSError."""
        return read_exactly(self._descriptor, out, offset)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def open_source(path: Path) -> ByteSource:
    """Opens a local or remote file for reading by ranges, from several threads at once.

    Raises:
        M3Error: It is not there or not given to us.
    """
    return RemoteSource(path) if isinstance(path, RemotePath) else LocalSource(path)


def read_file(path: Path) -> bytes:
    """The whole of a small local or remote file.

    Raises:
        M3Error: It is not there, no regular file, not given to us, larger than such files are, or cannot be read.
    """
    source = open_source(path)
    try:
        if source.identity.size > LARGEST_FILE:
            raise M3Error(
                f"{path} has {source.identity.size:,} bytes, more than any manifest, index or configuration "
                f"({LARGEST_FILE:,}): restore it."
            )
        content = bytearray(source.identity.size)
        source.read_into(memoryview(content), 0, len(content))
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        source.close()
    return bytes(content)


@dataclass(eq=False)
class _Block:
    """A range that was asked for."""

    start: int
    end: int
    straight: bool  # whether reading has come here straight from the range before
    content: "Future[bytes]"
    left: int  # bytes that nobody has read yet


class RemoteSource:
    """An object, read by ranges that widen while reading goes straight on, some of them ahead of it.

    A range is asked for once: its bytes stay until they were read. All are of the object that was opened: if another
    takes its name, reading is an error.
    """

    def __init__(self, path: RemotePath) -> None:
        """Asks for the object's state.

        Raises:
            M3Error: There is no such object, or it is not given to us.
        """
        self._path = path
        with saying(path):
            self.identity, self._fetch = range_reader(path)
        self._blocks: list[_Block] = []
        self._widths: dict[int, int] = {}  # of the ranges asked for, by their ends
        self._lock = threading.Lock()

    def read_into(self, out: memoryview, offset: int, until: int) -> int:
        """See `ByteSource.read_into`; raises M3Error."""
        wanted = max(0, min(len(out), self.identity.size - offset))
        done = 0
        while done < wanted:
            at = offset + done
            block = self._block_at(at, offset + wanted, min(until, self.identity.size))
            piece = memoryview(self._content(block))[at - block.start :][: wanted - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            self._spend(block, len(piece))
        return done

    def _block_at(self, at: int, stop: int, until: int) -> _Block:
        """The block that has the byte `at`, asked for now if need be, and those after it that should be under way."""
        with self._lock:
            block = next((b for b in self._blocks if b.start <= at < b.end), None)
            if block is None:
                straight = at in self._widths
                block = self._ask(at, max(_FIRST, stop - at), max(stop, until), straight)
            horizon = until if block.straight else stop
            last = block
            for _ in range(_AHEAD):
                if last.end >= horizon:
                    break
                after = next((b for b in self._blocks if b.start == last.end), None)
                last = after or self._ask(last.end, _FIRST, horizon, block.straight)
            return block

    def _ask(self, start: int, least: int, limit: int, straight: bool) -> _Block:
        """Asks for a range, twice as wide as the one before it; the lock is held."""
        width = min(_WIDEST, max(least, 2 * self._widths.pop(start, 0)))
        end = min(start + width, limit)
        self._widths[end] = width
        if len(self._widths) > _REQUESTS:
            del self._widths[next(iter(self._widths))]
        if len(self._blocks) >= _BLOCKS:
            del self._blocks[0]
        block = _Block(start, end, straight, _pool().submit(self._get, start, end), end - start)
        self._blocks.append(block)
        return block

    def _get(self, start: int, end: int) -> bytes:
        """A range of the object, asked for now."""
        with saying(self._path):
            try:
                content = self._fetch(start, end)
            except FileNotFoundError:  # it was there when it was opened
                raise changed(self._path) from None
        if len(content) != end - start:
            raise changed(self._path)
        return content

    def _content(self, block: _Block) -> bytes:
        """The bytes of a block, once they are here."""
        try:
            return block.content.result()
        except M3Error:
            self._spend(block, block.left)  # so that it can be asked for again
            raise

    def _spend(self, block: _Block, count: int) -> None:
        with self._lock:
            block.left -= count
            if block.left <= 0 and block in self._blocks:
                self._blocks.remove(block)

    def close(self) -> None:
        """Forgets what was read ahead."""
        with self._lock:
            for block in self._blocks:
                block.content.cancel()
            self._blocks.clear()


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads that wait for storage, of all objects together."""
    return ThreadPoolExecutor(_REQUESTS, "remote-read")
