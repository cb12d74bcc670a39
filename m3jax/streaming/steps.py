"""Recipes that name runs of training, with the steps written out that are meant: what is merged, and recorded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from m3jax.checkpoints.locate import step_named
from m3jax.checkpoints.runs import chosen_steps, last_note, split_step
from m3jax.errors import M3Error
from m3jax.methods.schedules import schedule_weights
from m3jax.recipe import Recipe

_NAMING = ("base_model", "tokenizer_source", "tokenizer", "also_for")  # keys under which models are named

_Steps = Mapping[str, Sequence[str]]  # by what a recipe calls a model, what is read for it


def with_steps(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe in which each model that is a run says its step, and so do its other documents.

    `RUN` is the last step that was saved to its end, so that a replay of the merge takes the same when the run has gone
    on. `RUN@last:5` and `RUN@2000:10000:2000` become as many models, or sources of a slice; with a schedule they share
    the weight of the one. The last step may be that of a model's adapter, or of the model that it is added to.

    Args:
        recipe: As it was read.

    Returns:
        The recipe, and what a user should know: which steps were taken where the recipe left it open.

    Raises:
        M3Error: A run has no such step, or a schedule has no steps to weigh.
    """
    documents = {str(each.name) for each in recipe.intermediates}
    found = [_said(each, documents) for each in (recipe, *recipe.intermediates)]
    notes = tuple(dict.fromkeys(note for _, own in found for note in own))
    if not notes:
        return recipe, ()
    (output, _), *others = found
    output |= {"intermediates": [told for told, _ in others]} if others else {}
    return Recipe.model_validate(output), notes


def _said(recipe: Recipe, documents: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """One document with the steps that it means, as plain data, and what to say of them.

    Args:
        recipe: The document.
        documents: What others are called, which are no runs, whatever is here under their names.
    """
    steps = {name: _steps_of(name) for name in recipe.named_models if name not in documents}
    if recipe.schedule and not any(len(found) > 1 for found in steps.values()):
        raise M3Error("schedule: no model is several steps of a run: write such as RUN@last:5, or remove it")
    told = recipe.resolved()
    told.pop("intermediates", None)
    told.pop("schedule", None)
    for key in ("base_model", "tokenizer_source"):
        if told.get(key):
            _one(told[key], steps)
    single = {name: found[0] for name, found in steps.items() if len(found) == 1}
    named = {key: _with_names(told[key], single) for key in _NAMING if told.get(key)}
    changed = {**_with_entries(told, steps, (), recipe), **named}
    if told.get("modules"):
        levels = (told.get("parameters", {}),)
        changed["modules"] = {
            name: _with_entries(module, steps, levels, recipe) for name, module in told["modules"].items()
        }
    return changed, [note for name, found in steps.items() for note in _notes(name, found)]


def _steps_of(name: str) -> list[str]:
    """What is read for a model, the earliest step first."""
    said = split_step(name)
    if said is None or ":" not in said[1]:
        return [step_named(name)]
    return [f"{said[0]}@{step}" for step in chosen_steps(*said)]


def _notes(name: str, found: Sequence[str]) -> list[str]:
    if len(found) > 1:
        return [f"{name}: the steps {', '.join(each.rpartition('@')[2] for each in found)} are read"]
    return [last_note(name, found[0])] if found[0] != name else []


def _one(name: str, steps: _Steps) -> str:
    """What is read for a model that has to be one."""
    found = steps.get(name, [name])
    return found[0] if len(found) == 1 else step_named(name)  # which says that they are several


def _with_names(said: Any, names: Mapping[str, str]) -> Any:
    """Plain data with other names of models, as values."""
    if isinstance(said, Mapping):
        return {key: _with_names(value, names) for key, value in said.items()}
    if isinstance(said, list):
        return [_with_names(value, names) for value in said]
    return names.get(said, said) if isinstance(said, str) else said


def _with_entries(
    holder: Mapping[str, Any], steps: _Steps, levels: Sequence[Mapping[str, Any]], recipe: Recipe
) -> dict[str, Any]:
    """A recipe or a module with the steps that its models and the sources of its slices stand for.

    Args:
        holder: It, as plain data.
        steps: What is read for each model.
        levels: The parameters that hold for all of it beside its own, the first to decide first.
        recipe: What it is of.
    """
    changed = dict(holder)
    levels = (holder.get("parameters") or {}, *levels)
    if holder.get("models"):
        changed["models"] = _entries(holder["models"], steps, levels, recipe)
    if holder.get("slices"):
        changed["slices"] = [_slice(part, steps, levels, recipe) for part in holder["slices"]]
    return changed


def _slice(
    part: Mapping[str, Any], steps: _Steps, levels: Sequence[Mapping[str, Any]], recipe: Recipe
) -> dict[str, Any]:
    sources = _entries(part["sources"], steps, (part.get("parameters") or {}, *levels), recipe)
    base = {"base_model": _one(part["base_model"], steps)} if part.get("base_model") else {}
    return {**part, "sources": sources, **base}


def _entries(
    entries: Sequence[Mapping[str, Any]], steps: _Steps, levels: Sequence[Mapping[str, Any]], recipe: Recipe
) -> list[dict[str, Any]]:
    """Models or sources with the steps that they stand for, which share a weight where there is a schedule."""
    found = []
    for entry in entries:
        read = steps.get(entry["model"], [entry["model"]])
        own = entry.get("parameters") or {}
        shared: list[dict[str, float]] = [{}] * len(read)
        if recipe.schedule is not None and len(read) > 1:
            name = recipe.weight_name
            weight = next((level[name] for level in (own, *levels) if name in level), 1.0)
            if not isinstance(weight, int | float):
                raise M3Error(
                    f"schedule: the {name} of {entry['model']} is no number, which steps could share: write one"
                )
            shared = [{name: weight * share} for share in schedule_weights(recipe.schedule, len(read))]
        for step, share in zip(read, shared, strict=True):
            found.append({**entry, "model": step, **({"parameters": {**own, **share}} if own or share else {})})
    return found
