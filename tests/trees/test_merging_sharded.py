"""Meshes with Auto and Explicit axes: the oracle's bits, the template's sharding, nothing exchanged in vain."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracle
from support.clusters import free_port
from support.matrix import DTYPES, METHODS, SPARSIFIERS, few, models, pairwise, same

import m3jax
from m3jax.trees import arrays, matching

WEIGHTS = [0.3, 0.45]
SHAPES = {"cube": (8, 16, 4), "matrix": (40, 16), "vector": (4104,), "scalar": ()}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "line": ((8,), ("x",), (("x",), (None, "x"))),
    "plane": ((4, 2), ("x", "y"), (("x", "y"), ("y", "x"), (None, ("x", "y")))),
    "cube": ((2, 2, 2), ("x", "y", "z"), (("x", "y", "z"), (("x", "z"), None, "y"), (None, "z"), ())),
}
PLACES = [(mesh, place) for mesh, (_, _, specs) in MESHES.items() for place in range(len(specs))]
KINDS = ("auto", "explicit", "mixed")
FAST = [
    ("linear", "none", "cube", 0, "explicit"),
    ("linear", "none", "plane", 0, "mixed"),
    ("task_arithmetic", "dare", "plane", 1, "explicit"),
    ("ties_mergekit", "magnitude_model", "cube", 1, "explicit"),
]
# Every place with every kind of axes, and on these the methods and sparsifiers in turn, each pair of which meets.
ALL = [
    (method, sparsifier, *place, kind)
    for method, sparsifier, place, kind in pairwise(
        METHODS,
        ("none", "dare", "magnitude_model", "della", "breadcrumbs"),
        PLACES,
        KINDS,
        apart=((0, 2), (1, 2), (0, 3), (1, 3)),
    )
]
ALL = list(dict.fromkeys([*FAST, *ALL, *(("slerp", "none", "plane", 0, kind) for kind in KINDS)]))


def mesh_of(name, kind="auto"):
    shape, names, _ = MESHES[name]
    kinds = {"auto": [AUTO], "explicit": [EXPLICIT], "mixed": [EXPLICIT, AUTO]}[kind]
    return jax.make_mesh(shape, names, axis_types=tuple(kinds[i % len(kinds)] for i in range(len(shape))))


def put(tree, mesh, spec):
    """Leaves of the tree on a mesh, as far as the spec fits them."""

    def place(leaf):
        fits = [axis for axis, _ in zip(spec, leaf.shape, strict=False)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*fits)))

    return {name: place(leaf) for name, leaf in tree.items()}


def call_and_oracle(method, sparsifier):
    """A function (experts, base) → merged, the models it takes, and what it must give."""
    base, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    if method == "slerp":
        call = functools.partial(m3jax.merge, method=m3jax.slerp(), weights=0.25)
        return lambda e, b: call(e, base=b), experts, base, oracle.merge(experts, method="slerp", weights=0.25)
    made, _, told = METHODS[method]
    sparse, _, told_sparse = SPARSIFIERS[sparsifier]
    call = functools.partial(m3jax.merge, method=made, weights=WEIGHTS, sparsify=sparse, key=5)
    want = oracle.merge(experts, base, weights=WEIGHTS, seed=5, **(told | told_sparse))
    return lambda e, b: call(e, base=b), experts, base, want


@pytest.mark.parametrize(("method", "sparsifier", "mesh", "place", "kind"), few(ALL, *FAST))
def test_no_kind_of_mesh_changes_a_bit(method, sparsifier, mesh, place, kind):
    call, experts, base, want = call_and_oracle(method, sparsifier)
    devices = mesh_of(mesh, kind)
    there = [put(e, devices, MESHES[mesh][2][place]) for e in experts]
    here = put(base, devices, MESHES[mesh][2][place])
    eager = call(there, here)
    assert same(eager, want) == (True, [])
    for name, leaf in eager.items():
        assert leaf.sharding.is_equivalent_to(here[name].sharding, leaf.ndim), name
    traced = jax.jit(call)(there, here)
    assert same(traced, want) == (True, [])
    if kind == "explicit":
        assert all(jax.typeof(leaf) == jax.typeof(here[name]) for name, leaf in traced.items())
    if kind == "explicit" and place == 0:
        with jax.set_mesh(devices):
            assert same(jax.jit(call)(there, here), want) == (True, [])


@pytest.mark.parametrize(
    ("method", "kind"),
    few(
        [(m, k) for m in ("linear", "ties_paper") for k in ("auto", "explicit")],
        ("linear", "auto"),
        ("linear", "explicit"),
    ),
)
def test_where_shardings_differ_the_output_follows_the_template(method, kind):
    call, experts, base, want = call_and_oracle(method, "dare")
    plane, cube = mesh_of("plane", kind), mesh_of("cube", kind)
    here = put(base, plane, ("y", "x"))
    there = [put(experts[0], plane, (None, ("x", "y"))), put(experts[1], cube, ("z", "y"))]
    alone = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[3]), experts[1])
    for others in (there, [there[0], alone], experts):
        merged = call(others, here)
        assert same(merged, want) == (True, [])
        for name, leaf in merged.items():
            assert leaf.sharding.is_equivalent_to(here[name].sharding, leaf.ndim), name
    if kind == "explicit":
        same_mesh = [there[0], put(experts[1], plane, ("x",))]
        traced = jax.jit(call)(same_mesh, here)
        assert same(traced, want) == (True, [])
        assert all(jax.typeof(leaf) == jax.typeof(here[name]) for name, leaf in traced.items())


def test_a_template_on_the_host_leaves_the_experts_sharding():
    call, experts, base, want = call_and_oracle("task_arithmetic", "none")
    there = [put(e, mesh_of("plane"), ("x", "y")) for e in experts]
    merged = call(there, base)
    assert same(merged, want) == (True, [])
    assert merged["matrix"].sharding.is_equivalent_to(there[0]["matrix"].sharding, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_gradients_and_batches_on_a_mesh(kind):
    _, experts, base, _ = call_and_oracle("linear", "none")
    experts, base = [{"matrix": e["matrix"]} for e in experts], {"matrix": base["matrix"]}
    mesh = mesh_of("plane", kind)
    there, here = [put(e, mesh, ("x", "y")) for e in experts], put(base, mesh, ("x", "y"))

    @jax.jit
    def merged(w, experts, base):
        return m3jax.merge(experts, m3jax.ties(0.4), base=base, weights=w, dtype="float32")

    batch = jnp.array([[0.3, 0.45], [0.75, 0.25]], jnp.float32)
    stacked = jax.vmap(merged, in_axes=(0, None, None))(batch, there, here)
    for i in range(2):
        assert same({k: v[i] for k, v in stacked.items()}, merged(batch[i], experts, base)) == (True, [])
    slope = jax.jit(jax.grad(lambda w, e, b: merged(w, e, b)["matrix"].sum()))
    want = slope(batch[0], experts, base)
    with jax.set_mesh(mesh):
        assert np.allclose(slope(batch[0], there, here), want, rtol=1e-3, atol=1e-3)


COLLECTIVES = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_masks_are_made_where_they_are_used(kind):
    """No device works on more than its part, and none talks to another."""
    call, experts, base, _ = call_and_oracle("task_arithmetic", "dare")
    place = functools.partial(put, mesh=mesh_of("plane", kind), spec=("x", "y"))
    cube = [{"cube": place(e)["cube"]} for e in (*experts, base)]
    text = jax.jit(call).lower(cube[:2], cube[2]).compile().as_text()
    assert "[2,8,4]" in text
    assert "[8,16,4]" not in text
    assert not [word for word in COLLECTIVES if word in text]


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("by_scatter", [True, False])
def test_rankings_exchange_counts_and_no_parameters(kind, by_scatter, monkeypatch):
    monkeypatch.setattr(arrays, "_platform_of", lambda _: "cpu" if by_scatter else "gpu")
    call, experts, base, _ = call_and_oracle("ties_paper", "dare")
    place = functools.partial(put, mesh=mesh_of("plane", kind), spec=(None, ("x", "y")))
    leaf = [{"matrix": place(e)["matrix"]} for e in (*experts, base)]
    text = jax.jit(lambda e, b: call(e, b)).lower(leaf[:2], leaf[2]).compile().as_text()
    assert "all-reduce" in text
    assert not [word for word in COLLECTIVES[1:] if word in text]


# --- manual axes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("method", "sparsifier"), [("task_arithmetic", "dare"), ("ties_paper", "none"), ("slerp", "none")]
)
def test_a_shard_is_not_merged_as_if_it_were_the_whole(method, sparsifier, kind, check_vma):
    call, experts, base, _ = call_and_oracle(method, sparsifier)
    mesh = mesh_of("line", kind)
    trees = [put({"matrix": tree["matrix"]}, mesh, ("x",)) for tree in (*experts, base)]
    spec = {"matrix": PartitionSpec("x")}
    mapped = jax.shard_map(
        lambda a, b, base: call([a, b], base), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma
    )
    for run in (mapped, jax.jit(mapped)):
        with pytest.raises(m3jax.M3Error, match=r"matrix: is a shard under jax\.shard_map.*merge outside of shard_map"):
            run(*trees)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties_untrimmed_sum"])
def test_what_every_entry_knows_is_merged_in_a_shard(method, kind):
    call, experts, base, want = call_and_oracle(method, "none")
    mesh = mesh_of("line", kind)
    trees = [put({"matrix": tree["matrix"]}, mesh, ("x",)) for tree in (*experts, base)]
    spec = {"matrix": PartitionSpec("x")}
    mapped = jax.shard_map(lambda a, b, base: call([a, b], base), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert same(jax.jit(mapped)(*trees), {"matrix": want["matrix"]}) == (True, [])


def test_a_shard_of_a_stack_does_not_know_its_blocks():
    mesh = mesh_of("line")
    rng = np.random.default_rng(0)
    trees = [
        {f"layers.w{n}.kernel": rng.standard_normal((16, n, 3)).astype(np.float32) for n in (4, 5)} for _ in range(2)
    ]
    spec = dict.fromkeys(trees[0], PartitionSpec("x"))

    def merged(weights, key=None):
        call = lambda a, b: m3jax.merge([a, b], weights=weights, key=key)  # noqa: E731
        return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(*trees)

    assert same(merged([0.25, 0.75]), oracle.merge(trees, weights=[0.25, 0.75])) == (True, [])
    for weights in (m3jax.mixup(0.5, "layer"), m3jax.mixup(0.5, "tensor"), {"": [1, 1], "layers.1": [1, 2]}):
        with pytest.raises(m3jax.M3Error, match=r"layers\.\w+\.kernel: is a shard .* the block's weights depend on"):
            merged(weights, 1)


def test_arrays_that_a_shard_map_closes_over_are_whole():
    call, experts, base, want = call_and_oracle("ties_paper", "dare")
    mesh = mesh_of("line")
    whole = jax.shard_map(
        lambda x: (x, call(experts, base)),
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=(PartitionSpec("x"), PartitionSpec()),
        check_vma=False,
    )
    assert same(jax.jit(whole)(jnp.ones(8))[1], want) == (True, [])


# --- buffers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_buffers_are_compared_shard_by_shard(kind, monkeypatch):
    mesh, other = mesh_of("plane", kind), mesh_of("line", kind)
    ids = np.arange(16)

    def tree(values, mesh, spec):
        return {"w": jnp.ones(2), "ids": jax.device_put(jnp.asarray(values), NamedSharding(mesh, PartitionSpec(*spec)))}

    a, equal = (tree(ids, mesh, ("x",)) for _ in range(2))
    read, asarray = [], np.asarray
    monkeypatch.setattr(np, "asarray", lambda x, *rest: read.append(np.shape(x)) or asarray(x, *rest))
    assert matching.equal_arrays(a["ids"], equal["ids"])
    assert set(read) == {(4,)}
    monkeypatch.undo()
    for b in (tree(ids, other, ("x",)), tree(ids, mesh, ("y",)), {"w": jnp.ones(2), "ids": ids}):
        assert m3jax.merge([a, b])["ids"] is a["ids"]
        wrong = {"w": b["w"], "ids": b["ids"] + (np.arange(16) == 13).astype(b["ids"].dtype)}
        for pair in ([a, wrong], [wrong, a]):
            with pytest.raises(m3jax.M3Error, match="differ: ids"):
                m3jax.merge(pair)


PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
import m3jax
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def tree(weight, ids):
    whole = {"w": np.full((4, 2), weight, np.float32), "ids": np.asarray(ids, np.int32)}
    place = NamedSharding(mesh, PartitionSpec("x"))
    return {n: jax.make_array_from_callback(x.shape, place, lambda at, x=x: x[at]) for n, x in whole.items()}
a, b, wrong = tree(1, range(8)), tree(2, range(8)), tree(2, [0, 9, 2, 3, 4, 5, 9, 7])
assert not a["ids"].is_fully_addressable
merged = m3jax.merge([a, b], weights=[1.0, 3.0])
assert merged["ids"] is a["ids"]
assert all(np.array_equal(shard.data, [[1.75, 1.75]]) for shard in merged["w"].addressable_shards)
assert m3jax.merge([a, tree(2, range(8)) | {"ids": np.arange(8, dtype=np.int32)}])["ids"] is a["ids"]
try:
    m3jax.merge([a, wrong])
except m3jax.M3Error as error:
    print(error)
"""


@pytest.mark.slow
def test_buffers_over_processes_are_compared_where_they_lie():
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "in expert 0 and expert 1 differ: ids (int32)" in out
