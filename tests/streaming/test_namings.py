"""Models of one architecture under several namings: the bits of the same merge under one."""

import ml_dtypes
import numpy as np
import pytest
from support.directories import read, write
from support.float8 import numbers_of, quantised

import m3jax
from m3jax import M3Error
from m3jax.anatomy.namings import common_names, find_mapping
from m3jax.checkpoints import TensorInfo, digest_tensor, open_safetensors

EXPERTS, WIDTH, INNER = 3, 16, 12


def mixtral(seed):
    """A model of experts in the names of transformers 4: experts one by one."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (9, WIDTH), "lm_head.weight": (9, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{moe}.gate.weight"] = (EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            shapes |= {f"{moe}.experts.{expert}.{w}.weight": (INNER, WIDTH) for w in ("w1", "w3")}
            shapes[f"{moe}.experts.{expert}.w2.weight"] = (WIDTH, INNER)
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


def together(tensors, transposed=False):
    """The same in the names of transformers 5: experts stacked, gate above up."""
    found = {name.replace("block_sparse_moe", "mlp"): v for name, v in tensors.items() if ".experts." not in name}
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        each = [[tensors[f"{old}.{e}.{w}.weight"] for w in ("w1", "w3", "w2")] for e in range(EXPERTS)]
        found[f"{new}.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in each])
        found[f"{new}.down_proj"] = np.stack([down for _, _, down in each])
    if transposed:
        found |= {n: np.ascontiguousarray(v.swapaxes(1, 2)) for n, v in found.items() if ".experts." in n}
    return found


def merged(place, out, *names, base=None, **keys):
    asked = {"merge_method": "linear", "models": [str(place / name) for name in names], **keys}
    if base is not None:
        asked["base_model"] = str(place / base)
    return m3jax.merge_checkpoint(asked, out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three models, each in both namings: `old-0`, `new-0` …"""
    place = tmp_path_factory.mktemp("namings")
    for seed in range(3):
        write(place / f"old-{seed}", mixtral(seed))
        write(place / f"new-{seed}", together(mixtral(seed)))
    return place


def test_experts_stored_together_and_one_by_one(place, tmp_path):
    asked = {"merge_method": "ties", "parameters": {"density": 0.5, "trim_scope": "model"}}
    asked["mixup"] = {"alpha": 0.5, "granularity": "layer"}
    for first, second in (("old", "new"), ("new", "old")):
        want = merged(place, tmp_path / f"{first}-want", f"{first}-1", f"{first}-2", base=f"{first}-0", **asked)
        got = merged(place, tmp_path / first, f"{first}-1", f"{second}-2", base=f"{first}-0", **asked)
        assert got.digest == want.digest
        assert got.manifest["output"] | {"files": None} == want.manifest["output"] | {"files": None}
        assert [note for note in got.notes if "its names are read as those of" in note]
        with open_safetensors(place / f"{second}-2") as stored:
            assert got.manifest["inputs"][1]["tensors"] == {n: digest_tensor(stored, n) for n in stored.tensors}
        assert m3jax.replay(tmp_path / first, tmp_path / f"{first}-again").digest == got.digest


def test_without_a_base_the_names_are_the_first_models(place, tmp_path):
    merged(place, tmp_path / "out", "new-0", "old-1")
    want = together({name: np.zeros_like(value) for name, value in mixtral(0).items()})
    assert read(tmp_path / "out").keys() == want.keys()


def test_float8_experts_one_by_one_beside_experts_together(place, tmp_path):
    stored, numbers = {}, {}
    for name, value in mixtral(4).items():
        if ".experts." in name:
            stored[name], stored[f"{name}_scale_inv"] = quantised(value.astype(np.float32), (8, 8))
            numbers[name] = numbers_of(stored[name], stored[f"{name}_scale_inv"], (8, 8))
        else:
            stored[name] = numbers[name] = value
    told = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    write(tmp_path / "fp8", stored, told)
    write(tmp_path / "numbers", together(numbers))
    write(tmp_path / "new", together(mixtral(0)))
    got = merged(tmp_path, tmp_path / "out", "new", "fp8", dequantize=True)
    assert got.digest == merged(tmp_path, tmp_path / "want", "new", "numbers").digest
    with open_safetensors(tmp_path / "fp8") as checkpoint:
        own = {name: digest_tensor(checkpoint, name) for name in checkpoint.tensors}
    assert got.manifest["inputs"][1]["tensors"] == own


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("old", "transposed", r"two ways \(.*experts.*\), but one stores the weights of experts transposed: load one"),
        ("old", "wider", r"an expert's .*gate_proj.weight is \[24, 16\] in one and \[12, 16\] in the other"),
        ("new", "transposed", r"two ways .* transposed"),
        ("old", "twice", r"but model.norm.weight and norm.weight of .*twice would be one tensor of the other"),
        ("new", "mixed", r"but its experts are of several dtypes \(BF16, F32\)"),
    ],
)
def test_namings_that_no_view_maps(place, tmp_path, first, second, words):
    kinds = {
        "transposed": together(mixtral(1), transposed=True),
        "wider": {n: np.concatenate([v, v], 1) if "gate_up" in n else v for n, v in together(mixtral(1)).items()},
        "twice": together(mixtral(1)) | {"norm.weight": mixtral(1)["model.norm.weight"]},
        "mixed": {n: v.astype(np.float32) if ".1.w3." in n else v for n, v in mixtral(1).items()},
    }
    write(tmp_path / second, kinds[second])
    with pytest.raises(M3Error, match=words):
        merged(tmp_path, tmp_path / "out", str(place / f"{first}-0"), second)


def test_a_model_without_a_head_keeps_its_names():
    def infos(*names):
        return {name: TensorInfo(name, (2, 2), "F32") for name in names}

    own, wanted = infos("model.norm.weight", "norm.weight"), infos("model.norm.weight", "norm.weight", "lm_head.weight")
    assert find_mapping(own, wanted, called=("a", "b")) is None


def test_another_architecture_stays_another(place, tmp_path):
    """A language model is not the one inside a model that sees, and half a model not a whole one."""
    text = {"model.layers.0.w.weight": np.ones((2, 2), np.float32), "model.norm.weight": np.ones(2, np.float32)}
    seeing = {name.replace("model.", "model.language_model."): value for name, value in text.items()}
    seeing["model.visual.blocks.0.w.weight"] = np.ones((2, 2), np.float32)
    write(tmp_path / "text", text)
    write(tmp_path / "seeing", seeing)
    with pytest.raises(M3Error, match=r"in .* but not in .*merge models of one architecture"):
        merged(tmp_path, tmp_path / "out", "text", "seeing")
    less = {name: value for name, value in together(mixtral(1)).items() if "layers.1.mlp.experts.down" not in name}
    write(tmp_path / "less", less)
    with pytest.raises(M3Error, match=r"layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight.*: in .* but not in"):
        merged(tmp_path, tmp_path / "out", str(place / "old-0"), "less")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("vision_tower.vision_model.encoder.layers.0.w.weight", "model.vision_tower.encoder.layers.0.w.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("image_newline", "model.image_newline"),
        ("module._orig_mod.model.layers.0.w.weight", "layers.0.w.weight"),
        ("transformer.h.0.ln_1.weight", "h.0.ln_1.weight"),
        ("bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "model.layers.0.block_sparse_moe.experts.gate_up_proj"),
    ],
)
def test_two_names_of_one_tensor(old, new):
    beside = ["vision_tower.w"] if "model." in old and "layers.3" in old else []
    assert common_names([old, *beside])[old] == common_names([new, *beside])[new]


def test_names_of_qwen2_vl():
    old = ["model.layers.0.w.weight", "visual.blocks.0.w.weight", "lm_head.weight"]
    new = ["model.language_model.layers.0.w.weight", "model.visual.blocks.0.w.weight", "lm_head.weight"]
    assert list(common_names(old).values()) == list(common_names(new).values())


# --- As transformers itself writes them ------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("family", ["mixtral", "qwen2_vl", "llava_next"])
def test_old_and_new_names_as_transformers_writes_them(family, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: scripts/test --all")
    architectures = pytest.importorskip("anatomy.architectures")
    for seed in range(2):
        torch.manual_seed(seed)
        model = architectures.make(architectures.BY_NAME[family])
        for naming in ("old", "new"):
            model.save_pretrained(tmp_path / f"{naming}-{seed}", save_original_format=naming == "old")
    with open_safetensors(tmp_path / "old-0") as old, open_safetensors(tmp_path / "new-0") as new:
        assert old.tensors.keys() != new.tensors.keys()
    keys = {"merge_method": "dare_linear", "parameters": {"density": 0.5, "weight": 1.0}, "seed": 1}
    for first, second in (("old", "new"), ("new", "old")):
        want = merged(tmp_path, tmp_path / f"{first}-want", f"{first}-1", base=f"{first}-0", **keys)
        got = merged(tmp_path, tmp_path / first, f"{second}-1", base=f"{first}-0", **keys)
        assert got.digest == want.digest
    _, report = type(model).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_experts_that_only_one_model_has_are_not_dropped(tmp_path):
    """A fused tensor of more experts than the template has, one by one, is another model's."""
    fewer = {
        name: value for name, value in mixtral(0).items() if ".experts.2." not in name and "gate.weight" not in name
    }
    fused = {name: value for name, value in together(mixtral(1)).items() if "gate.weight" not in name}
    write(tmp_path / "a", fewer)
    write(tmp_path / "b", fused)
    with pytest.raises(M3Error):
        m3jax.merge_checkpoint(
            {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}, tmp_path / "out"
        )
