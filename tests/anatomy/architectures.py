"""Architectures as transformers itself makes and writes them, tiny, and what is true of each by its configuration.

Every row was written by hand from the configuration given here: it is what the anatomy has to find, and the table that
`scripts/anatomy_table` prints.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

VOCABULARY = 163  # a prime, so that no other axis has its size


class Architecture(NamedTuple):
    """One architecture and its truth.

    Attributes:
        name: What the tables call it; the `model_type` where nothing else is said.
        auto: The auto class that makes it, or a model class of transformers.
        config: Its configuration's entries.
        towers: Depth of each tower by name.
        tied: Whether the output embedding is the input embedding; None where there is no output embedding.
        model_type: Its `model_type`, if it is not `name`.
    """

    name: str
    auto: str
    config: Mapping[str, Any]
    towers: Mapping[str, int]
    tied: bool | None
    model_type: str = ""


def _decoder(layers: str = "num_hidden_layers", **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        layers: 3,
        **more,
    }


def _gpt(**more: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, **_ENDS, **more}


def _bart(**more: Any) -> dict[str, Any]:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _SIDES.items()}
    depths = {"encoder_layers": 2, "decoder_layers": 3}
    return {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64, **_ENDS, **sizes, **depths, **more}


_SIDES = {"attention_heads": 4, "ffn_dim": 48}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 8,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, **_ENDS}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 4], "window_size": 4}

TEXT = "text"
VISION = "vision"
MODEL = "model"

_CAUSAL = "AutoModelForCausalLM"
_MASKED = "AutoModelForMaskedLM"
_SEQUENCES = "AutoModelForSeq2SeqLM"
_IMAGES = "AutoModelForImageClassification"
_IMAGE_TEXT = "AutoModelForImageTextToText"


def _lone(name: str, auto: str, config: Mapping[str, Any], tied: bool | None, depth: int = 3) -> Architecture:
    return Architecture(name, auto, config, {MODEL: depth}, tied)


def _pair(name: str, auto: str, config: Mapping[str, Any], tied: bool | None) -> Architecture:
    return Architecture(name, auto, config, {"encoder": 2, "decoder": 3}, tied)


def _seen(name: str, auto: str, config: Mapping[str, Any], tied: bool | None, **more: int) -> Architecture:
    return Architecture(name, auto, config, {TEXT: 3, VISION: 2, **more}, tied)


_LLAMA = _decoder(model_type="llama")

ARCHITECTURES: tuple[Architecture, ...] = (
    # Decoders.
    _lone("llama", _CAUSAL, _decoder(), False),
    Architecture("llama, tied", _CAUSAL, _decoder(tie_word_embeddings=True), {MODEL: 3}, True, "llama"),
    _lone("mistral", _CAUSAL, _decoder(), False),
    _lone("qwen2", _CAUSAL, _decoder(), False),
    Architecture("qwen2, tied", _CAUSAL, _decoder(tie_word_embeddings=True), {MODEL: 3}, True, "qwen2"),
    _lone("qwen3", _CAUSAL, _decoder(head_dim=8), False),
    _lone("gemma", _CAUSAL, _decoder(head_dim=8), True),
    _lone("gemma2", _CAUSAL, _decoder(head_dim=8), True),
    _lone("gemma3_text", _CAUSAL, _decoder(head_dim=8), True),
    _lone("phi", _CAUSAL, _decoder(), False),
    _lone("phi3", _CAUSAL, _decoder(), False),
    _lone("gpt2", _CAUSAL, _gpt(), True),
    _lone("gpt_neox", _CAUSAL, _decoder(), False),
    _lone("gpt_neo", _CAUSAL, {**_decoder("num_layers"), "num_heads": 4, "attention_types": [[["global"], 3]]}, True),
    _lone("gptj", _CAUSAL, _gpt(rotary_dim=4), False),
    _lone("gpt_bigcode", _CAUSAL, _gpt(), True),
    _lone("openai-gpt", _CAUSAL, _gpt(), True),
    _lone("codegen", _CAUSAL, _gpt(rotary_dim=4), False),
    _lone("opt", _CAUSAL, {**_decoder(), "ffn_dim": 48, "word_embed_proj_dim": 16}, True),
    _lone("bloom", _CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 3, **_ENDS}, True),
    _lone("falcon", _CAUSAL, _decoder(), True),
    _lone("mpt", _CAUSAL, {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, **_ENDS}, True),
    _lone("stablelm", _CAUSAL, _decoder(), False),
    _lone("olmo", _CAUSAL, _decoder(), False),
    _lone("olmo2", _CAUSAL, _decoder(), False),
    _lone("granite", _CAUSAL, _decoder(), False),
    _lone("cohere", _CAUSAL, _decoder(), True),
    _lone("cohere2", _CAUSAL, _decoder(), True),
    _lone("starcoder2", _CAUSAL, _decoder(), True),
    _lone("smollm3", _CAUSAL, _decoder(), True),
    _lone("nemotron", _CAUSAL, _decoder(), False),
    _lone("persimmon", _CAUSAL, _decoder(), False),
    _lone("glm4", _CAUSAL, _decoder(head_dim=8), False),
    _lone("biogpt", _CAUSAL, _decoder(), True),
    _lone("xglm", _CAUSAL, {**_decoder("num_layers"), "d_model": 32, "ffn_dim": 48, "attention_heads": 4}, True),
    _lone("ctrl", _CAUSAL, {"vocab_size": VOCABULARY, "n_embd": 32, "dff": 48, "n_head": 4, "n_layer": 3}, True),
    _lone("olmo3", _CAUSAL, _decoder(), False),
    _lone("arcee", _CAUSAL, _decoder(), False),
    _lone("helium", _CAUSAL, _decoder(head_dim=8), False),
    _lone("ernie4_5", _CAUSAL, _decoder(head_dim=8), True),
    _lone("exaone4", _CAUSAL, _decoder(head_dim=8), False),
    _lone("seed_oss", _CAUSAL, _decoder(head_dim=8), False),
    _lone("lfm2", _CAUSAL, _decoder(), True),
    # Mixtures of experts.
    _lone("mixtral", _CAUSAL, _decoder(num_local_experts=4), False),
    _lone("qwen2_moe", _CAUSAL, _decoder(shared_expert_intermediate_size=16, **_EXPERTS), False),
    _lone("qwen3_moe", _CAUSAL, _decoder(head_dim=8, **_EXPERTS), False),
    _lone("olmoe", _CAUSAL, _decoder(num_experts=4, num_experts_per_tok=2), False),
    _lone(
        "deepseek_v3",
        _CAUSAL,
        _decoder(
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            **_LATENT,
        ),
        False,
    ),
    _lone("gpt_oss", _CAUSAL, _decoder(head_dim=8, num_local_experts=4, num_experts_per_tok=2), False),
    _lone("granitemoe", _CAUSAL, _decoder(num_local_experts=4), False),
    _lone("phimoe", _CAUSAL, _decoder(num_local_experts=4), False),
    _lone("minimax", _CAUSAL, _decoder(num_local_experts=4, head_dim=8, block_size=8), False),
    # State-space and recurrent models.
    _lone(
        "falcon_mamba",
        _CAUSAL,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3},
        True,
    ),
    _lone("bamba", _CAUSAL, _decoder(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, attn_layer_indices=[1]), False),
    _lone(
        "qwen3_next",
        _CAUSAL,
        _decoder(
            head_dim=8,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=16,
            **_EXPERTS,
        ),
        False,
    ),
    _lone(
        "mamba", _CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3}, True
    ),
    _lone(
        "mamba2",
        _CAUSAL,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            **_ENDS,
        },
        False,
    ),
    _lone(
        "jamba",
        _CAUSAL,
        _decoder(num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        False,
    ),
    _lone("rwkv", _CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3}, False),
    _lone(
        "recurrent_gemma",
        _CAUSAL,
        _decoder(lru_width=32, attention_window_size=16, num_attention_heads=4, head_dim=8),
        True,
    ),
    # Encoders.
    _lone("bert", _MASKED, _decoder(), True),
    Architecture("bert, no head", "AutoModel", _decoder(), {MODEL: 3}, True, "bert"),
    _lone("roberta", _MASKED, _decoder(), True),
    _lone("xlm-roberta", _MASKED, _decoder(), True),
    _lone("deberta-v2", _MASKED, _decoder(relative_attention=True, pos_att_type=["p2c", "c2p"]), True),
    _lone(
        "distilbert",
        _MASKED,
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 3},
        True,
    ),
    _lone("electra", _MASKED, _decoder(embedding_size=16), True),
    _lone("albert", _MASKED, _decoder(embedding_size=16), True, depth=1),
    _lone("modernbert", _MASKED, _decoder(), True),
    _lone("mpnet", _MASKED, _decoder(), True),
    _lone("convbert", _MASKED, _decoder(embedding_size=16), True),
    _lone(
        "xlnet",
        "XLNetLMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
        True,
    ),
    _lone("xlm", "XLMWithLMHeadModel", {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4}, True),
    _lone("esm", _MASKED, _decoder(mask_token_id=3), True),
    _lone("layoutlm", _MASKED, _decoder(), True),
    _lone("rembert", _MASKED, _decoder(input_embedding_size=16, output_embedding_size=16), False),
    _lone("fnet", _MASKED, _decoder(), True),
    _lone("mobilebert", _MASKED, _decoder(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16), True),
    _lone("megatron-bert", _MASKED, _decoder(), True),
    Architecture(
        "funnel",
        _MASKED,
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [2, 3],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "num_decoder_layers": 1,
        },
        {"encoder": 5, "decoder": 1},
        True,
    ),
    # Encoder–decoders.
    _pair("mt5", _SEQUENCES, {**_T5, "num_decoder_layers": 3}, True),
    _pair("longt5", _SEQUENCES, {**_T5, "num_decoder_layers": 3}, True),
    _pair("switch_transformers", _SEQUENCES, {**_T5, "num_decoder_layers": 3, "num_experts": 2}, True),
    _pair(
        "led",
        _SEQUENCES,
        {
            **_bart(),
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
            "attention_window": 8,
        },
        True,
    ),
    _pair(
        "prophetnet",
        _SEQUENCES,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 3,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            **_ENDS,
        },
        True,
    ),
    _pair(
        "t5gemma",
        _SEQUENCES,
        {
            "encoder": {**_decoder(head_dim=8), "num_hidden_layers": 2},
            "decoder": _decoder(head_dim=8),
            "vocab_size": VOCABULARY,
        },
        True,
    ),
    _pair("t5", _SEQUENCES, {**_T5, "num_decoder_layers": 3}, True),
    _pair("bart", _SEQUENCES, _bart(), True),
    _pair("mbart", _SEQUENCES, _bart(), True),
    _pair("pegasus", _SEQUENCES, _bart(), True),
    _pair("marian", _SEQUENCES, _bart(decoder_start_token_id=0), True),
    _pair("m2m_100", _SEQUENCES, _bart(), True),
    _pair("blenderbot", _SEQUENCES, _bart(), True),
    _pair(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        _bart(num_mel_bins=8, max_source_positions=16, max_target_positions=16),
        True,
    ),
    # Vision.
    _lone("vit", _IMAGES, {**_VISION, "num_hidden_layers": 3}, None),
    _lone("dinov2", _IMAGES, {**_VISION, "num_hidden_layers": 3}, None),
    _lone("beit", _IMAGES, {**_VISION, "num_hidden_layers": 3, "use_relative_position_bias": True}, None),
    _lone(
        "swin",
        _IMAGES,
        _SWIN,
        None,
        depth=5,
    ),
    _lone("convnext", _IMAGES, {"hidden_sizes": [8, 16], "depths": [2, 3], "num_stages": 2}, None, depth=5),
    _lone(
        "resnet",
        _IMAGES,
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 3], "layer_type": "basic"},
        None,
        depth=5,
    ),
    Architecture(
        "clip",
        "AutoModel",
        {"text_config": _decoder(), "vision_config": dict(_VISION), "projection_dim": 16},
        {TEXT: 3, VISION: 2},
        None,
    ),
    Architecture(
        "siglip",
        "AutoModel",
        {"text_config": _decoder(), "vision_config": dict(_VISION)},
        {TEXT: 3, VISION: 2},
        None,
    ),
    _lone("swinv2", _IMAGES, _SWIN, None, depth=5),
    _lone("dinov2_with_registers", _IMAGES, {**_VISION, "num_hidden_layers": 3}, None),
    _lone(
        "segformer",
        _IMAGES,
        {
            "num_encoder_blocks": 2,
            "depths": [2, 3],
            "hidden_sizes": [8, 16],
            "num_attention_heads": [2, 4],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        None,
        depth=5,
    ),
    _lone("poolformer", _IMAGES, {"depths": [2, 3, 1, 1], "hidden_sizes": [8, 8, 16, 16]}, None, depth=7),
    _lone(
        "regnet",
        _IMAGES,
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 3], "groups_width": 8},
        None,
        depth=5,
    ),
    # Sound.
    _lone(
        "wav2vec2",
        "AutoModelForCTC",
        {
            **_decoder(),
            "conv_dim": [8, 8],
            "conv_kernel": [3, 3],
            "conv_stride": [2, 2],
            "num_conv_pos_embedding_groups": 4,
            "num_conv_pos_embeddings": 8,
        },
        None,
    ),
    # Several parts.
    _seen(
        "gemma3",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(head_dim=8, model_type="gemma3_text"),
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
        True,
    ),
    _seen(
        "llava",
        _IMAGE_TEXT,
        {
            "text_config": _LLAMA,
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_index": 9,
        },
        False,
    ),
    _seen(
        "llava_next",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(model_type="mistral"),
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_index": 9,
        },
        False,
    ),
    _seen(
        "qwen2_vl",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(rope_parameters=_ROPE),
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        },
        False,
    ),
    _seen(
        "qwen2_5_vl",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(rope_parameters=_ROPE),
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 8,
                "out_hidden_size": 32,
            },
        },
        False,
    ),
    _seen(
        "paligemma",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(head_dim=8, model_type="gemma"),
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
            "projection_dim": 32,
            "image_token_index": 9,
        },
        True,
    ),
    _seen(
        "blip-2",
        _IMAGE_TEXT,
        {
            "text_config": {**_decoder(model_type="opt"), "ffn_dim": 48, "word_embed_proj_dim": 32},
            "vision_config": dict(_VISION),
            "qformer_config": {**_decoder("num_hidden_layers"), "num_hidden_layers": 4, "encoder_hidden_size": 32},
            "num_query_tokens": 4,
        },
        True,
        qformer=4,
    ),
    _seen(
        "idefics2",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(model_type="mistral"),
            "vision_config": dict(_VISION),
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_depth": 1,
                "resampler_n_latents": 4,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
        },
        False,
        resampler=1,
    ),
    _seen(
        "idefics3",
        _IMAGE_TEXT,
        {"text_config": _LLAMA, "vision_config": dict(_VISION), "scale_factor": 2},
        False,
    ),
    _seen(
        "mistral3",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(model_type="mistral"),
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
            "spatial_merge_size": 1,
        },
        True,
    ),
    _seen("smolvlm", _IMAGE_TEXT, {"text_config": _LLAMA, "vision_config": dict(_VISION), "scale_factor": 2}, False),
    _seen("internvl", _IMAGE_TEXT, {"text_config": _decoder(model_type="qwen2"), "vision_config": dict(_VISION)}, True),
    _seen(
        "aya_vision",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(model_type="cohere2"),
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        },
        True,
    ),
    _seen(
        "llama4",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(head_dim=8, num_local_experts=2, intermediate_size_mlp=48),
            "vision_config": {
                **_VISION,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            },
        },
        False,
    ),
    _seen(
        "qwen3_vl",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(head_dim=8, rope_parameters=_ROPE),
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 8,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
            },
        },
        False,
    ),
    _seen("blip", "BlipForConditionalGeneration", {"text_config": _decoder(), "vision_config": dict(_VISION)}, True),
    _seen("git", _CAUSAL, {**_decoder(), "vision_config": dict(_VISION)}, False),
    Architecture(
        "mllama",
        _IMAGE_TEXT,
        {
            "text_config": _decoder(cross_attention_layers=[1]),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "attention_heads": 4,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "image_size": 16,
                "patch_size": 8,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        },
        {TEXT: 3, "vision transformer": 2, "vision global_transformer": 1},
        False,
    ),
    _seen(
        "idefics",
        _IMAGE_TEXT,
        {
            **_decoder(),
            "vision_config": {
                "embed_dim": 32,
                "image_size": 16,
                "patch_size": 8,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
            },
            "use_resampler": False,
        },
        False,
        cross=3,
    ),
    Architecture(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": _decoder(model_type="qwen2"),
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "num_mel_bins": 8,
                "max_source_positions": 16,
            },
        },
        {TEXT: 3, "audio": 2},
        False,
    ),
)

BY_NAME: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in ARCHITECTURES})


def make(row: Architecture) -> Any:
    """The model, as transformers makes it, with random weights."""
    import transformers

    config = transformers.CONFIG_MAPPING[row.model_type or row.name](**row.config)
    factory = getattr(transformers, row.auto)
    return factory.from_config(config) if row.auto.startswith("Auto") else factory(config)


def write(row: Architecture, place: Path) -> Any:
    """The model, written by transformers into a directory."""
    model = make(row)
    model.save_pretrained(place)
    return model
