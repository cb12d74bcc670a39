"""Which stored tensor each parameter comes from, and how it lies in it: a table for each way of naming."""

import functools
import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

from m3jax.decoder.config import DecoderConfig

Shape: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[str | int, ...]
Cut: TypeAlias = tuple[str | None, ...]
"""The mesh axis over which each of the leading axes is cut."""


# --- How a parameter lies in a tensor ----------------------------------------------------------------------------


class Pick(NamedTuple):
    """An axis that the parameter has not: one of several things that a tensor holds side by side."""

    which: int
    among: int


class Heads(NamedTuple):
    """The parameter's first axis, heads, where the tensor holds those of query, key and value one after another."""

    part: int  # 0, 1 or 2


Layout: TypeAlias = tuple[tuple[int | Pick | Heads, ...], ...]
"""For each axis of the stored tensor, what it consists of: axes of the parameter by number, and other things."""

_VECTOR: Layout = ((0,),)
_AS_STORED: Layout = ((0,), (1,))  # [outputs, inputs]
_TURNED: Layout = ((1,), (0,))  # [inputs, outputs]
_HEADS_OUT: Layout = ((0, 1), (2,))  # [heads·width, inputs]
_HEADS_IN: Layout = ((0,), (1, 2))  # [outputs, heads·width]
_HEADS_IN_TURNED: Layout = ((1, 2), (0,))  # [heads·width, outputs]
_HEADS_BIAS: Layout = ((0, 1),)  # [heads·width]


class TensorView(NamedTuple):
    """A parameter, or one expert of it, as `stored.reshape(fine)[taken].transpose(order)`.

    Attributes:
        stored: Shape of the tensor.
        fine: The same with its axes taken apart.
        taken: For each of these an index, or a slice that is an axis of the parameter.
        order: Which of the remaining axes is each axis of the parameter.
    """

    stored: Shape
    fine: Shape
    taken: tuple[int | slice, ...]
    order: tuple[int, ...]

    def of(self, tensor: Any) -> Any:
        """The parameter in a tensor, an array of numpy or JAX."""
        found = tensor.reshape(self.fine)
        if any(one != slice(0, size) for one, size in zip(self.taken, self.fine, strict=True)):
            found = found[self.taken]
        return found if self.order == tuple(range(len(self.order))) else found.transpose(self.order)

    def part(self, index: tuple[slice, ...]) -> "TensorView":
        """The view of a part of the parameter.

        Args:
            index: Of each of the parameter's axes.
        """
        remaining = iter(range(len(self.order)))
        taken: list[int | slice] = []
        for one in self.taken:
            if isinstance(one, slice):
                start, stop, _ = index[self.order.index(next(remaining))].indices(one.stop - one.start)
                one = slice(one.start + start, one.start + stop)
            taken.append(one)
        return self._replace(taken=tuple(taken))


def view(layout: Layout, shape: Shape, config: DecoderConfig) -> TensorView:
    """How a parameter lies in its tensor.

    Args:
        layout: What the tensor's axes consist of.
        shape: Of the parameter, or of one expert of it.
        config: The decoder.
    """
    counts = config.num_heads, config.num_kv_heads, config.num_kv_heads
    fine: list[int] = []
    index: list[int | slice] = []
    axes: list[int] = []
    stored = []
    for group in layout:
        begin = len(fine)
        for one in group:
            if isinstance(one, Pick):
                fine.append(one.among)
                index.append(one.which)
            elif isinstance(one, Heads):
                start = sum(counts[: one.part])
                fine.append(sum(counts))
                index.append(slice(start, start + counts[one.part]))
                axes.append(0)
            else:
                fine.append(shape[one])
                index.append(slice(0, shape[one]))
                axes.append(one)
        stored.append(prod(fine[begin:]))
    order = tuple(axes.index(axis) for axis in range(len(axes)))
    return TensorView(tuple(stored), tuple(fine), tuple(index), order)


# --- The tables --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        pattern: Matches whole names of tensors; its groups are the block and, where experts are apart, the expert.
        path: Keys of the parameter; the block's number comes second.
        layout: How the parameter, or the expert's part of it, lies in the tensor.
        cut: The mesh axis over which each of the parameter's leading axes is cut.
    """

    pattern: str
    path: tuple[str, ...]
    layout: Layout
    cut: Cut


# Weights are cut along outputs over one axis and along inputs over the other, so that both axes share every large
# one; heads are whole on a device, and so are the small vectors and the experts.
_EMBEDDING_CUT: Cut = ("tp", "fsdp")
_CUTS: Mapping[str, Cut] = {
    **{f"attention.{part}.weight": ("tp", None, "fsdp") for part in ("query", "key", "value")},
    **{f"attention.{part}.bias": ("tp",) for part in ("query", "key", "value")},
    "attention.output.weight": ("fsdp", "tp"),
    "attention.sinks": ("tp",),
    **{f"feed_forward.{part}.weight": ("tp", "fsdp") for part in ("gate", "up")},
    **{f"feed_forward.{part}.bias": ("tp",) for part in ("gate", "up")},
    "feed_forward.down.weight": ("fsdp", "tp"),
}
_EXPERT_CUTS: Mapping[str, Cut] = {
    **{f"feed_forward.{part}.weight": (None, "tp", "fsdp") for part in ("gate", "up")},
    **{f"feed_forward.{part}.bias": (None, "tp") for part in ("gate", "up")},
    "feed_forward.down.weight": (None, "fsdp", "tp"),
    "feed_forward.router.weight": (None, "fsdp"),
}


def _block_row(prefix: str, name: str, path: str, layout: Layout, cuts: Mapping[str, Cut] = _CUTS) -> Row:
    """A row of every block; `#` in the name is an expert's number."""
    pattern = prefix + re.escape(name).replace(r"\#", "([0-9]+)")
    return Row(pattern, ("layers", *path.split(".")), layout, cuts.get(path, ()))


def _with_biases(prefix: str, name: str, path: str, weight: Layout, bias: Layout) -> tuple[Row, Row]:
    return (
        _block_row(prefix, f"{name}.weight", f"{path}.weight", weight),
        _block_row(prefix, f"{name}.bias", f"{path}.bias", bias),
    )


def _ends(embedding: str, norm: str, head: str) -> tuple[Row, ...]:
    """What is outside of the blocks."""
    return (
        Row(rf"{embedding}\.weight", ("embedding", "weight"), _AS_STORED, _EMBEDDING_CUT),
        Row(rf"{norm}\.weight", ("norm", "weight"), _VECTOR, ()),
        Row(rf"{norm}\.bias", ("norm", "bias"), _VECTOR, ()),
        Row(rf"{head}\.weight", ("head", "weight"), _AS_STORED, _EMBEDDING_CUT),
    )


_LLAMA = r"(?:model\.)?layers\.([0-9]+)\."
_QKV = ("query", "key", "value")
_LLAMA_ROWS = (
    *_ends(r"(?:model\.)?embed_tokens", r"(?:model\.)?norm", "lm_head"),
    *(
        row
        for part in _QKV
        for row in _with_biases(_LLAMA, f"self_attn.{part[0]}_proj", f"attention.{part}", _HEADS_OUT, _HEADS_BIAS)
    ),
    *_with_biases(_LLAMA, "self_attn.o_proj", "attention.output", _HEADS_IN, _VECTOR),
    _block_row(_LLAMA, "self_attn.q_norm.weight", "attention.query_norm.weight", _VECTOR),
    _block_row(_LLAMA, "self_attn.k_norm.weight", "attention.key_norm.weight", _VECTOR),
    *(
        row
        for part in ("gate", "up", "down")
        for row in _with_biases(_LLAMA, f"mlp.{part}_proj", f"feed_forward.{part}", _AS_STORED, _VECTOR)
    ),
    _block_row(_LLAMA, "input_layernorm.weight", "attention_norm.weight", _VECTOR),
)
# One name means two things: what follows attention in Gemma and OLMo precedes the feed-forward layer elsewhere.
_NORMS_BEHIND = (
    _block_row(_LLAMA, "post_attention_layernorm.weight", "after_attention_norm.weight", _VECTOR),
    _block_row(_LLAMA, "post_feedforward_layernorm.weight", "after_feed_forward_norm.weight", _VECTOR),
)
_NORMS: Mapping[str, tuple[Row, ...]] = {
    "before": (_block_row(_LLAMA, "post_attention_layernorm.weight", "feed_forward_norm.weight", _VECTOR),),
    "behind": _NORMS_BEHIND,
    "around": (
        _block_row(_LLAMA, "pre_feedforward_layernorm.weight", "feed_forward_norm.weight", _VECTOR),
        *_NORMS_BEHIND,
    ),
}

_PHI3_ROWS = (
    *(
        _block_row(_LLAMA, "self_attn.qkv_proj.weight", f"attention.{part}.weight", ((Heads(i), 1), (2,)))
        for i, part in enumerate(_QKV)
    ),
    *(
        _block_row(_LLAMA, "mlp.gate_up_proj.weight", f"feed_forward.{part}.weight", ((Pick(i, 2), 0), (1,)))
        for i, part in enumerate(("gate", "up"))
    ),
)


def _expert_rows(router: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Experts each for itself, as published, and all in one tensor, as transformers 5 has them in memory."""
    return (
        Row(
            rf"{_LLAMA}{router}\.weight",
            ("layers", "feed_forward", "router", "weight"),
            _AS_STORED,
            _EXPERT_CUTS["feed_forward.router.weight"],
        ),
        *(
            _block_row(_LLAMA, f"{name}.weight", f"feed_forward.{part}.weight", _AS_STORED, _EXPERT_CUTS)
            for part, name in names.items()
        ),
        *(
            _block_row(
                _LLAMA,
                "mlp.experts.gate_up_proj",
                f"feed_forward.{part}.weight",
                ((0,), (Pick(i, 2), 1), (2,)),
                _EXPERT_CUTS,
            )
            for i, part in enumerate(("gate", "up"))
        ),
        _block_row(_LLAMA, "mlp.experts.down_proj", "feed_forward.down.weight", ((0,), (1,), (2,)), _EXPERT_CUTS),
    )


_GPT_OSS_ROWS = (
    _block_row(_LLAMA, "self_attn.sinks", "attention.sinks", _VECTOR),
    _block_row(_LLAMA, "mlp.router.weight", "feed_forward.router.weight", _AS_STORED, _EXPERT_CUTS),
    _block_row(_LLAMA, "mlp.router.bias", "feed_forward.router.bias", _VECTOR, _EXPERT_CUTS),
    *(
        row
        for i, part in enumerate(("gate", "up"))
        for row in (
            _block_row(
                _LLAMA,
                "mlp.experts.gate_up_proj",
                f"feed_forward.{part}.weight",
                ((0,), (2,), (1, Pick(i, 2))),
                _EXPERT_CUTS,
            ),
            _block_row(
                _LLAMA,
                "mlp.experts.gate_up_proj_bias",
                f"feed_forward.{part}.bias",
                ((0,), (1, Pick(i, 2))),
                _EXPERT_CUTS,
            ),
        )
    ),
    _block_row(_LLAMA, "mlp.experts.down_proj", "feed_forward.down.weight", ((0,), (2,), (1,)), _EXPERT_CUTS),
    _block_row(_LLAMA, "mlp.experts.down_proj_bias", "feed_forward.down.bias", _AS_STORED, _EXPERT_CUTS),
)

_NEOX = r"(?:gpt_neox\.)?layers\.([0-9]+)\."
_NEOX_ROWS = (
    *_ends(r"(?:gpt_neox\.)?embed_in", r"(?:gpt_neox\.)?final_layer_norm", "(?:embed_out|lm_head)"),
    *(
        row
        for i, part in enumerate(_QKV)  # of each head in turn
        for row in _with_biases(
            _NEOX,
            "attention.query_key_value",
            f"attention.{part}",
            ((0, Pick(i, 3), 1), (2,)),
            ((0, Pick(i, 3), 1),),
        )
    ),
    *_with_biases(_NEOX, "attention.dense", "attention.output", _HEADS_IN, _VECTOR),
    *_with_biases(_NEOX, "mlp.dense_h_to_4h", "feed_forward.up", _AS_STORED, _VECTOR),
    *_with_biases(_NEOX, "mlp.dense_4h_to_h", "feed_forward.down", _AS_STORED, _VECTOR),
    *_with_biases(_NEOX, "input_layernorm", "attention_norm", _VECTOR, _VECTOR),
    *_with_biases(_NEOX, "post_attention_layernorm", "feed_forward_norm", _VECTOR, _VECTOR),
)

_GPT2 = r"(?:transformer\.)?h\.([0-9]+)\."
_GPT2_ROWS = (
    *_ends(r"(?:transformer\.)?wte", r"(?:transformer\.)?ln_f", "lm_head"),
    Row(r"(?:transformer\.)?wpe\.weight", ("positions", "weight"), _AS_STORED, (None, "fsdp")),
    *(
        row
        for i, part in enumerate(_QKV)
        for row in _with_biases(
            _GPT2, "attn.c_attn", f"attention.{part}", ((2,), (Pick(i, 3), 0, 1)), ((Pick(i, 3), 0, 1),)
        )
    ),
    *_with_biases(_GPT2, "attn.c_proj", "attention.output", _HEADS_IN_TURNED, _VECTOR),
    *_with_biases(_GPT2, "mlp.c_fc", "feed_forward.up", _TURNED, _VECTOR),
    *_with_biases(_GPT2, "mlp.c_proj", "feed_forward.down", _TURNED, _VECTOR),
    *_with_biases(_GPT2, "ln_1", "attention_norm", _VECTOR, _VECTOR),
    *_with_biases(_GPT2, "ln_2", "feed_forward_norm", _VECTOR, _VECTOR),
)

_FAMILIES: Mapping[str, tuple[Row, ...]] = {
    # Rows beside those of Llama, whose names most families share.
    "Phi3ForCausalLM": _PHI3_ROWS,
    "Qwen3MoeForCausalLM": _expert_rows(
        r"mlp\.gate", {part: f"mlp.experts.#.{part}_proj" for part in ("gate", "up", "down")}
    ),
    "MixtralForCausalLM": _expert_rows(
        r"(?:block_sparse_moe|mlp)\.gate",
        {part: f"block_sparse_moe.experts.#.{name}" for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
    ),
    "GptOssForCausalLM": _GPT_OSS_ROWS,
}
_OTHERS: Mapping[str, tuple[Row, ...]] = {"GPTNeoXForCausalLM": _NEOX_ROWS, "GPT2LMHeadModel": _GPT2_ROWS}

# Not weights: buffers that old checkpoints saved, and the output layer of models that use the embedding instead.
_IGNORED = (
    r"(?:model\.)?(?:layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|(?:gpt_neox\.)?layers\.[0-9]+\.attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)"
    r"|(?:transformer\.)?h\.[0-9]+\.attn\.(?:bias|masked_bias)"
)
_IGNORED_IF_TIED = r"(?:lm_head|embed_out)\.weight"


@functools.lru_cache(maxsize=64)
def _rows(config: DecoderConfig) -> tuple[tuple[re.Pattern[str], Row], ...]:
    """The rows of a configuration."""
    rows = _OTHERS.get(config.architecture)
    if rows is None:
        rows = (*_LLAMA_ROWS, *_NORMS[config.norm_places], *_FAMILIES.get(config.architecture, ()))
    return tuple((re.compile(row.pattern), row) for row in rows)


def rank(layout: Layout) -> int:
    """How many axes of a parameter a tensor of this layout holds."""
    return sum(not isinstance(one, Pick) for group in layout for one in group)


class Target(NamedTuple):
    """Where a stored tensor, or a part of it, goes.

    Attributes:
        path: Keys of the parameter.
        expert: The leading index of the parameter that it fills; `None` is the whole.
        layout: How that lies in the tensor.
        cut: The mesh axis over which each of the parameter's leading axes is cut.
    """

    path: Path
    expert: int | None
    layout: Layout
    cut: Cut


def targets(name: str, config: DecoderConfig) -> list[Target]:
    """The parameters that a stored tensor may hold.

    Args:
        name: The tensor.
        config: The decoder.
    """
    found = []
    for pattern, row in _rows(config):
        match = pattern.fullmatch(name)
        if match:
            block, *expert = map(int, match.groups()) if match.groups() else (None,)
            path: Path = row.path if block is None else (row.path[0], block, *row.path[1:])
            found.append(Target(path, expert[0] if expert else None, row.layout, row.cut))
    return found


def is_ignored(name: str, config: DecoderConfig) -> bool:
    """Whether a stored tensor is no weight of the model.

    Args:
        name: The tensor.
        config: The decoder.
    """
    tied = config.tie_embeddings and re.fullmatch(_IGNORED_IF_TIED, name)
    return bool(tied or re.fullmatch(_IGNORED, name))
