"""config.json of a model whose layers were selected from others, or whose head stands for itself."""

from collections.abc import Sequence
from typing import Any

from m3jax.errors import M3Error

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")


def with_layers(config: dict[str, Any], picked: Sequence[int]) -> dict[str, Any]:
    """The config of a model that has some of another's layers.

    The count of layers follows, and so do lists with an entry for each layer (such as `layer_types`).

    Args:
        config: Of the model that it is taken from, perhaps with the language model's part under `text_config`.
        picked: For each layer of the new model, which layer of the old one its entry is taken from.

    Raises:
        M3Error: The config does not say how many layers there are, or has fewer entries than that.

    Example:
        >>> with_layers({"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}, [0, 1, 1])
        {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding']}
    """
    key = next((key for key in _COUNTS if isinstance(config.get(key), int)), None)
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
