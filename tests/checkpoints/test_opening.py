from pathlib import Path

import numpy as np
import pytest
from flax.serialization import to_bytes

from m3jax.checkpoints import ShardWriter, TensorInfo, open_checkpoint, open_safetensors, write_index, write_orbax
from m3jax.errors import M3Error

FIXTURES = Path(__file__).parent / "fixtures" / "orbax"


def safetensors(path: Path) -> None:
    with ShardWriter(path, [TensorInfo("safetensors", (2,), "F32")]) as shard:
        shard.write("safetensors", 0, np.ones(2, np.float32))
        shard.finish()


def msgpack(path: Path) -> None:
    path.write_bytes(to_bytes({"msgpack": np.ones(2, np.float32)}))


def orbax(path: Path) -> None:
    source = path.with_name(path.name + ".safetensors")
    safetensors(source)
    with open_safetensors(source) as checkpoint:
        write_orbax(path, checkpoint)
    source.unlink()


def names(path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        return list(checkpoint.tensors)


@pytest.mark.parametrize("file", ["model.safetensors", "0123456789abcdef", "weights.st"])
def test_a_file_of_safetensors(tmp_path, file) -> None:
    safetensors(tmp_path / file)
    assert names(tmp_path / file) == names(str(tmp_path / file)) == ["safetensors"]


@pytest.mark.parametrize("file", ["flax_model.msgpack", "other.msgpack", "checkpoint_7", "0123456789abcdef"])
def test_a_file_of_msgpack(tmp_path, file) -> None:
    msgpack(tmp_path / file)
    assert names(tmp_path / file) == ["msgpack"]


def test_a_header_whose_length_looks_like_msgpack(tmp_path) -> None:
    # 0x80 is msgpack's empty map and could be the first byte of a header's length.
    with ShardWriter(tmp_path / "blob", [TensorInfo("n" * (0x80 - 59), (2,), "F32")], {}) as shard:
        shard.write("n" * (0x80 - 59), 0, np.ones(2, np.float32))
        shard.finish()
    assert (tmp_path / "blob").read_bytes()[0] == 0x80
    assert names(tmp_path / "blob") == ["n" * 69]


def test_an_index(tmp_path) -> None:
    safetensors(tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, [("model-00001-of-00001.safetensors", [TensorInfo("safetensors", (2,), "F32")])], 8)
    assert names(tmp_path / "model.safetensors.index.json") == names(tmp_path) == ["safetensors"]


@pytest.mark.parametrize("write", [safetensors, msgpack, orbax])
def test_a_directory(tmp_path, write) -> None:
    file = {safetensors: "model.safetensors", msgpack: "flax_model.msgpack", orbax: "7"}[write]
    write(tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert names(tmp_path) == ["safetensors" if write is orbax else write.__name__]


def test_a_directory_with_several_formats(tmp_path) -> None:
    orbax(tmp_path / "orbax")
    msgpack(tmp_path / "flax_model.msgpack")
    assert names(tmp_path) == ["msgpack"]
    safetensors(tmp_path / "model.safetensors")
    assert names(tmp_path) == ["safetensors"]


def test_steps_of_flax(tmp_path) -> None:
    msgpack(tmp_path / "checkpoint_9")
    safetensors(tmp_path / ".hidden.safetensors")
    assert names(tmp_path) == ["msgpack"]


@pytest.mark.parametrize("version", ["0.2.3/mixed", "0.4.4/stored", "0.6.4"])
def test_early_versions_of_orbax(version) -> None:
    assert names(FIXTURES / version) == ["dense.bias", "dense.kernel", "layers.0", "layers.1", "step"]


def test_a_save_that_was_interrupted(tmp_path) -> None:
    (tmp_path / "run" / "5.orbax-checkpoint-tmp" / "ocdbt.process_0").mkdir(parents=True)
    with pytest.raises(M3Error, match="was not saved to its end"):
        open_checkpoint(tmp_path / "run" / "5.orbax-checkpoint-tmp")
    with pytest.raises(M3Error, match="holds only saves that did not come to their end"):
        open_checkpoint(tmp_path / "run")


def test_pickles_are_never_run(tmp_path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(M3Error, match="is a bare pickle and no zip archive of PyTorch"):
            open_checkpoint(path)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(M3Error, match=r"holds no weights: looked for \*\.safetensors, .*_METADATA"):
        open_checkpoint(tmp_path)
    with pytest.raises(M3Error, match="absent does not exist: check the path"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(M3Error, match="is cut short or no safetensors file"):
        open_checkpoint(tmp_path / "empty")
