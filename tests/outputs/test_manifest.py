"""A manifest tells all of an output: what is added, edited or damaged is seen, of old manifests as far as they tell."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.directories import write

import m3jax
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.outputs import manifest

ONE = {"model.layers.0.w": np.float32([1, 2]), "model.layers.1.w": np.float16([3])}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    models = [str(write(tmp_path / name, ONE)) for name in ("a", "b")]
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    asked = {"merge_method": "linear", "models": models, "mixup": {"alpha": 0.5}}
    return m3jax.merge_checkpoint(asked, tmp_path / "out").directory


def edit(out: Path, change: Callable[[dict[str, Any]], object], seal: bool = False) -> None:
    record = json.loads((out / "m3jax.json").read_text())
    change(record)
    record = manifest.completed(record, record["output"]["files"]) if seal else record
    (out / "m3jax.json").write_text(manifest.to_json(record))


def aged(record: dict[str, Any]) -> None:
    """What a manifest lacked before it told of all files."""
    del record["schema"], record["findings"]
    del record["manifest_digest"], record["output"]["weight_files"], record["output"]["editable"]


# --- Files -------------------------------------------------------------------------------------------------------


def test_an_output_is_as_recorded(out: Path) -> None:
    found = m3jax.verify(out)
    assert found.differences == found.notes == ()
    assert manifest.read(out)["output"]["weight_files"].keys() == {"model.safetensors"}


def test_what_is_added_is_seen(out: Path) -> None:
    added = ("chat_template.jinja", "adapter_config.json", "pytorch_model.bin", "modeling_x.py", "sub/deep/x.py")
    (out / "sub" / "deep").mkdir(parents=True)
    for name in added:
        (out / name).write_text("x")
    (out / "link.safetensors").symlink_to("/etc/passwd")
    (out / "loop").symlink_to(out)
    (out / ".git").mkdir()
    found = m3jax.verify(out)
    assert found.differences == tuple(
        f"{n}: is not in the manifest" for n in sorted([*added, "link.safetensors", "loop"])
    )
    assert found.notes == (".git: is none of the model's, and not looked into",)


def test_a_signature_is_named_and_what_is_called_otherwise_is_not_one(out: Path) -> None:
    (out / "model.sig").write_text("{}")
    (out / "other.sig").write_text("{}")
    found = m3jax.verify(out)
    assert found.differences == ("other.sig: is not in the manifest",)
    assert found.notes == ("model.sig: is a signature, and not checked here: model_signing verify does it",)


def test_what_people_edit_is_named_and_not_held_against_them(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "README.md").write_text("Our best model.")
    assert main(["verify", str(out), "-q"]) == 0
    assert main(["verify", str(out)]) == 0
    assert "note: README.md: has changed, as people may edit it\n" in capsys.readouterr().out
    (out / "README.md").unlink()
    assert m3jax.verify(out).notes == ("README.md: is missing, as people may edit it",)
    (out / "tokenizer.json").unlink()
    assert m3jax.verify(out).differences == ("tokenizer.json: is missing",)
    (out / "README.md").mkdir()
    (out / "README.md" / "modeling.py").write_text("")
    assert "README.md: is not a regular file" in m3jax.verify(out).differences


def test_the_metadata_of_a_weight_file_is_seen(out: Path) -> None:
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", {"format": "pt", "by": "me"})
    (said,) = m3jax.verify(out).differences
    assert said.startswith("model.safetensors: its header is not the one that was written")


def test_shards_have_headers_of_their_own(tmp_path: Path, out: Path) -> None:
    sharded = m3jax.replay(out, tmp_path / "sharded", max_shard_size=8)
    assert len(sharded.manifest["output"]["weight_files"]) == 2
    assert m3jax.verify(sharded.directory) == m3jax.verify(out)._replace(directory=sharded.directory, files=4)


# --- The manifest itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(seed=1),
        lambda record: record["recipe"].update(name="other"),
        lambda record: record["versions"].update(jax="0.0"),
        lambda record: record["inputs"][0].update(digest="0" * 64),
        lambda record: record["weights"]["model"]["decimal"].reverse(),
        lambda record: record["output"]["files"].pop("tokenizer.json"),
    ],
)
def test_edits_of_the_manifest_are_seen(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(out, change)
    assert "m3jax.json: was changed after it was written" in m3jax.verify(out).differences
    with pytest.raises(M3Error, match=r"m3jax\.json: was changed after it was written: restore the file"):
        m3jax.replay(out, out.with_name("again"))


def test_no_flipped_bit_goes_unnoticed(out: Path) -> None:
    whole = (out / "m3jax.json").read_bytes()
    said = json.loads(whole)
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (out / "m3jax.json").write_bytes(damaged)
        try:
            differences = m3jax.verify(out).differences
        except M3Error:
            continue
        assert differences or json.loads(damaged) == said, (bit, damaged[bit // 8 - 20 : bit // 8 + 20])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record["output"]["files"].update({"/proc/self/environ": "0"}), "outside the model"),
        (lambda record: record["output"]["files"].update({"../x": "0"}), "outside the model"),
        (lambda record: record["output"]["files"].update({"a" * 5000: "0"}), "outside the model"),
        (lambda record: record["output"]["weight_files"].update({"a\0": "0"}), "outside the model"),
        (lambda record: record["output"].update(editable=["model.safetensors"]), "lets files be edited"),
        (lambda record: record["output"].update(max_shard_size=1e999), "infinity"),
        (lambda record: record["weights"]["model"].update(hex=["0x1p99999"]), "too large"),
        (lambda record: record.pop("inputs"), "'inputs' is missing"),
        (lambda record: record["inputs"].append(3), "not a manifest"),
    ],
)
def test_odd_manifests_are_refused(out: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    edit(out, change, seal=True)
    for work in (m3jax.verify, lambda place: m3jax.replay(place, place.with_name("again"))):
        with pytest.raises(M3Error, match=said):
            work(out)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, '{"bits": "\\ud800"}', '{"bits": 1, "bits": 1}', "\xff", "9" * 10**5]
)
def test_texts_that_are_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "m3jax.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(M3Error, match="is not a manifest of m3jax"):
        m3jax.verify(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2


def test_old_manifests_are_checked_as_far_as_they_tell(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(out, aged)
    (out / "added.py").write_text("")
    found = m3jax.verify(out)
    assert found.differences == ()
    assert len(found.notes) == 2
    assert "no digest of it" in found.notes[0]
    assert "added ones and metadata are not seen" in found.notes[1]
    assert main(["verify", str(out)]) == 0
    assert "note: m3jax.json: is of a version" in capsys.readouterr().out
    assert m3jax.replay(out, out.with_name("again")).digest == found.digest


# --- Replays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_a_replay_sees_the_files_beside_its_inputs(out: Path, old: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if old:
        edit(out, aged)
    (out.with_name("a") / "tokenizer.json").write_text('{"other": 1}')
    (out.with_name("a") / "chat_template.jinja").write_text("{{ messages }}")
    again = out.with_name("again")
    assert main(["replay", str(out), str(again)]) == 2
    said = capsys.readouterr().err
    assert "chat_template.jinja, tokenizer.json would not be as then: " in said
    assert str(out.with_name("a") / "chat_template.jinja") in said
    assert not again.exists()
    assert main(["replay", str(out), str(again), "--allow-other-files"]) == 0
    assert "note: chat_template.jinja, tokenizer.json would not be as then" in capsys.readouterr().err
    assert m3jax.verify(again).digest == m3jax.verify(out).digest
