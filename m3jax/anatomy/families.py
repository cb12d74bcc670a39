"""Facts about Hugging Face's architectures, by `model_type`: the one table of them.

Source: the configuration and modelling classes of transformers 5.24 (`tie_word_embeddings` of each configuration made
without arguments, `_tied_weights_keys` of each model), against which the tests compare this table.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Family(NamedTuple):
    """What is peculiar to an architecture.

    Attributes:
        model_type: As in config.json; None if it is not known.
        ties: Whether the output embedding is the input embedding where config.json is silent; None if unknown.
        depth: The keys of the depth in the configuration of a tower, in the order in which they are asked.
        staged: Whether blocks stand in stages, so that the depth is a sum.
        parallel: The lists that together are the blocks, where each kind of sublayer has a list of its own.
        shared: The keys whose product is the number of blocks stored, where several layers share one block.
        always_shared: Whether encoder and decoder read the embedding `shared` whatever config.json says of ties.
        words: A pattern of the input embedding, where its name is not one of the usual.
    """

    model_type: str | None = None
    ties: bool | None = None
    depth: tuple[str, ...] = ()
    staged: bool = False
    parallel: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    always_shared: bool = False
    words: str | None = None


def _types(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TIED = _types(
    """
    albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip
    blip_text_model bloom camembert canary cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text convbert
    cpmant csm ctrl d_fine dab-detr data2vec-text deberta deberta-v2 deepseek_vl deepseek_vl_hybrid deformable_detr
    deimv2 diffusion_gemma diffusion_gemma_text distilbert electra ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe
    ernie4_5_vl_moe_text esm falcon falcon_mamba flaubert flava florence2 fnet fun_asr_nano funnel gemma gemma2
    gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_assistant
    gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese granite_docling
    granite_docling_text granite_speech granite_speech5_ctc granite_speech_plus granite_swa grounding-dino gte
    hunyuan_vl hunyuan_vl_text hyperclovax_vision_v2 ibert internvl janus jetmoe jina_embeddings_v3 kimi_k25
    kosmos-2 kosmos-2.5 kosmos_2_5_text_model kosmos_2_text_model lara_mini layoutlm led lfm2 lfm2_moe lfm2_vl lfm3
    lfm3_vl lighton_ocr longformer longt5 luke lxmert m2m_100 mamba marian mbart megatron-bert mimi mimi_decoder
    mimi_encoder minicpm3 minicpm_ocr mistral3 mm-grounding-dino mobilebert modernbert modernbert-decoder moonshine
    moss_transcribe_diarize mpnet mpt mra mt5 mvp neomme nllb-moe nomic_bert nystromformer openai-gpt opt ovis2
    paddleocr_vl paddleocr_vl_text paligemma pe_audio_video pegasus pegasus_x plbart pop2piano pp_chart2table
    pp_doclayout_v3 pp_doclayout_v4 prophetnet qwen2_5_omni_text qwen3_asr qwen3_vl_moe_text recurrent_gemma roberta
    roberta-prelayernorm roc_bert roformer rt_detr_v2 sam sam_hq seamless_m4t seamless_m4t_v2 shieldgemma2 smollm3
    speech_to_text speecht5 squeezebert starcoder2 switch_transformers t5 t5_gemma_module t5gemma t5gemma2
    t5gemma2_decoder t5gemma2_encoder t5gemma2_text tapas trocr udop umt5 vaultgemma vilt visual_bert
    voxtral_realtime whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2 zaya
    """
)

_UNTIED = _types(
    """
    EvollaModel afmoe apertus apertus1p5 apertus1p5_text arcee aria aria_text axk1 axk2 bailing_hybrid bamba beam
    bitnet blt blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher bridgetower chameleon codegen
    cohere_asr cohere_compass cosmos3_edge cosmos3_edge_text cosmos3_omni cwm dbrx deepseek_ocr2
    deepseek_ocr2_encoder deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory
    dots1 dots3_note dots3_note_text emu3 emu3_text_model esmc eurobert evolla exaone exaone4 exaone4_5 exaone_moe
    falcon_h1 fast_vlm flex_olmo flint fsmt fuyu git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe
    glm4v_moe_text glm5_next glm5_next_text glm_image glm_moe_dsa glm_ocr glmga gpt_neox gpt_oss gptj granite
    granite4_vision granite4_vision_text granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
    higgs_audio_v2 hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text hyperclovax idefics
    idefics2 idefics3 imagegpt internlm3 iquestcoder jais2 jamba kimi_linear kolibri1 kyutai_speech_to_text laguna
    llama llama4 llama4_text llava llava_next llava_next_video llava_onevision longcat_flash mamba2 mellum
    mimo_v2_flash minicpmv4_6 minicpmv4_7 minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral ministral3
    mistral mistral4 mistral_large4 mistral_large4_text mixtral mllama_text_model modernvbert molmo2 molmo2_text
    moonshine_streaming moshi moshi_depth muse_glimmer_text muse_spark_text musicgen_decoder musicgen_melody_decoder
    nanochat nemotron nemotron_h neucodec olmo olmo2 olmo3 olmo_hybrid olmoe openai_privacy_filter perception_lm
    persimmon phi phi3 phi4_multimodal phimoe pix2struct pix2struct_text_model pp_formulanet_text qianfan_ocr qwen2
    qwen2_5_omni_talker qwen2_5_omni_thinker qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_talker_code_predictor
    qwen3_omni_moe_talker_text qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp qwen4_exp_text reformer
    rembert rwkv sarvam_mla sarvam_moe seed_oss smolvlm solar_open stablelm step3p5 ultrabert ultravbert
    unlimited_ocr unlimited_ocr_text vibevoice video_llama_3 video_llava vipllava xcodec2 xlstm
    """
)

_STAGED = _types(
    """
    bit convnext convnextv2 cvt dinat dinov3_convnext donut-swin efficientformer focalnet glpn hgnet_v2 hiera levit
    maskformer-swin nat poolformer pvt pvt_v2 regnet resnet rt_detr_resnet segformer swiftformer swin swin2sr swinv2
    van
    """
)
# XLM and Flaubert keep a list for each kind of sublayer.
SUBLAYERS = ("attentions", "ffns", "layer_norm1", "layer_norm15", "layer_norm2", "encoder_attn")
_EMBEDDINGS = r"(?:^|\.)embeddings\.weight$"

_PECULIAR: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "albert": {"shared": ("num_hidden_groups", "inner_group_num")},
        "xlm": {"parallel": SUBLAYERS, "words": r"(?:^|\.)transformer\.embeddings\.weight$"},
        "flaubert": {"parallel": SUBLAYERS, "words": r"(?:^|\.)transformer\.embeddings\.weight$"},
        "mamba": {"words": _EMBEDDINGS},
        "mamba2": {"words": _EMBEDDINGS},
        "falcon_mamba": {"words": _EMBEDDINGS},
        "xlstm": {"words": _EMBEDDINGS, "depth": ("num_blocks", "num_hidden_layers")},
        "rwkv": {"words": _EMBEDDINGS},
        "nemotron_h": {"words": _EMBEDDINGS},
        "cpmant": {"words": r"(?:^|\.)input_embedding\.weight$"},
        "ctrl": {"words": r"(?:^|\.)transformer\.w\.weight$"},
        **{
            name: {"always_shared": True}
            for name in ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano")
        },
        **{name: {"staged": True} for name in _STAGED},
    }
)


def family_of(model_type: object) -> Family:
    """What is known of an architecture; nothing peculiar for one that is not in the table, or is no name at all.

    Example:
        >>> family_of("gemma2").ties, family_of("llama").ties, family_of("unheard-of").ties
        (True, False, None)
    """
    if not isinstance(model_type, str):
        return Family()
    ties = True if model_type in _TIED else False if model_type in _UNTIED else None
    return Family(model_type, ties, **_PECULIAR.get(model_type, {}))


def known_ties() -> Mapping[str, bool]:
    """The default of `tie_word_embeddings` of every architecture in the table."""
    return {**dict.fromkeys(_TIED, True), **dict.fromkeys(_UNTIED, False)}


# --- config.json -----------------------------------------------------------------------------------------

_DEPTH = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "base_num_decoder_layers",
    "depth",
)
_DEPTH_BY_ROLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "encoder": ("encoder_layers", "num_encoder_layers", *_DEPTH),
        "decoder": ("decoder_layers", "num_decoder_layers", *_DEPTH),
        "vision": ("depth", *_DEPTH),
        "audio": ("encoder_layers", *_DEPTH),
        "resampler": ("resampler_depth", *_DEPTH),
        "mtp": ("mtp_num_hidden_layers", "num_nextn_predict_layers"),
    }
)
_SUBCONFIGS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "text": re.compile(r"^(?:text_config|llm_config|language_config|text_model_config|decoder|text_encoder)$"),
        "vision": re.compile(r"^(?:vision_config|vision_tower_config|vit_config|image_config|visual)$"),
        "audio": re.compile(r"^(?:audio_config|speech_config|audio_encoder|audio_encoder_config)$"),
        "qformer": re.compile(r"^qformer_config$"),
        "resampler": re.compile(r"^(?:perceiver_config|resampler_config)$"),
        "encoder": re.compile(r"^(?:encoder|encoder_config)$"),
        "decoder": re.compile(r"^(?:decoder|decoder_config)$"),
    }
)


def subconfig(config: Mapping[str, Any], role: str) -> Mapping[str, Any] | None:
    """The part of a configuration that is about one tower, wherever it is nested; None if there is no such part."""
    pattern = _SUBCONFIGS.get(role)
    if pattern is None:
        return None
    return next((part for key, part in _parts(config) if pattern.match(key)), None)


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    inside = [(key, value) for key, value in config.items() if isinstance(value, Mapping)]
    yield from inside
    for _, value in inside:
        yield from _parts(value)


def depth_of(config: Mapping[str, Any], role: str) -> int | None:
    """How many blocks a configuration says that a tower stores; None if it does not say.

    Args:
        config: config.json, or the like of a run in JAX.
        role: The tower's name.

    Example:
        >>> config = {"text_config": {"num_hidden_layers": 26}, "vision_config": {"num_hidden_layers": 27}}
        >>> depth_of(config, "text"), depth_of(config, "vision"), depth_of(config, "audio")
        (26, 27, None)
    """
    part = subconfig(config, role)
    if part is None:
        if role not in {"model", "text", "encoder", "decoder", "mtp"}:
            return None
        part = config
        if role == "model":  # the only tower that is stored of a model that may have had several
            part = config if _stated(config, _DEPTH) is not None else subconfig(config, "text") or config
    family = family_of(part.get("model_type"))
    if family.shared and all(isinstance(part.get(key), int) for key in family.shared):
        groups, inner = (int(part[key]) for key in family.shared)
        return groups * inner
    stages = next((part[key] for key in ("depths", "block_sizes") if isinstance(part.get(key), list | tuple)), None)
    if stages is not None and role != "decoder":
        return int(sum(stages))
    if family.staged:
        return None
    if family.depth:
        return _stated(part, family.depth)
    if part is config and role in {"encoder", "decoder"} and "text_config" in config:
        text: Mapping[str, Any] = config["text_config"]
        return depth_of(text, role)
    return _stated(part, _DEPTH_BY_ROLE.get(role, _DEPTH))


def _stated(part: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = part.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """How many tokens a configuration says that there are; None if it does not say."""
    for part in (subconfig(config, "text") or {}, config):
        value = part.get("vocab_size")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


# --- Names of vocabulary tensors -------------------------------------------------------------------------

FLAX_EMBEDDING = re.compile(r"(?:^|\.)(?:embedding|input_embedding)$")
CERTAIN_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|logits_dense|unembed)\.(?:weight|kernel|w)$")
