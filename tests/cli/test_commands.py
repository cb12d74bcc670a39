"""The commands: what they pass on, what they print and how they end."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from m3jax.checkpoints import ShardWriter, TensorInfo
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.outputs.verification import Verification
from m3jax.progress import Progress

Capture = pytest.CaptureFixture[str]
Stub = Callable[..., None]


def save(directory: Path, seed: int) -> str:
    """Writes a tiny model directory."""
    directory.mkdir()
    values = np.random.default_rng(seed).standard_normal((6, 4)).astype(np.float32)
    tensors = [TensorInfo("model.layers.0.w", (6, 4), "F32"), TensorInfo("model.layers.1.w", (6, 4), "F32")]
    with ShardWriter(directory / "model.safetensors", tensors) as shard:
        for layer, info in enumerate(tensors):
            shard.write(info.name, 0, values + np.float32(layer))
        shard.finish()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return str(directory)


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    return save(tmp_path / "a", 1), save(tmp_path / "b", 2)


@pytest.fixture
def recipe(tmp_path: Path, models: tuple[str, str]) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"merge_method": "linear", "models": models, "mixup": {"alpha": 0.5}, "seed": 3}))
    return str(path)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Puts a stand-in for one of m3jax's modules, so that these tests need none of the work behind it."""

    def put(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def result(**changes: Any) -> Any:
    """What a merge returns."""
    fields: dict[str, Any] = {
        "directory": Path("out"),
        "digest": "ab" * 32,
        "manifest": {"seed": 3, "weights": {"model": {"decimal": [0.25, 0.75], "hex": ["0x1p-2", "0x1.8p-1"]}}},
        "seconds": 2.0,
        "bytes_read": 2000,
        "bytes_written": 1000,
        "resumed_shards": 0,
        "process_reads": (2000,),
        "notes": ("int8_mask is ignored.",),
    }
    fields.update(changes)
    return namedtuple("MergeResult", fields)(**fields)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs m3jax in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "m3jax", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


# --- Starting --------------------------------------------------------------------------------------------

_SLOW = ("jax", "rich", "transformers", "scipy", "flax")


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], (*_SLOW, "numpy")),
        (["--version"], (*_SLOW, "numpy")),
        (["merge", "--help"], (*_SLOW, "numpy")),
        (["merge"], (*_SLOW, "numpy")),
        (["inspect", "MODEL"], _SLOW),
        (["methods"], (*_SLOW, "numpy", "yaml")),
        (["methods", "ties", "--json"], (*_SLOW, "numpy")),
        (["methods", "della"], (*_SLOW, "numpy")),
        (["inspect", "MODEL", "MODEL", "--json"], ("jax", "transformers", "scipy", "flax")),
    ],
)
def test_commands_start_light(models: tuple[str, str], arguments: list[str], unwanted: tuple[str, ...]) -> None:
    given = [models[0] if word == "MODEL" else word for word in arguments]
    program = (
        f"import sys; from m3jax.cli.commands import main; main({given!r}); print([*sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1]
    assert [name for name in unwanted if f"'{name}'" in loaded] == []


def test_blas_is_told_how_long_its_threads_look_for_work_before_it_is_loaded() -> None:
    told = "sys.modules.get('numpy'), os.environ['OPENBLAS_THREAD_TIMEOUT']"
    program = f"import os, sys; import m3jax.__main__; print({told})"
    for given, expected in (({}, "20"), ({"OPENBLAS_THREAD_TIMEOUT": "7"}, "7")):
        environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_THREAD_TIMEOUT"} | given
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (f"None {expected}\n", "")


def test_version(capsys: Capture) -> None:
    from m3jax import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"m3jax {__version__}\n", "")


def test_help_names_every_command(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("merge", "replay", "verify", "inspect", "methods", "demo"))
    assert max(map(len, shown.splitlines())) <= 80


def test_no_command_shows_help(capsys: Capture) -> None:
    assert main([]) == 2
    assert "Usage: m3jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["merge"], "m3jax: Missing argument 'RECIPE'; see `m3jax merge --help`.\n"),
        (["mrge"], "m3jax: No such command 'mrge'"),
        (["merge", "a", "b", "--sede", "1"], "m3jax: No such option: --sede"),
        (["merge", "a", "b", "--seed", "x"], "m3jax: Invalid value for '--seed'"),
        (["inspect", "a", "b", "c"], "m3jax: Got unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_line(capsys: Capture, arguments: list[str], sentence: str) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1


# --- merge and replay ------------------------------------------------------------------------------------


def test_merge_passes_everything_on(stub: Stub, recipe: str, capsys: Capture) -> None:
    calls: list[Any] = []

    def merge_checkpoint(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return result()

    stub("m3jax.streaming.merging", merge_checkpoint=merge_checkpoint)
    options = ["--seed", "7", "--set", "mixup.alpha=0.25", "--set", "dtype=bfloat16", "--max-shard-size", "1MB"]
    flags = ["--overwrite", "--allow-nonfinite", "--chunk-entries", "64", "--quiet"]
    flags += ["--format", "orbax", "--step", "40", "--lanes", "3"]
    assert main(["merge", recipe, "out", *options, *flags]) == 0
    ((loaded, out), keywords) = calls[0]
    assert (loaded.seed, loaded.mixup.alpha, loaded.dtype, out) == (7, 0.25, "bfloat16", "out")
    assert keywords == {
        "overwrite": True,
        "max_shard_size": "1MB",
        "allow_nonfinite": True,
        "chunk_entries": 64,
        "format": "orbax",
        "step": 40,
        "mesh": None,
        "lanes": 3,
        "distributed": False,
        "progress": None,
    }
    assert capsys.readouterr() == ("", "")


HINTS = [
    "next: m3jax inspect out; m3jax evaluate out --task TASK --data FILE",
    "      m3jax push out ORG/NAME --dry-run   (what would be sent to the hub)",
]


def test_merge_defaults(stub: Stub, recipe: str, capsys: Capture) -> None:
    seen: dict[str, Any] = {}

    def merge_checkpoint(*_: Any, **keywords: Any) -> Any:
        seen.update(keywords)
        keywords["progress"](Progress("merging", 1, 1))
        return result()

    stub("m3jax.streaming.merging", merge_checkpoint=merge_checkpoint)
    assert main(["merge", recipe, "out"]) == 0
    assert (seen["overwrite"], seen["max_shard_size"], seen["allow_nonfinite"], seen["chunk_entries"]) == (
        False,
        "5GB",
        False,
        None,
    )
    out, err = capsys.readouterr()
    assert err.splitlines() == ["note: int8_mask is ignored.", *HINTS]
    assert out.splitlines()[0] == "merged   out"
    assert out.splitlines()[-1] == "replay   m3jax replay out NEW_DIRECTORY"


def test_notes_are_said_once_and_first(stub: Stub, tmp_path: Path, recipe: str, capsys: Capture) -> None:
    def merge_checkpoint(loaded: Any, *_: Any, **__: Any) -> Any:
        assert "int8_mask" in capsys.readouterr().err
        return result(notes=(*loaded.notes(), "another note."))

    stub("m3jax.streaming.merging", merge_checkpoint=merge_checkpoint)
    assert main(["merge", recipe, "out", "--set", "parameters.int8_mask=true"]) == 0
    assert capsys.readouterr().err.splitlines() == ["note: another note.", *HINTS]


def test_merge_as_json(stub: Stub, recipe: str, capsys: Capture) -> None:
    stub("m3jax.streaming.merging", merge_checkpoint=lambda *_, **__: result())
    assert main(["merge", recipe, "out", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "directory": "out",
        "digest": "ab" * 32,
        "manifest": str(Path("out/m3jax.json")),
        "seconds": 2.0,
        "bytes_read": 2000,
        "bytes_written": 1000,
        "resumed_shards": 0,
        "process_reads": [2000],
        "notes": ["int8_mask is ignored."],
        "seed": 3,
        "weights": {"model": {"decimal": [0.25, 0.75], "hex": ["0x1p-2", "0x1.8p-1"]}},
    }
    assert err == "note: int8_mask is ignored.\n"


def test_quiet_leaves_json(stub: Stub, recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    stub("m3jax.streaming.merging", merge_checkpoint=lambda *_, **__: result())
    assert main(["merge", recipe, "out", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["seed"] == 3
    assert err == ""
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_replay_passes_everything_on(stub: Stub, capsys: Capture) -> None:
    calls: list[Any] = []

    def replay(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return result()

    stub("m3jax.streaming.merging", replay=replay)
    inputs = ["--input", "org/a=/models/a=1", "--input", "org/b=/b"]
    assert main(["replay", "m3jax.json", "again", *inputs, "--max-shard-size", "1GB", "--overwrite"]) == 0
    (args, keywords) = calls[0]
    assert args == ("m3jax.json", "again")
    assert keywords["sources"] == {"org/a": "/models/a=1", "org/b": "/b"}
    assert (keywords["max_shard_size"], keywords["overwrite"]) == ("1GB", True)
    assert main(["replay", "m3jax.json", "again"]) == 0
    assert (calls[1][1]["sources"], calls[1][1]["max_shard_size"]) == ({}, None)
    assert "digest" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["here", "=here", "recorded="])
def test_bad_inputs_of_a_replay(stub: Stub, capsys: Capture, text: str) -> None:
    stub("m3jax.streaming.merging", replay=None)
    assert main(["replay", "m3jax.json", "again", "--input", text]) == 2
    assert "write RECORDED=HERE" in capsys.readouterr().err


# --- verify, inspect, demo -------------------------------------------------------------------------------


def test_verify(stub: Stub, capsys: Capture) -> None:
    stub("m3jax.outputs.verification", verify=lambda directory, **how: Verification(directory, "ab", 3, 2, ()))
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().out.startswith("out: as recorded")
    assert main(["verify", "out", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_verify_with_differences(stub: Stub, capsys: Capture) -> None:
    stub(
        "m3jax.outputs.verification",
        verify=lambda directory, **how: Verification(directory, "ab", 3, 2, ("w differs",)),
    )
    assert main(["verify", "out", "--quiet"]) == 2
    assert capsys.readouterr().out.startswith("w differs\n")
    assert main(["verify", "out", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["as_recorded"], found["differences"]) == (False, ["w differs"])


def test_inspect(models: tuple[str, str], capsys: Capture) -> None:
    assert main(["inspect", models[0]]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.1.w" in out
    assert err == ""
    assert main(["inspect", models[0], "--json", "--filter", r"layers\.0"]) == 0
    assert [tensor["name"] for tensor in json.loads(capsys.readouterr().out)["tensors"]] == ["model.layers.0.w"]


def test_inspect_two(models: tuple[str, str], capsys: Capture) -> None:
    assert main(["inspect", models[0], models[1]]) == 0
    assert "different: 48 of the 48 entries compared" in capsys.readouterr().out
    assert main(["inspect", models[0], models[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True


def test_inspect_something_else(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"m3jax: {tmp_path} holds no weights")


def test_demo(stub: Stub, capsys: Capture) -> None:
    def run(directory: Path, echo: Callable[[str], None], seed: int, stage: Callable[[], Any]) -> dict[str, Any]:
        echo("hello")
        return {"directory": str(directory), "seed": seed}

    stub("m3jax.laboratory.demo", main=run)
    assert main(["demo"]) == 0
    assert capsys.readouterr() == ("hello\n", "")
    assert main(["demo", "here", "--seed", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"directory": "here", "seed": 3}, "hello\n")
    assert main(["demo", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


# --- Endings ---------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (M3Error("out exists."), 2, "m3jax: out exists.\n"),
        (ValueError("odd\n\nthing"), 1, "m3jax: unexpected ValueError: odd thing; run with --debug.\n"),
        (AssertionError(), 1, "m3jax: unexpected AssertionError; run with --debug.\n"),
        (OSError(5, "Gone", "a/b"), 2, "m3jax: a/b: Gone: check the path, its mode and the disk.\n"),
        (MemoryError(), 1, "m3jax: out of memory; run with --debug to see where.\n"),
        (
            KeyboardInterrupt(),
            130,
            "m3jax: interrupted: nothing is kept.\n",
        ),
    ],
)
def test_errors_are_one_line(
    stub: Stub, recipe: str, capsys: Capture, error: BaseException, code: int, sentence: str
) -> None:
    stub("m3jax.streaming.merging", merge_checkpoint=failing(error))
    assert main(["merge", recipe, "out"]) == code
    assert capsys.readouterr() == ("", sentence)


def test_tracebacks_cannot_steer_the_terminal(stub: Stub, recipe: str, capsys: Capture) -> None:
    stub("m3jax.streaming.merging", merge_checkpoint=failing(M3Error("a\x1b]0;pwned\x07 is odd.")))
    assert main(["merge", recipe, "out", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "pwned" in said
    assert not {"\x1b", "\x07"} & set(said)


@pytest.mark.parametrize("debug", ["before", "after", "environment"])
def test_debug_shows_the_traceback(
    stub: Stub, recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, debug: str
) -> None:
    stub("m3jax.streaming.merging", merge_checkpoint=failing(M3Error("out exists.")))
    monkeypatch.setenv("M3JAX_DEBUG", "1" if debug == "environment" else "0")
    before = ["--debug"] if debug == "before" else []
    after = ["--debug"] if debug == "after" else []
    assert main([*before, "merge", recipe, "out", *after]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("m3jax: out exists.\n")


def test_interrupting_inspect_promises_nothing(
    models: tuple[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3jax.checkpoints.inspection.look_at", failing(KeyboardInterrupt()))
    assert main(["inspect", models[0]]) == 130
    assert capsys.readouterr() == ("", "m3jax: interrupted.\n")


def test_interrupt_from_the_keyboard(recipe: str) -> None:
    program = f"""
import sys, time, types
import m3jax.cli.commands
stub = types.ModuleType("m3jax.streaming.merging")
def merge_checkpoint(*_, **__):
    print("ready", flush=True)
    time.sleep(300)
stub.merge_checkpoint = merge_checkpoint
sys.modules["m3jax.streaming.merging"] = stub
sys.exit(m3jax.cli.commands.main(["merge", {recipe!r}, "out"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "m3jax: interrupted: nothing is kept.\n"


def test_interrupt_while_modules_are_loaded() -> None:
    program = """
import sys
import types
class Interrupting:
    def find_spec(self, name, *_):
        if name == "m3jax.cli.merges":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
import m3jax.__main__
m3jax.__main__.run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "m3jax: interrupted.\n")


@pytest.mark.parametrize("command", [["--help"], ["inspect", "MODEL"], ["inspect", "MODEL", "--json"]])
def test_closed_pipe_is_no_error(models: tuple[str, str], command: list[str]) -> None:
    given = [models[0] if word == "MODEL" else word for word in command]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "m3jax", *given],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_survives_a_narrow_encoding(models: tuple[str, str]) -> None:
    done = shell("inspect", models[0], models[1], PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert "\\u2016a\\u2016" in done.stdout


# --- The whole way ---------------------------------------------------------------------------------------


def test_merge_verify_replay(recipe: str, tmp_path: Path, capsys: Capture) -> None:
    out, again = str(tmp_path / "out"), str(tmp_path / "again")
    assert main(["merge", recipe, out, "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert (merged["directory"], merged["seed"]) == (out, 3)
    assert merged["weights"]["model"]["decimal"][0] == float.fromhex(merged["weights"]["model"]["hex"][0])

    assert main(["verify", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == merged["digest"]
    assert main(["replay", out, again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == merged["digest"]
    assert main(["inspect", out, again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True

    assert main(["merge", recipe, out]) == 2
    assert capsys.readouterr().err.startswith("m3jax: ")
    assert main(["merge", recipe, out, "--overwrite", "--seed", "4"]) == 0
    assert merged["digest"] not in capsys.readouterr().out

    Path(out, "config.json").write_text("{}")
    assert main(["verify", out]) == 2
    assert "config.json" in capsys.readouterr().out


def test_replay_with_inputs_elsewhere(recipe: str, tmp_path: Path, models: tuple[str, str], capsys: Capture) -> None:
    out, moved = str(tmp_path / "out"), tmp_path / "moved"
    assert main(["merge", recipe, out, "--quiet"]) == 0
    Path(models[0]).rename(moved)
    assert main(["replay", out, str(tmp_path / "again")]) == 2
    assert capsys.readouterr().err.startswith("m3jax: ")
    assert main(["replay", out, str(tmp_path / "again"), "--input", f"{models[0]}={moved}"]) == 0


@pytest.mark.parametrize(
    "wrong", [["--set", "seed"], ["--set", "mixup.alhpa=1"], ["--seed", "-1"], ["--max-shard-size", "x"]]
)
def test_wrong_values_are_said(recipe: str, tmp_path: Path, capsys: Capture, wrong: list[str]) -> None:
    assert main(["merge", recipe, str(tmp_path / "out"), *wrong]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("m3jax: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_standard_output_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "m3jax", "--version"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("m3jax: standard output: No space left on device: send it elsewhere")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {-8, -3, -1}),
        ({"MALLOC_ARENA_MAX": "6"}, {-3, -1}),
        ({"MALLOC_TRIM_THRESHOLD_": "1", "MALLOC_MMAP_THRESHOLD_": "1"}, {-8}),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, set()),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=on"}, {-8, -3, -1}),
    ],
)
def test_the_heap_is_as_its_variables_say(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], left: set[int]
) -> None:
    from m3jax.cli import shell

    for variable in (*shell._HEAP, "GLIBC_TUNABLES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    told: dict[int, int] = {}
    monkeypatch.setattr(shell.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=told.__setitem__))
    shell._keep_freed_memory()
    assert set(told) == left
    monkeypatch.setattr(shell.ctypes, "CDLL", lambda _: types.SimpleNamespace())
    shell._keep_freed_memory()  # which does nothing elsewhere
