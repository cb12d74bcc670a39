"""Merges of models that JAX libraries store each in its own way."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import libraries

import m3jax
from m3jax.errors import M3Error
from m3jax.outputs.conversion import convert
from m3jax.streaming.merging import MergeResult

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.5}, "seed": 3},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.6}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, one and two: under Hugging Face's names, as MaxText stores them, stacked and apart, and as Tunix does."""
    place = tmp_path_factory.mktemp("libraries")
    config = libraries.configuration("llama")
    for seed, name in enumerate(("base", "one", "two")):
        arrays = libraries.huggingface(config, seed)
        stored = {
            "hf": arrays,
            "scanned": libraries.maxtext(config, arrays, True),
            "apart": libraries.maxtext(config, arrays, False),
            "tunix": libraries.tunix(config, arrays),
        }
        for kind, own in stored.items():
            libraries.saved(place / f"{kind}-{name}/model.safetensors", own)
        (place / f"hf-{name}/config.json").write_text(json.dumps(config))
        convert(place / f"apart-{name}", place / f"msgpack-{name}", to="msgpack")
        convert(place / f"scanned-{name}", place / f"orbax-{name}", to="orbax")
    (place / "msgpack-one/config.json").write_text(json.dumps(config))
    return place


def merged(models: Path, out: Path, method: dict[str, Any], base: str, one: str, two: str) -> MergeResult:
    named = {"base_model": str(models / f"{base}-base")} if method["merge_method"] != "linear" else {}
    experts = [str(models / f"{one}-one"), str(models / f"{two}-two")]
    return m3jax.merge_checkpoint({**method, **named, "models": experts}, out)


def test_the_base_decides_and_nothing_else(models: Path, tmp_path: Path) -> None:
    for name in ("linear", "dare_ties"):
        digests = {
            merged(models, tmp_path / f"{name}-{one}", METHODS[name], "hf", "hf", one).digest
            for one in ("hf", "scanned", "msgpack", "tunix")
        }
        assert len(digests) == 1, name
    result = merged(models, tmp_path / "told", METHODS["ties"], "hf", "tunix", "orbax")
    assert any("its names and layout, tunix's, are read as huggingface's, those of" in note for note in result.notes)
    assert m3jax.replay(tmp_path / "told", tmp_path / "again").digest == result.digest


def test_entries_are_the_same_whatever_the_base(models: Path, tmp_path: Path) -> None:
    wanted = merged(models, tmp_path / "hf", METHODS["ties"], "hf", "hf", "hf")
    for base, one, two in (("msgpack", "msgpack", "tunix"), ("orbax", "scanned", "hf")):
        found = merged(models, tmp_path / base, METHODS["ties"], base, one, two).directory
        back = convert(found, tmp_path / f"{base}-back", names="huggingface", config=models / "hf-base")
        assert back.digest == wanted.digest, base


def test_without_any_configuration(models: Path, tmp_path: Path) -> None:
    with pytest.raises(M3Error, match=r"tunix-two: there is no config.json beside it, which says model_type"):
        merged(models, tmp_path / "out", METHODS["ties"], "scanned", "scanned", "tunix")
    assert not (tmp_path / "out").exists()
