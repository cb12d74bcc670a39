"""A package outside brings a method with a measure of its own: found, used everywhere, recorded, and missed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.directories import WIDE, read, recipe, write_models
from support.matrix import same
from support.outside import CLIPPING, ROWS, TOY_ENTRIES, forget, lay_out, lay_out_toy

import m3jax
from m3jax import M3Error, load_recipe
from m3jax.cli.commands import main
from m3jax.methods import catalogue, factories
from m3jax.outputs import companions, manifest, provenance

ROWS_ONLY = {"__init__.py": "", "rows.py": ROWS}
OTHER_ENTRIES = {"toy_clip": "m3jax_other.rows:CLIPPED"}
MODULES = ("m3jax_toy", "m3jax_other", "m3jax_broken")


@pytest.fixture
def path(monkeypatch):
    """Puts folders on this process's path, in place of those that were put there before."""
    put: list[str] = []

    def only(*folders: Path) -> None:
        monkeypatch.setattr(sys, "path", [*map(str, folders), *(p for p in sys.path if p not in put)])
        put[:] = map(str, folders)
        forget(*MODULES)

    yield only
    monkeypatch.undo()
    forget(*MODULES)


@pytest.fixture
def toy(path, tmp_path):
    path(lay_out_toy(tmp_path / "site"))


def clipped(base, experts, weights=(1.0, 1.0), limits=(0.5, 0.5), scale=1.0, one_sided=False):
    """The toy method in numpy; each argument but the last may be a function of the tensor's name."""

    def of(name, value):
        return value(name) if callable(value) else value

    merged = {}
    for name, p in base.items():
        wide = p.astype(np.float32)
        total = None
        for i, expert in enumerate(experts):
            delta = expert[name].astype(np.float32) - wide
            limit = np.float32(of(name, limits)[i])
            cap = np.max(np.abs(delta), initial=np.float32(0)) * limit
            cut = delta if min(of(name, limits)) == 1.0 else np.minimum(delta, cap)
            cut = cut if one_sided or min(of(name, limits)) == 1.0 else np.maximum(cut, -cap)
            term = np.float32(of(name, weights)[i] * of(name, scale)) * cut
            total = term if total is None else total + term
        merged[name] = (total + wide).astype(p.dtype)
    return merged


# --- recipes ------------------------------------------------------------------------------------------------------

ASKED = {
    "merge_method": "toy_clip",
    "base_model": "base",
    "models": ["a", {"model": "b", "parameters": {"portion": 0.25, "limit": [0.0, 1.0]}}],
    "parameters": {"strength": [{"filter": "mlp", "value": 0.5}, {"value": 2.0}], "one_sided": 1},
}


def test_recipes_read_its_parameters(toy):
    asked = load_recipe(ASKED)
    name = "model.layers.1.mlp.weight"
    assert asked.numbers("weights", name, 0.25) == {"portion": (1.0, 0.25)}
    assert asked.numbers("method", name, 0.25) == {"limit": (0.5, 0.25)}
    assert asked.numbers("scale", name, 0.25) == {"strength": (0.5, 0.5)}
    assert asked.numbers("scale", "model.norm.weight", 1.0) == {"strength": (2.0, 2.0)}
    assert asked.parameters["one_sided"] is True
    assert load_recipe(asked.resolved()) == asked


def test_set_reaches_its_parameters(toy):
    changes = ["parameters.limit=[0.1, 0.3]", "models.0.parameters.portion=0.75", "parameters.one_sided=false"]
    asked = load_recipe(ASKED, changes)
    assert asked.parameters["limit"] == (0.1, 0.3)
    assert asked.numbers("weights", "w", 0.0) == {"portion": (0.75, 0.25)}
    assert asked.parameters["one_sided"] is False


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("parameters.limit=1.5", "parameters.limit: 1.5 is outside [0, 1]; write a number inside"),
        ("parameters.limt=0.5", "parameters.limt: unknown parameter; did you mean 'limit'?"),
        ("parameters.one_sided=maybe", "parameters.one_sided: 'maybe' is not true or false"),
        ("models.0.parameters.one_sided=true", "it is set for the whole merge"),
        ("parameters.trim_scope=model", "toy_clip does not use it, ties, dare_ties, pcb do"),
        ("merge_method=linear", "linear does not use it, toy_clip does"),
        ("parameters.trim_scop=model", "did you mean 'trim_scope', which is for ties, dare_ties, pcb?"),
        ("parameters.qqq=1", "unknown parameter; known are portion, limit, strength, one_sided, int8_mask"),
        ("merge_method=toy_clap", "did you mean 'toy_clip'?"),
        ("base_model=null", "toy_clip works on differences from it; name it"),
    ],
)
def test_bad_recipes_are_told(toy, change, sentence):
    with pytest.raises(M3Error) as told:
        load_recipe(ASKED, [change])
    assert sentence in str(told.value)


# --- merging ------------------------------------------------------------------------------------------------------


def test_out_of_core_and_again(toy, tmp_path):
    base, experts = write_models(tmp_path / "in")
    asked = recipe(tmp_path / "in", merge_method="toy_clip", out_dtype="float32")
    asked["models"] = [
        {"model": asked["models"][0], "parameters": {"portion": 0.7}},
        {"model": asked["models"][1], "parameters": {"portion": 0.2, "limit": [{"filter": "wide", "value": 0.1}]}},
    ]
    asked["parameters"] = {"strength": [{"filter": "mlp", "value": 0.5}, {"value": 2.0}], "limit": 0.25}
    as_float32 = {name: value.astype(np.float32) for name, value in base.items()}
    want = clipped(
        as_float32,
        experts,
        weights=(0.7, 0.2),
        limits=lambda name: (0.25, 0.1 if "wide" in name else 0.25),
        scale=lambda name: 0.5 if "mlp" in name else 2.0,
    )
    digests = set()
    for chunk in (2**16, 2**18):
        result = m3jax.merge_checkpoint(asked, tmp_path / "out", chunk_entries=chunk, overwrite=True)
        digests.add(result.digest)
        assert same(read(tmp_path / "out"), want) == (True, [])
    again = m3jax.replay(tmp_path / "out", tmp_path / "again")
    assert digests == {again.digest}
    assert again.notes == ()
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert m3jax.verify(tmp_path / "again").differences == ()


def test_mixup_draws_its_weights(toy, tmp_path):
    base, experts = write_models(tmp_path / "in")
    asked = recipe(tmp_path / "in", merge_method="toy_clip", mixup={"alpha": 0.5}, seed=3)
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    want = clipped(base, experts, weights=m3jax.draw_weights(3, 0.5))
    assert same(read(tmp_path / "out"), want) == (True, [])


@pytest.mark.parametrize("one_sided", [False, True])
def test_under_jit_on_eight_devices(toy, tmp_path, one_sided):
    base, experts = write_models(tmp_path / "in", shapes={"w": (64, 24), "v": (16,)})
    row = catalogue.method_row("toy_clip")
    method = factories.make_method(row, {"one_sided": one_sided})
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    placed = [jax.tree.map(lambda x: jax.device_put(x, rows), tree) for tree in (base, *experts)]

    @jax.jit
    def merged(base, experts, weights):
        return m3jax.merge(experts, method, base=base, weights=weights)

    weights = np.float32([0.5, 0.75])
    want = clipped(base, experts, weights=weights.tolist(), one_sided=one_sided)
    found = merged(placed[0], placed[1:], weights)
    assert same(found, want) == (True, [])
    assert found["w"].sharding.is_equivalent_to(rows, 2)
    assert same(m3jax.merge(experts, method, base=base, weights=[0.5, 0.75]), want) == (True, [])


def test_a_sparsifier_goes_before_it(toy, tmp_path):
    base, experts = write_models(tmp_path / "in", shapes=WIDE)
    asked = recipe(tmp_path / "in", merge_method="toy_clip", sparsify={"method": "dare", "density": 0.5}, seed=4)
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    method = factories.make_method(catalogue.method_row("toy_clip"), {"one_sided": False})
    want = m3jax.merge(experts, method, base=base, sparsify=m3jax.dare(0.5), key=4)
    assert same(read(tmp_path / "out"), want) == (True, [])


# --- what is recorded, and what a replay makes of it --------------------------------------------------------------


@pytest.fixture
def merged(toy, tmp_path):
    write_models(tmp_path / "in", shapes={"w": (8, 4)})
    m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="toy_clip"), tmp_path / "out")
    return tmp_path / "out"


def test_package_and_version_are_recorded_and_said(merged, capsys):
    record = json.loads((merged / "m3jax.json").read_text())
    assert record["method_from"] == {"package": "m3jax-toy", "version": "1.0"}
    assert record["versions"]["m3jax-toy"] == "1.0"
    assert "made with m3jax (toy_clip, of the package m3jax-toy 1.0)" in (merged / "README.md").read_text()
    for place in (merged, merged / "model.safetensors"):
        assert main(["inspect", str(place)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "merged by toy_clip, of the package m3jax-toy 1.0"
    assert main(["inspect", str(merged), "--json"]) == 0
    said = {"method": "toy_clip", "package": "m3jax-toy", "version": "1.0"}
    assert json.loads(capsys.readouterr().out)["merged_by"] == said


def test_our_own_methods_record_no_package(tmp_path, capsys):
    write_models(tmp_path / "in", shapes={"w": (8, 4)})
    asked = recipe(tmp_path / "in", merge_method="task_arithmetic")
    record = m3jax.merge_checkpoint(asked, tmp_path / "out").manifest
    assert "method_from" not in record
    assert record["versions"] == manifest.versions()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "merged by" not in capsys.readouterr().out
    assert provenance.method_of(tmp_path / "nowhere") is None


def test_damaged_manifests_do_not_stop_an_inspection(merged, capsys):
    record = json.loads((merged / "m3jax.json").read_text())
    (merged / "m3jax.json").write_text(json.dumps(record | {"method_from": ["m3jax-toy"]}))
    assert main(["inspect", str(merged)]) == 0
    assert "merged by" not in capsys.readouterr().out
    with pytest.raises(M3Error, match="method_from is not a package and its version"):
        m3jax.replay(merged, merged.with_name("again"))


def test_a_replay_misses_the_package(merged, path, tmp_path, capsys):
    path()
    sentence = (
        "merge method 'toy_clip' was that of the package m3jax-toy 1.0 when this merge was made, which is not here: "
        "install m3jax-toy 1.0"
    )
    assert main(["replay", str(merged), str(tmp_path / "again")]) == 2
    assert capsys.readouterr().err == f"m3jax: {sentence}\n"
    assert not (tmp_path / "again").exists()
    assert m3jax.verify(merged).differences == ()
    assert main(["inspect", str(merged)]) == 0
    assert "m3jax-toy 1.0" in capsys.readouterr().out


def test_a_replay_notes_another_version(merged, path, tmp_path, capsys):
    path(lay_out_toy(tmp_path / "newer", "1.1"))
    assert main(["replay", str(merged), str(tmp_path / "again")]) == 0
    note = "merge method 'toy_clip' is that of m3jax-toy 1.1 here, and was that of 1.0 then"
    assert f"note: {note}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "again" / "m3jax.json").read_text())["method_from"]["version"] == "1.1"


def test_a_replay_by_a_version_that_computes_otherwise(merged, path, tmp_path):
    other = CLIPPING.replace("jnp.clip(value,", "jnp.clip(value * 2,")
    assert other != CLIPPING
    path(lay_out_toy(tmp_path / "newer", "2.0", clipping=other))
    with pytest.raises(M3Error) as told:
        m3jax.replay(merged, tmp_path / "again")
    assert "the replay gives other bytes" in str(told.value)
    assert "is that of m3jax-toy 2.0 here, and was that of 1.0 then" in str(told.value)
    assert not (tmp_path / "again").exists()


def test_a_replay_takes_no_method_of_the_same_name(merged, path, tmp_path, monkeypatch):
    renamed = lay_out(tmp_path / "renamed", "m3jax-other", "1.0", OTHER_ENTRIES, ROWS_ONLY)
    path(renamed)
    with pytest.raises(M3Error, match=r"m3jax-toy 1.0 .* but here it is that of m3jax-other 1.0: install m3jax-toy"):
        m3jax.replay(merged, tmp_path / "again")
    path()
    ours = (*catalogue.METHODS, catalogue.METHODS[0]._replace(name="toy_clip"))
    monkeypatch.setattr(catalogue, "METHODS", ours)
    with pytest.raises(M3Error, match=r"m3jax-toy 1.0 .* but here it is m3jax's own: use the version"):
        m3jax.replay(merged, tmp_path / "again")


def test_a_replay_of_our_own_method_takes_no_package(merged, tmp_path):
    record = json.loads((merged / "m3jax.json").read_text())
    del record["method_from"]
    sealed = manifest.completed(record, record["output"]["files"])
    (merged / "m3jax.json").write_text(json.dumps(sealed))
    with pytest.raises(M3Error, match="was m3jax's own when this merge was made, but here it is that of the package"):
        m3jax.replay(merged, tmp_path / "again")


def test_an_interrupted_merge_is_not_resumed_by_another_version(toy, path, tmp_path):
    asked = load_recipe(ASKED)
    one = manifest.versions(asked.merge_method)
    path(lay_out_toy(tmp_path / "newer", "1.1"))
    assert one != manifest.versions(asked.merge_method)


# --- packages that fail -------------------------------------------------------------------------------------------


def test_a_package_that_cannot_be_imported(path, tmp_path, capsys):
    files = ROWS_ONLY | {"rows.py": "import nowhere_to_be_found\n"}
    broken = lay_out(tmp_path / "broken", "m3jax-broken", "0.3", {"broken": "m3jax_broken.rows:ROW"}, files)
    path(lay_out_toy(tmp_path / "site"), broken)
    sentence = (
        "merge method 'broken' of the package m3jax-broken 0.3 cannot be imported (ModuleNotFoundError: "
        "No module named 'nowhere_to_be_found'): mend or remove it"
    )
    base, experts = write_models(tmp_path / "in", shapes={"w": (8, 4)})
    with pytest.raises(M3Error) as told:
        m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="broken"), tmp_path / "out")
    assert sentence in str(told.value)
    for method in ("toy_clip", "task_arithmetic"):
        m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method=method), tmp_path / method)
    assert same(read(tmp_path / "toy_clip"), clipped(base, experts)) == (True, [])
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert f"note: {sentence}" in out.splitlines()
    assert "toy_clip: weighted sum" in out
    assert main(["methods", "broken"]) == 2
    assert capsys.readouterr().err == f"m3jax: {sentence}\n"


def test_names_of_our_own_are_kept(path, tmp_path, capsys):
    entries = TOY_ENTRIES | {"ties": "m3jax_toy.rows:CLIPPED"}
    path(lay_out(tmp_path / "site", "m3jax-toy", "1.0", entries, ROWS_ONLY))
    assert catalogue.method_row("ties") is catalogue.METHODS[2]
    assert catalogue.origin_of("ties") is None
    assert catalogue.names().count("ties") == 1
    assert main(["methods"]) == 0
    said = "merge method 'ties' of the package m3jax-toy 1.0 is ignored: m3jax has a method of this name"
    assert f"note: {said}" in capsys.readouterr().out.splitlines()
    assert main(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == [said]


def test_two_packages_bring_one_name(path, tmp_path):
    other = lay_out(tmp_path / "other", "m3jax-other", "2.0", OTHER_ENTRIES, ROWS_ONLY)
    path(lay_out_toy(tmp_path / "site"), other)
    sentence = (
        "merge method 'toy_clip' is brought by the packages m3jax-other 2.0 and m3jax-toy 1.0: remove all but one"
    )
    with pytest.raises(M3Error) as told:
        catalogue.method_row("toy_clip")
    assert str(told.value) == sentence


@pytest.mark.parametrize("metadata", [None, "", "Name: m3jax-toy\n", "\x00\n\n"])
def test_a_package_whose_metadata_are_damaged(path, tmp_path, metadata):
    told = lay_out_toy(tmp_path / "site") / "m3jax_toy-1.0.dist-info" / "METADATA"
    told.unlink() if metadata is None else told.write_text(metadata)
    path(tmp_path / "site")
    assert catalogue.method_row("toy_clip").summary == "weighted sum of task vectors, outliers clipped"
    name = "m3jax-toy" if metadata and "toy" in metadata else "m3jax_toy.rows"
    assert catalogue.origin_of("toy_clip") == catalogue.Origin(name, "unknown")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("CLIPPED = MethodRow(", "CLIPPED = dict(", "gives a dict where a MethodRow is wanted"),
        ("CLIPPED =", "OTHER =", "cannot be imported (AttributeError"),
        ('"weights", ', '"wieghts", ', "the parameter portion: sets is 'wieghts', not weights"),
        ('"method.limit"', '"method"', "the parameter limit: sets is 'method'"),
        ('level="expert"', 'level="layer"', "the parameter portion: level is 'layer', not one of"),
        ('False, "flag"', 'False, "switch"', "the parameter one_sided: kind is 'switch', not one of"),
        ('False, "flag"', '0.5, "flag"', "the parameter one_sided: the default 0.5 is no flag"),
        ('False, "flag"', 'False, "flag", level="tensor"', "a flag is the same in the whole merge"),
        ('1.0, level="tensor"', "1.0", "scale may vary between tensors"),
        ('"strength"', '"limit"', "the parameter limit is there twice"),
        ("parameters=(", 'base="task_vector", parameters=(', "base is 'task_vector', not one of"),
        ("parameters=(", "parameters=(3, ", "holds something that is no Parameter"),
        ("parameters=(", "parameters=(lambda *_: None)(", "has a row that cannot be read: TypeError"),
        ('magnitude", 0.5', 'magnitude", 1.5', "the default 1.5 is outside [0, 1]"),
        ('"portion", "weights"', '"portion", "method.portion"', "0 parameters set the weights, where"),
        ('"limit", "method.limit"', '"limit", "weights"', "2 parameters set the weights, where"),
        ('"limit", "method.limit"', '"limit", "scale"', "several parameters set the scale"),
        ('"limit", "method.limit"', '"limit", "sparsifier.limit"', "are a sparsifier's, but there is none"),
        ("parameters=(", 'weighting="none", parameters=(', "1 parameters set the weights, where"),
    ],
)
def test_rows_that_cannot_be_read(path, tmp_path, old, new, said):
    assert old in ROWS
    path(lay_out_toy(tmp_path / "site", rows=ROWS.replace(old, new, 1)))
    with pytest.raises(M3Error) as told:
        catalogue.method_row("toy_clip")
    assert str(told.value).startswith("merge method 'toy_clip' of the package m3jax-toy 1.0 ")
    assert said in str(told.value)
    assert str(told.value).endswith("mend or remove it")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("clipping", "def clipped(limit=0.5,", "def clipped(bound=0.5,", "cannot be made (TypeError"),
        ("clipping", "import jax\n", "import jacks\n", "cannot be made (ModuleNotFoundError"),
        ("clipping", "return Method(", "return {} and Method(", "makes a dict where a Method is wanted"),
        ("clipping", "uses_base=True", "uses_base=False", "different things of base"),
        ("clipping", "uses_base=True", 'uses_base=True, weighting="none"', "different things of weighting"),
        ("clipping", 'parameters=(("limit", limit),)', "parameters=()", "different things of parameters"),
        ("clipping", "options=one_sided", "options=[one_sided]", "cannot be hashed"),
        ("rows", "parameters=(", "experts=(2, 2), parameters=(", "different things of experts"),
        ("rows", "parameters=(", "sparsifies=False, parameters=(", "different things of sparsifies"),
    ],
)
def test_methods_that_are_not_what_their_rows_say(path, tmp_path, file, old, new, said):
    text = {"rows": ROWS, "clipping": CLIPPING}[file]
    assert old in text
    path(lay_out_toy(tmp_path / "site", **{file: text.replace(old, new, 1)}))
    with pytest.raises(M3Error) as told:
        factories.make_method(catalogue.method_row("toy_clip"), {"one_sided": False})
    assert str(told.value).startswith("merge method 'toy_clip' of the package m3jax-toy 1.0")
    assert said in str(told.value)


SPARSE = (
    ROWS.replace(
        'method="m3jax_toy.clipping:clipped",', 'method="m3jax.methods.linear:task_arithmetic", sparsifier="PLACE",'
    )
    .replace('"method.limit"', '"sparsifier.density"')
    .replace('"method.one_sided"', '"sparsifier.rescale"')
)


def test_a_method_from_outside_has_a_sparsifier_of_its_own(path, tmp_path):
    base, experts = write_models(tmp_path / "in", shapes={"w": (64, 4)})
    path(lay_out_toy(tmp_path / "site", rows=SPARSE.replace("PLACE", "m3jax.methods.dare:dare")))
    asked = recipe(tmp_path / "in", merge_method="toy_clip", parameters={"limit": 0.3}, seed=9)
    m3jax.merge_checkpoint(asked, tmp_path / "out")
    unscaled = m3jax.dare(0.3, rescale=False)
    want = m3jax.merge(experts, m3jax.task_arithmetic(), base=base, sparsify=unscaled, key=9)
    assert same(read(tmp_path / "out"), want) == (True, [])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("m3jax.methods.dare:dance", "cannot be made (AttributeError"),
        ("m3jax.methods.breadcrumbs:breadcrumbs", "say different things of parameters"),
        ("builtins:dict", "makes a dict where a Sparsifier is wanted"),
    ],
)
def test_a_sparsifier_of_its_own_that_is_none(path, tmp_path, place, said):
    path(lay_out_toy(tmp_path / "site", rows=SPARSE.replace("PLACE", place)))
    with pytest.raises(M3Error) as told:
        factories.make_own_sparsifier(catalogue.method_row("toy_clip"), {"one_sided": False})
    assert str(told.value).startswith("merge method 'toy_clip' of the package m3jax-toy 1.0")
    assert said in str(told.value)


def test_whole_numbers_are_read_as_a_replay_reads_them(path, tmp_path):
    write_models(tmp_path / "in", shapes={"w": (8, 4)})
    path(lay_out_toy(tmp_path / "site", rows=ROWS.replace("1.0, level=", "1, level=")))
    m3jax.merge_checkpoint(recipe(tmp_path / "in", merge_method="toy_clip"), tmp_path / "out")
    m3jax.replay(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "out" / "m3jax.json").read_bytes() == (tmp_path / "again" / "m3jax.json").read_bytes()


def test_the_card_of_our_own_method_names_no_package():
    asked = load_recipe({"merge_method": "linear", "models": ["a", "b"]})
    assert "made with m3jax (linear)." in companions.card(asked, {})


# --- public names -------------------------------------------------------------------------------------------------

NAMES = ("Checkpoint", "Measure", "Method", "MethodRow", "Parameter", "Round", "Sparsifier", "Task")


@pytest.mark.parametrize("name", NAMES)
def test_what_extends_is_public_and_documented(name):
    found = getattr(m3jax, name)
    assert found.__name__ == name
    assert name in m3jax.__all__
    assert name in m3jax.__doc__
    documented = found.__doc__
    fields = getattr(found, "_fields", ())
    assert [field for field in fields if f"        {field}: " not in documented] == []


def test_rows_are_written_without_jax():
    program = "import sys; from m3jax import MethodRow, Parameter; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
