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
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama"},
    "llama-tied-biased": SIZES
    | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama3": SIZES
    | {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": SIZES | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": SIZES | {"model_type": "qwen3", "head_dim": 16},
    "gemma2": SIZES
    | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"},
}


def shapes(entries: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes of the tensors of a model."""
    kind, width, inner = entries["model_type"], entries["hidden_size"], entries["intermediate_size"]
    heads, kv_heads = entries["num_attention_heads"], entries["num_key_value_heads"]
    head = entries.get("head_dim", width // heads)
    qkv = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (entries["vocab_size"], width)}
    found["model.norm.weight"] = (width,)
    if not entries.get("tie_word_embeddings", kind == "gemma2"):
        found["lm_head.weight"] = (entries["vocab_size"], width)
    for i in range(entries["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, rows in qkv.items():
            found[f"{block}.self_attn.{name}_proj.weight"] = (rows, width)
            if kind == "qwen2" or entries.get("attention_bias"):
                found[f"{block}.self_attn.{name}_proj.bias"] = (rows,)
        found[f"{block}.self_attn.o_proj.weight"] = (width, heads * head)
        if entries.get("attention_bias"):
            found[f"{block}.self_attn.o_proj.bias"] = (width,)
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            found[f"{block}.mlp.{name}_proj.weight"] = shape
            if entries.get("mlp_bias"):
                found[f"{block}.mlp.{name}_proj.bias"] = shape[:1]
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma2" else []
        found |= {f"{block}.{norm}.weight": (width,) for norm in norms}
        if kind == "qwen3":
            found |= {f"{block}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    return found


def weights(entries: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, norms near one."""
    rng = np.random.default_rng(seed)
    offset = 0.0 if entries["model_type"] == "gemma2" else 1.0

    def draw(shape: tuple[int, ...], name: str) -> np.ndarray:
        noise = 0.3 * rng.standard_normal(shape, np.float32)
        return (noise * 0.3 + offset if "norm" in name else noise).astype(dtype)

    return {name: draw(shape, name) for name, shape in shapes(entries).items()}


BFLOAT16 = ml_dtypes.bfloat16
