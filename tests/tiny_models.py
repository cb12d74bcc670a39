"""A base and two experts with a tokenizer, as model directories of a few hundred kilobytes."""

from pathlib import Path

import jax

from m3jax import decoder
from m3jax.decoder import DecoderConfig
from m3jax.laboratory.models import save_model
from m3jax.laboratory.training import Size, make_config, make_tokenizer

MODELS = ("base", "expert-a", "expert-b")
TINY = Size(hidden=32, layers=2, heads=4, vocabulary=320)
_TEXT = "Merging asks whether the skills of several experts can live in one model. Is it good or bad, right or wrong?"


def build_models(directory: Path, size: Size = TINY) -> None:
    """Writes three models into a directory, untrained but near each other, the same on every call."""
    tokenizer = make_tokenizer([_TEXT], size.vocabulary)
    entries = {**make_config(size), "torch_dtype": "bfloat16"}
    config = DecoderConfig.from_dict(entries)
    base = decoder.random_params(config, 0)
    for number, name in enumerate(MODELS):
        step = decoder.random_params(config, number)
        params = base if number == 0 else jax.tree.map(lambda p, d: p + 0.3 * d, base, step)
        params = jax.tree.map(lambda p: p.astype("bfloat16"), params)
        save_model(directory / name, params, config, entries, tokenizer)
