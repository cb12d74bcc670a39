"""Float8 weights: which scales are whose, how they lie on them, and what a model is called once it has none. No values.

The spellings: `weight_scale_inv` by block (DeepSeek-V3, Qwen3-FP8, transformers), `weight_scale` by tensor, row, group
or block (compressed-tensors, ModelOpt, FBGEMM), `qscale_weight` (Mistral's own files), `scale_weight` (ComfyUI).
Weights are multiplied by all of them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from m3jax.anatomy.kinds import mend_of, quantised
from m3jax.checkpoints.protocol import Checkpoint, TensorInfo
from m3jax.checkpoints.views_dequantized import Scaling, dequantized
from m3jax.errors import M3Error

SCHEME = "fp8"
"""What `Anatomy.quantisation` calls it."""

_WEIGHTS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
_AFTER = ("_scale_inv", "_scale", "_scale_2")
_BESIDE = ("scale_weight", "qscale_weight")
_ZERO_POINT = "_zero_point"
_OF_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:input_scale(?:_ub|_inv)?|activation_scale(?:_inv)?|qscale_act|scale_input|output_scale|input_global_scale)$"
)
_OF_CACHES = re.compile(r"\.(?:k_scale|v_scale|q_scale|kv_scale|prob_scale|prob_output_scale)$")
_MARKER = "scaled_fp8"  # ComfyUI's, without entries
_DECLARING = ("quantization_config", "compression_config")
_DECLARED = frozenset({"fp8", "fbgemm_fp8"})
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Dequantisation(NamedTuple):
    """How a model is seen without its quantisation.

    Attributes:
        scalings: Of the float8 tensors, by name.
        dropped: Tensors that belong to the quantisation alone.
        dtype: What the model's weights are without it: its config says so, or else its other tensors.
    """

    scalings: Mapping[str, Scaling]
    dropped: frozenset[str]
    dtype: str


def find_dequantisation(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, location: str
) -> Dequantisation | None:
    """How a checkpoint's float8 weights become numbers.

    Args:
        tensors: The checkpoint's.
        config: Its config.json.
        location: What sentences call it.

    Returns:
        The scales of each, or of none where config.json alone speaks of float8; None where weights are not quantised,
        or in another scheme.

    Raises:
        M3Error: A float8 tensor has no scales, two, or some that do not lie on it, or other weights are quantised
            otherwise.
    """
    weights = [name for name, info in tensors.items() if info.dtype in _WEIGHTS and info.size]
    declared = _declared(config)
    schemes = dict.fromkeys(quantised(tensors).values())
    others = [scheme for scheme in schemes if scheme != SCHEME]
    if others and SCHEME in schemes:
        raise M3Error(
            f"{location}: its weights are quantised in several schemes ({', '.join(schemes)}), of which only {SCHEME}"
            f" can be undone here: {mend_of(others[0])}."
        )
    if others:
        return None
    if not weights:
        stale = declared.get("quant_method") in _DECLARED
        return Dequantisation({}, frozenset(), written_dtype(tensors, config)) if stale else None
    blocks = list(dict.fromkeys(_declared_blocks(declared)))
    scalings = {name: _scaling_of(tensors, name, blocks, location) for name in weights}
    dropped = frozenset(name for name, info in tensors.items() if name not in scalings and _is_of_activations(info))
    return Dequantisation(scalings, dropped, written_dtype(tensors, config))


def seen_dequantized(checkpoint: Checkpoint, found: Dequantisation, dtype: str = "F32") -> Checkpoint:
    """A checkpoint as `find_dequantisation` found it to be; see `views_dequantized.dequantized`."""
    return dequantized(checkpoint, found.scalings, found.dropped, dtype) if found.scalings else checkpoint


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose weights are quantised no more.

    Example:
        >>> without_quantisation({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}})
        {'model_type': 'qwen3'}
    """
    kept = {key: value for key, value in config.items() if key not in _DECLARING}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = without_quantisation(kept["text_config"])
    return kept


def written_dtype(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> str:
    """The dtype of a model's weights where they are not quantised, which float8 weights have once they are numbers.

    Args:
        tensors: The checkpoint's.
        config: Its config.json, whose `dtype` or `torch_dtype` decides.

    Returns:
        Else the commonest among its floats that are no scales; else BF16, from which float8 models are made.
    """
    for part in _parts(config):
        for key in ("dtype", "torch_dtype"):
            told = _DTYPES.get(str(part.get(key)).removeprefix("torch."))
            if told is not None:
                return told
    scales = quantised(tensors)
    counts = Counter(info.dtype for name, info in tensors.items() if name not in scales)
    known = [dtype for dtype, _ in counts.most_common() if dtype in _DTYPES.values()]
    return known[0] if known else "BF16"


def _parts(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A config, and that of its language model."""
    if config is not None:
        yield config
        inner = config.get("text_config")
        if isinstance(inner, Mapping):
            yield inner


def _declared(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What a config says of quantisation."""
    found = (part.get(key) for part in _parts(config) for key in _DECLARING)
    return next((told for told in found if isinstance(told, Mapping)), {})


def _declared_blocks(declared: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The blocks that share a scale, as a config has them: of all weights, or of groups of modules."""
    size = declared.get("weight_block_size")
    if size is not None:
        block = _pair(size)
        if block is None:
            raise M3Error(f"config.json: weight_block_size is {size!r:.50}, but must be two whole numbers: correct it.")
        yield block
    groups = declared.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        told = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(told, Mapping):
            block = _pair(told.get("block_structure"))
            size = told.get("group_size")
            if block is not None:
                yield block
            elif isinstance(size, int) and size > 0:
                yield 1, size


def _pair(value: Any) -> tuple[int, int] | None:
    """A block of rows and columns: a list, or the text "128x128" of old versions of compressed-tensors."""
    numbers = re.findall(r"\d+", value) if isinstance(value, str) else value
    if not isinstance(numbers, Sequence) or len(numbers) != 2:
        return None
    if not all(isinstance(number, int | str) and not isinstance(number, bool) for number in numbers):
        return None
    rows, columns = map(int, numbers)
    return (rows, columns) if rows > 0 and columns > 0 else None


def _scaling_of(
    tensors: Mapping[str, TensorInfo], name: str, blocks: Sequence[tuple[int, int]], location: str
) -> Scaling:
    parent = name.rpartition(".")[0]
    candidates = [name + end for end in _AFTER] + [f"{parent}.{leaf}" for leaf in _BESIDE if parent]
    found = [each for each in candidates if each in tensors]
    if not found:
        raise M3Error(
            f"{location}: {name} is {tensors[name].dtype} without scales (no {candidates[0]}, {candidates[1]}), so what"
            " its numbers stand for cannot be told: get the whole model."
        )
    if len(found) > 1 or name + _ZERO_POINT in tensors:
        second = found[1] if len(found) > 1 else name + _ZERO_POINT
        raise M3Error(f"{location}: {name} has both {found[0]} and {second}, a scheme that is not known: {_MEND}.")
    scales = tensors[found[0]]
    if scales.dtype not in _SCALES:
        raise M3Error(f"{location}: {scales.name} is {scales.dtype}, which no scales are: {_MEND}.")
    laid = _laid(tensors[name], scales.shape, blocks)
    if len(laid) != 1:
        said = " and ".join(f"{rows}x{columns}" for rows, columns in blocks) or "a size that config.json does not say"
        how = "can lie on it in several ways" if laid else "does not lie on it"
        raise M3Error(
            f"{location}: {name} is {list(tensors[name].shape)} and its scale {scales.name} {list(scales.shape)}, which"
            f" {how} by tensor, row or blocks of {said}: correct weight_block_size in its quantization_config."
        )
    shape, block = laid[0]
    return Scaling(scales.name, shape, block)


_MEND = "have the software that made it write bfloat16"


def _laid(
    weight: TensorInfo, scales: tuple[int, ...], blocks: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ways in which scales lie on a weight: their shape with as many axes as it has, and what shares one."""
    shape, rank = weight.shape, len(weight.shape)
    size = 1
    for length in scales:
        size *= length
    if size == 1:
        return [((1,) * rank, shape)]
    if len(scales) < rank and scales == shape[: len(scales)]:  # one for each row, or for each matrix of a stack
        scales = (*scales, *(1,) * (rank - len(scales)))
    if len(scales) != rank:
        return []
    found = []
    for rows, columns in [(1, 1), *blocks]:
        own = (*(1,) * max(rank - 2, 0), *(rows, columns)[-rank:])
        block = []
        for length, count, part in zip(shape, scales, own, strict=True):
            if count == 1:
                block.append(length)
            elif count == -(-length // part):
                block.append(part)
        if len(block) == rank and (scales, tuple(block)) not in found:
            found.append((scales, tuple(block)))
    return found


def _is_of_activations(info: TensorInfo) -> bool:
    if info.name == _MARKER or _OF_ACTIVATIONS.search(info.name):
        return True
    return info.size == 1 and _OF_CACHES.search(info.name) is not None
