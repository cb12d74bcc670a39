"""Tiny models of Hugging Face, and what JAX libraries would store of them: plain numpy, written from their sources."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m3jax.checkpoints import ShardWriter
from support.checkpoint_suite import info_of

Arrays = dict[str, np.ndarray]
WIDTH, INNER, NARROW, VOCAB, HEADS, KV, DIM, EXPERTS = 16, 20, 10, 24, 6, 2, 4, 3
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 6, 5, 4, 2, 3
DEPTHS = {"gemma2": 4, "gemma3_text": 14, "deepseek_v3": 3, "deepseek_v2": 3}


def configuration(model_type: str, **changed: Any) -> dict[str, Any]:
    """A config.json."""
    found = {
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "num_hidden_layers": DEPTHS.get(model_type, 2),
        "tie_word_embeddings": model_type.startswith("gemma"),
    }
    if model_type in {"mixtral", "qwen3_moe"}:
        found["num_local_experts" if model_type == "mixtral" else "num_experts"] = EXPERTS
    if model_type.startswith("deepseek"):
        found |= {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "kv_lora_rank": KV_RANK}
        found |= {"q_lora_rank": Q_RANK if model_type == "deepseek_v3" else None}
    return {**found, **changed}


def huggingface(config: dict[str, Any], seed: int = 0, dtype: Any = np.float32) -> Arrays:
    """Weights under Hugging Face's names; norms are eighths, so that 1 may be added to them without rounding."""
    rng = np.random.default_rng(seed)
    kind, heads, kv, dim = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"], DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for layer in range(config["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (WIDTH,)}
        block["post_attention_layernorm.weight"] = (WIDTH,)
        if kind.startswith("gemma"):
            block |= {f"{place}_feedforward_layernorm.weight": (WIDTH,) for place in ("pre", "post")}
        if kind.startswith("deepseek"):
            block |= _latent(config)
        else:
            block |= {f"self_attn.{p}_proj.weight": (n * dim, WIDTH) for p, n in (("q", heads), ("k", kv), ("v", kv))}
            block["self_attn.o_proj.weight"] = (WIDTH, heads * dim)
        if kind == "qwen2":
            block |= {f"self_attn.{p}_proj.bias": (n * dim,) for p, n in (("q", heads), ("k", kv), ("v", kv))}
        if kind in {"qwen3", "qwen3_moe", "gemma3_text"}:
            block |= {f"self_attn.{p}_norm.weight": (dim,) for p in "qk"}
        block |= _feed_forward(kind, layer >= config.get("first_k_dense_replace", 0))
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    made = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return {name: (np.round(x * 8) / 8 + 0).astype(dtype) if "norm" in name else x for name, x in made.items()}


def _latent(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    rows = HEADS * (NOPE + ROPE)
    block: dict[str, tuple[int, ...]] = {
        "self_attn.kv_a_layernorm.weight": (KV_RANK,),
        "self_attn.kv_a_proj_with_mqa.weight": (KV_RANK + ROPE, WIDTH),
        "self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), KV_RANK),
        "self_attn.o_proj.weight": (WIDTH, HEADS * VALUE),
    }
    if config["q_lora_rank"] is None:
        return {**block, "self_attn.q_proj.weight": (rows, WIDTH)}
    return {
        **block,
        "self_attn.q_a_layernorm.weight": (Q_RANK,),
        "self_attn.q_a_proj.weight": (Q_RANK, WIDTH),
        "self_attn.q_b_proj.weight": (rows, Q_RANK),
    }


def _feed_forward(kind: str, sparse: bool) -> dict[str, tuple[int, ...]]:
    def gated(prefix: str, inner: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Any:
        gate, up, down = (f"{prefix}.{name}.weight" for name in names)
        return {gate: (inner, WIDTH), up: (inner, WIDTH), down: (WIDTH, inner)}

    if kind == "mixtral":
        block = {"block_sparse_moe.gate.weight": (EXPERTS, WIDTH)}
        for expert in range(EXPERTS):
            block |= gated(f"block_sparse_moe.experts.{expert}", NARROW, ("w1", "w3", "w2"))
        return block
    if kind != "qwen3_moe" and not (kind.startswith("deepseek") and sparse):
        return dict(gated("mlp", INNER))
    block = {"mlp.gate.weight": (EXPERTS, WIDTH)}
    for expert in range(EXPERTS):
        block |= gated(f"mlp.experts.{expert}", NARROW)
    if kind.startswith("deepseek"):
        block |= gated("mlp.shared_experts", 2 * NARROW)
    if kind == "deepseek_v3":
        block["mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    return block


# --- MaxText ------------------------------------------------------------------------------------------------------


def _root(config: dict[str, Any]) -> np.float32:
    """By what the embedding is multiplied."""
    root = np.float32(np.sqrt(config["hidden_size"]))
    if config["model_type"] == "gemma3_text":
        return np.float32(root.astype(ml_dtypes.bfloat16))
    return root if config["model_type"] == "gemma2" else np.float32(1)


def _rope_type(config: dict[str, Any]) -> str | None:
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found.get("rope_type")


def maxtext(config: dict[str, Any], arrays: Arrays, scanned: bool, axis: int = 1) -> Arrays:
    """The tree of MaxText, by names joined with dots."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    root = _root(config)
    norm = arrays["model.norm.weight"]
    found = {
        "token_embedder.embedding": (arrays["model.embed_tokens.weight"] * root).astype(norm.dtype),
        "decoder.decoder_norm.scale": norm + np.ones((), norm.dtype) if kind.startswith("gemma") else norm,
    }
    if "lm_head.weight" in arrays:
        found["decoder.logits_dense.kernel"] = arrays["lm_head.weight"].T
    blocks = [
        _block(config, {n[len(p) :]: x for n, x in arrays.items() if n.startswith(p)})
        for p in (f"model.layers.{layer}." for layer in range(layers))
    ]
    stacks: dict[str, list[Arrays]] = {}
    if kind == "gemma2":
        for layer, block in enumerate(blocks):
            named = {_kind_of(name, ("local", "global")[layer % 2]): x for name, x in block.items()}
            if layer % 2:
                stacks["layers"][-1] |= named
            else:
                stacks.setdefault("layers", []).append(named)
    elif kind == "gemma3_text" and scanned:
        whole = layers // 6 * 6
        for layer, block in enumerate(blocks[:whole]):
            stacks.setdefault(f"layers.layers_{layer % 6}", []).append(block)
        for layer, block in enumerate(blocks[whole:]):
            found |= {f"decoder.layers_remainder.layers_{layer}.{name}": x for name, x in block.items()}
    elif kind.startswith("deepseek"):
        stacks = {"dense_layers": blocks[:1], "moe_layers": blocks[1:]}
    else:
        stacks = {"layers": blocks}
    for stack, own in stacks.items():
        if scanned:
            found |= {f"decoder.{stack}.{name}": np.stack([b[name] for b in own], axis) for name in own[0]}
        else:
            found |= {f"decoder.{stack}_{i}.{name}": x for i, block in enumerate(own) for name, x in block.items()}
    return {f"params.params.{name}": x for name, x in found.items()}


def _kind_of(name: str, kind: str) -> str:
    module, _, rest = name.partition(".")
    return f"{module}_{kind}.{rest}"


def _block(config: dict[str, Any], theirs: Arrays) -> Arrays:
    kind, heads, kv = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"]
    gemma = kind.startswith("gemma")
    names = (
        ("pre_self_attention_norm", "post_self_attention_norm")
        if gemma
        else ("pre_self_attention_layer_norm", "post_self_attention_layer_norm")
    )
    block = {
        f"{names[0]}.scale": theirs["input_layernorm.weight"],
        f"{names[1]}.scale": theirs["post_attention_layernorm.weight"],
    }
    if gemma:
        block |= {f"{p}_ffw_norm.scale": theirs[f"{p}_feedforward_layernorm.weight"] for p in ("pre", "post")}
    if "self_attn.q_norm.weight" in theirs:
        block["self_attention.query_norm.scale"] = theirs["self_attn.q_norm.weight"]
        block["self_attention.key_norm.scale"] = theirs["self_attn.k_norm.weight"]
    if gemma:
        block = {name: x + np.ones((), x.dtype) for name, x in block.items()}
    if kind.startswith("deepseek"):
        return block | _latent_block(theirs)
    for part, own, count in (("q", "query", heads), ("k", "key", kv), ("v", "value", kv)):
        kernel = theirs[f"self_attn.{part}_proj.weight"].T.reshape(width, count, -1)
        dim = kernel.shape[-1]
        if part != "v" and _rope_type(config) == "llama3":
            kernel = np.stack([kernel[..., : dim // 2], kernel[..., dim // 2 :]], -1).reshape(kernel.shape)
        if part == "q" and kind in {"llama", "mistral", "mixtral", "gemma2"}:
            kernel = (kernel / np.float32(np.sqrt(dim))).astype(kernel.dtype)
        block[f"self_attention.{own}.kernel"] = kernel
        if f"self_attn.{part}_proj.bias" in theirs:
            block[f"self_attention.{own}.bias"] = theirs[f"self_attn.{part}_proj.bias"].reshape(count, dim)
    block["self_attention.out.kernel"] = theirs["self_attn.o_proj.weight"].T.reshape(heads, -1, width)
    if kind == "mixtral":
        return block | _experts("MoeBlock_0", theirs, "block_sparse_moe", ("w1", "w3", "w2"))
    if kind == "qwen3_moe":
        return block | _experts("moe_block", theirs, "mlp", ("gate_proj", "up_proj", "down_proj"))
    return block | _gated("mlp", theirs, "mlp")


def _gated(own: str, theirs: Arrays, prefix: str) -> Arrays:
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    return {f"{own}.{mine}.kernel": theirs[f"{prefix}.{name}.weight"].T for mine, name in names.items()}


def _experts(own: str, theirs: Arrays, prefix: str, names: tuple[str, str, str]) -> Arrays:
    found = {f"{own}.gate.kernel": theirs[f"{prefix}.gate.weight"].T}
    for mine, name in zip(("wi_0", "wi_1", "wo"), names, strict=True):
        found[f"{own}.{mine}"] = np.stack(
            [theirs[f"{prefix}.experts.{expert}.{name}.weight"].T for expert in range(EXPERTS)]
        )
    return found


def _latent_block(theirs: Arrays) -> Arrays:
    block = {
        "self_attention.kv_norm.scale": theirs["self_attn.kv_a_layernorm.weight"],
        "self_attention.wkv_a.kernel": theirs["self_attn.kv_a_proj_with_mqa.weight"].T,
        "self_attention.wkv_b.kernel": theirs["self_attn.kv_b_proj.weight"].T.reshape(KV_RANK, HEADS, NOPE + VALUE),
        "self_attention.out.kernel": theirs["self_attn.o_proj.weight"].T.reshape(HEADS, VALUE, WIDTH),
    }
    if "self_attn.q_proj.weight" in theirs:
        kernel = theirs["self_attn.q_proj.weight"].T.reshape(WIDTH, HEADS, NOPE + ROPE)
        block["self_attention.query.kernel"] = kernel
    else:
        block["self_attention.q_norm.scale"] = theirs["self_attn.q_a_layernorm.weight"]
        block["self_attention.wq_a.kernel"] = theirs["self_attn.q_a_proj.weight"].T
        wq_b = theirs["self_attn.q_b_proj.weight"].T.reshape(Q_RANK, HEADS, NOPE + ROPE)
        block["self_attention.wq_b.kernel"] = wq_b
    if "mlp.gate.weight" not in theirs:
        return block | _gated("mlp", theirs, "mlp")
    prefix = "DeepSeekMoeBlock_0"
    block |= _experts(f"{prefix}.MoeBlock_0", theirs, "mlp", ("gate_proj", "up_proj", "down_proj"))
    if "mlp.gate.e_score_correction_bias" in theirs:
        block[f"{prefix}.MoeBlock_0.gate.bias"] = theirs["mlp.gate.e_score_correction_bias"]
    return block | _gated(f"{prefix}.shared_experts", theirs, "mlp.shared_experts")


# --- Gemma, Tunix, bonsai -----------------------------------------------------------------------------------------


def _heads_first(kernel: np.ndarray, count: int) -> np.ndarray:
    """[heads, inputs, width] of [heads·width, inputs]."""
    return kernel.reshape(count, DIM, WIDTH).transpose(0, 2, 1)


def _gemma_attention(config: dict[str, Any], theirs: Arrays, at: str) -> Arrays:
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (theirs[f"{at}.self_attn.{part}_proj.weight"] for part in "qkv")
    found = {"attn.attn_vec_einsum.w": theirs[f"{at}.self_attn.o_proj.weight"].T.reshape(heads, DIM, WIDTH)}
    if heads == kv:
        found["attn.qkv_einsum.w"] = np.stack([_heads_first(x, heads) for x in (q, k, v)])
    else:
        found["attn.q_einsum.w"] = _heads_first(q, heads)
        found["attn.kv_einsum.w"] = np.stack([_heads_first(x, kv) for x in (k, v)])
    if f"{at}.self_attn.q_norm.weight" in theirs:
        found["attn._query_norm.scale"] = theirs[f"{at}.self_attn.q_norm.weight"]
        found["attn._key_norm.scale"] = theirs[f"{at}.self_attn.k_norm.weight"]
    found["pre_attention_norm.scale"] = theirs[f"{at}.input_layernorm.weight"]
    found["pre_ffw_norm.scale"] = theirs[f"{at}.pre_feedforward_layernorm.weight"]
    found["post_ffw_norm.scale"] = theirs[f"{at}.post_feedforward_layernorm.weight"]
    return found


def gemma(config: dict[str, Any], arrays: Arrays, turned: bool = True) -> Arrays:
    """The tree of Gemma's library; `turned` where gates are [outputs, inputs]."""
    found = {
        "embedder.input_embedding": arrays["model.embed_tokens.weight"],
        "final_norm.scale": arrays["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        gates = [arrays[f"{at}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        block = {
            **_gemma_attention(config, arrays, at),
            "post_attention_norm.scale": arrays[f"{at}.post_attention_layernorm.weight"],
            "mlp.gating_einsum": np.stack(gates if turned else [gate.T for gate in gates]),
            "mlp.linear": arrays[f"{at}.mlp.down_proj.weight"].T,
        }
        found |= {f"layer_{layer}.{name}": x for name, x in block.items()}
    return found


def tunix(config: dict[str, Any], arrays: Arrays) -> Arrays:
    """The state of Tunix's model."""
    kind, heads, kv = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    is_gemma = kind.startswith("gemma")
    found = {"embedder.input_embedding": arrays["model.embed_tokens.weight"]}
    found["final_norm.scale" if is_gemma else "final_norm.w"] = arrays["model.norm.weight"]
    if "lm_head.weight" in arrays:
        found["lm_head.w"] = arrays["lm_head.weight"].T
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        block = {f"mlp.{part}_proj.kernel": arrays[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up", "down")}
        if is_gemma:
            after = "post_attention_norm" if kind == "gemma3_text" else "post_attn_norm"
            block |= _gemma_attention(config, arrays, at)
            block[f"{after}.scale"] = arrays[f"{at}.post_attention_layernorm.weight"]
        else:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                block[f"{norm}.w"] = arrays[f"{at}.{norm}.weight"]
            for part, count in (("q", heads), ("k", kv), ("v", kv)):
                weight = arrays[f"{at}.self_attn.{part}_proj.weight"]
                block[f"attn.{part}_proj.w"] = weight.T.reshape(WIDTH, count, DIM)
                if f"{at}.self_attn.{part}_proj.bias" in arrays:
                    block[f"attn.{part}_bias"] = arrays[f"{at}.self_attn.{part}_proj.bias"]
                if f"{at}.self_attn.{part}_norm.weight" in arrays:
                    block[f"attn.{part}_norm.w"] = arrays[f"{at}.self_attn.{part}_norm.weight"]
            block["attn.o_proj.w"] = arrays[f"{at}.self_attn.o_proj.weight"].T.reshape(heads, DIM, WIDTH)
        found |= {f"layers.{layer}.{name}": x for name, x in block.items()}
    return {f"{name}.value": x for name, x in found.items()}


def bonsai(config: dict[str, Any], arrays: Arrays) -> Arrays:
    """The state of bonsai's Qwen 3, which is Tunix's but for its names."""

    def named(name: str) -> str:
        name = name.removesuffix(".value")
        if name == "embedder.input_embedding":
            return "embedder.embedding"
        return name.removesuffix(".w") + (".scale" if "norm" in name else ".kernel") if name.endswith(".w") else name

    return {f"{named(name)}.value": x for name, x in tunix(config, arrays).items()}


# --- Files --------------------------------------------------------------------------------------------------------


def saved(file: Path, arrays: Arrays) -> Path:
    """Writes arrays to a file of safetensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(file, [info_of(*item) for item in arrays.items()]) as shard:
        for name, x in arrays.items():
            shard.write(name, 0, np.ascontiguousarray(x))
        shard.finish()
    return file


Making = Callable[[dict[str, Any], Arrays], Arrays]
