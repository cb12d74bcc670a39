"""Methods of angles: the formulas in float64, vectors that have no angle, derivatives, and what recipes say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.directories import read, recipe, write_models
from support.matrix import ALONE, same

import m3jax
from m3jax import M3Error
from m3jax.arithmetic import angles


def vectors(n, shape=(12, 20), seed=0):
    """Experts with a common part, so that their angles are neither 0 nor right."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(shape)
    return [np.asarray(shared + rng.standard_normal(shape) * (0.5 + i), np.float32) for i in range(n)]


def trees(arrays):
    return [{"w": array} for array in arrays]


# --- the formulas in float64, over entries ------------------------------------------------------------------------


def arc_of(a, b, weights, axis):
    t = weights[1] / (weights[0] + weights[1])
    length = [np.sqrt((x * x).sum(axis, keepdims=True)) for x in (a, b)]
    theta = np.arccos((a * b).sum(axis, keepdims=True) / length[0] / length[1])
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def multislerp_of(xs, weights):
    weights = np.array(weights) / sum(weights)
    units = [x / np.linalg.norm(x) for x in xs]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    r = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    far = np.linalg.norm(r)
    reach = sum(w * np.linalg.norm(x) for w, x in zip(weights, xs, strict=True))
    return (mean * np.cos(far) + r * np.sinc(far / np.pi)) * reach


def karcher_of(xs, weights, steps=10, tol=1e-5):
    weights = np.array(weights) / sum(weights)
    units = [x / np.linalg.norm(x) for x in xs]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        step = np.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            cosine = (u * mean).sum()
            step += w * np.arccos(cosine) / np.sin(np.arccos(cosine)) * (u - cosine * mean)
        far = np.linalg.norm(step)
        if far < tol:
            break
        mean = np.cos(far) * mean + np.sin(far) * step / far
    return mean * sum(w * np.linalg.norm(x) for w, x in zip(weights, xs, strict=True))


def test_they_are_the_formulas_in_float64():
    base, *experts = vectors(4)
    given = [0.5, 0.2, 0.9]
    wide = [x.astype(np.float64) for x in experts]
    deltas = [x - base.astype(np.float64) for x in wide]
    two = given[:2]
    cases = [
        (m3jax.nuslerp(task_vectors=True), two, base + arc_of(*deltas[:2], two, None)),
        (m3jax.nuslerp(flatten=False), two, arc_of(*wide[:2], two, -1)),
        (m3jax.nuslerp(flatten=False, row_wise=True, task_vectors=True), two, base + arc_of(*deltas[:2], two, 0)),
        (m3jax.multislerp(task_vectors=True), given, base + multislerp_of(deltas, given)),
        (m3jax.karcher(), given, karcher_of(wide, given)),
    ]
    for method, weights, want in cases:
        got = m3jax.merge(trees(experts[: len(weights)]), method, base={"w": base}, weights=weights)["w"]
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=5e-7, err_msg=str(method))


def test_without_normalization_multislerp_grows_with_the_weights():
    experts = trees(vectors(3))
    one = m3jax.merge(experts, m3jax.multislerp(), weights=[0.5, 0.25, 0.25])["w"]
    twice = m3jax.merge(experts, m3jax.multislerp(normalize=False), weights=[1.0, 0.5, 0.5])["w"]
    assert np.array_equal(twice, 2 * one)


def test_the_sum_of_squared_angles_to_the_mean_is_the_least():
    xs = [x.astype(np.float64) for x in vectors(3)]
    got = np.asarray(m3jax.merge(trees(vectors(3)), m3jax.karcher(max_iter=50, tol=0.0))["w"], np.float64)

    def cost(at):
        return sum(np.arccos((x * at).sum() / np.linalg.norm(x) / np.linalg.norm(at)) ** 2 for x in xs)

    rng = np.random.default_rng(1)
    assert all(cost(got) < cost(got + 0.05 * rng.standard_normal(got.shape)) for _ in range(20))


def test_our_angles_are_those_of_the_library():
    x = np.concatenate([np.linspace(-1, 1, 2001), 1 - np.logspace(-16, -1, 99), np.logspace(-16, -1, 99) - 1])
    np.testing.assert_allclose(angles.arccos(x), np.arccos(x), rtol=2e-15)
    for ours, theirs in ((angles.sin, np.sin), (angles.cos, np.cos)):
        np.testing.assert_allclose(ours(9 * x), theirs(9 * x), atol=3e-15)


# --- vectors without an angle ---------------------------------------------------------------------------------------


def merged(method, xs, weights=None):
    return np.asarray(m3jax.merge(trees(xs), method, weights=weights)["w"]).tolist()


def test_parallel_opposite_and_zero_vectors():
    a, zero = np.float32([[0.1, 0.3]]), np.zeros((1, 2), np.float32)
    line = [0.25, 0.75]
    for other in (np.float32(3) * a, -np.float32(3) * a):
        for form in (m3jax.nuslerp(), m3jax.nuslerp(flatten=False), m3jax.nuslerp(flatten=False, row_wise=True)):
            assert merged(form, [a, other], line) == merged(m3jax.linear(), [a, other], line)
    assert merged(m3jax.multislerp(), [a, -a]) == zero.tolist()
    assert merged(m3jax.multislerp(), [a, -np.float32(3) * a]) == merged(m3jax.linear(), [a, -np.float32(3) * a])
    np.testing.assert_allclose(merged(m3jax.karcher(), [a, 3 * a]), 2 * a, rtol=1e-6)
    # Opposite to the mean so far, a vector says no direction: the first one's is kept.
    np.testing.assert_allclose(merged(m3jax.karcher(), [a, -3 * a]), 2 * a, rtol=1e-6)
    # A vector of length 0 is at right angles to all, and pulls to no direction.
    np.testing.assert_allclose(merged(m3jax.nuslerp(), [zero, a]), np.sqrt(0.5) * a, rtol=1e-6)
    for method in (m3jax.multislerp(), m3jax.karcher()):
        np.testing.assert_allclose(merged(method, [zero, a, a]), np.float32(2 / 3) * a, rtol=1e-6)
        assert merged(method, [zero] * 3) == zero.tolist()


@pytest.mark.parametrize(
    ("method", "xs", "weights", "sentence"),
    [
        ("multislerp", [1.0, 1.0, -1.0], [1, 1, 2], "^w: directions of the experts cancel"),
        ("karcher", [1.0, 1.0, 0.0], [1, -1, 1], "^w: the weights of the experts that are not zero here sum to 0"),
        ("nuslerp", [1.0, np.nan], [1, 1], "^w: has no inner products, as entries are NaN, infinite or beyond"),
        ("karcher", [1.0, 1e20], [1, 1], "^w: has no inner products"),
        ("slerp", [np.inf, 1.0], 0.5, "^w: has no inner products"),
        ("multislerp", [1.0, 1.0], [1, -1], "sum to 0, so they cannot be normalised: .* normalize_weights: false"),
        ("karcher", [1.0, 1.0], [1, -1], "sum to 0, so they cannot be normalised: change them$"),
        ("nuslerp", [1.0] * 3, None, "nuslerp: merges 2 experts, but there are 3"),
        ("karcher", [1.0], None, "karcher: merges at least 2 experts, but there is 1"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nan_in_a_trace(method, xs, weights, sentence):
    made = getattr(m3jax, method)()
    experts = trees([np.full(3, x, np.float32) for x in xs])
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge(experts, made, weights=weights)
    if sentence.startswith("^w"):
        got = jax.jit(lambda e, w: m3jax.merge(e, made, weights=w))(experts, jnp.asarray(weights, jnp.float32))["w"]
        assert np.isnan(got).all()


def test_weights_that_cancel_are_the_middle():
    xs = vectors(2)
    assert merged(m3jax.nuslerp(), xs, [1.0, -1.0]) == merged(m3jax.nuslerp(), xs, [1.0, 1.0])
    assert merged(m3jax.nuslerp(), xs, [0.0, 0.0]) == merged(m3jax.nuslerp(), xs, [1.0, 1.0])


def test_settings_that_cannot_be():
    for arguments in ({"max_iter": 2.5}, {"max_iter": -1}, {"tol": -1.0}):
        with pytest.raises(M3Error, match=f"karcher: {next(iter(arguments))} is"):
            m3jax.karcher(**arguments)
    columns = m3jax.nuslerp(flatten=False, row_wise=True)
    with pytest.raises(M3Error, match="nuslerp: works on columns, so nothing beside it can work on rows"):
        m3jax.merge(trees(vectors(2)), columns._replace(rows=True))
    wide = [np.zeros((2, 2**20 + 1), np.float32)] * 2
    with pytest.raises(M3Error, match=r"^w: has 1048577 columns"):
        m3jax.merge(trees(wide), columns)


# --- in a trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nuslerp_columns", "multislerp", "karcher"])
def test_derivatives_in_the_weights(name):
    made, _, _, weights = ALONE[name]
    experts = trees(vectors(len(weights), (3, 4)))
    base = {"w": np.zeros((3, 4), np.float32)}
    cost = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)

    @jax.jit
    def loss(weights):
        return jnp.sum(cost * m3jax.merge(experts, made, base=base, weights=weights)["w"])

    at, step = jnp.asarray(weights, jnp.float32), np.float32(0.02)
    slopes = jax.grad(loss)(at)
    moved = jnp.eye(len(weights), dtype=jnp.float32) * step
    finite = (jax.vmap(loss)(at[None] + moved) - jax.vmap(loss)(at[None] - moved)) / (2 * step)
    np.testing.assert_allclose(slopes, finite, rtol=5e-3, atol=5e-3)


# --- recipes ------------------------------------------------------------------------------------------------------

SHAPES = {"model.layers.0.w": (6, 5), "model.layers.1.w": (6, 5)}


def test_recipes_with_and_without_a_base(tmp_path):
    base, experts = write_models(tmp_path, shapes=SHAPES)
    asked = recipe(tmp_path, merge_method="nuslerp", parameters={"weight": [0.5, 1.0]})
    around = m3jax.merge_checkpoint(asked, tmp_path / "around")
    also = m3jax.merge_checkpoint(asked | {"models": [*asked["models"], asked["base_model"]]}, tmp_path / "also")
    m3jax.merge_checkpoint(asked | {"base_model": None}, tmp_path / "alone")
    assert around.digest == also.digest  # a base among the models is none of them
    told = {"method": "nuslerp", "weights": [1.0, 1.0]}
    assert same(read(tmp_path / "around"), oracle.merge(experts, base, deltas=True, **told)) == (True, [])
    assert same(read(tmp_path / "alone"), oracle.merge(experts, **told)) == (True, [])


def test_drawn_weights_of_a_karcher_mean(tmp_path):
    _, experts = write_models(tmp_path, n=3, shapes=SHAPES)
    asked = recipe(tmp_path, 3, merge_method="karcher", mixup={"alpha": 0.5, "granularity": "layer"}, seed=5)
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    weights = {name: oracle.draw(5, 0.5, 3, name.removesuffix(".w")) for name in SHAPES}
    assert same(read(tmp_path / "out"), oracle.merge(experts, method="karcher", weights=weights)) == (True, [])
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"merge_method": "nuslerp", "models": ["a", "b", "c"]}, "nuslerp merges 2 models, not 3"),
        ({"merge_method": "multislerp", "models": ["a"]}, "1 expert, and multislerp needs 2 or more"),
        (
            {"merge_method": "multislerp", "models": ["a", {"model": "b", "parameters": {"weight": -1}}]},
            "parameters.normalize_weights: the weights sum to 0 and cannot be normalized",
        ),
        ({"merge_method": "karcher", "models": ["a", "b"], "parameters": {"tol": -1}}, "parameters.tol: -1 is outside"),
        (
            {
                "merge_method": "karcher",
                "base_model": "p",
                "models": ["a", "b"],
                "sparsify": {"method": "dare", "density": 1},
            },
            "sparsify: karcher cannot be combined with one",
        ),
        ({"merge_method": "karcher", "models": ["a", "b"], "parameters": {"t": 0.5}}, None),  # mergekit lets it be
    ],
)
def test_recipes_that_are_wrong(keys, sentence):
    if sentence is None:
        assert m3jax.load_recipe(keys).notes() == ("karcher does not use t, which is ignored.",)
        return
    with pytest.raises(M3Error, match=sentence):
        m3jax.load_recipe(keys)


def test_one_model_scaled(tmp_path):
    """`passthrough` with `scale`, which may be a gradient; where it is 1 the bits are the model's."""
    _, (expert,) = write_models(tmp_path, n=1, shapes=SHAPES | {"model.norm.weight": (16,)})
    scale = [{"filter": "layers", "value": [1.0, -0.3]}, {"value": 1.0}]
    asked = {"merge_method": "passthrough", "models": [str(tmp_path / "expert-0")], "parameters": {"scale": scale}}
    result = m3jax.merge_checkpoint(asked, tmp_path / "out")
    scaled = oracle.merge([expert], normalize=False, scale=-0.3)
    want = expert | {"model.layers.1.w": scaled["model.layers.1.w"]}
    assert same(read(tmp_path / "out"), want) == (True, [])
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == result.digest
    assert same(jax.jit(lambda e: m3jax.merge([e], m3jax.passthrough(-0.3)))(expert), scaled) == (True, [])


def test_a_gradient_of_lambda_is_lines(tmp_path):
    """LiNeS (arXiv 2410.17146): λ of block l of L is α + β·(l − 1)/(L − 1); `lambda: [α, α + β]` says so."""
    alpha, beta, depth = 0.3, 0.6, 4
    layers = {"model.embed_tokens.weight": 0, "lm_head.weight": depth - 1}
    layers |= {f"model.layers.{i}.w": i for i in range(depth)}
    base, experts = write_models(tmp_path, shapes=dict.fromkeys(layers, (6, 5)))
    asked = recipe(tmp_path, merge_method="task_arithmetic", parameters={"lambda": [alpha, alpha + beta]})
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    got = read(tmp_path / "out")
    for name, layer in layers.items():
        block = [{name: tree[name]} for tree in (base, *experts)]
        scale = alpha + beta * layer / (depth - 1)
        want = oracle.merge(block[1:], block[0], "task_arithmetic", scale=scale)
        assert same({name: got[name]}, want) == (True, [])
