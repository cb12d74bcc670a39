"""Merges that once gave the wrong model, or none: each the case in which it was found."""

import numpy as np
import pytest
from support import oracle
from support.directories import read, recipe, write
from support.matrix import METHODS, same

import m3jax
from m3jax import M3Error

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def coarse(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: (np.round(rng.standard_normal(shape) * 16) / 16).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("method", ["ties_paper", "linear"])
def test_running_statistics_do_not_count_in_rankings_of_the_model(tmp_path, method):
    """N of a model-wide threshold is that of what is ranked."""
    sparse = {"sparsify": {"method": "magnitude", "density": 0.5, "scope": "model"}} if method == "linear" else {}
    told = {"sparsify": "magnitude", "keep": 0.5, "scope": "model"} if method == "linear" else METHODS[method][2]
    trees = [coarse(seed, a=(30, 7), b=(20,)) for seed in range(3)]
    for name, tree in zip(("base", "expert-0", "expert-1"), trees, strict=True):
        write(
            tmp_path / name,
            tree | {"bn.running_mean": np.ones(50, np.float32), "bn.running_var": np.ones(50, np.float32)},
        )
    m3jax.merge_checkpoint(recipe(tmp_path, **METHODS[method][1], **sparse), tmp_path / "out")
    got = {name: value for name, value in read(tmp_path / "out").items() if "running" not in name}
    assert same(got, oracle.merge(trees[1:], trees[0], **told)) == (True, [])


def test_a_head_that_is_absent_is_an_embedding_only_where_they_are_tied(tmp_path):
    def model(seed, config, head):
        tree = {EMBED: (9, 4), "model.layers.0.mlp.up_proj.weight": (5, 4)} | ({HEAD: (9, 4)} if head else {})
        return coarse(seed, **tree), {"model_type": "llama", **config}

    write(tmp_path / "expert-0", *model(1, {"tie_word_embeddings": False}, head=True))
    write(tmp_path / "expert-1", *model(2, {"tie_word_embeddings": False}, head=True))
    write(tmp_path / "base", *model(0, {"tie_word_embeddings": False}, head=False))  # a model without a head
    with pytest.raises(M3Error, match=r"lm_head\.weight: in .*expert-0 but not in .*base"):
        m3jax.merge_checkpoint(recipe(tmp_path, merge_method="task_arithmetic"), tmp_path / "out")


def test_a_layer_called_mu_is_a_parameter(tmp_path):
    trees = [coarse(seed, **{"mu.kernel": (4, 3), "nu.kernel": (4, 3), "trace.kernel": (2, 2)}) for seed in range(3)]
    for name, tree in zip(("base", "expert-0", "expert-1"), trees, strict=True):
        write(tmp_path / name, tree)
    m3jax.merge_checkpoint(recipe(tmp_path, merge_method="task_arithmetic"), tmp_path / "out")
    want = oracle.merge(trees[1:], trees[0], "task_arithmetic")
    assert same(read(tmp_path / "out"), want) == (True, [])
    assert same(m3jax.merge(trees[1:], m3jax.task_arithmetic(), base=trees[0]), want) == (True, [])


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_which_some_have_weights_of_one(tmp_path, axis):
    """TIES leaves factors out where all are 1: in one block of a stacked leaf, and not in another."""
    trees = [coarse(seed, **{f"layers_{i}.kernel": (6, 5) for i in range(3)}) for seed in range(3)]
    weights = {"parameters": {"density": 0.5, "weight": [1.0, 0.25]}}
    for name, tree in zip(("base", "expert-0", "expert-1"), trees, strict=True):
        write(tmp_path / name, {"layers.kernel": np.stack(list(tree.values()), axis)}, {"num_hidden_layers": 3})
    m3jax.merge_checkpoint(recipe(tmp_path, merge_method="ties", **weights), tmp_path / "out")
    by_layer = {f"layers_{i}.kernel": [w, w] for i, w in enumerate((1.0, 0.625, 0.25))}
    want = oracle.merge(trees[1:], trees[0], method="ties", density=0.5, weights=by_layer)
    got = read(tmp_path / "out")["layers.kernel"]
    for i in range(3):
        assert np.array_equal(np.take(got, i, axis), want[f"layers_{i}.kernel"]), i
    stacked = [{"layers": {"kernel": np.stack(list(tree.values()), axis)}} for tree in trees]
    rows = np.array([[1.0, 1.0], [0.625, 0.625], [0.25, 0.25]])
    told = {"anatomy": {"stacked": {"layers": axis}}, "weights": rows}
    merged = m3jax.merge(stacked[1:], m3jax.ties(0.5), base=stacked[0], **told)["layers"]["kernel"]
    assert np.array_equal(merged, got)
