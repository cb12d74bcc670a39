"""The matrix that every merge method goes through, in memory and out of core."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import m3jax

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

# name: (m3jax's method, the recipe's keys, the oracle's arguments)
METHODS = {
    "linear": (m3jax.linear(), {"merge_method": "linear"}, {"method": "linear"}),
    "task_arithmetic": (
        m3jax.task_arithmetic(scale=0.7),
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.7}},
        {"method": "task_arithmetic", "scale": 0.7},
    ),
    "task_arithmetic_normalized": (
        m3jax.task_arithmetic(normalize=True),
        {"merge_method": "task_arithmetic", "parameters": {"normalize": True}},
        {"method": "task_arithmetic", "normalize": True},
    ),
    "ties_mergekit": (
        m3jax.ties(0.4),
        {"merge_method": "ties", "parameters": {"density": 0.4}},
        {"method": "ties", "density": 0.4},
    ),
    "ties_paper": (
        m3jax.ties(0.4, scale=0.9, trim_scope="model", sign_election="unweighted"),
        {
            "merge_method": "ties",
            "parameters": {"density": 0.4, "lambda": 0.9, "trim_scope": "model", "sign_election": "unweighted"},
        },
        {"method": "ties", "density": 0.4, "scale": 0.9, "trim_scope": "model", "election": "unweighted"},
    ),
    "ties_untrimmed_sum": (
        m3jax.ties(None, normalize=False),
        {"merge_method": "ties", "parameters": {"density": 1.0, "normalize": False}},
        {"method": "ties", "normalize": False},
    ),
}
SPARSIFIERS = {
    "none": (None, {}, {}),
    "dare": (
        m3jax.dare(0.3),
        {"sparsify": {"method": "dare", "density": 0.3}},
        {"sparsify": "dare", "keep": 0.3},
    ),
    "dare_unscaled": (
        m3jax.dare(0.3, rescale=False),
        {"sparsify": {"method": "dare", "density": 0.3, "rescale": False}},
        {"sparsify": "dare", "keep": 0.3, "rescale": False},
    ),
    "dare_weights": (
        m3jax.dare(0.8, target="weights"),
        {"sparsify": {"method": "dare", "density": 0.8, "target": "weights"}},
        {"sparsify": "dare", "keep": 0.8, "target": "weights"},
    ),
    "magnitude": (
        m3jax.magnitude(0.3),
        {"sparsify": {"method": "magnitude", "density": 0.3}},
        {"sparsify": "magnitude", "keep": 0.3},
    ),
    "magnitude_model": (
        m3jax.magnitude(0.6, scope="model", rescale=True),
        {"sparsify": {"method": "magnitude", "density": 0.6, "scope": "model", "rescale": True}},
        {"sparsify": "magnitude", "keep": 0.6, "scope": "model", "rescale": True},
    ),
    "magnitude_weights": (
        m3jax.magnitude(0.6, target="weights"),
        {"sparsify": {"method": "magnitude", "density": 0.6, "target": "weights"}},
        {"sparsify": "magnitude", "keep": 0.6, "target": "weights"},
    ),
    "breadcrumbs": (
        m3jax.breadcrumbs(0.6, 0.1),
        {"sparsify": {"method": "breadcrumbs", "density": 0.6, "gamma": 0.1}},
        {"sparsify": "breadcrumbs", "keep": 0.6, "gamma": 0.1},
    ),
    "della": (
        m3jax.della(0.5, 0.2),
        {"sparsify": {"method": "della", "density": 0.5, "epsilon": 0.2}},
        {"sparsify": "della", "keep": 0.5, "epsilon": 0.2},
    ),
    "della_weights": (
        m3jax.della(0.7, 0.1, target="weights", rescale=False),
        {"sparsify": {"method": "della", "density": 0.7, "epsilon": 0.1, "target": "weights", "rescale": False}},
        {"sparsify": "della", "keep": 0.7, "epsilon": 0.1, "target": "weights", "rescale": False},
    ),
}

_ALONE = {"base_model": None}  # which task vectors would be taken from

# Methods that have no sparsifier, with the weights that they get.
ALONE = {
    "slerp": (m3jax.slerp(), {"merge_method": "slerp", "parameters": {"t": 0.3}}, {"method": "slerp"}, 0.3),
    "model_stock": (m3jax.model_stock(), {"merge_method": "model_stock"}, {"method": "model_stock"}, None),
    "model_stock_rows": (
        m3jax.model_stock(filter_wise=True),
        {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
        {"method": "model_stock", "by_row": True},
        None,
    ),
    "sce": (
        m3jax.sce(0.4),
        {"merge_method": "sce", "parameters": {"select_topk": 0.4}},
        {"method": "sce", "more": {"select_topk": 0.4}},
        None,
    ),
    "sce_all": (m3jax.sce(), {"merge_method": "sce"}, {"method": "sce", "more": {"select_topk": 1.0}}, None),
    "ram": (
        m3jax.ram(0.02),
        {"merge_method": "ram", "parameters": {"epsilon": 0.02}},
        {"method": "ram", "more": {"epsilon": 0.02}},
        None,
    ),
    "ramplus_tl": (
        m3jax.ramplus_tl(0.3, 0.8, 0.1),
        {"merge_method": "ramplus_tl", "parameters": {"r": 0.3, "alpha": 0.8, "epsilon": 0.1}},
        {"method": "ramplus_tl", "more": {"r": 0.3, "alpha": 0.8, "epsilon": 0.1}},
        None,
    ),
    "nearswap": (
        m3jax.nearswap(0.05),
        {"merge_method": "nearswap", "parameters": {"t": 0.05}},
        {"method": "nearswap", "more": {"t": 0.05}},
        None,
    ),
    "magmax": (
        m3jax.magmax(0.7),
        {"merge_method": "magmax", "parameters": {"lambda": 0.7}},
        {"method": "magmax", "scale": 0.7},
        None,
    ),
    "consensus": (
        m3jax.consensus(0.6, scale=0.7),
        {"merge_method": "consensus", "parameters": {"tall_mask_lambda": 0.6, "lambda": 0.7}},
        {"method": "consensus", "scale": 0.7, "more": {"limits": 0.6, "agreement": 2}},
        [0.5, 0.7, -0.3],
    ),
    "pcb": (
        m3jax.pcb(0.3, scale=0.7),
        {"merge_method": "pcb", "parameters": {"density": 0.3, "lambda": 0.7}},
        {"method": "pcb", "scale": 0.7, "more": {"density": 0.3}},
        [0.5, 0.2, 0.9],
    ),
    "pcb_model": (
        m3jax.pcb(0.3, normalize=True, trim_scope="model"),
        {"merge_method": "pcb", "parameters": {"density": 0.3, "normalize": True, "trim_scope": "model"}},
        {"method": "pcb", "normalize": True, "trim_scope": "model", "more": {"density": 0.3}},
        [0.5, 0.2, 0.9],
    ),
    "nuslerp": (m3jax.nuslerp(), {"merge_method": "nuslerp", **_ALONE}, {"method": "nuslerp"}, [0.4, 0.7]),
    "nuslerp_rows": (
        m3jax.nuslerp(flatten=False, task_vectors=True),
        {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False}},
        {"method": "nuslerp", "lines": "row", "deltas": True},
        [0.4, 0.7],
    ),
    "nuslerp_columns": (
        m3jax.nuslerp(flatten=False, row_wise=True),
        {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}, **_ALONE},
        {"method": "nuslerp", "lines": "column"},
        [0.9, 0.4],
    ),
    "multislerp": (
        m3jax.multislerp(task_vectors=True),
        {"merge_method": "multislerp"},
        {"method": "multislerp", "deltas": True},
        [0.5, 0.2, 0.9],
    ),
    "karcher": (m3jax.karcher(), {"merge_method": "karcher"}, {"method": "karcher"}, [0.5, 0.2, 0.9]),
    "fisher": (
        m3jax.fisher(1e-6),
        {"merge_method": "fisher", "parameters": {"epsilon": 1e-6}, **_ALONE},
        {"method": "fisher", "more": {"epsilon": 1e-6}},
        [0.5, 0.2, 0.9],
    ),
    "fisher_unfloored": (
        m3jax.fisher(),
        {"merge_method": "fisher", **_ALONE},
        {"method": "fisher", "more": {"epsilon": 0.0}},
        [0.5, 0.2, 0.9],
    ),
    "regmean": (
        m3jax.regmean(0.8),
        {"merge_method": "regmean", "parameters": {"reduce_non_diagonal_ratio": 0.8}, **_ALONE},
        {"method": "regmean", "more": {"ratio": 0.8}},
        [0.5, 0.2, 0.9],
    ),
}
# Of these, what measures by tensor, row, column, and what ranks and counts: the others differ in what
# they make of it.
MEASURED = ("slerp", "model_stock", "model_stock_rows", "nuslerp_columns", "sce", "ramplus_tl")


def measured(method, experts, seed=1):
    """Statistics of experts, for a method that asks for some: of many magnitudes, zeros too, and not of all tensors."""
    made = (METHODS.get(method) or ALONE[method])[0]
    if not made.statistics:
        return None
    rng = np.random.default_rng(seed)
    if made.preparation is not None:
        return [grams(expert, rng) for expert in experts]

    def of(name, value):
        found = np.exp2(rng.uniform(-120, 20, value.shape)).astype(np.float32)
        return np.where(rng.random(value.shape) < 0.3, np.float32(0), found).astype(np.float32)

    return [{name: of(name, value) for name, value in expert.items() if "norm" not in name} for expert in experts]


def grams(expert, rng):
    """Gram matrices of layers, of fewer rows than inputs, one of which is always zero."""

    def of(width):
        rows = rng.standard_normal((width // 2, width)) * np.exp2(rng.integers(-8, 8, width))
        rows[:, 3] = 0
        return (rows.T @ rows).astype(np.float32)

    return {n: of(v.shape[1]) for n, v in expert.items() if v.ndim == 2 and v.size and "embed" not in n}


def most(method, wanted):
    """How many experts a method is tried with: as many as are wanted, or as it can merge."""
    made = (METHODS.get(method) or ALONE[method])[0]
    return min(made.experts[1] or wanted, wanted)


def few(names, *fast):
    """Parameters of which all but a few are slow tests."""
    rows = [(name, name if isinstance(name, tuple) else (name,)) for name in names]
    return [pytest.param(*row, marks=[] if name in fast else pytest.mark.slow) for name, row in rows]


def in_turn():
    """Every sparsifier with some method, each method about as often as the others."""
    names = list(METHODS)
    return [(names[i % len(names)], sparsifier) for i, sparsifier in enumerate(SPARSIFIERS)]


def pairwise(*axes, apart=()):
    """Rows of the product of all axes in which every two values of two axes meet at least once.

    Args:
        *axes: The values of each axis.
        apart: Pairs of axes, by number, whose values need not all meet.

    Example:
        >>> pairwise("ab", "xy", (1, 2))
        [('a', 'x', 1), ('a', 'y', 2), ('b', 'x', 2), ('b', 'y', 1)]
    """
    axes = [list(axis) for axis in axes]
    sizes = [range(len(axis)) for axis in axes]
    together = [pair for pair in itertools.combinations(range(len(axes)), 2) if pair not in apart]

    def meetings(row):
        return {(i, row[i], j, row[j]) for i, j in together}

    missing = {(i, a, j, b) for i, j in together for a in sizes[i] for b in sizes[j]}
    met = {(i, value): 0 for i, size in enumerate(sizes) for value in size}
    rows = []
    while missing:
        # The pair that comes first, and for the other axes what meets most; what was seldom met goes first.
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for k in sorted(set(range(len(axes))) - row.keys()):
            row[k] = max(
                sizes[k],
                key=lambda c: (sum((min((k, c), m) + max((k, c), m)) in missing for m in row.items()), -met[k, c]),
            )
        row = tuple(row[k] for k in range(len(axes)))
        missing -= meetings(row)
        for place in enumerate(row):
            met[place] += 1
        rows.append(tuple(axis[value] for axis, value in zip(axes, row, strict=True)))
    return rows


# Each method and each sparsifier at least once.
FAST = [
    ("linear", "none"),
    ("linear", "dare"),
    ("task_arithmetic", "dare_weights"),
    ("task_arithmetic_normalized", "dare_unscaled"),
    ("ties_paper", "dare"),
    ("ties_mergekit", "magnitude_model"),
    ("ties_untrimmed_sum", "magnitude"),
    ("ties_paper", "magnitude_weights"),
    ("task_arithmetic", "breadcrumbs"),
    ("ties_mergekit", "della"),
]

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.weight": (40, 16),
    "model.layers.1.mlp.weight": (40, 16),
    "model.norm.weight": (16,),
}


def models(dtype, n, shapes=SHAPES, seed=0):
    """A base and n experts near it; coarse deltas, so that ties at thresholds and cancellations are common."""
    rng = np.random.default_rng(seed)

    def tree(spread):
        return {k: np.asarray(rng.standard_normal(s) * spread, np.float32).astype(dtype) for k, s in shapes.items()}

    base = tree(1.0)
    experts = []
    for _ in range(n):
        delta = {k: np.round(v.astype(np.float32) * 64) / 64 for k, v in tree(0.1).items()}
        experts.append({k: np.asarray(base[k].astype(np.float32) + delta[k]).astype(dtype) for k in base})
    return base, experts


def same(got, want):
    """Whether two trees hold the same bytes; the names that do not, for a readable failure."""
    wrong = [k for k in want if np.asarray(got[k]).tobytes() != np.asarray(want[k]).tobytes()]
    return wrong == [], wrong
