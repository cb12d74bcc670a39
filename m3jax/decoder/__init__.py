"""A decoder in Flax NNX that runs merged language models, from disk or from memory."""

from m3jax.decoder.config import DecoderConfig, Rope
from m3jax.decoder.generation import (
    ApplyFn,
    Completion,
    LogLikelihood,
    Progress,
    generate,
    length_bucket,
    log_likelihoods,
)
from m3jax.decoder.modeling import PADDING, Cache, Decoder, KeyValue, Params, abstract_params, bind, random_params
from m3jax.decoder.params import load_params, params_from_tree

__all__ = [
    "PADDING",
    "ApplyFn",
    "Cache",
    "Completion",
    "Decoder",
    "DecoderConfig",
    "KeyValue",
    "LogLikelihood",
    "Params",
    "Progress",
    "Rope",
    "abstract_params",
    "bind",
    "generate",
    "length_bucket",
    "load_params",
    "log_likelihoods",
    "params_from_tree",
    "random_params",
]
