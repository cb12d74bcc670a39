"""Merging and converting float8 models: the bits of the same merge of the numbers that their weights stand for."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.directories import read, recipe, write
from support.float8 import E4M3, E5M2, numbers_of, quantised

import m3jax
from m3jax import M3Error
from m3jax.anatomy.float8 import find_dequantisation
from m3jax.checkpoints import TensorInfo, digest_tensor, open_safetensors
from m3jax.cli.commands import main
from m3jax.outputs.conversion import convert
from m3jax.recipe import load_recipe

BLOCK = (16, 48)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "modules_to_not_convert": ["lm_head"]}
CONFIG = {"model_type": "qwen3", "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
SHAPES = {f"model.layers.{i}.mlp.{name}.weight": shape for i in (0, 1) for name, shape in (("up_proj", (301, 500)),)}


def model(seed, dtype=E4M3):
    """A model as it is stored, and with float32 in place of float8 (by name)."""
    rng = np.random.default_rng(seed)
    stored = {
        "model.embed_tokens.weight": rng.standard_normal((9, 20)).astype(ml_dtypes.bfloat16),
        "model.layers.0.self_attn.k_scale": np.ones((), np.float32),
    }
    numbers = {"model.embed_tokens.weight": stored["model.embed_tokens.weight"]}
    for name, shape in SHAPES.items():
        weight, scales = quantised(rng.standard_normal(shape).astype(np.float32), BLOCK, dtype)
        stored |= {name: weight, f"{name}_scale_inv": scales, name.replace("weight", "input_scale"): np.float32([2])}
        numbers[name] = numbers_of(weight, scales, BLOCK)
    return stored, numbers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base in bfloat16, one expert in each dtype of float8, and all of them as float32: `stored/…`, `numbers/…`."""
    place = tmp_path_factory.mktemp("float8")
    for seed, (name, dtype) in enumerate((("expert-0", E4M3), ("expert-1", E5M2))):
        stored, numbers = model(seed, dtype)
        write(place / "stored" / name, stored, CONFIG | {"quantization_config": FP8})
        write(place / "numbers" / name, numbers, CONFIG)
    base = {name: value.astype(ml_dtypes.bfloat16) for name, value in model(2)[1].items()}
    for kind in ("stored", "numbers"):
        write(place / kind / "base", base, CONFIG)
    return place


def averaged(place, *names, **keys):
    return {"merge_method": "linear", "models": [str(place / name) for name in names], **keys}


def test_a_merge_is_that_of_the_numbers(place, tmp_path):
    asked = {"merge_method": "ties", "parameters": {"density": 0.5, "trim_scope": "model"}}
    told = load_recipe(recipe(place / "stored", **asked), ["dequantize=true"])
    result = m3jax.merge_checkpoint(told, tmp_path / "out", chunk_entries=2**16)  # measured first, then merged
    want = m3jax.merge_checkpoint(recipe(place / "numbers", **asked), tmp_path / "want", chunk_entries=2**16)
    assert result.digest == want.digest
    assert any("2 float8 weights of" in note for note in result.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    first, _, base = result.manifest["inputs"]
    assert (first["dequantised"], "dequantised" in base) == ("fp8", False)
    assert result.manifest["recipe"]["dequantize"] is True
    with open_safetensors(place / "stored" / "expert-0") as stored:
        own = {name for name in stored.tensors if not name.endswith(("input_scale", "k_scale"))}
        assert first["tensors"] == {name: digest_tensor(stored, name) for name in own}
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0


def test_without_a_dtype_a_model_is_written_as_its_config_says(place, tmp_path):
    asked = averaged(place / "stored", "expert-0", "expert-1", dequantize=True, exclude=["layers.0"])
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    got, numbers = read(tmp_path / "out"), [model(0)[1], model(1, E5M2)[1]]
    assert set(got) == set(numbers[0])
    for name in SHAPES:
        mean = np.float32(0.5) * numbers[0][name] + np.float32(0.5) * numbers[1][name]
        want = numbers[0][name] if "layers.0" in name else mean
        assert got[name].tobytes() == want.astype(ml_dtypes.bfloat16).tobytes(), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    wide = m3jax.merge_checkpoint(asked | {"dtype": "float32"}, tmp_path / "wide")
    assert json.loads((wide.directory / "config.json").read_text())["torch_dtype"] == "float32"
    assert read(tmp_path / "wide")["model.layers.1.mlp.up_proj.weight"].dtype == np.float32
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest


def test_layers_of_float8_models_are_stacked(place, tmp_path):
    def asked(kind):
        slices = [{"sources": [{"model": str(place / kind / f"expert-{i}"), "layer_range": [0, 2]}]} for i in (0, 1)]
        return {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}

    result = m3jax.merge_checkpoint(asked("stored") | {"dequantize": True}, tmp_path / "out")
    assert result.digest == m3jax.merge_checkpoint(asked("numbers"), tmp_path / "want").digest
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told == CONFIG | {"num_hidden_layers": 4, "torch_dtype": "bfloat16"}


def test_a_merge_goes_on_where_it_was_left(place, tmp_path, monkeypatch):
    asked = averaged(place / "stored", "expert-0", "expert-1", dequantize=True)
    whole = m3jax.merge_checkpoint(asked, tmp_path / "whole", max_shard_size=310_000)
    finish, done = m3jax.checkpoints.ShardWriter.finish, []

    def interrupted(writer):
        finish(writer)
        done.append(writer)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(m3jax.checkpoints.ShardWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        m3jax.merge_checkpoint(asked, tmp_path / "out", max_shard_size=310_000)
    monkeypatch.setattr(m3jax.checkpoints.ShardWriter, "finish", finish)
    resumed = m3jax.merge_checkpoint(asked, tmp_path / "out", max_shard_size=310_000)
    assert resumed.resumed_shards == 1
    assert resumed.manifest == whole.manifest


def test_a_changed_scale_is_noticed(place, tmp_path):
    stored, _ = model(0)
    write(tmp_path / "one", stored, CONFIG | {"quantization_config": FP8})
    asked = averaged(tmp_path, "one", "one", dequantize=True)
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    stored[name] = stored[name] * np.float32(2)
    write(tmp_path / "other", stored, CONFIG | {"quantization_config": FP8})
    with pytest.raises(M3Error, match=rf"{name} is not what was merged"):
        m3jax.replay(tmp_path / "out", tmp_path / "again", sources={str(tmp_path / "one"): str(tmp_path / "other")})


def test_conversion_writes_what_config_says(place, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(place / "stored" / "expert-0"), str(out), "--dequantize", "--quiet"]) == 0
    got = load_file(out / "model.safetensors")
    want = {name: value.astype(ml_dtypes.bfloat16) for name, value in model(0)[1].items()}
    assert {name: value.tobytes() for name, value in got.items()} == {n: v.tobytes() for n, v in want.items()}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    with pytest.raises(M3Error, match="has no float8 weights: convert it without dequantising"):
        convert(out, tmp_path / "again", dequantize=True)


def test_what_is_not_dequantised_is_refused_with_the_mend(place, tmp_path):
    with pytest.raises(M3Error, match=r"quantised \(fp8\).*'dequantize: true'.*m3jax convert SRC DST --dequantize"):
        m3jax.merge_checkpoint(averaged(place / "stored", "expert-0", "expert-1"), tmp_path / "out")
    up = "model.layers.0.mlp.up_proj"
    packed = {f"{up}.qweight": np.ones((4, 4), np.int32), f"{up}.qzeros": np.ones((1, 4), np.int32)}
    packed[f"{up}.scales"] = np.ones((1, 4), np.float16)
    kinds = {
        "gptq": packed | {f"{up}.g_idx": np.ones(4, np.int32)},
        "awq": packed,
        "bitsandbytes": {f"{up}.weight": np.ones((4, 4), np.int8), f"{up}.SCB": np.ones(4, np.float32)},
        "qwix": {"layers.0.kernel.qvalue": np.ones((4, 4), np.int8), "layers.0.kernel.scale": np.ones(4, np.float32)},
    }
    commands = {"bitsandbytes": "model.dequantize()", "qwix": "qwix.dequantize"}
    for scheme, tensors in kinds.items():
        write(tmp_path / scheme, tensors, CONFIG)
        with pytest.raises(M3Error, match=rf"quantised \({scheme}\)") as caught:
            m3jax.merge_checkpoint(averaged(tmp_path, scheme, scheme, dequantize=True), tmp_path / "out")
        assert commands.get(scheme, "gptqmodel.utils.model_dequant.dequantize_model(SRC, DST)") in str(caught.value)
        with pytest.raises(M3Error, match=rf"quantised \({scheme}\), which cannot be undone here"):
            convert(tmp_path / scheme, tmp_path / "out", dequantize=True)


@pytest.mark.torch
def test_transformers_dequantises_to_the_same_bits(tmp_path, monkeypatch):
    """Blocks of a model that transformers made, merged with themselves, and as transformers itself reads them."""
    torch = pytest.importorskip("torch", reason="needs torch: scripts/test --all")
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save
    from transformers import FineGrainedFP8Config, Qwen3Config, Qwen3ForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tensors = load(tmp_path / "model" / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        numbers, scales = quantised(tensors[name].float().numpy(), (32, 32))
        tensors[name] = torch.from_numpy(numbers.view(np.uint8)).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(scales)
    save(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(told))

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda *_: True)  # placement: not needed
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", quantization_config=how, dtype="auto").state_dict()
    m3jax.merge_checkpoint(averaged(tmp_path, "model", "model", dequantize=True), tmp_path / "out")
    ours = load(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert len([name for name in ours if "_proj" in name]) == 14
    loaded, report = Qwen3ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16


# --- Which scales are whose ------------------------------------------------------------------------------

W = "model.layers.0.mlp.up_proj.weight"


def found(shapes, config=None, dtype="F32"):
    dtypes = {name: "F8_E4M3" if name in (W, "w", "layers.0.attention.wq.weight") else dtype for name in shapes}
    return find_dequantisation({n: TensorInfo(n, s, dtypes[n]) for n, s in shapes.items()}, config, "here")


def test_every_spelling_of_scales():
    groups = {"config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 32}}}}
    blocks = {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": "64x32"}}}}
    for scale, shape, config, laid in (
        (f"{W}_scale_inv", (5, 3), {"quantization_config": {"weight_block_size": [128, 128]}}, ((5, 3), (128, 128))),
        (f"{W}_scale_inv", (9, 5), {"quantization_config": {"weight_block_size": [64, 64]}}, ((9, 5), (64, 64))),
        (f"{W}_scale_inv", (), {"quantization_config": {"weight_block_size": None}}, ((1, 1), (576, 300))),
        (f"{W}_scale", (1,), None, ((1, 1), (576, 300))),
        (f"{W}_scale", (576, 1), None, ((576, 1), (1, 300))),
        (f"{W}_scale", (576,), None, ((576, 1), (1, 300))),
        (f"{W}_scale", (576, 10), {"quantization_config": groups}, ((576, 10), (1, 32))),
        (f"{W}_scale", (9, 10), {"compression_config": blocks}, ((9, 10), (64, 32))),
        ("model.layers.0.mlp.up_proj.scale_weight", (), None, ((1, 1), (576, 300))),
    ):
        ((name, scaling),) = found({W: (576, 300), scale: shape}, config).scalings.items()
        assert (name, scaling.name, (scaling.shape, scaling.block)) == (W, scale, laid)
    mistral = {"layers.0.attention.wq.weight": (8, 8), "layers.0.attention.wq.qscale_weight": ()}
    told = found(mistral | {"layers.0.attention.wq.qscale_act": ()})
    assert told.scalings["layers.0.attention.wq.weight"].name == "layers.0.attention.wq.qscale_weight"
    assert told.dropped == {"layers.0.attention.wq.qscale_act"}


def test_dtype_of_numbers():
    scaled = {W: (8, 8), f"{W}_scale": (1,)}
    assert found(scaled, {"text_config": {"dtype": "float16"}}).dtype == "F16"
    assert found(scaled | {"norm.weight": (8,), "b": (8,)}).dtype == "F32"
    assert found(scaled).dtype == "BF16"
    assert found({"w.weight": (8, 8)}, {"quantization_config": {"quant_method": "fp8"}}).scalings == {}
    assert found({"w.weight": (8, 8)}) is None


@pytest.mark.parametrize(
    ("shapes", "config", "words"),
    [
        ({W: (8, 8)}, None, rf"{W} is F8_E4M3 without scales \(no {W}_scale_inv, "),
        (
            {W: (300, 300), f"{W}_scale_inv": (2, 3)},
            None,
            r"\[300, 300\] and its scale .* \[2, 3\], .* a size that config",
        ),
        ({W: (8, 8), f"{W}_scale": (4,)}, None, r"does not lie on it"),
        ({W: (8, 8), f"{W}_scale": (), f"{W}_scale_inv": ()}, None, r"has both .*scale_inv and .*scale, a scheme that"),
        (
            {W: (8, 8), f"{W}_scale": (), "b.qweight": (4,)},
            None,
            r"several schemes \(fp8, awq\), of which only fp8",
        ),
        ({W: (8, 8), f"{W}_scale": (), f"{W}_zero_point": ()}, None, r"has both .*scale and .*zero_point"),
    ],
)
def test_scales_that_do_not_fit(shapes, config, words):
    with pytest.raises(M3Error, match=words):
        found(shapes, config)


def test_scales_that_may_lie_in_two_ways():
    groups = {"a": {"weights": {"group_size": 32}}, "b": {"weights": {"group_size": 33}}}
    with pytest.raises(M3Error, match=r"can lie on it in several ways .* 1x32 and 1x33"):
        found({W: (8, 60), f"{W}_scale": (8, 2)}, {"quantization_config": {"config_groups": groups}})
