"""config.json of a model whose layers were selected from others, or whose head stands for itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.anatomy.modules import REST, tower_called
from m3jax.errors import M3Error

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")


def with_layers(config: dict[str, Any], picked: Sequence[int], *further: str) -> dict[str, Any]:
    """The config of a model that has some of another's layers.

    The count of layers follows, and so do lists with an entry for each layer (such as `layer_types`).

    Args:
        config: Of the model that it is taken from, perhaps with the language model's part under `text_config`.
        picked: For each layer of the new model, which layer of the old one its entry is taken from.
        *further: Keys that may hold the count beside the usual ones.

    Raises:
        M3Error: The config does not say how many layers there are, or has fewer entries than that.

    Example:
        >>> with_layers({"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}, [0, 1, 1])
        {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding']}
    """
    key = next((key for key in (*_COUNTS, *further) if isinstance(config.get(key), int)), None)
    if key is None:
        if isinstance(config.get("text_config"), dict):
            return {**config, "text_config": with_layers(config["text_config"], picked)}
        raise M3Error(
            f"config.json says under none of {', '.join(_COUNTS)} how many layers there are, so that of stacked layers "
            "cannot be written: add the key"
        )
    depth, changed = config[key], {}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == depth and name.startswith(("layer", "attention_layers", "block")):
            if max(picked, default=0) >= depth:
                raise M3Error(f"config.json: {name} has {depth} entries, but layer {max(picked)} is selected: mend it")
            changed[name] = [value[layer] for layer in picked]
    return {**config, **changed, key: len(picked)}


_VISION = "vision_config"


def with_module_layers(config: dict[str, Any], picked: Mapping[str | None, Sequence[int]]) -> dict[str, Any]:
    """The config of a model that has some of another's layers in one or several of its modules.

    Args:
        config: Of the model that it is taken from.
        picked: As `with_layers` takes it, by the module's name in the recipe, or None for the whole model.

    Raises:
        M3Error: The module is one whose layers config.json tells otherwise than `with_layers` knows.

    Example:
        >>> with_module_layers({"num_layers": 4, "vision_config": {"depth": 2}}, {"vision_tower": [0, 0, 1]})
        {'num_layers': 4, 'vision_config': {'depth': 3}}
    """
    for module, layers in picked.items():
        tower = None if module is None else tower_called(module)
        inner = config.get(_VISION)
        if tower in (None, "text", "model", REST):
            config = with_layers(config, layers)
        elif tower == "vision" and isinstance(inner, dict):
            config = {**config, _VISION: with_layers(inner, layers, "depth")}
        else:
            raise M3Error(
                f"modules: {module}: which key of config.json counts its layers is known for text and vision only: give"
                " its models in place of slices"
            )
    return config


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model whose output embedding is a tensor of its own.

    Example:
        >>> untied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}})
        {'tie_word_embeddings': False, 'text_config': {'tie_word_embeddings': False}}
    """
    inner = config.get("text_config")
    found = {**config, "tie_word_embeddings": False}
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        found["text_config"] = {**inner, "tie_word_embeddings": False}
    return found
