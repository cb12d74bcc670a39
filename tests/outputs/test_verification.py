"""Verifying goes on past every fault, and looks at inputs and conversions too."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.directories import write

import m3jax
from m3jax.cli.commands import main
from m3jax.errors import M3Error

NAMES = [f"model.layers.{i}.w" for i in range(4)]
TENSORS = {name: np.float32([i, 1, 2]) for i, name in enumerate(NAMES)}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write(tmp_path / name, TENSORS)
    asked = {"merge_method": "linear", "models": ["a", "b"], "mixup": {"alpha": 0.5}}
    return m3jax.merge_checkpoint(asked, tmp_path / "out", max_shard_size=24).directory


def flip(file: Path, at: int = -1) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


# --- Outputs -----------------------------------------------------------------------------------------------------


def test_all_faults_are_listed_past_a_file_that_is_cut_or_missing(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(out.glob("*.safetensors"))
    flip(first)
    second.write_bytes(second.read_bytes()[:-3])
    (out / "modeling.py").write_text("")
    assert main(["verify", str(out)]) == 2
    said = capsys.readouterr().out
    assert f"{second.name}: cannot be read: " in said
    assert f"2 tensors cannot be compared without it: {NAMES[2]}, {NAMES[3]}" in said
    assert "model.layers.1.w: its bytes are not those that were written" in said
    assert "modeling.py: is not in the manifest" in said
    assert f"mend     m3jax replay {out} NEW_DIRECTORY" in said
    assert "digest" not in said
    second.unlink()
    (out / "model.safetensors.index.json").unlink()
    found = m3jax.verify(out)
    assert f"{second.name}: is missing, or not read as a file of the model" in found.differences or any(
        d.startswith(f"{second.name}: is missing") for d in found.differences
    )
    assert "model.safetensors.index.json: is missing" in found.differences
    first.unlink()
    assert m3jax.verify(out).tensors == 0


def test_an_index_that_misleads(out: Path) -> None:
    index = out / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"][NAMES[0]] = sorted(out.glob("*.safetensors"))[1].name
    index.write_text(json.dumps(told))
    found = m3jax.verify(out)
    assert "model.safetensors.index.json: has changed" in found.differences
    assert any("places tensor" in said for said in found.differences)
    assert found.tensors == len(NAMES)


# --- Inputs ------------------------------------------------------------------------------------------------------


def test_inputs_are_compared(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "out", "--inputs"]) == 0
    assert "inputs   8 tensors of them compared" in capsys.readouterr().out
    flip(out.with_name("a") / "model.safetensors")
    (said,) = m3jax.verify(out, inputs=True).differences
    assert said == f"a: {NAMES[3]} has changed since it was read: its bytes are not those of then"
    assert m3jax.verify(out).differences == ()


def test_inputs_that_have_other_dtypes_or_have_gone(out: Path) -> None:
    arrays = load_file("a/model.safetensors")
    save_file({name: array.view(np.int32) for name, array in arrays.items()}, "a/model.safetensors")
    Path("b").rename("moved")
    said = m3jax.verify(out, inputs=True).differences
    assert said[0] == "a: has the bytes of then, but other dtypes or shapes"
    assert said[1].endswith("; if it has moved, --input b=HERE says where it is")
    assert m3jax.verify(out, inputs=True, sources={"b": "moved"}).differences == said[:1]
    (_, wrong) = m3jax.verify(out, inputs=True, sources={"b": "nowhere"}).differences
    assert wrong == (
        "'nowhere' does not exist here and is no hub id either: give a path or 'org/name'; this is where "
        "--input b=nowhere says that b is: correct it"
    )
    with pytest.raises(M3Error, match="c: is not a model of this manifest, which records a, b"):
        m3jax.verify(out, sources={"c": "moved"})


def test_options_that_need_others(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "out", "--input", "a=b"]) == 2
    assert "--input is for --inputs and --replay" in capsys.readouterr().err
    assert main(["verify", "out", "--sample", "3"]) == 2
    assert "--sample and --seed are for --replay" in capsys.readouterr().err


def test_a_replay_says_whose_word_for_a_place_was_wrong(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "out", "again", "--input", "a=nowhere"]) == 2
    assert "this is where --input a=nowhere says that a is: correct it" in capsys.readouterr().err


# --- Conversions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "msgpack", "orbax"])
def test_conversions_are_verified(out: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = m3jax.convert("a", "converted", to=to)
    assert main(["verify", "converted", "--inputs"]) == 0
    assert f"digest   {made.digest}" in capsys.readouterr().out
    weights = next(f for f in sorted(made.directory.rglob("*")) if f.is_file() and f.suffix != ".json")
    flip(weights)
    flip(Path("a/model.safetensors"))
    Path("converted/added.py").write_text("")
    Path("converted/config.json").unlink()
    assert main(["verify", "converted", "--inputs"]) == 2
    said = capsys.readouterr().out
    assert f"{weights.relative_to(made.directory)}: has changed" in said
    assert "added.py: is not in the manifest" in said
    assert "config.json: is missing" in said
    assert f"a: {NAMES[3]} has changed since it was read" in said
    assert f"mend     m3jax convert a NEW_DIRECTORY --to {to} makes it again" in said
    assert main(["verify", "converted", "--replay"]) == 2
    assert "which computes nothing" in capsys.readouterr().err
    Path("converted/added.py").unlink()
    assert m3jax.convert("a", "converted", to=to, overwrite=True).directory == Path("converted")


def test_what_a_conversion_tells_is_not_edited(out: Path) -> None:
    m3jax.convert("a", "converted", to="msgpack")
    mark = Path("converted/m3jax-conversion.json")
    told = json.loads(mark.read_text())
    for odd, words in (
        (told | {"format": "orbax"}, "was changed after it was written"),
        (told | {"schema": 99}, "is of version 99"),
        ({"m3jax": "0.1.0", "format": "msgpack", "files": []}, "recorded no digests"),
        ([1], "not an object"),
        ({"schema": 2}, "changed after"),
    ):
        mark.write_text(json.dumps(odd))
        with pytest.raises(M3Error, match=words):
            m3jax.verify("converted")


def test_models_that_are_gone_are_counted_apart(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b").rename("moved")
    assert main(["verify", "out", "--inputs"]) == 2
    said = capsys.readouterr().out
    assert "out: as recorded as far as it could be compared" in said
    assert "1 model not found, of which nothing is known" in said
    assert m3jax.verify(out, inputs=True).absent == 1
    assert main(["verify", "out", "--replay"]) == 2
    said = capsys.readouterr().out
    assert "nothing could be computed again" in said
    assert "out: as recorded as far as it could be compared" in said
    assert repr(m3jax.verify(out)).endswith("as recorded)")
