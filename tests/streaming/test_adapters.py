"""Merging models that are named with an adapter: the bytes of the same merge of what convert writes of them."""

import json

import ml_dtypes
import numpy as np
import pytest
from support.adapters import factors, write_adapter
from support.directories import read, write
from support.float8 import E4M3, numbers_of, quantised

import m3jax
from m3jax import M3Error

LAYERS = [f"model.layers.{i}" for i in range(3)]
MODULES = {f"{layer}.mlp.up_proj": (300, 260) for layer in LAYERS}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


def weights(seed):
    rng = np.random.default_rng(seed)
    shapes = {f"{module}.weight": shape for module, shape in MODULES.items()} | {"model.norm.weight": (260,)}
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    write(place / "base", weights(0), CONFIG)
    for seed, name in enumerate("ab"):
        write_adapter(place / name, factors(MODULES, 2, seed))
        m3jax.convert(f"{place}/base+{place}/{name}", place / f"merged-{name}")
    return place


def with_adapters(place, **keys):
    return {"base_model": f"{place}/base", "models": [f"{place}/base+{place}/{name}" for name in "ab"], **keys}


@pytest.mark.parametrize(
    "asked",
    [
        {"merge_method": "ties", "parameters": {"density": 0.5, "trim_scope": "model"}},
        {"merge_method": "linear", "mixup": {"alpha": 0.5, "granularity": "layer"}},
    ],
)
def test_a_merge_is_that_of_the_merged_models(place, tmp_path, asked):
    found = m3jax.merge_checkpoint(with_adapters(place, **asked), tmp_path / "out", chunk_entries=2**16)
    models = [str(place / f"merged-{name}") for name in "ab"]
    plain = {**with_adapters(place, **asked), "models": models}
    assert found.digest == m3jax.merge_checkpoint(plain, tmp_path / "plain").digest
    assert found.digest == m3jax.replay(tmp_path / "out", tmp_path / "again").digest
    assert m3jax.verify(tmp_path / "out").differences == ()


def test_slices_take_layers_of_what_has_an_adapter(place, tmp_path):
    def stacked(name):
        return {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": name, "layer_range": [a, b]}]} for a, b in ((0, 2), (1, 3))],
        }

    found = m3jax.merge_checkpoint(stacked(f"{place}/base+{place}/a"), tmp_path / "out")
    assert found.digest == m3jax.merge_checkpoint(stacked(f"{place}/merged-a"), tmp_path / "plain").digest


def test_a_manifest_tells_of_both_and_a_replay_holds_them_to_it(place, tmp_path):
    for name in ("base", "a"):
        (tmp_path / name).symlink_to(place / name)
    asked = {"merge_method": "linear", "models": [f"{tmp_path}/base+{tmp_path}/a"]}
    (place / "a" / "tokenizer.json").write_text("{}")
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    assert any("tokenizer.json beside the adapter is not used" in note for note in result.notes)
    (place / "a" / "tokenizer.json").unlink()
    record = result.manifest["inputs"][0]
    assert record["name"] == asked["models"][0]
    assert record["adapter"]["name"] == f"{tmp_path}/a"
    own = {f"base_model.model.{module}.lora_{which}.weight" for module in MODULES for which in "AB"}
    assert record["tensors"].keys() == own | weights(0).keys()
    assert "\n# base+a\n" in (tmp_path / "out" / "README.md").read_text()

    moved = {record["name"]: f"{place}/base+{place}/a"}
    m3jax.replay(tmp_path / "out", tmp_path / "moved", sources=moved)
    for tensors, alpha, said in (
        (factors(MODULES, 2, 0), 5, "configuration has changed"),
        (factors(MODULES, 2, 5), 4, "lora_"),
    ):
        other = write_adapter(tmp_path / f"other-{alpha}", tensors, lora_alpha=alpha)
        moved = {record["name"]: f"{place}/base+{other}"}
        with pytest.raises(M3Error, match=said):
            m3jax.replay(tmp_path / "out", tmp_path / "wrong", sources=moved)
        assert said in m3jax.verify(tmp_path / "out", inputs=True, sources=moved).differences[0]


def test_a_bare_adapter_is_refused_with_the_spelling_that_works(place, tmp_path):
    asked = {"merge_method": "linear", "models": [f"{place}/base", f"{place}/a"]}
    with pytest.raises(M3Error, match=rf"is an adapter and no model: name it with its base, as BASE\+{place}/a"):
        m3jax.merge_checkpoint(asked, tmp_path / "out")
    with pytest.raises(M3Error, match="is an adapter and no model"):
        m3jax.convert(place / "a", tmp_path / "out")


def test_float8_weights_are_added_to_as_numbers(place, tmp_path):
    stored, numbers = {}, {}
    for name, value in weights(0).items():
        if "norm" in name:
            stored[name] = numbers[name] = value
            continue
        stored[name], stored[f"{name}_scale_inv"] = quantised(value.astype(np.float32), (100, 130), E4M3)
        numbers[name] = numbers_of(stored[name], stored[f"{name}_scale_inv"], (100, 130))
    quantisation = {"quant_method": "fp8", "weight_block_size": [100, 130]}
    write(tmp_path / "base", stored, {**CONFIG, "quantization_config": quantisation})
    write(tmp_path / "numbers", numbers, CONFIG)
    asked = {"merge_method": "linear", "dtype": "float32"}
    with pytest.raises(M3Error, match="is F8_E4M3, and adapters are added to float32"):
        m3jax.merge_checkpoint({**asked, "models": [f"{tmp_path}/base+{place}/a"]}, tmp_path / "out")
    with_scales = {**asked, "models": [f"{tmp_path}/base+{place}/a"], "dequantize": True}
    plain = {**asked, "models": [f"{tmp_path}/numbers+{place}/a"]}
    found = m3jax.merge_checkpoint(with_scales, tmp_path / "found")
    assert found.digest == m3jax.merge_checkpoint(plain, tmp_path / "plain").digest


def test_inspect_shows_the_model_with_its_adapter(place):
    from m3jax.checkpoints.inspection import compare, look_at

    name = f"{place}/base+{place}/a"
    assert [info.name for info in look_at(name).tensors] == [info.name for info in look_at(f"{place}/base").tensors]
    assert json.loads(json.dumps(look_at(name).to_json()))["entries"] == 3 * 300 * 260 + 260
    assert compare(name, f"{place}/merged-a").identical
    assert not compare(name, f"{place}/base").identical
    assert m3jax.load(name, flat=True).keys() == read(place / "base").keys()


def test_an_adapter_that_would_leave_two_of_one_tensor_is_refused(tmp_path):
    """What a recipe says of ties, and biases that are one, too."""
    rows = {"model.embed_tokens.weight": np.ones((9, 4), np.float32), "lm_head.weight": np.ones((9, 4), np.float32)}
    write(tmp_path / "base", rows, CONFIG)
    write_adapter(tmp_path / "head", factors({"lm_head": (9, 4)}, 2, 0))
    bias = {f"cls.predictions.{name}": np.zeros(9, np.float32) for name in ("bias", "decoder.bias")}
    write(tmp_path / "bert", bias | {"bert.embeddings.word_embeddings.weight": np.ones((9, 4), np.float32)}, CONFIG)
    write_adapter(tmp_path / "bias", {"base_model.model.cls.predictions.bias": np.ones(9, np.float32)})
    asked = {"merge_method": "linear", "models": [f"{tmp_path}/base+{tmp_path}/head"]}
    found = m3jax.merge_checkpoint(asked, tmp_path / "out")
    assert {name for name, value in read(found.directory).items() if (value != rows[name]).any()} == {"lm_head.weight"}
    bert = {"merge_method": "linear", "models": [f"{tmp_path}/bert+{tmp_path}/bias"]}
    for wrong in (asked | {"anatomy": {"tied": True}}, bert):
        with pytest.raises(M3Error, match=r"its adapter changes .* but not .*, which are one tensor here"):
            m3jax.merge_checkpoint(wrong, tmp_path / "wrong")
