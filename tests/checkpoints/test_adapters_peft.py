"""Adapters as PEFT itself makes and loads them."""

import json

import numpy as np
import pytest

import m3jax

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # PEFT warns of what is meant


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch", reason="needs torch: scripts/test --all")
    return pytest.importorskip("peft", reason="needs peft: scripts/test --all")


def llama(place, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False))
    model.to(dtype).save_pretrained(place)


def gpt2(place, dtype):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16))
    model.to(dtype).save_pretrained(place)


def trained(model, peft, **settings):
    """A model with an adapter whose every part is something."""
    import torch

    found = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found


CASES = {
    "all linear": (llama, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "patterns": (
        llama,
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.v_proj": 3, "proj": 5},
            "modules_to_save": ["norm", "lm_head"],
        },
    ),
    "embeddings": (llama, {"r": 3, "target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "weights as [in, out], and biases": (
        gpt2,
        {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_peft_merges(peft, tmp_path, case, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    make, settings = CASES[case]
    make(tmp_path / "base", getattr(torch, dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype))
    adapted = trained(model, peft, **settings)
    adapted.save_pretrained(tmp_path / "lora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours = m3jax.load(f"{tmp_path}/base+{tmp_path}/lora", flat=True)
    theirs = m3jax.load(tmp_path / "merged", flat=True)
    assert ours.keys() == theirs.keys()
    tolerance = 2e-6 if dtype == "float32" else 2**-6  # there the product itself may be rounded to bfloat16 first
    for name, value in theirs.items():
        value, own = np.asarray(value, np.float32), np.asarray(ours[name], np.float32)
        np.testing.assert_allclose(own, value, atol=tolerance * max(1.0, np.abs(value).max()), err_msg=name)


def test_what_is_extracted_loads_in_peft(peft, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "base", torch.float32)

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["norm"]}
    tuned, tokens = trained(base(), peft, **settings), torch.arange(20)[None]
    with torch.no_grad():
        want = tuned(tokens).logits
        tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
        found = m3jax.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "lora", 4)
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
        assert found.share > 1 - 1e-6
        assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
        torch.testing.assert_close(loaded(tokens).logits, want, atol=1e-4, rtol=1e-4)
        assert (base()(tokens).logits - want).abs().max() > 0.01
