"""Out of core: the oracle's bytes at every chunk size, resuming, replaying, and saying what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import oracle
from support.directories import WIDE, read, recipe, write, write_models
from support.interruptions import interruption
from support.matrix import DTYPES, METHODS, SHAPES, SPARSIFIERS, models, pairwise, same

import m3jax
from m3jax import M3Error
from m3jax.naming import block_group

CHUNKS = (2**16, 2**17, 2**18)
GROUPS = (None, "model", "layer", "tensor")


def check(place, tmp_path, told, keys, dtype="bfloat16", n=2, chunk=2**16, shapes=WIDE, weights=None):
    base, experts = write_models(place, dtype, n, shapes)
    asked = recipe(place, n, **keys)
    if keys["merge_method"] == "linear" and "sparsify" not in keys:
        del asked["base_model"]
    want = oracle.merge(experts, base, weights=weights or [1.0] * n, seed=keys.get("seed", 0), **told)
    out = tmp_path / "out"
    result = m3jax.merge_checkpoint(asked, out, chunk_entries=chunk)
    assert same(read(out), want) == (True, [])
    again = m3jax.replay(out, tmp_path / "again")
    assert again.digest == result.digest
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert m3jax.verify(out).differences == ()


# Magnitude pruning ranks each tensor and TIES then the model: a phase that measures tensors and does not merge.
@pytest.mark.parametrize(
    ("method", "sparsifier"),
    [
        ("linear", "none"),
        ("task_arithmetic", "dare_weights"),
        ("ties_paper", "dare"),
        ("ties_paper", "magnitude"),
        ("ties_mergekit", "magnitude_model"),
        ("task_arithmetic", "breadcrumbs"),
        ("ties_mergekit", "della"),
    ],
)
def test_bytes_are_the_oracles(tmp_path, method, sparsifier):
    _, keys, told = METHODS[method]
    _, sparse, told_sparse = SPARSIFIERS[sparsifier]
    check(tmp_path / "in", tmp_path, told | told_sparse, {**keys, **sparse, "seed": 5})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sparsifier", "dtype", "granularity", "chunk"),
    # Methods with sparsifiers are what scripts/golden brings together, and scripts/soak the rest: every other one here.
    list(pairwise(METHODS, SPARSIFIERS, DTYPES, GROUPS, CHUNKS, apart=((0, 1),)))[::2],
)
def test_bytes_are_the_oracles_everywhere(tmp_path, method, sparsifier, dtype, granularity, chunk):
    _, keys, told = METHODS[method]
    _, sparse, told_sparse = SPARSIFIERS[sparsifier]
    asked, weights = {**keys, **sparse, "seed": 5}, None
    if granularity:
        groups = {k: None if granularity == "model" else block_group(k, granularity) for k in WIDE}
        weights = {k: oracle.draw(5, 0.5, 3, group) for k, group in groups.items()}
        asked["mixup"] = {"alpha": 0.5, "granularity": granularity}
    check(tmp_path / "in", tmp_path, told | told_sparse, asked, dtype, 3, chunk, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties_paper"])
def test_one_digest_at_every_chunk_size(tmp_path, method):
    write_models(tmp_path / "in", n=3)
    asked = recipe(tmp_path / "in", 3, **METHODS[method][1], sparsify={"method": "dare", "density": 0.3})
    digests = {m3jax.merge_checkpoint(asked, tmp_path / f"{c}", chunk_entries=c).digest for c in CHUNKS}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("method", "granularity"), [("linear", "model"), ("task_arithmetic", "layer"), ("ties_paper", "tensor")]
)
def test_drawn_weights(tmp_path, method, granularity):
    _, keys, told = METHODS[method]
    groups = {k: None if granularity == "model" else block_group(k, granularity) for k in SHAPES}
    weights = {k: oracle.draw(8, 0.5, 2, group) for k, group in groups.items()}
    keys = {**keys, "mixup": {"alpha": 0.5, "granularity": granularity}, "seed": 8}
    check(tmp_path / "in", tmp_path, told, keys, shapes=SHAPES, weights=weights)
    manifest = json.loads((tmp_path / "again" / "m3jax.json").read_text())
    for group, drawn in manifest["weights"].items():
        assert [float.fromhex(h) for h in drawn["hex"]] == drawn["decimal"], group


DARE = {"sparsify": "dare", "keep": 0.4}


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("dare_linear", {"method": "task_arithmetic", **DARE}),
        ("dare_ties", {"method": "ties", "normalize": False, **DARE}),
    ],
)
def test_mergekits_dare_methods(tmp_path, method, told):
    check(tmp_path / "in", tmp_path, told, {"merge_method": method, "parameters": {"density": 0.4}, "seed": 3})


def test_slerp(tmp_path):
    _, experts = write_models(tmp_path / "in")
    asked = {"merge_method": "slerp", "models": recipe(tmp_path / "in")["models"], "parameters": {"t": 0.3}}
    want = oracle.merge(experts, method="slerp", weights=0.3)
    for chunk in (2**16, 2**17):
        m3jax.merge_checkpoint(asked, tmp_path / "out", chunk_entries=chunk, overwrite=True)
        assert same(read(tmp_path / "out"), want) == (True, [])
    drawn = m3jax.merge_checkpoint({**asked, "parameters": {}, "mixup": {"alpha": 0.5}, "seed": 4}, tmp_path / "drawn")
    (t,) = drawn.manifest["weights"]["model"]["decimal"]
    assert t == oracle.draw(4, 0.5, 2)[0]
    assert same(read(tmp_path / "drawn"), oracle.merge(experts, method="slerp", weights=t)) == (True, [])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "granularity", "chunk"), pairwise(DTYPES, GROUPS[1:], CHUNKS))
def test_slerp_draws_its_position(tmp_path, dtype, granularity, chunk):
    _, experts = write_models(tmp_path / "in", dtype)
    asked = {
        "merge_method": "slerp",
        "models": recipe(tmp_path / "in")["models"],
        "mixup": {"alpha": 0.5, "granularity": granularity},
        "seed": 4,
    }
    groups = {k: None if granularity == "model" else block_group(k, granularity) for k in WIDE}
    want = oracle.merge(experts, method="slerp", weights={k: oracle.draw(4, 0.5, 2, g)[0] for k, g in groups.items()})
    m3jax.merge_checkpoint(asked, tmp_path / "out", chunk_entries=chunk)
    assert same(read(tmp_path / "out"), want) == (True, [])
    m3jax.replay(tmp_path / "out", tmp_path / "again")
    assert same(read(tmp_path / "again"), want) == (True, [])


def test_gradients_and_filters(tmp_path):
    base, experts = write_models(tmp_path / "in", shapes=SHAPES)
    entry = {"model": str(tmp_path / "in" / "expert-0"), "parameters": {"weight": [0.0, 1.0]}}
    other = {
        "model": str(tmp_path / "in" / "expert-1"),
        "parameters": {"weight": [{"filter": "mlp", "value": 2.0}, {"value": 0.5}]},
    }
    asked = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "in" / "base"), "models": [entry, other]}
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    weights = {
        "model.embed_tokens.weight": [0.0, 0.5],
        "model.layers.0.mlp.weight": [0.0, 2.0],
        "model.layers.1.mlp.weight": [1.0, 2.0],
        "model.norm.weight": [1.0, 0.5],
    }
    want = oracle.merge(experts, base, "task_arithmetic", weights)
    assert same(read(tmp_path / "out"), want) == (True, [])


def test_model_wide_thresholds_by_sampling_are_exact(tmp_path, monkeypatch):
    """The guess from a sample, and the ways back when it misses, give the bytes of the full search."""
    from m3jax.arithmetic import ranking
    from m3jax.methods import measures

    _, keys, told = METHODS["ties_paper"]
    monkeypatch.setattr(measures, "_WORTH_SAMPLING", 1)
    suggest = ranking.suggest
    wrong = {
        "hit": suggest,
        "near": lambda *given: suggest(*given) + np.uint32(20000),  # the bracket holds, the signs may be others
        "miss": lambda *given: np.full(2, 0x7F000000, np.uint32),
    }
    for name, suggested in wrong.items():
        (tmp_path / name).mkdir()
        monkeypatch.setattr(ranking, "suggest", suggested)
        check(tmp_path / name / "in", tmp_path / name, told, keys)


def test_output_dtype_and_config(tmp_path):
    base, experts = write_models(tmp_path / "in", shapes=SHAPES)
    m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="task_arithmetic", dtype="float32"), tmp_path / "out")
    want = oracle.merge(experts, base, "task_arithmetic", out="float32")
    assert same(read(tmp_path / "out"), want) == (True, [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_mixed_dtypes_and_buffers(tmp_path):
    mixed = {"a": np.ones((3, 5), ml_dtypes.bfloat16), "b": np.full(7, 0.5, np.float32), "c": np.ones(2, np.float16)}
    ids = {"ids": np.arange(5), "flag": np.array([True, False])}
    for name in ("base", "expert-0", "expert-1"):
        write(tmp_path / "in" / name, mixed | ids)
    m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="task_arithmetic"), tmp_path / "out")
    got = read(tmp_path / "out")
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in (mixed | ids).items()}
    assert got["ids"].tolist() == [0, 1, 2, 3, 4]
    save_file({**mixed, **ids, "ids": np.arange(5) + 1}, tmp_path / "in" / "expert-1" / "model.safetensors")
    with pytest.raises(M3Error, match=r"ids: is a buffer of I64.*differs between"):
        m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="task_arithmetic"), tmp_path / "out2")
    asked = recipe(tmp_path / "in", merge_method="task_arithmetic", exclude=["^ids$"])
    m3jax.merge_checkpoint(asked, tmp_path / "out2")
    assert read(tmp_path / "out2")["ids"].tolist() == [0, 1, 2, 3, 4]


def test_shards_and_index(tmp_path):
    base, _ = write_models(tmp_path / "in")
    m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="task_arithmetic"), tmp_path / "one")
    many = m3jax.merge_checkpoint(
        recipe(tmp_path / "in", merge_method="task_arithmetic"), tmp_path / "many", max_shard_size="2KB"
    )
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base)
    assert same(read(tmp_path / "many"), read(tmp_path / "one")) == (True, [])
    assert many.digest == m3jax.verify(tmp_path / "one").digest
    for file in (tmp_path / "many").glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_tied_embeddings(tmp_path):
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    base, experts = models(DTYPES["bfloat16"], 2, shapes)
    head = {"lm_head.weight": base["model.embed_tokens.weight"]}
    write(tmp_path / "in" / "base", base, {"tie_word_embeddings": True})
    write(tmp_path / "in" / "expert-0", experts[0] | head, {"tie_word_embeddings": True})
    write(tmp_path / "in" / "expert-1", experts[1], {"tie_word_embeddings": True})
    asked = recipe(tmp_path / "in", merge_method="task_arithmetic")
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    assert set(read(tmp_path / "out")) == set(shapes)
    (tmp_path / "in" / "expert-0" / "config.json").write_text('{"tie_word_embeddings": false}')
    m3jax.merge_checkpoint(asked, tmp_path / "untied")
    base["lm_head.weight"] = base["model.embed_tokens.weight"]  # a tied model's head is its embedding
    experts[0] |= head
    experts[1]["lm_head.weight"] = experts[1]["model.embed_tokens.weight"]
    assert same(read(tmp_path / "untied"), oracle.merge(experts, base, "task_arithmetic")) == (True, [])
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    assert m3jax.replay(tmp_path / "untied", tmp_path / "again").digest == m3jax.verify(tmp_path / "untied").digest
    stale = {name: values for name, values in base.items() if name in shapes}
    stale["lm_head.weight"] = experts[1]["lm_head.weight"]  # a copy that nobody uses
    write(tmp_path / "in" / "stale", stale, {"tie_word_embeddings": True})
    m3jax.merge_checkpoint({**asked, "base_model": str(tmp_path / "in" / "stale")}, tmp_path / "copied")
    assert same(read(tmp_path / "copied"), oracle.merge(experts, base, "task_arithmetic")) == (True, [])
    assert json.loads((tmp_path / "copied" / "config.json").read_text())["tie_word_embeddings"] is False
    tied = {**asked, "merge_method": "linear", "models": [str(tmp_path / "in" / name) for name in ("base", "expert-1")]}
    m3jax.merge_checkpoint({**tied, "base_model": str(tmp_path / "in" / "expert-0")}, tmp_path / "told")
    assert same(read(tmp_path / "told"), oracle.merge([base, experts[1]], method="linear")) == (True, [])
    assert json.loads((tmp_path / "told" / "config.json").read_text())["tie_word_embeddings"] is False


def test_companions_are_carried_over(tmp_path):
    write_models(tmp_path / "in", shapes=SHAPES)
    (tmp_path / "in" / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "base" / "generation_config.json").write_text('{"a": 1}')
    (tmp_path / "in" / "expert-1" / "tokenizer.json").write_text('{"other": 1}')
    (tmp_path / "in" / "expert-1" / "chat_template.jinja").write_text("{{ messages }}")
    asked = recipe(tmp_path / "in", merge_method="task_arithmetic", mixup={"alpha": 0.5}, seed=2)
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "m3jax.json",
        "model.safetensors",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv 2502.15434" in card
    assert f"{oracle.draw(2, 0.5, 2)[0]:.6f}" in card
    other = str(tmp_path / "in" / "expert-1")
    m3jax.merge_checkpoint({**asked, "tokenizer_source": other}, tmp_path / "out2")
    assert (tmp_path / "out2" / "tokenizer.json").read_text() == '{"other": 1}'
    assert (tmp_path / "out2" / "chat_template.jinja").exists()
    assert (tmp_path / "out2" / "generation_config.json").exists()
    with pytest.raises(M3Error, match="union"):
        m3jax.merge_checkpoint({**asked, "tokenizer_source": "union"}, tmp_path / "out3")
    with pytest.raises(M3Error, match="not one of the models"):
        m3jax.merge_checkpoint({**asked, "tokenizer_source": "elsewhere"}, tmp_path / "out3")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_companion_that_was_cut_is_refused(tmp_path, name):
    write_models(tmp_path / "in", shapes=SHAPES)
    cut = tmp_path / "in" / "base" / name
    cut.write_text('{"model": {"vocab": {"a": 0, "b"')
    with pytest.raises(M3Error, match=f"{cut}: is no JSON, and the output would be as unreadable: restore it"):
        m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="task_arithmetic"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_of_an_expert_that_was_cut_is_refused(tmp_path):
    write_models(tmp_path / "in", shapes={**SHAPES, "model.embed_tokens.weight": (8, 4)})
    for name in ("base", "expert-0"):
        (tmp_path / "in" / name / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    cut = tmp_path / "in" / "expert-1" / "tokenizer.json"
    cut.write_text('{"model": {"vocab": {"a": 0, "b"')
    with pytest.raises(M3Error, match=f"{cut}: is no JSON .*, so its tokens cannot be told: restore it"):
        m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="task_arithmetic"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("method", "granularity"), [("linear", "model"), ("slerp", "layer"), ("linear", "tensor")])
def test_the_card_says_whether_weights_were_drawn(tmp_path, method, granularity):
    write_models(tmp_path / "in", shapes=SHAPES)
    models = recipe(tmp_path / "in")["models"]
    asked = {"merge_method": method, "models": models, "mixup": {"alpha": 0.5, "granularity": granularity}}
    drawn = m3jax.merge_checkpoint(asked, tmp_path / "drawn").manifest["weights"]
    assert "Weights drawn from Beta" in (tmp_path / "drawn" / "README.md").read_text()
    chosen = {group: (0.25, 0.75)[: len(told["decimal"])] for group, told in drawn.items()}
    m3jax.merge_checkpoint(asked, tmp_path / "chosen", weights=chosen)
    assert "Weights chosen in place of a draw from Beta" in (tmp_path / "chosen" / "README.md").read_text()


# --- interruption -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties_paper"])
def test_interrupted_merges_resume(tmp_path, method):
    write_models(tmp_path / "in")
    asked = recipe(tmp_path / "in", **METHODS[method][1])
    want = m3jax.merge_checkpoint(asked, tmp_path / "want", max_shard_size="100KB")
    interrupt = interruption(tmp_path / "out.partial", 0.8)
    with pytest.raises(KeyboardInterrupt):
        m3jax.merge_checkpoint(asked, tmp_path / "out", max_shard_size="100KB", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    result = m3jax.merge_checkpoint(asked, tmp_path / "out", max_shard_size="100KB")
    assert result.digest == want.digest
    assert result.resumed_shards > 0
    for file in (tmp_path / "want").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert not (tmp_path / "out.partial").exists()


def test_another_recipe_does_not_resume(tmp_path):
    write_models(tmp_path / "in")
    first = recipe(tmp_path / "in", merge_method="task_arithmetic")
    interrupt = interruption(tmp_path / "out.partial", 0.8)
    with pytest.raises(KeyboardInterrupt):
        m3jax.merge_checkpoint(first, tmp_path / "out", max_shard_size="2KB", progress=interrupt)
    second = recipe(tmp_path / "in", merge_method="task_arithmetic", parameters={"lambda": 0.5})
    result = m3jax.merge_checkpoint(second, tmp_path / "out", max_shard_size="2KB")
    assert result.resumed_shards == 0
    assert m3jax.verify(tmp_path / "out").differences == ()


@pytest.mark.slow
def test_killed_merges_resume(tmp_path):
    """kill -9 at moments spread over the run: never an output, always the right digest in the end."""
    shapes = {f"model.layers.{i}.w": (1000, 1000) for i in range(12)}
    write_models(tmp_path / "in", shapes=shapes)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tmp_path / "in", **METHODS["ties_paper"][1])))
    want = m3jax.merge_checkpoint(file, tmp_path / "want", max_shard_size="2MB")
    command = [
        sys.executable,
        "-m",
        "m3jax",
        "merge",
        str(file),
        str(tmp_path / "out"),
        "--max-shard-size",
        "2MB",
        "--quiet",
    ]
    for tenth in range(5, 45, 5):
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(tenth / 10)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():  # killed between the rename and its end
            break
    else:
        subprocess.run(command, check=True)
    assert m3jax.verify(tmp_path / "out").digest == want.digest


def test_two_merges_do_not_share_an_output(tmp_path):
    from m3jax.outputs.local import Staging

    with Staging(tmp_path / "out", "one", 1), pytest.raises(M3Error, match="another merge"):
        Staging(tmp_path / "out", "two", 1)


def test_full_disk(tmp_path, monkeypatch):
    write_models(tmp_path / "in", shapes=SHAPES)
    asked = recipe(tmp_path / "in", merge_method="task_arithmetic")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(M3Error, match="the disk has 100 bytes free"):
        m3jax.merge_checkpoint(asked, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_really_full_disk(tmp_path):
    """A small file system, filled by someone else once the merge has begun."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        shapes = {f"model.layers.{i}.w": (500, 500) for i in range(4)}
        write_models(tmp_path / "in", shapes=shapes)
        asked = recipe(tmp_path / "in", merge_method="task_arithmetic")

        def fill(progress):
            if not (place / "hog").exists():
                (place / "hog").write_bytes(b"x" * 7_000_000)

        with pytest.raises(M3Error, match=r"No space left|free space"):
            m3jax.merge_checkpoint(asked, place / "out", progress=fill, max_shard_size="1MB")
        assert not (place / "out").exists()
        (place / "hog").unlink()
        m3jax.merge_checkpoint(asked, place / "out", max_shard_size="1MB")
        assert m3jax.verify(place / "out").differences == ()
    finally:
        subprocess.run(["umount", str(place)], check=True)


# --- bad input ----------------------------------------------------------------------------------------------------


def refuse(tmp_path, asked, sentence, **options):
    with pytest.raises(M3Error, match=sentence) as caught:
        m3jax.merge_checkpoint(asked, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def place(tmp_path):
    write_models(tmp_path / "in", shapes=SHAPES)
    return tmp_path / "in"


def damage(file, change):
    content = bytearray(file.read_bytes())
    file.write_bytes(change(content))


def test_nonfinite_inputs(tmp_path, place):
    tensors = load_file(place / "expert-0" / "model.safetensors")
    tensors["model.norm.weight"][3] = np.inf
    save_file(tensors, place / "expert-0" / "model.safetensors")
    asked = recipe(place, merge_method="task_arithmetic")
    refuse(tmp_path, asked, r"model\.norm\.weight of .*expert-0.*NaN or infinite")
    m3jax.merge_checkpoint(asked, tmp_path / "out", allow_nonfinite=True)
    m3jax.replay(tmp_path / "out", tmp_path / "again")


def test_overflowing_outputs(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic", parameters={"lambda": 1e6}, dtype="float16")
    refuse(tmp_path, asked, "overflow float16")


def test_tensors_that_do_not_fit(tmp_path, place):
    tensors = load_file(place / "expert-0" / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: np.ones((42, 16), ml_dtypes.bfloat16)}, place / "expert-0" / "model.safetensors")
    asked = recipe(place, merge_method="task_arithmetic")
    refuse(tmp_path, asked, r"embed_tokens.*\[40, 16\].*base.*\[42, 16\].*expert-0 has 2 more rows than .*base")
    del tensors[name]
    save_file(tensors, place / "expert-0" / "model.safetensors")
    refuse(tmp_path, asked, r"embed_tokens\.weight: in .*base but not in .*expert-0")


def test_damaged_files(tmp_path, place):
    file = place / "expert-0" / "model.safetensors"
    asked = recipe(place, merge_method="task_arithmetic")
    whole = file.read_bytes()
    for change in (
        lambda b: b[: len(b) // 2],
        lambda b: b[:4],
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b[:8] + b"[" + b[9:],
    ):
        file.write_bytes(whole)
        damage(file, change)
        refuse(tmp_path, asked, "expert-0")
    file.unlink()
    refuse(tmp_path, asked, "expert-0")
    (place / "expert-1" / "model-00001-of-00002.safetensors").unlink()
    file.write_bytes(whole)
    refuse(tmp_path, asked, "model-00001-of-00002.safetensors")


def test_outputs_that_cannot_be(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    with pytest.raises(M3Error, match="exists already"):
        m3jax.merge_checkpoint(asked, tmp_path / "taken")
    with pytest.raises(M3Error, match=r"holds no m3jax\.json of an output, and only what"):
        m3jax.merge_checkpoint(asked, tmp_path / "taken", overwrite=True)
    assert (tmp_path / "taken" / "precious").exists()
    files = {path.relative_to(tmp_path / "taken").as_posix(): "" for path in (tmp_path / "taken").rglob("*")}
    (tmp_path / "taken" / "m3jax.json").write_text(json.dumps({"output": {"files": files}}))
    m3jax.merge_checkpoint(asked, tmp_path / "taken", overwrite=True)
    assert not (tmp_path / "taken" / "precious").exists()
    with pytest.raises(M3Error, match="its parent does not exist"):
        m3jax.merge_checkpoint(asked, tmp_path / "not" / "there")
    (tmp_path / "file").write_text("x")
    with pytest.raises(M3Error, match="not a directory"):
        m3jax.merge_checkpoint(asked, tmp_path / "file", overwrite=True)


def test_what_is_not_ours_is_never_emptied(tmp_path, place):
    """Directories named like ours, and symbolic links, are somebody's."""
    asked = recipe(place, merge_method="task_arithmetic")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis.txt").write_text("x")
    shutil.copytree(tmp_path / "real", tmp_path / "out.partial")
    (tmp_path / "link.partial").symlink_to(tmp_path / "real")
    for out in ("out", "link"):
        with pytest.raises(
            M3Error, match=rf"{out}\.partial: is where the merge would be made, but holds something else"
        ):
            m3jax.merge_checkpoint(asked, tmp_path / out)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    with pytest.raises(M3Error, match="not a directory"):
        m3jax.merge_checkpoint(asked, tmp_path / "linked", overwrite=True)
    assert (tmp_path / "real" / "thesis.txt").exists()
    shutil.copytree(place / "expert-0", tmp_path / "new.partial")
    with pytest.raises(M3Error, match=r"new\.partial"):
        m3jax.merge_checkpoint(
            {**asked, "models": [str(tmp_path / "new.partial"), asked["models"][1]]}, tmp_path / "new"
        )
    assert (tmp_path / "new.partial" / "model.safetensors").exists()
    m3jax.merge_checkpoint(asked, tmp_path / "again")
    shutil.copytree(tmp_path / "real", tmp_path / "again.replaced")
    m3jax.merge_checkpoint(asked, tmp_path / "again", overwrite=True)
    assert (tmp_path / "again.replaced" / "thesis.txt").exists()
    assert not list(tmp_path.glob("again.replaced-*"))


def test_a_lock_taken_while_another_merge_publishes_is_not_its_output(tmp_path, monkeypatch):
    """Whoever waits for the directory gets a new one once the old one has become the output."""
    from m3jax.outputs import local

    first = local.Staging(tmp_path / "out", "one", 1, names=["m3jax.json"])
    (first.path / "m3jax.json").write_text('{"output": {"files": {}}}')
    with pytest.raises(M3Error, match="another merge"):
        local.Staging(tmp_path / "out", "two", 1)
    first.publish()
    first.__exit__(None, None, None)
    with pytest.raises(M3Error, match="exists already"):
        local.Staging(tmp_path / "out", "two", 1)
    with local.Staging(tmp_path / "out", "two", 1, overwrite=True) as second:
        assert second.path.is_dir()
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["m3jax.json"]


def test_leftovers_of_a_kill_do_not_count_as_a_full_disk(tmp_path):
    from m3jax.outputs.local import Staging

    def interrupted(staging):
        staging.record({"shard": "model-00001-of-00002.safetensors"})
        (staging.path / "model-00002-of-00002.safetensors.tmp").write_bytes(b"x" * 1000)
        with open(staging.path / "m3jax-journal.jsonl", "a") as journal:
            journal.write('{"shard": "cut')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out", "one", 1, names=["*.safetensors"]) as staging:
        interrupted(staging)
    with Staging(tmp_path / "out", "one", 1, names=["*.safetensors"]) as again:
        assert [entry["shard"] for entry in again.finished] == ["model-00001-of-00002.safetensors"]
        assert not list(again.path.glob("*.safetensors.tmp"))
        again.record({"shard": "model-00002-of-00002.safetensors"})
        assert len((again.path / "m3jax-journal.jsonl").read_text().splitlines()) == 3


def test_an_input_cannot_be_overwritten_while_it_is_read(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic")
    files = {path.name: "" for path in (place / "expert-0").iterdir()}
    (place / "expert-0" / "m3jax.json").write_text(json.dumps({"output": {"files": files}}))  # a merge itself
    with pytest.raises(M3Error, match="is one of the models"):
        m3jax.merge_checkpoint(asked, place / "expert-0", overwrite=True)
    assert (place / "expert-0" / "model.safetensors").exists()


def test_excludes_that_match_nothing(tmp_path, place):
    refuse(tmp_path, recipe(place, merge_method="task_arithmetic", exclude=["rotary"]), "matches no tensor")


def test_bad_sizes(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic")
    refuse(tmp_path, asked, "size", max_shard_size="many")
    refuse(tmp_path, asked, "power of two", chunk_entries=100_000)


def test_small_disks_and_long_names_are_said_in_a_sentence(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic")
    with pytest.raises(M3Error, match="File name too long"):
        m3jax.merge_checkpoint(asked, tmp_path / ("x" * 300))


@pytest.mark.parametrize("weights", [[0.0, 1.0], [1.0, 0.0]])
def test_ties_takes_weights_of_zero(tmp_path, weights):
    """As M³ draws them for small α: where only that expert agrees, its share is 0."""
    base, experts = write_models(tmp_path / "in", shapes=SHAPES)
    entries = [
        {"model": m, "parameters": {"weight": w}}
        for m, w in zip(recipe(tmp_path / "in")["models"], weights, strict=True)
    ]
    asked = recipe(tmp_path / "in") | {"merge_method": "ties", "models": entries, "parameters": {"density": 0.4}}
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    want = oracle.merge(experts, base, "ties", weights, density=0.4)
    assert same(read(tmp_path / "out"), want) == (True, [])


def test_ties_weights_that_cancel_in_a_subset(tmp_path, place):
    first, second = recipe(place)["models"]
    entries = [{"model": first, "parameters": {"weight": 1.0}}, {"model": second, "parameters": {"weight": -1.0}}]
    refuse(tmp_path, recipe(place) | {"merge_method": "ties", "models": entries}, "sum to 0")


# --- replay and verify --------------------------------------------------------------------------------------------


def test_replay_refuses_changed_inputs(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic", mixup={"alpha": 0.5})
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    tensors = load_file(place / "expert-0" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, place / "expert-0" / "model.safetensors")
    with pytest.raises(M3Error, match=r"expert-0.*model\.norm\.weight.*changed"):
        m3jax.replay(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_replay_of_moved_inputs_uses_the_recorded_weights(tmp_path, place):
    asked = recipe(place, merge_method="task_arithmetic", mixup={"alpha": 0.5})
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    place.rename(tmp_path / "moved")
    with pytest.raises(M3Error, match="expert-0"):
        m3jax.replay(tmp_path / "out", tmp_path / "again")
    names = [asked["base_model"], *asked["models"]]
    sources = {name: str(tmp_path / "moved" / Path(name).name) for name in names}
    manifest = tmp_path / "out" / "m3jax.json"
    with pytest.raises(M3Error, match="misspelt: is not a model of this manifest"):
        m3jax.replay(manifest, tmp_path / "again", sources={**sources, "misspelt": "x"})
    again = m3jax.replay(manifest, tmp_path / "again", sources=sources)
    assert (tmp_path / "again" / "m3jax.json").read_bytes() == manifest.read_bytes()
    assert again.digest == m3jax.verify(tmp_path / "out").digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bits": "m3jax-1"}', '{"bits": 3, "recipe": 4}'])
def test_damaged_manifests(tmp_path, text):
    (tmp_path / "m3jax.json").write_text(text)
    with pytest.raises(M3Error, match="manifest"):
        m3jax.replay(tmp_path, tmp_path / "again")
    with pytest.raises(M3Error, match=r"m3jax\.json"):
        m3jax.verify(tmp_path / "nowhere")


def test_verify_sees_every_change(tmp_path, place):
    m3jax.merge_checkpoint(recipe(place, merge_method="task_arithmetic"), tmp_path / "out")
    damage(tmp_path / "out" / "model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "README.md").unlink()
    found = m3jax.verify(tmp_path / "out").differences
    assert len(found) == 2
    assert any("bytes" in f for f in found)


# --- memory -------------------------------------------------------------------------------------------------------

_PEAK = """
import sys, threading, time
import m3jax
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        with open("/proc/self/status") as status:
            peak = max(peak, *(int(l.split()[1]) for l in status if l.startswith("RssAnon")))
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
try:
    m3jax.merge_checkpoint(sys.argv[1], sys.argv[2])
finally:
    stop = True
    watcher.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads anonymous memory from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for layers in (20, 60):
        place = tmp_path / str(layers)
        write_models(place, shapes={f"model.layers.{i}.w": (2048, 1024) for i in range(layers)})
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe(place, **METHODS["ties_paper"][1])))
        run = subprocess.run(
            [sys.executable, "-c", _PEAK, str(file), str(place / "out")],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ
            | {"MALLOC_ARENA_MAX": "2"},  # else what freed memory the allocator keeps is a matter of luck
        )
        peaks.append(int(run.stdout) * 1024)
    assert max(peaks) < 0.8e9, peaks
    # Three times the model: 500 MB more to read, 170 MB more to write. Holding any of it would show.
    assert peaks[1] < peaks[0] + 150e6, peaks


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_nan_and_infinity_is_seen(dtype):
    from m3jax.streaming.reading import check_finite

    name = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    bits = np.arange(2**16, dtype=np.uint16)
    patterns = bits if dtype != "float32" else bits.astype(np.uint32) << 16
    values = patterns.view(DTYPES[dtype]).astype(np.float32)

    def is_refused(pattern):
        try:
            check_finite(np.array([0, pattern, 0], patterns.dtype).view(np.uint8), name, lambda: "no")
        except M3Error:
            return True
        return False

    rows = [
        0,
        1,
        *np.flatnonzero(~np.isfinite(values)).tolist()[::7],
        *np.flatnonzero(np.isfinite(values)).tolist()[::97],
    ]
    assert [is_refused(patterns[i]) for i in rows] == [not np.isfinite(values[i]) for i in rows]


def test_a_replay_says_how_to_name_a_model_that_has_moved(tmp_path):
    write_models(tmp_path, shapes={"w": (4, 4)})
    m3jax.merge_checkpoint(recipe(tmp_path, merge_method="task_arithmetic"), tmp_path / "out")
    (tmp_path / "expert-1").rename(tmp_path / "moved")
    name = str(tmp_path / "expert-1")
    with pytest.raises(M3Error, match=f"if it has moved, --input {name}=HERE says where it is"):
        m3jax.replay(tmp_path / "out", tmp_path / "again")
    m3jax.replay(tmp_path / "out", tmp_path / "again", sources={name: str(tmp_path / "moved")})


def test_what_a_result_shows(tmp_path):
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file({"w": np.full(4, seed, np.float32)}, tmp_path / name / "model.safetensors")
    models = [str(tmp_path / name) for name in "ab"]
    recipe = {"merge_method": "linear", "models": models, "mixup": {"alpha": 0.5}, "seed": 2}
    result = m3jax.merge_checkpoint(recipe, tmp_path / "<i>")
    assert result.weights == {"model": tuple(result.manifest["weights"]["model"]["decimal"])}
    assert len(repr(result)) < 160 + len(str(tmp_path))
    assert "drawn model: 0.3306 0.6694" in repr(result)
    shown = result._repr_html_()
    assert result.digest in shown
    assert "<td>0.330600  0.669400</td>" in shown
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
