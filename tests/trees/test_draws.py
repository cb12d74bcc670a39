"""Weights that M³ draws where the key is traced: the bits of draws on the host, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.directories import write
from support.matrix import ALONE, DTYPES, METHODS, few, models, same

import m3jax
from m3jax import M3Error, draw_weights, mixup, mixup_weights
from m3jax.arithmetic import threefry
from m3jax.exploration import samples, strategies
from m3jax.methods.leaf import Pipeline, settings_of

SHAPES = {"layers.0.w": (8, 4), "layers.1.w": (8, 4)}
ROWS = PartitionSpec("x")
# Small and large concentrations, at which quantiles are next to 0 and 1 or in the middle, and two shapes.
ALPHAS = [(0.03, 2), (0.5, 2), (40.0, 2), ((0.5, 3.0), 2), (0.5, 3)]


def keys(count, seed=1):
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


@pytest.mark.parametrize(("alpha", "n"), ALPHAS)
def test_weights_of_a_program_are_those_of_the_host(alpha, n):
    many = keys(64)
    want = np.array([draw_weights(key, alpha, n) for key in many])
    assert mixup_weights(many, alpha, n).tolist() == want.tolist()
    single = lambda key: mixup_weights(key, alpha, n)  # noqa: E731
    sharded = jax.shard_map(jax.vmap(single), mesh=mesh(), in_specs=ROWS, out_specs=ROWS)
    ways = {
        "vmap": jax.jit(jax.vmap(single)),
        "map": jax.jit(lambda ks: jax.lax.map(single, ks)),
        "scan": jax.jit(lambda ks: jax.lax.scan(lambda i, k: (i + 1, single(k)), 0, ks)[1]),
        "shard_map": jax.jit(sharded),
    }
    for way, function in ways.items():
        got = np.asarray(function(many))
        assert (got.dtype, got.tolist()) == (np.float32, want.astype(np.float32).tolist()), way


CASES = [  # with a normaliser, a table of subsets and masks, a position, and a rule of inner products in float64
    (m3jax.linear(), 2, "model", None),
    (m3jax.ties(None), 3, "layer", m3jax.dare(0.5)),
    (m3jax.slerp(), 2, "tensor", None),
    (m3jax.multislerp(), 3, "model", None),
]
EVERY = [
    (made, 2 if made.experts[1] == 2 else 3, "layer", None)
    for made, *_ in (METHODS | ALONE).values()
    if made.weighting != "none" and made.preparation is None
]


@pytest.mark.parametrize(("method", "n", "granularity", "sparsify"), few([*CASES, *EVERY], *CASES[:2]))
def test_merges_with_drawn_weights_are_the_eager_ones(method, n, granularity, sparsify):
    base, experts = models(DTYPES["bfloat16"], n, SHAPES)
    many = keys(3)
    counted = [jax.tree.map(lambda x: jnp.abs(x).astype(jnp.float32), tree) for tree in experts]
    statistics = {"statistics": counted} if method.statistics else {}

    def call(key):
        how = {"weights": mixup(0.5, granularity), "sparsify": sparsify, "key": key, **statistics}
        return m3jax.merge(experts, method, base=base, **how)

    want = [call(key) for key in many]
    ways = {"vmap": jax.jit(jax.vmap(call))}
    if method == m3jax.linear():
        ways["map"] = jax.jit(lambda ks: jax.lax.map(call, ks))
        ways["scan"] = jax.jit(lambda ks: jax.lax.scan(lambda i, k: (i + 1, call(k)), 0, ks)[1])
    for way, function in ways.items():
        got = [{name: leaf[i] for name, leaf in function(many).items()} for i in range(3)]
        assert [same(one, other) for one, other in zip(got, want, strict=True)] == [(True, [])] * 3, way


def test_coefficients_of_many_draws_are_the_hosts():
    """1 − λ often lies in the middle of two float32, where no folding in double-float would do."""
    many, method = keys(200, 2), m3jax.linear(scale=0.7)
    experts = [{"w": np.eye(3, dtype=np.float32)[i]} for i in range(3)]
    call = lambda key: m3jax.merge(experts, method, weights=mixup(0.3), key=key)["w"]  # noqa: E731
    got = np.asarray(jax.jit(jax.vmap(call))(many))
    drawn = mixup_weights(many, 0.3, 3)
    want = [method.fold(method.options, settings_of(Pipeline(method, None, 3), tuple(w), 0.7)) for w in drawn.tolist()]
    assert got.tolist() == np.stack(want).tolist()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_merges_and_shard_map_users(kind):
    base, (a, b) = models(DTYPES["bfloat16"], 2, SHAPES)
    key = keys(1)[0]

    def call(a, b, base, key):
        return m3jax.merge([a, b], m3jax.task_arithmetic(), base=base, weights=mixup(0.5), key=key)

    want = call(a, b, base, key)
    place = NamedSharding(mesh(kind), ROWS)
    put = [jax.device_put(tree, place) for tree in (a, b, base)]
    assert same(jax.jit(call)(*put, key), want) == (True, [])
    specs = (ROWS, ROWS, ROWS, PartitionSpec())
    mapped = jax.shard_map(call, mesh=place.mesh, in_specs=specs, out_specs=ROWS)
    assert same(jax.jit(mapped)(*put, key), want) == (True, [])


def test_samples_of_an_exploration():
    base, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    groups = ("layers.0", "layers.1")
    own = {group: draw_weights(7, 0.5, 2, group) for group in groups}
    space = samples.Space(groups, 2, 0.5, False, threefry.root_key(7))
    trials = [trial for (trial,) in strategies.STRATEGIES["draw"](space, 3)]
    assert trials[0].weights == own  # what `m3jax merge` draws
    method, sparsify = m3jax.task_arithmetic(), m3jax.dare(0.5)

    def call(sample):
        weights = mixup(0.5, "layer", sample=sample)
        return m3jax.merge(experts, method, base=base, weights=weights, sparsify=sparsify, key=7)

    batch = jax.jit(jax.vmap(call))(jnp.arange(3))
    for k in range(3):
        drawn = trials[k].weights
        want = m3jax.merge(experts, method, base=base, weights=drawn, sparsify=sparsify, key=7)
        assert same(call(k), want) == (True, [])
        assert same({name: leaf[k] for name, leaf in batch.items()}, want) == (True, [])
        assert mixup_weights(7, 0.5, group="layers.1", sample=range(3))[k].tolist() == list(drawn["layers.1"])
    traced = jax.vmap(lambda k: mixup_weights(7, 0.5, sample=k))(jnp.arange(3))
    assert np.asarray(traced).tolist() == mixup_weights(7, 0.5, sample=range(3)).astype(np.float32).tolist()


def test_draws_of_a_recipe_with_smooth_layers(tmp_path):
    shapes = {f"model.layers.{i}.w": (4, 4) for i in range(4)} | {"model.norm": (4,)}
    _, experts = models(DTYPES["float32"], 2, shapes)
    for name, tensors in zip("ab", experts, strict=True):
        write(tmp_path / name, tensors)
    recipe = {
        "merge_method": "linear",
        "models": [str(tmp_path / name) for name in "ab"],
        "mixup": {"alpha": 0.5, "granularity": "layer", "smooth": 0.8},
        "seed": 5,
    }
    m3jax.merge_checkpoint(recipe, tmp_path / "merged")
    want = m3jax.load(tmp_path / "merged", flat=True)
    call = lambda key: m3jax.merge(experts, weights=mixup(0.5, "layer", smooth=0.8), key=key)  # noqa: E731
    assert same(call(5), want) == (True, [])
    assert same(jax.jit(call)(jax.random.key(5, impl="threefry2x32")), want) == (True, [])


def test_scale_and_key_both_traced_and_derivatives_in_the_experts():
    base, experts = models(DTYPES["float32"], 2, {"w": (6,)})
    key = keys(1)[0]

    def call(experts, scale, key):
        method = m3jax.task_arithmetic()._replace(scale=scale)
        return m3jax.merge(experts, method, base=base, weights=mixup(0.5), key=key)

    assert same(jax.jit(call)(experts, 1.0, key), call(experts, 1.0, key)) == (True, [])
    total = lambda experts, key: m3jax.merge(experts, weights=mixup(0.5), key=key)["w"].sum()  # noqa: E731
    slopes = jax.jit(jax.grad(total))(experts, key)
    assert [float(each["w"][0]) for each in slopes] == np.float32(draw_weights(key, 0.5)).tolist()


def test_what_cannot_be_drawn_is_said():
    _, experts = models(DTYPES["float32"], 2, SHAPES)
    for call, said in (
        (lambda: m3jax.merge(experts, weights=mixup(0.5), key=keys(3)), r"keys of shape \[3\]: give one"),
        (lambda: draw_weights(keys(3), 0.5), r"keys of shape \[3\]: m3jax\.mixup_weights takes several"),
        (lambda: m3jax.merge(experts, weights=mixup(0.5, sample=-1), key=0), "sample is -1"),
        (lambda: jax.jit(lambda k: mixup_weights(0, sample=k))(0.5), r"sample is traced, float32\[\]"),
        (lambda: jax.vmap(lambda k: mixup_weights(k, 0.0))(keys(2)), "alpha is 0.0"),
        (lambda: mixup_weights(0, sample=[0, 1.5]), r"sample is \[0, 1\.5\], but must be integers"),
        (lambda: mixup_weights(0, sample=2**64), "sample is 18446744073709551616"),
        (lambda: mixup_weights(0, [0.5]), r"alpha is \[0\.5\]"),
        (lambda: mixup("half"), "alpha is half"),
        (lambda: mixup(0.5, smooth=0.5), "smooth is of neighbouring layers"),
        (lambda: mixup(0.5, "layer", smooth=1.0), "smooth is 1.0"),
    ):
        with pytest.raises(M3Error, match=said):
            call()
    with pytest.raises(TypeError, match=r"the key is traced: take m3jax\.mixup_weights"):
        jax.jit(lambda key: draw_weights(key, 0.5))(keys(1)[0])
