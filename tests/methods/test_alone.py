"""Methods that no sparsifier precedes: the oracle's bits in memory, on meshes, out of core and replayed."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracle
from support.directories import WIDE, read, recipe, write, write_models
from support.matrix import ALONE, DTYPES, few, measured, models, most, pairwise, same

import m3jax
from m3jax.arithmetic import sums
from m3jax.cluster.meshes import parse_mesh

OFTEN = ("slerp", "model_stock", "model_stock_rows")  # the others go the same ways, and go them once
PLACED = [
    ("slerp", ("x", None), AxisType.Explicit),
    ("model_stock", (None, "x"), AxisType.Auto),
    ("model_stock_rows", ("x", "y"), AxisType.Explicit),
    ("sce", ("x", "y"), AxisType.Explicit),
    ("ramplus_tl", ("x", None), AxisType.Auto),
    ("nuslerp_columns", ("x", "y"), AxisType.Explicit),
    ("multislerp", ("x", None), AxisType.Auto),
    ("karcher", (None, "x"), AxisType.Auto),
    ("fisher", ("x", "y"), AxisType.Explicit),
    ("regmean", ("x", "y"), AxisType.Explicit),
]
STREAMED = [
    ("slerp", "x=1", 2**17),
    ("model_stock", "x=8", 2**16),
    ("model_stock_rows", "x=8", 2**17),
    ("sce", "x=8", 2**16),
    ("ramplus_tl", "x=1", 2**16),
    ("consensus", "x=8", 2**16),
    ("nuslerp_rows", "x=1", 2**17),
    ("nuslerp_columns", "x=8", 2**16),
    ("multislerp", "x=1", 2**16),
    ("karcher", "x=8", 2**16),
    ("fisher", "x=8", 2**16),
    ("regmean", "x=8", 2**16),
]
QUICK = [
    ("slerp", "float32", "jit"),
    ("slerp", "bfloat16", "eager"),
    ("model_stock", "float32", "eager"),
    ("model_stock_rows", "bfloat16", "jit"),
    ("sce", "bfloat16", "eager"),
    ("ram", "bfloat16", "eager"),
    ("nearswap", "float32", "eager"),
    ("magmax", "bfloat16", "eager"),
    ("consensus", "float32", "eager"),
    ("pcb", "bfloat16", "jit"),
    ("nuslerp", "bfloat16", "jit"),
    ("nuslerp_rows", "float32", "jit"),
    ("nuslerp_columns", "float32", "eager"),
    ("multislerp", "float16", "eager"),
    ("karcher", "float32", "jit"),
    ("fisher", "bfloat16", "eager"),
    ("fisher_unfloored", "float32", "jit"),
    ("regmean", "bfloat16", "jit"),
    ("regmean", "float32", "eager"),
]
EVERY = [*pairwise(OFTEN, DTYPES, ("eager", "jit")), ("sce_all", "float16", "jit"), ("pcb_model", "float32", "eager")]


@pytest.mark.parametrize(
    ("method", "dtype", "how"),
    few(dict.fromkeys([*QUICK, *EVERY]), *QUICK),
)
def test_merges_are_the_oracles(method, dtype, how):
    made, _, told, weights = ALONE[method]
    base, experts = models(DTYPES[dtype], most(method, 3))
    statistics = measured(method, experts)
    want = oracle.merge(experts, base, weights=weights, statistics=statistics, **told)

    def call(experts, base, statistics):
        return m3jax.merge(experts, made, base=base, weights=weights, statistics=statistics)

    assert same((jax.jit(call) if how == "jit" else call)(experts, base, statistics), want) == (True, [])


@pytest.mark.parametrize(
    ("method", "spec", "kind"),
    few([*PLACED, *(pairwise(OFTEN, ((None, "x"), ("x", "y")), (AxisType.Auto,), apart=((0, 1),)))], *PLACED),
)
def test_no_sharding_changes_a_bit(method, spec, kind):
    made, _, told, weights = ALONE[method]
    base, experts = models(DTYPES["bfloat16"], most(method, 3))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))

    def put(tree):
        places = {name: PartitionSpec(*spec[: leaf.ndim]) for name, leaf in tree.items()}
        return {name: jax.device_put(leaf, NamedSharding(mesh, places[name])) for name, leaf in tree.items()}

    statistics = measured(method, experts)
    want = oracle.merge(experts, base, weights=weights, statistics=statistics, **told)
    there, here = [put(e) for e in experts], put(base)
    beside = None if statistics is None else [put(s) for s in statistics]
    assert same(m3jax.merge(there, made, base=here, weights=weights, statistics=beside), want) == (True, [])
    traced = jax.jit(lambda e, b, s: m3jax.merge(e, made, base=b, weights=weights, statistics=s))
    assert same(traced(there, here, beside), want) == (True, [])


@pytest.mark.parametrize(
    ("method", "mesh", "chunk"),
    few(
        [
            *STREAMED,
            ("pcb_model", "x=8", 2**17),
            *(row for row in pairwise(OFTEN, ("x=1", "x=8"), (2**16, 2**17)) if row not in STREAMED),
        ],
        *STREAMED,
    ),
)
def test_out_of_core_and_replayed_are_the_oracles(tmp_path, method, mesh, chunk):
    _, keys, told, weights = ALONE[method]
    base, experts = write_models(tmp_path / "in", n=most(method, 3), shapes=WIDE)
    asked = recipe(tmp_path / "in", most(method, 3), **keys)
    if method == "slerp":
        del asked["base_model"]
    elif weights is not None:
        given = zip(asked["models"], weights, strict=True)
        asked["models"] = [{"model": model, "parameters": {"weight": weight}} for model, weight in given]
    statistics = measured(method, experts)
    for i, each in enumerate(statistics or ()):
        write(tmp_path / "in" / f"statistics-{i}", each, shards=i + 1)
        asked["models"][i]["statistics"] = str(tmp_path / "in" / f"statistics-{i}")
    m3jax.merge_checkpoint(asked, tmp_path / "out", chunk_entries=chunk, mesh=parse_mesh(mesh))
    want = oracle.merge(experts, base, weights=weights, statistics=statistics, **told)
    assert same(read(tmp_path / "out"), want) == (True, [])
    m3jax.replay(tmp_path / "out", tmp_path / "again", chunk_entries=2**18)
    assert same(read(tmp_path / "again"), want) == (True, [])


def test_model_stock_is_the_formula_in_float64():
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((12, 20)).astype(np.float32)}
    shared = rng.standard_normal((12, 20)) * 0.1
    experts = [{"w": (base["w"] + shared + rng.standard_normal((12, 20)) * 0.1).astype(np.float32)} for _ in range(3)]
    deltas = [e["w"].astype(np.float64) - base["w"] for e in experts]
    for by_row in (False, True):
        axes = -1 if by_row else None
        norms = [np.sqrt((d**2).sum(axes, keepdims=True)) for d in deltas]
        pairs = [(i, j) for i in range(3) for j in range(i + 1, 3)]
        cosine = sum((deltas[i] * deltas[j]).sum(axes, keepdims=True) / norms[i] / norms[j] for i, j in pairs) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        want = t * sum(e["w"].astype(np.float64) for e in experts) / 3 + (1 - t) * base["w"]
        got = m3jax.merge(experts, m3jax.model_stock(filter_wise=by_row), base=base)["w"]
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7)


def test_products_by_row_are_of_as_many_rows_as_there_are():
    rows = jax.ShapeDtypeStruct((2**21 + 1, 2), np.float32)
    largest = jax.ShapeDtypeStruct((2**21 + 1, 1), np.uint32)
    made = jax.eval_shape(lambda x, top: sums.integer_sums([x], top, np.uint32(0), by_row=True), rows, largest)
    assert made.shape == (2**21 + 1, 2, 1, sums.LIMBS)


def test_model_stock_of_orthogonal_and_of_equal_experts():
    base = {"w": np.zeros((2, 4), np.float32)}
    a, b = (np.zeros((2, 4), np.float32) for _ in range(2))
    a[0], b[1] = 1.0, 1.0
    orthogonal = m3jax.merge([{"w": a}, {"w": b}], m3jax.model_stock(), base=base)
    assert np.asarray(orthogonal["w"]).tolist() == base["w"].tolist()  # t = 0: the base
    same_twice = m3jax.merge([{"w": a}, {"w": a}], m3jax.model_stock(), base=base)
    assert np.asarray(same_twice["w"]).tolist() == a.tolist()  # t = 1: the average
    opposite = m3jax.merge([{"w": a}, {"w": -a}], m3jax.model_stock(), base=base)
    assert np.asarray(opposite["w"]).tolist() == base["w"].tolist()  # 1 + cosθ = 0: t counts as 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"experts": 1}, "model_stock: merges at least 2 experts, but there is 1"),
        ({"weights": [0.5, 0.5]}, "model_stock: takes no weights"),
        ({"weights": m3jax.mixup(0.5), "key": 0}, "model_stock: takes no weights"),
        ({"sparsify": m3jax.dare(0.5), "key": 0}, "model_stock: cannot be combined with dare"),
        ({"base": None}, "model_stock: needs a base model"),
    ],
)
def test_misuse_of_model_stock_is_said(arguments, sentence):
    base, experts = models(DTYPES["float32"], 2)
    given = {"base": base, **arguments}
    experts = experts[: given.pop("experts", 2)]
    with pytest.raises(m3jax.M3Error, match=sentence):
        m3jax.merge(experts, m3jax.model_stock(), **given)
