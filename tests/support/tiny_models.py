"""A base and two experts with a tokenizer, as model directories of a few hundred kilobytes."""

from pathlib import Path
from typing import Any

import jax

from m3jax import decoder
from m3jax.decoder import DecoderConfig
from m3jax.laboratory.models import save_model
from m3jax.laboratory.training import Size, make_config, make_tokenizer

MODELS = ("base", "expert-a", "expert-b")
TINY = Size(hidden=32, layers=2, heads=4, vocabulary=320)
_TEXT = " positive negative" * 3 + " Merging asks whether the skills of several experts can live in one model."


def _random(config: DecoderConfig, seed: int) -> dict[str, Any]:
    """Blocks that outweigh the embedding, so that the model says more than its input's last token."""
    params = decoder.random_params(config, seed)
    return {**params, "layers": jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p, params["layers"])}


def build_models(directory: Path, size: Size = TINY) -> None:
    """Writes three models into a directory, untrained and unlike, the same on every call."""
    tokenizer = make_tokenizer([_TEXT], size.vocabulary)
    entries = {**make_config(size), "torch_dtype": "bfloat16"}
    config = DecoderConfig.from_dict(entries)
    for seed, name in enumerate(MODELS):
        params = jax.tree.map(lambda p: p.astype("bfloat16"), _random(config, seed))
        save_model(directory / name, params, config, entries, tokenizer)
