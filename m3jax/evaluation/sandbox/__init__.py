"""Runs programs that a model wrote against tests, where they can harm nothing.

Each program gets processes of its own that are killed whole, an empty environment, no network, a file system that
shows the interpreter read-only and one small empty directory, an unprivileged user, and limits on time, memory,
processes, files and output. The tests run in another process than the program and see only plain values, so a program
passes by returning right values and in no other way. Linux only.
"""

import contextlib
import functools
import json
import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from m3jax.errors import M3Error
from m3jax.evaluation.sandbox import kernel, launcher, launching
from m3jax.evaluation.sandbox.view import machine_view

__all__ = ["Limits", "Outcome", "Program", "UnsandboxedWarning", "run_program", "run_programs", "why_no_sandbox"]

_GRACE_SECONDS = 10.0


class UnsandboxedWarning(UserWarning):
    """Programs that a model wrote run without walls."""

    def __init__(self, why_not: str) -> None:
        super().__init__(
            f"programs that the model wrote run without a sandbox, which this system does not allow ({why_not}): they "
            "have limits on time and memory, but reach the network and whatever this user may read or write"
        )


class Limits(NamedTuple):
    """What one program may use.

    Attributes:
        wall_seconds: Time from start to verdict.
        cpu_seconds: Processor time of one process, in whole seconds. This is what ends endless loops: a verdict must
            not depend on how busy the machine is.
        memory_bytes: Address space of one process, and memory of all its processes together.
        processes: Processes and threads at one time, the two of the sandbox itself included.
        file_bytes: Size of one file.
        disk_bytes: Size of all files together.
        files: Number of files and directories.
        open_files: Descriptors of one process.
        output_bytes: Output that is kept; the rest is read and dropped.
    """

    wall_seconds: float = 60.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    files: int = 4096
    open_files: int = 64
    output_bytes: int = 1 << 16


DEFAULT_LIMITS = Limits()


class Program(NamedTuple):
    """A program, and tests that use the names it defines and raise where it is wrong."""

    source: str
    tests: str


class Outcome(NamedTuple):
    """What became of a program.

    Attributes:
        passed: Whether every test ran to its end without raising.
        reason: "passed"; "failed": a test raised; "error": the program did not load; "timeout"; "memory"; "died": its
            process ended while tests ran; "untested": the tests never used it.
        detail: The error, or the limit.
        output: What it printed, cut to the limit.
        seconds: Time taken.
    """

    passed: bool
    reason: str
    detail: str
    output: str
    seconds: float


def run_program(
    source: str, tests: str, *, limits: Limits = DEFAULT_LIMITS, allow_unsandboxed: bool = False
) -> Outcome:
    """Run one program against its tests.

    Args:
        source: Python source of the program.
        tests: Python source that uses the program's names; an exception is a failure.
        limits: What it may use.
        allow_unsandboxed: Where the system forbids namespaces, go on without them. The program then has limits, an
            empty environment and, if the caller is root, another user, but sees the network and every readable file.

    Raises:
        M3Error: Namespaces or filters of system calls are forbidden here and `allow_unsandboxed` is false.

    Example:
        >>> run_program("def double(x): return 2 * x", "assert double(4) == 8").passed
        True
    """
    with launching.lifeline() as line:
        return _judged(Program(source, tests), limits, allow_unsandboxed, line)


def _judged(program: Program, limits: Limits, allow_unsandboxed: bool, line: launching.Lifeline) -> Outcome:
    why_not = why_no_sandbox()
    if why_not is not None and not allow_unsandboxed:
        raise M3Error(
            f"cannot run generated code safely: this system does not allow a sandbox ({why_not}); run it where user "
            "namespaces are allowed, or pass --allow-unsandboxed to run it with limits only"
        )
    return _launch(program, limits, why_not is None, line)


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits = DEFAULT_LIMITS,
    allow_unsandboxed: bool = False,
    workers: int | None = None,
) -> list[Outcome]:
    """Run many programs, several at a time, each as in `run_program`; outcomes in the order of the programs.

    Args:
        programs: The programs.
        limits: What each may use.
        allow_unsandboxed: See `run_program`.
        workers: How many at a time; the number of usable cores if not given.
    """

    def run(program: Program) -> Outcome:
        return _judged(program, limits, allow_unsandboxed, line)

    with launching.lifeline() as line, ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(run, programs))
        except BaseException:  # a KeyboardInterrupt, which only this thread gets
            line.cut()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@functools.cache
def why_no_sandbox() -> str | None:
    """Why this system allows no sandbox, or None where it does; tried once per process."""
    try:
        with launching.lifeline() as line:
            outcome = _launch(Program("def one(): return 1", "assert one() == 1"), Limits(), True, line)
    except M3Error as error:
        return str(error)
    return None if outcome.passed else f"a trial program ended with: {outcome.detail}"


def _launch(program: Program, limits: Limits, confined: bool, line: launching.Lifeline) -> Outcome:
    if not sys.platform.startswith("linux"):
        raise M3Error(f"generated code can be run on Linux only, and this is {sys.platform}")
    with (
        launching.file_of(program.tests.encode("utf-8", "surrogatepass")) as tests,
        launching.file_of(secret := _secret()) as key,
        contextlib.nullcontext() if confined else _unconfined() as directory,
    ):
        walls = limits._asdict()
        order = {
            "confined": confined,
            "seen": machine_view() if confined else None,
            "directory": directory,
            "source": program.source,
            "output_bytes": walls.pop("output_bytes"),
            "walls": walls,
        }
        seconds = limits.wall_seconds + _GRACE_SECONDS
        ended = launching.forked(order, seconds, tests, key, line) if confined else None
        ended = ended or launching.started(order, seconds, tests, key, line)
    return _outcome(ended, limits, secret)


def _secret() -> bytes:
    """What begins an outcome that is the launcher's own."""
    return secrets.token_hex(16).encode()


_running, _lock = 0, threading.Lock()


@contextlib.contextmanager
def _unconfined() -> Iterator[str]:
    """The directory of a program without walls, which its launcher makes and removes.

    Meanwhile other processes of the same user, programs among them, are kept from this one's memory, environment and
    files.
    """
    global _running
    directory = os.path.join(tempfile.gettempdir(), f"m3jax-{secrets.token_hex(8)}")
    with _lock:
        _running += 1
        kernel.set_dumpable(False)
    try:
        yield directory
    finally:
        launcher.remove(directory)  # where something killed the launcher
        with _lock:
            _running -= 1
            if not _running:
                kernel.set_dumpable(True)


def _outcome(ended: launching.Ended, limits: Limits, secret: bytes) -> Outcome:
    if ended.code in (None, launcher.OUT_OF_TIME):
        return Outcome(False, "timeout", "the sandbox itself did not end in time", "", limits.wall_seconds)
    if ended.code == launcher.CANNOT_CONFINE:
        raise M3Error(ended.complaint.decode(errors="replace"))
    try:
        found = json.loads(ended.answer.removeprefix(secret)) if ended.answer.startswith(secret) else None
    except ValueError:
        found = None
    if found is None:
        why = ended.complaint.decode(errors="replace")[:1000] or "the sandbox was killed"
        return Outcome(False, "died", why, "", 0.0)
    return Outcome(found["reason"] == "passed", found["reason"], found["detail"], found["output"], found["seconds"])
