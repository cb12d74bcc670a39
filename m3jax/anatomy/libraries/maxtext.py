"""MaxText's names and layout.

Kernels are [inputs, outputs], with heads apart; blocks are stacked along axis 1 (`scan_layers`) or stand apart. Some
models divide queries by the root of a head's width, store Gemma's norms with 1 added and its embedding multiplied by
the root of its width, and interleave the halves of heads that rotary embeddings turn.

Source: maxtext/checkpoint_conversion/utils/param_mapping.py and layers/attentions.py of MaxText, commit e591f30.
"""

import re
from math import sqrt

import numpy as np

from m3jax.anatomy.libraries.mapping import BlockLayout, BlockStack, Facts, Library, LibraryRow, LibraryTable
from m3jax.checkpoints.views_permuted import Arithmetic
from m3jax.errors import M3Error

_HEAD = LibraryRow("decoder.logits_dense.kernel", "lm_head.weight", "width vocab", "vocab width")
_CYCLE = 6  # blocks of Gemma 3 from one global attention to the next


def _float32(value: float) -> float:
    return float(np.float32(value))


def _table(facts: Facts, layout: BlockLayout) -> LibraryTable:
    gemma = facts.model_type.startswith("gemma")
    outside = (_embedding(facts), _norm("decoder.decoder_norm.scale", "model.norm.weight", gemma))
    stacks = {
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "deepseek_v2": _deepseek,
        "deepseek_v3": _deepseek,
    }.get(facts.model_type, _plain)(facts, layout)
    note = None
    if _interleaves(facts):
        note = (
            "queries and keys lie as MaxText's rope_type llama3.1 has them, as config.json scales the rotary embedding"
        )
    return LibraryTable((*outside, *(() if facts.tied else (_HEAD,))), stacks, note)


def _embedding(facts: Facts) -> LibraryRow:
    row = LibraryRow("token_embedder.embedding", "model.embed_tokens.weight", "vocab width", "vocab width")
    if not facts.model_type.startswith("gemma"):
        return row
    root = _float32(sqrt(facts.sizes["width"]))
    if facts.model_type != "gemma2":
        root = _to_bfloat16(root)
    return row._replace(to_theirs=Arithmetic("over", root), from_theirs=Arithmetic("times", root))


def _to_bfloat16(value: float) -> float:
    import ml_dtypes

    return float(np.float32(np.array(value, ml_dtypes.bfloat16)))


def _norm(own: str, theirs: str, offset: bool = False, axis: str = "width") -> LibraryRow:
    row = LibraryRow(own, theirs, axis, axis)
    return row._replace(to_theirs=Arithmetic("plus", -1.0), from_theirs=Arithmetic("plus", 1.0)) if offset else row


def _interleaves(facts: Facts) -> bool:
    """Whether MaxText turns neighbours in a head, where Hugging Face turns its halves."""
    scaling = facts.config.get("rope_scaling") or facts.config.get("rope_parameters")
    told = scaling if isinstance(scaling, dict) else {}
    return facts.model_type == "llama" and told.get("rope_type", told.get("type")) == "llama3"


def _attention(facts: Facts, own: str = "self_attention", *, folds: bool) -> tuple[LibraryRow, ...]:
    """Projections of attention.

    Args:
        facts: What config.json says.
        own: What MaxText calls the module.
        folds: Whether queries are stored divided by the root of a head's width.
    """
    own_dim, their_dim = ("(half pair)", "pair half") if _interleaves(facts) else ("dim", "dim")
    query = LibraryRow(
        f"{own}.query.kernel", "self_attn.q_proj.weight", f"width heads {own_dim}", f"(heads {their_dim}) width"
    )
    if folds:
        root = sqrt(facts.sizes["dim"])
        query = query._replace(
            to_theirs=Arithmetic("times", _float32(root)), from_theirs=Arithmetic("times", _float32(1 / root))
        )
    return (
        query,
        LibraryRow(f"{own}.key.kernel", "self_attn.k_proj.weight", f"width kv {own_dim}", f"(kv {their_dim}) width"),
        LibraryRow(f"{own}.value.kernel", "self_attn.v_proj.weight", "width kv dim", "(kv dim) width"),
        LibraryRow(f"{own}.out.kernel", "self_attn.o_proj.weight", "heads dim width", "width (heads dim)"),
    )


def _mlp(own: str = "mlp", theirs: str = "mlp", inner: str = "inner") -> tuple[LibraryRow, ...]:
    return (
        LibraryRow(f"{own}.wi_0.kernel", f"{theirs}.gate_proj.weight", f"width {inner}", f"{inner} width"),
        LibraryRow(f"{own}.wi_1.kernel", f"{theirs}.up_proj.weight", f"width {inner}", f"{inner} width"),
        LibraryRow(f"{own}.wo.kernel", f"{theirs}.down_proj.weight", f"{inner} width", f"width {inner}"),
    )


def _experts(own: str, theirs: str, names: tuple[str, str, str]) -> tuple[LibraryRow, ...]:
    gate, up, down = (f"{theirs}.experts.{{expert}}.{name}.weight" for name in names)
    return (
        LibraryRow(f"{own}.gate.kernel", f"{theirs}.gate.weight", "width expert", "expert width"),
        LibraryRow(f"{own}.wi_0", gate, "expert width narrow", "narrow width"),
        LibraryRow(f"{own}.wi_1", up, "expert width narrow", "narrow width"),
        LibraryRow(f"{own}.wo", down, "expert narrow width", "width narrow"),
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_BIASES = tuple(
    LibraryRow(
        f"self_attention.{own}.bias",
        f"self_attn.{own[0]}_proj.bias",
        f"{heads} dim",
        f"({heads} dim)",
        optional=True,
    )
    for own, heads in (("query", "heads"), ("key", "kv"), ("value", "kv"))
)
_HEAD_NORMS = (
    _norm("self_attention.query_norm.scale", "self_attn.q_norm.weight", axis="dim"),
    _norm("self_attention.key_norm.scale", "self_attn.k_norm.weight", axis="dim"),
)
_BLOCK_NORMS = (
    _norm("pre_self_attention_layer_norm.scale", "input_layernorm.weight"),
    _norm("post_self_attention_layer_norm.scale", "post_attention_layernorm.weight"),
)


def _plain(facts: Facts, layout: BlockLayout) -> tuple[BlockStack, ...]:
    """Models whose blocks are all alike."""
    kind = facts.model_type
    rows = (*_BLOCK_NORMS, *_attention(facts, folds=kind in {"llama", "mistral", "mixtral"}))
    rows += _BIASES if kind == "qwen2" else ()
    rows += _HEAD_NORMS if kind in {"qwen3", "qwen3_moe"} else ()
    if kind == "mixtral":
        rows += _experts("MoeBlock_0", "block_sparse_moe", ("w1", "w3", "w2"))
    elif kind == "qwen3_moe":
        rows += _experts("moe_block", "mlp", _PROJECTIONS)
    else:
        rows += _mlp()
    return _stacks("decoder.layers", range(facts.layers), rows, layout)


def _stacks(own: str, layers: range, rows: tuple[LibraryRow, ...], layout: BlockLayout) -> tuple[BlockStack, ...]:
    """Blocks in one stack, or each for itself."""
    if layout.scanned:
        return (BlockStack(own, tuple(layers), layout.axis, rows),)
    return tuple(BlockStack(f"{own}.{number}", (layer,), None, rows) for number, layer in enumerate(layers))


def _gemma2(facts: Facts, layout: BlockLayout) -> tuple[BlockStack, ...]:
    """Two blocks of Hugging Face, of local and of global attention, are one of MaxText."""
    scalar = facts.config.get("query_pre_attn_scalar", facts.sizes["dim"])
    if scalar != facts.sizes["dim"]:
        raise M3Error(
            f"config.json divides queries by the root of query_pre_attn_scalar, {scalar}, but MaxText folds the root of"
            f" head_dim, {facts.sizes['dim']}, into Gemma 2's: keep this model as it is stored"
        )
    if facts.layers % 2:
        raise M3Error(f"config.json says num_hidden_layers {facts.layers}, but Gemma 2's blocks are pairs: correct it")
    found: tuple[BlockStack, ...] = ()
    for first, kind in enumerate(("local", "global")):
        rows = (
            _norm(f"pre_self_attention_norm_{kind}.scale", "input_layernorm.weight", True),
            _norm(f"post_self_attention_norm_{kind}.scale", "post_attention_layernorm.weight", True),
            _norm(f"pre_ffw_norm_{kind}.scale", "pre_feedforward_layernorm.weight", True),
            _norm(f"post_ffw_norm_{kind}.scale", "post_feedforward_layernorm.weight", True),
            *_attention(facts, f"self_attention_{kind}", folds=True),
            *_mlp(f"mlp_{kind}"),
        )
        found += _stacks("decoder.layers", range(first, facts.layers, 2), rows, layout)
    return found


def _gemma3(facts: Facts, layout: BlockLayout) -> tuple[BlockStack, ...]:
    """Scanned, every sixth block is in one stack, and those that are left over at the end stand apart."""
    rows = (
        _norm("pre_self_attention_norm.scale", "input_layernorm.weight", True),
        _norm("post_self_attention_norm.scale", "post_attention_layernorm.weight", True),
        _norm("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", True),
        _norm("post_ffw_norm.scale", "post_feedforward_layernorm.weight", True),
        _norm("self_attention.query_norm.scale", "self_attn.q_norm.weight", True, "dim"),
        _norm("self_attention.key_norm.scale", "self_attn.k_norm.weight", True, "dim"),
        *_attention(facts, folds=False),
        *_mlp(),
    )
    if not layout.scanned:
        return _stacks("decoder.layers", range(facts.layers), rows, layout)
    whole = facts.layers - facts.layers % _CYCLE
    found: tuple[BlockStack, ...] = ()
    for first in range(min(_CYCLE, whole)):
        found += _stacks(f"decoder.layers.layers.{first}", range(first, whole, _CYCLE), rows, layout)
    return found + _stacks("decoder.layers_remainder.layers", range(whole, facts.layers), rows, BlockLayout())


def _deepseek(facts: Facts, layout: BlockLayout) -> tuple[BlockStack, ...]:
    """Multi-head latent attention; the first blocks are dense, those behind have experts."""
    attention: tuple[LibraryRow, ...] = (
        *_BLOCK_NORMS,
        _norm("self_attention.kv_norm.scale", "self_attn.kv_a_layernorm.weight", axis="kv_rank"),
        LibraryRow("self_attention.wkv_a.kernel", "self_attn.kv_a_proj_with_mqa.weight", "width kv_in", "kv_in width"),
        LibraryRow(
            "self_attention.wkv_b.kernel",
            "self_attn.kv_b_proj.weight",
            "kv_rank heads kv_out",
            "(heads kv_out) kv_rank",
        ),
        LibraryRow(
            "self_attention.out.kernel", "self_attn.o_proj.weight", "heads out_dim width", "width (heads out_dim)"
        ),
    )
    if facts.config.get("q_lora_rank"):
        attention += (
            _norm("self_attention.q_norm.scale", "self_attn.q_a_layernorm.weight", axis="q_rank"),
            LibraryRow("self_attention.wq_a.kernel", "self_attn.q_a_proj.weight", "width q_rank", "q_rank width"),
            LibraryRow(
                "self_attention.wq_b.kernel", "self_attn.q_b_proj.weight", "q_rank heads q_dim", "(heads q_dim) q_rank"
            ),
        )
    else:
        attention += (
            LibraryRow(
                "self_attention.query.kernel", "self_attn.q_proj.weight", "width heads q_dim", "(heads q_dim) width"
            ),
        )
    block = "DeepSeekMoeBlock_0"
    experts: tuple[LibraryRow, ...] = (
        *_experts(f"{block}.MoeBlock_0", "mlp", _PROJECTIONS),
        *_mlp(f"{block}.shared_experts", "mlp.shared_experts", "shared"),
    )
    if facts.model_type == "deepseek_v3":
        experts += (_norm(f"{block}.MoeBlock_0.gate.bias", "mlp.gate.e_score_correction_bias", axis="expert"),)
    dense = facts.config.get("first_k_dense_replace") or 0
    if not isinstance(dense, int) or dense < 0:
        raise M3Error(f"config.json says first_k_dense_replace {dense!r:.50}, but it is a number of blocks: correct it")
    dense = min(dense, facts.layers)
    return (
        *_stacks("decoder.dense_layers", range(dense), (*attention, *_mlp()), layout),
        *_stacks("decoder.moe_layers", range(dense, facts.layers), (*attention, *experts), layout),
    )


def _spelled(canonical: str) -> str:
    return "params.params." + re.sub(r"(?<=layers)\.(?=\d+\.)", "_", canonical)


MAXTEXT = Library(
    name="maxtext",
    models=(
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"),
        *("deepseek_v2", "deepseek_v3"),
    ),
    traces=re.compile(r"^decoder\.decoder_norm\.scale$"),
    table=_table,
    spelled=_spelled,
    scans=True,
)
