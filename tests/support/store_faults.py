"""Every request to an object store fails or is the last: what is there then, and what the same command does.

The server counts the requests of one command and answers the one of a number, or all from it on, with a fault. Of a
process that ends, the store sees that nothing more is asked of it; what it changes on the local disk ends there too.
"""

import logging
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

import m3jax
from m3jax.checkpoints.remote import file_system
from m3jax.errors import M3Error
from m3jax.outputs import remote
from m3jax.outputs.conversion import convert
from support import object_store
from support.directories import recipe, write
from support.faults import Faults, Killed, contents

FAULTS = {
    "kill": "the process ends before it",
    "lost": "it is done, but its answer is lost",
    "500": "it and all after it fail with 500",
    "503": "it and all after it fail with 503",
    "403": "it and all after it fail with 403",
    "slow": "it and all after it are not answered in time",
    "cut": "its answer is cut, and so are all after it",
    "short": "its answer holds half of what was asked",
}
"""What happens at a request, and how it is said."""

_ONCE = ("lost", "short")
_CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}
_PATIENCE, _IMPATIENCE = 10.0, 0.3  # seconds of waiting for an answer
_BUCKET = "faults"


class Gate:
    """What a server's answers pass through: counts the requests, and spoils some."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app
        self.calls: list[str] = []
        self.at, self.fault, self.on_fault = 0, "", lambda: None
        self._lock = threading.Lock()

    def arm(self, at: int, fault: str, on_fault: Callable[[], None] = lambda: None) -> None:
        """Begin to count, and spoil the request of a number; none if it is 0."""
        self.calls, self.at, self.fault, self.on_fault = [], at, fault, on_fault

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        with self._lock:
            asked = [key.partition("=")[0] for key in environ["QUERY_STRING"].split("&")]
            self.calls.append(" ".join([environ["REQUEST_METHOD"], environ["PATH_INFO"], *asked]))
            number = len(self.calls)
            is_hit = number == self.at or (0 < self.at < number and self.fault not in _ONCE)
            fault = self.fault if is_hit else ""
        if not fault:
            return self.app(environ, start)
        self.on_fault()
        if fault in _CODES:
            body = f"<Error><Code>{_CODES[fault]}</Code><Message>no</Message></Error>".encode()
            start(f"{fault} {_CODES[fault]}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if fault == "slow":
            time.sleep(2 * _IMPATIENCE)
        if fault in ("kill", "slow"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else it is taken for a request
            raise _hung_up(environ)
        return self._spoilt(environ, start, fault)

    def _spoilt(self, environ: dict[str, Any], start: Callable[..., Any], fault: str) -> Any:
        """An answer of which the end is missing, or all."""
        said: list[Any] = []
        body = b"".join(self.app(environ, lambda status, headers, *_: said.extend([status, headers])))
        status, headers = said
        if fault == "lost" or (fault == "cut" and len(body) < 2):
            raise _hung_up(environ)
        half = body[: len(body) // 2]
        if fault == "short":
            if environ["REQUEST_METHOD"] != "HEAD":
                headers = [(key, value) for key, value in headers if key.lower() != "content-length"]
                headers.append(("Content-Length", str(len(half))))
            start(status, headers)
            return [half]

        def cut() -> Iterator[bytes]:
            start(status, headers)
            yield half
            raise _hung_up(environ)

        return cut()


def _hung_up(environ: dict[str, Any]) -> ConnectionError:
    """Ends a connection, which is kept for the next request otherwise; what the server takes for that."""
    with suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return ConnectionResetError()


class Scenario(NamedTuple):
    """A command, in all that it needs to be stepped through.

    Attributes:
        command: The command; raises M3Error.
        begin: Brings back what is there before it.
        found: The output, journals aside; None where nothing is that loaders would take for a model.
        left: Names of what an interrupted command has left.
        old: What was there before.
        place: The local directory in which an output is made; None where it is made in the store.
    """

    command: Callable[[], Any]
    begin: Callable[[], None]
    found: Callable[[], dict[str, bytes] | None]
    left: Callable[[], list[str]]
    old: dict[str, bytes] | None
    place: Path | None = None


# --- The store ---------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """A server of objects, and how patient its users are.

    Attributes:
        gate: What all requests pass through.
        monkeypatch: Of the driver's settings.
    """

    gate: Gate
    monkeypatch: pytest.MonkeyPatch

    def wait_for(self, seconds: float) -> None:
        """Has the driver wait so long for an answer."""
        from fsspec.config import conf  # type: ignore[import-untyped]

        retries = {"mode": "standard", "total_max_attempts": 1}  # besides those of the layer above
        kept = {"connect_timeout": 3, "read_timeout": seconds, "retries": retries, "max_pool_connections": 32}
        self.monkeypatch.setitem(conf, "s3", {"config_kwargs": kept})
        file_system.cache_clear()


@contextmanager
def served() -> Iterator[Server]:
    """A server of its own with a bucket; small parts make several of a small file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from _served(monkeypatch)


def _served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    moto = pytest.importorskip("moto.server", reason="pip install 'm3jax[test]'")
    from moto.moto_server import threaded_moto_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gates: list[Gate] = []

    def with_gate(made: Callable[..., Any]) -> Gate:
        gates.append(Gate(moto.DomainDispatcherApplication(made)))
        return gates[-1]

    with mock.patch.object(threaded_moto_server, "DomainDispatcherApplication", with_gate):
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
    object_store.point_at(monkeypatch, server.get_host_and_port()[1])
    monkeypatch.setattr(remote, "_PART", 2**20)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    opened = Server(gates[0], monkeypatch)
    opened.wait_for(_PATIENCE)
    if file_system("s3").exists(_BUCKET):  # of a server before: what they hold is the process's
        _remove("")
    else:
        file_system("s3").mkdir(_BUCKET)
    yield opened
    server.stop()
    file_system.cache_clear()


def _objects(prefix: str) -> dict[str, bytes]:
    driver = file_system("s3")
    return {
        key.removeprefix(f"{_BUCKET}/{prefix}/"): driver.cat_file(key) for key in driver.find(f"{_BUCKET}/{prefix}")
    }


def _is_journal(name: str) -> bool:
    return name.startswith("m3jax-journal")


def _put(prefix: str, objects: dict[str, bytes]) -> None:
    for name, content in objects.items():
        file_system("s3").pipe_file(f"{_BUCKET}/{prefix}/{name}", content)


def _remove(prefix: str) -> None:
    driver = file_system("s3")
    for key in driver.find(f"{_BUCKET}/{prefix}"):
        driver.rm_file(key)
    for upload in driver.list_multipart_uploads(_BUCKET):
        driver.abort_mpu(_BUCKET, upload["Key"], upload["UploadId"])


# --- Scenarios ---------------------------------------------------------------------------------------------------


def scenarios(place: Path) -> dict[tuple[str, str], Scenario]:
    """Commands that read or write objects, by name and by how they begin; the store has to be there."""
    shapes = {"a": (30, 20), "b": (800, 900)}
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        rng = np.random.default_rng(seed)
        write(place / name, {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()})
        _put(name, contents(place / name))
    asked = recipe(place, merge_method="task_arithmetic")
    far = {"merge_method": "linear", "models": [f"s3://{_BUCKET}/expert-{k}" for k in range(2)]}

    def merge(out: str | Path, asked: dict[str, Any], **more: Any) -> object:
        return m3jax.merge_checkpoint(asked, out, max_shard_size=10_000, **more)

    merge(f"s3://{_BUCKET}/old", recipe(place, merge_method="linear"))
    old = _objects("old")
    url, local = f"s3://{_BUCKET}/out", place / "local"
    local.mkdir()
    source = f"s3://{_BUCKET}/expert-0"

    def into_store(command: Callable[[], Any], before: dict[str, bytes] | None) -> Scenario:
        def begin() -> None:
            _remove("out")
            _put("out", before or {})

        def found() -> dict[str, bytes] | None:
            there = {name: content for name, content in _objects("out").items() if not _is_journal(name)}
            return there if "config.json" in there else None

        def left() -> list[str]:
            parts = [upload["Key"] for upload in file_system("s3").list_multipart_uploads(_BUCKET)]
            return [*filter(_is_journal, _objects("out")), *parts]

        return Scenario(command, begin, found, left, before)

    def from_store(command: Callable[[], Any]) -> Scenario:
        def begin() -> None:
            shutil.rmtree(local)
            local.mkdir()

        def left() -> list[str]:
            return [path.name for path in local.iterdir() if path.name != "out"]

        return Scenario(command, begin, lambda: contents(local / "out"), left, None, local)

    return {
        ("merge into the store", "fresh"): into_store(lambda: merge(url, asked), None),
        ("merge into the store", "overwriting"): into_store(lambda: merge(url, asked, overwrite=True), old),
        ("merge from the store", "fresh"): from_store(lambda: merge(local / "out", far)),
        ("merge inside the store", "fresh"): into_store(lambda: merge(url, far), None),
        ("convert from the store", "fresh"): from_store(lambda: convert(source, local / "out", "msgpack")),
    }


def step_through(
    scenario: Scenario, server: Server, fault: str, stride: int = 1
) -> tuple[Counter[str], int, list[str]]:
    """Run a command with a fault at each request in turn, and then again without one.

    Args:
        scenario: The command.
        server: That it asks.
        fault: Of `FAULTS`.
        stride: Take every so many requests.

    Returns:
        How often each outcome was there after the fault, the number of requests, and what is wrong.
    """
    gate = server.gate
    gate.arm(0, "")
    scenario.begin()
    scenario.command()
    reference = scenario.found()
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    at = 1
    while True:
        scenario.begin()
        if fault == "slow":
            server.wait_for(_IMPATIENCE)
        ended = _broken(scenario, gate, at, fault)
        calls = list(gate.calls)
        gate.arm(0, "")
        if fault == "slow":
            server.wait_for(_PATIENCE)
        if len(calls) < at:
            return outcomes, len(calls), wrong
        there = scenario.found()
        states = {"new": reference, "none": None} | ({} if scenario.old is None else {"old": scenario.old})
        state = next((name for name, content in states.items() if there == content), "OTHER")
        said = f"{fault} at {at} ({calls[at - 1]}), {ended}, then {state}"
        if state == "OTHER" or (ended == "finished" and state != "new") or ended.startswith("raised"):
            wrong.append(said)
        outcomes[f"{ended}, {state} output"] += 1
        if ended != "finished":
            try:
                scenario.command()
            except M3Error as error:
                if not (state == "new" and "exists already" in str(error)):
                    wrong.append(f"{said}; again: {error}")
        if scenario.found() != reference or scenario.left():
            wrong.append(f"{said}; left {scenario.left()}")
        at += stride


def _broken(scenario: Scenario, gate: Gate, at: int, fault: str) -> str:
    """How a command ends that meets a fault."""
    if fault != "kill" or scenario.place is None:
        gate.arm(at, fault)
        return _ended(scenario)
    with Faults(scenario.place) as faults:

        def die() -> None:
            faults.is_dead = True

        gate.arm(at, fault, die)
        return _ended(scenario)


def _ended(scenario: Scenario) -> str:
    try:
        scenario.command()
    except Killed:
        return "killed"
    except M3Error:
        return "refused"
    except Exception as error:
        return f"raised {type(error).__name__}"
    return "finished"
