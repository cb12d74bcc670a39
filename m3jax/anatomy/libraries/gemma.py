"""The names and layout of Gemma's own library, as `gm.ckpts` saves them.

Source: gemma/gm/nn/_modules.py, _gemma.py and _layers.py of google-deepmind/gemma, commit 7691fd4.
"""

import re

from m3jax.anatomy.libraries.mapping import BlockLayout, BlockStack, Facts, Library, LibraryRow, LibraryTable

_GEMMA2_2B = 2304  # the width of the one model since Gemma 2 whose gates lie [inputs, outputs]
OUTSIDE = (
    LibraryRow("embedder.input_embedding", "model.embed_tokens.weight", "vocab width", "vocab width"),
    LibraryRow("final_norm.scale", "model.norm.weight", "width", "width"),
)
HEAD_NORMS = (
    LibraryRow("attn._query_norm.scale", "self_attn.q_norm.weight", "dim", "dim"),
    LibraryRow("attn._key_norm.scale", "self_attn.k_norm.weight", "dim", "dim"),
)


def attention(facts: Facts) -> tuple[LibraryRow, ...]:
    """Projections: queries, keys and values in one tensor where there are as many of each."""
    out = LibraryRow("attn.attn_vec_einsum.w", "self_attn.o_proj.weight", "heads dim width", "width (heads dim)")
    if facts.sizes["heads"] == facts.sizes["kv"]:
        theirs, lying = "self_attn.{part}_proj.weight", ("part heads width dim", "(heads dim) width")
        return out, LibraryRow("attn.qkv_einsum.w", theirs, *lying, parts=("q", "k", "v"))
    return (
        out,
        LibraryRow("attn.q_einsum.w", "self_attn.q_proj.weight", "heads width dim", "(heads dim) width"),
        LibraryRow(
            "attn.kv_einsum.w", "self_attn.{part}_proj.weight", "part kv width dim", "(kv dim) width", parts=("k", "v")
        ),
    )


def norms(facts: Facts, behind_attention: str) -> tuple[LibraryRow, ...]:
    """Norms around, or in Gemma 1 before, attention and feed-forward layer.

    Args:
        facts: What config.json says.
        behind_attention: What the norm behind attention is called.
    """
    first = LibraryRow("pre_attention_norm.scale", "input_layernorm.weight", "width", "width")
    if facts.model_type == "gemma":
        return first, LibraryRow("pre_ffw_norm.scale", "post_attention_layernorm.weight", "width", "width")
    return (
        first,
        LibraryRow(f"{behind_attention}.scale", "post_attention_layernorm.weight", "width", "width"),
        LibraryRow("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", "width", "width"),
        LibraryRow("post_ffw_norm.scale", "post_feedforward_layernorm.weight", "width", "width"),
    )


def _table(facts: Facts, layout: BlockLayout) -> LibraryTable:
    lying = ["part inner width", "part width inner"]
    if facts.model_type == "gemma" or (facts.model_type == "gemma2" and facts.sizes["width"] == _GEMMA2_2B):
        lying.reverse()
    rows = (
        *norms(facts, "post_attention_norm"),
        *attention(facts),
        *(HEAD_NORMS if facts.model_type == "gemma3_text" else ()),
        LibraryRow(
            "mlp.gating_einsum",
            "mlp.{part}_proj.weight",
            lying[0],
            "inner width",
            parts=("gate", "up"),
            other_axes=lying[1],
        ),
        LibraryRow("mlp.linear", "mlp.down_proj.weight", "inner width", "width inner"),
    )
    stacks = tuple(BlockStack(f"layers.{layer}", (layer,), None, rows) for layer in range(facts.layers))
    return LibraryTable(OUTSIDE, stacks)


def _spelled(canonical: str) -> str:
    return re.sub(r"^layers\.(\d+)\b", r"layer_\1", canonical)


GEMMA = Library(
    name="gemma",
    models=("gemma", "gemma2", "gemma3_text"),
    traces=re.compile(r"^layers\.\d+\.mlp\.gating_einsum(?:\.w)?$"),
    table=_table,
    spelled=_spelled,
)
