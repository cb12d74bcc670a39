"""From a model and its base to an adapter: near the model where the rank suffices, and honest where it does not."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import factors, write_adapter
from support.directories import write

import m3jax
from m3jax import M3Error, extract_lora
from m3jax.cli.commands import main

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "vocab_size": 48,
    "tie_word_embeddings": False,
}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
NORM, BIAS = "model.layers.0.input_layernorm", f"{UP}.bias"
WHOLE = ("model.embed_tokens.weight", f"{NORM}.weight")


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {f"{UP}.weight": (48, 40), f"{DOWN}.weight": (48, 40), f"{NORM}.weight": (40,), BIAS: (48,)}
    shapes |= {"model.embed_tokens.weight": (48, 40), "lm_head.weight": (48, 40)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def place(tmp_path):
    base, other = weights(0), weights(1)
    write(tmp_path / "base", base, CONFIG)
    write_adapter(tmp_path / "lora", factors({UP: (48, 40), "lm_head": (48, 40)}, 2, 3))
    tuned = m3jax.load(f"{tmp_path}/base+{tmp_path}/lora", flat=True)
    write(
        tmp_path / "tuned", {n: np.array(v) for n, v in tuned.items()} | {n: other[n] for n in (*WHOLE, BIAS)}, CONFIG
    )
    return tmp_path


def test_what_has_the_rank_comes_back(place):
    found = extract_lora(place / "tuned", place / "base", place / "out", 2)
    assert (found.modules, found.saved) == (2, 2)
    assert found.share > 1 - 1e-6
    (note,) = found.notes
    assert note.startswith(f"{BIAS}: differ too")
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["task_type"]) == (["lm_head", UP], "CAUSAL_LM")
    assert config["modules_to_save"] == ["model.embed_tokens", NORM]
    again = m3jax.load(f"{place}/base+{place}/out", flat=True)
    tuned = load_file(place / "tuned" / "model.safetensors")
    for name in tuned.keys() - {BIAS}:
        np.testing.assert_allclose(again[name], tuned[name], atol=2e-6)
    assert (again[BIAS] == weights(0)[BIAS]).all()
    for name in WHOLE:
        assert np.asarray(again[name]).tobytes() == tuned[name].tobytes()


def test_less_than_the_rank_is_the_best_and_said(place, capsys):
    out = str(place / "out")
    asked = ["extract-lora", str(place / "tuned"), out, "--base", str(place / "base"), "--rank", "1"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    base, tuned = (load_file(place / name / "model.safetensors") for name in ("base", "tuned"))
    values = [np.linalg.svd(tuned[f"{n}.weight"] - base[f"{n}.weight"], compute_uv=False) for n in (UP, "lm_head")]
    assert told["share"] == pytest.approx(sum(v[0] ** 2 for v in values) / sum((v**2).sum() for v in values), rel=1e-4)
    again = m3jax.load(f"{place}/base+{out}", flat=True)
    gone = np.linalg.norm(np.asarray(again[f"{UP}.weight"]) - tuned[f"{UP}.weight"])
    assert gone == pytest.approx(np.linalg.norm(values[0][1:]), rel=1e-3)
    assert main([*asked, "--quiet"]) == 2  # it is there
    assert main([*asked, "--overwrite"]) == 0
    assert "extracted 2 weights as factors that hold" in capsys.readouterr().out
    assert main(["inspect", out]) == 0


def test_a_rank_beyond_the_sides_is_written_as_such(place):
    extract_lora(place / "tuned", place / "base", place / "out", 64)
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^lm_head": 40, "^" + UP.replace(".", r"\."): 40}
    again, tuned = (m3jax.load(name, flat=True) for name in (f"{place}/base+{place}/out", place / "tuned"))
    np.testing.assert_allclose(again["lm_head.weight"], tuned["lm_head.weight"], atol=2e-6)


def test_what_cannot_be_extracted_is_refused(place):
    base = weights(0)
    write(place / "short", {name: value for name, value in base.items() if name != BIAS}, CONFIG)
    write(place / "wide", base | {BIAS: np.zeros(49, np.float32)}, CONFIG)
    write(place / "turned", base, CONFIG | {"model_type": "gpt2"})
    write(place / "odd", base | {BIAS: np.full(48, np.nan, np.float32)}, CONFIG)
    for tuned, plain, said in (
        ("base", "base", "there is nothing to extract"),
        ("tuned", "short", "has a tensor .* that .* lacks"),
        ("tuned", "wide", "cannot change shapes"),
        ("tuned", "turned", r"is gpt2, whose weights lie as \[in, out\]"),
        ("odd", "base", "holds NaN"),
        ("lora", "base", "is an adapter and no model"),
    ):
        with pytest.raises(M3Error, match=said):
            extract_lora(place / tuned, place / plain, place / "out", 2)
    for out, rank, said in (("out", 0, "at least 1"), ("base", 2, "exists already"), ("tuned/x/y", 2, "parent")):
        with pytest.raises(M3Error, match=said):
            extract_lora(place / "tuned", place / "base", place / out, rank)


def test_a_tied_pair_is_one_tensor_whatever_is_stored(place):
    tied = CONFIG | {"tie_word_embeddings": True}
    for name, seed in (("tied-base", 0), ("tied-tuned", 1)):
        tensors = weights(seed)
        write(place / name, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tied)
    found = extract_lora(place / "tied-tuned", place / "tied-base", place / "out", 40)
    assert found.modules == 2
    assert any(
        "lm_head.weight, model.embed_tokens.weight" in note and "a tied embedding" in note for note in found.notes
    )
    again = m3jax.load(f"{place}/tied-base+{place}/out", flat=True)
    assert (again["lm_head.weight"] == weights(0)["model.embed_tokens.weight"]).all()
    np.testing.assert_allclose(again[f"{UP}.weight"], weights(1)[f"{UP}.weight"], atol=2e-5)


@pytest.mark.parametrize("name", ["base/config.json", "tuned/model.safetensors"])
def test_a_model_that_changes_meanwhile_is_refused(place, name):
    file = place / name

    def change(progress):
        if progress.done == progress.total:
            file.write_bytes(file.read_bytes().replace(b'"vocab_size": 48', b'"vocab_size": 49') + b" ")

    with pytest.raises(M3Error, match=f"out: .*{name.split('/')[0]} changed while it was being read: extract again"):
        extract_lora(place / "tuned", place / "base", place / "out", 2, progress=change)
    assert not [path for path in place.iterdir() if path.name.startswith("out")]
