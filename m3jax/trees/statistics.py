"""The statistics that experts bring beside their parameters, matched with the leaves that they are of."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from m3jax.errors import M3Error
from m3jax.methods.leaf import Pipeline
from m3jax.trees.matching import found_in, is_parameter, is_traced, leaves_of
from m3jax.trees.parts import AnatomyOf, ParameterTree, laid_out_as


def statistics_of(
    pipe: Pipeline,
    given: Sequence[PyTree] | None,
    tree: ParameterTree,
    merged: Collection[str],
    anatomy: AnatomyOf = None,
) -> dict[str, tuple[Any, ...]]:
    """The statistics of each expert by leaf, of the leaves that have some.

    Args:
        pipe: What is done.
        given: A tree for each expert, with the names and shapes of its own, or with a matrix for each leaf; leaves may
            be missing in all of them.
        tree: The template.
        merged: The leaves that are merged.
        anatomy: What the caller says of trees.

    Raises:
        M3Error: There are none, or some where none are wanted; they are not of these trees; or a number is negative or
            not finite, as far as numbers are known.
    """
    method, count = pipe.method, pipe.num_experts
    if not method.statistics:
        if given is not None:
            raise M3Error(f"{method.name}: takes no statistics, but some are given: leave them out")
        return {}
    if given is None or isinstance(given, Mapping | str) or len(given) != count:
        one = isinstance(given, Mapping | str)
        said = "none are given" if given is None else f"{'one tree' if one else len(given)} is given"
        raise M3Error(
            f"{method.name}: needs the {method.statistics} statistics of each of {count} experts, and {said}: pass "
            "statistics=[...], a tree for each"
        )
    found = []
    for number, each in enumerate(given):
        own = leaves_of(each)
        if method.preparation is None:
            own = dict(laid_out_as(tree, own, anatomy))
        names = found_in(own, tree.leaves, tree.parts)
        surplus = next((name for name in own if name not in set(names.values())), None)
        if surplus is not None:
            raise M3Error(
                f"{surplus}: is in the statistics of expert {number} but not in the trees: give those of this model"
            )
        found.append({name: own[stored].value for name, stored in names.items() if name in merged})
    everywhere = {}
    for name in merged:
        having = [name in own for own in found]
        if any(having) and not all(having):
            with_, without = having.index(True), having.index(False)
            raise M3Error(
                f"{name}: has statistics of expert {with_} but not of expert {without}: measure both, or leave them out"
            )
        if all(having):
            everywhere[name] = tuple(own[name] for own in found)
    if not everywhere:
        raise M3Error(f"{method.name}: no leaf that is merged has statistics: give those of these trees")
    for name, arrays in everywhere.items():
        if method.preparation is None:
            _check(name, np.shape(tree.leaves[name].value), arrays)
        else:
            _check_matrices(name, np.shape(tree.leaves[name].value), tree.parts[name].stack_axis, arrays)
    return everywhere


def _check_matrices(name: str, shape: tuple[int, ...], axis: int | None, arrays: tuple[Any, ...]) -> None:
    """Raise M3Error unless there is a known matrix of the inputs for each tensor."""
    lead = () if axis is None else (shape[axis],)
    widths = {np.shape(array)[-1] if np.ndim(array) else 0 for array in arrays}
    for number, array in enumerate(arrays):
        own = np.shape(array)
        if len(widths) > 1 or own != (*lead, *(2 * own[-1:])) or not is_parameter(array):
            raise M3Error(
                f"{name}: the statistics of expert {number} are {getattr(array, 'dtype', type(array).__name__)}"
                f"{list(own)}, but the leaf is of shape {list(shape)}: give a square matrix of floats"
                f"{' for each block along axis 0' if lead else ''}, of as many rows as the leaf has inputs"
            )


def _check(name: str, shape: tuple[int, ...], arrays: tuple[Any, ...]) -> None:
    for number, array in enumerate(arrays):
        if np.shape(array) != shape or not is_parameter(array):
            kind = f"{getattr(array, 'dtype', type(array).__name__)}{list(np.shape(array))}"
            raise M3Error(
                f"{name}: the statistics of expert {number} are {kind}, but the leaf is of shape {list(shape)}: give "
                "one float for each entry"
            )
        if not is_traced(array) and not _are_statistics(array):
            raise M3Error(
                f"{name}: the statistics of expert {number} hold negative or infinite numbers or NaN, which none are: "
                "measure them again"
            )


def _are_statistics(array: Any) -> bool:
    """Whether numbers that are known are finite and from 0 on."""
    with jax.ensure_compile_time_eval():  # in a caller's trace too
        return bool(_all_from_zero(array))


@jax.jit
def _all_from_zero(array: Array) -> Bool[Array, ""]:
    return jnp.all((array >= 0) & (array < jnp.inf))
