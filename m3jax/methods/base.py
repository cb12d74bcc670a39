"""What merge methods and sparsifiers are made of: plain data and pure functions of leaves.

A leaf is one parameter array, or one chunk of it. What a method must know of more than one entry it asks for by
`Measure`s; once these are concluded it works on entries alone, or on whole rows where it says so, so that it cannot
tell an array from a chunk, one device from many, or memory from disk.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32
from numpy.typing import DTypeLike

from m3jax.arithmetic.exact import Zero
from m3jax.errors import M3Error

TARGETS = ("delta", "weights")
SCOPES = ("tensor", "model")

Values = tuple[Float[Array, "..."], ...]
"""One float32 array per expert, all of one shape; rows lie along the last axis."""

Index = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]
"""High and low word of each entry's flat row-major index in its whole tensor."""

Words = tuple[Any, Any]
"""High and low uint32 words of counts that may pass 2³²."""

Scalar = Any
"""A host float, or a traced scalar (`m3jax.arithmetic.double.Double`)."""

Numbers = Mapping[str, tuple[float, ...]]
"""Parameters that may differ between tensors, by name: one number per expert."""

Density = float | tuple[float, ...]
"""One share of entries for all experts, or one for each."""


class Settings(NamedTuple):
    """The numbers of one leaf, which recipes may give per tensor.

    Attributes:
        weights: One per expert, or the one position t; host floats or traced scalars.
        scale: λ.
        sparsifier: The sparsifier's parameters.
        method: The method's parameters.
        comparison: Factors that make an expert's magnitudes comparable between tensors (1 unless what they are
            divided by varies).
        divisors: What each expert's coefficient is divided by, for a sparsifier that rescales; 0 drops the expert.
    """

    weights: Sequence[Scalar]
    scale: Scalar
    sparsifier: Numbers
    method: Numbers
    comparison: tuple[float, ...]
    divisors: tuple[float, ...]


class Known(NamedTuple):
    """What is known of a leaf when its entries are worked on.

    Attributes:
        scalars: What `fold` gave.
        found: What the measures concluded, by name; a measure that had nothing to do is absent.
        entries: Where they lie in their tensor, by index.
        mask_keys: uint32[pairs, 2], Threefry keys of the leaf's mask streams; None without a random sparsifier.
        zero: A run-time zero, see `exact.fence`.
        statistics: One float32 array per expert, not negative, of a method that asks for some.
        prepared: What `Method.preparation` made for the tensor; None without one.
        dtype: What the merged entries are rounded to, where something is prepared.
    """

    scalars: Any
    found: Mapping[str, Any]
    entries: Index
    mask_keys: UInt32[Any, "pairs 2"] | None
    zero: Zero
    statistics: Values = ()
    prepared: Any = None
    dtype: DTypeLike | None = None


class Place(NamedTuple):
    """Where a measure counts, which decides by which rounds it does so; the result does not depend on it.

    Attributes:
        streamed: Chunk by chunk from files, not over arrays in memory.
        platform: JAX's name of the devices: "cpu", "gpu", "tpu".
        entries: How many are counted, of a model-wide measure; else 0.
    """

    streamed: bool
    platform: str
    entries: int


class Extent(NamedTuple):
    """How much one conclusion of a measure is about.

    Attributes:
        entries: In its scope, of each expert.
        rows: Under scope "row", the leading axes of the leaf; under "column", how many columns it has; else ().
        experts: How many there are.
    """

    entries: int
    rows: tuple[int, ...]
    experts: int


class Round(NamedTuple):
    """One going-over of everything that a measure's scope holds.

    Attributes:
        name: Tells the rounds of a measure apart.
        counts: Pure function (options, values, known, state, valid) → a uint32 array; those of parts reduce in any
            order. `valid` says which entries count, None for all. Under scope "row" the leading axes are the rows,
            and nothing is reduced between chunks; under "column" the first axis is the columns. With `finish` or
            "gather", a list of arrays with an entry for each entry of a chunk.
        reduction: "sum"; "max"; or "gather", of streamed samples, whose total is the list joined.
        finish: (arrays cut to the chunk's size) → counts, in numpy, for what is counted faster on the host.
        repeats: How often the round is gone through; the state knows how far it is.
        sampled: Only about 2²² entries spread over the scope are read.
        fallback: Needed only where what came before has not settled it.
    """

    name: str
    counts: Callable[[Any, Values, Known, Any, Bool[Array, "..."] | None], Any]
    reduction: str = "sum"
    finish: Callable[[Sequence[np.ndarray]], Any] | None = None
    repeats: int = 1
    sampled: bool = False
    fallback: bool = False


class Measure(NamedTuple):
    """How a method or sparsifier learns more than one entry; no weight enters, so that many merges share what is found.

    Drivers carry counts: they go through the rounds, reduce what is counted over chunks, devices and processes, and
    let the state advance. All functions take the owner's `options` first.

    Attributes:
        name: What `Known.found` calls its conclusion.
        label: What it does, for people: "ranking magnitudes".
        scope: "row", "column", "tensor" or "model": over what one conclusion holds. A column is what differs in the
            first axis alone: leaves come as matrices then, with the columns along the last axis.
        needed: (options, numbers) → whether a leaf with these parameters needs it.
        begin: (options, numbers, extent) → the state before the first round, a pytree of host arrays, of the structure
            that all later states have.
        rounds: Place → the rounds.
        advance: (options, round's name, state, totals) → the state after a round, in numpy where the totals are
            there, else traced. Totals of a sum are `Words`.
        conclude: (options, state, settings) → scalars, a pytree of the method's own. Under scope "row" or "column",
            arrays whose leading axes are the rows or columns.
        settled: (options, round's name, state) → whether a fallback round can be left out.
        values: "given": what the sparsifier gets; "sparse": what the method combines.
        uniform: The parameters that must be the same in all that a scope "model" holds.
    """

    name: str
    label: str
    scope: str
    needed: Callable[[Any, Numbers], bool]
    begin: Callable[[Any, Numbers, Extent], Any]
    rounds: Callable[[Place], tuple[Round, ...]]
    advance: Callable[[Any, str, Any, Any], Any]
    conclude: Callable[[Any, Any, Settings], Any]
    settled: Callable[[Any, str, Any], bool] = lambda options, name, state: False
    values: str = "sparse"
    uniform: tuple[str, ...] = ()


class Preparation(NamedTuple):
    """What a method makes on the host, in numpy, of statistics of a tensor as a whole, before it combines its rows.

    Such statistics are matrices: one [in, in] for each expert of a tensor [out, in]. The method then gets rows of the
    tensor outside of compiled programs (inside of a caller's trace its `combine` calls back to the host), and the rows
    lie along the inputs, whichever axes they have in the tensor.

    Attributes:
        make: (options, settings, float32[in, in] of each expert) → what `Known.prepared` is.
        nbytes: (inputs, experts) → bytes that this takes.
    """

    make: Callable[[Any, Settings, Sequence[np.ndarray]], Any]
    nbytes: Callable[[int, int], int]


class Method(NamedTuple):
    """A way to combine experts.

    Attributes:
        name: As in recipes.
        fold: (options, settings) → scalars (a pytree), folded in float64 and rounded once to float32. A factor that
            changes nothing may be None, which stands for ones. Weights drawn in a program are folded on the host, by a
            call from it: what is known there is folded without JAX.
        combine: Pure function (options, values, known) → float32 array, before the base is added.
        measures: What it must know of more than one entry, in order; a later one sees what an earlier one found.
        options: Its own hyper-parameters, hashable: equal methods share compiled programs.
        parameters: Those that may differ between tensors, each a number or one per expert.
        uses_base: Works on task vectors, so it needs a base.
        scale: λ, applied after normalisation; a host float, but `m3jax.merge` takes a traced scalar too.
        weighting: "each": one weight per expert; "position": one position t between two experts; "none".
        experts: The fewest and the most that it can merge; None for any number.
        sparsifies: Whether a sparsifier may go before it.
        rows: Needs whole rows: chunks are cut between them.
        copies: At scale 1 the result is the first expert, bit for bit.
        transparent: Wherever an input is NaN or infinite the result is too, so that looking at the result is enough.
        check: (options, numbers) → raises M3Error for parameters that cannot be.
        statistics: The kind of statistics that each expert brings beside its own, one number for each entry, as they
            are recorded where they were measured; empty if none.
        preparation: What it makes of statistics that are matrices, one for each tensor; None where they are not.
    """

    name: str
    fold: Callable[[Any, Settings], Any]
    combine: Callable[[Any, Values, Known], Float[Array, "..."]]
    measures: tuple[Measure, ...] = ()
    options: Any = None
    parameters: tuple[tuple[str, Density], ...] = ()
    uses_base: bool = False
    scale: Scalar = 1.0
    weighting: str = "each"
    experts: tuple[int, int | None] = (1, None)
    sparsifies: bool = True
    rows: bool = False
    copies: bool = False
    transparent: bool = False
    check: Callable[[Any, Numbers], None] | None = None
    statistics: str = ""
    preparation: Preparation | None = None


class Sparsifier(NamedTuple):
    """A way to drop entries of each expert before they are combined.

    Attributes:
        name: As in recipes.
        apply: Pure function (options, values, known) → values with dropped entries made zero.
        fold: (options, numbers, shape of the leaf) → scalars (a pytree of host arrays).
        measures: As a method's, of what it is given.
        options: Its own hyper-parameters, hashable.
        parameters: Those that may differ between tensors, each a number or one per expert. A `density` of 1 for every
            expert keeps all: the sparsifier is then left out.
        target: "delta" (task vectors) or "weights" (the raw parameters).
        rescale: What is kept is divided by the `density`; folded into the method's coefficients where it can be.
        random: Draws masks, and so needs a key.
        rows: Needs whole rows.
        check: (options, numbers) → raises M3Error for parameters that cannot be.
    """

    name: str
    apply: Callable[[Any, Values, Known], Values]
    fold: Callable[[Any, Numbers, tuple[int, ...]], Any]
    measures: tuple[Measure, ...] = ()
    options: Any = None
    parameters: tuple[tuple[str, Density], ...] = ()
    target: str = "delta"
    rescale: bool = False
    random: bool = False
    rows: bool = False
    check: Callable[[Any, Numbers], None] | None = None


def checked_target(name: str, target: str) -> str:
    """A sparsifier's target.

    Raises:
        M3Error: It is neither "delta" nor "weights".
    """
    if target not in TARGETS:
        raise M3Error(f"{name}: target is {target!r}, but must be 'delta' or 'weights'")
    return target


def plain_density(where: str, density: float | Sequence[float]) -> Density:
    """A density or several as hashable numbers.

    Raises:
        M3Error: One is not in [0, 1].
    """
    return checked_share(where, "density", density)


def checked_share(where: str, name: str, value: float | Sequence[float]) -> Density:
    """A share or several, of any parameter, as hashable numbers.

    Raises:
        M3Error: One is not in [0, 1], or is known only to a trace: ranks and masks are integers made of it on the host.
    """
    return checked_number(where, name, value, 0.0, 1.0)


def checked_number(
    where: str, name: str, value: float | Sequence[float], low: float = -math.inf, high: float = math.inf
) -> Density:
    """A number or several, of any parameter, as hashable numbers.

    Raises:
        M3Error: One is not finite or not in [low, high], or is known only to a trace.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        raise M3Error(
            f"{where}: {name} is traced, but which entries are kept is decided by integers made of it on the host: "
            "give a number, and make one merge for each outside of jit or vmap"
        )
    numbers = [float(each) for each in np.atleast_1d(value)]
    for each in numbers:
        if not (low <= each <= high and math.isfinite(each)):
            finite = "finite" if low == -math.inf else f"finite and at least {low:g}"
            wanted = f"lie between {low:g} and {high:g}" if high < math.inf else f"be {finite}"
            raise M3Error(f"{where}: {name} is {each:g}, but must {wanted}")
    return tuple(numbers) if np.ndim(value) else numbers[0]


def per_expert(name: str, value: float | Sequence[float], num_experts: int) -> tuple[float, ...]:
    """One number per expert, of one number or of a sequence of them.

    Raises:
        M3Error: The sequence has another length.
    """
    if isinstance(value, int | float | np.number):
        return (float(value),) * num_experts
    if len(value) != num_experts:
        raise M3Error(f"{name}: {len(value)} are given, but there are {num_experts} experts")
    return tuple(float(v) for v in value)
