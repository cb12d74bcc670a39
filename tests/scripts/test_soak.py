"""scripts/soak: random recipes are the oracle's merges, and a seed is always the same one."""

import importlib.machinery
import importlib.util
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from support import soak

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak"


def test_a_seed_is_one_recipe():
    one, again = soak.draw(5), soak.draw(5)
    assert one.said() == again.said()
    assert all(np.array_equal(a[n], b[n]) for a, b in zip(one.models, again.models, strict=True) for n in a)


def test_all_methods_formats_and_layouts_are_drawn():
    drawn = [soak.draw(seed) for seed in range(100)]
    assert {recipe.keys["merge_method"] for recipe in drawn} == set(soak.METHODS)
    assert {recipe.keys.get("sparsify", {}).get("method", "none") for recipe in drawn} == set(soak.SPARSIFIERS)
    assert {each for recipe in drawn for each in recipe.formats} == set(soak.FORMATS)
    assert {each for recipe in drawn for each in recipe.layouts} == set(soak.LAYOUTS)
    assert {each for recipe in drawn for each in recipe.features} == soak.FEATURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 3])
def test_random_recipes_are_the_oracles(seed, tmp_path):
    assert soak.wrong_tensors(soak.draw(seed), tmp_path) == []


def test_a_wrong_tensor_is_found(tmp_path):
    drawn = soak.draw(8)
    assert soak.wrong_tensors(drawn._replace(told=drawn.told | {"seed": 1, "weights": None}), tmp_path)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are not listed")
def test_threads_of_libraries_are_counted(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # which the script changes
    loader = importlib.machinery.SourceFileLoader("soak_script", str(SCRIPT))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("soak_script", loader))
    loader.exec_module(script)
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    assert script.thread_count() > threading.active_count()
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    assert script.thread_count() == threading.active_count()
