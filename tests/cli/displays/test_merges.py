"""What is said of merges and verifications."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from m3jax.cli.displays.merges import merge_lines, verification_json, verification_lines
from m3jax.outputs.verification import Verification


def merged(manifest: dict[str, Any], **changes: Any) -> Any:
    """What `MergeResult` looks like; its module imports JAX."""
    fields: dict[str, Any] = {
        "directory": Path("my models/out"),
        "digest": "ab" * 32,
        "manifest": manifest,
        "seconds": 2.0,
        "bytes_read": 2_000_000_000,
        "bytes_written": 1_000_000_000,
        "resumed_shards": 0,
        "notes": (),
    }
    fields.update(changes)
    return SimpleNamespace(**fields)


def drawn(*weights: float) -> dict[str, list[Any]]:
    return {"decimal": list(weights), "hex": [weight.hex() for weight in weights]}


def test_merge_summary() -> None:
    recipe = {"base_model": "base", "models": [{"model": "base"}, {"model": "math"}, {"model": "code"}]}
    result = merged({"recipe": recipe, "weights": {"model": drawn(0.25, 0.75)}}, resumed_shards=1)
    assert list(merge_lines(result)) == [
        "merged   'my models/out'",
        "took     2.0 s: 2.0 GB read, 1.0 GB written, 1.5 GB/s, 1 shard kept from before",
        "weights  0.250000  math",
        "         0.750000  code",
        f"digest   {'ab' * 32}",
        "replay   m3jax replay 'my models/out' NEW_DIRECTORY",
    ]


def test_merge_summary_of_many_groups() -> None:
    groups = {f"model.layers.{index}": drawn(0.5, 0.5) for index in range(6)}
    lines = list(merge_lines(merged({"recipe": {"models": []}, "weights": groups}, seconds=0.0)))
    assert lines[2] == "weights  0.500000  0.500000  model.layers.0"
    assert lines[6] == "         … and 2 more groups, in the manifest"
    assert "/s" not in lines[1]


def test_merge_summary_without_known_names_or_weights() -> None:
    recipe = {"models": [{"model": "a"}]}
    lines = list(merge_lines(merged({"recipe": recipe, "weights": {"model": drawn(0.5, 0.5)}})))
    assert lines[2:4] == ["weights  0.500000  expert 0", "         0.500000  expert 1"]
    assert not any(line.startswith("weights") for line in merge_lines(merged({})))


def test_verification() -> None:
    same = Verification(Path("out"), "ab", 3, 2, ())
    assert list(verification_lines(same)) == ["out: as recorded, 3 tensors and 2 other files", "digest   ab"]
    lines = list(verification_lines(same._replace(differences=("w: its bytes differ",))))
    assert lines[:2] == ["w: its bytes differ", "out: not as recorded, 1 difference in 3 tensors and 2 other files"]
    assert verification_json(same)["as_recorded"]
