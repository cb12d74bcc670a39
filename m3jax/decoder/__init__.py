"""A decoder in Flax NNX that runs merged language models, from disk or from memory."""

from m3jax.decoder.batching import DecoderProgress, length_bucket
from m3jax.decoder.cache import PADDING, Cache, KeyValue
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.families import Experts
from m3jax.decoder.generation import Continuation, generate
from m3jax.decoder.modeling import Decoder, Params, abstract_params, bind, random_params
from m3jax.decoder.params import load_params, params_from_tree
from m3jax.decoder.prefixes import Prefix, common_prefix, make_prefix, read_behind
from m3jax.decoder.rotary import Rope
from m3jax.decoder.running import ApplyFn
from m3jax.decoder.scoring import Likelihood, log_likelihoods
from m3jax.decoder.texts import check_vocabulary, detokenizer, encode, prompt_room

__all__ = [
    "PADDING",
    "ApplyFn",
    "Cache",
    "Continuation",
    "Decoder",
    "DecoderConfig",
    "DecoderProgress",
    "Experts",
    "KeyValue",
    "Likelihood",
    "Params",
    "Prefix",
    "Rope",
    "abstract_params",
    "bind",
    "check_vocabulary",
    "common_prefix",
    "detokenizer",
    "encode",
    "generate",
    "length_bucket",
    "load_params",
    "log_likelihoods",
    "make_prefix",
    "params_from_tree",
    "prompt_room",
    "random_params",
    "read_behind",
]
