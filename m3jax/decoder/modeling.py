"""A decoder-only transformer in Flax NNX, of parts that a configuration chooses.

Weights keep the axes in which checkpoints store them, outputs first. Blocks are separate modules, not a scan over
stacked weights: slicing a stack copies every weight once per token on a CPU, which halves decoding there.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from m3jax.decoder.attention import attend, softcap
from m3jax.decoder.cache import PADDING, Cache, KeyValue, put
from m3jax.decoder.config import DecoderConfig
from m3jax.decoder.experts import mix
from m3jax.decoder.families import Experts
from m3jax.decoder.products import project
from m3jax.decoder.rotary import Rope
from m3jax.decoder.rotation import frequencies, rotate

Params: TypeAlias = Mapping[Any, Any]
"""Nested dict of arrays, as `Decoder`'s own parameters are nested; blocks are keyed by number."""

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    }
)


def fitting(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """Where an array goes on a mesh; axes that the mesh lacks or that do not divide the array are left out.

    Args:
        mesh: The mesh.
        shape: Sizes of the array.
        axes: A mesh axis or `None` for each of its leading axes.
    """
    sizes = dict(mesh.shape)
    pairs = zip(axes, shape, strict=False)
    fit = (axis if axis in sizes and size % sizes[axis] == 0 else None for axis, size in pairs)
    return NamedSharding(mesh, PartitionSpec(*fit))  # type: ignore[no-untyped-call]


def constrain(x: Array, mesh: Mesh | None, *axes: str | None) -> Array:
    """Places an array on a mesh, as far as its sizes divide; without a mesh does nothing.

    Args:
        x: Any array.
        mesh: Where.
        axes: A mesh axis for each of the leading axes of `x`.
    """
    if mesh is None:
        return x
    placed: Array = lax.with_sharding_constraint(x, fitting(mesh, x.shape, axes))  # type: ignore[no-untyped-call]
    return placed


def _over_leading(x: Array, like: Array) -> Array:
    """A bias or norm weight with leading axes of size 1, for callers who forbid implicit ones."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


class Linear(nnx.Module):
    """A projection whose weight has the checkpoint's axes, heads apart from their widths.

    Attributes:
        seen: Told what comes in, where somebody asks for it.
    """

    seen: Callable[[Array], None] | None = None

    def __init__(
        self, outputs: tuple[int, ...], inputs: tuple[int, ...], bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        std = 0.02
        self.weight = nnx.Param(std * rngs.params.normal((*outputs, *inputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.num_inputs = len(inputs)

    def __call__(self, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        """Contracts the trailing axes of `x` with the weight's input axes."""
        if self.seen is not None:
            self.seen(x)
        weight = self.weight[...]
        outputs = weight.shape[: weight.ndim - self.num_inputs]
        inputs = int(np.prod(weight.shape[len(outputs) :]))
        lead = x.shape[: x.ndim - self.num_inputs]
        y = project(weight.reshape(-1, inputs), x.reshape(*lead, inputs)).reshape(*lead, *outputs)
        return y if self.bias is None else y + _over_leading(self.bias[...], y)


class Norm(nnx.Module):
    """Root-mean-square norm, or layer norm with its bias, in float32."""

    def __init__(self, width: int, config: DecoderConfig, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.full(width, 1 - config.norm_offset, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if config.norm == "layer" else None
        self.eps = config.norm_eps
        self.offset = config.norm_offset

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        """Divides by the root of the mean square, centred before in a layer norm, and multiplies by the weight."""
        wide = x.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        scaled = normal * _over_leading(weight, x)
        if self.bias is not None:
            scaled = scaled + _over_leading(self.bias[...].astype(jnp.float32), x)
        return scaled.astype(x.dtype)


class _Reading(NamedTuple):
    """What all blocks need to know of the tokens being read."""

    positions: Int[Array, "batch length"]
    angles: Mapping[Rope, Float[Array, "batch length half"]]
    keys: Int[Array, "batch slots"]  # positions of slots, the tokens' own among them
    slot: Int[Array, ""]  # where the tokens go
    mesh: Mesh | None


class Attention(nnx.Module):
    """Self-attention of one block."""

    def __init__(self, config: DecoderConfig, block: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, heads, kv_heads = (config.hidden_size,), config.num_heads, config.num_kv_heads
        self.query = Linear((heads, config.head_dim), width, config.qkv_bias, dtype, rngs)
        self.key = Linear((kv_heads, config.head_dim), width, config.qkv_bias, dtype, rngs)
        self.value = Linear((kv_heads, config.head_dim), width, config.qkv_bias, dtype, rngs)
        self.output = Linear(width, (heads, config.head_dim), config.output_bias, dtype, rngs)
        normed = {None: (0, 0), "head": (1, 1), "all": (heads, kv_heads)}[config.qk_norm]
        self.query_norm, self.key_norm = (Norm(n * config.head_dim, config, dtype) if n else None for n in normed)
        self.sinks = nnx.Param(jnp.zeros(heads, dtype)) if config.attention_sinks else None
        self.config = config
        self.block = block

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        reading: _Reading,
        cache: KeyValue | None,
    ) -> tuple[Float[Array, "batch length hidden"], KeyValue]:
        """Attends to the tokens given and to those in the cache, which then holds both."""
        query = self._placed(self.query(x), self.query_norm, reading)
        key = self._placed(self.key(x), self.key_norm, reading)
        parts = [key.swapaxes(1, 2), self.value(x).swapaxes(1, 2)]
        if cache is not None:
            pairs = zip(cache, parts, strict=True)
            parts = [put(old, new, reading.slot) for old, new in pairs]
        kept = KeyValue(*(constrain(part, reading.mesh, "fsdp", "tp") for part in parts))
        query = constrain(query, reading.mesh, "fsdp", None, "tp")
        mixed = attend(
            query,
            kept,
            reading.positions,
            reading.keys,
            window=self.config.windows[self.block],
            scale=self.config.query_scale,
            cap=self.config.attention_softcap,
            sinks=None if self.sinks is None else self.sinks[...],
        )
        return self.output(mixed), kept

    def _placed(
        self, x: Float[Array, "batch length heads head_dim"], norm: Norm | None, reading: _Reading
    ) -> Float[Array, "batch length heads head_dim"]:
        """Queries or keys, normalised and rotated as the configuration says."""
        if norm is not None:
            x = norm(x.reshape(*x.shape[:2], -1) if self.config.qk_norm == "all" else x).reshape(x.shape)
        rope = self.config.ropes[self.block]
        return x if rope is None else rotate(x, reading.angles[rope], rope.magnitude)


class FeedForward(nnx.Module):
    """The feed-forward layer of one block."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        self.gate = Linear(inner, width, config.mlp_bias, dtype, rngs) if config.gated else None
        self.up = Linear(inner, width, config.mlp_bias, dtype, rngs)
        self.down = Linear(width, inner, config.mlp_bias, dtype, rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
        """down(activation(gate(x)) · up(x)), or down(activation(up(x))) without a gate.

        What is between the projections is in float32, rounded once.
        """
        activate = ACTIVATIONS[self.activation]
        up = self.up(x).astype(jnp.float32)
        inner = activate(up) if self.gate is None else activate(self.gate(x).astype(jnp.float32)) * up
        return self.down(inner.astype(x.dtype))


class ExpertLinear(nnx.Module):
    """The same projection of every expert."""

    def __init__(self, experts: Experts, outputs: int, inputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        std = 0.02
        self.weight = nnx.Param(std * rngs.params.normal((experts.number, outputs, inputs), dtype))
        self.bias = nnx.Param(jnp.zeros((experts.number, outputs), dtype)) if experts.bias else None

    def __call__(self, x: Float[Array, "rows inputs"], expert: Int[Array, ""]) -> Float[Array, "rows outputs"]:
        """One expert's projection."""
        y = project(lax.dynamic_index_in_dim(self.weight[...], expert, keepdims=False), x)
        return y if self.bias is None else y + lax.dynamic_index_in_dim(self.bias[...], expert)


class SparseFeedForward(nnx.Module):
    """Feed-forward layers side by side, of which each token takes those that the router likes best.

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017; Jiang et al., Mixtral of Experts, 2024.
    """

    def __init__(self, config: DecoderConfig, experts: Experts, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.router = Linear((experts.number,), (width,), experts.bias, dtype, rngs)
        self.gate = ExpertLinear(experts, experts.width, width, dtype, rngs)
        self.up = ExpertLinear(experts, experts.width, width, dtype, rngs)
        self.down = ExpertLinear(experts, width, experts.width, dtype, rngs)
        self.activation = config.activation
        self.clamp = experts.clamp
        self.active = experts.active
        self.normalised = experts.normalised

    def __call__(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
        """The sum of what its experts make of each token, each by its share."""
        rows = x.reshape(-1, x.shape[-1])
        scores = project(self.router.weight[...], rows, jnp.float32)
        if self.router.bias is not None:
            scores = scores + _over_leading(self.router.bias[...].astype(jnp.float32), scores)
        best, chosen = lax.top_k(scores, self.active)
        shares = jax.nn.softmax(best, axis=-1)
        if not self.normalised:
            shares = jnp.exp(best - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
        count = self.gate.weight.shape[0]
        return mix(self._expert, rows, chosen.astype(jnp.int32), shares, count).reshape(x.shape)

    def _expert(self, x: Float[Array, "rows hidden"], expert: Int[Array, ""]) -> Float[Array, "rows hidden"]:
        """What one expert makes of some tokens."""
        gate, up = (part(x, expert).astype(jnp.float32) for part in (self.gate, self.up))
        if self.clamp is None:
            inner = ACTIVATIONS[self.activation](gate) * up
        else:
            gain, bound = self.clamp
            gate = jnp.minimum(gate, bound)
            inner = gate * jax.nn.sigmoid(gain * gate) * (jnp.clip(up, -bound, bound) + 1)
        return self.down(inner.astype(x.dtype), expert)


class Block(nnx.Module):
    """One transformer block."""

    def __init__(self, config: DecoderConfig, block: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def norm(places: tuple[str, str]) -> Norm | None:
            return Norm(config.hidden_size, config, dtype) if config.norm_places in places else None

        before, behind = ("before", "around"), ("behind", "around")
        self.attention_norm = norm(before)
        self.attention = Attention(config, block, dtype, rngs)
        self.feed_forward_norm = norm(before)
        self.feed_forward: FeedForward | SparseFeedForward = (
            SparseFeedForward(config, config.experts, dtype, rngs)
            if config.experts is not None and config.sparse[block]
            else FeedForward(config, dtype, rngs)
        )
        self.after_attention_norm = norm(behind)
        self.after_feed_forward_norm = norm(behind)
        self.parallel = config.parallel
        self.scale = config.residual_scale

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        reading: _Reading,
        cache: KeyValue | None,
    ) -> tuple[Float[Array, "batch length hidden"], KeyValue]:
        """Attention, then feed-forward, each added to the residual stream; or both at once."""
        mixed, kept = self.attention(_normed(self.attention_norm, x), reading, cache)
        attended = x + self._added(self.after_attention_norm, mixed)
        fed = self.feed_forward(_normed(self.feed_forward_norm, x if self.parallel else attended))
        return constrain(attended + self._added(self.after_feed_forward_norm, fed), reading.mesh, "fsdp"), kept

    def _added(self, norm: Norm | None, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
        """What a part of the block adds to the residual stream."""
        return _scaled(_normed(norm, x), self.scale)


def _normed(norm: Norm | None, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
    return x if norm is None else norm(x)


def _scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


class Decoder(nnx.Module):
    """Embedding, blocks and a final norm; `logits` is the output layer.

    Example:
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8)
        >>> counts = dict(num_hidden_layers=1, num_attention_heads=2)
        >>> config = DecoderConfig.from_dict({"model_type": "llama", **sizes, **counts})
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> hidden, cache = decoder(jnp.array([[1, 2, 3]]))
        >>> decoder.logits(hidden).shape, cache.blocks[0].key.shape
        ((1, 3, 8), (1, 2, 3, 2))
    """

    def __init__(self, config: DecoderConfig, dtype: DTypeLike | None = None, *, rngs: nnx.Rngs) -> None:
        """Draws random weights.

        Args:
            config: The decoder's sizes and features.
            dtype: Of the weights and of the arithmetic between float32 sums; the configuration's by default.
            rngs: Source of the weights.
        """
        dtype = jnp.dtype(config.dtype if dtype is None else dtype)
        shape = (config.vocab_size,), (config.hidden_size,)
        self.config = config
        self.embedding = Linear(*shape, False, dtype, rngs)
        places = (config.context_length,), (config.hidden_size,)
        self.positions = Linear(*places, False, dtype, rngs) if config.learned_positions else None
        self.layers = nnx.List([Block(config, block, dtype, rngs) for block in range(config.num_layers)])
        self.norm = Norm(config.hidden_size, config, dtype)
        self.head = None if config.tie_embeddings else Linear(*shape, False, dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        cache: Cache | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], Cache]:
        """Reads tokens that follow what is in the cache.

        Args:
            tokens: Token ids.
            positions: Of the tokens, `PADDING` where a row has none; by default from 0 on.
            cache: What has been read, with room for the tokens; `None` at the beginning.
            mesh: Mesh on which activations are laid out, the batch over `fsdp` and heads over `tp`.

        Returns:
            Hidden states, normalised, and the cache with the new tokens in it: as long as the one given, or as
            the tokens when none was.
        """
        batch, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        slot, keys = jnp.int32(0), positions
        if cache is not None:
            slot, keys = cache.filled, lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.filled, axis=1)
        lengths = jnp.max(jnp.where(keys == PADDING, -1, keys), axis=1) + 1
        angles = {rope: self._angles(rope, positions, lengths) for rope in self.config.ropes if rope is not None}
        reading = _Reading(positions, angles, keys, slot, mesh)
        x = _scaled(self.embedding.weight[...][tokens], self.config.embedding_scale)
        if self.positions is not None:
            # Padding stands nowhere, and any row will do for it.
            x = x + self.positions.weight[...][jnp.minimum(positions, self.config.context_length - 1)]
        x = constrain(x, mesh, "fsdp")
        kept: list[KeyValue] = []
        for i, block in enumerate(self.layers):
            x, pair = block(x, reading, None if cache is None else cache.blocks[i])
            kept.append(pair)
        return self.norm(x), Cache(kept, keys, slot + length)

    def _angles(
        self, rope: Rope, positions: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch length half"]:
        """By how much each pair of entries is turned at each position."""
        per_position = frequencies(rope, self.config.head_dim, lengths)
        return positions[:, :, None].astype(jnp.float32) * per_position[:, None, :]

    def logits(self, hidden: Float[Array, "*lead hidden"]) -> Float[Array, "*lead vocab"]:
        """Float32 scores of the next token.

        Args:
            hidden: Normalised hidden states, as calling the decoder returns them.
        """
        head = self.embedding if self.head is None else self.head
        scores = _scaled(project(head.weight[...], hidden, jnp.float32), self.config.logit_scale)
        return softcap(scores, self.config.logit_softcap)


@functools.lru_cache(maxsize=64)
def _abstract(config: DecoderConfig) -> tuple[Any, Any]:
    """The graph of a decoder, and its parameters without values."""
    # Drawing nothing, since tracing hundreds of draws takes seconds.
    nothing = cast(nnx.Rngs, SimpleNamespace(params=SimpleNamespace(normal=jnp.zeros)))
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nothing)))
    return graph, nnx.to_pure_dict(state)


def abstract_params(config: DecoderConfig) -> dict[Any, Any]:
    """Shapes and dtypes of a decoder's parameters.

    Args:
        config: The decoder.

    Returns:
        `jax.ShapeDtypeStruct`s, nested as the parameters are.
    """
    params: dict[Any, Any] = jax.tree.map(lambda leaf: leaf, _abstract(config)[1])
    return params


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The decoder without values.

    Args:
        config: Its sizes and features.
    """
    decoder: Decoder = nnx.merge(*_abstract(config))
    return decoder


def bind(config: DecoderConfig, params: Params) -> Decoder:
    """The decoder with these parameters; inside and outside of jit.

    Args:
        config: The decoder.
        params: As `load_params`, `params_from_tree` or `random_params` make them.
    """
    decoder: Decoder = nnx.merge(_abstract(config)[0], params)
    return decoder


def random_params(config: DecoderConfig, seed: int = 0, dtype: DTypeLike | None = None) -> Params:
    """Random parameters, for tests and measurements.

    Args:
        config: The decoder.
        seed: Of the random numbers.
        dtype: Of the parameters; the configuration's by default.
    """
    params: Params = nnx.to_pure_dict(nnx.state(Decoder(config, dtype, rngs=nnx.Rngs(seed))))
    return params
