"""Converting checkpoints: nothing is lost from format to format, and nothing appears that is not whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import libraries
from support.checkpoint_suite import info_of, random_array, read

from m3jax.checkpoints import (
    ShardWriter,
    TensorInfo,
    digest_checkpoint,
    digest_tensor,
    open_msgpack,
    open_safetensors,
    plan_shards,
    write_index,
)
from m3jax.checkpoints.formats import SAFETENSORS, WRITTEN, written
from m3jax.checkpoints.opening import open_checkpoint
from m3jax.cli.commands import main
from m3jax.errors import M3Error
from m3jax.outputs import conversion, local
from m3jax.outputs.conversion import ConvertResult, convert
from m3jax.progress import Progress

COMPANIONS = {"config.json": '{"model_type": "llama"}', "additional_chat_templates/tool.jinja": "{{ x }}"}


def save(directory: Path, arrays: dict[str, np.ndarray], max_shard_size: int = 10**9) -> Path:
    """Writes a model directory."""
    directory.mkdir()
    infos = [info_of(*item) for item in arrays.items()]
    shards = plan_shards(infos, max_shard_size)
    for file, tensors in shards:
        with ShardWriter(directory / file, tensors) as shard:
            for info in tensors:
                shard.write(info.name, 0, arrays[info.name])
            shard.finish()
    if len(shards) > 1:
        write_index(directory, shards, 0)
    for name, text in COMPANIONS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    (directory / "README.md").write_text("card")
    return directory


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"weight": (6, 4), "scalar": (), "empty": (3, 0)}
    found = {
        f"model.layers.{layer}.{dtype}.{part}": random_array(dtype, shape, rng)
        for layer in (2, 10)
        for dtype in ("BF16", "F16", "F32", "F64", "I8", "U8", "I32", "I64", "BOOL")
        for part, shape in shapes.items()
    }
    return found | {"special": np.float32([-0.0, 0.0, np.inf, -np.inf, np.nan])}


@pytest.fixture
def model(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    return save(tmp_path / "model", arrays, max_shard_size=500)


def contents(path: Path) -> dict[str, tuple[TensorInfo, bytes]]:
    found = {}
    with open_checkpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            found[name] = info, read(checkpoint, name).tobytes()
    return found


def digest_of(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        infos = checkpoint.tensors.values()
        return digest_checkpoint({i.name: (i.dtype, i.shape, digest_tensor(checkpoint, i.name)) for i in infos})


def companions_of(directory: Path) -> dict[str, str]:
    return {name: (directory / name).read_text() for name in COMPANIONS}


def unfinished(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if re.search(r"partial|tmp|journal", path.name)]


# --- From format to format -------------------------------------------------------------------------------


def test_nothing_is_lost_on_the_way_round(tmp_path: Path, model: Path) -> None:
    first = convert(model, tmp_path / "msgpack", "msgpack", max_shard_size=600)
    second = convert(first.directory, tmp_path / "orbax", "orbax")
    third = convert(str(second.directory), str(tmp_path / "safetensors"), max_shard_size="600")
    before = contents(model)
    for result in (first, second, third):
        assert contents(result.directory) == before
        assert result.digest == digest_of(model)
        assert (result.tensors, result.bytes) == (len(before), sum(len(raw) for _, raw in before.values()))
        assert sorted(result.files) == sorted(COMPANIONS)
        assert companions_of(result.directory) == COMPANIONS
        assert not (result.directory / "README.md").exists()
    assert len(list(first.directory.glob("flax_model-*"))) > 1
    assert len(list(third.directory.glob("model-*"))) > 1
    assert unfinished(tmp_path) == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_tensors_come_back(tmp_path: Path, data: st.DataObject) -> None:
    dtype = st.sampled_from(["BF16", "F16", "F32", "I8", "BOOL", "U16"])
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    name = st.text("abλ09_-", min_size=1, max_size=6)
    tree = data.draw(
        st.dictionaries(
            name, st.tuples(dtype, shape) | st.dictionaries(name, st.tuples(dtype, shape), min_size=1), min_size=1
        )
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = {key: random_array(*leaf, rng) for key, leaf in flatten_dict(tree, sep=".").items()}
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    model = save(tmp_path / "model", arrays)
    size = data.draw(st.integers(1, 300))
    order = data.draw(st.permutations(["msgpack", "safetensors"]))
    for to in order:
        result = convert(model, tmp_path / to, to, max_shard_size=size, overwrite=True)
        assert contents(result.directory) == contents(model)


def test_flax_restores_it(tmp_path: Path, arrays: dict[str, np.ndarray], model: Path) -> None:
    out = convert(model, tmp_path / "out", "msgpack").directory
    restored = flatten_dict(serialization.msgpack_restore((out / "flax_model.msgpack").read_bytes()), sep=".")
    assert {name: array.tobytes() for name, array in restored.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


def test_orbax_restores_the_directory_itself(tmp_path: Path, arrays: dict[str, np.ndarray], model: Path) -> None:
    out = convert(model, tmp_path / "out", "orbax").directory
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten_dict(checkpointer.restore(out), sep=".")
    assert {name: (np.asarray(a).dtype, np.asarray(a).tobytes()) for name, a in restored.items()} == {
        name: (array.dtype, array.tobytes()) for name, array in arrays.items()
    }


def test_jax_is_not_needed(tmp_path: Path, model: Path) -> None:
    """Orbax comes by way of TensorStore, so that only the checkpoint's own formats are imported."""
    program = (
        "import sys; from m3jax.cli.commands import main; "
        f"codes = [main(['convert', {str(model)!r}, {str(tmp_path)!r} + '/' + to, '--to', to, '-q'])"
        " for to in ('msgpack', 'orbax', 'safetensors')]; print(codes, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 0, 0] False\n", done.stderr


def test_single_files_bring_what_is_beside_them(tmp_path: Path) -> None:
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (legacy / "config.json").write_text("{}")
    tree = {"params": {"dense": {"kernel": np.ones((2, 2), ml_dtypes.bfloat16)}}, "step": 12}
    (legacy / "checkpoint_12").write_bytes(serialization.to_bytes(tree))
    result = convert(legacy / "checkpoint_12", tmp_path / "out")
    assert (result.tensors, result.files) == (1, ("config.json",))
    with open_safetensors(result.directory) as checkpoint:
        assert list(checkpoint.tensors) == ["params.dense.kernel"]
        assert checkpoint.metadata == {"format": "pt", "step": "12"}


def test_the_same_format_with_other_shards(tmp_path: Path, model: Path) -> None:
    out = convert(model, tmp_path / "out", max_shard_size="1GB").directory
    assert contents(out) == contents(model)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


# --- What is refused, before anything is written ---------------------------------------------------------


def listing(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def refused(words: str, src: Path, dst: Any, to: Any = "msgpack", **options: Any) -> None:
    before = listing(src.parent)
    with pytest.raises(M3Error, match=words) as caught:
        convert(src, dst, to, **options)
    assert "\n" not in str(caught.value)
    assert listing(src.parent) == before


def test_bad_requests(tmp_path: Path, model: Path) -> None:
    refused("'torch' is no format to convert to: choose safetensors, orbax, msgpack", model, tmp_path / "out", "torch")
    refused("'1 parsec' is no size", model, tmp_path / "out", max_shard_size="1 parsec")
    refused("is not on this disk", model, "s3://bucket/out")
    refused("its parent does not exist", model, tmp_path / "absent" / "out")
    refused("exists already", model, save(tmp_path / "other", {}))
    refused("only what m3jax has made is overwritten", model, tmp_path / "other", overwrite=True)
    for place in (model, tmp_path):
        (place / "m3jax.json").write_text("{}")
        refused("holds no m3jax.json of an output, and only what m3jax has made", model, place, overwrite=True)
        files = {path.relative_to(place).as_posix(): "" for path in place.rglob("*") if path.is_file()}
        (place / "m3jax.json").write_text(json.dumps({"output": {"files": files}}))
        refused("is one of the models, or holds", model, place, overwrite=True)
    refused("does not exist", tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("to", ["msgpack", "orbax"])
def test_names_that_make_no_tree(tmp_path: Path, to: str) -> None:
    one = np.ones(1, np.float32)
    refused("'a.*'a.b'", save(tmp_path / "model", {"a": one, "a.b": one}), tmp_path / "out", to)


def test_a_disk_that_is_too_small(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    refused("the disk has 100 bytes free", model, tmp_path / "out")


# --- Whole or not at all ---------------------------------------------------------------------------------


def test_overwriting(tmp_path: Path, model: Path) -> None:
    out = convert(save(tmp_path / "other", {"old": np.ones(1, np.int8)}), tmp_path / "out").directory
    convert(model, out, "msgpack", overwrite=True)
    assert contents(out) == contents(model)
    assert not list(out.glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "out"]


@pytest.mark.parametrize("name", ["d/evil.py", "orbax/d/evil.py", "orbax.py", "ocdbt.process_EVIL.py"])
def test_a_file_that_is_not_the_conversions_is_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def stopped(directory: Path, *args: Any) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("mine")
        raise M3Error("stopped")

    monkeypatch.setattr(conversion, "_verify", stopped)
    with pytest.raises(M3Error, match="stopped"):
        convert(model, tmp_path / "out", "orbax")
    monkeypatch.undo()
    left = tmp_path / "out.partial" / name
    with pytest.raises(M3Error, match=rf"{name}: is no part of the merge that is made there: move it away"):
        convert(model, tmp_path / "out", "orbax")
    assert left.read_text() == "mine"
    left.unlink()
    convert(model, tmp_path / "out", "orbax")


@pytest.mark.parametrize("to", WRITTEN)
def test_a_bit_that_flips_on_the_disk_is_noticed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    def flipping(directory: Path) -> Any:
        opened = written(to).open(directory)
        read_into = opened.read_into

        def flipped(name: str, start: int, out: Any) -> None:
            read_into(name, start, out)
            if name == "special":
                np.frombuffer(out, np.uint8)[3] ^= 1

        monkeypatch.setattr(opened, "read_into", flipped)
        return opened

    monkeypatch.setattr(conversion, "written", lambda name: written(name)._replace(open=flipping))
    refused("'special' of .* reads back otherwise", model, tmp_path / "out", to)


def test_a_tensor_that_is_lost_is_noticed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save(tmp_path / "other", {"special": np.ones(5, np.float32)})
    monkeypatch.setattr(
        conversion, "written", lambda name: SAFETENSORS._replace(open=lambda _: open_safetensors(other))
    )
    refused("reads back otherwise", model, tmp_path / "out")


def test_a_source_that_changes_is_noticed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = conversion._verify

    def touching(*arguments: Any) -> str:
        os.utime(next(model.glob("*.safetensors")), ns=(1, 1))
        return right(*arguments)

    monkeypatch.setattr(conversion, "_verify", touching)
    refused("changed while it was being converted", model, tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error", "disk")])
def test_what_fails_leaves_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(local, "_sync_files", fail)
    with pytest.raises((M3Error, KeyboardInterrupt), match=r"disk: Input/output error|^$"):
        convert(model, tmp_path / "out", "msgpack")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- Watching --------------------------------------------------------------------------------------------


def test_progress_counts_every_byte(tmp_path: Path, model: Path) -> None:
    reports: list[Progress] = []
    result = convert(model, tmp_path / "out", "msgpack", progress=reports.append)
    for stage in ("converting", "verifying"):
        done = [report.done for report in reports if report.stage == stage]
        assert done == sorted(done)
        assert done[-1] == result.bytes
    assert {report.total for report in reports} == {result.bytes}


def test_tensors_read_out_of_order_are_digested_afterwards(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.uint8)
    with open_safetensors(save(tmp_path / "model", {"w": array, "v": array})) as checkpoint:
        watched = conversion._Watched(checkpoint, conversion._Stage("", 300, None))
        half = np.empty(50, np.uint8)
        for start in (50, 0):
            watched.read_into("w", start, half)
        for start in (0, 0, 50):
            watched.read_into("v", start, half)
        assert watched.digest("w") == watched.digest("v") == digest_tensor(checkpoint, "w")


# --- The command -----------------------------------------------------------------------------------------


def test_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(model), str(out), "--to", "msgpack", "--max-shard-size", "1KB"]) == 0
    line, err = capsys.readouterr()
    assert re.fullmatch(r"converted 55 tensors, [\d.]+ kB, to msgpack in \S+/out in 0\.\d s: digest \w{64}\n", line)
    assert err == ""
    with open_msgpack(out) as checkpoint:
        assert len(checkpoint.files()) > 1
    assert main(["convert", str(out), str(model), "-q"]) == 2
    assert capsys.readouterr().err.startswith(f"m3jax: {model}: exists already")
    assert main(["convert", str(model), str(out), "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == set(ConvertResult._fields)
    assert (told["directory"], told["format"], told["digest"]) == (str(out), "safetensors", digest_of(model))
    assert main(["convert", str(model), str(out), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["convert", str(model), str(out), "--to", "torch"]) == 2
    assert "no format to convert to" in capsys.readouterr().err


# --- Other libraries' names --------------------------------------------------------------------------------------


def test_names_of_another_library_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = libraries.configuration("llama")
    arrays = libraries.huggingface(config)
    libraries.saved(tmp_path / "model/model.safetensors", arrays)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    at = [str(tmp_path / name) for name in ("model", "maxtext", "apart", "back", "tunix")]
    scanned = convert(at[0], at[1], to="orbax", names="maxtext")
    assert (scanned.tensors, scanned.bytes) == (12, sum(array.nbytes for array in arrays.values()))
    tree = ocp.StandardCheckpointer().restore(tmp_path / "maxtext")
    assert ocp.StandardCheckpointer().metadata(tmp_path / "maxtext").custom_metadata == {"scan_layers": True}
    kernel = tree["params"]["params"]["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert np.array_equal(kernel[:, 1], arrays["model.layers.1.mlp.gate_proj.weight"].T)
    assert main(["convert", at[1], at[2], "--names", "maxtext", "--unscanned", "--to", "msgpack", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 21
    back = convert(at[2], at[3], names="huggingface")
    assert back.digest == convert(at[0], str(tmp_path / "same")).digest  # of the same bits under the same names
    assert back.files == ("config.json",)
    assert main(["verify", at[3]]) == 0
    record = json.loads((tmp_path / "back/m3jax-conversion.json").read_text())
    assert "params.params.decoder.layers_1.mlp.wo.kernel" in json.dumps(record)
    with pytest.raises(M3Error, match=r"'torch' is no library whose names are known: use huggingface, maxtext, "):
        convert(at[0], at[4], names="torch")
    with pytest.raises(M3Error, match="config and rounded are for other names"):
        convert(at[0], at[4], rounded=True)
    with pytest.raises(M3Error, match="only MaxText's blocks are kept apart on request"):
        convert(at[0], at[4], names="tunix", scanned=False)
    (tmp_path / "other.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(M3Error, match=r"model_type is 'gpt2' in its config.json, whose layout in tunix is not known"):
        convert(at[0], at[4], names="tunix", config=tmp_path / "other.json")
    assert not (tmp_path / "tunix").exists()


DATA = Path(os.environ.get("M3JAX_DATA", ".")) / "jax"


@pytest.mark.skipif(not DATA.is_dir(), reason="M3JAX_DATA has no runs of JAX trainers")
def test_runs_of_trainers_as_hugging_face_and_back(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "tie_word_embeddings": False}
    forms: dict[str, dict[str, Any]] = {
        "maxtext_scanned": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 256},
        "tunix_full": {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 64},
        "gemma_nested": {"model_type": "gemma3_text", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 256},
    }
    forms["maxtext_scanned"]["num_key_value_heads"] = 2
    forms["gemma_nested"] |= {"tie_word_embeddings": True, "head_dim": 8}
    for number, (folder, form) in enumerate(forms.items()):
        config = tmp_path / f"{number}.json"
        config.write_text(json.dumps({**sizes, "num_key_value_heads": 1, **form}))
        there, back = tmp_path / f"{number}there", tmp_path / f"{number}back"
        convert(DATA / folder / "base", there, names="huggingface", config=config)
        convert(there, back, names=folder.partition("_")[0], to="orbax", config=config)
        with open_checkpoint(DATA / folder / "base") as stored, open_checkpoint(back) as copy:
            for name in copy.tensors:
                wanted = read(stored, name)
                if folder.startswith("gemma") and name.endswith("gating_einsum"):
                    wanted = wanted.transpose(0, 2, 1)  # as its larger models have it
                assert np.array_equal(read(copy, name), wanted), name
