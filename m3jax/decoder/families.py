"""The families of decoders: what their config.json says that sets one apart from another, a row each."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from m3jax.decoder.entries import Entries
from m3jax.decoder.rotary import Rope, read_rope

Features: TypeAlias = dict[str, Any]
"""Fields of a `DecoderConfig`."""


class Experts(NamedTuple):
    """Feed-forward layers side by side, of which each token takes a few.

    Attributes:
        number: How many there are.
        active: How many a token takes: those that the router likes best.
        width: Width of each.
        normalised: Whether the shares of those that a token takes add up to one; else they are what the router
            gives them among all.
        bias: Whether router and experts have biases.
        clamp: gpt-oss: the gain inside the gate's sigmoid, and the bound of gate and up projection; `None` is a
            gate as other layers have it.
    """

    number: int
    active: int
    width: int
    normalised: bool
    bias: bool = False
    clamp: tuple[float, float] | None = None


class DecoderFamily(NamedTuple):
    """One row of the table.

    Attributes:
        architecture: Name of the model class.
        read: From the file to what sets the family apart.
        names: What its files call entries that other families call by the key.
        defaults: What entries mean that a file does not state, where it is not what they mean elsewhere.
    """

    architecture: str
    read: Callable[[Entries], Features]
    names: Mapping[str, str] = MappingProxyType({"norm_eps": "rms_norm_eps"})
    defaults: Mapping[str, Any] = MappingProxyType({})


def head_dim(entries: Entries) -> int:
    """Width of a head."""
    return entries.count("head_dim", max(1, entries.count("hidden_size") // entries.count("num_attention_heads")))


# --- Features that several families share ------------------------------------------------------------------------


def _attention_bias(entries: Entries) -> Features:
    bias = entries.flag("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def _one_window(entries: Entries, default: int | None) -> Features:
    """All blocks have the same window; an explicit null is no window, an absent entry the family's."""
    window = entries.get("sliding_window", default)
    if window is None or (entries.states("sliding_window") and entries.entries["sliding_window"] is None):
        return {}
    return {"windows": (entries.count("sliding_window", default),) * entries.count("num_hidden_layers")}


def _windows(entries: Entries, kinds: Sequence[str]) -> tuple[int | None, ...]:
    """The window of each block, by `layer_types` if the file has it, or else by the architecture's rule."""
    kinds = entries.sequence("layer_types", kinds)
    window = entries.count("sliding_window", 4096)
    known: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    unknown = sorted({str(kind) for kind in kinds} - set(known))
    if unknown or len(kinds) != entries.count("num_hidden_layers"):
        fault = f"has the layer type {unknown[0]!r}" if unknown else f"has {len(kinds)} layer_types"
        raise entries.error(fault, f"give one of {', '.join(known)} for each block")
    return tuple(known[kind] for kind in kinds)


def _qwen_windows(entries: Entries) -> tuple[int | None, ...]:
    """The last blocks have a window, if any has."""
    layers = entries.count("num_hidden_layers")
    first, kinds = entries.get("max_window_layers", 28), entries.sequence("layer_types")
    if type(first) is not int:
        raise entries.error(f"has max_window_layers: {first!r}, not a whole number", "get the file from its source")
    entries.get("sliding_window")  # stated, and without meaning, where windows are not used
    if not entries.flag("use_sliding_window"):
        if "sliding_attention" in kinds:
            raise entries.error("has sliding layer_types and use_sliding_window: false", "make the two agree")
        return (None,) * layers
    return _windows(entries, ["full_attention" if i < first else "sliding_attention" for i in range(layers)])


def _softcaps(entries: Entries) -> Features:
    names = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {ours: None if entries.get(theirs) is None else entries.number(theirs) for ours, theirs in names.items()}


def _gemma_features(entries: Entries) -> Features:
    """What all Gemmas have."""
    entries.refuse("use_bidirectional_attention", False, "the decoder reads from left to right only")
    scale = {"norm_offset": 1.0, "embedding_scale": entries.count("hidden_size") ** 0.5}
    return _attention_bias(entries) | scale | {"tie_embeddings": entries.flag("tie_word_embeddings", True)}


# --- Readers -----------------------------------------------------------------------------------------------------


def _llama(entries: Entries) -> Features:
    return _attention_bias(entries) | {"mlp_bias": entries.flag("mlp_bias")}


def _mistral(entries: Entries) -> Features:
    return _one_window(entries, 4096)


def _qwen2(entries: Entries) -> Features:
    return {"qkv_bias": True, "windows": _qwen_windows(entries)}


def _qwen3(entries: Entries) -> Features:
    return _attention_bias(entries) | {"qk_norm": "head", "windows": _qwen_windows(entries)}


def _qwen3_moe(entries: Entries) -> Features:
    layers = entries.count("num_hidden_layers")
    step, dense = entries.count("decoder_sparse_step", 1), entries.sequence("mlp_only_layers")
    # Versions of transformers disagree on which blocks have the window.
    if entries.get("max_window_layers") and entries.flag("use_sliding_window"):
        raise entries.error("has use_sliding_window with max_window_layers", "take out the one that is not meant")
    window = _one_window(entries, 4096) if entries.flag("use_sliding_window") else {}
    entries.get("sliding_window")
    experts = Experts(
        _expert_count(entries),
        entries.count("num_experts_per_tok", 8),
        entries.count("moe_intermediate_size", 768),
        entries.flag("norm_topk_prob"),
    )
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    return _attention_bias(entries) | {"qk_norm": "head", "experts": experts, "sparse": sparse} | window


def _expert_count(entries: Entries) -> int:
    """Transformers 5 writes `num_local_experts` where version 4 wrote `num_experts`."""
    older = entries.get("num_experts")
    count = entries.count("num_local_experts", older)
    entries.refuse("num_experts", count, "make num_experts and num_local_experts agree")
    return count


def _mixtral(entries: Entries) -> Features:
    experts = Experts(
        _expert_count(entries), entries.count("num_experts_per_tok", 2), entries.count("intermediate_size"), True
    )
    sparse = (True,) * entries.count("num_hidden_layers")
    return {"experts": experts, "sparse": sparse} | _one_window(entries, None)


def _phi3(entries: Entries) -> Features:
    for name in ("full_attn_mod", "interpolate_factor"):  # stated in Phi-4 mini, and read nowhere
        entries.refuse(name, 1, "the decoder knows no other")
    rope = read_rope(entries, head_dim(entries), partial=True)
    return {"ropes": (rope,) * entries.count("num_hidden_layers")} | _one_window(entries, None)


def _gemma(entries: Entries) -> Features:
    activation = entries.get("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation  # what the first release meant
    entries.refuse("hidden_activation", activation, "make hidden_act and hidden_activation agree")
    return _gemma_features(entries) | {"activation": activation}


def _gemma2(entries: Entries) -> Features:
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(entries.count("num_hidden_layers"))]
    return _gemma_features(entries) | _softcaps(entries) | _gemma_blocks(entries, kinds)


def _gemma3(entries: Entries) -> Features:
    pattern, layers = entries.count("sliding_window_pattern", 6), entries.count("num_hidden_layers")
    kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    features = _gemma_features(entries) | _softcaps(entries) | _gemma_blocks(entries, kinds)
    far, near = _gemma3_ropes(entries)
    ropes = tuple(far if window is None else near for window in features["windows"])
    # Transformers reads an attn_logit_softcapping and does not apply it.
    if features["attention_softcap"] is not None:
        raise entries.error("has an attn_logit_softcapping", "Gemma 3 computes without: take it out")
    return features | {"qk_norm": "head", "ropes": ropes}


def _gemma_blocks(entries: Entries, kinds: Sequence[str]) -> Features:
    """What Gemma 2 and 3 have."""
    entries.refuse("hidden_act", entries.get("hidden_activation", "gelu_pytorch_tanh"), "name one activation")
    windows = _windows(entries, kinds)
    entries.refuse("sliding_window_size", entries.get("sliding_window", 4096), "make it agree with sliding_window")
    return {
        "windows": windows,
        "norm_places": "around",
        "query_scale": entries.number("query_pre_attn_scalar", 256) ** -0.5,
        "activation": entries.get("hidden_activation", "gelu_pytorch_tanh"),
    }


def _gemma3_ropes(entries: Entries) -> tuple[Rope, Rope]:
    """Of blocks that see everything, and of those with a window."""
    wide, stated = head_dim(entries), entries.get("rope_parameters", {})
    by_kind = isinstance(stated, dict) and {"full_attention", "sliding_attention"} & set(stated)
    local = entries.number("rope_local_base_freq", 10000.0)
    if not by_kind:
        return read_rope(entries, wide, theta=1e6), read_rope(entries, wide, stated={"rope_theta": local})
    kinds = Entries(stated, entries.where)
    far, near = (kinds.get(kind, {}) for kind in ("full_attention", "sliding_attention"))
    kinds.refuse_unread("Gemma 3 RoPE")
    near = {"rope_theta": local, **near} if isinstance(near, dict) else near
    return read_rope(entries, wide, stated=far, theta=1e6), read_rope(entries, wide, stated=near)


def _olmo2(entries: Entries) -> Features:
    return _attention_bias(entries) | {"qk_norm": "all", "norm_places": "behind"}


def _granite(entries: Entries) -> Features:
    return _llama(entries) | {
        "embedding_scale": entries.number("embedding_multiplier", 1.0),
        "residual_scale": entries.number("residual_multiplier", 1.0),
        "query_scale": entries.number("attention_multiplier", 1.0),
        "logit_scale": 1 / entries.number("logits_scaling", 1.0),
    }


def _smollm3(entries: Entries) -> Features:
    layers, interval = entries.count("num_hidden_layers"), entries.count("no_rope_layer_interval", 4)
    rotated = entries.sequence("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if len(rotated) < layers or not set(map(str, rotated)) <= {"0", "1"}:
        raise entries.error(f"has no_rope_layers: {rotated!r}", "give a 0 or a 1 for each block")
    kinds, window = entries.sequence("layer_types"), entries.get("sliding_window")
    entries.get("max_window_layers")  # Qwen's, and not read there
    uses = entries.flag("use_sliding_window")
    if "sliding_attention" in kinds and not uses:
        raise entries.error("has sliding layer_types and use_sliding_window: false", "make the two agree")
    near = [not on and uses and window is not None for on in rotated[:layers]]
    kinds = kinds or ["sliding_attention" if on else "full_attention" for on in near]
    windows = _windows(entries, kinds) if "sliding_attention" in kinds else (None,) * layers
    rope = read_rope(entries, head_dim(entries))
    return _llama(entries) | {
        "windows": windows,
        "ropes": tuple(rope if on else None for on in rotated[:layers]),
        "tie_embeddings": entries.flag("tie_word_embeddings", True),
    }


_GPT_OSS_ROPE = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)


def _gpt_oss(entries: Entries) -> Features:
    layers = entries.count("num_hidden_layers")
    entries.refuse("hidden_act", "silu", "gpt-oss has a gate of its own")
    active = entries.count("num_experts_per_tok", 4)
    entries.refuse("experts_per_token", active, "make it agree with num_experts_per_tok")
    entries.get("initial_context_length")  # of training; the rope parameters say it again
    clamp = entries.number("swiglu_alpha", 1.702), entries.number("swiglu_limit", 7.0)
    experts = Experts(_expert_count(entries), active, entries.count("intermediate_size"), True, True, clamp)
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    stated = entries.get("rope_parameters", entries.get("rope_scaling")) or dict(_GPT_OSS_ROPE)
    bias = entries.flag("attention_bias", True)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_sinks": True,
        "windows": _windows(entries, kinds),
        "ropes": (read_rope(entries, head_dim(entries), stated=stated, theta=150000.0),) * layers,
        "experts": experts,
        "sparse": (True,) * layers,
    }


def _gpt_neox(entries: Entries) -> Features:
    entries.refuse("num_key_value_heads", entries.count("num_attention_heads"), "GPT-NeoX has as many as heads")
    entries.refuse("head_dim", head_dim(entries), "GPT-NeoX has hidden_size / num_attention_heads")
    bias = entries.flag("attention_bias", True)
    rope = read_rope(entries, head_dim(entries), partial=True)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": True,
        "norm": "layer",
        "gated": False,
        "parallel": entries.flag("use_parallel_residual", True),
        "ropes": (rope,) * entries.count("num_hidden_layers"),
    }


def _gpt2(entries: Entries) -> Features:
    entries.refuse("scale_attn_by_inverse_layer_idx", False, "the decoder scales all blocks alike")
    entries.refuse("add_cross_attention", False, "the decoder reads one text only")
    entries.get("reorder_and_upcast_attn")  # in which order, not what
    entries.refuse("n_ctx", entries.count("max_position_embeddings", 1024), "make it agree with n_positions")
    scaled = entries.flag("scale_attn_weights", True)
    return {
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "norm": "layer",
        "gated": False,
        "learned_positions": True,
        "ropes": (None,) * entries.count("num_hidden_layers"),
        "query_scale": 1 / math.sqrt(head_dim(entries)) if scaled else 1.0,
        "tie_embeddings": entries.flag("tie_word_embeddings", True),
        "intermediate_size": entries.count("intermediate_size", 4 * entries.count("hidden_size")),
    }


_GPT2_NAMES = MappingProxyType(
    {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    }
)
_GEMMA_HEADS: Mapping[str, Any] = MappingProxyType({"head_dim": 256})

FAMILIES: Mapping[str, DecoderFamily] = MappingProxyType(
    {
        # model_type: class, what sets it apart, what its files call things, what they leave unsaid
        "llama": DecoderFamily("LlamaForCausalLM", _llama),
        "mistral": DecoderFamily("MistralForCausalLM", _mistral, defaults={"num_key_value_heads": 8}),
        "mixtral": DecoderFamily(
            "MixtralForCausalLM",
            _mixtral,
            defaults={"num_key_value_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8},
        ),
        "qwen2": DecoderFamily("Qwen2ForCausalLM", _qwen2),
        "qwen3": DecoderFamily("Qwen3ForCausalLM", _qwen3),
        "qwen3_moe": DecoderFamily("Qwen3MoeForCausalLM", _qwen3_moe, defaults={"num_key_value_heads": 4}),
        "phi3": DecoderFamily(
            "Phi3ForCausalLM", _phi3, defaults={"norm_eps": 1e-5, "original_max_position_embeddings": 4096}
        ),
        "gemma": DecoderFamily("GemmaForCausalLM", _gemma, defaults=_GEMMA_HEADS),
        "gemma2": DecoderFamily("Gemma2ForCausalLM", _gemma2, defaults={**_GEMMA_HEADS, "num_key_value_heads": 4}),
        "gemma3_text": DecoderFamily("Gemma3ForCausalLM", _gemma3, defaults={**_GEMMA_HEADS, "num_key_value_heads": 4}),
        "olmo2": DecoderFamily("Olmo2ForCausalLM", _olmo2, defaults={"norm_eps": 1e-5}),
        "granite": DecoderFamily("GraniteForCausalLM", _granite),
        "smollm3": DecoderFamily(
            "SmolLM3ForCausalLM", _smollm3, defaults={"num_key_value_heads": 4, "rope_theta": 2e6}
        ),
        "gpt_oss": DecoderFamily(
            "GptOssForCausalLM",
            _gpt_oss,
            defaults={"num_key_value_heads": 8, "head_dim": 64, "norm_eps": 1e-5, "sliding_window": 128},
        ),
        "gpt_neox": DecoderFamily(
            "GPTNeoXForCausalLM",
            _gpt_neox,
            {"norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
            {"norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25},
        ),
        "gpt2": DecoderFamily(
            "GPT2LMHeadModel",
            _gpt2,
            _GPT2_NAMES,
            {"norm_eps": 1e-5, "hidden_act": "gelu_new", "max_position_embeddings": 1024},
        ),
    }
)
