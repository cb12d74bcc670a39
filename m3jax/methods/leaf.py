"""One leaf's way through a merge: widen, subtract the base, sparsify, combine, add the base, narrow.

Pure functions that both paths share: whole arrays in memory (`merging`) and flat chunks out of core (`streaming`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from m3jax.arithmetic import exact, threefry
from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error
from m3jax.methods import linear, ties
from m3jax.methods.base import Fold, Index, Method, Scalar, Scalars, Sparsifier, Values


class Pipeline(NamedTuple):
    """What is done to every leaf: hashable, so a jitted function is compiled once for it.

    Attributes:
        method: How experts are combined.
        sparsifier: What is dropped before, if anything.
        num_experts: n ≥ 2.
    """

    method: Method
    sparsifier: Sparsifier | None
    num_experts: int

    @property
    def uses_base(self) -> bool:
        """Whether experts become task vectors: for the method, or because the sparsifier works on them."""
        return self.method.uses_base or (self.sparsifier is not None and self.sparsifier.target == "delta")


class LeafSettings(NamedTuple):
    """The numbers of one leaf, which recipes may give per tensor.

    Attributes:
        weights: One per expert; host floats or traced scalars.
        densities: What the sparsifier keeps of each expert.
        comparison: Factors that make magnitudes comparable between tensors (1 unless DARE's density varies).
        scale: λ.
    """

    weights: Sequence[Scalar]
    densities: tuple[float, ...]
    comparison: tuple[float, ...]
    scale: Scalar


def check_pipeline(pipeline: Pipeline, has_base: bool) -> None:
    """Raise M3Error where a merge cannot be what was asked for."""
    method, sparsifier, n = pipeline
    if n < 2:
        raise M3Error(f"{method.name}: there is only {n} expert, but a merge needs at least two")
    if method.interpolates and n != 2:
        raise M3Error(f"{method.name}: interpolates between exactly two experts, but there are {n}")
    if method.interpolates and sparsifier is not None:
        raise M3Error(f"{method.name}: cannot be combined with {sparsifier.name}: take linear or task_arithmetic")
    if pipeline.uses_base and not has_base:
        reason = method.name if method.uses_base else f"{sparsifier.name if sparsifier else ''} on task vectors"
        raise M3Error(f"{reason}: needs a base model to take task vectors from, but none is given")


def leaf_scalars(pipeline: Pipeline, settings: LeafSettings, mask_keys: Any) -> Scalars:
    """The scalars of a leaf, with thresholds at their neutral values.

    Args:
        pipeline: What is done.
        settings: The leaf's numbers.
        mask_keys: What `bits.pair_keys` gave for the leaf; None where nothing is masked.
    """
    n, sparsifier = pipeline.num_experts, pipeline.sparsifier
    rescaled = sparsifier is not None and sparsifier.rescale
    folded = rescaled and sparsifier is not None and sparsifier.target == "delta"
    divisors = settings.densities if folded else (1.0,) * n
    inverse = [1.0 / d if d else 0.0 for d in divisors]
    largest = max(inverse) or 1.0
    votes = settings.weights if pipeline.method.sign_election == "weighted" else (1.0,) * n
    keep = [threefry.keep_threshold(d) for d in settings.densities]
    return Scalars(
        coefficients=pipeline.method.fold(pipeline.method, Fold(settings.weights, divisors, settings.scale)),
        election=_unless_ones([v * (i / largest) for v, i in zip(votes, inverse, strict=True)]),
        comparison=_unless_ones(settings.comparison),
        enlarge=np.array([1.0 / d if d and rescaled and not folded else 1.0 for d in settings.densities], np.float32),
        mask_keys=np.zeros(((n + 1) // 2, 2), np.uint32) if mask_keys is None else mask_keys,
        keep_below=np.array([k & 0xFFFFFFFF for k in keep], np.uint32),
        keep_all=np.array([k == 2**32 for k in keep]),
        drop_below=np.zeros(n, np.uint32),
        trim_below=np.zeros(n, np.uint32),
        tie_sign=np.int32(1),
    )


def _unless_ones(factors: Sequence[Scalar]) -> Float[Any, " n"] | None:
    """Factors as float32, or None where multiplying by them would change nothing."""
    if all(isinstance(f, float) and f == 1.0 for f in factors):
        return None
    return linear.stack(list(factors))


def _task_vectors(pipeline: Pipeline, experts: Values, base: Array | None) -> Values:
    if not pipeline.uses_base or base is None:
        return experts
    return tuple(exact.subtract(expert, base) for expert in experts)


def _widen(experts: Sequence[Array], base: Array | None) -> tuple[Values, Array | None]:
    return tuple(exact.widen(x) for x in experts), None if base is None else exact.widen(base)


def ranked_by_sparsifier(pipeline: Pipeline, experts: Sequence[Array], base: Array | None) -> Values:
    """The values whose magnitudes the magnitude sparsifier ranks."""
    wide, wide_base = _widen(experts, base)
    if pipeline.sparsifier is not None and pipeline.sparsifier.target == "weights":
        return wide
    return _task_vectors(pipeline, wide, wide_base)


def sparse_values(
    pipeline: Pipeline,
    experts: Sequence[Array],
    base: Array | None,
    scalars: Scalars,
    index: Index,
    zero: Zero,
) -> Values:
    """What the method combines: δ̃ of every expert, in float32."""
    wide, wide_base = _widen(experts, base)
    sparsifier = pipeline.sparsifier
    if sparsifier is None:
        return _task_vectors(pipeline, wide, wide_base)
    if sparsifier.target == "weights":
        kept = sparsifier.apply(wide, scalars, index)
        enlarged = tuple(exact.multiply(scalars.enlarge[i], v, zero) for i, v in enumerate(kept))
        return _task_vectors(pipeline, enlarged, wide_base)
    return sparsifier.apply(_task_vectors(pipeline, wide, wide_base), scalars, index)


def ranked_by_trim(
    pipeline: Pipeline,
    experts: Sequence[Array],
    base: Array | None,
    scalars: Scalars,
    index: Index,
    zero: Zero,
) -> Values:
    """The values whose magnitudes TIES ranks."""
    return ties.comparable(sparse_values(pipeline, experts, base, scalars, index, zero), scalars, zero)


def merged_leaf(
    pipeline: Pipeline,
    experts: Sequence[Array],
    base: Array | None,
    scalars: Scalars,
    index: Index,
    zero: Zero,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """The merged leaf, rounded once to `dtype`.

    Args:
        pipeline: What is done.
        experts: One array per expert: float32, bfloat16 or float16, of one shape.
        base: The base's array, for methods and sparsifiers that take task vectors.
        scalars: Of `leaf_scalars`, with the thresholds found.
        index: Flat index of each entry in its tensor.
        zero: A run-time zero, see `exact.fence`.
        dtype: Of the result.
    """
    values = sparse_values(pipeline, experts, base, scalars, index, zero)
    merged = pipeline.method.combine(pipeline.method, values, scalars, zero)
    if pipeline.uses_base and base is not None:
        merged = exact.add(merged, exact.widen(base))
    return exact.narrow(jnp.asarray(merged), dtype)
