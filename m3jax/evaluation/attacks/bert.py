"""BERT in Flax NNX, read from Hugging Face's safetensors: bare, with its masked language model head, or as a tagger.

References:
    Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, 2019.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from m3jax.checkpoints import companions, locate_model, open_safetensors
from m3jax.checkpoints.protocol import DTYPES, Checkpoint
from m3jax.decoder.entries import Entries, read_json
from m3jax.decoder.modeling import ACTIVATIONS, Linear
from m3jax.errors import M3Error
from m3jax.evaluation.tokens import load_tokenizer

Params: TypeAlias = Mapping[Any, Any]

_ACTIVATIONS = MappingProxyType(
    {"gelu": ACTIVATIONS["gelu"], "gelu_new": ACTIVATIONS["gelu_pytorch_tanh"], "relu": jax.nn.relu}
)
_SIZES = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "context_length": "max_position_embeddings",
        "num_types": "type_vocab_size",
    }
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """What one BERT is; hashable, so that compiled functions are keyed by it.

    Attributes:
        vocab_size: Rows of the word embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_layers: Blocks.
        num_heads: Heads of a block.
        context_length: Positions that it can see.
        num_types: Rows of the token type embedding.
        activation: Of the feed-forward layer and the head: gelu, gelu_new or relu.
        norm_eps: Added to the variance inside a norm's root.
        labels: What a tagger's classes are called, in their order.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    context_length: int = 512
    num_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    labels: tuple[str, ...] = ()

    @classmethod
    def from_directory(cls, directory: Path) -> "BertConfig":
        """Reads config.json of a model directory.

        Raises:
            M3Error: It is absent or damaged, or the model is no BERT.
        """
        path = directory / "config.json"
        entries = Entries(read_json(path), f"{path}")
        kind = entries.get("model_type")
        if kind != "bert":
            raise M3Error(f"{path}: the model is of type {brief(kind)}: give the directory of a BERT.")
        sizes = {own: entries.count(name) for own, name in _SIZES.items()}
        if sizes["hidden_size"] % sizes["num_heads"]:
            raise entries.error(
                "has a hidden_size that its num_attention_heads do not divide", "get it from its source"
            )
        activation = entries.get("hidden_act", "gelu")
        if activation not in list(_ACTIVATIONS) or entries.get("position_embedding_type", "absolute") != "absolute":
            raise M3Error(f"{path}: only absolute positions and {', '.join(_ACTIVATIONS)} are known here.")
        named = entries.get("id2label", {})
        if not isinstance(named, dict) or not all(str(place) in named for place in range(len(named))):
            raise M3Error(f"{path}: id2label cannot be so: it should name classes from 0 on; get it from its source.")
        labels = tuple(str(named[str(place)]) for place in range(len(named)))
        epsilon = entries.number("layer_norm_eps", 1e-12)
        return cls(**sizes, activation=activation, norm_eps=epsilon, labels=labels)


class _Norm(nnx.Module):
    """Layer norm, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normal = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return normal * self.weight[...][None, None] + self.bias[...][None, None]


class _Block(nnx.Module):
    """Attention, then feed-forward, each added and normalised behind."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        width, heads = config.hidden_size, (config.num_heads, config.hidden_size // config.num_heads)
        self.query, self.key, self.value = (Linear(heads, (width,), True, jnp.float32, rngs) for _ in range(3))
        self.output = Linear((width,), heads, True, jnp.float32, rngs)
        self.attention_norm = _Norm(width, config.norm_eps)
        self.up = Linear((config.intermediate_size,), (width,), True, jnp.float32, rngs)
        self.down = Linear((width,), (config.intermediate_size,), True, jnp.float32, rngs)
        self.norm = _Norm(width, config.norm_eps)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "batch length width"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch length width"]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=lax.Precision.HIGHEST)
        seen = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        scores = jnp.where(seen[:, None, None, :], scores / np.float32(np.sqrt(query.shape[-1])), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=lax.Precision.HIGHEST)
        x = self.attention_norm(x + self.output(mixed))
        return self.norm(x + self.down(_ACTIVATIONS[self.activation](self.up(x))))


class Encoder(nnx.Module):
    """A bare BERT: what it makes of each token of a text."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Draws random weights, float32."""
        width = (config.hidden_size,)
        self.words, self.positions, self.types = (
            Linear((rows,), width, False, jnp.float32, rngs)
            for rows in (config.vocab_size, config.context_length, config.num_types)
        )
        self.norm = _Norm(config.hidden_size, config.norm_eps)
        self.layers = nnx.List([_Block(config, rngs) for _ in range(config.num_layers)])

    def hidden(
        self, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch length width"]:
        """The last layer's output, float32; what is returned behind a text's end has no meaning.

        Args:
            tokens: Token ids, padded on the right.
            lengths: How many of them each row has.
        """
        places = self.positions.weight[...][None, : tokens.shape[1]] + self.types.weight[...][None, :1]
        x = self.norm(self.words.weight[...][tokens] + places)
        for layer in self.layers:
            x = layer(x, lengths)
        return x


class Tagger(Encoder):
    """A BERT that says of which class each token is."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Draws random weights, float32."""
        super().__init__(config, rngs=rngs)
        self.classifier = Linear((len(config.labels),), (config.hidden_size,), True, jnp.float32, rngs)


class Bert(Encoder):
    """A BERT that says which words may stand in each place of a text."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Draws random weights, float32."""
        super().__init__(config, rngs=rngs)
        width = (config.hidden_size,)
        self.transform = Linear(width, width, True, jnp.float32, rngs)
        self.transform_norm = _Norm(config.hidden_size, config.norm_eps)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))
        self.activation = config.activation

    def __call__(
        self, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch length vocab"]:
        """Scores of every word in every place.

        Args:
            tokens: Token ids, padded on the right.
            lengths: How many of them each row has.

        Returns:
            Logits, float32; what is returned behind a text's end has no meaning.
        """
        x = self.hidden(tokens, lengths)
        x = self.transform_norm(_ACTIVATIONS[self.activation](self.transform(x)))
        scores = jnp.einsum("blw,vw->blv", x, self.words.weight[...], precision=lax.Precision.HIGHEST)
        return scores + self.bias[...][None, None]


# --- Weights -----------------------------------------------------------------------------------------------------

# Old checkpoints call a norm's weight gamma and its bias beta.
_KINDS = MappingProxyType({"weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"})
_PARTS = MappingProxyType(
    {
        r"bert\.embeddings\.word_embeddings": "words",
        r"bert\.embeddings\.position_embeddings": "positions",
        r"bert\.embeddings\.token_type_embeddings": "types",
        r"bert\.embeddings\.LayerNorm": "norm",
        r"bert\.encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)": r"layers.\1.\2",
        r"bert\.encoder\.layer\.(\d+)\.attention\.output\.dense": r"layers.\1.output",
        r"bert\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": r"layers.\1.attention_norm",
        r"bert\.encoder\.layer\.(\d+)\.intermediate\.dense": r"layers.\1.up",
        r"bert\.encoder\.layer\.(\d+)\.output\.dense": r"layers.\1.down",
        r"bert\.encoder\.layer\.(\d+)\.output\.LayerNorm": r"layers.\1.norm",
        r"classifier": "classifier",
        r"cls\.predictions\.transform\.dense": "transform",
        r"cls\.predictions\.transform\.LayerNorm": "transform_norm",
    }
)
_PREFIX = "bert."  # a bare BERT's tensors have it not
_HEAD_BIAS = "cls.predictions.bias"


def _path(name: str) -> tuple[str | int, ...] | None:
    """The parameter of a stored tensor; None where it is none of these models."""
    name = name if name.startswith(("cls.", "classifier.", _PREFIX)) else f"{_PREFIX}{name}"
    if name == _HEAD_BIAS:
        return ("bias",)
    part, _, kind = name.rpartition(".")
    for pattern, place in _PARTS.items():
        match = re.fullmatch(pattern, part)
        if match and kind in _KINDS:
            steps = (*match.expand(place).split("."), _KINDS[kind])
            return tuple(int(step) if step.isdigit() else step for step in steps)
    return None


_KINDS_OF_MODEL: Mapping[type[Encoder], str] = MappingProxyType(
    {Bert: "a BERT with its masked language model head", Encoder: "a BERT", Tagger: "a BERT that tags tokens"}
)


@functools.lru_cache(maxsize=8)
def _abstract(config: BertConfig, kind: type[Encoder] = Bert) -> tuple[Any, Any]:
    """The graph of a BERT, and its parameters without values."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def read_bert(name: str) -> tuple[Path, BertConfig, Any]:
    """Where a BERT is, what it is, and its transformers tokenizer.

    Args:
        name: A model directory or hub id, with safetensors, config and tokenizer.

    Raises:
        M3Error: It is absent, no BERT, or has no tokenizer.
    """
    place = locate_model(name)
    if place.adapter is not None:
        raise M3Error(f"{name}: a BERT is read without an adapter: m3jax convert {name} merged, and give merged")
    if not place.path.is_dir():
        raise M3Error(f"{name}: is a weight file without config and tokenizer: give the model's directory")
    companions(place.path)  # before any of them is opened
    config = BertConfig.from_directory(place.path)
    tokenizer = load_tokenizer(name, place.path)
    if len(tokenizer) > config.vocab_size:
        raise M3Error(f"{name}: its tokenizer has more tokens than its embedding rows: take that of the weights")
    return place.path, config, tokenizer


def load_bert(directory: Path, config: BertConfig, kind: type[Encoder] = Bert) -> Params:
    """Reads the weights of a model directory as float32.

    Args:
        directory: Where they are, as safetensors with the names of Hugging Face's BertForMaskedLM, BertModel or
            BertForTokenClassification; what else a checkpoint holds is passed over.
        config: The model.
        kind: `Bert`, `Encoder` or `Tagger`.

    Raises:
        M3Error: Weights are missing or of another shape; all are named at once.
    """
    with open_safetensors(directory) as checkpoint:
        stored = {path: name for name in checkpoint.tensors if (path := _path(name)) is not None}
        leaves, structure = jax.tree_util.tree_flatten_with_path(_abstract(config, kind)[1])
        found, faults = [], []
        for steps, leaf in leaves:
            path = tuple(step.key for step in steps)
            name = stored.get(path)
            if name is None:
                faults.append(f"lacks {'.'.join(map(str, path))}")
            elif checkpoint.tensors[name].size != leaf.size or "F" not in checkpoint.tensors[name].dtype:
                faults.append(f"has {name} as {checkpoint.tensors[name].dtype}{list(checkpoint.tensors[name].shape)}")
            else:
                found.append(_read(checkpoint, name).reshape(leaf.shape))
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise M3Error(
            f"{directory} is no such model as its config says: it {', '.join(faults[:5])}{more}; "
            f"give {_KINDS_OF_MODEL[kind]}"
        )
    params: Params = jax.tree.unflatten(structure, found)
    return params


def _read(checkpoint: Checkpoint, name: str) -> Array:
    info = checkpoint.tensors[name]
    stored = np.empty(info.size, DTYPES[info.dtype])
    checkpoint.read_into(name, 0, stored.view(np.uint8))
    return jnp.asarray(stored.astype(np.float32))


@functools.partial(jax.jit, static_argnames="config")
def masked_logits(
    params: Params, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], *, config: BertConfig
) -> Float[Array, "batch length vocab"]:
    """Scores of every word in every place; see `Bert`.

    Args:
        params: As `load_bert` reads them.
        tokens: Token ids, padded on the right.
        lengths: How many of them each row has.
        config: The model.
    """
    bert: Bert = nnx.merge(_abstract(config)[0], params)
    return bert(tokens, lengths)


@functools.partial(jax.jit, static_argnames="config")
def hidden_states(
    params: Params, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], *, config: BertConfig
) -> Float[Array, "batch length width"]:
    """What a bare BERT makes of each token; see `Encoder.hidden`.

    Args:
        params: As `load_bert` reads them, of kind `Encoder`.
        tokens: Token ids, padded on the right.
        lengths: How many of them each row has.
        config: The model.
    """
    encoder: Encoder = nnx.merge(_abstract(config, Encoder)[0], params)
    return encoder.hidden(tokens, lengths)


@functools.partial(jax.jit, static_argnames="config")
def tag_logits(
    params: Params, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"], *, config: BertConfig
) -> Float[Array, "batch length labels"]:
    """Scores of every class for every token.

    Args:
        params: As `load_bert` reads them, of kind `Tagger`.
        tokens: Token ids, padded on the right.
        lengths: How many of them each row has.
        config: The model; its labels are the classes.
    """
    tagger: Tagger = nnx.merge(_abstract(config, Tagger)[0], params)
    return tagger.classifier(tagger.hidden(tokens, lengths))
