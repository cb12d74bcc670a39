"""What tensors are decides what a merge does with them: layouts of one model, kinds, aliases, towers, old schemes."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.directories import read, recipe, write
from support.matrix import ALONE, MEASURED, METHODS, SPARSIFIERS, few, in_turn, most

import m3jax
from m3jax import M3Error
from m3jax.checkpoints import TensorInfo, digest_tensor, open_checkpoint
from m3jax.methods.leaf import Pipeline
from m3jax.streaming.plan import BlockPlan, TensorPlan
from m3jax.streaming.reading import visits

LAYERS = 3
FIXTURE = Path(__file__).parent / "fixtures" / "m3jax-1"


def block_by_block(seed):
    """A Flax tree as linen writes it without scan."""
    rng = np.random.default_rng(seed)

    def coarse(*shape):  # so that ties at thresholds are common
        return (np.round(rng.standard_normal(shape) * 16) / 16).astype(np.float32)

    tree = {"embedder.embedding": coarse(11, 6), "final_norm.scale": coarse(6)}
    for layer in range(LAYERS):
        tree[f"layers_{layer}.mlp.kernel"] = coarse(130, 9)
        tree[f"layers_{layer}.norm.scale"] = coarse(6)
    return tree


def stacked(tree, axis):
    """The same with leaves that stack the layers, as scan (axis 0) and MaxText (axis 1) write them."""
    outside = {name: value for name, value in tree.items() if "layers_" not in name}
    for leaf in ("mlp.kernel", "norm.scale"):
        outside[f"layers.{leaf}"] = np.stack([tree[f"layers_{i}.{leaf}"] for i in range(LAYERS)], axis)
    return outside


LAYOUTS = {
    "by block": lambda tree: tree,
    "axis 0": lambda tree: stacked(tree, 0),
    "axis 1": lambda tree: stacked(tree, 1),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Base and two experts in every layout: `axis 0/base` …"""
    place = tmp_path_factory.mktemp("layouts")
    for layout, arranged in LAYOUTS.items():
        for seed, name in enumerate(("base", "expert-0", "expert-1")):
            write(place / layout / name, arranged(block_by_block(seed)), {"num_hidden_layers": LAYERS})
    return place


def by_block(directory, axis):
    """What a merge wrote, block by block."""
    tree = read(directory)
    if axis is None:
        return tree
    outside = {name: value for name, value in tree.items() if not name.startswith("layers.")}
    for name in set(tree) - set(outside):
        for i in range(LAYERS):
            outside[f"layers_{i}.{name.removeprefix('layers.')}"] = np.take(tree[name], i, axis)
    return outside


FEW = [
    ("linear", "none"),
    ("task_arithmetic", "dare"),
    ("ties_paper", "magnitude"),
    ("ties_mergekit", "della"),
    ("ties_paper", "dare"),
    ("slerp", "none"),
    ("model_stock_rows", "none"),
]


@pytest.mark.parametrize(
    ("method", "sparsifier"), few(dict.fromkeys([*FEW, *in_turn(), *((m, "none") for m in MEASURED)]), *FEW)
)
def test_every_layout_of_one_model_gives_the_same_values(place, tmp_path, method, sparsifier):
    keys = (METHODS.get(method) or ALONE[method])[1] | SPARSIFIERS[sparsifier][1]
    asked = {**keys, "seed": 3}
    if method in METHODS:
        asked["mixup"] = {"alpha": 1.0, "granularity": "layer"}
    found = {}
    for layout, axis in zip(LAYOUTS, (None, 0, 1), strict=True):
        told = recipe(place / layout, most(method, 2), **asked)
        if method == "slerp":
            del told["base_model"]
        m3jax.merge_checkpoint(told, tmp_path / layout, chunk_entries=2**16)
        found[layout] = by_block(tmp_path / layout, axis)
    for layout in ("axis 0", "axis 1"):
        for name, value in found["by block"].items():
            assert np.array_equal(value, found[layout][name]), (layout, name)


@pytest.mark.parametrize(
    ("method", "sparsifier"),
    [("ties_paper", "dare"), ("ties_mergekit", "della"), ("model_stock_rows", "none"), ("nuslerp_columns", "none")],
)
def test_slices_longer_than_chunks_are_read_block_by_block(tmp_path, method, sparsifier):
    """Experts of a mixture, scanned: blocks along axis 1, so large that a slice through all would grow with them."""
    rng = np.random.default_rng(0)
    trees = [
        {f"layers_{i}.w": np.round(rng.standard_normal((2, 170, 401)) * 16).astype(np.float32) / 16 for i in range(4)}
        for _ in range(3)
    ]
    keys = (METHODS.get(method) or ALONE[method])[1] | SPARSIFIERS[sparsifier][1] | {"seed": 1}
    found = {}
    for layout in ("by block", "stacked"):
        for tree, name in zip(trees, ("base", "expert-0", "expert-1"), strict=True):
            held = tree if layout == "by block" else {"layers.w": np.stack(list(tree.values()), 1)}
            write(tmp_path / layout / name, held, {"num_hidden_layers": 4})
        m3jax.merge_checkpoint(recipe(tmp_path / layout, **keys), tmp_path / layout / "out", chunk_entries=2**16)
        found[layout] = read(tmp_path / layout / "out")
    for i in range(4):
        assert np.array_equal(found["by block"][f"layers_{i}.w"], found["stacked"]["layers.w"][:, i]), i


@pytest.mark.parametrize("shape", [(8, 48, 512, 1024), (48, 8, 512, 1024), (4096, 48, 1024), (8, 512, 48)])
def test_chunks_do_not_grow_with_the_blocks_that_a_leaf_stacks(shape):
    pipeline = Pipeline(m3jax.linear(), None, 2)
    blocks = tuple(BlockPlan(f"{i}", f"{i}", "", None) for i in range(48))
    plan = TensorPlan(TensorInfo("layers.w", shape, "BF16"), (0, 1), pipeline, blocks, shape.index(48))
    chunks = list(visits("merge", plan, 2**18, False))
    assert max(chunk.padded for chunk in chunks) <= 2**20
    assert [chunk.start for chunk in chunks[1:]] == [chunk.start + chunk.size for chunk in chunks[:-1]]
    assert chunks[-1].start + chunks[-1].size == np.prod(shape)


@pytest.mark.parametrize(
    "layouts", [("by block", "axis 0", "axis 1"), ("axis 0", "by block", "axis 1"), ("axis 1", "axis 0", "by block")]
)
def test_models_that_are_stacked_otherwise_are_read_as_the_base_is(place, tmp_path, layouts):
    asked = {**METHODS["ties_paper"][1], **SPARSIFIERS["dare"][1], "seed": 3}
    asked["mixup"] = {"alpha": 1.0, "granularity": "layer"}
    names = ("base", "expert-0", "expert-1")
    base, *experts = (str(place / layout / name) for layout, name in zip(layouts, names, strict=True))
    told = {**asked, "base_model": base, "models": experts}
    result = m3jax.merge_checkpoint(told, tmp_path / "mixed", chunk_entries=2**16)
    alike = recipe(place / layouts[0], **asked)
    want = m3jax.merge_checkpoint(alike, tmp_path / "alike", chunk_entries=2**16)
    assert result.digest == want.digest
    assert sum("its blocks are read as those of" in note for note in result.notes) == 2
    # Digests are of what is stored, so that a replay and a verification of inputs see the files.
    for record, layout in zip(result.manifest["inputs"], (*layouts[1:], layouts[0]), strict=True):
        name = Path(record["name"]).name
        stored = open_checkpoint(place / layout / name)
        assert record["tensors"] == {n: digest_tensor(stored, n) for n in stored.tensors}
        stored.close()
    assert m3jax.replay(tmp_path / "mixed", tmp_path / "again").digest == want.digest


def test_what_a_recipe_says_of_stacks_is_of_the_models_that_have_them(tmp_path):
    """Four blocks of four rows: only the recipe can tell along which axis they are stacked."""
    rng = np.random.default_rng(0)
    one, two = ({f"layers_{i}.w": rng.standard_normal((4, 6)).astype(np.float32) for i in range(4)} for _ in range(2))
    write(tmp_path / "one", one, {"num_hidden_layers": 4})
    write(tmp_path / "two", {"layers.w": np.stack(list(two.values()), 1)}, {"num_hidden_layers": 4})
    asked = {"merge_method": "linear", "models": [str(tmp_path / "one"), str(tmp_path / "two")]}
    m3jax.merge_checkpoint({**asked, "anatomy": {"stacked": {r"^layers\.": 1}}}, tmp_path / "out")
    got = read(tmp_path / "out")
    assert all(np.array_equal(got[name], (one[name] + two[name]) / np.float32(2)) for name in one)
    with pytest.raises(M3Error, match="'nowhere' is found in no tensor's name"):
        m3jax.merge_checkpoint({**asked, "anatomy": {"stacked": {"nowhere": 1}}}, tmp_path / "again")


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("deeper", [0, 1])
def test_a_model_with_more_blocks_is_another_one(tmp_path, layouts, deeper):
    trees = [block_by_block(seed) for seed in range(2)]
    trees[deeper] |= {f"layers_3.{n}": trees[deeper][f"layers_2.{n}"] for n in ("mlp.kernel", "norm.scale")}
    for i, (tree, layout) in enumerate(zip(trees, layouts, strict=True)):
        depth = LAYERS + (i == deeper)
        if layout != "by block":
            parts = {leaf: [tree[f"layers_{n}.{leaf}"] for n in range(depth)] for leaf in ("mlp.kernel", "norm.scale")}
            tree = {name: value for name, value in tree.items() if not name.startswith("layers_")}
            tree |= {f"layers.{leaf}": np.stack(blocks, int(layout[-1])) for leaf, blocks in parts.items()}
        write(tmp_path / str(i), tree, {"num_hidden_layers": depth})
    asked = {"merge_method": "linear", "models": [str(tmp_path / "0"), str(tmp_path / "1")]}
    with pytest.raises(M3Error):
        m3jax.merge_checkpoint(asked, tmp_path / "out")
    with pytest.raises(M3Error):
        m3jax.merge([read(tmp_path / "0"), read(tmp_path / "1")])


def test_gradients_run_over_the_layers_of_every_layout(place, tmp_path):
    for layout, axis in zip(LAYOUTS, (None, 0, 1), strict=True):
        told = recipe(place / layout, merge_method="task_arithmetic", parameters={"weight": [0.0, 1.0, 0.5]})
        m3jax.merge_checkpoint(told, tmp_path / layout)
        got = by_block(tmp_path / layout, axis)
        base, a, b = (block_by_block(seed) for seed in range(3))
        for layer, weight in enumerate((0.0, 1.0, 0.5)):
            name = f"layers_{layer}.mlp.kernel"
            want = (
                base[name] + np.float32(weight) * (a[name] - base[name]) + np.float32(weight) * (b[name] - base[name])
            )
            np.testing.assert_allclose(got[name], want, atol=1e-6)


def test_per_layer_draws_are_drawn_per_layer(place, tmp_path):
    asked = {"merge_method": "linear", "mixup": {"alpha": 1.0, "granularity": "layer"}}
    for layout in LAYOUTS:
        told = recipe(place / layout, **asked)
        del told["base_model"]
        result = m3jax.merge_checkpoint(told, tmp_path / layout)
        assert sorted(result.manifest["weights"]) == ["layers.0", "layers.1", "layers.2", "outside blocks"], layout
        assert m3jax.replay(tmp_path / layout, tmp_path / f"{layout}-again").digest == result.digest


def test_blocks_across_many_chunks(tmp_path):
    """Blocks and slices through blocks that are larger than a chunk."""
    rng = np.random.default_rng(0)
    trees = [{f"layers_{i}.w": rng.standard_normal((300, 401)).astype(np.float32) for i in range(2)} for _ in range(3)]
    keys = METHODS["ties_paper"][1] | {"sparsify": {"method": "dare", "density": 0.5}, "seed": 1}
    found = {}
    for layout, axis in (("by block", None), ("axis 0", 0), ("axis 1", 1)):
        for tree, name in zip(trees, ("base", "expert-0", "expert-1"), strict=True):
            held = tree if axis is None else {"layers.w": np.stack([tree["layers_0.w"], tree["layers_1.w"]], axis)}
            write(tmp_path / layout / name, held, {"num_hidden_layers": 2})
        m3jax.merge_checkpoint(recipe(tmp_path / layout, **keys), tmp_path / layout / "out", chunk_entries=2**16)
        tree = read(tmp_path / layout / "out")
        found[layout] = tree if axis is None else {f"layers_{i}.w": np.take(tree["layers.w"], i, axis) for i in (0, 1)}
    for name, value in found["by block"].items():
        assert np.array_equal(value, found["axis 0"][name]), name
        assert np.array_equal(value, found["axis 1"][name]), name


def test_training_state_is_left_out_and_counted(tmp_path):
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        params = {f"params.{n}": v for n, v in block_by_block(seed).items()}
        moments = {f"opt_state.0.{m}.{n}": np.abs(v) for n, v in block_by_block(seed + 5).items() for m in ("mu", "nu")}
        write(tmp_path / name, params | moments | {"step": np.array(seed, np.int32)})
    keys = METHODS["ties_paper"][1] | {"seed": 1}
    result = m3jax.merge_checkpoint(recipe(tmp_path, **keys), tmp_path / "out")
    assert set(read(tmp_path / "out")) == {f"params.{n}" for n in block_by_block(0)}
    assert any("17 tensors of training state" in note for note in result.notes), result.notes
    for seed, name in enumerate(("base", "expert-0", "expert-1")):  # moments are not ranked with the parameters either
        write(tmp_path / "bare" / name, {f"params.{n}": v for n, v in block_by_block(seed).items()})
    m3jax.merge_checkpoint(recipe(tmp_path / "bare", **keys), tmp_path / "without")
    assert result.digest == m3jax.verify(tmp_path / "without").digest


def test_wrappers_and_boxes_do_not_change_masks(tmp_path):
    keys = {"merge_method": "dare_linear", "parameters": {"density": 0.5}, "seed": 2}
    spellings = {"plain": "{}", "wrapped": "params.{}", "boxed": "{}.value", "both": "params.params.{}.value"}
    found = {}
    for spelling, form in spellings.items():
        for seed, name in enumerate(("base", "expert-0", "expert-1")):
            write(tmp_path / spelling / name, {form.format(n): v for n, v in block_by_block(seed).items()})
        m3jax.merge_checkpoint(recipe(tmp_path / spelling, **keys), tmp_path / spelling / "out")
        tree = read(tmp_path / spelling / "out")
        found[spelling] = {n: tree[form.format(n)] for n in block_by_block(0)}
    for spelling, tree in found.items():
        assert all(np.array_equal(tree[n], found["plain"][n]) for n in tree), spelling


def test_models_that_differ_in_boxes_merge_under_the_bases_names(tmp_path):
    for seed, (name, form) in enumerate({"base": "{}", "expert-0": "{}.value", "expert-1": "{}"}.items()):
        write(tmp_path / name, {form.format(n): v for n, v in block_by_block(seed).items()})
    m3jax.merge_checkpoint(recipe(tmp_path, merge_method="task_arithmetic"), tmp_path / "out")
    assert set(read(tmp_path / "out")) == set(block_by_block(0))


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(seed, stored=True):
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal((9, 4)).astype(np.float32)
    tree = {EMBED: embedding, "model.layers.0.mlp.up_proj.weight": rng.standard_normal((5, 4)).astype(np.float32)}
    return tree | ({HEAD: embedding.copy()} if stored else {})


def test_a_stored_copy_of_a_tied_head_stays_equal_to_its_embedding(tmp_path):
    config = {"model_type": "llama", "tie_word_embeddings": True}
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        write(tmp_path / name, tied(seed), config)
        write(tmp_path / "absent" / name, tied(seed, stored=False), config)
    keys = METHODS["ties_paper"][1] | {"sparsify": {"method": "dare", "density": 0.5}}
    m3jax.merge_checkpoint(recipe(tmp_path, **keys), tmp_path / "out")
    m3jax.merge_checkpoint(recipe(tmp_path / "absent", **keys), tmp_path / "out-absent")
    got, absent = read(tmp_path / "out"), read(tmp_path / "out-absent")
    assert np.array_equal(got[EMBED], got[HEAD])
    assert all(np.array_equal(got[name], absent[name]) for name in absent)  # counted once
    m3jax.merge_checkpoint(recipe(tmp_path, **keys, exclude=["embed_tokens"]), tmp_path / "excluded")
    kept = read(tmp_path / "excluded")
    assert np.array_equal(kept[EMBED], tied(0)[EMBED])
    assert np.array_equal(kept[HEAD], tied(0)[EMBED])


def test_two_towers_have_a_gradient_each(tmp_path):
    rng = np.random.default_rng(0)

    def model():
        names = [f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
        names += [f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(4)]
        return {name: rng.standard_normal((3, 3)).astype(np.float32) for name in names}

    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "num_hidden_layers": 2},
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 4},
    }
    trees = {name: model() for name in ("base", "expert-0", "expert-1")}
    for name, tree in trees.items():
        write(tmp_path / name, tree, config)
    asked = recipe(tmp_path, merge_method="task_arithmetic")
    asked["models"] = [
        {"model": asked["models"][0], "parameters": {"weight": [0, 1]}},
        {"model": asked["models"][1], "parameters": {"weight": 0}},
    ]
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    got = read(tmp_path / "out")
    for last in (
        "language_model.model.layers.1.mlp.up_proj.weight",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
    ):
        np.testing.assert_allclose(got[last], trees["expert-0"][last], atol=1e-6)
    for first in (name for name in got if ".0." in name):
        assert np.array_equal(got[first], trees["base"][first])


def test_what_cannot_be_merged_is_refused(tmp_path):
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight": np.ones((2, 2), np.float32) for f in "AB"
    }
    for name in ("base", "expert-0", "expert-1"):
        write(tmp_path / "lora" / name, factors)
        quantised = {"w.weight": np.ones((4, 4), np.int8), "w.SCB": np.ones(4, np.float32)}
        write(
            tmp_path / "int8" / name,
            quantised,
            {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}},
        )
        write(tmp_path / "plain" / name, {"w": np.ones((4, 4), np.float32)})
    with pytest.raises(M3Error, match=r"holds LoRA factors \(.*lora_A.*merge each adapter into its base first"):
        m3jax.merge_checkpoint(recipe(tmp_path / "lora", merge_method="task_arithmetic"), tmp_path / "out")
    with pytest.raises(M3Error, match=r"its weights are quantised"):
        m3jax.merge_checkpoint(recipe(tmp_path / "int8", merge_method="task_arithmetic"), tmp_path / "out")
    layered = {"mixup": {"alpha": 1, "granularity": "layer"}}
    with pytest.raises(
        M3Error, match=r"mixup.granularity: layer: speaks of layers, and none are found.*anatomy: \{blocks:"
    ):
        m3jax.merge_checkpoint(recipe(tmp_path / "plain", merge_method="task_arithmetic", **layered), tmp_path / "out")
    gradient = {"parameters": {"weight": [0, 1]}}
    with pytest.raises(M3Error, match="a gradient: speaks of layers"):
        m3jax.merge_checkpoint(recipe(tmp_path / "plain", merge_method="task_arithmetic", **gradient), tmp_path / "out")


def test_a_recipe_says_what_names_do_not(tmp_path):
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        rng = np.random.default_rng(seed)
        write(tmp_path / name, {f"stage.part{i}.w": rng.standard_normal((3, 3)).astype(np.float32) for i in range(2)})
    asked = recipe(tmp_path, merge_method="task_arithmetic", mixup={"alpha": 1, "granularity": "layer"})
    asked["anatomy"] = {"blocks": r"part(\d+)"}
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    assert len(result.manifest["weights"]) == 2
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest
    asked["anatomy"] = {"blocs": "x"}
    with pytest.raises(M3Error, match=r"anatomy.blocs: unknown key; did you mean 'blocks'"):
        m3jax.merge_checkpoint(asked, tmp_path / "out2")


def test_statistics_of_batch_normalisation_are_averaged(tmp_path):
    for value, name in ((1.0, "base"), (2.0, "expert-0"), (4.0, "expert-1")):
        tree = {"bn.weight": np.ones(2), "bn.running_mean": np.full(2, value), "bn.running_var": np.full(2, value)}
        write(
            tmp_path / name,
            {n: v.astype(np.float32) for n, v in tree.items()} | {"bn.num_batches_tracked": np.int64(7)},
        )
    result = m3jax.merge_checkpoint(recipe(tmp_path, merge_method="task_arithmetic"), tmp_path / "out")
    got = read(tmp_path / "out")
    assert got["bn.running_var"].tolist() == [3.0, 3.0]
    assert got["bn.num_batches_tracked"] == 7
    assert any("statistics of batch normalisation" in note for note in result.notes)


def test_merges_of_the_first_scheme_replay_as_they_were(tmp_path, monkeypatch):
    shutil.copytree(FIXTURE, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    recorded = json.loads(Path("m3jax.json").read_text())
    result = m3jax.replay("m3jax.json", tmp_path / "again")
    assert result.digest == recorded["output"]["digest"]
    assert result.manifest["bits"] == "m3jax-1"
    assert "opt_state.mu.kernel" in read(tmp_path / "again")  # merged then, left out now
    now = m3jax.merge_checkpoint(recorded["recipe"], tmp_path / "now")
    assert now.manifest["bits"] == "m3jax-2"
    assert set(read(tmp_path / "now")) == {"params.layers_0.kernel", "params.layers_1.kernel", "params.embed.embedding"}
    Path("m3jax.json").write_text(json.dumps({**recorded, "bits": "m3jax-0"}))
    with pytest.raises(M3Error, match="was made with bits 'm3jax-0', but this version makes m3jax-1, m3jax-2"):
        m3jax.replay("m3jax.json", tmp_path / "never")


def test_a_doubt_that_matters_is_refused_with_its_key(tmp_path):
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        save_file(
            {"layers.kernel": rng.standard_normal((4, 4)).astype(np.float32)}, tmp_path / name / "model.safetensors"
        )
    asked = recipe(tmp_path, merge_method="task_arithmetic")
    m3jax.merge_checkpoint(asked, tmp_path / "whole")  # nothing depends on it
    with pytest.raises(M3Error, match=r"anatomy"):
        m3jax.merge_checkpoint({**asked, "mixup": {"alpha": 1, "granularity": "layer"}}, tmp_path / "out")


def test_state_of_the_first_model_is_kept_on_request(tmp_path):
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        params = {f"params.{n}": v for n, v in block_by_block(seed).items()}
        write(
            tmp_path / name, params | {"opt_state.mu.w": np.full(2, seed, np.float32), "step": np.array(seed, np.int32)}
        )
    asked = recipe(tmp_path, merge_method="task_arithmetic", keep_state="first")
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    got = read(tmp_path / "out")
    assert got["opt_state.mu.w"].tolist() == [1.0, 1.0]
    assert got["step"] == 1
    assert any("are those of the first model" in note for note in result.notes)
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest


def test_only_one_collection_is_merged(tmp_path):
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        tree = block_by_block(seed)
        write(tmp_path / name, {f"params.{n}": v for n, v in tree.items()} | {"ema.w": np.full(2, seed, np.float32)})
    got = {}
    for only in (None, "params"):
        asked = recipe(tmp_path, merge_method="task_arithmetic") | ({} if only is None else {"only": only})
        m3jax.merge_checkpoint(asked, tmp_path / str(only))
        got[only] = read(tmp_path / str(only))
    assert got["params"]["ema.w"].tolist() == [0.0, 0.0]
    assert all(np.array_equal(got["params"][n], v) for n, v in got[None].items() if n.startswith("params."))
    with pytest.raises(M3Error, match=r"only: parms begins no name of .*: its collections are ema, params"):
        m3jax.merge_checkpoint(recipe(tmp_path, merge_method="task_arithmetic", only="parms"), tmp_path / "no")
