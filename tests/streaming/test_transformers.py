"""What m3jax writes, the rest of the world loads."""

import json

import ml_dtypes
import pytest
from support import oracle

import m3jax

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base and two experts that transformers itself made, sharded by it."""
    torch = pytest.importorskip("torch", reason="needs torch: scripts/test --all")
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("family")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(place / "base", max_shard_size="50KB")
    for i in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(place / f"expert-{i}")
    return place


@pytest.mark.parametrize(
    "keys",
    [
        {"merge_method": "linear"},
        {"merge_method": "ties", "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"}},
        {"merge_method": "task_arithmetic", "sparsify": {"method": "dare", "density": 0.5}, "dtype": "float32"},
    ],
)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_merges_load_in_transformers_without_a_missing_key(family, tmp_path, keys, shard):
    from transformers import AutoModelForCausalLM

    models = [str(family / f"expert-{i}") for i in range(2)]
    recipe = {"base_model": str(family / "base"), "models": models, "mixup": {"alpha": 0.5}, "seed": 1, **keys}
    m3jax.merge_checkpoint(recipe, tmp_path / "out", max_shard_size=shard)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert str(model.dtype).removeprefix("torch.") == keys.get("dtype", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3


def test_torch_computes_the_same_average_up_to_rounding(family, tmp_path):
    """A plain float32 loop in torch, as users would write it."""
    import torch
    from safetensors.torch import load_file

    models = [family / f"expert-{i}" for i in range(2)]
    recipe = {"merge_method": "linear", "models": [str(m) for m in models], "mixup": {"alpha": 0.5}, "seed": 1}
    m3jax.merge_checkpoint({**recipe, "dtype": "float32"}, tmp_path / "out")
    weight, rest = oracle.draw(1, 0.5, 2)
    first, second = (load_file(m / "model.safetensors") for m in models)
    for name, merged in load_file(tmp_path / "out" / "model.safetensors").items():
        want = weight * first[name].float() + rest * second[name].float()
        assert torch.allclose(merged, want, rtol=1e-6, atol=1e-8), name
        assert (
            merged.numpy().tobytes()
            == oracle.merge(
                [{name: m[name].view(torch.int16).numpy().view(ml_dtypes.bfloat16)} for m in (first, second)],
                weights=[weight, rest],
                out="float32",
            )[name].tobytes()
        )
