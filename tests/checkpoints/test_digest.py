from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from blake3 import blake3

from m3jax.checkpoints import (
    ALGORITHM,
    ShardWriter,
    TensorDigest,
    TensorInfo,
    digest_checkpoint,
    digest_tensor,
    open_safetensors,
)
from m3jax.checkpoints import digest as digests

ENTRIES = {"a": ("F32", (2, 3), "00"), "b": ("BF16", (), "11"), "layers.2": ("F32", (0,), "22")}


def test_algorithm_is_blake3_of_the_raw_bytes() -> None:
    values = np.arange(1000, dtype=np.float32).reshape(10, 100)
    digest = TensorDigest()
    for rows in np.array_split(values, 3):
        digest.update(rows)
    assert ALGORITHM == "blake3"
    assert digest.hexdigest() == blake3(values.tobytes()).hexdigest()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7, 11)])
@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_a_tensor_in_a_file(tmp_path, shape, block) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with ShardWriter(tmp_path / "model.safetensors", [TensorInfo("w", shape, "F32")]) as shard:
        shard.write("w", 0, values)
        shard.finish()
    with open_safetensors(tmp_path) as checkpoint:
        assert digest_tensor(checkpoint, "w", block) == blake3(values.tobytes()).hexdigest()


def test_a_checkpoint_does_not_depend_on_order() -> None:
    assert digest_checkpoint(ENTRIES) == digest_checkpoint(dict(reversed(ENTRIES.items())))


def test_a_checkpoint_keeps_its_digest_for_ever() -> None:
    # Manifests of years ago must still verify.
    lines = b'["a","F32",[2,3],"00"]\n["b","BF16",[],"11"]\n["layers.2","F32",[0],"22"]\n'
    assert digest_checkpoint(ENTRIES) == blake3(lines).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        ENTRIES | {"a": ("F16", (2, 3), "00")},
        ENTRIES | {"a": ("F32", (3, 2), "00")},
        ENTRIES | {"a": ("F32", (2, 3), "01")},
        ENTRIES | {"c": ("F32", (), "33")},
        {"b": ENTRIES["a"], "a": ENTRIES["b"], "layers.2": ENTRIES["layers.2"]},
        {'a","F32",[2,3],"00"]\n["b': ENTRIES["b"], "layers.2": ENTRIES["layers.2"]},
    ],
)
def test_a_checkpoint_that_differs_has_another_digest(other) -> None:
    assert digest_checkpoint(other) != digest_checkpoint(ENTRIES)


def test_what_was_not_read_in_order_is_read_again_once_for_all_who_ask(tmp_path, monkeypatch) -> None:
    values = np.arange(7, dtype=np.float32)
    with ShardWriter(tmp_path / "model.safetensors", [TensorInfo("w", (7,), "F32")]) as shard:
        shard.write("w", 0, values)
        shard.finish()
    asking, readings = Barrier(4), []
    monkeypatch.setattr(digests, "digest_tensor", lambda *of: (readings.append(of), digest_tensor(*of))[1])
    with open_safetensors(tmp_path) as checkpoint, ThreadPoolExecutor(4) as pool:
        passing = digests.Passing(checkpoint)
        found = list(pool.map(lambda _: (asking.wait(30), passing.digest("w"))[1], range(4)))
    assert set(found) == {blake3(values.tobytes()).hexdigest()}
    assert len(readings) == 1
