"""m3jax merge --plan: what a merge would take, from headers alone."""

import json
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import decoders as tiny
from support.directories import write as models_at

import m3jax
from m3jax.checkpoints import TensorInfo
from m3jax.cli import commands
from m3jax.streaming import reading
from m3jax.streaming.estimate import estimate_recipe

LLAMA_13B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
PARAMETERS = 13_015_864_320  # Llama 2 13B


def make_sparse(directory):
    """A checkpoint whose weights are a hole in a file: it has a size and takes no room."""
    directory.mkdir()
    header, offset = {}, 0
    for name, shape in tiny.shapes(LLAMA_13B).items():
        size = TensorInfo(name, shape, "BF16").nbytes
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (directory / "config.json").write_text(json.dumps(LLAMA_13B))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sparse")
    for name in ("base", "lm", "math"):
        make_sparse(directory / name)
    return directory


def write(place, name, **content):
    models = {"models": [str(place / "lm"), str(place / "math")]}
    (place / name).write_text(json.dumps({**models, **content}))
    return str(place / name)


TIES = {
    "merge_method": "ties",
    "parameters": {"density": 0.5, "trim_scope": "model", "sign_election": "unweighted"},
    "mixup": {"alpha": 0.5},
}


def test_thirteen_billion_parameters_from_headers(place, tmp_path, capsys):
    recipe = write(place, "ties.json", base_model=str(place / "base"), **TIES)
    begun = time.process_time()
    assert commands.main(["merge", recipe, str(tmp_path / "out"), "--plan", "--json"]) == 0
    assert time.process_time() - begun < 8  # of the processor: reading 78 GB takes more
    found = json.loads(capsys.readouterr().out)
    one = 2 * PARAMETERS
    assert found["parameters"] == PARAMETERS
    assert [(e["role"], e["bytes"]) for e in found["inputs"]] == [("expert", one), ("expert", one), ("base", one)]
    assert found["bytes_written"] == one
    # a threshold and the majority's sign from a sample, settled by one reading; the merge
    assert [entry["bytes"] for entry in found["passes"]] == [3 * one] * 2
    assert found["bytes_read"] == 6 * one
    assert found["files"] == 6
    assert found["peak_memory"] < 1e9
    assert found["resident_memory"] == 4 * one
    assert found["weights"] == {"model": list(m3jax.draw_weights(0, 0.5))}
    (note,) = found["notes"]
    assert f"the draw gives 99.8% to {place / 'lm'}" in note
    assert "29% of draws give one model more than 95%" in note
    assert found["seconds"] == [pytest.approx(7 * one / 1.5e9), pytest.approx(7 * one / 1.3e9)]
    assert sum(entry["tensors"] for entry in found["tensors"]) == len(tiny.shapes(LLAMA_13B))
    assert not list(tmp_path.iterdir())
    assert commands.main(["merge", recipe, str(tmp_path / "out"), "--plan"]) == 0
    said = capsys.readouterr().out
    for words in (
        "5120 × 13824",
        "reads    156.2 GB: ranking magnitudes 78.1 GB, merging 78.1 GB",
        "writes   26.0 GB in 6 files (free there: ",
        "time     about 2 min 01 s to 2 min 20 s by 1 process, at 1.3 to 1.5 GB/s per process of 2 cores, as measured",
    ):
        assert words in said
    assert not list(tmp_path.iterdir())


def test_weights_that_would_be_drawn_are_told_by_their_models(place, tmp_path, capsys):
    recipe = write(place, "linear.json", merge_method="linear", mixup={"alpha": 0.5})
    assert commands.main(["merge", recipe, str(tmp_path / "out"), "--plan", "--seed", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"weights  0.330600  {place / 'lm'}", f"         0.669400  {place / 'math'}"]


def test_processes_share_the_work(place, tmp_path, capsys):
    recipe = write(place, "linear.json", merge_method="linear", mixup={"alpha": 0.5})
    alone, four = (estimate_recipe(recipe, tmp_path / "out", max_shard_size="1GB", processes=count) for count in (1, 4))
    assert alone.bytes_read == 4 * PARAMETERS
    assert 0.24 < four.seconds[0] / alone.seconds[0] < 0.30
    assert [entry.what for entry in alone.passes] == ["merging"]
    arguments = ["merge", recipe, str(tmp_path / "out"), "--plan", "--num-processes", "4", "--max-shard-size", "1GB"]
    assert commands.main(arguments) == 0
    assert " by 4 processes, " in capsys.readouterr().out


def test_lanes_take_memory(place, tmp_path, capsys):
    recipe = write(place, "ties.json", base_model=str(place / "base"), **TIES)
    one, four = (estimate_recipe(recipe, tmp_path / "out", lanes=count) for count in (1, 4))
    assert four.peak_memory > one.peak_memory + 1e8
    assert commands.main(["merge", recipe, str(tmp_path / "out"), "--plan", "--json", "--lanes", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_memory"] == four.peak_memory
    assert commands.main(["merge", recipe, str(tmp_path / "out"), "--plan", "--lanes", "0"]) == 2
    assert "lanes are 0, but must be a whole number of at least 1" in capsys.readouterr().err


def test_a_plan_says_what_the_merge_would_refuse(place, tmp_path, capsys):
    recipe = write(place, "linear.json", merge_method="linear", mixup={"alpha": 0.5})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    for question in ("--plan", "--explain"):  # which ask for no place
        assert commands.main(["merge", recipe, str(tmp_path / "out"), question]) == 0
    assert commands.main(["merge", recipe, str(tmp_path / "no" / "out"), "--plan"]) == 2
    assert "its parent does not exist" in capsys.readouterr().err
    assert commands.main(["merge", recipe, str(tmp_path / "no" / "out"), "--plan"]) == 2
    assert "does not exist" in capsys.readouterr().err


RECIPES = {
    "linear": {"merge_method": "linear"},
    "ties": {**TIES, "mixup": None},
    "trimmed tensors": {"merge_method": "ties", "parameters": {"density": 0.5}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
}


def models_and_recipe(tmp_path, name):
    rng = np.random.default_rng(0)
    for model in ("base", "lm", "math"):
        (tmp_path / model).mkdir()
        tensors = {f"layers.{i}.w": rng.standard_normal((64, 96)).astype(ml_dtypes.bfloat16) for i in range(3)}
        save_file({**tensors, "steps": np.arange(4)}, tmp_path / model / "model.safetensors")
    base = {} if name == "linear" else {"base_model": str(tmp_path / ("lm" if name == "slerp" else "base"))}
    return write(tmp_path, "recipe.json", **base, **{k: v for k, v in RECIPES[name].items() if v is not None})


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_reads_and_writes_what_the_merge_does(tmp_path, name):
    """A small model has no sample: its thresholds take two readings, which the plan counts too."""
    recipe = models_and_recipe(tmp_path, name)
    planned = estimate_recipe(recipe, tmp_path / "out")
    done = m3jax.merge_checkpoint(recipe, tmp_path / "out")
    assert (planned.bytes_read, planned.bytes_written) == (done.bytes_read, done.bytes_written)
    times = {"linear": 2, "ties": 12, "trimmed tensors": 3, "slerp": 2}  # a tensor is read once, the model four times
    assert done.bytes_read == times[name] * done.bytes_written


@pytest.mark.parametrize(("held", "read"), [(0, 36), (3 * 2**13, 20), (2**20, 12)])
def test_what_is_measured_by_tensor_is_read_once_as_far_as_it_may_be_held(tmp_path, monkeypatch, held, read):
    recipe = models_and_recipe(tmp_path, "trimmed tensors")  # of three models; a tensor has two chunks, of 2:1
    want = m3jax.merge_checkpoint(recipe, tmp_path / "want").digest
    monkeypatch.setattr("m3jax.streaming.reading.HELD_BYTES", held)
    monkeypatch.setattr("m3jax.streaming.reading.default_chunk_entries", lambda inputs, width: 2**12)
    done = m3jax.merge_checkpoint(recipe, tmp_path / "out")
    assert (done.digest, done.bytes_read) == (want, read * done.bytes_written // 4)
    assert estimate_recipe(recipe, tmp_path / "other").bytes_read == done.bytes_read


def test_many_small_chunks_that_are_held_take_no_buffer_of_the_largest_each(tmp_path, monkeypatch):
    """Norms of 64 blocks in one tensor: each block is a chunk, and all are held."""
    taken, made = [0], reading._aligned_empty
    most = [0]

    def counted(nbytes):
        buffer = made(nbytes)
        taken[0] += nbytes
        most[0] = max(most[0], taken[0])
        weakref.finalize(buffer.base, lambda: taken.__setitem__(0, taken[0] - nbytes))
        return buffer

    monkeypatch.setattr(reading, "_aligned_empty", counted)
    shapes = {"params.layers.scale": (64, 8), "params.embed.embedding": (2**13, 16)}
    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        models_at(tmp_path / name, tensors, {"model_type": "llama", "num_hidden_layers": 64})
    recipe = {"merge_method": "ties", "parameters": {"density": 0.5}, "base_model": str(tmp_path / "base")}
    recipe["models"] = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = m3jax.merge_checkpoint(recipe, tmp_path / "out", chunk_entries=2**16)
    assert done.bytes_read == 3 * done.bytes_written
    held = 3 * 4 * max(64 * 2**12, 2**17)
    assert most[0] <= held + 3 * 4 * 2**16 * 6
