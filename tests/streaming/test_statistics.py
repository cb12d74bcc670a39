"""Statistics beside the models of a recipe: how they are aligned with them, and every way in which they do not fit."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import oracle
from support.directories import read, write
from support.matrix import SHAPES, measured, models, same

import m3jax
from m3jax import M3Error
from m3jax.arithmetic import systems
from m3jax.checkpoints import locate_model
from m3jax.exploration import load_resident
from m3jax.exploration.references import references_of
from m3jax.exploration.samples import space_of
from m3jax.methods import regmean
from m3jax.outputs import mark, verification
from m3jax.outputs.statistics import measured_of, write_statistics
from m3jax.recipe import Recipe
from m3jax.streaming.estimate import estimate_recipe
from m3jax.streaming.explaining import explain_recipe
from m3jax.streaming.jobs import prepared

TIED = {"num_hidden_layers": 2, "tie_word_embeddings": True}
TOLD = {"method": "fisher", "more": {"epsilon": 0.0}}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write_all(place, n=2, config=None):
    """Experts and statistics of them, as somebody else may have written them; and both as trees."""
    _, experts = models(ml_dtypes.bfloat16, n, SHAPES)
    statistics = measured("fisher", experts)
    for i, (expert, own) in enumerate(zip(experts, statistics, strict=True)):
        write(place / f"expert-{i}", expert, config)
        write(place / f"statistics-{i}", own, config)
    return experts, statistics


def rewrite(directory, tensors):
    """Other tensors in place of those of a directory."""
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def recipe_of(place, n=2, **keys):
    entries = [
        {"model": str(place / f"expert-{i}"), "statistics": str(place / f"statistics-{i}"), **keys.pop(f"of_{i}", {})}
        for i in range(n)
    ]
    return {"merge_method": "fisher", "models": entries, **keys}


def record(place, i, kind="fisher"):
    """Statistics of an expert written as `m3jax statistics` writes them."""
    own, model = read(place / f"statistics-{i}"), locate_model(str(place / f"expert-{i}"))
    out = place / f"recorded-{i}"
    write_statistics(out, measured_of(model, model.name), kind, {"examples": 1}, own, 6000)
    return {"model": str(place / f"expert-{i}"), "statistics": str(out)}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_statistics_of_a_model_that_changes_meanwhile_are_not_written(tmp_path, file):
    experts, statistics = write_all(tmp_path, 1)
    model = locate_model(str(tmp_path / "expert-0"))
    seen = measured_of(model, model.name)
    if file == "config.json":
        (model.path / file).write_text('{"hidden_size": 999}')
    else:
        rewrite(model.path, {name: value + value for name, value in experts[0].items()})
    with pytest.raises(M3Error, match=r"config\.json has changed since|expert-0 changed while it was measured"):
        write_statistics(tmp_path / "out", seen, "fisher", {"examples": 1}, statistics[0], 6000)
    assert not list(tmp_path.glob("out*"))


def test_what_is_one_tensor_has_one_statistics_and_what_has_none_is_averaged(tmp_path):
    experts, statistics = write_all(tmp_path, config=TIED)
    for i, expert in enumerate(experts):  # one stores its tied head too, whose statistics are the embedding's
        rewrite(tmp_path / f"expert-{i}", expert | {HEAD: expert[EMBEDDING]})
    found = m3jax.merge_checkpoint(recipe_of(tmp_path, mixup={"alpha": 1.0}, seed=3), tmp_path / "out")
    weights = found.manifest["weights"]["model"]["decimal"]
    want = oracle.merge(experts, weights=weights, statistics=statistics, **TOLD)
    assert same(read(tmp_path / "out"), want | {HEAD: want[EMBEDDING]}) == (True, [])
    assert any("1 tensors without statistics (model.norm.weight, …) are averaged" in note for note in found.notes)
    assert sum("does not tell of which model its statistics are" in note for note in found.notes) == 2
    assert [each["role"] for each in found.manifest["inputs"]] == ["expert"] * 2 + ["statistics"] * 2
    assert m3jax.verify(tmp_path / "out", inputs=True).differences == ()
    rewrite(tmp_path / "statistics-1", {name: value * 2 for name, value in statistics[1].items()})
    assert "has changed since it was read" in m3jax.verify(tmp_path / "out", inputs=True).differences[0]


def test_statistics_of_some_tensors_follow_their_model_to_other_names(tmp_path):
    _, experts = models(np.float32, 2, SHAPES)
    statistics = measured("fisher", experts)  # not of the norm
    spelled = [
        lambda name: name.replace("layers.", "layers_").replace("weight", "kernel"),
        lambda name: name.replace("weight", "kernel"),
    ]
    for i, own in enumerate(zip(experts, statistics, strict=True)):
        for kind, tree in zip(("expert", "statistics"), own, strict=True):
            write(tmp_path / f"{kind}-{i}", {spelled[i](name): value for name, value in tree.items()})
    m3jax.merge_checkpoint(recipe_of(tmp_path), tmp_path / "out")
    want = oracle.merge(experts, statistics=statistics, **TOLD)
    assert same(read(tmp_path / "out"), {spelled[0](name): value for name, value in want.items()}) == (True, [])


def test_recorded_statistics_are_held_against_the_model(tmp_path):
    experts, statistics = write_all(tmp_path)
    entries = [record(tmp_path, i) for i in range(2)]
    assert len(list((tmp_path / "recorded-0").glob("*.safetensors"))) > 1
    found = m3jax.merge_checkpoint({"merge_method": "fisher", "models": entries}, tmp_path / "out")
    want = oracle.merge(experts, statistics=statistics, **TOLD, weights=[1.0, 1.0])
    assert same(read(tmp_path / "out"), want) == (True, [])
    assert not any("does not tell" in note for note in found.notes)
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == found.digest
    assert m3jax.verify(tmp_path / "recorded-0", inputs=True).differences == ()
    swapped = [entry | {"statistics": other["statistics"]} for entry, other in zip(entries, entries[::-1], strict=True)]
    with pytest.raises(M3Error, match=r"recorded-[01]: was measured of another model than .*expert-[01]"):
        m3jax.merge_checkpoint({"merge_method": "fisher", "models": swapped}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(M3Error, match=r"recorded-0: holds fisher statistics of .*expert-0, no model"):
        m3jax.merge_checkpoint({"merge_method": "linear", "models": [entries[0]["statistics"]]}, tmp_path / "other")
    (tmp_path / "recorded-0").rename(tmp_path / "kept")
    of_kind = record(tmp_path, 0, "gram")
    with pytest.raises(M3Error, match="recorded-0: holds gram statistics, but fisher needs fisher"):
        m3jax.merge_checkpoint({"merge_method": "fisher", "models": [of_kind, entries[1]]}, tmp_path / "other")
    mark = tmp_path / "recorded-1" / "m3jax-conversion.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"m3jax": "0"}))
    with pytest.raises(M3Error, match="it was changed after it was written"):
        m3jax.merge_checkpoint({"merge_method": "fisher", "models": entries[1:]}, tmp_path / "other")


def test_statistics_are_stacked_as_their_model_is(tmp_path):
    """Experts that stack their layers, statistics layer by layer: as if all were layer by layer, each with its draw."""
    rng = np.random.default_rng(0)
    shapes = {f"layers_{i}.{name}": shape for i in range(3) for name, shape in (("w", (4, 5)), ("v", (7,)))}
    experts, statistics = (
        [{n: np.exp(rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()} for _ in range(2)]
        for _ in range(2)
    )

    def stacked(tree):
        return {f"layers.{name}": np.stack([tree[f"layers_{i}.{name}"] for i in range(3)]) for name in "wv"}

    for i, (expert, own) in enumerate(zip(experts, statistics, strict=True)):
        write(tmp_path / f"expert-{i}", stacked(expert), {"num_hidden_layers": 3})
        write(tmp_path / f"statistics-{i}", own, {"num_hidden_layers": 3})
    asked = recipe_of(tmp_path, mixup={"alpha": 1.0, "granularity": "layer"}, seed=3)
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    how = {"weights": m3jax.mixup(1.0, "layer"), "key": 3}
    want = stacked(m3jax.merge(experts, m3jax.fisher(), statistics=statistics, **how))
    assert same(read(tmp_path / "out"), want) == (True, [])
    got = m3jax.merge([stacked(e) for e in experts], m3jax.fisher(), statistics=statistics, **how)
    assert same(got, want) == (True, [])


def test_an_exploration_tries_weights_and_takes_no_statistics_for_a_model(tmp_path):
    experts, statistics = write_all(tmp_path)
    recipe = Recipe.model_validate(recipe_of(tmp_path, mixup={"alpha": 1.0}))
    with prepared(recipe, tmp_path / "out") as ready:
        resident = load_resident(ready, 0)
        space = space_of(recipe, ready.plan)
        references = references_of(ready, space, lambda: resident)
    assert [each.name for each in references[:-1]] == [str(tmp_path / f"expert-{i}") for i in range(2)]
    for each, expert in zip(references, experts, strict=False):
        assert same(each.params(), expert) == (True, [])
    want = oracle.merge(experts, weights=[0.25, 0.75], statistics=statistics, **TOLD)
    assert same(resident.merge({"model": (0.25, 0.75)}), want) == (True, [])
    rewrite(tmp_path / "statistics-1", edited(first(-1.0))(statistics[1]))
    with prepared(recipe, tmp_path / "out") as ready, pytest.raises(M3Error, match=r"negative somewhere in .*statis"):
        load_resident(ready, 0)


def edited(change):
    """What becomes of the second expert's statistics."""

    def edit(statistics):
        found = {name: value.copy() for name, value in statistics.items()}
        return change(found) or found

    return edit


def first(value):
    def edit(tree):
        tree[EMBEDDING][3, 2] = value

    return edit


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s | {"model.other.weight": s[EMBEDDING]}, "is in .*statistics-1 but not in .*expert-1"),
        (lambda s: s | {EMBEDDING: s[EMBEDDING][:7]}, r"is \[7, 16\] in .*statistics-1 but \[40, 16\] in .*expert-1"),
        (lambda s: s | {EMBEDDING: s[EMBEDDING].astype(np.int32)}, "is I32 in .*, but statistics are BF16, F16 or F32"),
        (
            lambda s: {n: v for n, v in s.items() if n != EMBEDDING},
            "embed_tokens.weight: is in .* but not in .*: measure",
        ),
        (first(-1e-30), "holds negative or infinite numbers or NaN"),
        (first(np.inf), "holds negative or infinite numbers or NaN"),
        (first(np.nan), "holds negative or infinite numbers or NaN"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, change, sentence):
    _, statistics = write_all(tmp_path)
    rewrite(tmp_path / "statistics-1", edited(change)(statistics[1]))
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge_checkpoint(recipe_of(tmp_path), tmp_path / "out", allow_nonfinite=True)
    assert not (tmp_path / "out").exists()


def test_a_zero_may_have_a_sign_and_statistics_no_tensor_in_common_are_refused(tmp_path):
    _, statistics = write_all(tmp_path)
    rewrite(tmp_path / "statistics-1", edited(first(-0.0))(statistics[1]))
    m3jax.merge_checkpoint(recipe_of(tmp_path), tmp_path / "out")
    with pytest.raises(M3Error, match="has statistics of no tensor that is merged"):
        m3jax.merge_checkpoint(recipe_of(tmp_path, exclude=["embed", "mlp"]), tmp_path / "other")


A, B = ({"model": name, "statistics": f"{name}-fisher"} for name in "ab")
SLICE = {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"models": [A, "b"]}, "models.1.statistics: missing, and fisher needs fisher statistics of each model"),
        (
            {"models": [A, B], "merge_method": "linear"},
            "models.0.statistics: linear takes no statistics, as fisher and regmean do",
        ),
        ({"slices": [SLICE]}, "slices: fisher merges whole models, whose statistics it needs; write models"),
        ({"models": [A, B], "tokenizer_source": "union"}, "tokenizer_source: gives models other rows"),
        ({"models": [A | {"model": "run@last:3"}, B]}, "models.0.model: are several steps, and statistics are of one"),
        ({"models": [A | {"parameters": {"weight": -1}}, B]}, "models.0.parameters.weight: -1"),
        ({"models": [A, B], "parameters": {"epsilon": -1}}, "parameters.epsilon: -1"),
        (
            {"models": [A, B], "base_model": "c", "sparsify": {"method": "dare", "density": 0.5}},
            "sparsify: fisher cannot be combined",
        ),
        ({"models": [A | {"statistic": "c"}, B]}, "did you mean 'statistics'"),
    ],
)
def test_recipes_that_cannot_be_are_refused(keys, sentence):
    with pytest.raises(M3Error) as told:
        Recipe.model_validate({"merge_method": "fisher", **keys})
    assert sentence in str(told.value)


def test_a_recipe_without_statistics_is_recorded_as_before():
    assert Recipe.model_validate({"merge_method": "linear", "models": ["a"]}).resolved()["models"] == [
        {"model": "a", "parameters": {}}
    ]


# --- statistics that are matrices ---------------------------------------------------------------------------------

LAYERS = {  # of GPT-2's names, which are [inputs, outputs]; of these, two read the same
    "h.0.attn.c_proj.weight": (16, 16),
    "h.0.mlp.c_fc.weight": (16, 40),
    "h.0.mlp.c_gate.weight": (40, 16),
    "ln_f.weight": (16,),
}
PROJECTION, FIRST, SECOND, NORM = LAYERS


def write_layers(place, shared=True, first=(PROJECTION, FIRST), change=lambda tree: tree):
    """Two experts and their Gram matrices, recorded as `m3jax statistics` records them; and both as trees."""
    _, experts = models(ml_dtypes.bfloat16, 2, LAYERS)
    rng, told, entries = np.random.default_rng(5), [], []
    for i, expert in enumerate(experts):
        rows = {name: rng.standard_normal((30, 16)) for name in (PROJECTION, FIRST)}
        own = {name: (x.T @ x).astype(np.float32) for name, x in rows.items()}
        told.append(own | {SECOND: own[FIRST]})
        write(place / f"expert-{i}", expert)
        model, out = locate_model(str(place / f"expert-{i}")), place / f"gram-{i}"
        how = {"examples": 1, "shared": {SECOND: FIRST} if shared else {}, "inputs_first": list(first)}
        write_statistics(out, measured_of(model, model.name), "gram", how, change(own), 2**20)
        entries.append({"model": str(place / f"expert-{i}"), "statistics": str(out)})
    return experts, told, entries


def test_matrices_are_shared_and_tell_along_which_axis_inputs_lie(tmp_path, monkeypatch):
    experts, told, entries = write_layers(tmp_path)
    made = []
    monkeypatch.setattr(regmean.systems, "factored", lambda s, real=systems.factored: made.append(len(s)) or real(s))
    recipe = {"merge_method": "regmean", "models": entries}
    found = m3jax.merge_checkpoint(recipe, tmp_path / "out", max_shard_size="1KB")
    assert made == [16, 16]  # one for two weights that read the same
    turned = {PROJECTION, FIRST}

    def as_read(tree):
        return {name: value.T if name in turned else value for name, value in tree.items()}

    how = {"method": "regmean", "more": {"ratio": 0.9}, "weights": [1.0, 1.0]}
    want = oracle.merge([as_read(expert) for expert in experts], statistics=told, **how)
    assert same(read(tmp_path / "out"), as_read(want)) == (True, [])
    assert "1 tensors without statistics (ln_f.weight, …) are averaged" in found.notes
    assert m3jax.replay(tmp_path / "out", tmp_path / "again").digest == found.digest
    assert m3jax.verify(tmp_path / "out", inputs=True).differences == ()
    assert m3jax.verify_sample(tmp_path / "out").differences == ()
    planned = estimate_recipe(Recipe.model_validate(recipe), tmp_path / "out")
    assert any("prepares matrices of up to 16 inputs" in note for note in planned.notes)
    assert planned.bytes_read == sum(sum(v.nbytes for v in tree.values()) for tree in (*experts, *told))
    group = explain_recipe(recipe, tmp_path / "out").groups[0].treatment
    assert [source.role for source in group.sources] == ["expert"] * 2 + ["statistics"] * 2
    swapped = [entry | {"statistics": other["statistics"]} for entry, other in zip(entries, entries[::-1], strict=True)]
    with pytest.raises(M3Error, match="was measured of another model than"):
        m3jax.merge_checkpoint({"merge_method": "regmean", "models": swapped}, tmp_path / "other")
    with (
        prepared(Recipe.model_validate(recipe | {"mixup": {"alpha": 1.0}}), tmp_path / "x") as ready,
        pytest.raises(M3Error, match="regmean: solves equations on the host for each merge"),
    ):
        load_resident(ready, 0)


def of_all(value):
    return lambda tree: {name: value(matrix) for name, matrix in tree.items()}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"first": (SECOND,)}, r"c_fc.weight: is \[16, 40\], and its statistics are of 16 inputs, but neither"),
        ({"change": lambda t: t | {"other.weight": t[FIRST]}}, "other.weight: is in .*gram-0 but not in .*expert-0"),
        ({"change": of_all(lambda g: g[:5])}, r"weight: is \[5, 16\] in .*gram-0, where one of the inputs of a weight"),
        ({"change": of_all(lambda g: -g)}, "weight: its Gram matrix holds NaN, infinities or negative squares"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path, keys, sentence):
    _, _, entries = write_layers(tmp_path, **keys)
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge_checkpoint({"merge_method": "regmean", "models": entries}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_stored_once_is_loaded_for_all_that_share_it(tmp_path):
    _, told, _ = write_layers(tmp_path)
    loaded = m3jax.load(tmp_path / "gram-0", flat=True)
    assert loaded.keys() == told[0].keys()
    assert loaded[SECOND] is loaded[FIRST]
    like = {name: jnp.zeros(value.shape) for name, value in told[0].items()}
    np.testing.assert_array_equal(m3jax.load(tmp_path / "gram-0", like=like)[SECOND], told[0][SECOND])
    rewrite(tmp_path / "gram-0", told[0] | {SECOND: 2 * told[0][SECOND]})  # what is stored is what is loaded
    np.testing.assert_array_equal(m3jax.load(tmp_path / "gram-0", flat=True)[SECOND], 2 * told[0][SECOND])
    rewrite(tmp_path / "gram-0", {PROJECTION: told[0][PROJECTION]})
    with pytest.raises(M3Error, match=f"{FIRST} stands for other tensors, but is not there"):
        m3jax.load(tmp_path / "gram-0", flat=True)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda place: (place / "m3jax-conversion.json").unlink(), f"none for {SECOND}, and no m3jax-conversion.json"),
        (lambda place: (place / "m3jax-conversion.json").write_text("{}"), f"none for {SECOND}, and no m3jax-conv"),
        (lambda place: (place / "m3jax-conversion.json").write_text('{"schema": 2,'), "json: is damaged"),
        (lambda place: rewrite(place, {n: 2 * v for n, v in read(place).items()}), "not as m3jax statistics wrote it"),
    ],
)
def test_matrices_that_lost_what_is_told_of_them_are_refused(tmp_path, damage, sentence):
    _, _, entries = write_layers(tmp_path)
    for number in range(2):
        damage(tmp_path / f"gram-{number}")
    with pytest.raises(M3Error, match=sentence):
        m3jax.merge_checkpoint({"merge_method": "regmean", "models": entries}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_are_not_converted(tmp_path):
    write_layers(tmp_path)
    with pytest.raises(M3Error, match="holds gram statistics of"):
        m3jax.convert(tmp_path / "gram-0", tmp_path / "other", "orbax")
    assert "m3jax statistics" in verification.mend_of(tmp_path / "gram-0", mark.read(tmp_path / "gram-0"))


def test_matrices_do_not_follow_models_that_are_read_otherwise(tmp_path):
    """Gram matrices of what is stacked, of what is tied, and without a record."""
    rng = np.random.default_rng(0)
    matrix = np.eye(16, dtype=np.float32)
    shapes = {EMBEDDING: (40, 16), "model.layers.0.mlp.up_proj.weight": (8, 16)}
    for i in range(2):
        expert = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        write(tmp_path / f"expert-{i}", expert | {HEAD: expert[EMBEDDING]}, TIED | {"num_hidden_layers": 1})
        write(tmp_path / f"statistics-{i}", {HEAD: matrix, "model.layers.0.mlp.up_proj.weight": matrix})
    asked = recipe_of(tmp_path) | {"merge_method": "regmean"}
    with pytest.raises(M3Error, match=r"lm_head.weight: is one tensor with another in .*expert-0, but has"):
        m3jax.merge_checkpoint(asked, tmp_path / "out")
    for i in range(2):
        write(tmp_path / f"stacked-{i}", {"layers.up.kernel": rng.standard_normal((2, 16, 8)).astype(np.float32)})
        write(tmp_path / f"of-stacked-{i}", {"layers.up.kernel": np.stack([matrix * (i + 1), matrix])})
    entries = [{"model": str(tmp_path / f"stacked-{i}"), "statistics": str(tmp_path / f"of-stacked-{i}")} for i in "01"]
    asked = {"merge_method": "regmean", "models": entries, "anatomy": {"stacked": {"layers": 0}}}
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    a, b = (read(tmp_path / f"stacked-{i}")["layers.up.kernel"].astype(np.float64) for i in range(2))
    want = np.stack([(a[0] + 2 * b[0]) / 3, (a[1] + b[1]) / 2])
    np.testing.assert_allclose(read(tmp_path / "out")["layers.up.kernel"], want, rtol=1e-6, atol=1e-7)
    with pytest.raises(M3Error, match=r"layers.up.kernel: stacks blocks along axis 1, and statistics"):
        m3jax.merge_checkpoint(asked | {"anatomy": {"stacked": {"layers": 1}}}, tmp_path / "other")
