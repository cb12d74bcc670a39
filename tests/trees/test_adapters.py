"""Adapters added to trees, in the layouts of qwix and Tunix, MaxText and Flax: the bits that files get."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracle
from support.adapters import factors, write_adapter
from support.directories import write

import m3jax
from m3jax import M3Error, with_lora

BF16 = ml_dtypes.bfloat16


def drawn(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def want(w, a, b, scale, axes=(0,)):
    """The oracle of a weight whose axes `axes` are A's."""
    rest = tuple(axis for axis in range(w.ndim) if axis not in axes)
    turned = np.transpose(w, (*axes, *rest))
    matrix = turned.reshape(-1, int(np.prod([w.shape[axis] for axis in rest])))
    added = oracle.adapted(matrix, a.reshape(len(matrix), -1), b.reshape(a.shape[-1], -1), scale)
    return np.transpose(added.reshape(turned.shape), np.argsort((*axes, *rest)))


def test_the_bits_are_those_of_files(tmp_path):
    rng = np.random.default_rng(0)
    module = "model.layers.0.mlp.up_proj"
    weight = rng.standard_normal((24, 40)).astype(BF16)
    write(tmp_path / "base", {f"{module}.weight": weight})
    tensors = factors({module: (24, 40)}, 2, 0)
    write_adapter(tmp_path / "lora", tensors)
    files = m3jax.load(f"{tmp_path}/base+{tmp_path}/lora", flat=True)[f"{module}.weight"]
    a, b = (tensors[f"base_model.model.{module}.lora_{which}.weight"].T for which in "AB")
    tree = {"up": {"kernel": weight.T, "kernel_lora_a": a, "kernel_lora_b": b}}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    places = {"kernel": ("x",), "kernel_lora_a": ("x",), "kernel_lora_b": (None, "x")}
    shardings = {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in places.items()}
    sharded = jax.device_put(tree, {"up": shardings})
    jitted = jax.jit(lambda t: with_lora(t, scale=2.0))
    for found in (with_lora(tree, scale=2.0), jitted(tree), jitted(sharded), with_lora(sharded, scale=2.0)):
        assert np.asarray(found["up"]["kernel"]).tobytes() == np.asarray(files).T.tobytes()
        assert found["up"].keys() == {"kernel"}


LAYOUTS = {  # shapes of W, A and B, the axes that are A's, and the axis that stacks blocks
    "Tunix q_proj.w": ((8, 3, 5), (8, 2), (2, 3, 5), (0,), None),
    "Tunix o_proj.w": ((3, 5, 8), (3, 5, 2), (2, 8), (0, 1), None),
    "Gemma q_einsum.w": ((3, 8, 5), (8, 2), (2, 3, 5), (1,), None),
    "qwix, of a DenseGeneral": ((8, 3, 5), (8, 2), (2, 15), (0,), None),
    "qwix, experts": ((4, 6, 5), (4, 6, 2), (4, 2, 5), (0,), 0),
    "a square kernel": ((6, 6), (6, 2), (2, 6), (0,), None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_one_weight(layout):
    shape, of_a, of_b, axes, stacked = LAYOUTS[layout]
    w, a, b = drawn(1, shape, of_a, of_b)
    found = with_lora({"x": {"w": w, "w_lora_a": a, "w_lora_b": b}}, scale=0.25)["x"]["w"]
    parts = [(w, a, b)] if stacked is None else zip(w, a, b, strict=True)
    blocks = [want(*part, 0.25, axes) for part in parts]
    assert np.asarray(found).tobytes() == (blocks[0] if stacked is None else np.stack(blocks)).tobytes()


def test_maxtext_stacks_blocks_along_the_second_axis():
    w, a, b, other = drawn(2, (8, 3, 2, 5), (8, 3, 2), (2, 3, 2, 5), (8, 3, 4), dtype=BF16)
    params = {"decoder": {"layers": {"query": {"kernel": w}, "mlp": {"kernel": other}}}}
    names = {"lora_a.kernel": a, "lora_b.kernel": b}
    lora = {"decoder": {"layers": {"query": names, "mlp": {"lora_a.kernel": None}}}}
    found = with_lora(params, lora, lora, scale=2.0, anatomy={"stacked": {"layers": 1}})
    blocks = [want(w[:, i], a[:, i], b[:, i], 2.0) for i in range(3)]
    assert np.asarray(found["decoder"]["layers"]["query"]["kernel"]).tobytes() == np.stack(blocks, 1).tobytes()
    assert found["decoder"]["layers"]["mlp"]["kernel"] is other


def test_flax_modules():
    layer = nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0)) if hasattr(nnx, "LoRALinear") else None
    if layer is None:
        pytest.skip("this Flax has no LoRALinear")
    layer.lora.lora_b[...] = jnp.ones((2, 4))
    state = nnx.state(layer)
    found = with_lora(state)
    assert isinstance(found, nnx.State)
    kernel, a, b = layer.kernel[...], layer.lora.lora_a[...], layer.lora.lora_b[...]
    assert np.asarray(found["kernel"][...]).tobytes() == want(*map(np.asarray, (kernel, a, b)), 1.0).tobytes()
    assert "lora" not in found
    around = nnx.state(nnx.LoRA(6, 2, 4, base_module=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)))
    around["lora_b"] = around["lora_b"].replace(jnp.ones((2, 4)))
    kernel, a = around["base_module"]["kernel"][...], around["lora_a"][...]
    added = m3jax.merge([around], lora=1.0)
    expected = want(np.asarray(kernel), np.asarray(a), np.ones((2, 4), np.float32), 1.0)
    assert np.asarray(added["base_module"]["kernel"][...]).tobytes() == expected.tobytes()
    assert "lora_a" not in added


def test_trees_of_factors_alone_scales_by_pattern_and_gradients():
    w, a, b, other = drawn(3, (6, 4), (6, 2), (2, 4), (5,))
    params = {"q.kernel": w, "v.kernel": w, "norm": other}
    found = with_lora(
        params, {"q": {"kernel": a}, "v": {"kernel": a}}, {"q.kernel": b, "v.kernel": b}, scale={"q": 2.0, "": 1.0}
    )
    assert np.asarray(found["q.kernel"]).tobytes() == want(w, a, b, 2.0).tobytes()
    assert np.asarray(found["v.kernel"]).tobytes() == want(w, a, b, 1.0).tobytes()
    of_scale = jax.grad(lambda s: with_lora({"w": w}, {"w": a}, {"w": b}, scale=s)["w"].sum())(1.5)
    np.testing.assert_allclose(of_scale, (a @ b).sum(), rtol=1e-4)


def test_what_does_not_fit_is_refused():
    w, a, b, square = drawn(4, (6, 4), (6, 2), (2, 4), (6, 6, 5))
    turned = {"w": square, "w_lora_a": np.ones((6, 2), np.float32), "w_lora_b": np.ones((2, 6, 5), np.float32)}
    for call, said in (
        (lambda: with_lora({"w": w}), "there are no factors"),
        (lambda: with_lora({"w": w, "w_lora_a": a}), "has one factor, but no B"),
        (lambda: with_lora({"w": w}, {"w": a}), "one of a and b"),
        (lambda: with_lora({"w": w}, {"v": a}, {"v": b}), "is a leaf of a but of no weight"),
        (lambda: with_lora({"x_lora_a": a}), "a factor of no weight"),
        (lambda: with_lora({"w": w}, {"w": b}, {"w": a}), r"\[6, 4\], \[2, 4\], \[6, 2\], which do not fit"),
        (lambda: with_lora({"w": w.astype(np.int8)}, {"w": a}, {"w": b}), "is no float32"),
        (lambda: with_lora({"w": w}, {"w": a}, {"w": b}, scale={"q": 1.0}), "no scale"),
        (lambda: with_lora({"w": w}, {"w": a}, {"w": b}, scale="half"), "w: the scale of its factors is 'half'"),
        (lambda: with_lora({"w": w}, {"w": a}, {"w": b}, scale={"w": np.nan}), "scale of its factors is nan"),
        (lambda: with_lora(turned), r"its axes \(0,\) or \(1,\): say which by axes"),
        (lambda: with_lora([{"w": w, "w_lora_a": a, "w_lora_b": b}]), "nested mappings only"),
    ):
        with pytest.raises(M3Error, match=said):
            call()
    assert with_lora(turned, axes={"w": (1,)})["w"].shape == (6, 6, 5)


def test_merging_adapters_merges_products():
    w, *rest = drawn(5, (6, 4), (6, 2), (2, 4), (6, 3), (3, 4), (4,))
    (a0, b0, a1, b1), norm = rest[:4], rest[4]
    experts = [{"q": {"w": w, "w_lora_a": a, "w_lora_b": b}, "norm": norm} for a, b in ((a0, b0), (a1, b1))]
    whole = [{"q": {"w": want(w, a, b, 2.0)}, "norm": norm} for a, b in ((a0, b0), (a1, b1))]
    expected = np.asarray(m3jax.merge(whole, weights=[0.3, 0.7])["q"]["w"])
    merged = m3jax.merge(experts, weights=[0.3, 0.7], lora=2.0)
    assert merged["q"].keys() == {"w"}
    assert np.asarray(merged["q"]["w"]).tobytes() == expected.tobytes()
    # Tunix saves the factors alone: they are of the base, which gives the rest of the tree too.
    base = nnx.State({"q": {"w": nnx.Param(jnp.asarray(w))}, "norm": nnx.Param(jnp.asarray(norm))})
    alone = [{"q.w_lora_a": a, "q.w_lora_b": b} for a, b in ((a0, b0), (a1, b1))]
    found = jax.jit(lambda alone, base: m3jax.merge(alone, base=base, weights=[0.3, 0.7], lora={"q": 2.0}))(alone, base)
    assert isinstance(found, nnx.State)
    assert np.asarray(found["q"]["w"][...]).tobytes() == expected.tobytes()
    for call, said in (
        (lambda: m3jax.merge(experts), r"q\.w_lora_a: is a factor .* lora=SCALE"),
        (lambda: m3jax.soup(experts), r"q\.w_lora_a: is a factor"),
        (lambda: m3jax.RunningMerge.start(experts[0]), r"q\.w_lora_a: is a factor .* average m3jax\.with_lora"),
        (lambda: m3jax.merge(alone, lora=2.0), "expert 0 has factors alone: give base="),
        (lambda: m3jax.merge(alone, base=experts[0], lora=2.0), "so has the base"),
        (lambda: m3jax.merge(whole, lora=2.0), "no tree has factors"),
    ):
        with pytest.raises(M3Error, match=said):
            call()
    forced = m3jax.merge([experts[0]] * 2, anatomy={"kinds": {"lora": "parameter"}})
    assert np.asarray(forced["q"]["w_lora_a"]).tolist() == a0.tolist()
    average = m3jax.RunningMerge.start(alone[0], anatomy={"kinds": {"lora": "parameter"}})
    assert len(average.sums) == 2


def test_adapters_of_tunix_as_they_are_read(jax_data):
    """Orbax calls what is in a box `value`."""
    base = m3jax.load(jax_data / "tunix_full" / "base")
    experts = [m3jax.load(jax_data / "tunix_lora" / run) for run in "ab"]
    merged = m3jax.merge(experts, base=base, lora=2.0)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    of = lambda tree: tree["layers"]["1"]["mlp"]["gate_proj"]  # noqa: E731
    w = of(base)["kernel"]["value"]
    factors_of = [(of(e)["kernel_lora_a"]["value"], of(e)["kernel_lora_b"]["value"]) for e in experts]
    whole = [{"w": want(np.asarray(w), *map(np.asarray, pair), 2.0)} for pair in factors_of]
    expected = np.asarray(m3jax.merge(whole)["w"])
    assert np.asarray(of(merged)["kernel"]["value"]).tobytes() == expected.tobytes()


def test_every_spelling_of_factors_is_refused_or_added():
    w, a, b = drawn(6, (3, 8, 5), (8, 2), (2, 3, 5))
    gemma = {"layer_0": {"attn": {"q_einsum": {"w": w, "lora": {"a": a, "b": b}}}}}
    merged = m3jax.merge([gemma, gemma], lora=1.0)["layer_0"]["attn"]["q_einsum"]
    assert np.asarray(merged["w"]).tobytes() == want(w, a, b, 1.0, (1,)).tobytes()
    assert merged.keys() == {"w"}
    for name in ("x.lora.a", "x.lora_a.kernel", "x.lora.down.weight", "x.lora_up", "x.loraA", "w_lora_b", "x/lora_a"):
        with pytest.raises(M3Error, match="is a factor of an adapter"):
            m3jax.merge([{name: a, "w": w}] * 2)
    assert m3jax.merge([{"flora.a": a}] * 2).keys() == {"flora.a"}
