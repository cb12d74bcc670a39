"""Tiny decoders for tests: their config.json, and weights under Hugging Face's names, written out by hand."""

from typing import Any

import ml_dtypes
import numpy as np

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 8.0]}
NEOX_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama"},
    "llama-tied-biased": SIZES
    | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama3": SIZES
    | {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 5},
    "mixtral": SIZES | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2": SIZES | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": SIZES | {"model_type": "qwen3", "head_dim": 16},
    "qwen3-moe": SIZES
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"mlp_only_layers": [1], "norm_topk_prob": True},
    "phi3": SIZES
    | {"model_type": "phi3", "sliding_window": 40, "original_max_position_embeddings": 32, "rope_scaling": LONGROPE}
    | {"partial_rotary_factor": 0.5},
    "gemma": SIZES | {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None},
    "gemma2": SIZES
    | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3": SIZES
    | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2}
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "olmo2": SIZES | {"model_type": "olmo2"},
    "granite": SIZES
    | {"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    | {"logits_scaling": 8.0, "attention_multiplier": 0.1},
    "smollm3": SIZES | {"model_type": "smollm3", "no_rope_layers": [1, 0], "max_window_layers": 28},
    "gpt-oss": SIZES
    | {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5}
    | {"experts_per_token": 2, "initial_context_length": 16, "swiglu_limit": 7.0},
    "gpt-neox": NEOX_SIZES | {"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt2": GPT2_SIZES | {"model_type": "gpt2", "n_ctx": 128, "activation_function": "gelu_new", "eos_token_id": 2},
}
AROUND, BEHIND = ("gemma2", "gemma3_text"), ("olmo2",)
TIED = ("gemma", "gemma2", "gemma3_text", "smollm3", "gpt2")


def shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes of the tensors of a model."""
    if entries["model_type"] == "gpt2":
        return gpt2_shapes(entries)
    if entries["model_type"] == "gpt_neox":
        return gpt_neox_shapes(entries)
    kind, width, layers = entries["model_type"], entries["hidden_size"], entries["num_hidden_layers"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (entries["vocab_size"], width)}
    found["model.norm.weight"] = (width,)
    if not entries.get("tie_word_embeddings", kind in TIED):
        found["lm_head.weight"] = (entries["vocab_size"], width)
    norms = ["post_attention_layernorm"] + ["input_layernorm"] * (kind not in BEHIND)
    norms += ["pre_feedforward_layernorm"] * (kind in AROUND)
    norms += ["post_feedforward_layernorm"] * (kind in AROUND + BEHIND)
    for i in range(layers):
        block = f"model.layers.{i}"
        found |= {f"{block}.{norm}.weight": (width,) for norm in norms}
        parts = {**attention_shapes(entries), **feed_forward_shapes(entries, i)}
        found |= {f"{block}.{name}": shape for name, shape in parts.items()}
    return found


def attention_shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of one block."""
    kind, width = entries["model_type"], entries["hidden_size"]
    heads, kv_heads = entries["num_attention_heads"], entries["num_key_value_heads"]
    head = entries.get("head_dim", width // heads)
    rows = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    found: dict[str, tuple[int, ...]] = {"self_attn.o_proj.weight": (width, heads * head)}
    if kind == "phi3":
        return found | {"self_attn.qkv_proj.weight": (sum(rows.values()), width)}
    bias = entries.get("attention_bias", kind == "gpt_oss")
    for name, count in rows.items():
        found[f"self_attn.{name}_proj.weight"] = (count, width)
        if kind == "qwen2" or bias:
            found[f"self_attn.{name}_proj.bias"] = (count,)
    if bias:
        found["self_attn.o_proj.bias"] = (width,)
    if kind == "gpt_oss":
        found["self_attn.sinks"] = (heads,)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        found |= {f"self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    if kind == "olmo2":
        found |= {f"self_attn.{name}_norm.weight": (rows[name],) for name in ("q", "k")}
    return found


def feed_forward_shapes(entries: dict[str, Any], block: int) -> dict[str, tuple[int, ...]]:
    """Of one block."""
    kind, width, inner = entries["model_type"], entries["hidden_size"], entries["intermediate_size"]
    count = entries.get("num_local_experts", entries.get("num_experts", 0))
    found: dict[str, tuple[int, ...]] = {}
    if kind == "phi3":
        return {"mlp.gate_up_proj.weight": (2 * inner, width), "mlp.down_proj.weight": (width, inner)}
    if kind == "gpt_oss":
        return {
            "mlp.router.weight": (count, width),
            "mlp.router.bias": (count,),
            "mlp.experts.gate_up_proj": (count, width, 2 * inner),
            "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
            "mlp.experts.down_proj": (count, inner, width),
            "mlp.experts.down_proj_bias": (count, width),
        }
    if kind == "mixtral":
        found["block_sparse_moe.gate.weight"] = (count, width)
        for i in range(count):
            found |= {f"block_sparse_moe.experts.{i}.{name}.weight": (inner, width) for name in ("w1", "w3")}
            found[f"block_sparse_moe.experts.{i}.w2.weight"] = (width, inner)
        return found
    if kind == "qwen3_moe" and block not in entries["mlp_only_layers"]:
        inner = entries["moe_intermediate_size"]
        found["mlp.gate.weight"] = (count, width)
        for i in range(count):
            found |= {f"mlp.experts.{i}.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            found[f"mlp.experts.{i}.down_proj.weight"] = (width, inner)
        return found
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        found[f"mlp.{name}_proj.weight"] = shape
        if entries.get("mlp_bias"):
            found[f"mlp.{name}_proj.bias"] = shape[:1]
    return found


def gpt_neox_shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of GPT-NeoX and Pythia."""
    width, inner, vocab = entries["hidden_size"], entries["intermediate_size"], entries["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (vocab, width), "embed_out.weight": (vocab, width)}
    for i in range(entries["num_hidden_layers"]):
        block = f"gpt_neox.layers.{i}"
        weights = {
            "attention.query_key_value": (3 * width, width),
            "attention.dense": (width, width),
            "mlp.dense_h_to_4h": (inner, width),
            "mlp.dense_4h_to_h": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        found |= {f"{block}.{name}.weight": shape for name, shape in weights.items()}
        found |= {f"{block}.{name}.bias": shape[:1] for name, shape in weights.items()}
    return found | {f"gpt_neox.final_layer_norm.{name}": (width,) for name in ("weight", "bias")}


def gpt2_shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of GPT-2, whose weights are stored inputs first."""
    width, inner = entries["n_embd"], entries["n_inner"]
    found: dict[str, tuple[int, ...]] = {"wte.weight": (entries["vocab_size"], width)}
    found["wpe.weight"] = (entries["n_positions"], width)
    for i in range(entries["n_layer"]):
        weights = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
            "ln_1": (width,),
            "ln_2": (width,),
        }
        found |= {f"h.{i}.{name}.weight": shape for name, shape in weights.items()}
        found |= {f"h.{i}.{name}.bias": shape[-1:] for name, shape in weights.items()}
    return found | {f"ln_f.{name}": (width,) for name in ("weight", "bias")}


def weights(entries: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, norms near one."""
    rng = np.random.default_rng(seed)
    offset = 0.0 if entries["model_type"].startswith("gemma") else 1.0

    def draw(shape: tuple[int, ...], name: str) -> np.ndarray:
        noise = 0.3 * rng.standard_normal(shape, np.float32)
        is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
        return (noise * 0.3 + offset if is_norm else noise).astype(dtype)

    return {name: draw(shape, name) for name, shape in shapes(entries).items()}


BFLOAT16 = ml_dtypes.bfloat16
