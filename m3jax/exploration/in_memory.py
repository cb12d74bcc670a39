"""Many draws of trees in memory: scored in one program where the score allows it, and what came of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from m3jax.errors import M3Error
from m3jax.evaluation.checks import check_count
from m3jax.exploration.pictures import Drawn, picture
from m3jax.methods.base import Method, Sparsifier
from m3jax.methods.mixup import mixup, mixup_weights
from m3jax.text import html_table, table
from m3jax.trees.merging import merge


class TreeExploration(NamedTuple):
    """What draws of trees in memory came to.

    Attributes:
        best: The merged tree with the highest score, the first of equals.
        sample: Its number.
        scores: float[samples], in the order of draws.
        draws: float64[samples, n], the weights of each; float64[samples, 1], positions, for slerp.
        experts: float[n], what each expert scores by itself.
        equal: What equal weights score.
        base: What the base scores; None without one.
        compiled: Whether all draws were scored in one program.
    """

    best: PyTree
    sample: int
    scores: np.ndarray
    draws: np.ndarray
    experts: np.ndarray
    equal: float
    base: float | None
    compiled: bool

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the best."""
        return tuple(map(float, self.draws[self.sample]))

    @property
    def table(self) -> str:
        """Base, experts, equal weights, then the draws, the best first."""
        return "\n".join(table(*self._rows()))

    def _repr_html_(self) -> str:
        """The table, as a notebook shows it."""
        return html_table(*self._rows())

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        count = self.draws.shape[1]
        rows = [] if self.base is None else [["base", *[""] * count, f"{self.base:.4f}"]]
        rows += [[f"expert {i}", *[""] * count, f"{score:.4f}"] for i, score in enumerate(self.experts)]
        rows += [["equal weights", *[""] * count, f"{self.equal:.4f}"]]
        for sample in np.argsort(-self.scores, kind="stable"):
            rows.append([f"{sample}", *(f"{w:.4f}" for w in self.draws[sample]), f"{self.scores[sample]:.4f}"])
        return ["sample", *(f"w{i}" for i in range(count)), "score"], rows

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.4f}" for weight in self.weights)
        return (
            f"TreeExploration(sample {self.sample} of {len(self.scores)}: weights ({weights}), score"
            f" {self.scores[self.sample]:.4f}; equal weights {self.equal:.4f})"
        )

    def plot(self, path: str | Path) -> None:
        """Draw scores over weights, as `m3jax explore --picture` does.

        Args:
            path: A .png, .svg or .pdf file.

        Raises:
            M3Error: It cannot be written.
        """
        picture(_drawn(self), Path(path))


def _drawn(found: TreeExploration) -> Drawn:
    from m3jax.exploration.references import EQUAL
    from m3jax.exploration.selection import Result

    def result(sample: int, weights: Sequence[float], score: float, reference: str | None = None) -> Result:
        groups = {"model": tuple(map(float, weights))} if len(weights) else {}
        return Result(sample, groups, 1.0, {"score": float(score)}, 0.0, "model", reference=reference)

    results = tuple(result(i, w, s) for i, (w, s) in enumerate(zip(found.draws, found.scores, strict=True)))
    names = tuple(f"expert {i}" for i in range(len(found.experts)))
    count = found.draws.shape[1]
    beside = [] if found.base is None else [result(-1, (), found.base, "base")]
    beside += [result(-2, (), score, name) for name, score in zip(names, found.experts, strict=True)]
    beside += [result(-3, (0.5,) if count == 1 else (1 / count,) * count, found.equal, EQUAL)]
    return Drawn(results[found.sample], results, beside, names, {})


def explore_trees(
    experts: Sequence[PyTree],
    method: Method | None = None,
    *,
    score: Callable[[PyTree], Any],
    base: PyTree | None = None,
    samples: int = 32,
    alpha: float | tuple[float, float] = 0.5,
    sparsify: Sparsifier | None = None,
    key: Any = 0,
    batch_size: int | None = None,
    statistics: Sequence[PyTree] | None = None,
) -> TreeExploration:
    """Draw many ratios (M³) for trees in memory, score the merges, and keep the best.

    Sample k is `merge(experts, method, weights=mixup(alpha, sample=k), key=key, …)`, bit for bit. Where JAX can trace
    the score, all draws are one program that holds one merge at a time (`batch_size` merges with it, by `vmap`); else
    each merge is made and scored by itself.

    Args:
        experts: As of `m3jax.merge`, two or more.
        method: As of `m3jax.merge`, for methods that take weights; default `linear()`.
        score: From a merged tree to one number, larger being better. It sees the experts and the base too.
        base: As of `m3jax.merge`.
        samples: How many draws.
        alpha: Of the Beta, or Dirichlet for more experts.
        sparsify: As of `m3jax.merge`.
        key: Integer seed or key of draws and masks.
        batch_size: How many merges are scored at once; 1 by default, in the least memory.
        statistics: As of `m3jax.merge`, for `fisher`; `regmean` is refused, as it is solved on the host.

    Returns:
        The best merge, and the scores of all, of each input and of equal weights.

    Raises:
        M3Error: There are no samples, or what `merge` refuses; the score of a tree is not one number, or is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> found = explore_trees([a, b], score=lambda tree: -jnp.abs(tree["w"] - 0.25).sum(), samples=64)
        >>> bool(abs(found.best["w"][0] - 0.25) < 0.05), found.compiled
        (True, True)

    References:
        Zhou et al., Mixup Model Merge, arXiv 2502.15434, 2025.
    """
    check_count("number of samples", samples)
    check_count("batch size", batch_size, optional=True)
    experts = list(experts)
    if isinstance(method, Method) and method.preparation is not None:
        raise M3Error(
            f"{method.name}: is solved on the host, one merge at a time, and not drawn here: score "
            f"m3jax.merge(experts, m3jax.{method.name}(), weights=w, statistics=[...]) for each w of "
            "m3jax.mixup_weights(key, alpha, n, sample=range(samples)).tolist()"
        )

    def made(weights: Any) -> PyTree:
        return merge(experts, method, base=base, weights=weights, sparsify=sparsify, key=key, statistics=statistics)

    def drawn(sample: Any) -> PyTree:
        return made(mixup(alpha, sample=sample))

    def number(tree: PyTree) -> Any:
        return jnp.asarray(score(tree)).reshape(())

    def known(tree: PyTree, whose: str) -> float:
        return _known(score(tree), whose)

    position = method is not None and method.weighting == "position"
    count = len(experts)
    equal_weights: Any = 0.5 if position else [1 / count for _ in experts]
    equal = made(equal_weights)
    of_equal = known(equal, "equal weights")
    alone = np.array([known(tree, f"expert {i}") for i, tree in enumerate(experts)])
    of_base = None if base is None else known(base, "the base")
    compiled = _is_traceable(number, equal)
    if compiled:
        every = jax.jit(lambda numbers: lax.map(lambda k: number(drawn(k)), numbers, batch_size=batch_size))
        found = list(np.asarray(every(jnp.arange(samples, dtype=jnp.uint32))))
    else:
        found = [score(drawn(k)) for k in range(samples)]
    scores = np.array([_known(each, f"sample {k}") for k, each in enumerate(found)])
    best = int(np.argmax(scores))
    draws = np.atleast_2d(np.asarray(mixup_weights(key, alpha, count, sample=range(samples)), np.float64))
    draws = draws[:, :1] if position else draws
    return TreeExploration(drawn(best), best, scores, draws, alone, of_equal, of_base, compiled)


def _known(score: Any, whose: str) -> float:
    """A score as a number, with all its digits.

    Raises:
        M3Error: It is no number.
    """
    if np.shape(score) != ():
        raise M3Error(f"score: gives an array of shape {np.shape(score)}, but must give one number: take its mean")
    try:
        number = float(score)
    except (TypeError, ValueError) as error:
        raise M3Error(f"score: gives {score!r} for {whose}, but must give one number for every tree") from error
    if np.isnan(number):
        raise M3Error(f"score: is NaN of {whose}: give a number for every tree")
    return number


def _is_traceable(function: Callable[[PyTree], Any], tree: PyTree) -> bool:
    """Whether JAX can trace a function that is known to work for arrays."""
    try:
        jax.eval_shape(function, tree)
    except Exception:  # whatever it does with values: branches, indices, files, other libraries
        return False
    return True
