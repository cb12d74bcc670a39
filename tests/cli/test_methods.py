"""`m3jax methods`: all of the catalogue, told to people and to programs."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from support.outside import lay_out_toy

from m3jax.cli.commands import main
from m3jax.cli.displays.methods import example, method_lines, methods_lines
from m3jax.methods.catalogue import METHODS, SPARSIFIERS
from m3jax.methods.rows import MethodRow, Parameter
from m3jax.recipe import Recipe

NAMES = sorted({row.name for row in (*METHODS, *SPARSIFIERS)})


def test_the_list_tells_every_method(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    before, after = shown.split("\nSparsifiers (sparsify.method):\n")
    for rows, part in ((METHODS, before), (SPARSIFIERS, after)):
        entries = {entry.strip().split(":")[0]: entry.strip() for entry in part.split("\n\n")}
        for row in rows:
            assert entries[row.name].splitlines()[0] == f"{row.name}: {row.summary}"
            told = " ".join(entries[row.name].split())
            assert row.paper in told
            assert all(parameter.only or parameter.name in told for parameter in row.parameters)
    assert "note:" not in shown


def test_the_list_tells_defaults_and_needs(capsys):
    assert main(["methods"]) == 0
    entries = {entry.split(":")[0]: entry for entry in capsys.readouterr().out.split("\n\n")}
    assert entries["dare_ties"].splitlines()[1:4] == [
        "  parameters  weight=1.0, normalize=false, lambda=1.0, density=1.0, rescale=true, trim_density=1.0,",
        "              trim_scope=tensor, sign_election=weighted",
        "  needs       a base model, 1 expert or more, a weight for each expert, given or drawn by mixup",
    ]
    assert "  parameters  t\n" in entries["slerp"]
    assert " 2 models, " in entries["slerp"]
    assert "  needs       a base model, 2 experts or more, no weights\n" in entries["model_stock"]


@pytest.mark.parametrize("width", [44, 60, 80])
def test_the_list_fits(width):
    assert [line for line in methods_lines(width) if len(line) > width] == []


@pytest.mark.parametrize("name", NAMES)
def test_explanations_fit(name):
    assert [line for line in method_lines(name, 80) if len(line) > 80] == []


@pytest.mark.parametrize("name", NAMES)
def test_one_is_explained(name, capsys):
    assert main(["methods", name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for row in (*METHODS, *SPARSIFIERS):
        if row.name == name:
            assert row.summary in shown
            assert row.paper in shown
            assert all(f" {p.name} " in shown and p.help in shown for p in row.parameters)
            assert not isinstance(row, MethodRow) or f"merged = {row.formula}" in shown


def test_parameters_are_told_with_default_range_and_level(capsys):
    assert main(["methods", "ties"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert " ".join(rows["density"].split()) == "density 1.0 0 to 1 each expert and tensor"
    assert rows["share"].endswith("keeps; one value for the merge with trim_scope: model")
    assert " ".join(rows["lambda"].split()) == "lambda 1.0 any number each tensor"
    assert " ".join(rows["trim_scope"].split()) == "trim_scope tensor tensor, model the merge"
    assert " ".join(rows["rescale"].split()) == "rescale false false only the merge"


def test_symbols_of_a_formula_are_told():
    lines = list(method_lines("model_stock"))
    assert "  p: the base; xᵢ: expert i; n: how many experts there are; θ: the angle between vectors" in lines


def test_a_sparsifier_is_not_an_experts(capsys):
    assert main(["methods", "magnitude"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "density must be given 0 to 1 each tensor share of entries that are kept; one value" in shown


@pytest.mark.parametrize("row", [*METHODS, *SPARSIFIERS], ids=lambda row: f"{type(row).__name__} {row.name}")
def test_examples_are_recipes(row):
    given = example(row)
    asked = Recipe.model_validate(yaml.safe_load(yaml.safe_dump(given)))
    if isinstance(row, MethodRow):
        assert asked.merge_method == row.name
    else:
        assert asked.sparsify is not None
        assert asked.sparsify.method == row.name


def test_examples_give_what_must_be_given():
    parameters = (
        Parameter("portion", "weights", "", None, low=0.1, level="expert"),
        Parameter("steps", "method.steps", "", None, low=1.0),
        Parameter("way", "method.way", "", None, "choice", choices=("up", "down")),
        Parameter("free", "method.free", "", None),
        Parameter("open", "method.open", "", None, "flag"),
        Parameter("kept", "method.kept", "", 3.0),
    )
    row = MethodRow("toy", "toy:toy", "", "", "", parameters, experts=(3, 3))
    given = example(row)
    assert [entry["parameters"]["portion"] for entry in given["models"]] == [0.5, 0.33, 0.17]
    assert given["parameters"] == {"steps": 1.0, "way": "up", "free": 1.0, "open": True}


def test_the_list_for_programs(capsys):
    assert main(["methods", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["methods"]] == [row.name for row in METHODS]
    assert [row["name"] for row in told["sparsifiers"]] == [row.name for row in SPARSIFIERS]
    assert told["problems"] == []
    slerp = next(row for row in told["methods"] if row["name"] == "slerp")
    assert slerp["experts"] == [2, 2]
    assert slerp["package"] is None
    assert slerp["parameters"] == [
        {
            "name": "t",
            "help": "position from the first model (0) to the second (1)",
            "kind": "number",
            "default": None,
            "low": 0.0,
            "high": 1.0,
            "choices": [],
            "level": "tensor",
        }
    ]


def test_one_for_programs(capsys):
    assert main(["methods", "della", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["name"] == "della"
    assert told["method"]["formula"].startswith("p + λ")
    assert told["method"]["example"]["merge_method"] == "della"
    assert told["sparsifier"]["example"]["sparsify"]["method"] == "della"
    weight = told["method"]["parameters"][0]
    assert (weight["name"], weight["low"], weight["high"]) == ("weight", None, None)
    assert main(["methods", "slerp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsifier"] is None


@pytest.mark.parametrize(
    ("name", "mend"),
    [("tise", "did you mean 'ties'?"), ("DELLA", "did you mean 'della'?"), ("%", "m3jax methods lists")],
)
def test_what_there_is_not(name, mend, capsys):
    assert main(["methods", name]) == 2
    assert f"m3jax: {name!r} is no merge method or sparsifier here: {mend}" in capsys.readouterr().err


def test_a_package_on_the_path_is_told(tmp_path):
    place = lay_out_toy(tmp_path / "site")
    paths = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "m3jax", "methods", "toy_clip"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    assert "  package     m3jax-toy 1.0\n" in done.stdout
    assert "portion    1.0      any number   each expert and tensor" in done.stdout
    assert "merge_method: toy_clip" in done.stdout
