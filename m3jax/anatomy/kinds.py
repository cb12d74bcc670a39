"""What a tensor is for, from its name and dtype; and how a model is quantised."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from m3jax.anatomy.types import Kind
from m3jax.checkpoints.protocol import TensorInfo

_SEPARATOR = re.compile(r"[./]")

# --- Training state, from names alone --------------------------------------------------------------------

_OPTIMIZERS = frozenset({"opt_state", "opt_states", "optimizer_state", "optimizer_states", "optim_state"})
_OPTIMIZER_ROOTS = frozenset({"optimizer", "opt", "optim"})
_INSIDE_OPTIMIZER = frozenset({"target", "model"})  # old flax.optim and nnx.Optimizer hold the model itself
_MOMENTS = re.compile(
    r"^(?:\d+\.|inner_state\.|inner_states\.[^.]+\.)+(?:mu|nu|trace|count|exp_avg|exp_avg_sq|sum_of_squares)(?:\.|$)"
)
_STEPS = frozenset({"step", "steps", "global_step", "step_count", "num_steps", "training_time_hours"})
_RANDOM = frozenset({"rng", "rngs", "dropout_rng", "rng_key", "prng_key", "rng_state", "nnx_aux", "RngState"})
_WRAPPING_STATE = frozenset({"state", "train_state", "items", "default"})


def state_kind(name: str) -> Kind | None:
    """Whether a tensor is a trainer's: "optimizer", "step" or "random"; None if it may be of the model.

    Example:
        >>> state_kind("opt_state.0.mu.params.dense.kernel"), state_kind("step.value"), state_kind("dense.kernel")
        ('optimizer', 'step', None)
    """
    path = _SEPARATOR.split(name)
    path = path[:-1] if len(path) > 1 and path[-1] == "value" else path
    while len(path) > 1 and path[0] in _WRAPPING_STATE:
        path = path[1:]
    if not _RANDOM.isdisjoint(path):
        return "random"
    if not _OPTIMIZERS.isdisjoint(path) or _MOMENTS.match(".".join(path)):
        return "optimizer"
    if path[-1] in _STEPS and len(path) <= 2:
        return "step"
    if path[0] in _OPTIMIZER_ROOTS and len(path) > 1 and path[1] not in _INSIDE_OPTIMIZER:
        return "optimizer"
    if path[0] in {"ema_params", "ema"}:
        return "optimizer"
    return None


def is_training_state(name: str) -> bool:
    """Whether a tensor belongs to training and not to the model."""
    return state_kind(name) is not None


# --- Adapters, statistics, buffers -----------------------------------------------------------------------

_ADAPTER = re.compile(
    r"(?:^|[._/])(?:lora_(?:embedding_)?[ABab]|lora_magnitude_vector|lora[._/][ab]|lora[._/](?:up|down)|lora[AB]|ia3_l|prompt_embeddings|oft_r|hada_w[12]_[ab]|"
    r"lokr_w[12](?:_[ab])?|vera_lambda_[bd]|prefix_encoder)(?=[._/]|$)"
)
_STATISTICS = re.compile(r"(?:^|\.)running_(?:mean|var)$|(?:^|\.)batch_stats\.")
_BUFFER = re.compile(
    r"(?:^|\.)(?:inv_freq|original_inv_freq|[\w]*_inv_freq|position_ids|token_type_ids|masked_bias|num_batches_tracked|"
    r"relative_position_index|relative_coords_table|cos_cached|sin_cached|cos_cache|sin_cache|freqs_cis|"
    r"causal_mask|attn_mask|embed_positions\.(?:_float_tensor|weights)|bert_position_ids|mel_filters|n_averaged|"
    r"slope_rate|query_decay|key_decay|diagonal_decay|inv_timescales|dft_mat_hidden|dft_mat_seq|token_ordering|"
    r"pos_idx_to_embed|af2_to_esm|summary_idxs|n(?:um)?_points_scale|attn_mask_probs|empty_weight|inited|cluster_size|"
    r"act_fn\.(?:beta|eps)|norm_mean|norm_std|global_mean|global_invstd|initialized|shared_(?:image_)?embedding\.positional_embedding|"
    r"(?:weight|bias)_integer|(?:act|fc|weight)_scaling_factor|cluster_usage|embed_avg|embed_sum|latent_mean|latent_std|latent_stats_num_updates|(?:input|output)_(?:min|max))$"
)
_CAUSAL_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attn|crossattention)(?:\.attention)?\.bias$")
_INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


def is_statistics(name: str, names: Mapping[str, Any]) -> bool:
    """Whether a tensor is a running mean or variance: by PyTorch's or linen's name, or NNX's `mean` beside `var`."""
    if _STATISTICS.search(name.removesuffix(".value")):
        return True
    parent, _, leaf = name.removesuffix(".value").rpartition(".")
    other = {"mean": "var", "var": "mean"}.get(leaf)
    return other is not None and any(f"{parent}.{other}{box}" in names for box in ("", ".value"))


def _is_causal_mask(info: TensorInfo) -> bool:
    shape = info.shape
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return square and _CAUSAL_MASK.search(info.name) is not None


# --- Quantised weights -----------------------------------------------------------------------------------


class Scheme(NamedTuple):
    """How quantised weights are recognised.

    Attributes:
        name: What people call it.
        holds: Whether a tensor is of the scheme, given the checkpoint's other tensors.
    """

    name: str
    holds: Callable[[TensorInfo, Mapping[str, TensorInfo]], bool]


def _beside(name: str, leaf: str, tensors: Mapping[str, TensorInfo]) -> bool:
    return f"{name.rpartition('.')[0]}.{leaf}" in tensors


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _packed(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    return _leaf(info.name) in {"qweight", "qzeros", "scales", "g_idx"} and _beside(info.name, "qweight", tensors)


def _bitsandbytes(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    name = info.name
    if re.search(r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.", name):
        return True
    return f"{name}.absmax" in tensors or (info.dtype == "I8" and _beside(name, "SCB", tensors))


def _float8(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    name = info.name
    scales = (
        "weight_scale_inv",
        "weight_scale",
        "weight_scale_2",
        "input_scale",
        "activation_scale",
        "scale_weight",
        "qscale_weight",
        "qscale_act",
    )
    if _leaf(name) in scales:
        return tensors.get(f"{name.rpartition('.')[0]}.weight", info).dtype.startswith("F8")
    stem = f"{name}_scale_inv" in tensors or f"{name}_scale" in tensors
    if info.dtype.startswith("F8"):
        return stem or any(_beside(name, scale, tensors) for scale in scales)
    fused = re.sub(r"_scale(?:_inv)?$", "", name)
    return fused != name and fused in tensors and tensors[fused].dtype.startswith("F8")


def _nvfp4(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    parent, _, leaf = info.name.rpartition(".")
    weight = tensors.get(f"{parent}.weight", info)
    parts = {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    return leaf in parts and weight.dtype == "U8" and _beside(info.name, "weight_scale_2", tensors)


def _mxfp4(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    match = re.fullmatch(r"(.*)_(?:blocks|scales)", info.name)
    return match is not None and all(
        f"{match.group(1)}_{end}" in tensors and tensors[f"{match.group(1)}_{end}"].dtype == "U8"
        for end in ("blocks", "scales")
    )


def _compressed(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    parts = {
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
    }
    return _leaf(info.name) in parts and _beside(info.name, "weight_packed", tensors)


def _integer_scaled(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    scales = ("weight_scale", "weight_scales", "scale_weight")
    if _leaf(info.name) in scales:
        return tensors.get(f"{info.name.rpartition('.')[0]}.weight", info).dtype in {"I8", "U8"}
    return info.dtype in {"I8", "U8"} and any(_beside(info.name, scale, tensors) for scale in scales)


def _qwix(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    parent, leaf = info.name.removesuffix(".value").rpartition(".")[::2]
    return leaf in {"qvalue", "scale", "zero_point"} and any(
        f"{parent}.qvalue{box}" in tensors for box in ("", ".value")
    )


def _aqt(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    return re.search(r"\bAqt\w*.*\.frozen\b|\bqrhs\b", info.name) is not None


SCHEMES: tuple[Scheme, ...] = (
    Scheme("gptq", lambda info, tensors: _packed(info, tensors) and _beside(info.name, "g_idx", tensors)),
    Scheme("awq", _packed),
    Scheme("bitsandbytes", _bitsandbytes),
    Scheme("nvfp4", _nvfp4),
    Scheme("fp8", _float8),
    Scheme("mxfp4", _mxfp4),
    Scheme("compressed-tensors", _compressed),
    Scheme("int8", _integer_scaled),
    Scheme("qwix", _qwix),
    Scheme("aqt", _aqt),
)
"""In the order in which they are asked: GPTQ stores what AWQ stores, and its group indices."""


_GPTQMODEL = "gptqmodel.utils.model_dequant.dequantize_model(SRC, DST)"
_MENDS: Mapping[str, str] = {
    "fp8": "write 'dequantize: true', or make one of bfloat16 first by m3jax convert SRC DST --dequantize",
    "gptq": f"make one of bfloat16 first by {_GPTQMODEL}",
    "awq": f"make one of bfloat16 first by {_GPTQMODEL}",
    "nvfp4": f"make one of bfloat16 first by {_GPTQMODEL}",
    "compressed-tensors": f"make one of bfloat16 first by {_GPTQMODEL}",
    "bitsandbytes": "make one of bfloat16 first by model.dequantize() and model.save_pretrained(DST) of transformers",
    "mxfp4": (
        "make one of bfloat16 first by from_pretrained(SRC, quantization_config=Mxfp4Config(dequantize=True)) and "
        "save_pretrained(DST) of transformers"
    ),
    "qwix": "make one of floats first by qwix.dequantize of each QArray",
}


def mend_of(scheme: str) -> str:
    """What one whose model is quantised can do to have it merged, as the end of a sentence.

    Args:
        scheme: As `quantised` or config.json calls it.
    """
    return _MENDS.get(scheme, "give the model in bfloat16, float16 or float32")


def quantised(tensors: Mapping[str, TensorInfo]) -> Mapping[str, str]:
    """The scheme of every tensor that belongs to a quantised weight: its integers, scales and zero points."""
    found = {}
    for name, info in tensors.items():
        scheme = next((scheme.name for scheme in SCHEMES if scheme.holds(info, tensors)), None)
        if scheme is not None:
            found[name] = scheme
    return found


def kind_of(info: TensorInfo, tensors: Mapping[str, TensorInfo], schemes: Mapping[str, str]) -> Kind:
    """What a tensor is for.

    Args:
        info: The tensor.
        tensors: All tensors of its checkpoint.
        schemes: The schemes of those that are quantised.
    """
    kind = state_kind(info.name)
    if kind is not None:
        return kind
    if info.name in schemes:
        return "quantised"
    if is_statistics(info.name, tensors):
        return "statistics"
    if _ADAPTER.search(info.name):
        return "adapter"
    name = info.name.removesuffix(".value")
    if _BUFFER.search(name) or _is_causal_mask(info) or info.dtype in _INTEGERS:
        return "buffer"
    return "parameter"
