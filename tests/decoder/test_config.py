import contextlib
import json
import math

import pytest
from support.decoders import CONFIGS, LLAMA3, LONGROPE, SIZES

from m3jax import M3Error
from m3jax.decoder import DecoderConfig, Experts, Rope


@pytest.mark.parametrize("name", CONFIGS)
def test_every_known_architecture_is_read(name):
    config = DecoderConfig.from_dict(CONFIGS[name])
    assert len(config.windows) == len(config.ropes) == len(config.sparse) == config.num_layers == 2
    assert hash(config) == hash(DecoderConfig.from_dict(CONFIGS[name]))


def test_windows_follow_each_architectures_rule():
    windows = {name: DecoderConfig.from_dict(entries).windows for name, entries in CONFIGS.items()}
    assert windows["llama"] == (None, None)
    assert windows["mistral"] == (5, 5)
    assert windows["qwen2"] == (None, 6)
    assert windows["gemma2"] == windows["gemma3"] == windows["gpt-oss"] == (5, None)
    assert windows["phi3"] == (40, 40)
    assert windows["mixtral"] == windows["smollm3"] == (None, None)
    assert DecoderConfig.from_dict(CONFIGS["mistral"] | {"sliding_window": None}).windows == (None, None)
    stated = CONFIGS["gemma2"] | {"layer_types": ["full_attention", "sliding_attention"]}
    assert DecoderConfig.from_dict(stated).windows == (None, 5)


def test_both_spellings_of_rope_scaling_mean_the_same():
    base = SIZES | {"model_type": "llama"}
    old = base | {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    assert DecoderConfig.from_dict(old) == DecoderConfig.from_dict(CONFIGS["llama3"])
    linear = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert DecoderConfig.from_dict(base | linear).ropes == (Rope(1e6, "linear", 2.0),) * 2
    assert DecoderConfig.from_dict(base | {"rope_scaling": None, "rope_theta": 7}).ropes == (Rope(7.0),) * 2


def test_ropes_follow_each_architectures_rule():
    ropes = {name: DecoderConfig.from_dict(entries).ropes for name, entries in CONFIGS.items()}
    assert ropes["mixtral"] == (Rope(1e6),) * 2
    assert ropes["gemma3"] == (Rope(1e4), Rope(1e6, "linear", 8.0))
    assert ropes["smollm3"] == (Rope(2e6), None)
    assert ropes["gpt-neox"] == (Rope(1e4, share=0.5),) * 2
    assert ropes["gpt2"] == (None, None)
    yarn = ropes["gpt-oss"][0]
    assert (yarn.theta, yarn.kind, yarn.original_context, yarn.truncate) == (150000.0, "yarn", 4096, False)
    assert yarn.magnitude == pytest.approx(0.1 * math.log(32) + 1)
    long = ropes["phi3"][0]
    assert long.magnitude == pytest.approx(math.sqrt(1 + math.log(128 / 32) / math.log(32)))
    assert (long.original_context, long.long_factors, long.share) == (32, (1.0, 8.0), 0.5)


def test_the_context_is_as_long_as_the_stretching_is_made_for():
    llama = SIZES | {"model_type": "llama"}

    def length(**rope):
        return DecoderConfig.from_dict(llama | {"rope_scaling": rope}).context_length

    assert length(type="dynamic", factor=4.0) == 512
    assert length(type="yarn", factor=4.0) == 512
    assert length(type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    assert length(type="yarn", factor=2.0, original_max_position_embeddings=32) == 128
    assert length(type="linear", factor=4.0) == 128
    assert DecoderConfig.from_dict(CONFIGS["phi3"]).context_length == 128
    assert DecoderConfig.from_dict(CONFIGS["phi3"]).turning_point == 32
    assert DecoderConfig.from_dict(llama).turning_point is None


def test_defaults_are_the_families_own():
    configs = {name: DecoderConfig.from_dict(entries) for name, entries in CONFIGS.items()}
    assert {name for name, config in configs.items() if config.tie_embeddings} == {
        *("llama-tied-biased", "gemma", "gemma2", "gemma3", "smollm3", "gpt2")
    }
    assert configs["gemma"].activation == configs["gpt2"].activation == "gelu_pytorch_tanh"
    assert configs["gpt-neox"].activation == "gelu"
    assert {configs[name].norm_eps for name in ("mixtral", "phi3", "olmo2", "gpt-oss", "gpt2", "gpt-neox")} == {1e-5}
    assert configs["qwen3-moe"].sparse == (True, False)
    assert configs["qwen3-moe"].experts == Experts(4, 2, 24, normalised=True)
    assert configs["gpt-oss"].experts == Experts(3, 2, 48, normalised=True, bias=True, clamp=(1.702, 7.0))


def test_older_and_newer_files_mean_the_same():
    """What transformers 4 wrote, and what version 5 writes of the same model."""
    near = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    far = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    newer = {
        "gemma3": {"rope_parameters": near | far, "layer_types": ["sliding_attention", "full_attention"]},
        "gpt-neox": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        "qwen3-moe": {"num_local_experts": 4},
        "phi3": {"rope_parameters": LONGROPE | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    }
    older_keys = ("rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "num_experts")
    older_keys += ("rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    for name, more in newer.items():
        kept = {key: value for key, value in CONFIGS[name].items() if key not in older_keys}
        assert DecoderConfig.from_dict(kept | more) == DecoderConfig.from_dict(CONFIGS[name])


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "mamba"}, r"in Python, with m3jax.evaluate\(…, apply_fn=…\)\.$"),
        (
            {"model_type": "mamba"},
            "mamba.*GPT2LMHeadModel, .*LlamaForCausalLM, MistralForCausalLM, .*SmolLM3ForCausalLM",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*does not know"),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, "'ntk' RoPE scaling.*default, linear, llama3, yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates 0.5 of each head"),
        ({"rope_scaling": {"type": "linear"}}, "factor: None"),
        ({"rope_scaling": "linear"}, "rope parameters 'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
        ({"dtype": "float8_e4m3fn"}, "unknown dtype"),
        ({"vocab_size": None}, "vocab_size: None"),
        ({"hidden_size": "4096"}, "hidden_size: '4096'"),
        ({"num_key_value_heads": 3}, "4 heads for 3 key-value heads"),
        ({"head_dim": 7}, "rotates 7 of the 7 entries"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_hidden_layers": 2**62}, "4,611,686,018,427,387,904 layers, more than any model"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "impossible value|factor"),
    ],
)
def test_what_cannot_run_is_said_in_one_sentence(entries, said):
    with pytest.raises(M3Error, match=said) as error:
        DecoderConfig.from_dict(CONFIGS["llama"] | entries)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        # What would change the result and the family does not know.
        ("llama", {"sliding_window": 4096}, "has sliding_window: 4096, which the decoder's LlamaForCausalLM does not"),
        ("llama", {"residual_multiplier": 0.2}, "has residual_multiplier: 0.2"),
        ("llama", {"logits_scaling": 8.0}, "has logits_scaling: 8.0"),
        ("llama", {"no_rope_layers": [1, 0]}, r"has no_rope_layers: \[1, 0\]"),
        ("llama", {"is_encoder_decoder": True}, "has is_encoder_decoder: True"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [4, 4]}}, "has mrope_section"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 2.0}}, "has attn_factor: 2.0"),
        ("qwen2", {"attention_bias": True}, "has attention_bias: True"),
        ("olmo2", {"clip_qkv": 8.0}, "has clip_qkv: 8.0"),
        ("qwen3-moe", {"shared_expert_intermediate_size": 64}, "has shared_expert_intermediate_size: 64"),
        ("qwen3-moe", {"n_shared_experts": 1}, "has n_shared_experts: 1"),
        ("mixtral", {"norm_topk_prob": True}, "has norm_topk_prob: True"),
        ("phi3", {"attention_bias": True}, "has attention_bias: True"),
        ("gpt2", {"alibi": True}, "has alibi: True"),
        ("gpt2", {"rope_theta": 10000.0}, "has rope_theta: 10000.0"),
        # What it knows, and does not compute.
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx: True"),
        ("gpt2", {"n_ctx": 64}, "has n_ctx: 64"),
        ("gpt2", {"add_cross_attention": True}, "has add_cross_attention: True"),
        ("gemma3", {"use_bidirectional_attention": True}, "has use_bidirectional_attention: True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "has an attn_logit_softcapping"),
        ("gemma", {"hidden_activation": "gelu"}, "has hidden_activation: 'gelu'"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "rotates 0.5 of each head: the architecture rotates whole"),
        ("qwen3-moe", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window with max_window"),
        ("gpt-oss", {"experts_per_token": 4}, "has experts_per_token: 4"),
        ("gpt-oss", {"hidden_act": "gelu"}, "has hidden_act: 'gelu'"),
        ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, "is of a quantized model"),
        ("gpt-neox", {"num_key_value_heads": 2}, "has num_key_value_heads: 2"),
        ("phi3", {"full_attn_mod": 2}, "has full_attn_mod: 2"),
        ("gemma2", {"sliding_window_size": 4096}, "has sliding_window_size: 4096"),
        # What is wrong.
        ("mixtral", {"num_experts_per_tok": 4}, "gives each token 4 of 3 experts"),
        ("qwen3-moe", {"num_local_experts": 8}, "has num_experts: 4"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers: \[1\]: give a 0 or a 1"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 2}, "sliding layer_types and use_sliding_window: false"),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor: .* not 2 numbers"),
        ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": [1.0, 0.0]}}, r"short_factor\[1\]: 0.0, not a positive"),
        ("phi3", {"partial_rotary_factor": 0.4}, "rotates 3 of the 8 entries of each head"),
        ("gpt-neox", {"rotary_pct": 1.5}, "rotates 12 of the 8 entries"),
        ("gpt-neox", {"use_parallel_residual": "yes"}, "use_parallel_residual: 'yes', neither true nor false"),
        ("granite", {"logits_scaling": 0}, "logits_scaling: 0, not a positive number"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}}, "beta_slow not"),
        ("gpt2", {"n_embd": None}, "n_embd: None"),
    ],
)
def test_no_entry_is_silently_ignored(name, entries, said):
    with pytest.raises(M3Error, match=said) as error:
        DecoderConfig.from_dict(CONFIGS[name] | entries)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_values_raise_no_other_error(name):
    """A value of another kind in any entry, one at a time, is refused or changes nothing that it should not."""
    keys = [*CONFIGS[name], "layer_types", "rope_parameters", "rope_scaling", "sliding_window", "head_dim"]
    said = []
    for key in dict.fromkeys(keys):
        for value in ("x", -1, 2.5, [1], {"full_attention": 3}, True, [[]]):
            with contextlib.suppress(M3Error):  # and nothing else
                hash(DecoderConfig.from_dict(CONFIGS[name] | {key: value}))
                said.append(key)
    # What may be any positive number, any number of layers, or says nothing.
    assert len(said) < 2 * len(keys)


def test_what_means_nothing_is_let_through():
    """What training and older versions leave in config.json."""
    leftovers = {"_name_or_path": "here", "transformers_version": "4.40.0", "use_cache": True, "pretraining_tp": 1}
    leftovers |= {"attention_dropout": 0.1, "initializer_range": 0.02, "bos_token_id": 1, "torch_dtype": "float32"}
    leftovers |= {"unsloth_version": "2025.1", "id2label": {"0": "a"}, "task_specific_params": {"x": 1}}
    leftovers |= {"sliding_window": None, "alibi": False, "router_aux_loss_coef": 0.01}
    for name in ("llama", "granite"):
        assert DecoderConfig.from_dict(CONFIGS[name] | leftovers) == DecoderConfig.from_dict(CONFIGS[name])
    said_twice = {
        "llama": {"is_llama_config": True, "rope_interleaved": False, "max_sequence_length": 4096},
        "qwen2": {"use_mrope": False},
        "qwen3-moe": {"max_window_layers": 48, "use_sliding_window": False, "sliding_window": 4096},
        "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "attention_bias": False, "lm_head_bias": False},
        "gemma2": {"sliding_window_size": 5, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
        "gpt-neox": {"attention_probs_dropout_prob": 0.1, "make_vocab_size_divisible_by": 128, "is_decoder": True},
        "gpt2": {"summary_type": "cls_index", "reorder_and_upcast_attn": True, "embd_pdrop": 0.1},
    }
    for name, more in said_twice.items():
        assert DecoderConfig.from_dict(CONFIGS[name] | more) == DecoderConfig.from_dict(CONFIGS[name])


def test_a_directory_gives_the_stop_tokens_of_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    assert DecoderConfig.from_directory(tmp_path).stop_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert DecoderConfig.from_directory(tmp_path).stop_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "not a JSON obj")]
)
def test_a_directory_without_a_good_config_is_an_error(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(M3Error, match=said):
        DecoderConfig.from_directory(tmp_path)
