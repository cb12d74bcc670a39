"""Tunix's names and layout, as `nnx.state` of its models has them.

Source: tunix/models/{llama3,qwen2,qwen3}/params.py and {gemma,gemma3}/params_safetensors.py of google/tunix, commit
c7d8950.
"""

import re

from m3jax.anatomy.libraries import gemma
from m3jax.anatomy.libraries.mapping import BlockLayout, BlockStack, Facts, Library, LibraryRow, LibraryTable

_MLP = (
    LibraryRow("mlp.gate_proj.kernel", "mlp.gate_proj.weight", "width inner", "inner width"),
    LibraryRow("mlp.up_proj.kernel", "mlp.up_proj.weight", "width inner", "inner width"),
    LibraryRow("mlp.down_proj.kernel", "mlp.down_proj.weight", "inner width", "width inner"),
)
_OUTSIDE = (
    LibraryRow("embedder.input_embedding", "model.embed_tokens.weight", "vocab width", "vocab width"),
    LibraryRow("final_norm.w", "model.norm.weight", "width", "width"),
)
_HEAD = LibraryRow("lm_head.w", "lm_head.weight", "width vocab", "vocab width")
_BLOCK = (
    LibraryRow("input_layernorm.w", "input_layernorm.weight", "width", "width"),
    LibraryRow("post_attention_layernorm.w", "post_attention_layernorm.weight", "width", "width"),
    LibraryRow("attn.q_proj.w", "self_attn.q_proj.weight", "width heads dim", "(heads dim) width"),
    LibraryRow("attn.k_proj.w", "self_attn.k_proj.weight", "width kv dim", "(kv dim) width"),
    LibraryRow("attn.v_proj.w", "self_attn.v_proj.weight", "width kv dim", "(kv dim) width"),
    LibraryRow("attn.o_proj.w", "self_attn.o_proj.weight", "heads dim width", "width (heads dim)"),
    *_MLP,
)
_BESIDE = {
    "qwen2": tuple(
        LibraryRow(
            f"attn.{part}_bias", f"self_attn.{part}_proj.bias", f"({heads} dim)", f"({heads} dim)", optional=True
        )
        for part, heads in (("q", "heads"), ("k", "kv"), ("v", "kv"))
    ),
    "qwen3": (
        LibraryRow("attn.q_norm.w", "self_attn.q_norm.weight", "dim", "dim"),
        LibraryRow("attn.k_norm.w", "self_attn.k_norm.weight", "dim", "dim"),
    ),
}


def _table(facts: Facts, layout: BlockLayout) -> LibraryTable:
    if facts.model_type.startswith("gemma"):
        behind_attention = "post_attention_norm" if facts.model_type == "gemma3_text" else "post_attn_norm"
        rows = (*gemma.norms(facts, behind_attention), *gemma.attention(facts), *_MLP)
        rows += gemma.HEAD_NORMS if facts.model_type == "gemma3_text" else ()
        outside = gemma.OUTSIDE
    else:
        rows = (*_BLOCK, *_BESIDE.get(facts.model_type, ()))
        outside = (*_OUTSIDE, *(() if facts.tied else (_HEAD,)))
    return LibraryTable(
        outside, tuple(BlockStack(f"layers.{layer}", (layer,), None, rows) for layer in range(facts.layers))
    )


TUNIX = Library(
    name="tunix",
    models=("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    # Gemma's attention is called as in its own library, but the gates are not.
    traces=re.compile(r"^layers\.\d+\.attn\.(?:q_proj|q_einsum|qkv_einsum)\.w$"),
    table=_table,
    spelled=lambda canonical: f"{canonical}.value",
)
