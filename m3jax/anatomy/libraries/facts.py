"""What config.json says of a model, as far as the layouts of libraries depend on it."""

from collections.abc import Collection, Mapping
from typing import Any

from m3jax.anatomy.families import family_of
from m3jax.anatomy.libraries.mapping import Facts
from m3jax.errors import M3Error

_WIDTHS = frozenset({"llama", "mistral", "mixtral", "qwen2"})  # whose heads share the width where nothing is said
_LATENT = frozenset({"deepseek_v2", "deepseek_v3"})  # whose heads have parts of several widths
_MOST = 2**20  # blocks, or experts of all blocks: more than any model has, and few enough to be listed
_SIZES = {
    "width": ("hidden_size",),
    "inner": ("intermediate_size",),
    "vocab": ("vocab_size",),
    "heads": ("num_attention_heads",),
    "kv": ("num_key_value_heads", "num_attention_heads"),
    "expert": ("num_local_experts", "num_experts", "n_routed_experts"),
}
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def read_facts(config: Mapping[str, Any], models: Collection[str], called: str, library: str) -> Facts:
    """Reads a configuration.

    Args:
        config: What config.json says.
        models: The architectures that are known.
        called: What sentences call the model.
        library: The library whose layout is wanted.

    Raises:
        M3Error: It is of another architecture, or a number that decides the layout is absent or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in models:
        raise M3Error(
            f"{called}: model_type is {model_type!r} in its config.json, whose layout in {library} is not known here:"
            f" known are {', '.join(models)}"
        )
    absent = [key for key in _NEEDED if config.get(key) is None]
    if absent:
        raise M3Error(f"{called}: its config.json does not say {' and '.join(absent)}: give the whole config.json")
    sizes = {}
    for name, keys in _SIZES.items():
        key = next((key for key in keys if config.get(key) is not None), None)
        if key is not None:
            sizes[name] = _count(config, key, called)
    if sizes["heads"] % sizes["kv"]:
        raise M3Error(
            f"{called}: num_attention_heads, {sizes['heads']}, is not divided by num_key_value_heads, {sizes['kv']}:"
            " correct its config.json"
        )
    if model_type not in _LATENT:
        sizes |= _head_sizes(config, str(model_type), sizes, called)
    layers = _count(config, "num_hidden_layers", called)
    if layers * sizes.get("expert", 1) > _MOST:
        raise M3Error(
            f"{called}: num_hidden_layers is {layers:.3g} in its config.json, of {sizes.get('expert', 1):.3g} experts"
            " each, which is more than any model has: correct it"
        )
    tied = config.get("tie_word_embeddings")
    return Facts(
        str(model_type),
        layers,
        sizes,
        bool(family_of(model_type).ties if tied is None else tied),
        config,
    )


def _head_sizes(config: Mapping[str, Any], model_type: str, sizes: Mapping[str, int], called: str) -> dict[str, int]:
    """The width of a head, and of its halves."""
    if config.get("head_dim") is not None:
        dim = _count(config, "head_dim", called)
    elif model_type not in _WIDTHS:
        raise M3Error(f"{called}: its config.json does not say head_dim: give the whole config.json")
    elif sizes["width"] % sizes["heads"]:
        raise M3Error(
            f"{called}: hidden_size, {sizes['width']}, is not divided by num_attention_heads, {sizes['heads']}:"
            " correct its config.json, or say head_dim in it"
        )
    else:
        dim = sizes["width"] // sizes["heads"]
    return {"dim": dim, "half": dim // 2, "pair": 2}


def _count(config: Mapping[str, Any], key: str, called: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise M3Error(f"{called}: {key} is {value!r:.50} in its config.json, but must be a whole number: correct it")
    return value
