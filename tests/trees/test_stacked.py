"""Leaves that stack blocks: the bits of the same model stored block by block, for every method, wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracle
from support.matrix import ALONE, DTYPES, MEASURED, METHODS, SPARSIFIERS, few, in_turn, models, most, same

import m3jax
from m3jax import M3Error
from m3jax.trees import arrays
from m3jax.trees.merging import named_leaves
from m3jax.trees.parts import layer_groups

DEPTH = 4
INNER = {"norm.scale": (8,), "up.kernel": (8, 12), "attention.kernel": (2, 8, 6)}
OUTER = {"embed.embedding": (40, 8), "head.kernel": (8, 12)}
SHAPES = OUTER | {f"layers.{i}.{name}": shape for i in range(DEPTH) for name, shape in INNER.items()}
APART = [(method, "alone") for method in MEASURED]
QUICK = [("linear", "none"), ("ties_paper", "dare")]
# Some methods over every axis and kind of mesh, the others over these in turn.
KINDS = (AxisType.Auto, AxisType.Explicit)
SPREAD = [("task_arithmetic", "dare", axis, kind) for axis in (0, 1) for kind in KINDS]
OTHERS = [
    ("ties_paper", "dare"),
    ("ties_untrimmed_sum", "magnitude_model"),
    ("ties_mergekit", "della_weights"),
    ("linear", "breadcrumbs"),
    ("slerp", "alone"),
    ("model_stock_rows", "alone"),
]
TURNS = [(*case, i % 2, KINDS[i // 2 % 2]) for i, case in enumerate(OTHERS)]
GRANULARITIES = ("model", "layer", "tensor")


def stacked(flat, axis):
    """The blocks of a flat tree stacked, the scale of a norm behind its one axis where others have it at 1."""
    tree = {name: leaf for name, leaf in flat.items() if not name.startswith("layers.")}
    for name in INNER:
        tree[f"layers.{name}"] = np.stack([flat[f"layers.{i}.{name}"] for i in range(DEPTH)], axis)
    return tree


def unstacked(tree, axis):
    flat = {name: leaf for name, leaf in tree.items() if not name.startswith("layers.")}
    for name in INNER:
        leaf = np.moveaxis(np.asarray(tree[f"layers.{name}"]), axis, 0)
        flat |= {f"layers.{i}.{name}": leaf[i] for i in range(DEPTH)}
    return flat


def call_of(method, sparsifier):
    """A function (experts, base, granularity) → merged, and its models, block by block."""
    base, experts = models(DTYPES["bfloat16"], most(method, 2), SHAPES)
    made = ALONE[method][0] if sparsifier == "alone" else METHODS[method][0]
    sparse = None if sparsifier == "alone" else SPARSIFIERS[sparsifier][0]

    def call(experts, base, granularity):
        weights = None if made.weighting == "none" else m3jax.mixup(0.5, granularity)
        return m3jax.merge(experts, made, base=base, weights=weights, sparsify=sparse, key=7)

    return call, experts, base, GRANULARITIES if made.weighting != "none" else GRANULARITIES[:1]


@pytest.mark.parametrize(("method", "sparsifier"), few(dict.fromkeys([*QUICK, *in_turn(), *APART]), *QUICK))
def test_stacked_on_any_axis_is_block_by_block(method, sparsifier):
    call, experts, base, granularities = call_of(method, sparsifier)
    for granularity in granularities:
        want = call(experts, base, granularity)
        for axis in (0, 1):
            got = call([stacked(e, axis) for e in experts], stacked(base, axis), granularity)
            assert same(unstacked(got, axis), want) == (True, []), (granularity, axis)


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("template", ["by block", "axis 0", "axis 1"])
def test_trees_that_are_stacked_otherwise_are_laid_out_as_the_template(template, how):
    call, (a, b), base, _ = call_of("task_arithmetic", "dare")
    want = call([a, b], base, "layer")
    run = jax.jit(call, static_argnums=2) if how == "jit" else call
    if template == "by block":
        assert same(run([stacked(a, 0), stacked(b, 1)], base, "layer"), want) == (True, [])
        return
    axis = int(template[-1])
    got = run([a, stacked(b, 1 - axis)], stacked(base, axis), "layer")
    assert set(got) == set(stacked(base, axis))
    assert same(unstacked(got, axis), want) == (True, [])


def test_as_many_blocks_as_entries_are_told_apart():
    """A bias of four entries in four blocks has one shape along either axis."""
    shapes = {f"layers.{i}.{name}": shape for i in range(4) for name, shape in {"b": (4,), "w": (5, 7)}.items()}
    _, (a, b) = models(DTYPES["float32"], 2, shapes)

    def held(tree, axis):
        return {f"layers.{n}": np.stack([tree[f"layers.{i}.{n}"] for i in range(4)], axis) for n in ("b", "w")}

    got = m3jax.merge([held(a, 0), held(b, 1)], weights=[0.3, 0.7])
    want = held(oracle.merge([a, b], weights=[0.3, 0.7]), 0)
    assert same(got, want) == (True, [])


def test_a_block_that_is_missing_is_still_said():
    base, (a, _) = models(DTYPES["float32"], 2, SHAPES)
    shorter = {name: leaf for name, leaf in a.items() if not name.startswith(f"layers.{DEPTH - 1}.")}
    with pytest.raises(M3Error, match=r"missing in expert 1: .*layers\.up\.kernel"):
        m3jax.merge([stacked(base, 0), shorter])
    fewer = {name: leaf[: DEPTH - 1] if name.startswith("layers.") else leaf for name, leaf in stacked(a, 0).items()}
    with pytest.raises(M3Error, match=rf"missing in expert 1: .*layers\.{DEPTH - 1}\.norm\.scale"):
        m3jax.merge([base, fewer])


@pytest.mark.parametrize(("method", "sparsifier"), few(OTHERS, ("ties_paper", "dare")))
def test_stacked_under_jit_is_block_by_block(method, sparsifier):
    call, experts, base, granularities = call_of(method, sparsifier)
    for axis, granularity in zip((1, 0, 1), granularities, strict=False):
        traced = jax.jit(lambda e, b, g=granularity: call(e, b, g))
        got = traced([stacked(e, axis) for e in experts], stacked(base, axis))
        assert same(unstacked(got, axis), call(experts, base, granularity)) == (True, []), (granularity, axis)


@pytest.mark.parametrize(("method", "sparsifier", "axis", "kind"), few([*SPREAD, *TURNS], *SPREAD))
def test_the_axis_of_blocks_may_be_sharded(method, sparsifier, axis, kind):
    call, experts, base, granularities = call_of(method, sparsifier)
    mesh = jax.make_mesh((4, 2), ("blocks", "x"), axis_types=(kind, kind))

    def put(tree):
        def place(name, leaf):
            spec = [None] * leaf.ndim
            if name.startswith("layers."):
                spec[axis], spec[1 - axis] = "blocks", "x"
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

        return {name: place(name, leaf) for name, leaf in stacked(tree, axis).items()}

    there, here, granularity = [put(e) for e in experts], put(base), granularities[-1]
    want = call(experts, base, granularity)
    eager = call(there, here, granularity)
    assert same(unstacked(eager, axis), want) == (True, [])
    for name, leaf in eager.items():
        assert leaf.sharding.is_equivalent_to(here[name].sharding, leaf.ndim), name
    traced = jax.jit(lambda e, b: call(e, b, granularity))(there, here)
    assert same(unstacked(traced, axis), want) == (True, [])


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize(
    ("method", "sparsifier"),
    few(
        [("ties_paper", "magnitude_model"), ("ties_mergekit", "none"), ("ties_paper", "dare"), ("linear", "magnitude")],
        ("ties_paper", "magnitude_model"),
        ("ties_mergekit", "none"),
    ),
)
def test_thresholds_of_blocks_may_be_found_by_counting(method, sparsifier, how, monkeypatch):
    call, experts, base, _ = call_of(method, sparsifier)
    want = call(experts, base, "layer")
    monkeypatch.setattr(arrays, "_platform_of", lambda _: "gpu")
    run = jax.jit(call, static_argnums=2) if how == "jit" else call
    got = run([stacked(e, 0) for e in experts], stacked(base, 0), "layer")
    assert same(unstacked(got, 0), want) == (True, [])


def test_many_leaves_and_all_blocks_are_counted_together():
    """A model-wide rank over stacked and plain leaves is the oracle's over all of them."""
    base, experts = models(DTYPES["bfloat16"], 2, SHAPES)
    made, _, told = METHODS["ties_paper"]
    got = m3jax.merge([stacked(e, 1) for e in experts], made, base=stacked(base, 1))
    assert same(unstacked(got, 1), oracle.merge(experts, base, **told)) == (True, [])


def test_counts_of_blocks_add_up_beyond_a_word():
    rng = np.random.default_rng(0)
    counts = rng.integers(2**31, 2**32, (90, 5), dtype=np.uint32)
    start = (np.full(5, 3, np.uint32), np.full(5, 2**32 - 1, np.uint32))
    want = counts.astype(object).sum(0) + 3 * 2**32 + 2**32 - 1
    for words in (counts, jax.jit(lambda c: c)(counts)):
        high, low = arrays._added_blocks(start, np.asarray(words))
        assert [(int(h) << 32) + int(x) for h, x in zip(high, low, strict=True)] == want.tolist()
    high, low = jax.jit(lambda c: arrays._added_blocks(start, c))(counts)
    assert [(int(h) << 32) + int(x) for h, x in zip(high, low, strict=True)] == want.tolist()


@pytest.mark.slow
def test_batches_and_derivatives_of_stacked_leaves():
    base, experts = models(DTYPES["float32"], 2, SHAPES)
    weights = jnp.array([[0.2, 0.8], [0.6, 0.3]], jnp.float32)

    def merged(w, experts, base):
        return m3jax.merge(experts, m3jax.ties(0.4), base=base, weights=w, sparsify=m3jax.dare(0.5), key=1)

    there, here = [stacked(e, 0) for e in experts], stacked(base, 0)
    batch = jax.jit(jax.vmap(merged, in_axes=(0, None, None)))(weights, there, here)
    for i in range(2):
        one = merged(np.asarray(weights[i]), experts, base)
        assert same(unstacked({name: leaf[i] for name, leaf in batch.items()}, 0), one) == (True, [])

    def total(w, e, b):
        return sum(jnp.sum(leaf) for leaf in merged(w, e, b).values())

    slopes = [jax.jit(jax.grad(total))(weights[0], e, b) for e, b in ((there, here), (experts, base))]
    assert np.allclose(*slopes, rtol=1e-4, atol=1e-3)


# --- weights by block ---------------------------------------------------------------------------------------------


def by_hand(weights):
    """The oracle's merge, told the weights of every tensor."""
    _, experts = models(DTYPES["float32"], 2, SHAPES)
    return experts, oracle.merge(experts, weights=weights)


def test_weights_by_name_block_and_prefix():
    given = {"": [1, 1], "layers": [1, 2], "layers.2": [3, 1], "layers.2.norm": [1, 4], "embed.embedding": [5, 1]}
    given["layers.3.up.kernel"] = [1, 6]
    told = {}
    for name in SHAPES:
        told[name] = given[max((key for key in given if not key or f"{name}.".startswith(f"{key}.")), key=len)]
    assert len({tuple(w) for w in told.values()}) == 6
    experts, want = by_hand(told)
    assert same(m3jax.merge(experts, weights=given), want) == (True, [])
    for axis in (0, 1):
        got = m3jax.merge([stacked(e, axis) for e in experts], weights=given)
        assert same(unstacked(got, axis), want) == (True, [])


@pytest.mark.slow
def test_blocks_whose_votes_differ_in_kind_are_merged_too():
    """Ties has no factors for votes of weight 1, and some for others."""
    base, experts = models(DTYPES["float32"], 2, SHAPES)
    given = {"": [1.0, 1.0], "layers.2": [0.3, 0.9]}
    call = {"method": m3jax.ties(0.4), "weights": given, "sparsify": m3jax.dare(0.5), "key": 2}
    want = m3jax.merge(experts, base=base, **call)
    got = m3jax.merge([stacked(e, 1) for e in experts], base=stacked(base, 1), **call)
    assert same(unstacked(got, 1), want) == (True, [])


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_an_array_of_weights_has_a_row_for_each_block(how):
    rows = np.random.default_rng(0).uniform(0.1, 2, (DEPTH + 1, 2)).astype(np.float32)
    groups = [*(f"layers.{i}" for i in range(DEPTH)), "outside blocks"]
    told = {name: rows[int(name.split(".")[1])] if "layers" in name else rows[-1] for name in SHAPES}
    experts, want = by_hand({name: [float(w) for w in own] for name, own in told.items()})
    assert list(layer_groups(experts[0])) == groups
    run = jax.jit(lambda e, w: m3jax.merge(e, weights=w)) if how == "jit" else lambda e, w: m3jax.merge(e, weights=w)
    assert same(run(experts, rows), want) == (True, [])
    got = run([stacked(e, 1) for e in experts], rows)
    assert same(unstacked(got, 1), want) == (True, [])
    with pytest.raises(
        M3Error, match=r"\[4, 2\], but there are 4 blocks \(layers\.0 to layers\.3\) and a group outside"
    ):
        run(experts, rows[:4])


def test_weights_that_name_nothing_are_refused():
    experts, _ = by_hand([1.0, 1.0])
    with pytest.raises(M3Error, match=r"'layer\.2' is no name of the tree: did you mean 'layers\.2'"):
        m3jax.merge(experts, weights={"": [1, 1], "layer.2": [1, 2]})
    with pytest.raises(M3Error, match=r"none given for embed\.embedding"):
        m3jax.merge(experts, weights={"layers": [1, 2]})
    with pytest.raises(M3Error, match="rows of different lengths"):
        m3jax.merge(experts, weights=[[1, 2], [1]])
    with pytest.raises(M3Error, match="are no numbers"):
        m3jax.merge(experts, weights=["a", "b"])


@pytest.mark.parametrize("how", ["given", "traced"])
def test_rows_of_weights_for_the_blocks_of_each_tower(how):
    """By tower or by prefix; what is outside of blocks goes by the other keys."""
    shapes = {f"vision.layers.{i}.w": (3, 4) for i in range(2)} | {f"text.layers.{i}.w": (3, 4) for i in range(3)}
    _, experts = models(DTYPES["float32"], 2, shapes | {"text.norm": (4,)})
    rows = np.random.default_rng(0).uniform(0.1, 0.9, (5, 2)).astype(np.float32)
    rest = np.float32([0.25, 0.75])
    each = {name: row.tolist() for name, row in zip(shapes, rows, strict=True)}
    want = oracle.merge(experts, weights=each | {"text.norm": rest.tolist()})

    def held(tree):
        return {
            "vision.layers.w": np.stack([tree[f"vision.layers.{i}.w"] for i in range(2)], 1),
            **{name: leaf for name, leaf in tree.items() if name.startswith("text.")},
        }

    def call(vision, text, rest):
        weights = {"vision": vision, "text.layers": text, "": rest}
        return m3jax.merge([held(e) for e in experts], weights=weights, anatomy={"stacked": {"vision": 1}})

    got = (jax.jit(call) if how == "traced" else call)(rows[:2], rows[2:], rest)
    assert same(got, held(want)) == (True, [])


def test_rows_that_do_not_fit_are_refused():
    shapes = {f"a.layers.{i}.w": (3, 4) for i in range(2)} | {f"b.layers.{i}.w": (3, 4) for i in range(3)}
    _, experts = models(DTYPES["float32"], 2, shapes | {"norm": (4,)})
    for weights, said in (
        ({"": np.ones((5, 2))}, r"'' has rows for blocks, but means those of 2 towers: give each its own"),
        ({"": [1, 1], "a": np.ones((3, 2))}, r"'a' has 3 rows, but there are 2 blocks, a\.layers\.0 to a\.layers\.1"),
        ({"": [1, 1], "norm": np.ones((1, 2))}, "'norm' is no name of the tree with blocks"),
        ({"": [1, 1], "a": np.ones((2, 3))}, r"a\.layers\.0: 3 weights given where 2 are needed"),
        ({"": [1, 1], "a": np.ones((2, 2, 2))}, r"'a' has shape \[2, 2, 2\]"),
        (np.ones((5, 2)), r"there are 5 blocks \(a\.layers\.0 to b\.layers\.2\) and a group outside them"),
        ({"a": np.ones((2, 2)), "b": np.ones((3, 2))}, "none given for norm"),
    ):
        with pytest.raises(M3Error, match=said):
            m3jax.merge(experts, weights=weights)


# --- which blocks there are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["layers_{}", "layer_{}", "blocks_{}", "encoderblock_{}", "layers.{}", "h.{}"])
def test_every_spelling_of_blocks_draws_by_block(spelling):
    shapes = {f"{spelling.format(i)}.kernel": (3, 4) for i in range(3)} | {"head.kernel": (4, 2)}
    _, experts = models(DTYPES["float32"], 2, shapes)
    got = m3jax.merge(experts, weights=m3jax.mixup(0.5, "layer"), key=4)
    groups = layer_groups(experts[0])
    assert len(groups) == 4
    assert [group.rpartition(".")[2] for group in groups] == ["0", "1", "2", "outside blocks"]
    of = {f"{spelling.format(i)}.kernel": groups[i] for i in range(3)} | {"head.kernel": groups[3]}
    weights = {name: oracle.draw(4, 0.5, 2, group) for name, group in of.items()}
    assert same(got, oracle.merge(experts, weights=weights)) == (True, [])


def test_towers_count_alone():
    shapes = {f"vision.layers_{i}.kernel": (3, 4) for i in range(2)} | {
        f"text.layers_{i}.kernel": (3, 4) for i in range(3)
    }
    _, experts = models(DTYPES["float32"], 2, shapes)
    weights = {name: oracle.draw(4, 0.5, 2, name[: -len(".kernel")].replace("_", ".")) for name in shapes}
    got = m3jax.merge(experts, weights=m3jax.mixup(0.5, "layer"), key=4)
    assert same(got, oracle.merge(experts, weights=weights)) == (True, [])


def test_draws_by_layer_without_blocks_are_refused():
    _, experts = models(DTYPES["float32"], 2, {"up.kernel": (3, 4), "down.kernel": (4, 3)})
    with pytest.raises(M3Error, match=r"no blocks are found .* anatomy=\{'blocks': PATTERN\}"):
        m3jax.merge(experts, weights=m3jax.mixup(0.5, "layer"), key=1)
    _, experts = models(DTYPES["float32"], 2, {"part3_up.kernel": (3, 4), "part4_up.kernel": (3, 4)})
    got = m3jax.merge(experts, weights=m3jax.mixup(0.5, "layer"), key=1, anatomy={"blocks": r"^part(\d+)_"})
    weights = {f"part{i}_up.kernel": oracle.draw(1, 0.5, 2, f"part{i}") for i in (3, 4)}
    assert same(got, oracle.merge(experts, weights=weights)) == (True, [])


def test_a_stack_that_cannot_be_told_is_refused_where_it_matters():
    """Four matrices of four rows: either axis may be that of the blocks."""
    _, experts = models(DTYPES["float32"], 2, {"layers.up.kernel": (4, 4, 6), "layers.down.kernel": (4, 4, 5)})
    layer = {"weights": m3jax.mixup(0.5, "layer"), "key": 1}
    with pytest.raises(M3Error, match=r"layers stacks 4 along axis 0 or 4 along axis 1 blocks: say along which axis"):
        m3jax.merge(experts, **layer)
    assert same(m3jax.merge(experts), oracle.merge(experts)) == (True, [])
    got = m3jax.merge(experts, anatomy={"stacked": {"^layers": 1}}, **layer)
    for i in range(4):
        weights = oracle.draw(1, 0.5, 2, f"layers.{i}")
        own = [{name: leaf[:, i] for name, leaf in e.items()} for e in experts]
        want = oracle.merge(own, weights=weights)
        assert same({name: np.asarray(leaf)[:, i] for name, leaf in got.items()}, want) == (True, [])


def test_stacks_of_boxed_and_wrapped_leaves_are_found():
    from flax import nnx

    base, experts = models(DTYPES["float32"], 2, SHAPES)

    def state(flat):
        tree = {}
        for name, leaf in stacked(flat, 0).items():
            *path, last = name.split(".")
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[last] = nnx.Param(jnp.asarray(leaf))
        return nnx.State({"params": tree})

    call = {"method": m3jax.ties(0.4), "sparsify": m3jax.dare(0.5), "weights": m3jax.mixup(0.5, "layer"), "key": 3}
    want = m3jax.merge(experts, base=base, **call)
    got = m3jax.merge([state(e) for e in experts], base=state(base), **call)
    leaves = {name.removeprefix("params."): leaf for name, leaf in named_leaves(got).items()}
    assert same(unstacked(leaves, 0), want) == (True, [])


def test_blocks_of_several_dtypes_are_not_stacked():
    base, (a, _) = models(DTYPES["float32"], 2, SHAPES)
    a["layers.2.up.kernel"] = a["layers.2.up.kernel"].astype(np.int8)
    with pytest.raises(M3Error, match=r"are of dtypes float32, int8, so they cannot be stacked"):
        m3jax.merge([stacked(base, 0), a])
