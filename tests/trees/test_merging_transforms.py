"""merge() under JAX's transformations: batches by vmap, derivatives, donation; and thresholds found by counting."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.matrix import DTYPES, METHODS, SPARSIFIERS, few, models, pairwise, same

import m3jax
from m3jax import M3Error
from m3jax.arithmetic import ranking
from m3jax.trees import arrays

SHAPES = {"layers.0.w": (12, 8), "layers.1.w": (12, 8)}
WEIGHTS = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.3]], np.float32)
# Every method with one sparsifier and every sparsifier with one method: how the two go together, test_merging shows.
STAR = [
    *((method, "dare") for method in METHODS),
    *(("ties_paper", sparsifier) for sparsifier in SPARSIFIERS if sparsifier != "dare"),
    ("linear", "none"),
    ("slerp", "none"),
]


def caller(method, sparsifier, dtype="bfloat16", shapes=SHAPES):
    """A function (weights, key, experts, base) → merged, and its models; weights are a position for slerp."""
    base, experts = models(DTYPES[dtype], 2, shapes)
    if method == "slerp":
        return lambda w, k, e, b: m3jax.merge(e, m3jax.slerp(), base=b, weights=w[0], key=k), experts, base
    made, sparse = METHODS[method][0], SPARSIFIERS[sparsifier][0]
    return lambda w, k, e, b: m3jax.merge(e, made, base=b, weights=w, sparsify=sparse, key=k), experts, base


def keys(count):
    return jax.random.split(jax.random.key(1, impl="threefry2x32"), count)


@pytest.mark.parametrize(
    ("method", "sparsifier"),
    few(STAR, ("ties_mergekit", "dare")),
)
def test_a_batch_over_weights_and_keys_is_one_merge_at_a_time(method, sparsifier):
    call, experts, base = caller(method, sparsifier)
    batch = jax.jit(jax.vmap(call, in_axes=(0, 0, None, None)))(WEIGHTS, keys(3), experts, base)
    for i in range(3):
        one = call(WEIGHTS[i], keys(3)[i], experts, base)
        assert same({k: v[i] for k, v in batch.items()}, one) == (True, []), i


@pytest.mark.parametrize("method", ["task_arithmetic", "ties_paper"])
def test_scale_may_be_traced_mapped_and_differentiated(method):
    base, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    made = METHODS[method][0]

    def call(scale, base=base):
        scaled = made._replace(scale=scale)
        return m3jax.merge(experts, scaled, base=base, weights=[0.3, 0.45], sparsify=m3jax.dare(0.5), key=3)

    scales = np.array([0.0, 0.7, -1.5], np.float32)
    batch = jax.jit(jax.vmap(call))(scales)
    for i, scale in enumerate(scales):
        assert same({k: v[i] for k, v in batch.items()}, call(float(scale))) == (True, []), scale
        assert same(call(jnp.asarray(scale)), call(float(scale))) == (True, [])
    wide = {name: leaf.astype(np.float32) for name, leaf in base.items()}
    total = lambda scale: sum(jnp.sum(leaf) for leaf in call(scale, wide).values())  # noqa: E731
    assert np.isclose(jax.grad(total)(0.7), float(total(1.0)) - float(total(0.0)), rtol=1e-2)


def test_numbers_that_must_be_known_on_the_host_say_so():
    base, experts = models(DTYPES["float32"], 2, SHAPES)
    stock = lambda scale: m3jax.merge(experts, m3jax.model_stock(scale=scale), base=base)  # noqa: E731
    with pytest.raises(M3Error, match="model_stock: scale is traced"):
        jax.jit(stock)(0.5)
    with pytest.raises(M3Error, match=r"task_arithmetic: scale has shape \[2\]: give one number"):
        m3jax.merge(experts, m3jax.task_arithmetic(scale=np.ones(2)), base=base)
    for sparsifier in (m3jax.dare, m3jax.magnitude, m3jax.della):
        with pytest.raises(M3Error, match=r"density is traced, but which entries are kept"):
            jax.jit(lambda density, made=sparsifier: made(density) and 0)(0.5)
    assert m3jax.dare(jnp.float32(0.5)) == m3jax.dare(0.5)


def test_one_weight_is_every_experts():
    base, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    call = lambda w: m3jax.merge(experts, m3jax.task_arithmetic(), base=base, weights=w)  # noqa: E731
    want = call([0.25, 0.25])
    for got in (call(0.25), call(np.float32(0.25)), jax.jit(call)(0.25), call({"": 0.25})):
        assert same(got, want) == (True, [])


OVER_EXPERTS = [*((method, "dare") for method in METHODS), ("ties_paper", "magnitude_model"), ("slerp", "none")]


@pytest.mark.parametrize(("method", "sparsifier"), few(OVER_EXPERTS, ("task_arithmetic", "dare")))
def test_a_batch_over_experts_is_one_merge_at_a_time(method, sparsifier):
    call, experts, base = caller(method, sparsifier)
    _, others, _ = caller(method, sparsifier)
    others = [{k: v[::-1] for k, v in e.items()} for e in others]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), experts, others)
    batch = jax.vmap(lambda e: call(WEIGHTS[0], 5, e, base))(stacked)
    for i, models_of in enumerate((experts, others)):
        assert same({k: v[i] for k, v in batch.items()}, call(WEIGHTS[0], 5, models_of, base)) == (True, []), i


def test_a_batch_of_draws_is_made_of_weights_drawn_on_the_host():
    """Without a call from the program: draw for many keys on the host, then map over weights and keys."""
    method = m3jax.linear(normalize=False)  # drawn weights sum to one
    _, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    call = functools.partial(m3jax.merge, experts, method, sparsify=m3jax.dare(0.5, target="weights"))
    weights = m3jax.mixup_weights(keys(4), 0.5)
    batch = jax.vmap(lambda w, k: call(weights=w, key=k))(weights, keys(4))
    for i in range(4):
        drawn = call(weights=m3jax.mixup(0.5), key=keys(4)[i])
        assert same({k: v[i] for k, v in batch.items()}, drawn) == (True, []), i


# Weights where no sign or set of agreeing experts changes within the step of the finite difference.
SMOOTH = [
    ("linear", "none"),
    ("task_arithmetic", "none"),
    ("task_arithmetic", "dare"),
    ("task_arithmetic_normalized", "dare_weights"),
    ("ties_mergekit", "none"),
    ("ties_mergekit", "dare"),
    ("ties_paper", "none"),
    ("ties_paper", "magnitude"),
    ("ties_untrimmed_sum", "dare"),
    ("slerp", "none"),
]


@pytest.mark.parametrize(("method", "sparsifier"), few(SMOOTH, ("task_arithmetic", "dare"), ("slerp", "none")))
def test_derivatives_in_weights_and_parameters_are_finite_differences(method, sparsifier):
    call, experts, base = caller(method, sparsifier, "float32", {"w": (16,)})
    rng = np.random.default_rng(3)
    cost = jnp.asarray(rng.standard_normal(16), jnp.float32)

    @jax.jit
    def loss(weights, experts, base):
        merged = call(weights, 5, experts, base)["w"]
        return jnp.sum(cost * merged + merged**2)

    at = (jnp.array([0.3571, 0.5513], jnp.float32), experts, base)
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)
    # One direction for each argument; parameters move along themselves, so that no zero is crossed.
    directions = (jnp.array([0.7, -0.4], jnp.float32), experts, base)
    step = {"slerp": 0.01}.get(method, 0.002)
    for argument, direction in enumerate(directions):
        # Parameters change which entries are trimmed or agree, and slerp's angle is held: only weights there.
        if argument and (method == "slerp" or method.startswith("ties") or sparsifier == "magnitude"):
            continue
        moved = [
            [
                jax.tree.map(lambda x, d, s=s: x + np.float32(s) * d, a, direction) if i == argument else a
                for i, a in enumerate(at)
            ]
            for s in (step, -step)
        ]
        finite = (float(loss(*moved[0])) - float(loss(*moved[1]))) / (2 * step)
        along = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), slopes[argument], direction)
        assert np.isclose(sum(jax.tree.leaves(along)), finite, rtol=2e-2, atol=2e-2), (argument, along, finite)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties_mergekit", "slerp"])
def test_derivatives_in_parameters_are_the_coefficients(method):
    """Of Σ merged in each expert's entries: its coefficient where it counts, 0 where it does not."""
    call, experts, base = caller(method, "none", "float32", {"w": (40,)})
    weights = np.array([0.25, 0.5], np.float32)
    slopes = jax.grad(lambda e: jnp.sum(call(weights, 0, e, base)["w"]))(experts)
    got = [np.asarray(s["w"]) for s in slopes]
    if method == "ties_mergekit":
        both = (got[0] != 0) & (got[1] != 0)
        assert both.any()
        assert np.allclose(got[0][both] + got[1][both], 1, rtol=1e-6)
        assert np.isin(got[0][~both], [0, 1]).all()
        return
    angle = np.arccos(np.vdot(*(e["w"] for e in experts)) / np.prod([np.linalg.norm(e["w"]) for e in experts]))
    want = {
        "linear": (1 / 3, 2 / 3),
        "task_arithmetic": (0.25 * 0.7, 0.5 * 0.7),
        "slerp": (np.sin(0.75 * angle) / np.sin(angle), np.sin(0.25 * angle) / np.sin(angle)),
    }[method]
    for slope, coefficient in zip(got, want, strict=True):
        assert np.allclose(slope, coefficient, rtol=1e-4)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("method", ["linear", "ties_paper"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_donated_experts_are_gone_and_the_merge_is_the_same(method, dtype):
    base, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    made = METHODS[method][0]
    want = m3jax.merge(experts, made, base=base, weights=[0.3, 0.7], dtype=dtype)
    here, there = on_device(base), [on_device(e) for e in experts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = m3jax.merge(there, made, base=here, weights=[0.3, 0.7], dtype=dtype, donate=True)
    assert same(got, want) == (True, [])
    assert all(x.is_deleted() for e in there for x in e.values())
    assert not any(x.is_deleted() for x in here.values())


def test_donation_frees_each_leaf_before_the_next_is_merged(monkeypatch):
    _, experts = models(DTYPES["float32"], 2, SHAPES)
    there, alive = [on_device(e) for e in experts], []
    merge_array = arrays.merge_array

    def counting(*args):
        alive.append(sum(not x.is_deleted() for e in there for x in e.values()))
        return merge_array(*args)

    monkeypatch.setattr(arrays, "merge_array", counting)
    m3jax.merge(there, donate=True)
    assert alive == [4, 2]


def test_donation_keeps_what_is_needed_elsewhere():
    shared, own, step = jnp.ones(3), jnp.full(3, 2.0), jnp.arange(2)
    tied = [{"in": own, "out": own, "step": step}, {"in": shared, "out": own, "step": step}]
    base = {"in": shared, "out": shared, "step": step}
    got = m3jax.merge(tied, m3jax.task_arithmetic(), base=base, donate=True)
    assert (np.asarray(got["in"]).tolist(), np.asarray(got["out"]).tolist()) == ([2.0] * 3, [3.0] * 3)
    assert own.is_deleted()
    assert not shared.is_deleted()
    a, b = ({"w": jnp.ones(2), "ids": jnp.arange(2), "stats": jnp.ones(2)} for _ in range(2))
    got = m3jax.merge([a, b], only=lambda name: name == "w", donate=True)
    assert np.asarray(got["stats"]).tolist() == [1.0, 1.0]
    assert a["w"].is_deleted()
    assert b["w"].is_deleted()


def test_donation_under_jit_is_the_callers():
    _, experts = models(DTYPES["float32"], 2, SHAPES)
    there = [on_device(e) for e in experts]
    weights = jnp.array([0.3, 0.7])
    got = jax.jit(lambda w: m3jax.merge(there, weights=w, donate=True))(weights)
    assert same(got, m3jax.merge(experts, weights=np.asarray(weights))) == (True, [])
    assert not any(x.is_deleted() for e in there for x in e.values())
    merged = jax.jit(lambda e, rest: m3jax.merge([e, rest], donate=True), donate_argnums=0)(*there)
    assert same(merged, m3jax.merge(experts)) == (True, [])
    assert all(x.is_deleted() for x in there[0].values())


def test_a_program_of_constants_is_fenced_too(monkeypatch):
    """Under a jit with nothing traced, a zero given as an argument would be a constant that compilers remove."""
    _, experts = models(DTYPES["float32"], 2, SHAPES)
    zeros, merge_array = [], arrays.merge_array
    monkeypatch.setattr(arrays, "merge_array", lambda *args: zeros.append(args[-1]) or merge_array(*args))
    got = jax.jit(lambda: m3jax.merge(experts))()
    assert zeros == [None, None]
    assert same(got, m3jax.merge(experts)) == (True, [])
    assert zeros[2:] == [0, 0]


# All that is ranked, with and without another ranking after it.
COUNTED = [("ties_paper", "dare", "jit"), ("ties_paper", "dare", "eager"), ("ties_mergekit", "magnitude_model", "jit")]
RANKED = pairwise(
    ("ties_mergekit", "ties_paper", "task_arithmetic"),
    ("magnitude", "magnitude_model", "magnitude_weights", "breadcrumbs", "della"),
    ("eager", "jit"),
)


@pytest.mark.parametrize(
    ("method", "sparsifier", "how"),
    few(dict.fromkeys([*COUNTED, *RANKED]), *COUNTED[1:]),
)
def test_thresholds_found_by_counting_are_the_oracles(method, sparsifier, how, monkeypatch):
    monkeypatch.setattr(arrays, "_platform_of", lambda _: "gpu")
    monkeypatch.setattr(ranking, "tally", None)
    base, experts = models(DTYPES["bfloat16"], 2)
    (made, _, told), (sparse, _, told_sparse) = METHODS[method], SPARSIFIERS[sparsifier]
    call = functools.partial(m3jax.merge, method=made, weights=[0.3, 0.45], sparsify=sparse, key=5)
    want = oracle.merge(experts, base, weights=[0.3, 0.45], seed=5, **(told | told_sparse))
    got = (jax.jit(call) if how == "jit" else call)(experts, base=base)
    assert same(got, want) == (True, [])


@pytest.mark.parametrize("by_scatter", [True, False])
def test_counts_of_many_leaves_are_all_added_up(by_scatter, monkeypatch):
    monkeypatch.setattr(arrays, "_platform_of", lambda _: "cpu" if by_scatter else "gpu")
    base, experts = models(DTYPES["bfloat16"], 2, {f"w{i}": (7,) for i in range(11)})
    made, _, told = METHODS["ties_paper"]
    assert same(m3jax.merge(experts, made, base=base), oracle.merge(experts, base, **told)) == (True, [])


@pytest.mark.slow
def test_counting_is_batched_and_differentiated_as_tallying_is(monkeypatch):
    call, experts, base = caller("ties_mergekit", "dare", "float32", {"w": (12, 8)})
    weights = jnp.asarray(WEIGHTS)

    def sums(w, k, e):
        return jnp.sum(call(w, k, e, base)["w"] ** 2)

    def slopes():
        return jax.jit(jax.vmap(jax.value_and_grad(sums, argnums=(0, 2)), in_axes=(0, 0, None)))(
            weights, keys(3), experts
        )

    tallied = slopes()
    monkeypatch.setattr(arrays, "_platform_of", lambda _: "gpu")
    jax.tree.map(np.testing.assert_array_equal, slopes(), tallied)


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.25, 0.5, 0.999, 1.0])
def test_counting_finds_what_sorting_finds(density):
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**31, 5000, dtype=np.uint32)
    words[:40] = np.arange(40) % 4  # the least magnitudes
    words[40:60] = 0x7FFFFFFF  # and the largest: NaNs
    rank = int(words.size * (1 - density))
    search = ranking.start(words.size, [rank])
    for _ in range(ranking.STEPS):
        shift = ranking.digit_shift(search.step)
        below = np.array([[(words < int(search.low[0]) + (j << int(shift))).sum() for j in range(1, 8)]], np.uint32)
        counted = ranking.count_below((jnp.asarray(words.view(np.float32)),), jnp.asarray(search.low), shift)
        assert np.asarray(counted).tolist() == below.tolist()
        search = ranking.advance_digit(search, (np.zeros_like(below), below))
    assert search.found
    assert int(search.low[0]) == (0 if rank == 0 else np.sort(words)[rank - 1])
