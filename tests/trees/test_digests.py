"""Digests of trees: those that manifests have of the same tensors, however arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.directories import write_models

import m3jax
from m3jax import M3Error

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


def test_a_tree_has_the_digest_of_the_manifest_whatever_the_format(tmp_path):
    shapes = {"layers.0.mlp.kernel": (8, 4), "head.kernel": (4, 8), "layers.0.norm": (8,), "one": ()}
    write_models(tmp_path, shapes=shapes)
    models = [str(tmp_path / f"expert-{i}") for i in range(2)]
    result = m3jax.merge_checkpoint({"merge_method": "linear", "models": models}, tmp_path / "merged")
    assert result.manifest["output"]["digest"] == result.digest
    m3jax.convert(tmp_path / "merged", tmp_path / "orbax", to="orbax")
    for path in ("merged", "orbax"):
        assert m3jax.digest(m3jax.load(tmp_path / path)) == result.digest
        assert m3jax.digest(m3jax.load(tmp_path / path, flat=True)) == result.digest
    trees = [m3jax.load(path) for path in models]
    assert m3jax.digest(m3jax.merge(trees)) == result.digest
    assert m3jax.digest(trees[0]) != result.digest


def test_runs_of_trainers(jax_data, tmp_path):
    for run in ("maxtext_scanned", "tunix_full", "linen_scan_composite", "nnx_loop_mgr", "gemma_nested"):
        tree = m3jax.load(jax_data / run / "a")
        converted = m3jax.convert(jax_data / run / "a", tmp_path / run, to="safetensors")
        assert m3jax.digest(tree) == converted.digest
        assert m3jax.digest(m3jax.load(jax_data / run / "a", like=tree)) == converted.digest


def test_boxes_are_values_as_in_files():
    w = jnp.ones((2, 3), jnp.bfloat16)
    assert m3jax.digest(nnx.State({"a": {"w": nnx.Param(w)}})) == m3jax.digest({"a.w.value": np.asarray(w)})


@pytest.mark.parametrize("spec", [(), ("x",), (None, "y"), ("y", "x"), (("x", "y"),), (None, None, "x")])
def test_shardings_do_not_matter(spec):
    values = np.arange(8 * 8 * 4, dtype=np.float32).reshape(8, 8, 4)
    put = jax.device_put({"w": values, "s": np.float32(2)}, {"w": NamedSharding(MESH, PartitionSpec(*spec)), "s": None})
    assert m3jax.digest(put) == m3jax.digest({"w": values, "s": np.float32(2)})
    assert m3jax.digest({"w": np.asfortranarray(values), "s": jnp.float32(2)}) == m3jax.digest(put)


def test_what_files_do_not_hold_is_refused():
    for tree, said in (
        ({"step": 3}, "step: is of type int"),
        ({"rng": jax.random.key(0)}, "rng: is a random key"),
        ({"w": np.zeros(2, "S3")}, "w: is of dtype bytes"),
        ({"w": jax.ShapeDtypeStruct((2,), "float32")}, "w: is of type ShapeDtypeStruct"),
    ):
        with pytest.raises(M3Error, match=said):
            m3jax.digest(tree)
    with pytest.raises(M3Error, match="w: is traced"):
        jax.jit(lambda w: m3jax.digest({"w": w}))(1.0)
