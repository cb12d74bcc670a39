"""The recipes of the paper's experiments: all of them, each what its name says."""

import itertools
from pathlib import Path

import pytest

from m3jax.recipe import load_recipe

PLACE = Path(__file__).parents[2] / "configs" / "paper"
MODELS = {
    "lm": "WizardLMTeam/WizardLM-13B-V1.2",
    "math": "WizardLMTeam/WizardMath-13B-V1.0",
    "code": "layoric/llama-2-13b-code-alpaca",
}
METHODS = {"average": "linear", "task_arithmetic": "task_arithmetic", "ties": "ties"}
GRID = {
    f"{a}-{b}_{method}" + "_m3" * mixup + "_dare" * dare: (a, b, method, mixup, dare)
    for (a, b), method, mixup, dare in itertools.product(
        itertools.combinations(MODELS, 2), METHODS, (False, True), (False, True)
    )
}


def test_every_experiment_has_its_recipe():
    assert {path.stem for path in PLACE.glob("*.yaml")} == set(GRID)
    assert len(GRID) == 36
    recipes = {name: load_recipe(PLACE / f"{name}.yaml") for name in GRID}
    assert len({recipe.name for recipe in recipes.values()}) == 36
    assert len({str(recipe.resolved() | {"name": ""}) for recipe in recipes.values()}) == 36


@pytest.mark.parametrize("name", GRID)
def test_a_recipe_is_what_its_name_says(name):
    a, b, method, mixup, dare = GRID[name]
    recipe = load_recipe(PLACE / f"{name}.yaml")
    assert recipe.merge_method == METHODS[method]
    assert recipe.base_model == "meta-llama/Llama-2-13b-hf"
    assert [entry.model for entry in recipe.experts] == [MODELS[a], MODELS[b]]
    assert (recipe.mixup is not None) == mixup
    assert recipe.mixup is None or (recipe.mixup.alpha, recipe.mixup.granularity) == (0.5, "model")
    assert (recipe.sparsify is not None) == dare
    if recipe.sparsify is not None:
        assert (recipe.sparsify.method, recipe.sparsify.parameters["density"]) == ("dare", 0.8)
        assert (recipe.sparsify.target, recipe.sparsify.parameters["rescale"]) == ("delta", True)
    if method == "ties":
        wanted = {
            "density": 0.5,
            "trim_scope": "model",
            "sign_election": "unweighted",
            "normalize": True,
            "lambda": 1.0,
        }
        assert wanted.items() <= recipe.parameters.items()
    assert recipe.uses_base == (dare or method != "average")
    assert recipe.output_dtype == "float16"
    assert recipe.tokenizer_source == "union"
    assert recipe.notes() == ()
