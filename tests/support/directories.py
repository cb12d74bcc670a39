"""Model directories as other tools write them, recipes that name them, and what merges wrote."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from support.matrix import DTYPES, SHAPES, models

WIDE = SHAPES | {
    "model.layers.1.wide.weight": (700, 273),  # several chunks of 65,536 entries and a rest
    "model.scalar": (),
    "model.empty": (0, 4),
    "model.one": (1,),
}


def write(directory, tensors, config=None, shards=1):
    """A model directory as other tools write them, in one file or several."""
    directory.mkdir(parents=True)
    tensors = {name: np.asarray(value, value.dtype) for name, value in tensors.items()}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            save_file({n: tensors[n] for n in names[i::shards]}, directory / file)
        weight_map = {n: files[i % shards] for i, n in enumerate(names)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama", "torch_dtype": "bfloat16"}))
    return directory


def write_models(place, dtype="bfloat16", n=2, shapes=WIDE, extra=None):
    base, experts = models(DTYPES[dtype], n, shapes)
    extra = extra or {}
    write(place / "base", base | extra)
    for i, expert in enumerate(experts):
        write(place / f"expert-{i}", expert | extra, shards=i + 1)  # each divided differently
    return base, experts


def recipe(place, n=2, **keys):
    return {
        "base_model": str(place / "base"),
        "models": [str(place / f"expert-{i}") for i in range(n)],
        **keys,
    }


def read(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}
