"""Recipes to start from, and the schema by which editors read recipes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from m3jax.cli.commands import app
from m3jax.cli.shell import main
from m3jax.errors import M3Error
from m3jax.methods.catalogue import METHODS
from m3jax.recipe import Recipe, load_recipe
from m3jax.recipe.editors import recipe_schema
from m3jax.recipe.starting import new_recipe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
SCHEMA = recipe_schema()


def fits(schema, value):
    """Whether a value is what a JSON schema says, as far as ours says anything."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = SCHEMA
        for step in schema["$ref"].split("/")[1:]:
            target = target[step]
        schema = target | {key: told for key, told in schema.items() if key != "$ref"}
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    if "type" in schema:
        is_flag = isinstance(value, bool)
        right = is_flag if schema["type"] == "boolean" else not is_flag and isinstance(value, kinds[schema["type"]])
        if not right:
            return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    if "minimum" in schema and value < schema["minimum"]:
        return False
    for key in {"allOf", "anyOf", "oneOf"} & schema.keys():
        found = [fits(each, value) for each in schema[key]]
        if not {"allOf": all(found), "anyOf": any(found), "oneOf": sum(found) == 1}[key]:
            return False
    if "if" in schema and fits(schema["if"], value) and not fits(schema["then"], value):
        return False
    if isinstance(value, list):
        length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return length and all(fits(schema.get("items", True), each) for each in value)
    if not isinstance(value, dict):
        return True
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    there = all(key in value for key in schema.get("required", ()))
    return there and all(fits(known.get(key, rest), each) for key, each in value.items())


@pytest.mark.parametrize("method", [row.name for row in METHODS])
def test_what_is_new_can_be_read_and_fits_the_schema(method, tmp_path):
    text = new_recipe(method)
    (tmp_path / "new.yaml").write_text(text)
    assert load_recipe(tmp_path / "new.yaml").merge_method == method
    assert fits(SCHEMA, yaml.safe_load(text))
    keys = r"^( *)# (?=(?:parameters|mixup|sparsify|tokenizer_source|exclude):)"
    lines = [re.sub(keys, r"\1", line) for line in text.splitlines()]
    if "mixup: {alpha: 0.5}" in text:
        lines = [line for line in lines if not line.strip().startswith(("weight:", "t:", "parameters: {"))]
    uncommented = yaml.safe_load("\n".join(lines))
    assert fits(SCHEMA, uncommented)
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(uncommented))
    load_recipe(tmp_path / "new.yaml")


def test_the_schema_has_every_key_and_takes_every_config():
    assert set(SCHEMA["properties"]) >= set(Recipe.model_fields)
    json.dumps(SCHEMA, allow_nan=False)
    assert CONFIGS
    for path in CONFIGS:
        assert all(fits(SCHEMA, document) for document in yaml.safe_load_all(path.read_text())), path
    sliced = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}
    assert fits(SCHEMA, sliced)
    assert fits(SCHEMA, load_recipe(sliced).resolved())


def test_the_schema_says_what_every_key_does():
    def silent(told, place=""):
        if isinstance(told, dict):
            for name, each in told.get("properties", {}).items():
                is_name = name in (
                    "method",
                    "kind",
                    "model",
                    "token",
                    "token_id",
                    "decay",
                )  # of what says it around them
                if isinstance(each, dict) and not (each.get("description") or is_name or each.keys() == {"const"}):
                    yield f"{place}.{name}"
            for key, each in told.items():
                yield from silent(each, f"{place}.{key}")
        elif isinstance(told, list):
            for each in told:
                yield from silent(each, place)

    assert list(silent({key: told for key, told in SCHEMA.items() if key != "allOf"})) == []
    defaults = {name: told["default"] for name, told in SCHEMA["properties"].items() if "default" in told}
    assert defaults == {"seed": 0, "dequantize": False}
    assert SCHEMA["$defs"]["mixup"]["properties"]["granularity"]["default"] == "model"


@pytest.mark.parametrize(
    "wrong",
    [
        {"merge_method": "tise", "models": ["a"]},
        {"merge_method": "ties", "models": ["a"], "slices": []},
        {"merge_method": "ties", "models": ["a"], "sede": 1},
        {"merge_method": "dare_ties", "models": ["a"], "seeds": 7},
        {"merge_method": "ties", "models": [{"model": "a", "paramters": {}}]},
        {"merge_method": "ties", "models": ["a"], "parameters": {"denisty": 1}},
        {"merge_method": "linear", "models": ["a"], "parameters": {"trim_scope": "model"}},
        {"merge_method": "ties", "models": ["a"], "parameters": {"trim_scope": "layer"}},
        {"merge_method": "ties", "models": ["a"], "sparsify": {"method": "dare"}},
        {"merge_method": "ties", "models": ["a"], "mixup": {"alpha": 1, "granularity": "block"}},
        {"merge_method": "ties", "slices": [{"sources": [{"model": "a", "layer_range": [0]}]}]},
    ],
)
def test_the_schema_knows_mistakes(wrong):
    assert not fits(SCHEMA, wrong)
    with pytest.raises(M3Error):
        load_recipe(wrong)


def test_the_schema_knows_seeds():
    for seeds in ("0..31", [0, 3], ["0..7", 12]):
        recipe = {"merge_method": "linear", "models": ["a", "b"], "mixup": {"alpha": 1}, "seeds": seeds}
        assert fits(SCHEMA, recipe)
        assert len(load_recipe(recipe).by_seed()) > 1


def test_the_commands(capsys, tmp_path):
    assert main(app, ["recipe", "new", "dare_ties"]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert main(app, ["recipe", "check", str(tmp_path / "recipe.yaml"), "--seed", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == ["org/base", "org/expert-a", "org/expert-b"]
    assert told["recipe"]["seed"] == 3
    assert main(app, ["recipe", "check", str(tmp_path / "recipe.yaml"), "--set", "sede=3"]) == 2
    assert "sede: unknown key; did you mean 'seed'?" in capsys.readouterr().err
    assert main(app, ["recipe", "new", "tise"]) == 2
    assert "METHOD: 'tise' is not here; did you mean 'ties'?" in capsys.readouterr().err
    assert main(app, ["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
