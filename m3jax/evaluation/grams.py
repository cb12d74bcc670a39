"""The Gram matrices of what comes into the linear layers of a model on examples, for methods that fit its outputs.

Of each layer G = Σ xᵀ·x over all tokens that are read, in float32. Layers that read the same share one: query, key and
value; gate and up.

References:
    Jin et al., Dataless knowledge fusion by merging weights of language models, 2022, arXiv 2212.09849.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from m3jax.checkpoints.protocol import natural_key
from m3jax.cluster.meshes import spread
from m3jax.decoder import DecoderConfig
from m3jax.decoder.batching import length_bucket, pad
from m3jax.decoder.cache import PADDING
from m3jax.decoder.modeling import Decoder, FeedForward, Linear, bind
from m3jax.decoder.params import StoredParameter, mesh_of, nested_params
from m3jax.decoder.weight_map import Path
from m3jax.errors import M3Error
from m3jax.progress import Tell, progress_lines

_HEAD: Path = ("head", "weight")


class Inputs(NamedTuple):
    """The weights that read the same.

    Attributes:
        name: The stored tensor under whose name the Gram matrix is written.
        names: All of them.
        first: Those whose inputs lie along their first axes.
    """

    name: str
    names: tuple[str, ...]
    first: frozenset[str]


def _watched(decoder: Decoder) -> Iterator[tuple[Path, Linear, tuple[str, ...]]]:
    """Layers whose inputs are all different: where each is, it, and the names of those that read the same, it first."""
    for number, block in enumerate(decoder.layers):
        attention: Path = ("layers", number, "attention")
        yield attention, block.attention.query, ("query", "key", "value")
        yield attention, block.attention.output, ("output",)
        fed, feed_forward = block.feed_forward, ("layers", number, "feed_forward")
        if isinstance(fed, FeedForward):  # of experts, each sees other tokens
            yield feed_forward, fed.up, ("up",) if fed.gate is None else ("up", "gate")
            yield feed_forward, fed.down, ("down",)


def inputs_of(matched: Mapping[Path, StoredParameter], decoder: Decoder) -> dict[Path, Inputs]:
    """What is measured: by the path of a weight that reads it.

    Args:
        matched: The stored tensors of every parameter.
        decoder: The decoder, with or without values.
    """
    groups = {
        (*place, names[0], "weight"): [(*place, name, "weight") for name in names]
        for place, _, names in _watched(decoder)
    }
    if _HEAD in matched:
        groups[_HEAD] = [_HEAD]
    found = {}
    for path, own in groups.items():
        parts = {part.name: part.view for each in own for part in matched[each].parts}
        names = tuple(sorted(parts, key=natural_key))
        first = frozenset(name for name, view in parts.items() if view.order[-1] != len(view.order) - 1)
        found[path] = Inputs(names[0], names, first)
    return found


def measure_grams(
    arrays: Mapping[str, Array],
    config: DecoderConfig,
    inputs: Mapping[Path, Inputs],
    texts: Sequence[Sequence[int]],
    mesh: Mesh | None,
    tell: Tell | None,
) -> dict[str, np.ndarray]:
    """The Gram matrix of each of the inputs, float32[in, in], by the name under which it is written.

    Args:
        arrays: The model's tensors by name.
        config: The decoder.
        inputs: Of `inputs_of`.
        texts: Tokens of each example, of which the last is not read.
        mesh: Over which the sums are spread.
        tell: Told in lines how far it is.

    Raises:
        M3Error: One is not finite.
    """
    widths = widths_of(arrays, config, inputs)
    sums = {
        path: jnp.zeros((width, width), jnp.float32, device=spread(mesh, (width, width)))
        for path, width in widths.items()
    }
    there, report = mesh_of(arrays), progress_lines(tell)
    if report is not None:
        report(0, len(texts))
    for done, tokens in enumerate(texts, 1):
        length = length_bucket(len(tokens), config.context_length + 1)
        sums = _with_grams(sums, arrays, *pad([tokens], 1, length, there), config=config, mesh=there)
        if report is not None:
            jax.block_until_ready(sums)  # type: ignore[no-untyped-call]
            report(done, len(texts))
    found = {}
    for path, own in inputs.items():
        matrix = np.asarray(sums.pop(path))
        if not np.isfinite(matrix).all():
            raise M3Error(f"{own.name}: what comes into it is not finite: measure in float32 (--dtype float32)")
        found[own.name] = (matrix + matrix.T) * np.float32(0.5)
    return found


def widths_of(arrays: Mapping[str, Any], config: DecoderConfig, inputs: Collection[Path]) -> dict[Path, int]:
    """How many inputs each weight has.

    Args:
        arrays: The model's tensors by name, or their shapes.
        config: The decoder.
        inputs: The weights' paths.
    """
    params = jax.eval_shape(lambda given: nested_params(given, config, "the model"), arrays)
    return {path: _width(params, path) for path in inputs}


def _width(params: Any, path: Path) -> int:
    """How many inputs a weight has."""
    shape = functools.reduce(lambda tree, key: tree[key], path, params).shape
    leading = 2 if path[-2] in ("query", "key", "value") else 1  # heads and their width are outputs there
    return int(np.prod(shape[leading:]))


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
def _with_grams(
    sums: Mapping[Path, Float[Array, "inputs inputs"]],
    arrays: Mapping[str, Array],
    texts: Int[Array, "1 length"],
    lengths: Int[Array, "1"],
    *,
    config: DecoderConfig,
    mesh: Mesh | None,
) -> dict[Path, Array]:
    """Sums with what one example adds to them."""
    decoder, seen = bind(config, nested_params(arrays, config, "the model")), dict[Path, Array]()
    for place, layer, (name, *_) in _watched(decoder):
        layer.seen = functools.partial(seen.__setitem__, (*place, name, "weight"))
    slots = jnp.arange(texts.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.where(slots < lengths[:, None] - 1, slots, PADDING)
    hidden, _ = decoder(texts, positions, mesh=mesh)
    seen[_HEAD] = hidden
    counts = (positions != PADDING).reshape(-1, 1)

    def gram(x: Array) -> Array:
        rows = jnp.where(counts, x.reshape(counts.shape[0], -1).astype(jnp.float32), jnp.float32(0))
        return jnp.dot(rows.T, rows, precision=lax.Precision.HIGHEST)

    return {path: value + gram(seen[path]) for path, value in sums.items()}
