"""Which methods and sparsifiers there are: one row each, plain data, without JAX.

Recipes take from here what a method is called, which parameters it has, how each is read, what it is when nobody says
so, and at which level it may be given. A package outside adds a method by an entry point in the group
`m3jax.methods` whose name is the method's and whose object is a `MethodRow`.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from m3jax.errors import M3Error

if TYPE_CHECKING:
    from m3jax.methods.base import Method, Sparsifier

GROUP = "m3jax.methods"
"""The group of entry points that add methods."""


class Parameter(NamedTuple):
    """One parameter of a method or sparsifier, as recipes give it.

    Attributes:
        name: In recipes.
        sets: What it sets: "weights", "scale", "method.ARGUMENT" or "sparsifier.ARGUMENT" (an argument of the
            factory).
        help: What it is, in a few words.
        default: Its value when nobody says; None if it must be given.
        kind: "number", "flag" or "choice".
        low: The smallest number.
        high: The largest number.
        choices: Of a choice.
        level: Where it may vary: "expert" (and tensor), "tensor", or "merge" (the same in the whole merge).
        whole: (parameter, value): where that parameter has that value, this one is one number for the merge.
        only: Why it can have no value but its default.
        note: What a reader who knows mergekit should be told where the flag is set.
        mergekit: Whether mergekit has it; methods that do not use it then ignore it, with a note.
    """

    name: str
    sets: str
    help: str
    default: float | bool | str | None
    kind: str = "number"
    low: float = -float("inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    level: str = "merge"
    whole: tuple[str, str] | None = None
    only: str = ""
    note: str = ""
    mergekit: bool = True


class MethodRow(NamedTuple):
    """One merge method, as recipes call it.

    Attributes:
        name: `merge_method` in recipes.
        method: Its factory, "module:function", imported when it is used.
        summary: What it does, in one line.
        formula: The merged parameter.
        paper: Where it comes from: authors, title, year, arXiv number.
        parameters: In the order in which they are shown.
        sparsifier: The factory of the sparsifier that it always has, if any.
        base: "task_vectors": differences from the base are merged; "expert": a base among the models is one of them;
            "first": the base is the first expert.
        experts: The fewest and the most experts; None for any number.
        weighting: As `Method.weighting`.
        without: The method that is the same without the sparsifier.
        sparsifies: Whether recipes may put a sparsifier before it.
    """

    name: str
    method: str
    summary: str
    formula: str
    paper: str
    parameters: tuple[Parameter, ...]
    sparsifier: str | None = None
    base: str = "task_vectors"
    experts: tuple[int, int | None] = (1, None)
    weighting: str = "each"
    without: str = ""
    sparsifies: bool = True


class SparsifierRow(NamedTuple):
    """One sparsifier, as the `sparsify` block of recipes calls it.

    Attributes:
        name: `sparsify.method` in recipes.
        sparsifier: Its factory, "module:function".
        summary: What it does, in one line.
        paper: Where it comes from.
        parameters: Its own, beside `target`.
    """

    name: str
    sparsifier: str
    summary: str
    paper: str
    parameters: tuple[Parameter, ...]


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
        "passthrough",
        "m3jax.methods.passthrough:passthrough",
        "the tensors of one model, as for stacking layers with slices",
        "scale·x",
        "mergekit, Goddard et al., 2024, arXiv 2403.13257",
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
        "(sin((1−t)θ)·a + sin(tθ)·b) / sin θ",
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
    ),
)

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


@functools.cache
def _entry_points() -> Mapping[str, importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=GROUP)
    return {entry.name: entry for entry in found if entry.name not in {row.name for row in METHODS}}


def _origin(entry: importlib.metadata.EntryPoint) -> Origin:
    if entry.dist is None:
        return Origin(entry.module, "unknown")
    return Origin(entry.dist.name, entry.dist.version)


def names() -> tuple[str, ...]:
    """The names of all methods, those of packages outside last."""
    return (*(row.name for row in METHODS), *sorted(_entry_points()))


def origin_of(name: str) -> Origin | None:
    """The package outside that brings a method; None for our own.

    Args:
        name: A method's name.
    """
    entry = _entry_points().get(name)
    return None if entry is None else _origin(entry)


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
    own = next((row for row in METHODS if row.name == name), None)
    if own is not None:
        return own
    entry = _entry_points().get(name)
    if entry is None:
        raise M3Error(f"{name!r} is no merge method here: there are {', '.join(names())}")
    origin = _origin(entry)
    said = f"merge method {name!r} of the package {origin.package} {origin.version}"
    try:
        row = entry.load()
    except Exception as error:  # whatever a package outside raises when it is imported
        raise M3Error(f"{said} cannot be imported ({type(error).__name__}: {error}): mend or remove it") from error
    if not isinstance(row, MethodRow):
        raise M3Error(f"{said} gives a {type(row).__name__} where a MethodRow is wanted: mend or remove it")
    return row._replace(name=name)


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


def rows() -> Iterator[MethodRow | M3Error]:
    """Every method's row; in place of one whose package fails, what is wrong with it."""
    for name in names():
        try:
            yield method_row(name)
        except M3Error as error:
            yield error


# --- building -----------------------------------------------------------------------------------------------------


def _factory(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def arguments(parameters: tuple[Parameter, ...], owner: str, level: str) -> dict[str, str]:
    """The arguments of a factory that parameters of one level set: parameter names by argument.

    Args:
        parameters: Of a row.
        owner: "method" or "sparsifier".
        level: "merge", or "leaf" for those that may differ between tensors.
    """
    found = {}
    for parameter in parameters:
        whose, _, argument = parameter.sets.partition(".")
        if whose == owner and argument and (parameter.level == "merge") == (level == "merge"):
            found[argument] = parameter.name
    return found


def _made(place: str, parameters: tuple[Parameter, ...], owner: str, values: Mapping[str, Any], **more: Any) -> Any:
    given = {argument: values[name] for argument, name in arguments(parameters, owner, "merge").items()}
    defaults = {parameter.name: parameter.default for parameter in parameters}
    # Each leaf has its own: what the factory gets is what nobody asks for.
    leaf = {a: 1.0 if defaults[n] is None else defaults[n] for a, n in arguments(parameters, owner, "leaf").items()}
    return _factory(place)(**leaf, **given, **more)


def make_method(row: MethodRow, values: Mapping[str, Any]) -> "Method":
    """The method of a row; what may differ between tensors is in each leaf's settings.

    Args:
        row: Of `method_row`.
        values: The parameters of the whole merge, by name.
    """
    method: Method = _made(row.method, row.parameters, "method", values)
    return method


def make_sparsifier(
    place: str, parameters: tuple[Parameter, ...], values: Mapping[str, Any], target: str = "delta"
) -> "Sparsifier":
    """The sparsifier of a row.

    Args:
        place: Its factory.
        parameters: Of the row.
        values: The parameters of the whole merge, by name.
        target: What it drops entries of.
    """
    sparsifier: Sparsifier = _made(place, parameters, "sparsifier", values, target=target)
    return sparsifier
