"""What differs between two models: the numbers of numpy in float64, whatever the chunks, formats and layouts."""

import json

import ml_dtypes
import numpy as np
import pytest
from support.adapters import factors, write_adapter
from support.directories import write

import m3jax
from m3jax import M3Error
from m3jax.cli.commands import app
from m3jax.cli.shell import main
from m3jax.streaming.differences import measures_of

LAYERS, CONFIG = 2, {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False}
LAYER = "model.layers.{}.{}"
SHAPES = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,), "lm_head.weight": (20, 8)} | {
    LAYER.format(i, name): shape
    for i in range(LAYERS)
    for name, shape in (
        ("self_attn.q_proj.weight", (8, 8)),
        ("mlp.up_proj.weight", (300, 260)),  # several chunks of 65,536 entries
        ("input_layernorm.weight", (8,)),
    )
}
RATIO = 0.3


def model(seed, near=None, spread=0.05):
    rng = np.random.default_rng(seed)
    moved = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    if near is not None:
        moved = {name: near[name] + spread * value for name, value in moved.items()}
    return {name: value.astype(np.float32) for name, value in moved.items()}


@pytest.fixture(scope="module")
def models():
    base = model(0)
    a, b = model(1, base), model(2, base)
    a |= {name: base[name] for name in SHAPES if "norm" in name}  # not tuned
    b |= {name: base[name] for name in SHAPES if "norm" in name}
    merge = {name: (RATIO * a[name] + (1 - RATIO) * b[name]).astype(np.float32) for name in SHAPES}
    return {"base": base, "a": a, "b": b, "merge": merge}


@pytest.fixture(scope="module")
def place(tmp_path_factory, models):
    place = tmp_path_factory.mktemp("models")
    for name, tensors in models.items():
        write(place / name, tensors, CONFIG)
    return place


def flat(tensors, pick=""):
    return np.concatenate([tensors[n].ravel().astype(np.float64) for n in sorted(tensors) if pick in n])


def oracle(models, pick=""):
    a, b, p, m = (flat(models[name], pick) for name in ("a", "b", "base", "merge"))
    x, y, line = a - p, b - p, a - b
    norm = np.linalg.norm
    reference = norm(p) or None  # nothing is relative to no base
    signed = x * y != 0
    ratio = (m - b) @ line / (line @ line) if line.any() else None
    rest = None if ratio is None else m - (ratio * a + (1 - ratio) * b)
    return {
        "entries": a.size,
        "equal": int((a == b).sum()),
        "delta_a": norm(x),
        "relative_a": reference and norm(x) / reference,
        "delta_b": norm(y),
        "relative_b": reference and norm(y) / reference,
        "distance": norm(line),
        "relative": reference and norm(line) / reference,
        "cosine": x @ y / (norm(x) * norm(y)) if x.any() and y.any() else None,
        "sign_agreement": ((x * y > 0).sum() / signed.sum()) if signed.any() else None,
        "lambda": ratio,
        "explained": None if rest is None else 1 - rest @ rest / max((m - a) @ (m - a), (m - b) @ (m - b)),
    }


def assert_measures(found, want):
    told = found.to_json()
    for name, value in want.items():
        assert told[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-11)), name


def test_every_number_is_numpys(place, models):
    names = {role: str(place / role) for role in models}
    found = m3jax.diff(names["a"], names["b"], base=names["base"], merge=names["merge"])
    assert_measures(found.total, oracle(models))
    assert found.total.lambda_ == pytest.approx(RATIO, abs=1e-6)
    by_layer = {line.name: line for line in found.lines("layer")}
    assert list(by_layer) == ["before layers", "layer 0", "layer 1", "after layers"]
    assert_measures(by_layer["layer 1"].measures, oracle(models, "layers.1."))
    by_module = {line.name: line for line in found.lines("module")}
    assert list(by_module) == ["embedding", "attention", "mlp", "norm", "head"]
    assert_measures(by_module["mlp"].measures, oracle(models, "mlp"))
    norms = by_module["norm"].measures
    assert (norms.equal_share, norms.delta_a, norms.cosine, norms.lambda_) == (1.0, 0.0, None, None)
    for line in found.lines("tensor"):
        assert_measures(line.measures, oracle(models, line.name))
    cells = {(line.name, line.module): line.measures for line in found.cells()}
    assert_measures(cells["layer 0", "attention"], oracle(models, "layers.0.self_attn"))
    # and nothing depends on chunks
    again = m3jax.diff(names["a"], names["b"], base=names["base"], merge=names["merge"], chunk_entries=2**16)
    assert again == found
    # without a base, a and b themselves are compared
    plain = m3jax.diff(names["a"], names["b"]).total
    assert (plain.delta_a, plain.lambda_, plain.explained) == (None, None, None)
    bare = oracle(models | {"base": {name: np.zeros_like(value) for name, value in models["a"].items()}})
    bare["relative"] = bare["distance"] / bare["delta_a"]
    assert_measures(plain, {name: bare[name] for name in ("cosine", "distance", "relative", "equal")})
    with pytest.raises(M3Error, match="power of two"):
        m3jax.diff(names["a"], names["b"], chunk_entries=5000)


def test_formats_layouts_and_adapters_are_seen_as_a_merge_sees_them(tmp_path):
    """A model with its layers stacked along an axis, as Flax writes it, beside one with layers one by one."""
    rng = np.random.default_rng(0)

    def tree(near=None):
        shapes = {f"layers_{i}.mlp.kernel": (6, 5) for i in range(3)} | {"final_norm.scale": (6,)}
        found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        return {n: (v if near is None else near[n] + 0.1 * v).astype(ml_dtypes.bfloat16) for n, v in found.items()}

    one = tree()
    other = tree(one)
    config = {"num_hidden_layers": 3}
    write(tmp_path / "one", one, config)
    write(tmp_path / "other", other, config)
    for axis in (0, 1):
        leaves = np.stack([other[f"layers_{i}.mlp.kernel"] for i in range(3)], axis)
        stacked = {"layers.mlp.kernel": leaves, "final_norm.scale": other["final_norm.scale"]}
        write(tmp_path / f"axis {axis}", stacked, config)
    want = m3jax.diff(str(tmp_path / "one"), str(tmp_path / "other"))
    assert [line.name for line in want.lines("layer")] == ["layer 0", "layer 1", "layer 2", "after layers"]
    for axis in (0, 1):
        got = m3jax.diff(str(tmp_path / "one"), str(tmp_path / f"axis {axis}"))
        assert got.tensors == want.tensors
        same = m3jax.diff(str(tmp_path / f"axis {axis}"), str(tmp_path / "other"))
        assert same.identical
        assert not same.tensors
        assert same.compared == 4
    m3jax.convert(tmp_path / "other", tmp_path / "flax", "msgpack")
    assert m3jax.diff(str(tmp_path / "one"), str(tmp_path / "flax")).tensors == want.tensors

    base = {"model.layers.0.mlp.up_proj.weight": rng.standard_normal((40, 30)).astype(np.float32)}
    write(tmp_path / "base", base, CONFIG)
    write_adapter(tmp_path / "adapter", factors({"model.layers.0.mlp.up_proj": (40, 30)}, 2, 0))
    adapted = f"{tmp_path}/base+{tmp_path}/adapter"
    m3jax.convert(adapted, tmp_path / "merged")
    assert m3jax.diff(adapted, str(tmp_path / "merged")).identical
    assert m3jax.diff(str(tmp_path / "base"), adapted).total.relative > 0


def test_what_is_no_number_and_what_is_no_parameter(tmp_path):
    weights = np.arange(12, dtype=np.float32).reshape(3, 4) - 4
    other = weights.copy()
    other[0, 0], other[0, 1], other[2, 3] = np.nan, np.inf, -0.5
    both = weights.copy()
    both[0, 0], both[1, 0] = np.nan, -0.0
    write(
        tmp_path / "a",
        {"model.layers.0.w": both, "rotary.inv_freq": np.float32([1, 2]), "opt_state.count": np.int32(3)},
    )
    write(
        tmp_path / "b",
        {"model.layers.0.w": other, "rotary.inv_freq": np.float32([1, 3]), "opt_state.count": np.int32(4)},
    )
    found = m3jax.diff(str(tmp_path / "a"), str(tmp_path / "b"))
    (line, buffer) = sorted(found.lines("tensor"), key=lambda line: line.name)
    assert (line.measures.entries, line.measures.equal, line.measures.nonfinite) == (12, 10, 2)
    assert line.measures.distance == 7.5
    assert (buffer.measures.equal, buffer.measures.distance, buffer.measures.cosine) == (1, None, None)
    assert found.left_out == (("opt_state.count", "training state (optimizer)"),)
    assert not found.identical


def test_towers_are_told_apart(tmp_path):
    shapes = {"model.language_model.embed_tokens.weight": (5, 4), "model.multi_modal_projector.linear_1.weight": (4, 4)}
    shapes |= {
        f"model.{t}.layers.{i}.mlp.fc1.weight": (4, 4) for t in ("language_model", "vision_tower") for i in range(2)
    }
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        write(tmp_path / name, tensors, {"model_type": "llava"})
    found = m3jax.diff(str(tmp_path / "a"), str(tmp_path / "b"))
    layers = [
        "text before layers",
        "text layer 0",
        "text layer 1",
        "vision layer 0",
        "vision layer 1",
        "outside layers",
    ]
    assert [line.name for line in found.lines("layer")] == layers
    assert [line.name for line in found.lines("module")] == ["text embedding", "text mlp", "vision mlp", "other"]
    assert [(line.tower, line.layer) for line in found.lines("layer")][2::3] == [("text", 1), (None, None)]


def test_sums_of_the_widest_range_are_right():
    sums = m3jax.streaming.differences.Sums(3, 0, 3, square_a=1e76, square_b=1e-76, product=1.0, distance=1.0)
    told = measures_of(sums, based=True, merged=True)
    assert (told.cosine, told.relative_a, told.lambda_) == (pytest.approx(1.0), None, 0.0)


def test_what_cannot_be_compared_is_one_sentence(place, models, tmp_path, capsys):
    a, b = str(place / "a"), str(place / "b")
    short = {name: value for name, value in models["a"].items() if "layers.1" not in name}
    write(tmp_path / "short", short, CONFIG)
    write(tmp_path / "wide", models["a"] | {"lm_head.weight": np.zeros((21, 8), np.float32)}, CONFIG)
    for arguments, said in (
        ((a, str(tmp_path / "short")), "model.layers.1.input_layernorm.weight (and 2 more): in "),
        ((a, str(tmp_path / "wide")), "lm_head.weight: is [20, 8] in "),
        ((a, b, "--by", "head"), "--by head: differences are told by layer, module, tensor; choose one of them"),
        ((a, b, "--set", "tokeniser_source=union"), "did you mean 'tokenizer_source'?"),
        ((a, b, "--picture", "map.pdf"), "map.pdf: a picture is written as .png or .svg: choose such a name"),
        ((a, str(tmp_path / "none")), "none"),
        ((a, b, "--base", b), "b: is the base, and one of the models compared with it: leave --base out"),
    ):
        assert main(app, ["diff", *arguments]) == 2
        captured = capsys.readouterr()
        assert said in captured.err, captured.err
        assert (captured.err.count("\n"), captured.out) == (1, "")
    assert main(app, ["diff", a, str(tmp_path / "wide"), "--set", "exclude=[lm_head]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"lm_head.weight": "excluded"}


def test_the_command_says_and_draws_it(place, tmp_path, capsys):
    a, b, base, merge = (str(place / name) for name in ("a", "b", "base", "merge"))
    picture = tmp_path / "map.png"
    asked = ["diff", a, b, "--base", base, "--merge", merge]
    assert main(app, [*asked, "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "layer 1" in said
    assert "0.300000" in said
    assert "δa = a − base" in said
    assert said.rstrip().endswith("different: 156,448 of the 156,472 entries of 9 tensors")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(app, [*asked, "--by", "module", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["module"] for row in told["rows"]] == ["embedding", "attention", "mlp", "norm", "head"]
    assert told["total"]["lambda"] == pytest.approx(RATIO, abs=1e-6)
    assert len(told["cells"]) == 9
    assert main(app, ["diff", a, a, "--picture", str(tmp_path / "none.png")]) == 0
    captured = capsys.readouterr()
    assert "are the same, bit for bit" in captured.err
    assert "is not drawn, as nothing differs" in captured.err
    assert captured.out.rstrip().endswith("the same, bit for bit: 9 tensors, 156,472 entries")
