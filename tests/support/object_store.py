"""A real S3 server on loopback, what is asked of it, and servers that misbehave."""

import functools
import http.server
import itertools
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from m3jax.checkpoints import DTYPES, ShardWriter, TensorInfo, plan_shards, write_index
from m3jax.checkpoints.remote import file_system

SECRET = "loopback-secret-key"  # must never be told
_MISSING = "the driver or the S3 server that tests run against is not installed: pip install 'm3jax[test]'"
_buckets = (f"bucket-{number}" for number in itertools.count())


class Request(NamedTuple):
    """One request that the driver made."""

    method: str
    key: str
    size: int  # bytes of the range it asked for


class Store(NamedTuple):
    """A bucket of its own, and what was asked of it."""

    bucket: str
    requests: list[Request]

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def driver(self):
        return file_system("s3")

    def put(self, directory: Path, prefix: str) -> str:
        for path in directory.rglob("*"):
            if path.is_file():
                self.driver.put_file(str(path), f"{self.bucket}/{prefix}/{path.relative_to(directory).as_posix()}")
        self.requests.clear()
        return f"{self.url}/{prefix}"

    def names(self, prefix: str) -> set[str]:
        return {name.removeprefix(f"{self.bucket}/{prefix}/") for name in self.driver.find(f"{self.bucket}/{prefix}")}

    def ranges(self) -> list[Request]:
        return [request for request in self.requests if request.size]


@functools.cache
def _server() -> int:
    """The port of moto's server, which lives as long as the process."""
    moto = pytest.importorskip("moto.server", reason=_MISSING)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server.get_host_and_port()[1]


def point_at(monkeypatch, port: int) -> None:
    """Makes the driver take a local port for S3, with credentials that need no network to be found."""
    pytest.importorskip("s3fs", reason=_MISSING)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "ACCESS_KEY_ID": "loopback",
        "SECRET_ACCESS_KEY": SECRET,
        "DEFAULT_REGION": "us-east-1",
        "EC2_METADATA_DISABLED": "true",
        "CONFIG_FILE": "/dev/null",
        "SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    file_system.cache_clear()


@contextmanager
def store(monkeypatch, port: int | None = None) -> Iterator[Store]:
    """A new bucket on the server, which is reached through another port if one is given."""
    own = _server()
    s3fs = pytest.importorskip("s3fs", reason=_MISSING)
    point_at(monkeypatch, own)
    asked = Store(next(_buckets), [])
    file_system("s3").mkdir(asked.bucket)
    plain = s3fs.S3FileSystem._call_s3

    async def recorded(self, method, *args, **options):
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", options.get("Range") or "")
        size = int(span[2]) + 1 - int(span[1]) if span else 0
        asked.requests.append(Request(method, options.get("Key", ""), size))
        return await plain(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", recorded)
    if port is not None:
        point_at(monkeypatch, port)
    yield asked
    file_system.cache_clear()


@contextmanager
def answering(status: int, body: bytes = b"") -> Iterator[int]:
    """The port of a server that gives everyone the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def nobody() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def cutting(cuts: int, after: int) -> Iterator[int]:
    """The port of a way to the server on which the first `cuts` long answers end after so many bytes."""
    left = [cuts]

    def carry(source: socket.socket, target: socket.socket, back: bool) -> None:
        passed = 0
        try:
            while piece := source.recv(2**16):
                passed += len(piece)
                if back and passed > after and left[0]:
                    left[0] -= 1
                    break
                target.sendall(piece)
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            if back:
                end.close()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", _server()))
            threading.Thread(target=carry, args=(client, server, False), daemon=True).start()
            threading.Thread(target=carry, args=(server, client, True), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def write_model(directory: Path, seed: int, shape: tuple[int, ...], count: int, shard_size: int) -> Path:
    """A model of `count` bfloat16 tensors of one shape."""
    directory.mkdir(parents=True)
    infos = [TensorInfo(f"layers.{k}.weight", shape, "BF16") for k in range(count)]
    rng = np.random.default_rng(seed)
    shards = plan_shards(infos, shard_size)
    for name, tensors in shards:
        with ShardWriter(directory / name, tensors) as shard:
            for info in tensors:
                shard.write(info.name, 0, rng.standard_normal(shape, np.float32).astype(DTYPES["BF16"]))
            shard.finish()
    if len(shards) > 1:
        write_index(directory, shards, sum(info.nbytes for info in infos))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


class GoogleStore(http.server.ThreadingHTTPServer):
    """As much of Google Cloud Storage's JSON interface as its driver needs for small objects."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _GoogleHandler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.generations = itertools.count(1)
        self.sent = self.received = 0  # bytes of objects, by whoever uses the store

    def handle_error(self, request, client_address) -> None:
        """Says nothing of those who hang up, as drivers do that have enough."""

    def put(self, name: str, content: bytes) -> None:
        self.objects[name] = (next(self.generations), content)

    def put_all(self, directory: Path, prefix: str) -> str:
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())
        return f"gs://bucket/{prefix}"

    def names(self, prefix: str) -> set[str]:
        return {name.removeprefix(f"{prefix}/") for name in self.objects if name.startswith(f"{prefix}/")}


class _GoogleHandler(http.server.BaseHTTPRequestHandler):
    server: GoogleStore

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        path = unquote(address.path)
        if path == "/storage/v1/b/bucket":
            return self.answer(200, {"name": "bucket"})
        if path == "/storage/v1/b/bucket/o":
            return self.answer(200, self.listing(query))
        name = path.partition("/b/bucket/o/")[2]
        generation, content = self.server.objects.get(name, (0, b""))
        if not generation or query.get("generation", str(generation)) != str(generation):
            return self.answer(404, {"error": {"code": 404, "message": "no such object"}})
        if not path.startswith("/download") and query.get("alt") != "media":
            return self.answer(200, self.facts(name))
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        part = content[start : int(span[2] or len(content)) + 1] if span else content
        self.server.received += len(part)
        place = f"bytes {start}-{start + len(part) - 1}/{len(content)}" if span else None
        return self.answer(206 if span else 200, part, generation, place)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        source, _, target = unquote(urlsplit(self.path).path).partition("/rewriteTo/b/bucket/o/")
        if target:
            content = self.server.objects[source.partition("/b/bucket/o/")[2]][1]
            self.server.put(target, content)
            return self.answer(200, {"done": True, "resource": self.facts(target)})
        query = parse_qs(urlsplit(self.path).query)
        if query.get("uploadType") == ["media"]:  # TensorStore's way
            self.server.put(query["name"][0], body)
            self.server.sent += len(body)
            return self.answer(200, self.facts(query["name"][0]))
        _, facts, content, _ = body.split(b"--==0==", 3)
        name = json.loads(facts.split(b"\n\n", 1)[1])["name"]
        self.server.put(name, content.split(b"\n\n", 1)[1][:-1])
        self.server.sent += len(body)
        return self.answer(200, self.facts(name))

    def do_DELETE(self) -> None:
        found = self.server.objects.pop(unquote(urlsplit(self.path).path).partition("/b/bucket/o/")[2], None)
        self.answer(204 if found else 404, b"")

    def facts(self, name: str) -> dict[str, str]:
        generation, content = self.server.objects[name]
        updated = "2026-01-02T03:04:05.678Z"
        told = {"bucket": "bucket", "name": name, "size": str(len(content))}
        return {**told, "generation": str(generation), "updated": updated}

    def listing(self, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names = [n for n in sorted(self.server.objects) if n.startswith(prefix) and first <= n < end]
        ends = {name: name.find(delimiter, len(prefix)) if delimiter else -1 for name in names}
        prefixes = sorted({name[: end + 1] for name, end in ends.items() if end >= 0})
        return {"items": [self.facts(name) for name, end in ends.items() if end < 0], "prefixes": prefixes}

    def answer(self, status: int, body: object, generation: int = 0, span: str | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if generation:
            self.send_header("x-goog-generation", str(generation))
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def google(monkeypatch) -> Iterator[GoogleStore]:
    """A server with one bucket, `gs://bucket`."""
    # Its driver would otherwise ask Google itself, past this server, what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="the driver is not installed: pip install 'm3jax[gcs]'")
    with GoogleStore() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "loopback")
        file_system.cache_clear()
        yield server
        server.shutdown()
    file_system.cache_clear()
