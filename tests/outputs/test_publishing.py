"""What is sent to the hub, here a stand-in: of an output that is as recorded, what its manifest lists."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import m3jax
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.outputs.publishing import PushResult


class Hub(ThreadingHTTPServer):
    """Keeps what it is asked, and the files of commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[tuple[str, dict]] = []
        self.files: dict[str, bytes] = {}
        self.private, self.stays_public, self.refuses = False, False, False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *told: object) -> None:
        pass

    def _answer(self, told: dict, status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer({"id": "org/name", "private": self.server.private, "siblings": []})

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        told = [json.loads(line) for line in lines]
        self.server.asked.append((self.path, told[0]))
        if self.server.refuses and "/api/models/" in self.path:
            self._answer({"error": "no"}, 403)
        elif self.path.endswith("/repos/create"):
            asks = told[0].get("private") or told[0].get("visibility") == "private"  # as versions of the client say it
            self.server.private |= bool(asks) and not self.server.stays_public
            self._answer({"url": f"{self.server.address}/org/name"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in told[0]["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            files = [entry["value"] for entry in told if entry["key"] == "file"]
            self.server.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._answer({"commitUrl": f"{self.server.address}/org/name/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        Path(name).mkdir()
        tensor = np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)
        save_file({"model.layers.0.weight": tensor}, f"{name}/model.safetensors")
        Path(name, "config.json").write_text('{"model_type": "llama"}')
    m3jax.merge_checkpoint({"merge_method": "linear", "models": ["a", "b"]}, "out")
    return tmp_path / "out"


def push(out: Path, hub: Hub, **how: bool) -> PushResult:
    return m3jax.push(out, "org/name", endpoint=hub.address, token="hf_none", **how)


def test_what_the_manifest_lists_is_sent_and_nothing_else(out: Path, hub: Hub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (out / ".git").mkdir()
    (out / ".git" / "secret").write_text("mine")  # which verify notes and does not hold against the output
    (out / "README.md").write_text("# Edited\n")
    (out / "model.sig").write_text("{}")
    told = push(out, hub, dry_run=True)
    assert told.url is None
    assert hub.asked == []
    listed = ["README.md", "config.json", "m3jax.json", "model.safetensors", "model.sig"]
    assert [name for name, _ in told.files] == listed
    sent = push(out, hub)
    assert sent.url == f"{hub.address}/org/name/commit/1"
    assert hub.files == {name: (out / name).read_bytes() for name in listed}
    assert dict(sent.files) == {name: len(content) for name, content in hub.files.items()}
    assert not hub.private


def test_what_must_not_be_sent(out: Path, hub: Hub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.stays_public = True  # as one that is there already
    with pytest.raises(M3Error, match="is there and public: make it private on its page"):
        push(out, hub, private=True)
    assert hub.files == {}
    hub.stays_public = False
    assert push(out, hub, private=True).private
    assert hub.private
    hub.files.clear()
    hub.refuses = True
    with pytest.raises(M3Error, match="does not let you write there: `hf auth login`"):
        push(out, hub)
    hub.refuses = False
    asked = len(hub.asked)
    secret = out.parent / "secret"
    secret.write_bytes((out / "config.json").read_bytes())
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(secret)
    with pytest.raises(M3Error, match=r"config\.json: is a link"):
        push(out, hub)
    (out / "config.json").unlink()
    (out / "config.json").write_text("{}")
    with pytest.raises(M3Error, match=r"is not as recorded and is not sent \(config\.json: has changed\)"):
        push(out, hub, dry_run=True)
    for name in ("name", "org/name/part", "org/--", "../name"):
        with pytest.raises(M3Error, match="is no name of a repository"):
            m3jax.push(out, name)
    assert len(hub.asked) == asked
    assert hub.files == {}


def test_places_on_this_machine_that_the_card_names_are_noted(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "out", "org/name", "--dry-run"]) == 0
    assert "this machine" not in capsys.readouterr().err
    lines = [
        "- model: /home/me/math",
        "https://a.b/c and/or org/name",
        "`/models`, 1 / 2",
        "[x](/docs/y) </p> a/b",
        "~/m",
    ]
    (out / "README.md").write_text("\n".join(lines))
    assert main(["push", "out", "org/name", "--dry-run"]) == 0
    told = "README.md names places on this machine, which will be public: line 1 (/home/me/math), 3 (/models), 5 (~/m)"
    assert told in capsys.readouterr().err
    m3jax.convert(out.parent / "a", "a2")
    assert main(["push", "a2", "org/name", "--dry-run"]) == 0
    assert f"m3jax-conversion.json names {out.parent / 'a'}, as it records what was read" in capsys.readouterr().err


def test_the_command_lists_and_sends_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "out", "org/name", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("README.md", "config.json", "m3jax.json", "model.safetensors", "not sent"))
    m3jax.convert("out", "as-orbax", to="orbax")
    assert main(["push", "as-orbax", "org/name", "--dry-run"]) == 2
    assert "as-orbax: is orbax, which loaders of the hub do not read" in capsys.readouterr().err
