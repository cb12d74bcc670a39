"""LoRA adapters as PEFT saves them, made with numpy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."


def factors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    """Factors of modules, by their names in an adapter's file.

    Args:
        shapes: Of each module's weight, [out, in].
        rank: Of all of them.
        seed: Of what they hold.
        dtype: Of what they hold.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for module, (out, in_) in shapes.items():
        for which, shape in (("A", (rank, in_)), ("B", (out, rank))):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.1)
            found[f"{PREFIX}{module}.lora_{which}.weight"] = values.astype(dtype)
    return found


def write_adapter(directory: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """Writes an adapter's directory; its configuration says rank 2 and an alpha of 4 where it is not told otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True, **config}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    return directory
