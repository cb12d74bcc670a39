"""Several processes at one merge: what they tell each other, over JAX's multi-controller runtime.

Everything goes through one exchange: each process gives some bytes, process 0 combines them in process order, and all
get the result. It travels through the key-value store of JAX's coordination service, which tells whoever waits for a
key when it is there, and needs no device.
"""

import itertools
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol, Self, TypeAlias

import jax
import numpy as np

from m3jax.errors import M3Error

_LONGEST_MS = 10**9  # of a wait for another process: eleven days; one that dies, JAX's runtime notices by itself
_merges = itertools.count()  # every process does the same merges in the same order

Buffer: TypeAlias = bytes | memoryview
Combine = Callable[[Sequence[Buffer]], Buffer]


class Processes(Protocol):
    """The processes that work at one merge.

    Attributes:
        index: Which of them this is.
        count: How many they are.
    """

    index: int
    count: int

    def exchange(self, mine: Buffer, combine: Combine) -> Buffer:
        """What `combine` makes, on process 0, of what every process gave; all processes call this in one order."""

    def check(self) -> None:
        """Raise M3Error if another process has failed."""

    def fail(self, sentence: str) -> None:
        """Tell the others why this process gives up."""


class _Alone:
    """One process."""

    index, count = 0, 1

    def exchange(self, mine: Buffer, combine: Combine) -> Buffer:
        return combine([mine])

    def check(self) -> None:
        pass

    def fail(self, sentence: str) -> None:
        pass


ALONE: Processes = _Alone()


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 30,
) -> None:
    """Become one of several processes, before anything else of JAX is used; `leave` ends it.

    Args:
        coordinator: `HOST:PORT` of process 0. Found from the cluster (TPU pod, Slurm, GKE, Open MPI) where None.
        num_processes: How many there are; found where None.
        process_id: Which of them this is; found where None.
        heartbeat_seconds: After how long JAX declares a silent process dead and ends the others.

    Raises:
        M3Error: There is no cluster to find them from. What goes wrong later, JAX's runtime answers by ending the
            process; see `m3jax.cluster.supervision`.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=2 * heartbeat_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, TypeError) as error:
        raise M3Error(
            "--distributed: no TPU pod, Slurm, GKE or Open MPI job is found here: "
            "pass --coordinator HOST:PORT --num-processes N --process-id I"
        ) from error


def leave() -> None:
    """Wait for the others and be one process again."""
    jax.distributed.shutdown()  # type: ignore[no-untyped-call]


class Cluster:
    """The processes of JAX's multi-controller runtime; entering the context begins to listen for failures."""

    def __init__(self) -> None:
        # JAX has no public name for its key-value store; orbax.checkpoint uses it in the same way.
        from jax._src import distributed

        client = distributed.global_state.client
        if client is None:
            raise M3Error("there is one process only: call jax.distributed.initialize() on every process first")
        self._client: Any = client
        self.index: int = jax.process_index()
        self.count: int = jax.process_count()
        self._prefix = f"m3jax/{next(_merges)}"
        self._turn = 0
        self._failure: str | None = None
        self._arrivals: SimpleQueue[bytes | None] = SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name="failures", daemon=True)

    def __enter__(self) -> Self:
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.fail(str(error) or type(error).__name__)
        elif self.index == 0:
            self._end(b"")
        self._listener.join()

    def _listen(self) -> None:
        """Wait for what ends the work: the sentence of a process that has failed, or nothing."""
        sentence = self._wait(f"{self._prefix}/end")
        if sentence:
            self._failure = sentence.decode()
            self._arrivals.put(None)

    def _end(self, sentence: bytes) -> None:
        with suppress(jax.errors.JaxRuntimeError):  # another one was first
            self._client.key_value_set_bytes(f"{self._prefix}/end", sentence)

    def _wait(self, key: str) -> bytes | None:
        """The value of a key, once it is there; None where the coordinator is lost, who ends the process by itself."""
        try:
            value: bytes = self._client.blocking_key_value_get_bytes(key, _LONGEST_MS)
        except jax.errors.JaxRuntimeError:
            return None
        return value

    def _get(self, key: str) -> bytes:
        """The value of a key, once it is there, unless some process fails before."""
        arrivals: SimpleQueue[bytes | None] = SimpleQueue()
        self._arrivals = arrivals
        self.check()
        # In a thread, because Ctrl-C does not reach whoever waits in C++.
        threading.Thread(target=lambda: arrivals.put(self._wait(key)), name="exchange", daemon=True).start()
        value = arrivals.get()
        if value is None:
            self.check()
            raise M3Error("the coordinator was lost: start the same command again on every process to resume")
        return value

    def exchange(self, mine: Buffer, combine: Combine) -> Buffer:
        """See `Processes`."""
        place = f"{self._prefix}/{self._turn}"
        self._turn += 1
        if self.index:
            self._client.key_value_set_bytes(f"{place}/{self.index}", bytes(mine))
            return self._get(f"{place}/all")
        result = bytes(combine([mine, *(self._get(f"{place}/{i}") for i in range(1, self.count))]))
        self._client.key_value_set_bytes(f"{place}/all", result)
        if self._turn > 1:  # everyone has given something since, and so has taken what was before
            self._client.key_value_delete(f"{self._prefix}/{self._turn - 2}")
        return result

    def check(self) -> None:
        """See `Processes`."""
        if self._failure is not None:
            raise M3Error(self._failure)

    def fail(self, sentence: str) -> None:
        """See `Processes`."""
        if self._failure is None:
            self._failure = sentence
            self._end(sentence.encode())


# --- what is exchanged --------------------------------------------------------------------------------------------


def share(processes: Processes, value: Any) -> Any:
    """Process 0's value (JSON), on every process."""
    mine = json.dumps(value).encode() if processes.index == 0 else b""
    return json.loads(bytes(processes.exchange(mine, lambda given: given[0])))


def gather(processes: Processes, value: Any) -> list[Any]:
    """Every process's value (JSON), in process order, on every process."""
    told = processes.exchange(json.dumps(value).encode(), lambda given: b"[" + b",".join(given) + b"]")
    return list(json.loads(bytes(told)))


def add_up(processes: Processes, counts: np.ndarray) -> np.ndarray:
    """The sum of every process's int64 counts of one shape."""

    def total(given: Sequence[Buffer]) -> Buffer:
        return bytes(np.sum([np.frombuffer(each, np.dtype("<i8")) for each in given], axis=0).tobytes())

    told = processes.exchange(np.ascontiguousarray(counts, np.dtype("<i8")).tobytes(), total)
    return np.frombuffer(told, np.dtype("<i8")).reshape(counts.shape)
