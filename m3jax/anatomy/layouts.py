"""Layouts of Flax trees: which software wrote a tree, from its names, and what its metadata says of stacking."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_LAYOUTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("gemma", re.compile(r"(?:^|\.)attn\.(?:attn_vec_einsum|kv_einsum|qkv_einsum)\.w$")),
    ("tunix", re.compile(r"(?:^|\.)layers\.\d+\.(?:attn|self_attn)\.[qkvo]_proj\.w(?:_lora_[ab])?$")),
    (
        "maxtext",
        re.compile(r"(?:^|\.)decoder\.(?:decoder_norm\.scale|logits_dense\.kernel)$"),
    ),
)


STACKING_KEYS = ("scan_layers", "param_scan_axis")
"""Under which a trainer says whether, and along which axis, it stacks blocks."""


def layout_of(names: Iterable[str]) -> str | None:
    """Which software lays a tree out with these canonical names; None if it is none that is known.

    Example:
        >>> layout_of(["decoder.decoder_norm.scale", "token_embedder.embedding"])
        'maxtext'
    """
    names = list(names)
    return next((layout for layout, pattern in _LAYOUTS if any(pattern.search(name) for name in names)), None)


def scan_axis(metadata: Mapping[str, Any]) -> int | None:
    """The axis along which a trainer says that it stacks blocks; None if it does not say."""
    value = metadata.get(STACKING_KEYS[1])
    text = str(value).strip()
    return int(text) if value is not None and text.isdecimal() else None


def is_scanned(metadata: Mapping[str, Any]) -> bool | None:
    """Whether a trainer says that it stacks blocks; None if it does not say."""
    value = metadata.get(STACKING_KEYS[0])
    return None if value is None else str(value).strip().lower() in {"true", "1"}
