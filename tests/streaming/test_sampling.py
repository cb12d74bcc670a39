"""A sample of a merge computed again is what is stored, for every method and layout, and says so where it is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.directories import write, write_models

import m3jax
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.outputs import manifest
from m3jax.outputs.verification import Verification
from m3jax.streaming.sampling import verify_sample

SHAPES = {
    "model.layers.0.w": (8, 16),
    "model.layers.1.w": (8, 16),
    "model.layers.1.wide.weight": (700, 273),  # several chunks of 65,536 entries and a rest
    "model.one": (1,),
}
RECIPES = (
    {"merge_method": "linear", "mixup": {"alpha": 0.5}},
    {"merge_method": "ties", "parameters": {"trim_scope": "model", "sign_election": "unweighted", "density": 0.4}},
    {"merge_method": "ties", "parameters": {"density": 0.4}, "sparsify": {"method": "magnitude", "density": 0.6}},
    {"merge_method": "slerp", "parameters": {"t": 0.3}},
    {"merge_method": "task_arithmetic", "sparsify": {"method": "dare", "density": 0.5}},
)


def made(place: Path, recipe: dict[str, object]) -> Path:
    base = {} if recipe["merge_method"] in ("linear", "slerp") else {"base_model": "base"}
    return m3jax.merge_checkpoint({"models": ["expert-0", "expert-1"], **base, **recipe}, place).directory


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, shapes=SHAPES)
    return tmp_path


def sampled(out: Path, seed: int = 0, sample: int = 32) -> Verification:
    return verify_sample(out, seed=seed, sample=sample, chunk_entries=2**16)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["merge_method"])
def test_a_sample_is_what_its_inputs_give(models: Path, recipe: dict[str, object]) -> None:
    out = made(models / "out", recipe)
    for seed in range(2):
        found = sampled(out, seed)
        assert found.differences == ()
        assert found.tensors == len(load_file(out / "model.safetensors"))
        assert found.digest is None
        assert found.sample is not None
        assert f"(seed {seed})" in found.notes[-1]


def test_what_is_measured_of_the_model_is_in_the_manifest_or_measured_again(models: Path) -> None:
    out = made(models / "out", RECIPES[1])
    record = json.loads((out / "m3jax.json").read_text())
    assert [entry[:2] for entry in record["findings"]] == [["method.elected", None]]
    assert any("was taken from the manifest" in note for note in sampled(out).notes)
    for odd in (
        [7],
        ["garbage"],
        [["method.elected", None]],
        [[key, None, [["uint32", [9], [1] * 9]]] for key, *_ in record["findings"]],
    ):
        edited = manifest.completed(record | {"findings": odd}, record["output"]["files"])
        (out / "m3jax.json").write_text(manifest.to_json(edited))
        (said,) = sampled(out).differences
        assert "its findings are not what the method measures" in said
    other = record | {"findings": [["method.trim", None, []], ["method.majority", None, []]]}
    del record["schema"], record["findings"]
    for old in (other, record):
        (out / "m3jax.json").write_text(manifest.to_json(manifest.completed(old, old["output"]["files"])))
        found = sampled(out)
        assert found.differences == ()
        (said,) = (note for note in found.notes if "so this was measured again" in note)
        of_that_version = "of a version that did not tell"
        as_told = "tells 'method.majority', 'method.trim' as measured of all, and this version measures 'method.el"
        assert (as_told if old is other else of_that_version) in said


def test_what_has_changed_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made(models / "out", RECIPES[0])
    arrays = load_file(out / "model.safetensors")
    name = "model.one"
    whole = (out / "model.safetensors").read_bytes()
    arrays[name] = arrays[name] + 1
    save_file(arrays, out / "model.safetensors", {"format": "pt"})
    said = sampled(out).differences
    assert f"{name}: entries 0 to 0 are not what its inputs give: its bytes are not those that were written" in said
    (out / "model.safetensors").write_bytes(whole)
    inputs = load_file("expert-0/model.safetensors")
    inputs[name] = inputs[name] + 1
    save_file(inputs, "expert-0/model.safetensors", {"format": "pt"})
    (only,) = sampled(out).differences
    assert f"{name} is not what was merged: its bytes have changed since" in only
    assert main(["verify", "out", "--replay", "--inputs", "--sample", "1", "--seed", "3"]) == 2
    shown = capsys.readouterr().out
    assert f"expert-0: {name} has changed since it was read" in shown


def test_what_is_the_matter_with_an_input_is_not_that_it_is_not_found(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(models / "out", RECIPES[0])
    inputs = load_file("expert-0/model.safetensors")
    save_file({**inputs, "model.more": inputs["model.one"]}, "expert-0/model.safetensors", {"format": "pt"})
    assert main(["verify", "out", "--replay"]) == 2
    shown = capsys.readouterr().out
    assert "nothing could be computed again: " in shown
    assert "model.more" in shown
    assert "out: not as recorded, 1 difference in" in shown
    assert "not found" not in shown
    assert sampled(out).absent == 0
    Path("expert-0").rename("moved")
    assert sampled(out).absent == 1
    assert main(["verify", "out", "--replay"]) == 2
    assert "1 model not found, of which nothing is known" in capsys.readouterr().out


def test_a_manifest_that_contradicts_itself_is_not_believed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made(models / "out", RECIPES[2])
    record = json.loads((out / "m3jax.json").read_text())
    first, *others = record["inputs"]
    for edit, sentence in (
        ({"seed": 9}, "its seed is 9, but that of its recipe 0"),
        (
            {"inputs": [{**first, "role": "base"}, *others]},
            "it has read 'expert-0' as 'base', which its recipe",
        ),
        ({"inputs": [{**first, "name": "x"}, *others]}, "it has read 'x' as 'expert', which its recipe does not"),
        ({"inputs": [{**first, "tensors": {}}, *others]}, "it has read no tensor of 'expert-0', of which its recipe"),
        ({"inputs": others}, "it has not read 'expert-0', of which its recipe makes the output"),
        ({"inputs": []}, "it has not read 'expert-1', of which its recipe makes the output"),
    ):
        (out / "m3jax.json").write_text(manifest.to_json(manifest.sealed(record | edit)))
        for more in (["--replay"], ["--inputs"], []):
            assert main(["verify", "out", *more]) == 2
            shown = capsys.readouterr().out
            assert f"m3jax.json: {sentence}" in shown
            assert "mend " not in shown  # as a manifest like this replays nothing that can be relied on
        assert sampled(out).tensors == 0


def test_a_machine_that_computes_otherwise_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(models / "out", RECIPES[0])
    monkeypatch.setattr("m3jax.streaming.passes.Passes.again", lambda self, visit: b"otherwise")
    said = sampled(out).differences
    assert sum("so this machine computes otherwise: try m3jax doctor" in each for each in said) == 4
    assert len(said) == len(load_file(out / "model.safetensors"))


def test_other_faults_are_said_and_nothing_is_computed_from_an_edited_manifest(models: Path) -> None:
    out = made(models / "out", RECIPES[0])
    record = json.loads((out / "m3jax.json").read_text())
    (out / "m3jax.json").write_text(manifest.to_json(record | {"seed": 9}))
    found = sampled(out)
    assert found.differences == ("m3jax.json: was changed after it was written",)
    assert found.tensors == 0
    (out / "m3jax.json").write_text(manifest.to_json(record))
    Path("expert-1").rename("moved")
    assert "nothing could be computed again: 'expert-1' does not exist" in sampled(out).differences[0]
    assert verify_sample(out, sources={"expert-1": "moved"}, sample=2).tensors == 2
    with pytest.raises(M3Error, match="sample: is 0"):
        sampled(out, sample=0)


def test_blocks_that_are_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("expert-0", "expert-1", "base"):
        write(tmp_path / name, {"layers.w": rng.standard_normal((3, 4, 5)).astype(np.float32)})
    recipe = RECIPES[2] | {"anatomy": {"stacked": {"layers": 1}}}
    assert sampled(made(tmp_path / "out", recipe)).differences == ()
