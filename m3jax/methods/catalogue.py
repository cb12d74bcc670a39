"""Which methods and sparsifiers there are: one row each, plain data, without JAX.

Recipes take from here what a method is called, which parameters it has, how each is read, what it is when nobody says
so, and at which level it may be given. A package outside adds a method by an entry point in the group
`m3jax.methods` whose name is the method's and whose object is a `MethodRow`.
"""

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from m3jax.errors import M3Error
from m3jax.methods.rows import MethodRow, Parameter, SparsifierRow, as_read, fault_of

GROUP = "m3jax.methods"
"""The group of entry points that add methods."""

# --- parameters that several methods have -------------------------------------------------------------------------

_WEIGHT = Parameter("weight", "weights", "the expert's weight", 1.0, level="expert")
_LAMBDA = Parameter("lambda", "scale", "factor of the whole task vector, after normalisation", 1.0, level="tensor")
_DENSITY = Parameter("density", "", "share of entries that are kept", 1.0, low=0.0, high=1.0, level="expert")


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "method.normalize", "divide by the sum of the weights", default, "flag")


_NO_RESCALE = "{method} trims without rescaling; use sparsify with method magnitude and rescale: true instead"
_RESCALE = Parameter(
    "rescale",
    "sparsifier.rescale",
    "divide what is kept by its probability",
    True,
    "flag",
    note="rescale divides the kept entries by the density, as DARE's paper does; mergekit 0.1 and later match the L1"
    " norm of each tensor.",
)
_SCOPE = ("tensor", "model")
_TRIM_SCOPE = Parameter(
    "trim_scope",
    "method.trim_scope",
    "rank each tensor, or the whole model",
    "tensor",
    "choice",
    choices=_SCOPE,
    mergekit=False,
)
_SIGN_ELECTION = Parameter(
    "sign_election",
    "method.sign_election",
    "elect by the weighted or by the unweighted sum",
    "weighted",
    "choice",
    choices=("weighted", "unweighted"),
    mergekit=False,
)


def _trimmed(name: str, mergekit: bool = True) -> Parameter:
    return _DENSITY._replace(
        name=name,
        sets="method.density",
        help="share of entries that trimming keeps",
        whole=("trim_scope", "model"),
        mergekit=mergekit,
    )


_UNTRIMMED = (("density", 1.0),)
_SPARSE = _DENSITY._replace(sets="sparsifier.density")
_SHARE = Parameter("", "", "", None, low=0.0, high=1.0, level="expert")
_GAMMA = _SHARE._replace(
    name="gamma", sets="sparsifier.gamma", help="share of the largest entries that are dropped", default=0.01
)
_EPSILON = _SHARE._replace(
    name="epsilon", sets="sparsifier.epsilon", help="how far the probabilities reach around the density", default=0.15
)
_KEPT_AS_IS = _RESCALE._replace(default=False, note="", help="divide what is kept by the density")
_RESCALE_DELLA = _RESCALE._replace(
    note="rescale divides each kept entry by its probability, as DELLA's paper does; mergekit matches the L1 norm of"
    " each tensor."
)
_BREADCRUMBS_PAPER = "Davari & Belilovsky, Model Breadcrumbs, 2023, arXiv 2312.06795"
_DELLA_PAPER = "Deep et al., DELLA-Merging, 2024, arXiv 2406.11617"
_RAM_PAPER = "Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572"
_CHANGED = Parameter(
    "epsilon", "method.epsilon", "an entry is changed where |δᵢ| is larger", 1e-5, low=0.0, level="tensor"
)
_MERGEKIT_PAPER = "mergekit, Goddard et al., 2024, arXiv 2403.13257"
_LINEAR, _TASKS = "m3jax.methods.linear:linear", "m3jax.methods.linear:task_arithmetic"
_TIES = "m3jax.methods.ties:ties"

METHODS: tuple[MethodRow, ...] = (
    MethodRow(
        "linear",
        _LINEAR,
        "weighted average of parameters; with mixup, M³",
        "Σ wᵢ·xᵢ (/ Σ wᵢ)",
        "Wortsman et al., Model soups, 2022, arXiv 2203.05482",
        (_WEIGHT, _normalize(True)),
        base="expert",
    ),
    MethodRow(
        "task_arithmetic",
        _TASKS,
        "weighted sum of task vectors",
        "p + λ·Σ wᵢ·δᵢ",
        "Ilharco et al., Editing models with task arithmetic, 2023, arXiv 2212.04089",
        (_WEIGHT, _normalize(False), _LAMBDA),
    ),
    MethodRow(
        "ties",
        _TIES,
        "trim small entries, elect a sign, merge those that agree",
        "p + λ·Σ wᵢ·trim(δᵢ) over the experts i of the elected sign (/ Σ wᵢ of these)",
        "Yadav et al., TIES-Merging, 2023, arXiv 2306.01708",
        (
            _WEIGHT,
            _normalize(True),
            _LAMBDA,
            _trimmed("density"),
            _RESCALE._replace(default=False, sets="", only=_NO_RESCALE, note=""),
            _TRIM_SCOPE,
            _SIGN_ELECTION,
        ),
    ),
    MethodRow(
        "dare_linear",
        _TASKS,
        "DARE, then a weighted sum of task vectors",
        "p + λ·Σ wᵢ·dare(δᵢ)",
        "Yu et al., Language models are super Mario, 2024, arXiv 2311.03099",
        (_WEIGHT, _normalize(False), _LAMBDA, _SPARSE, _RESCALE),
        sparsifier="m3jax.methods.dare:dare",
        without="task_arithmetic",
    ),
    MethodRow(
        "dare_ties",
        _TIES,
        "DARE, then TIES; trims only where trim_density says so",
        "p + λ·Σ wᵢ·trim(dare(δᵢ)) over the experts i of the elected sign (/ Σ wᵢ of these)",
        "Yu et al., Language models are super Mario, 2024, arXiv 2311.03099",
        (
            _WEIGHT,
            _normalize(False),
            _LAMBDA,
            _SPARSE,
            _RESCALE,
            _trimmed("trim_density", mergekit=False),
            _TRIM_SCOPE,
            _SIGN_ELECTION,
        ),
        sparsifier="m3jax.methods.dare:dare",
        without="ties",
    ),
    MethodRow(
        "breadcrumbs",
        _TASKS,
        "drop the largest and the smallest entries, then a weighted sum of task vectors",
        "p + λ·Σ wᵢ·breadcrumbs(δᵢ)",
        _BREADCRUMBS_PAPER,
        (_WEIGHT, _normalize(False), _LAMBDA, _SPARSE, _GAMMA, _KEPT_AS_IS),
        sparsifier="m3jax.methods.breadcrumbs:breadcrumbs",
        without="task_arithmetic",
    ),
    MethodRow(
        "breadcrumbs_ties",
        _TIES,
        "drop the largest and the smallest entries, then elect a sign as TIES",
        "p + λ·Σ wᵢ·breadcrumbs(δᵢ) over the experts i of the elected sign (/ Σ wᵢ of these)",
        _BREADCRUMBS_PAPER,
        (_WEIGHT, _normalize(False), _LAMBDA, _SPARSE, _GAMMA, _KEPT_AS_IS, _SIGN_ELECTION),
        sparsifier="m3jax.methods.breadcrumbs:breadcrumbs",
        without="ties",
        fixed=_UNTRIMMED,
    ),
    MethodRow(
        "della_linear",
        _TASKS,
        "drop entries at random, small ones more likely, then a weighted sum of task vectors",
        "p + λ·Σ wᵢ·della(δᵢ)",
        _DELLA_PAPER,
        (_WEIGHT, _normalize(False), _LAMBDA, _SPARSE, _EPSILON, _RESCALE_DELLA),
        sparsifier="m3jax.methods.della:della",
        without="task_arithmetic",
    ),
    MethodRow(
        "della",
        _TIES,
        "drop entries at random, small ones more likely, then elect a sign as TIES",
        "p + λ·Σ wᵢ·della(δᵢ) over the experts i of the elected sign (/ Σ wᵢ of these)",
        _DELLA_PAPER,
        (_WEIGHT, _normalize(True), _LAMBDA, _SPARSE, _EPSILON, _RESCALE_DELLA, _SIGN_ELECTION),
        sparsifier="m3jax.methods.della:della",
        without="ties",
        fixed=_UNTRIMMED,
    ),
    MethodRow(
        "model_stock",
        "m3jax.methods.model_stock:model_stock",
        "between the base and the average, as far as the angle between task vectors says",
        "p + t·(mean(xᵢ) − p), t = n·cosθ / (1 + (n−1)·cosθ)",
        "Jang et al., Model Stock, 2024, arXiv 2403.19522",
        (Parameter("filter_wise", "method.filter_wise", "one angle for each row, not each tensor", False, "flag"),),
        experts=(2, None),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "sce",
        "m3jax.methods.sce:sce",
        "entries that differ most between experts, of the elected sign, by energy",
        "p + Σ wᵢ·select(δᵢ) / Σ wᵢ over the experts i of the elected sign, wᵢ ∝ mean(select(δᵢ)²)",
        "Wan et al., FuseChat, 2024, arXiv 2408.07990",
        (
            Parameter(
                "select_topk",
                "method.select_topk",
                "share of the entries that vary between experts that is kept",
                1.0,
                low=0.0,
                high=1.0,
                level="tensor",
            ),
        ),
        experts=(1, 16),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "ram",
        "m3jax.methods.ram:ram",
        "entries that one expert alone changed are taken, shared ones averaged",
        "p + mean(δᵢ) over the experts i with |δᵢ| > ε",
        _RAM_PAPER,
        (_CHANGED,),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "ramplus_tl",
        "m3jax.methods.ram:ramplus_tl",
        "as ram, with entries that one expert alone changed enlarged",
        "p + mean(δᵢ) over the experts i with |δᵢ| > ε; of one alone (1 + r·clamp(sharedᵢ/uniqueᵢ, 0, α))·δᵢ",
        _RAM_PAPER,
        (
            Parameter("r", "method.r", "how much entries of one expert alone are enlarged", 0.1, level="tensor"),
            Parameter("alpha", "method.alpha", "the most that shared/unique counts", 0.2, low=0.0, level="tensor"),
            _CHANGED,
        ),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "nearswap",
        "m3jax.methods.nearswap:nearswap",
        "the base moved towards one expert, by no more than t in any entry",
        "p + clamp(t/|δ|, 0, 1)·δ",
        "alchemonaut, QuartetAnemoi-70B-t0.0001, 2024, on Hugging Face",
        (Parameter("t", "method.t", "how far an entry moves at most", None, low=0.0, level="tensor"),),
        experts=(1, 1),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "magmax",
        "m3jax.methods.magmax:magmax",
        "of every entry the task vector of largest magnitude",
        "p + λ·δᵢ of the expert i with the largest |δᵢ|",
        "Marczak et al., MagMax, 2024, arXiv 2407.06322",
        (_LAMBDA,),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "consensus",
        "m3jax.methods.consensus:consensus",
        "weighted sum of task vectors where several experts matter (TALL-masks)",
        "p + λ·Σ wᵢ·δᵢ where |wᵢ·δᵢ| ≥ λᵢ·|Σ wⱼ·δⱼ − wᵢ·δᵢ| for at least k experts i",
        "Wang et al., Localizing task information for improved model merging and compression, 2024, arXiv 2405.07813",
        (
            _WEIGHT,
            _normalize(False),
            _LAMBDA,
            Parameter(
                "tall_mask_lambda",
                "method.tall_mask_lambda",
                "λᵢ: the larger, the fewer entries matter to the expert",
                1.0,
                low=0.0,
                level="expert",
                mergekit=False,
            ),
            Parameter(
                "agreement",
                "method.agreement",
                "k, to how many experts an entry must matter",
                2.0,
                low=1.0,
                mergekit=False,
            ),
        ),
        sparsifies=False,
    ),
    MethodRow(
        "pcb",
        "m3jax.methods.pcb:pcb",
        "entries that compete well within and between experts, averaged",
        "p + λ·Σ sᵢ·wᵢ·δᵢ / Σ sᵢ, sᵢ from exp(n·norm(|δᵢ|)²)·tanh(δᵢ·Σ δⱼ)",
        "Du et al., Parameter competition balancing for model merging, 2024, arXiv 2410.02396",
        (
            _WEIGHT,
            _normalize(False),
            _LAMBDA,
            _trimmed("density")._replace(default=0.1, help="share of entries that count"),
            _TRIM_SCOPE,
        ),
        experts=(1, 64),
        sparsifies=False,
    ),
    MethodRow(
        "fisher",
        "m3jax.methods.fisher:fisher",
        "the mean of each entry, weighed by how much each model's data says of it",
        "Σ wᵢ·Fᵢ·xᵢ / Σ wᵢ·Fᵢ, Fᵢ the diagonal of the model's Fisher information; Σ wᵢ·xᵢ / Σ wᵢ where that sum is 0",
        "Matena & Raffel, Merging models with Fisher-weighted averaging, 2021, arXiv 2111.09832",
        (
            _WEIGHT._replace(low=0.0),
            _CHANGED._replace(help="what each Fᵢ counts at least", default=0.0),
        ),
        base="expert",
        sparsifies=False,
        statistics="fisher",
    ),
    MethodRow(
        "regmean",
        "m3jax.methods.regmean:regmean",
        "linear layers nearest to what each model gives on its own data; others averaged",
        "(Σ wᵢ·Wᵢ·Gᵢ')·(Σ wᵢ·Gᵢ')⁻¹, Gᵢ the Gram matrix of what comes into W in the model, G' with less beside its "
        "diagonal",
        "Jin et al., Dataless knowledge fusion by merging weights of language models, 2022, arXiv 2212.09849",
        (
            _WEIGHT._replace(low=0.0),
            Parameter(
                "reduce_non_diagonal_ratio",
                "method.reduce_non_diagonal_ratio",
                "factor of what is beside the diagonals",
                0.9,
                low=0.0,
                high=1.0,
                level="tensor",
                mergekit=False,
            ),
        ),
        base="expert",
        sparsifies=False,
        statistics="gram",
    ),
    MethodRow(
        "nuslerp",
        "m3jax.methods.nuslerp:nuslerp",
        "along the arc between two models or task vectors, at the place that weights say",
        "(p +) (sin((1−t)θ)·a + sin(tθ)·b) / sin θ, t = w₁ / (w₀ + w₁)",
        _MERGEKIT_PAPER,
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", "method.flatten", "one angle for each tensor", True, "flag"),
            Parameter(
                "nuslerp_row_wise",
                "method.row_wise",
                "one angle for each vector along the first axis, not the last; without nuslerp_flatten",
                False,
                "flag",
                note="nuslerp_row_wise takes vectors along the first axis, as mergekit does, and does nothing unless"
                " nuslerp_flatten is false.",
            ),
        ),
        base="optional",
        experts=(2, 2),
        sparsifies=False,
    ),
    MethodRow(
        "multislerp",
        "m3jax.methods.multislerp:multislerp",
        "the mean of directions, with the mean of lengths",
        "(p +) m·Σ wᵢ·‖vᵢ‖, m = Σ wᵢ·vᵢ/‖vᵢ‖ over its length; v: the experts, or task vectors",
        "Goddard, Multi-SLERP, as in mergekit, arXiv 2403.13257",
        (
            _WEIGHT,
            _normalize(True)._replace(name="normalize_weights"),
            Parameter("eps", "method.eps", "a mean of unit vectors that is shorter has no direction", 1e-8, low=0.0),
        ),
        base="optional",
        experts=(2, None),
        sparsifies=False,
    ),
    MethodRow(
        "karcher",
        "m3jax.methods.karcher:karcher",
        "the Riemannian mean of directions, with the mean of lengths",
        "u·Σ wᵢ·‖xᵢ‖ / Σ wᵢ, u ← exp_u(Σ wᵢ·log_u(xᵢ/‖xᵢ‖) / Σ wᵢ)",
        "Karcher, Riemannian center of mass and mollifier smoothing, 1977; as in mergekit, arXiv 2403.13257",
        (
            _WEIGHT,
            Parameter("max_iter", "method.max_iter", "at most so many steps", 10.0, low=0.0),
            Parameter("tol", "method.tol", "the iteration ends before a step that is shorter", 1e-5, low=0.0),
        ),
        base="expert",
        experts=(2, None),
        sparsifies=False,
    ),
    MethodRow(
        "passthrough",
        "m3jax.methods.passthrough:passthrough",
        "the tensors of one model, as for stacking layers with slices",
        "scale·x",
        _MERGEKIT_PAPER,
        (Parameter("scale", "scale", "factor of the tensor", 1.0, level="expert"),),
        base="expert",
        experts=(1, 1),
        weighting="none",
        sparsifies=False,
    ),
    MethodRow(
        "slerp",
        "m3jax.methods.slerp:slerp",
        "along the arc between two models, tensor by tensor",
        "(sin((1−t)θ)·a + sin(tθ)·b) / sin θ; where |cos θ| > 0.9995, (1−t)·a + t·b",
        "Shoemake, Animating rotation with quaternion curves, 1985",
        (
            Parameter(
                "t",
                "weights",
                "position from the first model (0) to the second (1)",
                None,
                low=0.0,
                high=1.0,
                level="tensor",
            ),
        ),
        base="first",
        experts=(2, 2),
        weighting="position",
        sparsifies=False,
    ),
)

_SCOPED = Parameter(
    "scope", "sparsifier.scope", "rank each tensor, or the whole model", "tensor", "choice", choices=_SCOPE
)

SPARSIFIERS: tuple[SparsifierRow, ...] = (
    SparsifierRow(
        "dare",
        "m3jax.methods.dare:dare",
        "drop each entry with probability 1 − density",
        "Yu et al., Language models are super Mario, 2024, arXiv 2311.03099",
        (_SPARSE._replace(default=None), _RESCALE._replace(note="")),
        random=True,
    ),
    SparsifierRow(
        "magnitude",
        "m3jax.methods.magnitude:magnitude",
        "keep the largest entries",
        "Yadav et al., TIES-Merging, 2023, arXiv 2306.01708",
        (
            _SPARSE._replace(default=None, whole=("scope", "model")),
            _RESCALE._replace(default=False, note="", help="divide what is kept by the density"),
            _SCOPED,
        ),
    ),
    SparsifierRow(
        "breadcrumbs",
        "m3jax.methods.breadcrumbs:breadcrumbs",
        "drop the largest entries and the smallest",
        _BREADCRUMBS_PAPER,
        (_SPARSE._replace(default=None), _GAMMA, _KEPT_AS_IS),
    ),
    SparsifierRow(
        "della",
        "m3jax.methods.della:della",
        "drop entries at random, the smaller ones of a row more likely",
        _DELLA_PAPER,
        (_SPARSE._replace(default=None), _EPSILON, _RESCALE_DELLA._replace(note="")),
        random=True,
    ),
)

LEFT_OUT: Mapping[str, str] = {
    "arcee_fusion": "arcee_fusion is left out: above a million entries the quantiles by which it chooses come from an "
    "unseeded sample, so that no result of it can be repeated; take task_arithmetic with sparsify: {method: magnitude, "
    "density: 0.1}, which moves the base by the largest entries of one expert's task vector",
}
"""Methods of other tools that are not here on purpose, and what to take instead."""

IGNORED = Parameter(
    "int8_mask", "", "mergekit's; the exact arithmetic stores no mask, so it saves nothing", False, "flag"
)
"""A parameter of mergekit that every method reads and none uses."""


# --- finding rows -------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """The package outside that brings a method.

    Attributes:
        package: Its distribution's name.
        version: Its version.
    """

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


@functools.cache
def _entry_points() -> Mapping[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """What packages outside bring, by the method's name: several where they clash with each other."""
    found: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, _origin(entry))):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _origin(entry: importlib.metadata.EntryPoint) -> Origin:
    return Origin(_told(entry, "name") or entry.module, _told(entry, "version") or "unknown")


def _told(entry: importlib.metadata.EntryPoint, what: str) -> str | None:
    """What the package of an entry says of itself; None where an installer left it in pieces."""
    try:
        return getattr(entry.dist, what, None)
    except Exception:
        return None


def own_row(name: object) -> MethodRow | None:
    """The row of a method of our own; None where it is none.

    Args:
        name: What may be its name.
    """
    return next((row for row in METHODS if row.name == name), None)


def names() -> tuple[str, ...]:
    """The names of all methods, those of packages outside last."""
    return (*(row.name for row in METHODS), *(name for name in _entry_points() if own_row(name) is None))


def clashes() -> tuple[str, ...]:
    """What packages outside bring that is ignored because it has the name of a method of our own, a sentence each."""
    return tuple(
        f"merge method {name!r} of the package {_origin(entry)} is ignored: m3jax has a method of this name"
        for name, entries in _entry_points().items()
        if own_row(name) is not None
        for entry in entries
    )


def origin_of(name: str) -> Origin | None:
    """The package outside that brings a method; None for our own, and for a name that nobody brings.

    Args:
        name: A method's name.
    """
    entries = () if own_row(name) is not None else _entry_points().get(name, ())
    return _origin(entries[0]) if entries else None


def method_row(name: str) -> MethodRow:
    """The row of a method.

    Args:
        name: As in recipes; one of `names`.

    Raises:
        M3Error: There is no such method, or the package that brings it cannot be imported or gives something else.

    Example:
        >>> method_row("slerp").experts
        (2, 2)
    """
    return own_row(name) or _row_from_outside(name)


@functools.cache
def _row_from_outside(name: str) -> MethodRow:
    entries = _entry_points().get(name, ())
    if not entries and name in LEFT_OUT:
        raise M3Error(LEFT_OUT[name])
    if not entries:
        raise M3Error(f"{name!r} is no merge method here: there are {', '.join(names())}")
    if len(entries) > 1:
        packages = " and ".join(str(_origin(entry)) for entry in entries)
        raise M3Error(f"merge method {name!r} is brought by the packages {packages}: remove all but one")
    said = said_of(name)
    try:
        row = entries[0].load()
    except Exception as error:  # whatever a package outside raises when it is imported
        raise M3Error(f"{said} cannot be imported ({told_of(error)}): mend or remove it") from error
    if not isinstance(row, MethodRow):
        raise M3Error(f"{said} gives a {type(row).__name__} where a MethodRow is wanted: mend or remove it")
    try:
        wrong = fault_of(row)
    except Exception as error:  # fields of other types than they have
        wrong = told_of(error)
    if wrong:
        raise M3Error(f"{said} has a row that cannot be read: {wrong}: mend or remove it")
    return row._replace(name=name, parameters=tuple(map(as_read, row.parameters)))


def said_of(name: str) -> str:
    """What a method of a package outside is called in sentences."""
    return f"merge method {name!r} of the package {origin_of(name)}"


def told_of(error: Exception) -> str:
    """What a package outside raised, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def sparsifier_row(name: str) -> SparsifierRow:
    """The row of a sparsifier.

    Args:
        name: As in recipes.

    Raises:
        M3Error: There is no such sparsifier.

    Example:
        >>> [parameter.name for parameter in sparsifier_row("dare").parameters]
        ['density', 'rescale']
    """
    row = next((row for row in SPARSIFIERS if row.name == name), None)
    if row is None:
        raise M3Error(f"{name!r} is no sparsifier: there are {', '.join(row.name for row in SPARSIFIERS)}")
    return row


def may_be_random(sparsifier: str) -> bool:
    """Whether a sparsifier drops entries at random; of one that a package outside brings, only it can tell.

    Args:
        sparsifier: Its factory, "module:function".
    """
    return next((row.random for row in SPARSIFIERS if row.sparsifier == sparsifier), True)


def rows() -> Iterator[MethodRow | M3Error]:
    """Every method's row; in place of one whose package fails, what is wrong with it."""
    for name in names():
        try:
            yield method_row(name)
        except M3Error as error:
            yield error
