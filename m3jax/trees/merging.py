"""merge(): parameter trees in, a parameter tree out; pure, under jit, on any sharding."""

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from numpy.typing import DTypeLike

from m3jax.anatomy import MODEL_KINDS, Kind
from m3jax.anatomy.inputs import inputs_first
from m3jax.arithmetic import threefry
from m3jax.arithmetic.double import Double
from m3jax.errors import M3Error
from m3jax.methods import linear
from m3jax.methods.base import Method, Settings, Sparsifier
from m3jax.methods.leaf import (
    LeafScalars,
    Pipeline,
    check_pipeline,
    joined,
    scalars_from,
    settings_of,
    statistics_pipeline,
    statistics_weights,
)
from m3jax.methods.mixup import Mixup, root_of
from m3jax.trees import arrays, draws, matching
from m3jax.trees.adapters import with_products
from m3jax.trees.arrays import Column, Stacked, tensor_shape
from m3jax.trees.matching import is_traced
from m3jax.trees.matching import leaf_name as leaf_name
from m3jax.trees.matching import named_leaves as named_leaves
from m3jax.trees.parts import AnatomyOf, ParameterTree, laid_out_as, tree_of
from m3jax.trees.parts import canonical_leaves as canonical_leaves
from m3jax.trees.statistics import statistics_of
from m3jax.trees.weights import TreeWeights, Weights, group_weights, tensors_of, weights_of

_LOG = logging.getLogger("m3jax")


def _drawing(pipe: Pipeline, tree: ParameterTree, names: Sequence[str], how: Mixup, key: Any) -> draws.Drawing:
    """How weights are drawn, where they are."""
    if key is None:
        raise M3Error("mixup: weights are drawn from a key, but none is given: pass key=jax.random.key(seed)")
    walks = draws.walks_of(tree, names) if how.smooth else ()
    return draws.Drawing(how, pipe.method.weighting, pipe.num_weights, walks, root_of(key, how.sample))


# --- columns ------------------------------------------------------------------------------------------------------


def _columns_to_merge(
    pipe: Pipeline,
    tree: ParameterTree,
    columns: Mapping[str, list[Any]],
    has_base: bool,
    weights: TreeWeights,
    key: Any,
    fold: Callable[[Sequence[Any]], draws.Folded],
) -> list[Column]:
    """Columns with the scalars that are known before any entry is looked at; `fold` gives those of groups."""
    tensors = {name: tensors_of(tree, name) for name in columns}
    keys: dict[str, Any] = {}
    if pipe.random:
        every = [tensor.name for own in tensors.values() for tensor in own]
        drawn, start = threefry.mask_keys(threefry.key_words(key), every, pipe.num_experts), 0
        for name, own in tensors.items():
            keys[name] = drawn[start : start + len(own)]
            start += len(own)

    # What the tensors of a group share: traced weights are folded once for all of them.
    shared = fold(list(dict.fromkeys(weights.group(tensor) for own in tensors.values() for tensor in own)))

    @functools.cache
    def scalars_of(group: Any, shape: tuple[int, ...]) -> LeafScalars:
        settings, folded = shared[group]
        return scalars_from(pipe, settings, shape, None, folded)

    def column(name: str) -> Column:
        axis, arrays = tree.parts[name].stack_axis, columns[name]
        experts = tuple(arrays[-pipe.num_arrays :])
        base, template = arrays[0] if has_base and pipe.uses_base else None, arrays[0]
        groups = [weights.group(tensor) for tensor in tensors[name]]
        shape = tensor_shape(np.shape(experts[0]), axis)
        scalars = [scalars_of(group, shape) for group in groups]
        settings = tuple(shared[group][0] for group in groups)
        own = keys.get(name)
        if axis is None:
            only = scalars[0]._replace(mask_keys=None if own is None else own[0])
            return Column(name, experts, base, template, settings, only)
        varied = any(group != groups[0] for group in groups)
        folded = (joined(scalars) if varied else scalars[0])._replace(mask_keys=own)
        whole = Column(name, experts, base, template, settings, folded)
        return whole._replace(stacked=Stacked(axis, varied))

    return [column(name) for name in columns]


def _with_matrices(column: Column, matrices: tuple[Any, ...]) -> Column:
    """A column with its statistics, which are matrices."""
    first = inputs_first(column.name, column.shape, np.shape(matrices[0])[-1])
    return column._replace(matrices=matrices, inputs_first=first)


def _last_uses(leaves: list[Column], kept: Sequence[Any]) -> list[list[jax.Array]]:
    """For each leaf, the experts' arrays that no later leaf and nothing of `kept` needs."""
    seen = {id(array) for array in kept}
    uses: list[list[jax.Array]] = []
    for leaf in reversed(leaves):
        last = {id(x): x for x in leaf.experts if isinstance(x, jax.Array) and id(x) not in seen}
        seen |= set(last)
        uses.append(list(last.values()))
    return uses[::-1]


def _planned(
    pipe: Pipeline,
    tree: ParameterTree,
    kinds: Mapping[str, Kind],
    columns: Mapping[str, list[Any]],
    has_base: bool,
    weights: TreeWeights,
    scale: Any,
    key: Any,
    statistics: Mapping[str, tuple[Any, ...]],
    zero: Any,
) -> list[tuple[Pipeline, Column]]:
    """Every column with what is done to it and all that was measured: parameters, then what is only averaged.

    These are running statistics, and parameters without the statistics that the method asks for.
    """
    lacks = {name for name in columns if pipe.method.statistics and name not in statistics}
    parameters = {
        name: [*column, *(statistics.get(name, ()) if pipe.method.preparation is None else ())]
        for name, column in columns.items()
        if kinds[name] == "parameter" and name not in lacks
    }
    averaged = {name: column for name, column in columns.items() if name not in parameters}
    plain = statistics_pipeline(pipe.num_experts)
    if weights.given is not None and not pipe.num_weights:
        raise M3Error(f"{pipe.method.name}: takes no weights, but some are given: leave them out")
    how = weights.given
    drawing = _drawing(pipe, tree, list(kinds), how, key) if isinstance(how, Mixup) else None

    def fold_by(doing: Pipeline, weigh: draws.Weigh, groups: Sequence[Any]) -> draws.Folded:
        if drawing is not None:
            return draws.folded(drawing, doing, groups, weigh) if groups else {}
        settings = {group: weigh(group_weights(pipe, weights, group)) for group in groups}
        return {group: (own, doing.method.fold(doing.method.options, own)) for group, own in settings.items()}

    def as_parameters(given: tuple[Any, ...]) -> Settings:
        return settings_of(pipe, given, scale)

    def as_averages(given: tuple[Any, ...]) -> Settings:
        return settings_of(plain, statistics_weights(pipe, given), 1.0)

    fold = functools.partial(fold_by, pipe, as_parameters)
    own = _columns_to_merge(pipe, tree, parameters, has_base, weights, key, fold)
    if pipe.method.preparation is not None:
        own = [_with_matrices(column, statistics[column.name]) for column in own]
    fold = functools.partial(fold_by, plain, as_averages)
    others = _columns_to_merge(plain, tree, averaged, has_base, weights, key, fold)
    return [(pipe, column) for column in arrays.measured(pipe, own, zero)] + [(plain, column) for column in others]


def _check_call(experts: Any, method: Any, sparsify: Any) -> None:
    """Raises M3Error where arguments are of another type than they must be, as hands slip."""
    if isinstance(experts, str) or not isinstance(experts, Sequence):
        raise M3Error("merge: takes its trees as one list: call m3jax.merge([a, b], ...)")
    for role, given, wanted in (("method", method, Method), ("sparsify", sparsify, Sparsifier)):
        if given is None or isinstance(given, wanted):
            continue
        if isinstance(given, str):
            raise M3Error(f"{role}: is the text {given!r}: call its function instead, such as m3jax.{given}(...)")
        if inspect.isfunction(given):
            raise M3Error(f"{role}: is the function {given.__name__} itself: call it, m3jax.{given.__name__}(...)")
        if role == "method" and isinstance(given, Sparsifier):
            raise M3Error(f"method: {given.name} is a sparsifier: pass sparsify={given.name}(...) beside a method")
        raise M3Error(
            f"{role}: is of type {type(given).__name__}: trees go into one list, m3jax.merge([a, b], method), and "
            f"{role} is made by a function such as m3jax.{'linear()' if role == 'method' else 'dare(density)'}"
        )


def _check_places(pipe: Pipeline, tree: ParameterTree, columns: Mapping[str, list[Any]], weights: TreeWeights) -> None:
    """Raises M3Error under manual mesh axes, where an array is a shard, if the merge needs to know the whole."""
    by_block = bool(weights.rows) or isinstance(weights.given, Mapping)
    by_block |= isinstance(weights.given, Mixup) and weights.given.granularity != "model"
    needs = _needs_whole(pipe)
    for name, column in columns.items():
        what = needs or ("the block's weights" if by_block and tree.parts[name].stack_axis is not None else None)
        if what is not None and any(arrays.is_manual(x) for x in column):
            raise M3Error(
                f"{name}: is a shard under jax.shard_map, but {what} depend on the whole array: merge outside of "
                "shard_map, where shardings are honoured, or on a mesh with Auto axes"
            )


def _apart_from_scale(method: Method) -> tuple[Method, Any]:
    """A method that can be hashed, and its λ: a host float, or a traced scalar.

    Raises:
        M3Error: λ is no one number, or is traced where the method makes its factors on the host.
    """
    if np.ndim(method.scale):
        raise M3Error(f"{method.name}: scale has shape {list(np.shape(method.scale))}: give one number")
    if not is_traced(method.scale):
        scale = float(method.scale)
        return method._replace(scale=scale), scale
    if method.weighting != "each":
        raise M3Error(f"{method.name}: scale is traced, but its factors are made on the host: give a number")
    return method._replace(scale=1.0), Double.of(method.scale)


def _needs_whole(pipe: Pipeline) -> str | None:
    """What of a merge depends on more than the entries themselves; None if nothing does."""
    sparsifier = pipe.sparsifier
    if sparsifier is not None and sparsifier.random:
        return f"{sparsifier.name}'s masks"
    numbers = settings_of(pipe, (1.0,) * pipe.num_weights, pipe.method.scale)
    stage = next((stage for stage in pipe.stages if stage.needed(pipe, numbers)), None)
    if stage is not None:
        owner = pipe.method.name if stage.owner == "method" or sparsifier is None else sparsifier.name
        return f"{owner}'s measures"
    return "whole rows" if pipe.rows else None


def _note_kept(tree: ParameterTree) -> None:
    """Says which leaves are no parameters, to whoever listens to the package's log.

    Raises:
        M3Error: All of them are none, so that nothing would be merged.
    """
    kept = Counter(part.kind for part in tree.parts.values() if part.kind not in MODEL_KINDS)
    if kept and kept.total() == len(tree.parts):
        name, part = next(iter(tree.parts.items()))
        raise M3Error(
            f"merge: nothing in these trees is of a model ({name} is of kind {part.kind}), and state of training is "
            "never merged: pass parameters, or say what leaves are with anatomy={'kinds': {PATTERN: 'parameter'}}"
        )
    if kept:
        said = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(kept.items()))
        _LOG.info("merge: leaves that are no parameters stay as they are in the first tree: %s", said)


def _aliases(tree: ParameterTree, kinds: Mapping[str, Kind], by_name: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Leaves that are one with another, by what anatomy says and their values do not deny; and that other."""
    spelled = {stored: name for name, stored in tree.stored.items()}
    found = {}
    for name in kinds:
        original = spelled.get(tree.parts[name].alias_of or "")
        if original is None or original not in kinds:
            continue
        if all(matching.equal_arrays(model[name], model[original]) for model in by_name):
            found[name] = original
    return found


def merge(
    experts: Sequence[PyTree],
    method: Method | None = None,
    *,
    base: PyTree | None = None,
    weights: Weights = None,
    sparsify: Sparsifier | None = None,
    key: Any = None,
    dtype: DTypeLike | None = None,
    only: matching.Only = None,
    anatomy: AnatomyOf = None,
    donate: bool = False,
    lora: Any = None,
    statistics: Sequence[PyTree] | None = None,
) -> PyTree:
    """Merge parameter trees; the bits do not depend on jit, device, mesh or sharding.

    Runs eagerly (each distinct leaf shape is compiled once) or inside the caller's jit, with parameters, weights and
    key traced, on meshes with Auto or Explicit axes. Differentiable in the parameters and the weights, and `vmap` over
    weights and keys gives a batch of merges. In a trace, methods of angles (slerp and its kin) call back to the host.

    What each leaf is, is told from names, shapes and the types of Flax's variables (`anatomy`). Parameters are merged;
    running statistics of batch normalisation get their mean, with the same weights where each expert has one; other
    buffers are copied and must be equal; steps, optimizer and random states are the template's, and need not be equal.
    A leaf that stacks blocks along an axis is merged as if each block were a leaf of its own: the bits are the same.
    Trees that store the same blocks otherwise, one by one or along another axis, are laid out as the template is.
    Masks and draws go by canonical names (`m3jax.trees.parts.canonical_leaves`), in which neither boxes of Flax nor a
    wrapper around the whole tree are.

    Args:
        experts: n ≥ 1 trees of float32, bfloat16 or float16 arrays: dicts (nested or flat), linen variables, Flax
            states and modules, train states, dataclasses, any pytree. Leaves are matched by name, their path joined by
            dots, or else by canonical name.
        method: Of `m3jax.methods`; default `linear()`, the average. Its `scale` may be traced, for methods that weigh
            each expert.
        base: The tree that task vectors are taken from, for methods that use them.
        weights: n numbers for the whole model, or one for every expert; a mapping to such from leaf names, blocks
            ("layers.3") or prefixes of names, of which the longest that fits a leaf counts, or from towers or prefixes
            to arrays [blocks, n] for what is in blocks; an array [groups, n] with a row for each block of each tower
            and a last one for what is outside blocks, in the order of `m3jax.trees.parts.layer_groups`; `mixup(alpha)`
            to draw them (M³); None for ones. Arrays may be traced; leaves that stack blocks take their rows. For
            slerp, one position t instead of n numbers.
        sparsify: `dare(density)` or `magnitude(density)`, applied before the method.
        key: Integer seed or threefry2x32 key for DARE's masks and M³'s draws. Where it is traced, the program calls
            back to the host for draws, which gives their bits and costs some tenths of a millisecond.
        dtype: Of merged leaves; default: each leaf's dtype in the base, or else in the first expert.
        only: What is merged; the other leaves come from the base, or else from the first expert, as they are, and
            need not be equal in the other trees or even be there. A collection or several: "params" of linen variables
            or of a train state (the first key of a path), and of `nnx.State` what is `nnx.Param`. Or a type of
            `nnx.Variable`, or a predicate on leaf names. Default: every leaf that is of the model.
        anatomy: What is known of the template beside names, shapes and types, and outranks them: an
            `m3jax.anatomy.Overrides` or a mapping with its keys, such as {"stacked": {"layers": 1}, "kinds": {"ema":
            "optimizer"}}; patterns are searched in leaf names.
        donate: Free each array of the experts once it is merged, so that no more than inputs and one leaf are in
            memory; the base's arrays are kept, those of statistics are not. In a trace this has no effect: there the
            caller's `donate_argnums` has.
        lora: Merge adapters as products: the scale (alpha / rank) of the low-rank factors that trees have, one number
            or a mapping from patterns to numbers, as `with_lora` takes it. Each tree's W becomes W + scale·A·B first; a
            tree of factors alone is added to the base's weights. The result has whole weights and no factors.
        statistics: For methods that ask for some, a tree for each expert, named like its own. For `fisher` numbers from
            0 on; for `regmean` in place of each leaf the Gram matrix of its inputs (of a leaf that stacks blocks, one
            for each along axis 0). Leaves that none of them has are averaged. Numbers that are traced are checked where
            the program runs, or not at all.

    Returns:
        A tree like the base, or else like the first expert, of the same type, its leaves sharded as there.

    Raises:
        M3Error: The trees differ, or an argument cannot be used; the message says which. Factors of adapters and
            quantised weights cannot be merged, blocks cannot be told where weights are by block, or arrays are shards
            under `jax.shard_map` and the merge depends on the whole.

    Example:
        >>> import jax.numpy as jnp
        >>> import m3jax
        >>> a, b = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> m3jax.merge([a, b], weights=[0.25, 0.75])["w"].tolist()
        [0.75, 0.75]

    References:
        Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025.
    """
    method = linear.linear() if method is None else method
    _check_call(experts, method, sparsify)
    method, scale = _apart_from_scale(method)
    pipe = Pipeline(method, sparsify, len(experts))
    check_pipeline(pipe, base is not None)
    if sparsify is not None and sparsify.random and key is None:
        raise M3Error(f"{sparsify.name}: masks are drawn from a key, but none is given: pass key=jax.random.key(seed)")
    if lora is not None:
        experts, base = with_products(experts, base, lora)
    models, labels = list(experts), [f"expert {i}" for i in range(len(experts))]
    if base is not None:
        models, labels = [base, *models], ["the base", *labels]
    leaves = [matching.leaves_of(model) for model in models]
    tree = tree_of(leaves[0], anatomy)
    leaves = [leaves[0], *(laid_out_as(tree, other, anatomy) for other in leaves[1:])]
    by_name, kinds = matching.match(leaves, tree.parts, labels, only)
    template = by_name[0]
    if method.copies and scale == 1.0 and dtype is None:
        kinds = {}  # the template is the one expert
    _note_kept(tree)
    aliases = _aliases(tree, kinds, by_name)
    columns = {name: [model[name] for model in by_name] for name in kinds if name not in aliases}
    # Under a jit whose arguments are none of the merge's, a zero would be a constant of the program, and no fence.
    in_trace = isinstance(scale, Double) or is_traced(columns, weights, key, statistics, jnp.zeros((), jnp.uint32))
    zero: Any = None if in_trace else np.uint32(0)

    told = statistics_of(pipe, statistics, tree, [name for name in columns if kinds[name] == "parameter"], anatomy)
    whose = weights_of(weights, tree, list(kinds))
    _check_places(pipe, tree, columns, whose)
    planned = _planned(pipe, tree, kinds, columns, base is not None, whose, scale, key, told, zero)
    kept = [leaf for name, leaf in template.items() if base is not None or name not in columns]
    doomed = _last_uses([leaf for _, leaf in planned], kept) if donate and not in_trace else [[]] * len(planned)
    merged: dict[str, Any] = dict(template)
    kept_ready: dict[Hashable, LeafScalars] = {}
    for (own, leaf), free in zip(planned, doomed, strict=True):
        out, home = jnp.dtype(dtype or leaf.template.dtype), arrays.home_of(leaf)
        if leaf.matrices:
            array = arrays.merge_prepared(own, out, home, leaf, kept_ready)
        else:
            array = arrays.merge_array(own, out, home, leaf.stacked, *arrays.brought(leaf), leaf.scalars, zero)
        merged[leaf.name] = arrays.settled(array, home)
        for used in free:
            used.delete()
    merged |= {name: merged[original] for name, original in aliases.items()}
    return jax.tree.unflatten(jax.tree.structure(models[0]), list(merged.values()))
