"""Which methods and sparsifiers there are: one row each, plain data, without JAX.

Recipes take from here what a method is called, which parameters it has, how each is read, what it is when nobody says
so, and at which level it may be given. A package outside adds a method by an entry point in the group
`m3jax.methods` whose name is the method's and whose object is a `MethodRow`.
"""

import functools
import importlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from m3jax.errors import M3Error

if TYPE_CHECKING:
    from m3jax.methods.base import Method, Sparsifier

GROUP = "m3jax.methods"
"""The group of entry points that add methods."""

_Made = TypeVar("_Made")


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
        fixed: Arguments of the factory that no parameter sets.
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
    fixed: tuple[tuple[str, Any], ...] = ()


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
    try:
        told = (entry.dist.name, entry.dist.version) if entry.dist is not None else (None, None)
    except Exception:  # what an installer left in pieces
        told = None, None
    return Origin(told[0] or entry.module, told[1] or "unknown")


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
    if not entries:
        raise M3Error(f"{name!r} is no merge method here: there are {', '.join(names())}")
    if len(entries) > 1:
        packages = " and ".join(str(_origin(entry)) for entry in entries)
        raise M3Error(f"merge method {name!r} is brought by the packages {packages}: remove all but one")
    said = _said(name)
    try:
        row = entries[0].load()
    except Exception as error:  # whatever a package outside raises when it is imported
        raise M3Error(f"{said} cannot be imported ({_told(error)}): mend or remove it") from error
    if not isinstance(row, MethodRow):
        raise M3Error(f"{said} gives a {type(row).__name__} where a MethodRow is wanted: mend or remove it")
    try:
        wrong = _fault(row)
    except Exception as error:  # fields of other types than they have
        wrong = _told(error)
    if wrong:
        raise M3Error(f"{said} has a row that cannot be read: {wrong}: mend or remove it")
    return row._replace(name=name, parameters=tuple(map(_as_read, row.parameters)))


def _as_read(parameter: Parameter) -> Parameter:
    """A parameter whose default is what a recipe that gives it reads, so that a replay's is the same."""
    number = parameter.kind == "number" and parameter.default is not None
    return parameter._replace(default=float(parameter.default)) if number else parameter  # type: ignore[arg-type]


def _said(name: str) -> str:
    return f"merge method {name!r} of the package {origin_of(name)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


_KINDS, _LEVELS = ("number", "flag", "choice"), ("expert", "tensor", "merge")
_BASES, _WEIGHTINGS = ("task_vectors", "expert", "first"), ("each", "position", "none")


def _fault(row: MethodRow) -> str:
    """What is wrong with a row that a package outside gives; empty if nothing is."""
    texts = (row.method, row.summary, row.formula, row.paper, row.without, row.sparsifier or "")
    if not all(isinstance(text, str) for text in texts):
        return "method, summary, formula, paper, without and sparsifier are texts"
    if not all(isinstance(parameter, Parameter) for parameter in row.parameters):
        return "parameters holds something that is no Parameter"
    for field, value, known in (("base", row.base, _BASES), ("weighting", row.weighting, _WEIGHTINGS)):
        if value not in known:
            return f"{field} is {value!r}, not one of {', '.join(known)}"
    for parameter in row.parameters:
        if fault := _parameter_fault(parameter):
            return f"the parameter {parameter.name}: {fault}"
    twice = [name for name, count in Counter(parameter.name for parameter in row.parameters).items() if count > 1]
    if twice:
        return f"the parameter {twice[0]} is there twice"
    sets = Counter(parameter.sets.partition(".")[0] for parameter in row.parameters)
    wanted = 0 if row.weighting == "none" else 1
    if sets["weights"] != wanted:
        return f"{sets['weights']} parameters set the weights, where weighting {row.weighting!r} needs {wanted}"
    if sets["scale"] > 1:
        return "several parameters set the scale"
    if sets["sparsifier"] and row.sparsifier is None:
        return "parameters are a sparsifier's, but there is none"
    return ""


def _parameter_fault(parameter: Parameter) -> str:
    whose, _, argument = parameter.sets.partition(".")
    for field, value, known in (("kind", parameter.kind, _KINDS), ("level", parameter.level, _LEVELS)):
        if value not in known:
            return f"{field} is {value!r}, not one of {', '.join(known)}"
    if parameter.sets not in ("weights", "scale", "") and not (whose in ("method", "sparsifier") and argument):
        return f"sets is {parameter.sets!r}, not weights, scale, method.ARGUMENT or sparsifier.ARGUMENT"
    if parameter.kind != "number" and parameter.level != "merge":
        return f"a {parameter.kind} is the same in the whole merge, so its level is merge"
    if parameter.sets in ("weights", "scale") and parameter.level == "merge":
        return f"{parameter.sets} may vary between tensors, so its level is tensor or expert"
    default = parameter.default
    fits = {
        "number": isinstance(default, int | float) and not isinstance(default, bool),
        "flag": isinstance(default, bool),
        "choice": default in parameter.choices,
    }
    if default is None:
        return ""
    if not fits[parameter.kind]:
        return f"the default {default!r} is no {parameter.kind}"
    inside = parameter.kind != "number" or parameter.low <= float(default) <= parameter.high
    return "" if inside else f"the default {default!r} is outside [{parameter.low:g}, {parameter.high:g}]"


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


def _made_outside(row: MethodRow, make: Callable[[], _Made]) -> _Made:
    """What a factory makes; where a package outside brings it, its faults are told as its own.

    Raises:
        M3Error: The factory refuses its arguments, or it is one of a package outside and fails.
    """
    if origin_of(row.name) is None:
        return make()
    try:
        return make()
    except M3Error:
        raise
    except Exception as error:  # whatever a package outside raises
        raise M3Error(f"{_said(row.name)} cannot be made ({_told(error)}): mend or remove it") from error


def make_method(row: MethodRow, values: Mapping[str, Any]) -> "Method":
    """The method of a row; what may differ between tensors is in each leaf's settings.

    Args:
        row: Of `method_row`.
        values: The parameters of the whole merge, by name.

    Raises:
        M3Error: A parameter is out of range; or a package outside brings the method, and what it makes is no method or
            is not what its row says.
    """
    method: Method = _made_outside(row, lambda: _made(row.method, row.parameters, "method", values, **dict(row.fixed)))
    if origin_of(row.name) is not None:
        _check_outside(row, method)
    return method


def _check_outside(row: MethodRow, method: Any) -> None:
    """Raise M3Error unless a method is what its row says: recipes are read by the row alone."""
    from m3jax.methods.base import Method

    said = _said(row.name)
    _check_made(row, method, Method, "method")
    told = {
        "weighting": (row.weighting, method.weighting),
        "experts": (tuple(row.experts), tuple(method.experts)),
        "base": (row.base == "task_vectors", method.uses_base),
        "sparsifies": (row.sparsifies, method.sparsifies),
    }
    odd = next((field for field, (asked, made) in told.items() if asked != made), None)
    if odd is not None:
        raise M3Error(f"{said}: its row and the method that it makes say different things of {odd}: mend or remove it")


def _check_made(row: MethodRow, made: Any, kind: type, owner: str) -> None:
    """Raise M3Error unless what a factory of a package outside made can be used, with the parameters of its row."""
    said = _said(row.name)
    if not isinstance(made, kind):
        raise M3Error(f"{said} makes a {type(made).__name__} where a {kind.__name__} is wanted: mend or remove it")
    asked = sorted(arguments(row.parameters, owner, "leaf"))
    if asked != sorted(dict(made.parameters)):  # type: ignore[attr-defined]
        raise M3Error(
            f"{said}: its row and the {owner} that it makes say different things of parameters: mend or remove it"
        )
    try:
        hash(made)
    except TypeError as error:
        raise M3Error(f"{said} cannot be hashed ({error}), so no program is compiled for it: mend it") from error


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


def make_own_sparsifier(row: MethodRow, values: Mapping[str, Any]) -> "Sparsifier | None":
    """The sparsifier that a method always has, if any.

    Args:
        row: Of `method_row`.
        values: The parameters of the whole merge, by name.

    Raises:
        M3Error: As `make_method`.
    """
    from m3jax.methods.base import Sparsifier

    place = row.sparsifier
    if place is None:
        return None
    sparsifier = _made_outside(row, lambda: make_sparsifier(place, row.parameters, values))
    if origin_of(row.name) is not None:
        _check_made(row, sparsifier, Sparsifier, "sparsifier")
    return sparsifier
