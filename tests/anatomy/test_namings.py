"""Both namings in which transformers writes one model: each is the other through a view, to the byte."""

import pytest

from m3jax.anatomy import anatomy_of
from m3jax.anatomy.namings import find_mapping
from m3jax.checkpoints import digest_tensor, open_safetensors
from m3jax.checkpoints.views_assembled import assembled

architectures = pytest.importorskip("anatomy.architectures")

FAMILIES = [
    "qwen2_moe",
    "phimoe",
    "jamba",
    "granitemoe",
    "llava",
    "qwen2_5_vl",
    "paligemma",
    "vit",
    "beit",
    "segformer",
]


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_bytes_are_those_that_transformers_writes(family, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: scripts/test --all")
    torch.manual_seed(0)
    model = architectures.make(architectures.BY_NAME[family])
    for naming in ("old", "new"):
        model.save_pretrained(tmp_path / naming, save_original_format=naming == "old")
    for first, second in (("old", "new"), ("new", "old")):
        with open_safetensors(tmp_path / first) as own, open_safetensors(tmp_path / second) as wanted:
            buffers = {name for name, part in anatomy_of(own.tensors).parts.items() if part.kind == "buffer"}
            found = find_mapping(own.tensors, wanted.tensors, called=(first, second), optional=buffers)
            assert found is not None
            view = assembled(own, found.assemblies)
            assert view.tensors == wanted.tensors
            assert all(digest_tensor(view, name) == digest_tensor(wanted, name) for name in wanted.tensors)
