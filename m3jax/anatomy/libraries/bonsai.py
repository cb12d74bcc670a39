"""Bonsai's names and layout, as `nnx.state` of its models has them.

Source: bonsai/models/qwen3/params.py of jax-ml/bonsai, commit 3628425.
"""

import re

from m3jax.anatomy.libraries.mapping import BlockLayout, BlockStack, Facts, Library, LibraryRow, LibraryTable
from m3jax.errors import M3Error

_OUTSIDE = (
    LibraryRow("embedder.embedding", "model.embed_tokens.weight", "vocab width", "vocab width"),
    LibraryRow("final_norm.scale", "model.norm.weight", "width", "width"),
)
_HEAD = LibraryRow("lm_head.kernel", "lm_head.weight", "width vocab", "vocab width")
_BLOCK = (
    LibraryRow("input_layernorm.scale", "input_layernorm.weight", "width", "width"),
    LibraryRow("post_attention_layernorm.scale", "post_attention_layernorm.weight", "width", "width"),
    LibraryRow("attn.q_proj.kernel", "self_attn.q_proj.weight", "width heads dim", "(heads dim) width"),
    LibraryRow("attn.k_proj.kernel", "self_attn.k_proj.weight", "width kv dim", "(kv dim) width"),
    LibraryRow("attn.v_proj.kernel", "self_attn.v_proj.weight", "width kv dim", "(kv dim) width"),
    LibraryRow("attn.o_proj.kernel", "self_attn.o_proj.weight", "heads dim width", "width (heads dim)"),
    LibraryRow("attn.q_norm.scale", "self_attn.q_norm.weight", "dim", "dim"),
    LibraryRow("attn.k_norm.scale", "self_attn.k_norm.weight", "dim", "dim"),
    LibraryRow("mlp.gate_proj.kernel", "mlp.gate_proj.weight", "width inner", "inner width"),
    LibraryRow("mlp.up_proj.kernel", "mlp.up_proj.weight", "width inner", "inner width"),
    LibraryRow("mlp.down_proj.kernel", "mlp.down_proj.weight", "inner width", "width inner"),
)


def _table(facts: Facts, layout: BlockLayout) -> LibraryTable:
    if facts.tied:
        raise M3Error(
            "bonsai keeps an output embedding of its own where config.json ties it to the input's, so that neither is"
            " made of the other: give a config.json with tie_word_embeddings false, and weights that have lm_head"
        )
    return LibraryTable(
        (*_OUTSIDE, _HEAD),
        tuple(BlockStack(f"layers.{layer}", (layer,), None, _BLOCK) for layer in range(facts.layers)),
    )


BONSAI = Library(
    name="bonsai",
    models=("qwen3",),
    traces=re.compile(r"^layers\.\d+\.attn\.q_proj\.kernel$"),
    table=_table,
    spelled=lambda canonical: f"{canonical}.value",
)
