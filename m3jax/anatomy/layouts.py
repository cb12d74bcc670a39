"""Layouts of Flax trees: which software wrote a tree, from its names, and what its metadata says of stacking."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from m3jax.errors import M3Error

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
    """The axis along which a trainer says that it stacks blocks; None if it does not say.

    Raises:
        M3Error: It says what is no axis.
    """
    value = metadata.get(STACKING_KEYS[1])
    if value is None:
        return None
    text = str(value).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 4):
        raise M3Error(
            f"{STACKING_KEYS[1]} of the checkpoint's metadata is {text[:40]!r}, but must be an axis, from 0 on: mend"
            " what the trainer wrote beside it"
        )
    return int(text)


def is_scanned(metadata: Mapping[str, Any]) -> bool | None:
    """Whether a trainer says that it stacks blocks; None if it does not say."""
    value = metadata.get(STACKING_KEYS[0])
    return None if value is None else str(value).strip().lower() in {"true", "1"}
