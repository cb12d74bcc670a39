"""Recipes that name runs of training, with the steps written out that are meant: what is merged, and recorded."""

from collections.abc import Iterable, Mapping
from typing import Any

from m3jax.checkpoints.runs import chosen_steps, last_note, split_step, step_name
from m3jax.errors import M3Error
from m3jax.methods.schedules import schedule_weights
from m3jax.recipe import Recipe

_NAMING = ("base_model", "tokenizer_source", "tokenizer", "also_for")  # keys under which models are named


def with_steps(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe in which each model that is a run says its step.

    `RUN` is the last step that was saved to its end, so that a replay of the merge takes the same when the run has gone
    on. `RUN@last:5` and `RUN@2000:10000:2000` become as many models; with a schedule they share the weight of the one.

    Args:
        recipe: As it was read.

    Returns:
        The recipe, and what a user should know: which steps were taken where the recipe left it open.

    Raises:
        M3Error: A run has no such step, or a schedule has no steps to weigh.
    """
    told = recipe.resolved()
    names = {name: step_name(name) for name in _single_names(told)}
    models = [(entry["model"], _entries(entry, recipe)) for entry in told.get("models", ())]
    if recipe.schedule and not any(len(found) > 1 for _, found in models):
        raise M3Error("schedule: no model is several steps of a run: write such as RUN@last:5, or remove it")
    notes = [last_note(name, step) for name, step in names.items() if name != step]
    for name, found in models:
        if len(found) > 1:
            notes.append(f"{name}: the steps {', '.join(each['model'].rpartition('@')[2] for each in found)} are read")
        elif found[0]["model"] != name:
            notes.append(last_note(name, found[0]["model"]))
    if not notes:
        return recipe, ()
    single = {name: found[0]["model"] for name, found in models if len(found) == 1}
    changed = {**told, **_renamed(told, single | names)}
    if "models" in told:
        changed["models"] = [entry for _, found in models for entry in found]
    changed.pop("schedule", None)
    return Recipe.model_validate(changed), tuple(dict.fromkeys(notes))


def _single_names(told: Mapping[str, Any]) -> Iterable[str]:
    """The models of a recipe that are one each: the base, and the sources of slices."""
    if told.get("base_model"):
        yield told["base_model"]
    for part in told.get("slices", None) or ():
        yield from (source["model"] for source in part["sources"])


def _renamed(told: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What names models beside `models`, with the names that they now have."""
    changed = {key: _with_names(told[key], names) for key in _NAMING if told.get(key)}
    if told.get("slices"):
        changed["slices"] = [
            {**part, "sources": [{**source, "model": names[source["model"]]} for source in part["sources"]]}
            for part in told["slices"]
        ]
    return changed


def _with_names(said: Any, names: Mapping[str, str]) -> Any:
    """Plain data with other names of models, as values."""
    if isinstance(said, Mapping):
        return {key: _with_names(value, names) for key, value in said.items()}
    if isinstance(said, list):
        return [_with_names(value, names) for value in said]
    return names.get(said, said) if isinstance(said, str) else said


def _entries(entry: Mapping[str, Any], recipe: Recipe) -> list[dict[str, Any]]:
    """The models that an entry of `models` stands for, the earliest step first."""
    name = entry["model"]
    said = split_step(name)
    if said is None or ":" not in said[1]:
        return [{**entry, "model": step_name(name)}]
    steps = chosen_steps(*said)
    found = [{**entry, "model": f"{said[0]}@{step}"} for step in steps]
    if recipe.schedule is None:
        return found
    parameter = recipe.weight_name
    own = entry.get("parameters", {}).get(parameter, recipe.parameters.get(parameter, 1.0))
    if not isinstance(own, int | float):
        raise M3Error(f"schedule: the {parameter} of {name} is no number, which steps could share: write one")
    shares = schedule_weights(recipe.schedule, len(steps))
    return [
        {**each, "parameters": {**entry.get("parameters", {}), parameter: own * share}}
        for each, share in zip(found, shares, strict=True)
    ]
