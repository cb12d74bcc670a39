"""Configurations of models that are merged agree on what their weights mean, or it is said."""

import json

import numpy as np
import pytest
from support.directories import write

import m3jax
from m3jax.anatomy.agreement import notes_on_configurations
from m3jax.errors import M3Error

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "hidden_act": "silu", "rope_theta": 1e4}


def merge(tmp_path, **changes):
    models = []
    for name, config in (("a", LLAMA), ("b", {**LLAMA, **changes})):
        models.append(str(write(tmp_path / name, {"model.layers.0.w": np.ones((4, 4), np.float32)}, config)))
    return m3jax.merge_checkpoint({"merge_method": "linear", "models": models}, tmp_path / "out")


def test_other_heads_are_refused(tmp_path):
    with pytest.raises(M3Error, match=r"num_attention_heads is 4 in .*a and 8 in .*b, so that rows"):
        merge(tmp_path, num_attention_heads=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"rope_theta": 5e5}, {"model_type": "mistral"}])
def test_what_is_computed_otherwise_is_noted(tmp_path, changes):
    (key,) = changes
    (note,) = (note for note in merge(tmp_path, **changes).notes if note.startswith("config.json"))
    assert f"{key} is {LLAMA[key]!r} in " in note
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == LLAMA[key]


def test_what_one_does_not_say_and_other_ways_to_say_it_are_no_difference():
    other = {"text_config": {"model_type": "llama", "hidden_act": "silu"}, "rope_parameters": {"rope_theta": 1e4}}
    assert list(notes_on_configurations([("a", LLAMA), ("b", other), ("c", None)])) == []
