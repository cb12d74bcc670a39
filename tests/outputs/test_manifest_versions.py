"""Manifests that earlier versions wrote are read, replayed, verified and sampled; docs/manifest.md has every key."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.adapters import factors, write_adapter
from support.directories import write

import m3jax
from m3jax.errors import M3Error
from m3jax.outputs import manifest
from m3jax.streaming.sampling import verify_sample

GOLDEN = Path(__file__).parent / "manifests"
DOCS = Path(__file__).parents[2] / "docs" / "manifest.md"
DIGEST = "6751a9fd9114fb59e4220700bf1f4787dba9af84972e0dc0b785a59f9426d8fd"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the golden manifests were made of."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        drawn = {f"model.layers.{i}.w": (rng.integers(-8, 9, (2, 3)) / 8).astype(np.float32) for i in range(2)}
        write(tmp_path / name, drawn)
    return tmp_path


def test_every_version_is_read_replayed_and_verified(models: Path) -> None:
    for version in range(1, manifest.VERSION + 1):
        file = GOLDEN / f"version-{version}.json"
        told = manifest.read(file)
        assert manifest.version_of(told) == version
        out = m3jax.replay(file, models / f"out-{version}")
        assert (out.digest, out.manifest["schema"]) == (DIGEST, manifest.VERSION)
        shutil.copyfile(file, out.directory / "m3jax.json")
        for found in (m3jax.verify(out.directory, inputs=True), verify_sample(out.directory)):
            assert found.differences == ()
            assert found.tensors == 2
        # Version 3 had other findings when this one was written.
        assert any("so this was measured again" in note for note in found.notes)


def recipes(models: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What the golden manifests of several kinds were made of: recipes, and how they were written."""
    for number, name in enumerate(("c", "d")):
        write(models / name, {"q.weight": np.arange(number, number + 6, dtype=np.float32).reshape(2, 3) / 8})
    write_adapter(models / "adapter", factors({"q": (2, 3)}, 2, 0), target_modules=["q"])
    half = {"name": "half", "merge_method": "linear", "models": ["a", "b"]}
    last = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["half", "a"], "seed": 3}
    drawn = {"merge_method": "linear", "models": ["a", "b"], "mixup": {"alpha": 0.5}, "seed": 4}
    dare = {**last, "base_model": "c", "models": ["d", "c+adapter"], "sparsify": {"method": "dare", "density": 0.5}}
    (models / "documents.yaml").write_text("---\n".join(map(yaml.safe_dump, (half, last))))
    return {
        "orbax": (drawn, {"format": "orbax"}),
        "documents": (models / "documents.yaml", {}),
        "adapter": (dare, {"max_shard_size": 40}),
    }


@pytest.mark.parametrize("kind", ["orbax", "documents", "adapter"])
def test_manifests_of_every_kind_stay_readable(models: Path, kind: str) -> None:
    recipe, how = recipes(models)[kind]
    golden = json.loads((GOLDEN / f"kind-{kind}.json").read_text())
    assert m3jax.merge_checkpoint(recipe, models / "now", **how).digest == golden["output"]["digest"]
    out = m3jax.replay(GOLDEN / f"kind-{kind}.json", models / "out")
    assert out.digest == golden["output"]["digest"]
    assert m3jax.verify(out.directory, inputs=True).differences == ()


def test_later_versions_and_odd_ones_are_refused(tmp_path: Path) -> None:
    told = json.loads((GOLDEN / "version-3.json").read_text())
    for schema, words in ((4, "of version 4, but this m3jax reads up to 3"), (0, "no number"), ("3", "no number")):
        (tmp_path / "m3jax.json").write_text(json.dumps(manifest.sealed(told | {"schema": schema})))
        with pytest.raises(M3Error, match=words):
            manifest.read(tmp_path)


def keys(told: Any) -> set[str]:
    """The keys of a manifest that are m3jax's own: not names of tensors, files, groups, packages or parameters."""
    if isinstance(told, list):
        return set().union(*map(keys, told))
    if not isinstance(told, dict):
        return set()
    named = {"recipe", "versions", "files", "weight_files", "saves", "kinds", "entries", "aliases", "vocabulary"}
    found = set(told)
    for key, entry in told.items():
        if key in ("weights", "tensors", "intermediates") and isinstance(entry, dict):
            found |= set().union(*(keys(each) for each in entry.values()))
        elif key not in named:
            found |= keys(entry)
    return found


def test_every_key_is_documented() -> None:
    documented = set(re.findall(r"`([a-z0-9_]+)`", DOCS.read_text(encoding="utf-8")))
    for file in GOLDEN.glob("*.json"):
        assert keys(json.loads(file.read_text())) <= documented
    source = (Path(manifest.__file__).parent / "mark.py").read_text(encoding="utf-8")
    assert set(re.findall(r'"([a-z_]+)": ', source)) <= documented


def test_the_canonical_form_is_as_documented() -> None:
    from blake3 import blake3

    told = json.loads((GOLDEN / "version-3.json").read_text())
    own = told.pop("manifest_digest")
    assert blake3(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == own
