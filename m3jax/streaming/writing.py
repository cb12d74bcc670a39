"""Writing merged chunks: files filled and digested by a thread for each lane, finished and journalled."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from m3jax.checkpoints import DTYPES, ShardWriter, TensorDigest, TensorInfo, as_bytes
from m3jax.errors import M3Error
from m3jax.outputs.journal import Journalled
from m3jax.streaming.lanes import persevere, start_threads
from m3jax.streaming.plan import FLOATS
from m3jax.streaming.reading import CACHED_BYTES, ChunkReader, Loaded, check_finite


class OtherBytesError(M3Error):
    """A replay gives other bytes than its manifest records."""


class Shards:
    """The weight files of an output: filled by one or several lanes, finished and journalled.

    Leaving the context removes the files that are not finished.
    """

    def __init__(
        self,
        workplace: Journalled,
        shards: Sequence[tuple[str, Sequence[TensorInfo]]],
        input_digests: Callable[[str], Mapping[str, Mapping[str, str]]],
        lent_digests: Callable[[str], Mapping[str, Mapping[str, str]]],
        expected: Mapping[str, str],
        allow_nonfinite: bool,
        keep: Callable[[str, Mapping[str, str]], Sequence[str]] | None = None,
    ) -> None:
        self._workplace = workplace
        self._keep = keep
        self._input_digests = input_digests
        self._lent_digests = lent_digests
        self._expected = expected
        self.allow_nonfinite = allow_nonfinite
        self._shard_of = {info.name: file for file, infos in shards for info in infos}
        self._contents = {file: list(infos) for file, infos in shards}
        self._left = {file: len(infos) for file, infos in shards}
        self._digests: dict[str, tuple[TensorInfo, str]] = {}
        self._writers: dict[str, ShardWriter] = {}
        self._lock = threading.Lock()
        self.bytes_written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.abort()

    def writer(self, name: str) -> ShardWriter:
        """The file of a tensor, which is made for the first of its tensors.

        Args:
            name: The tensor.
        """
        file = self._shard_of[name]
        with self._lock:
            if file not in self._writers:
                self._writers[file] = ShardWriter(self._workplace.path / file, self._contents[file])
            return self._writers[file]

    def finish_tensor(self, info: TensorInfo, digest: str) -> None:
        """Take a tensor for written, and its file for finished if it was the last one there.

        Args:
            info: The tensor.
            digest: Of its bytes.

        Raises:
            OtherBytesError: A replay should have made other bytes.
        """
        if self._expected.get(info.name, digest) != digest:
            raise OtherBytesError(
                f"{info.name}: the replay gives other bytes than the manifest records: "
                "run it with the versions that the manifest names"
            )
        file = self._shard_of[info.name]
        with self._lock:
            self._digests[info.name] = (info, digest)
            self.bytes_written += info.nbytes
            self._left[file] -= 1
            writer = None if self._left[file] else self._writers.pop(file)
        if writer is None:
            return
        try:
            writer.finish()
        finally:
            writer.abort()  # which does nothing to a file that is finished
        with self._lock:
            self._record(file)

    def _record(self, file: str) -> None:
        """Journals a file that is finished."""
        tensors = {info.name: self._told(info.name) for info in self._contents[file]}
        entry: dict[str, Any] = {"shard": file, "tensors": tensors}
        if self._keep is not None:  # as something else than it is
            entry["files"] = list(self._keep(file, {name: told["digest"] for name, told in tensors.items()}))
        self._workplace.record(entry)

    def _told(self, name: str) -> dict[str, Any]:
        """What the journal tells of a tensor."""
        lent = self._lent_digests(name)
        told = {"digest": self._digests[name][1], "inputs": self._input_digests(name)}
        return {**told, "lent": lent} if lent else told


class Writing:
    """The thread that writes a lane's merged chunks; entering the context starts it."""

    def __init__(self, shards: Shards, reader: ChunkReader) -> None:
        self._shards = shards
        self._reader = reader
        self._digest = TensorDigest()
        self._queue: queue.Queue[tuple[Loaded, Any] | None] = queue.Queue(2)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Self:
        start_threads([self._thread])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
        persevere(lambda: self._queue.put(None), self._fail)
        persevere(self._ended.wait, self._fail)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        """Take what went wrong first; chunks that are left are not written."""
        if self._error is None:
            self._error = error

    def submit(self, loaded: Loaded, result: Any) -> None:
        """Hand over a chunk; raises what went wrong with an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put((loaded, result))

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                if self._error is not None:
                    self._reader.release(item[0])  # so that the readers, and whoever waits for them, come to an end
                    continue
                try:
                    self._write(*item)
                except BaseException as error:  # raised again in the thread that submits
                    self._fail(error)
        finally:
            self._ended.set()

    def _write(self, loaded: Loaded, result: Any) -> None:
        visit = loaded.visit
        info = visit.plan.output
        writer = self._shards.writer(info.name)
        raw = np.frombuffer(as_bytes(np.asarray(result)[: visit.size]), np.uint8)
        begin = visit.start * DTYPES[info.dtype].itemsize
        for start in range(0, raw.size, CACHED_BYTES):
            piece = raw[start : start + CACHED_BYTES]
            if not self._shards.allow_nonfinite and visit.plan.pipeline is not None:
                check_finite(piece, info.dtype, lambda: self._nonfinite(loaded))
            self._digest.update(piece)
            writer.write(info.name, begin + start, piece)
        del raw, result
        self._reader.release(loaded)
        if visit.last:
            digest, self._digest = self._digest.hexdigest(), TensorDigest()
            self._shards.finish_tensor(info, digest)

    def _nonfinite(self, loaded: Loaded) -> str:
        """What is wrong where merged entries are NaN or infinite; raises M3Error if it is an input."""
        self._reader.check_inputs(loaded)
        info = loaded.visit.plan.output
        return f"{info.name}: merged entries overflow {FLOATS[info.dtype]}: take a wider dtype or smaller weights"
