"""A process that outlives JAX's runtime, to say in a sentence why the runtime ended the one that works.

When a process of a multi-controller run dies, or the coordinator is not there, JAX's runtime aborts the others from
C++: no Python of theirs can run any more. So the work is done in a child, and the parent explains how it ended.
"""

import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, NamedTuple, Self, TextIO, TypeAlias

from m3jax.errors import M3Error

Reported: TypeAlias = Callable[[Callable[[], int | None], bool], int]
"""Does some work and gives its exit status; says what goes wrong in a sentence, unless told to be silent."""


class Rendezvous(NamedTuple):
    """Where the processes of a command meet; None is found from the cluster.

    Attributes:
        coordinator: `HOST:PORT` of process 0.
        num_processes: How many there are.
        process_id: Which of them this is.
        heartbeat_seconds: After how long a silent process counts as dead.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    heartbeat_seconds: int

    @classmethod
    def of(
        cls,
        distributed: bool,
        coordinator: str | None,
        num_processes: int | None,
        process_id: int | None,
        heartbeat_seconds: int,
    ) -> Self | None:
        """What the options of a command say; None where it is to work alone.

        Args:
            distributed: Whether there are other processes.
            coordinator: As of the class.
            num_processes: As of the class.
            process_id: As of the class.
            heartbeat_seconds: As of the class.

        Raises:
            M3Error: The options do not go together, or the coordinator is no address.
        """
        told = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
        given = [name for name, value in told.items() if value is not None]
        missing = [name for name, value in told.items() if value is None]
        if given and not distributed:
            raise M3Error(f"{given[0]}: is for --distributed: add it, or leave this out")
        if given and missing:
            raise M3Error(f"{' and '.join(missing)}: missing beside {given[0]}: give all three, or none in a cluster")
        if coordinator is not None:
            _check_address(coordinator)
        if process_id is not None and num_processes is not None and process_id >= num_processes:
            raise M3Error(f"--process-id {process_id}: {num_processes} processes are numbered 0 to {num_processes - 1}")
        return cls(coordinator, num_processes, process_id, heartbeat_seconds) if distributed else None


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise M3Error(f"--coordinator {coordinator!r}: write HOST:PORT, as in 10.0.0.1:8476")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError:
        raise M3Error(f"--coordinator {coordinator}: there is no host {host}: check the name") from None


def work_together(work: Callable[[bool], None], where: Rendezvous, reported: Reported) -> int:
    """Do the work of a command with other processes, of which process 0 speaks.

    Args:
        work: Told whether this process speaks.
        where: Where they meet.
        reported: How errors are said.

    Returns:
        The exit status.

    Raises:
        M3Error: JAX's runtime ended the work; the message says why.
    """

    def shared_work() -> int:
        import jax

        from m3jax.cluster.processes import join

        join(*where)
        speaks = jax.process_index() == 0
        return reported(lambda: work(speaks), not speaks)

    def leave() -> None:
        from m3jax.cluster.processes import leave

        leave()

    return supervised(lambda: reported(shared_work, False), leave, where.coordinator, where.process_id)


def supervised(
    work: Callable[[], int], leave: Callable[[], None], coordinator: str | None, process_id: int | None
) -> int:
    """Run `work` in a child process, to be called before there are threads or JAX.

    The child's Python has the standard streams; what its C++ writes to them is kept for the explanation.

    Args:
        work: Returns an exit status.
        leave: Called in the child once the status is known; however that goes, the status stands.
        coordinator: What to call the coordinator in sentences; None where the cluster knows.
        process_id: Which process this is; None where the cluster knows.

    Returns:
        The child's exit status, or 128 and the number of the signal that ended it.

    Raises:
        M3Error: The child was ended by JAX's runtime; the message says why.
    """
    with tempfile.TemporaryFile("w+b") as log, tempfile.TemporaryFile("w+b", buffering=0) as outcome:
        alive, held = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(held)
            os._exit(_work(work, leave, log, outcome, alive))
        os.close(alive)
        for passed_on in (signal.SIGINT, signal.SIGTERM):
            signal.signal(passed_on, lambda number, _: os.kill(child, number))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(held)
        outcome.seek(0)
        if told := outcome.read():
            return int(told)
        if status == -signal.SIGABRT:
            log.seek(0)
            raise M3Error(explain(log.read().decode(errors="replace"), coordinator, process_id))
    return status if status >= 0 else 128 - status


def _work(work: Callable[[], int], leave: Callable[[], None], log: IO[bytes], outcome: IO[bytes], alive: int) -> int:
    """What the child does."""
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    sys.stdout, sys.stderr = _python_only(sys.stdout, 1, log), _python_only(sys.stderr, 2, log)
    status = work()
    sys.stdout.flush()
    sys.stderr.flush()
    outcome.write(str(status).encode())
    leave()
    return status


def _python_only(stream: TextIO, descriptor: int, log: IO[bytes]) -> TextIO:
    """A stream to where `descriptor` leads, which itself is turned to the log."""
    copy = os.fdopen(os.dup(descriptor), "w", encoding=stream.encoding, errors="backslashreplace")
    if descriptor == 2 or copy.isatty():
        copy.reconfigure(line_buffering=True)
    os.dup2(log.fileno(), descriptor)
    return copy


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the parent's end is closed, by whatever ended it
    os.kill(os.getpid(), signal.SIGKILL)


def explain(log: str, coordinator: str | None, process_id: int | None = None) -> str:
    """Why JAX's runtime ended a process, as a sentence, from what it wrote.

    Args:
        log: What C++ wrote to standard error.
        coordinator: What to call the coordinator.
        process_id: Which process this is, where it is known.

    Example:
        >>> explain("The following tasks are unhealthy (stopped sending heartbeats):\\n2\\nThe tasks", None)
        'process 2 died or lost its connection: start the same command again on every process to resume'
    """
    where = f"the coordinator {coordinator}" if coordinator else "the coordinator"
    unhealthy = re.search(r"tasks are unhealthy[^\n]*:\n([0-9, \n]+)\n", log)
    if unhealthy:
        dead = ", ".join(re.findall(r"[0-9]+", unhealthy[1]))
        return f"process {dead} died or lost its connection: start the same command again on every process to resume"
    if "RegisterTask" in log and "Unexpected task" in log:
        return f"{where} expects fewer processes: give every process the same --num-processes"
    if "RegisterTask" in log and "newer incarnation" in log:
        return f"another process came to {where} with the same number: give every process its own --process-id"
    if "RegisterTask" in log and process_id == 0:
        return f"not every process came to {where} in time: check that all of --num-processes are started"
    if "RegisterTask" in log:
        return (
            f"{where} was not reached, or not every process came to it, in time: check the address, the network, "
            "and that all of --num-processes are started"
        )
    if "UNAVAILABLE" in log:
        return "process 0 died or lost its connection: start the same command again on every process to resume"
    last = next((line for line in log.splitlines() if line.startswith("F")), "it aborted without a word")
    return f"JAX's runtime ended this process: {last}"
