"""What a decoder is, read from a model's config.json."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from m3jax.checkpoints.storage import is_file
from m3jax.decoder.entries import Entries, read_json
from m3jax.decoder.families import FAMILIES, DecoderFamily, Experts, head_dim
from m3jax.decoder.rotary import Rope, read_rope
from m3jax.documents import FAULTS
from m3jax.errors import M3Error


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder from another; hashable, so that compiled functions are keyed by it.

    Attributes:
        architecture: Name of the model class, such as `LlamaForCausalLM`.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves `num_heads / num_kv_heads` query heads.
        head_dim: Width of a head.
        context_length: Positions that the model can see.
        windows: Per block, how many positions a query sees, itself included; `None` is all before it.
        ropes: Per block, its rotary position embedding; `None` rotates nothing.
        query_scale: Factor on attention scores.
        norm: `rms`: divided by the root mean square; `layer`: centred before, and with a bias.
        norm_eps: Added to the mean square, or to the variance, inside a norm's root.
        norm_offset: Added to a norm's weight (1 in Gemma).
        norm_places: Whether attention and feed-forward are normalised `before`, `behind` or `around`, which is both.
        activation: Of the feed-forward layer, a key of `modeling.ACTIVATIONS`.
        gated: Whether the feed-forward layer has a gate beside its up projection.
        experts: Feed-forward layers of which each token takes a few, if the model has such.
        sparse: Per block, whether it has experts in place of one feed-forward layer.
        parallel: Whether attention and feed-forward read the same and are added at once.
        learned_positions: Whether there is an embedding of positions.
        tie_embeddings: Whether the output layer is the embedding.
        qkv_bias: Whether query, key and value projections have a bias.
        output_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the feed-forward projections have one.
        qk_norm: Whether queries and keys are normalised: each `head`, or `all` at once.
        attention_sinks: Whether each head has a score that takes its share of attention and gives nothing.
        embedding_scale: Factor on embeddings.
        residual_scale: Factor on what a block adds to the residual stream.
        logit_scale: Factor on logits.
        attention_softcap: Bound c of attention scores, c·tanh(s/c); `None` is no bound.
        logit_softcap: The same of logits.
        stop_token_ids: Tokens that end a text.
        dtype: What the weights were trained in: `float32`, `bfloat16` or `float16`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    query_scale: float
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_places: Literal["before", "behind", "around"] = "before"
    activation: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    sparse: tuple[bool, ...] = ()
    parallel: bool = False
    learned_positions: bool = False
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    attention_sinks: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def turning_point(self) -> int | None:
        """Tokens above which a text is read in another way from its beginning (LongRoPE), if there is such a number."""
        return min((rope.original_context for rope in self.ropes if rope and rope.kind == "longrope"), default=None)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], where: str = "config.json") -> "DecoderConfig":
        """Reads the parsed config.json of a Hugging Face model, of transformers 4 or 5.

        Args:
            entries: The parsed file.
            where: What to call it in errors.

        Raises:
            M3Error: The architecture, a feature of it or an entry is unknown here, or a value is missing or impossible.

        Example:
            >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8)
            >>> counts = dict(num_hidden_layers=1, num_attention_heads=2)
            >>> DecoderConfig.from_dict({"model_type": "llama", **sizes, **counts}).head_dim
            2
        """
        try:
            return _from_dict(entries, where)
        except FAULTS as error:  # a kind of value that no entry of any model has
            said = str(error) or type(error).__name__
            raise M3Error(f"{where} has an impossible value ({said}): get the file again from its source.") from error

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> "DecoderConfig":
        """Reads config.json of a model directory, and the stop tokens of its generation_config.json.

        Args:
            directory: The model directory.

        Raises:
            M3Error: The file is absent or damaged, or says what `from_dict` does not know.
        """
        path = Path(directory) / "config.json"
        config = cls.from_dict(read_json(path), str(path))
        generation = path.with_name("generation_config.json")
        if not is_file(generation):
            return config
        stops = _token_ids(Entries(read_json(generation), str(generation)))
        return dataclasses.replace(config, stop_token_ids=tuple(sorted({*config.stop_token_ids, *stops})))


# Several names for one function.
_ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_pytorch_tanh",
        "gelu_new": "gelu_pytorch_tanh",
        "gelu_fast": "gelu_pytorch_tanh",
    }
)
_MOST_LAYERS = 10_000
_DTYPES = ("float32", "bfloat16", "float16")


def _from_dict(stated: Mapping[str, Any], where: str) -> DecoderConfig:
    """The configuration of one of the known families."""
    family = _family(Entries(stated, where))
    entries = Entries(stated, where, family.names, family.defaults)
    if entries.get("quantization_config") is not None:
        raise entries.error("is of a quantized model", "dequantize it first")
    entries.refuse("is_encoder_decoder", False, "the decoder reads one text only")
    entries.get("is_decoder")  # said of GPT-NeoX, either way
    layers, heads, width = entries.count("num_hidden_layers"), entries.count("num_attention_heads"), head_dim(entries)
    if layers > _MOST_LAYERS:  # before there is anything for each of them
        raise entries.error(f"has {layers:,} layers, more than any model", "get the file from its source")
    features = family.read(entries)
    if "ropes" not in features:
        features["ropes"] = (read_rope(entries, width),) * layers
    if "intermediate_size" not in features:
        features["intermediate_size"] = entries.count("intermediate_size")
    context = entries.count("max_position_embeddings", 2048)
    dtype = str(entries.get("dtype", entries.get("torch_dtype", "float32"))).removeprefix("torch.")
    common = {
        "architecture": family.architecture,
        "vocab_size": entries.count("vocab_size"),
        "hidden_size": entries.count("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": entries.count("num_key_value_heads", heads),
        "head_dim": width,
        "context_length": max(context, *(rope.context for rope in features["ropes"] if rope), 0),
        "windows": (None,) * layers,
        "sparse": (False,) * layers,
        "query_scale": width**-0.5,
        "norm_eps": entries.number("norm_eps", 1e-6),
        "activation": entries.get("hidden_act", "silu"),
        "tie_embeddings": entries.flag("tie_word_embeddings"),
        "stop_token_ids": _token_ids(entries),
        "dtype": dtype,
    }
    config = DecoderConfig(**common | features)
    _check(config, entries)
    entries.refuse_unread(family.architecture)
    return dataclasses.replace(config, activation=_ACTIVATIONS[config.activation])


def _family(entries: Entries) -> DecoderFamily:
    """The row of the table that a file asks for."""
    kind, classes = entries.get("model_type"), entries.get("architectures", [])
    family = FAMILIES.get(str(kind))
    if family is None or (classes and family.architecture not in classes):
        found = ", ".join(map(str, classes)) or kind or "no architecture"
        known = ", ".join(sorted(family.architecture for family in FAMILIES.values()))
        raise entries.error(
            f"names {found}, which the decoder does not know",
            f"it runs {known}; a model of another kind can be evaluated in Python, with m3jax.evaluate(…, apply_fn=…)",
        )
    return family


def _check(config: DecoderConfig, entries: Entries) -> None:
    """Checks what no single entry shows."""
    if config.num_heads % config.num_kv_heads:
        fault = f"has {config.num_heads} heads for {config.num_kv_heads} key-value heads"
        raise entries.error(fault, "the first must be a multiple of the second")
    if config.experts is not None and config.experts.active > config.experts.number:
        fault = f"gives each token {config.experts.active} of {config.experts.number} experts"
        raise entries.error(fault, "there must be as many")
    for what, value, known in (("activation", config.activation, (*_ACTIVATIONS,)), ("dtype", config.dtype, _DTYPES)):
        if value not in known:
            raise entries.error(f"has the unknown {what} {value!r}", f"the decoder knows {', '.join(known)}")


def _token_ids(entries: Entries) -> tuple[int, ...]:
    """The end-of-text tokens: one, several or none."""
    stated = entries.get("eos_token_id", [])
    ids = stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise entries.error(f"has eos_token_id {stated!r}, not a token id", "get the file from its source")
    return tuple(ids)
