import json

import pytest
from support.decoders import CONFIGS, LLAMA3, SIZES

from m3jax import M3Error
from m3jax.decoder import DecoderConfig, Rope


@pytest.mark.parametrize("name", CONFIGS)
def test_every_known_architecture_is_read(name):
    config = DecoderConfig.from_dict(CONFIGS[name])
    assert len(config.windows) == config.num_layers == 2
    assert hash(config) == hash(DecoderConfig.from_dict(CONFIGS[name]))


def test_windows_follow_each_architectures_rule():
    windows = {name: DecoderConfig.from_dict(entries).windows for name, entries in CONFIGS.items()}
    assert windows["llama"] == (None, None)
    assert windows["mistral"] == (5, 5)
    assert windows["qwen2"] == (None, 6)
    assert windows["gemma2"] == (5, None)
    assert DecoderConfig.from_dict(CONFIGS["mistral"] | {"sliding_window": None}).windows == (None, None)
    stated = CONFIGS["gemma2"] | {"layer_types": ["full_attention", "sliding_attention"]}
    assert DecoderConfig.from_dict(stated).windows == (None, 5)


def test_both_spellings_of_rope_scaling_mean_the_same():
    base = SIZES | {"model_type": "llama"}
    old = base | {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    assert DecoderConfig.from_dict(old) == DecoderConfig.from_dict(CONFIGS["llama3"])
    linear = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert DecoderConfig.from_dict(base | linear).rope == Rope(1e6, 2.0)
    assert DecoderConfig.from_dict(base | {"rope_scaling": None, "rope_theta": 7}).rope == Rope(7.0)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "mamba"}, r"in Python, with m3jax.evaluate\(…, apply_fn=…\)\.$"),
        ({"model_type": "mamba"}, "mamba.*Gemma2ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*does not know"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' RoPE scaling.*linear and llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates 0.5 of each head"),
        ({"rope_scaling": {"type": "linear"}}, "factor: None"),
        ({"rope_scaling": "linear"}, "rope parameters 'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
        ({"dtype": "float8_e4m3fn"}, "unknown dtype"),
        ({"vocab_size": None}, "vocab_size: None"),
        ({"hidden_size": "4096"}, "hidden_size: '4096'"),
        ({"num_key_value_heads": 3}, "4 heads for 3 key-value heads"),
        ({"head_dim": 7}, "odd head_dim 7"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_cannot_run_is_said_in_one_sentence(entries, said):
    with pytest.raises(M3Error, match=said) as error:
        DecoderConfig.from_dict(CONFIGS["llama"] | entries)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


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
