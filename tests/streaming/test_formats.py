"""One digest, whatever format the models are read from."""

import pytest
from support.checkpoint_suite import read
from support.directories import recipe, write_models
from support.matrix import METHODS
from support.torch_files import write_arrays

from m3jax import merge_checkpoint
from m3jax.checkpoints import open_safetensors, write_msgpack, write_orbax

SHAPES = {f"model.layers.{i}.w": (64, 50 + i) for i in range(3)} | {"model.norm.weight": (70,), "scale": ()}
KEYS = METHODS["ties_paper"][1] | {"sparsify": {"method": "dare", "density": 0.8}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Base and two experts, each in four formats: `safetensors/base`, `orbax/base` …"""
    place = tmp_path_factory.mktemp("formats")
    write_models(place / "safetensors", shapes=SHAPES)
    for name in ("base", "expert-0", "expert-1"):
        with open_safetensors(place / "safetensors" / name) as source:
            (place / "orbax").mkdir(exist_ok=True)
            write_orbax(place / "orbax" / name, source)
            (place / "msgpack" / name).mkdir(parents=True)
            write_msgpack(place / "msgpack" / name, source, 10_000)
            (place / "pytorch" / name).mkdir(parents=True)
            arrays = {tensor: read(source, tensor) for tensor in source.tensors}
            write_arrays(place / "pytorch" / name / "pytorch_model.bin", arrays, strided=True)
    return place


@pytest.fixture(scope="module")
def digest(place):
    return merge_checkpoint(recipe(place / "safetensors", **KEYS), place / "reference").digest


@pytest.mark.parametrize("kind", ["orbax", "msgpack", "pytorch"])
def test_models_of_other_formats(place, digest, tmp_path, kind):
    assert merge_checkpoint(recipe(place / kind, **KEYS), tmp_path / "out").digest == digest


def test_models_of_different_formats(place, digest, tmp_path):
    told = recipe(place / "safetensors", **KEYS) | {
        "models": [str(place / "orbax" / "expert-0"), str(place / "msgpack" / "expert-1")]
    }
    assert merge_checkpoint(told, tmp_path / "out").digest == digest
