"""In memory: every method against the oracle, eager, jitted, sharded, differentiated, batched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import compiling, oracle
from support.matrix import DTYPES, FAST, METHODS, SPARSIFIERS, few, models, pairwise, same

import m3jax
from m3jax import M3Error
from m3jax.naming import block_group

WEIGHTS = [0.3, 0.45, 0.25]


def case(method, sparsifier, dtype="bfloat16", n=2):
    base, experts = models(DTYPES[dtype], n)
    made, _, told = METHODS[method]
    sparse, _, told_sparse = SPARSIFIERS[sparsifier]
    return base, experts, made, sparse, told | told_sparse


def jitted(made, sparse):
    return compiling.jit(
        lambda experts, base, weights, key: m3jax.merge(
            experts, made, base=base, weights=weights, sparsify=sparse, key=key
        )
    )


def check(method, sparsifier, dtype, count, how):
    """A merge is the oracle's, as written or under jit with traced weights (then float32) and a traced key."""
    base, experts, made, sparse, told = case(method, sparsifier, dtype, count)
    if how == "jit":
        traced = np.array(WEIGHTS[:count], np.float32)
        weights = [float(w) for w in traced]
        got = jitted(made, sparse)(experts, base, traced, jax.random.key(5, impl="threefry2x32"))
    else:
        weights = WEIGHTS[:count]
        got = m3jax.merge(experts, made, base=base, weights=weights, sparsify=sparse, key=5)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    assert same(got, oracle.merge(experts, base, weights=weights, seed=5, **told)) == (True, [])


@pytest.mark.parametrize(("method", "sparsifier"), FAST)
def test_merges_are_the_oracles(method, sparsifier):
    check(method, sparsifier, "bfloat16", 2, "eager")


@pytest.mark.parametrize(
    ("method", "sparsifier"), [("linear", "dare"), ("ties_paper", "dare"), ("ties_mergekit", "magnitude_model")]
)
def test_merges_under_jit_with_traced_weights_and_key_are_the_oracles(method, sparsifier):
    check(method, sparsifier, "bfloat16", 2, "jit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sparsifier", "dtype", "count", "how"),
    pairwise(METHODS, SPARSIFIERS, DTYPES, (3, 2), ("jit", "eager"), apart=((0, 1),)),
)
def test_merges_are_the_oracles_everywhere(method, sparsifier, dtype, count, how):
    check(method, sparsifier, dtype, count, how)


def sharded(tree, mesh, spec):
    def put(leaf):
        fits = spec if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, fits))

    return jax.tree.map(put, tree)


MESHES = {
    "rows": ((8,), ("fsdp",), ("fsdp", None)),
    "columns": ((8,), ("fsdp",), (None, "fsdp")),
    "both": ((4, 2), ("fsdp", "tp"), ("fsdp", "tp")),
    "crossed": ((2, 4), ("fsdp", "tp"), ("tp", "fsdp")),
    "one axis over two": ((2, 4), ("fsdp", "tp"), (None, ("fsdp", "tp"))),
    "one device": ((1,), ("fsdp",), ("fsdp", None)),
}
SHARDED = [
    *(("ties_paper", mesh) for mesh in MESHES),
    ("linear", "columns"),
    ("task_arithmetic", "both"),
    ("ties_mergekit", "crossed"),
]


@pytest.mark.parametrize(
    ("method", "mesh"),
    few(SHARDED, ("linear", "columns"), ("ties_paper", "rows")),
)
def test_no_sharding_changes_a_bit(method, mesh):
    shape, names, spec = MESHES[mesh]
    base, experts, made, sparse, told = case(method, "dare")
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    place = functools.partial(sharded, mesh=mesh, spec=PartitionSpec(*spec))
    want = oracle.merge(experts, base, weights=WEIGHTS[:2], seed=5, **told)
    here, there = place(base), [place(e) for e in experts]
    eager = m3jax.merge(there, made, base=here, weights=WEIGHTS[:2], sparsify=sparse, key=5)
    assert same(eager, want) == (True, [])
    for name, leaf in eager.items():
        assert leaf.sharding.is_equivalent_to(here[name].sharding, leaf.ndim), name
    traced = compiling.jit(lambda e, b: m3jax.merge(e, made, base=b, weights=WEIGHTS[:2], sparsify=sparse, key=5))
    assert same(traced(there, here), want) == (True, [])


def test_elementwise_methods_exchange_nothing():
    base, experts, made, sparse, _ = case("task_arithmetic", "dare")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = functools.partial(sharded, mesh=mesh, spec=PartitionSpec("fsdp", None))
    text = (
        jitted(made, sparse).lower([place(e) for e in experts], place(base), jnp.ones(2), jax.random.key(0)).compile()
    )
    for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter"):
        assert collective not in text.as_text(), collective


@pytest.mark.parametrize(("dtype", "t"), few(zip(DTYPES, (0.0, 0.3, 1.0), strict=True), ("bfloat16", 0.3)))
def test_slerp_is_the_oracles(dtype, t):
    _, experts = models(DTYPES[dtype], 2)
    experts[1]["model.norm.weight"] = experts[0]["model.norm.weight"]  # nearly parallel: a line
    want = oracle.merge(experts, method="slerp", weights=t)
    assert same(m3jax.merge(experts, m3jax.slerp(), weights=t), want) == (True, [])
    under_jit = compiling.jit(lambda e: m3jax.merge(e, m3jax.slerp(), weights=t))
    assert same(under_jit(experts), want) == (True, [])


def test_a_position_known_on_the_host_keeps_its_bits_under_jit():
    rng = np.random.default_rng(0)
    experts = [{"w": rng.standard_normal((400, 400)).astype(np.float32)} for _ in range(2)]
    want = oracle.merge(experts, method="slerp", weights=0.3)
    assert same(oracle.merge(experts, method="slerp", weights=float(np.float32(0.3))), want)[0] is False
    under_jit = jax.jit(lambda e: m3jax.merge(e, m3jax.slerp(), weights=0.3))
    assert same(under_jit(experts), want) == (True, [])


def test_slerp_is_sharding_independent_and_differentiable():
    _, experts = models(DTYPES["float32"], 2)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    there = [sharded(e, mesh, PartitionSpec("x", None)) for e in experts]
    want = oracle.merge(experts, method="slerp", weights=0.25)
    assert same(m3jax.merge(there, m3jax.slerp(), weights=0.25), want) == (True, [])

    def loss(t):
        return sum(jnp.sum(v**2) for v in m3jax.merge(experts, m3jax.slerp(), weights=t).values())

    slope = jax.grad(loss)(jnp.float32(0.4))
    near = [float(loss(jnp.float32(0.4 + d))) for d in (-0.02, 0.02)]
    assert np.isclose(slope, (near[1] - near[0]) / 0.04, rtol=2e-2)


@pytest.mark.parametrize(
    ("method", "granularity"), [("linear", "model"), ("ties_paper", "layer"), ("linear", "tensor")]
)
def test_drawn_weights_of_every_granularity(method, granularity):
    base, experts, made, _, told = case(method, "none")
    got = m3jax.merge(experts, made, base=base, weights=m3jax.mixup(0.5, granularity), key=8)
    groups = {k: None if granularity == "model" else block_group(k, granularity) for k in base}
    weights = {k: oracle.draw(8, 0.5, 2, group) for k, group in groups.items()}
    assert same(got, oracle.merge(experts, base, weights=weights, seed=8, **told)) == (True, [])


@pytest.mark.parametrize("method", few(METHODS, "linear"))
def test_weights_have_derivatives(method):
    base, experts = models(DTYPES["float32"], 2, {"w": (12,)})
    made = METHODS[method][0]

    @jax.jit
    def loss(weights, experts, base):
        return jnp.sum(m3jax.merge(experts, made, base=base, weights=weights)["w"] ** 2)

    at = jnp.array([0.3571, 0.5513], jnp.float32)
    slope = jax.jit(jax.grad(loss))(at, experts, base)
    for i in range(2):
        step = np.zeros(2, np.float32)
        step[i] = 0.004
        finite = (float(loss(at + step, experts, base)) - float(loss(at - step, experts, base))) / 0.008
        assert np.isclose(slope[i], finite, rtol=2e-2, atol=0.02), (i, slope[i], finite)


def test_parameters_have_derivatives():
    base, experts, made, sparse, _ = case("task_arithmetic", "dare", "float32")

    def loss(experts):
        merged = m3jax.merge(experts, made, base=base, weights=[1.0, 2.0], sparsify=sparse, key=5)
        return sum(jnp.sum(leaf) for leaf in merged.values())

    slope = jax.grad(loss)(experts)
    keep = oracle.masks(5, "model.norm.weight", (0.3, 0.3), (16,))
    assert np.allclose(slope[1]["model.norm.weight"], np.where(keep[1], 2.0 * 0.7 / 0.3, 0.0), rtol=1e-6)


def test_a_batch_of_merges_by_vmap():
    base, experts, made, sparse, _ = case("task_arithmetic", "dare")
    keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), 3)
    weights = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]], np.float32)
    batch = jax.vmap(lambda w, k: m3jax.merge(experts, made, base=base, weights=w, sparsify=sparse, key=k))(
        weights, keys
    )
    for i in range(3):
        one = m3jax.merge(experts, made, base=base, weights=weights[i], sparsify=sparse, key=keys[i])
        assert same({k: v[i] for k, v in batch.items()}, one) == (True, [])


def test_traced_weights_fold_as_on_the_host():
    """Double-float and float64 folding agree on thousands of coefficients."""
    from m3jax.arithmetic.double import Double, to_float32

    rng = np.random.default_rng(0)
    w = rng.uniform(0.01, 2, (3, 5000)).astype(np.float32)
    fold = jax.jit(
        lambda w: to_float32(Double.of(w[0]) * 0.7 / 0.3 / (Double.of(w[0]) + Double.of(w[1]) + Double.of(w[2])))
    )
    wide = w.astype(np.float64)
    assert (np.asarray(fold(w)) == (wide[0] * 0.7 / 0.3 / wide.sum(0)).astype(np.float32)).all()


def test_the_papers_formulas_in_float64():
    """Average, task arithmetic, and TIES with model-wide trim and majority sign, as the papers write them."""
    base, experts = models(DTYPES["float32"], 2)
    flat = {k: np.stack([e[k].astype(np.float64) for e in experts]) for k in base}
    average = m3jax.merge(experts)
    for k in base:
        assert np.allclose(average[k], flat[k].mean(0), rtol=1e-6, atol=1e-7)
    arithmetic = m3jax.merge(experts, m3jax.task_arithmetic(scale=0.5), base=base)
    deltas = {k: flat[k] - base[k].astype(np.float64) for k in base}
    for k in base:
        assert np.allclose(arithmetic[k], base[k] + 0.5 * deltas[k].sum(0), rtol=1e-5, atol=1e-6)

    lam, density = 0.3, 0.4
    whole = np.concatenate([(np.stack([e[k] for e in experts]) - base[k]).reshape(2, -1) for k in base], axis=1)
    n = whole.shape[1]
    kth = np.sort(np.abs(whole), axis=1)[:, int(n * (1 - density)) - 1 : int(n * (1 - density))]
    trimmed = np.where(np.abs(whole) >= kth, whole, 0).astype(np.float64)
    sign = np.sign(trimmed.astype(np.float32).sum(0))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    agree = np.where(sign > 0, trimmed > 0, trimmed < 0)
    weights = np.array([[lam], [1 - lam]])
    total = (agree * weights).sum(0)
    disjoint = np.where(total > 0, (trimmed * agree * weights).sum(0) / np.where(total > 0, total, 1), 0)
    method = m3jax.ties(density, trim_scope="model", sign_election="unweighted")
    merged = m3jax.merge(experts, method, base=base, weights=[lam, 1 - lam])
    got = np.concatenate([np.asarray(merged[k], np.float64).ravel() for k in base])
    want = np.concatenate([base[k].astype(np.float64).ravel() for k in base]) + disjoint
    assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_one_expert_agreeing_is_taken_unscaled():
    base = {"w": np.zeros(3, np.float32)}
    experts = [{"w": np.array([1.0, 2.0, -1.0], np.float32)}, {"w": np.array([3.0, -1.0, 0.0], np.float32)}]
    merged = m3jax.merge(experts, m3jax.ties(None, sign_election="unweighted"), base=base, weights=[0.25, 0.75])
    assert np.asarray(merged["w"]).tolist() == [0.25 * 1 + 0.75 * 3, 2.0, -1.0]


def test_expectation_of_dare():
    n = 1 << 18
    base = {"w": np.zeros(n, np.float32)}
    experts = [{"w": np.ones(n, np.float32)}, {"w": np.ones(n, np.float32)}]
    merged = m3jax.merge(experts, m3jax.task_arithmetic(), base=base, sparsify=m3jax.dare(0.2), key=1)
    assert abs(float(np.asarray(merged["w"], np.float64).mean()) - 2.0) < 5 * np.sqrt(2 * 0.8 / 0.2 / n)


def test_nested_and_flat_trees_agree():
    flat = [{"a.b": np.ones(3, np.float32) * i, "c": np.ones(2, np.float32)} for i in (1, 2)]
    nested = [{"a": {"b": t["a.b"]}, "c": t["c"]} for t in flat]
    kwargs = {"weights": [0.3, 0.7], "sparsify": m3jax.dare(0.5, target="weights"), "key": 3}
    one, other = m3jax.merge(flat, **kwargs), m3jax.merge(nested, **kwargs)
    assert np.asarray(one["a.b"]).tobytes() == np.asarray(other["a"]["b"]).tobytes()


def test_flax_parameters_keep_their_type():
    from flax import nnx

    states = [nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(i))) for i in (0, 1)]
    merged = m3jax.merge(states, weights=[0.25, 0.75])
    assert isinstance(merged, type(states[0]))
    want = oracle.merge([{"kernel": np.asarray(s["kernel"][...])} for s in states], weights=[0.25, 0.75])
    assert np.asarray(merged["kernel"][...]).tobytes() == want["kernel"].tobytes()


def test_densities_may_be_lists_and_must_fit():
    base, experts = models(DTYPES["bfloat16"], 2)
    got = m3jax.merge(experts, m3jax.task_arithmetic(), base=base, sparsify=m3jax.dare([0.5, 0.2]), key=1)
    want = oracle.merge(experts, base, "task_arithmetic", sparsify="dare", keep=[0.5, 0.2], seed=1)
    assert same(got, want) == (True, [])
    with pytest.raises(M3Error, match="3 are given, but there are 2"):
        m3jax.merge(experts, m3jax.ties([0.5, 0.2, 0.1]), base=base)


def test_weights_of_zero_in_ties_have_bits_and_derivatives():
    base, experts = models(DTYPES["float32"], 2, {"w": (40,)})
    method = m3jax.ties(0.4)
    weights = np.array([1.0, 0.0], np.float32)
    want = oracle.merge(experts, base, "ties", [1.0, 0.0], density=0.4)
    assert same(m3jax.merge(experts, method, base=base, weights=[1.0, 0.0]), want) == (True, [])
    traced = jax.jit(lambda w: m3jax.merge(experts, method, base=base, weights=w))
    assert same(traced(weights), want) == (True, [])
    slope = jax.grad(lambda w: jnp.sum(m3jax.merge(experts, method, base=base, weights=w)["w"]))(jnp.asarray(weights))
    assert np.isfinite(slope).all()


def test_integer_buffers_are_copied_or_refused():
    trees = [{"w": np.ones(2, np.float32), "ids": np.arange(3)} for _ in range(2)]
    assert np.asarray(m3jax.merge(trees)["ids"]).tolist() == [0, 1, 2]
    trees[1]["ids"] = np.arange(3) + 1
    with pytest.raises(M3Error, match="ids"):
        m3jax.merge(trees)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"experts": []}, "at least 1"),
        ({"method": m3jax.ties()}, "needs a base"),
        ({"sparsify": m3jax.dare(0.5), "base": {"w": np.ones(2, np.float32)}}, "key"),
        ({"sparsify": m3jax.dare(0.5), "key": 0}, "needs a base"),
        ({"weights": [1.0]}, "1 weights given where 2"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, -1.0]}, "sum to 0"),
        ({"weights": m3jax.mixup(0.5)}, "key"),
        ({"experts": [{"a.b": np.ones(1, np.float32), "a": {"b": np.ones(1, np.float32)}}] * 2}, "name of two leaves"),
        ({"weights": [1e300, 1.0], "method": m3jax.linear(normalize=False)}, "beyond float32"),
        (
            {"experts": [{"w": np.ones(2, np.float32)}, {"v": np.ones(2, np.float32)}]},
            "missing in expert 1: w; in expert 1 but not in expert 0: v",
        ),
        ({"experts": [{"w": np.ones(2, np.float32)}, {"w": np.ones(3, np.float32)}]}, r"\[2\].*\[3\]"),
        ({"method": m3jax.slerp(), "sparsify": m3jax.dare(0.5, target="weights"), "key": 0}, "slerp"),
    ],
)
def test_bad_calls_get_a_sentence(kwargs, sentence):
    experts = kwargs.pop("experts", [{"w": np.ones(2, np.float32)}] * 2)
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge(experts, **kwargs)


@pytest.mark.parametrize("make", [m3jax.dare, m3jax.magnitude, m3jax.ties])
@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_bad_densities(make, density):
    with pytest.raises(M3Error, match="density"):
        make(density)


def test_state_of_training_alone_is_refused():
    states = [optax.adam(1e-3).init({"w": jnp.full(3, float(i))}) for i in range(2)]
    for call in (m3jax.merge, m3jax.soup):
        with pytest.raises(M3Error, match=r"nothing in these trees is of a model \(0.count is of kind optimizer\)"):
            call(states)
