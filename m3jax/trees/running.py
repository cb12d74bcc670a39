"""Averages along one training run, in memory: of trees that are there, and of those that a training loop passes by.

References:
    `m3jax.methods.schedules`.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from m3jax.arithmetic import double, exact
from m3jax.errors import M3Error
from m3jax.methods.linear import linear, stack
from m3jax.methods.schedules import Schedule, read_schedule, schedule_weights
from m3jax.trees.matching import leaves_of
from m3jax.trees.merging import merge
from m3jax.trees.parts import AnatomyOf, tree_of


def soup(trees: Iterable[PyTree], schedule: str | Mapping[str, Any] = "uniform", **options: Any) -> PyTree:
    """The average of trees of one training run, the earliest first.

    Args:
        trees: As `merge` takes them.
        schedule: How much each counts: "uniform", {"method": "ema", "decay": 0.9}, or {"method": "wsm", "decay":
            "linear" or "1-sqrt"}.
        **options: Of `merge`: `dtype`, `only`, `anatomy`, `donate`, `lora`.

    Returns:
        A tree like the first. The bits are those of a recipe with the same schedule, and of `RunningMerge`.

    Raises:
        M3Error: The schedule is not known, or the trees differ.

    Example:
        >>> import jax.numpy as jnp
        >>> trees = [{"w": jnp.full(2, float(step))} for step in (7, 14, 21)]
        >>> soup(trees)["w"].tolist(), soup(trees, {"method": "ema", "decay": 0.5})["w"].round(3).tolist()
        ([14.0, 14.0], [17.0, 17.0])
    """
    steps = list(trees)
    if not steps:
        raise M3Error("soup: there is no tree: give at least one")
    weights = schedule_weights(read_schedule(schedule), len(steps))
    return merge(steps, linear(), weights=list(weights), **options)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sums", "count", "coefficients"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class RunningMerge:
    """An average that a training loop keeps up, in memory of one tree of float32; a pytree, under `jit` or not.

    With a `window` of K steps its bits after K updates are those of `soup` over the K trees, whatever is jitted or
    sharded, and whether it was saved and restored on the way. Without one, it is the mean of all steps so far
    ("uniform"), or the moving average m ← decay·m + (1 − decay)·x that begins with the first step ("ema").

    Every leaf of float32, bfloat16 or float16 is averaged; `read` takes the others from the tree that it is given.

    Attributes:
        sums: Float32 arrays, of each averaged leaf, in the order of the tree's leaves.
        count: How many steps have been taken, an int32.
        coefficients: Float32 of each step of the window; of "ema" those of the sum and of the step; none of "uniform".
        kind: "window", "uniform" or "ema".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> average = RunningMerge.start({"w": jnp.zeros(2)}, window=3)
        >>> for step in (1.0, 2.0, 3.0):
        ...     params = {"w": jnp.full(2, step)}
        ...     average = jax.jit(RunningMerge.update)(average, params)
        >>> average.read(params)["w"].tolist()
        [2.0, 2.0]
    """

    # Not of arrays alone: whoever maps over a pytree may put anything in their place.
    sums: tuple[Any, ...]
    count: Any
    coefficients: Any
    kind: str

    @classmethod
    def start(
        cls,
        params: PyTree,
        schedule: str | Mapping[str, Any] = "uniform",
        window: int | None = None,
        anatomy: AnatomyOf = None,
    ) -> Self:
        """An average of no steps.

        Args:
            params: A tree like those to come, of arrays or of their shapes; its values do not count.
            schedule: As `soup` takes it.
            window: How many steps there will be; None for as many as come, which "wsm" cannot do.
            anatomy: What is known of the tree, as for `merge`: by {"kinds": {PATTERN: "parameter"}} factors of
                adapters are averaged too.

        Raises:
            M3Error: The schedule is not known, or has no window and needs one; a leaf is a factor of an adapter.
        """
        parts = tree_of(leaves_of(params), anatomy).parts
        factor = next((name for name, part in parts.items() if part.kind == "adapter"), None)
        if factor is not None:
            raise M3Error(
                f"{factor}: is a factor of an adapter, whose average is not that of products: average "
                "m3jax.with_lora(params, scale=…), or factors all the same by anatomy={'kinds': {PATTERN: 'parameter'}}"
            )
        found = read_schedule(schedule)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise M3Error(f"window: {window!r} is no number of steps: give one from 1 on")
        sums = tuple(jnp.zeros(leaf.shape, jnp.float32) for leaf in _averaged(params))
        kind = found.method if window is None else "window"
        return cls(sums, jnp.zeros((), jnp.int32), jnp.asarray(_coefficients(found, window)), kind)

    def update(self, params: PyTree) -> "RunningMerge":
        """The average with one more step.

        Args:
            params: The step's tree.

        Raises:
            M3Error: The tree has other leaves, or the window is full. In a trace, where that cannot be known, the
                average becomes NaN.
        """
        leaves = _averaged(params)
        if [leaf.shape for leaf in leaves] != [total.shape for total in self.sums]:
            raise M3Error("RunningMerge: this tree has other leaves than the one it was started with: start another")
        known = _known(self.count)
        if self.kind == "window" and known is not None and known >= self.coefficients.size:
            raise M3Error(f"RunningMerge: its window of {self.coefficients.size} steps is full: start another")
        sums = tuple(_added(self, total, leaf) for total, leaf in zip(self.sums, leaves, strict=True))
        return dataclasses.replace(self, sums=sums, count=self.count + 1)

    def read(self, like: PyTree) -> PyTree:
        """The average as a tree.

        Args:
            like: A tree of the same leaves, such as the last step: the average has its type, its leaves' dtypes, and
                those of its leaves that are not averaged.

        Raises:
            M3Error: The tree has other leaves, or no step has been taken, or fewer than the window has. In a trace,
                where that cannot be known, the average is NaN.
        """
        leaves, structure = jax.tree.flatten(like)
        wanted = self.coefficients.size if self.kind == "window" else 1
        known = _known(self.count)
        if known is not None and known < wanted:
            raise M3Error(f"RunningMerge: {known} of {wanted} steps have been taken, so there is no average yet")
        if [leaf.shape for leaf in _averaged(like)] != [total.shape for total in self.sums]:
            raise M3Error("RunningMerge: this tree has other leaves than the one it was started with: give one like it")
        sums = iter(self.sums)
        merged = [_mean(self, next(sums), wanted, leaf) if _is_averaged(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, merged)


def _is_averaged(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and leaf.dtype.name in exact.FLOAT_DTYPES


def _averaged(params: PyTree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(params) if _is_averaged(leaf)]


def _known(count: Any) -> int | None:
    """How many steps have been taken, where that is known."""
    return None if isinstance(count, jax.core.Tracer) else int(count)


def _coefficients(schedule: Schedule, window: int | None) -> Float[np.ndarray, " n"]:
    """Rounded once, on the host, as those of a merge are."""
    if window is not None:
        weights = schedule_weights(schedule, window)
        total = functools.reduce(operator.add, weights, 0.0)  # by which `linear` divides
        return np.asarray(stack([weight / total for weight in weights]), np.float32)
    match schedule.method, schedule.decay:
        case "ema", float(decay):
            return np.array([decay, 1.0 - decay], np.float32)
        case "uniform", _:
            return np.zeros(0, np.float32)
        case _:
            raise M3Error("schedule: wsm weighs a window of known length: give window")


@jax.jit
def _added(state: RunningMerge, total: Float[Array, "..."], leaf: Any) -> Float[Array, "..."]:
    """A sum with one more step."""
    step, first = exact.widen(leaf), state.count == 0
    if state.kind == "window":
        term = exact.multiply(_at(state.coefficients, state.count), step, None)
        return jnp.where(first, term, exact.add(total, term))
    if state.kind == "uniform":
        return jnp.where(first, step, exact.add(total, step))
    kept, new = (exact.multiply(c, x, None) for c, x in zip(state.coefficients, (total, step), strict=True))
    return jnp.where(first, step, exact.add(kept, new))


def _at(coefficients: Float[Array, " n"], index: Int[Array, ""]) -> Float[Array, ""]:
    return jnp.take(coefficients, index, mode="fill", fill_value=jnp.nan)


@functools.partial(jax.jit, static_argnums=2)
def _mean(state: RunningMerge, total: Float[Array, "..."], wanted: int, like: Any) -> Float[Array, "..."]:
    """What is read of a sum."""
    value = total
    if state.kind == "uniform":
        share = jnp.asarray(double.to_float32(1.0 / double.Double.of(state.count.astype(jnp.float32))))
        value = exact.multiply(share, total, None)
    return exact.narrow(jnp.where(state.count < wanted, jnp.nan, value), like.dtype)
