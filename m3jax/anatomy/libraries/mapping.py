"""The names and layout of one library against those of Hugging Face, by tables of rows. No values.

A library's table says for each of its tensors which tensors of Hugging Face it holds, and how it and they lie, in the
notation of `axes`. Both directions are read off it. What is wrong is collected and said at once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from m3jax.anatomy.libraries.axes import Axes, parse, shape_of, solve, strides
from m3jax.anatomy.namings import common_names
from m3jax.checkpoints.protocol import TensorInfo
from m3jax.checkpoints.views_permuted import Arithmetic, Permuted
from m3jax.errors import M3Error

_SHOWN = 5  # faults of one kind that a sentence names
_MADE = re.compile(r"\{(\w+)\}")


class Facts(NamedTuple):
    """What config.json says of a model, as far as layouts depend on it.

    Attributes:
        model_type: Its architecture.
        layers: How many blocks it has.
        sizes: Of axes, by the names that rows give them.
        tied: Whether the output embedding is the input embedding.
        config: All of config.json.
    """

    model_type: str
    layers: int
    sizes: Mapping[str, int]
    tied: bool
    config: Mapping[str, Any]


class BlockLayout(NamedTuple):
    """How blocks are stored.

    Attributes:
        scanned: Whether one tensor holds all blocks of a kind.
        axis: Along which it stacks them.
    """

    scanned: bool = False
    axis: int = 1


class LibraryRow(NamedTuple):
    """One tensor of a library.

    Attributes:
        own: Its canonical name; below that of its block, if it is of one.
        theirs: The name or names at Hugging Face, below "model.layers.N." if it is of a block. A name in braces is an
            axis that chooses among several.
        own_axes: How it lies.
        their_axes: How each of theirs lies.
        to_theirs: What becomes of entries on the way to Hugging Face.
        from_theirs: What becomes of entries on the way back.
        parts: What `{part}` in `theirs` stands for, in order; other braces are numbers, as many as the axis is long.
        optional: Whether models may do without it.
        other_axes: How it lies in other versions.
    """

    own: str
    theirs: str
    own_axes: str
    their_axes: str
    to_theirs: Arithmetic | None = None
    from_theirs: Arithmetic | None = None
    parts: tuple[str, ...] = ()
    optional: bool = False
    other_axes: str | None = None


class BlockStack(NamedTuple):
    """Blocks that are stored in one place.

    Attributes:
        own: What their names begin with, without the dot.
        layers: Which blocks of Hugging Face they are, in order.
        axis: Along which tensors stack them; None where it is one block.
        rows: What is in them.
    """

    own: str
    layers: tuple[int, ...]
    axis: int | None
    rows: tuple[LibraryRow, ...]


class LibraryTable(NamedTuple):
    """All of a model.

    Attributes:
        outside: What is in no block.
        stacks: The blocks.
        note: What a user should know; None if nothing.
    """

    outside: tuple[LibraryRow, ...]
    stacks: tuple[BlockStack, ...]
    note: str | None = None


def as_stored(table: LibraryTable) -> LibraryTable:
    """A table by which entries are moved alone: for a model that is seen in another layout of its own library."""

    def moving(rows: tuple[LibraryRow, ...]) -> tuple[LibraryRow, ...]:
        return tuple(row._replace(to_theirs=None, from_theirs=None) for row in rows)

    stacks = tuple(stack._replace(rows=moving(stack.rows)) for stack in table.stacks)
    return table._replace(outside=moving(table.outside), stacks=stacks)


class Library(NamedTuple):
    """A library that has names and a layout of its own.

    Attributes:
        name: What users call it.
        models: The architectures of which a table is known.
        traces: Finds the library in a canonical name.
        table: Of a model.
        spelled: A canonical name as the library stores it.
        scans: Whether it may stack blocks.
    """

    name: str
    models: tuple[str, ...]
    traces: re.Pattern[str]
    table: Callable[[Facts, BlockLayout], LibraryTable]
    spelled: Callable[[str], str]
    scans: bool = False


class _Match(NamedTuple):
    """A tensor of a library and those of Hugging Face that it holds.

    Attributes:
        row: Its row.
        own: Its canonical name.
        own_axes: How it lies, with the axis of blocks.
        choosing: The axes that choose among theirs.
        theirs: By the places along these.
    """

    row: LibraryRow
    own: str
    own_axes: tuple[Axes, ...]
    choosing: tuple[str, ...]
    theirs: Mapping[tuple[int, ...], str]
    sizes: Mapping[str, int]


def _matches(table: LibraryTable, facts: Facts) -> Iterator[_Match]:
    for row in table.outside:
        yield _match(row, None, facts)
    for stack in table.stacks:
        for row in stack.rows if stack.layers else ():
            yield _match(row, stack, facts)


def _match(row: LibraryRow, stack: BlockStack | None, facts: Facts) -> _Match:
    def choices_of(name: str) -> tuple[str, ...]:
        return row.parts if name == "part" else tuple(map(str, range(facts.sizes.get(name, 0))))

    own, theirs = row.own, row.theirs
    choices = {name: choices_of(name) for name in _MADE.findall(theirs)}
    if stack is not None:
        own, theirs = f"{stack.own}.{own}", f"model.layers.{{layer}}.{theirs}"
        choices["layer"] = tuple(map(str, stack.layers))
    named = {
        tuple(at for at, _ in picks): theirs.format(**dict(zip(choices, (said for _, said in picks), strict=True)))
        for picks in product(*(enumerate(said) for said in choices.values()))
    }
    notations = [parse(text) for text in (row.own_axes, row.other_axes) if text is not None]
    if stack is not None and stack.axis is not None:
        notations = [(*axes[: stack.axis], ("layer",), *axes[stack.axis :]) for axes in notations]
    sizes = {**facts.sizes, **{name: len(said) for name, said in choices.items()}}
    return _Match(row, own, tuple(notations), tuple(choices), named, sizes)


class _Faults:
    """What is wrong, by kind."""

    def __init__(self) -> None:
        self.lacking: list[str] = []
        self.left: list[str] = []
        self.unfit: list[str] = []

    def check(self, called: str, library: str, model_type: str) -> None:
        """Raise M3Error if anything is wrong."""
        told = [
            _listed("lacks", self.lacking),
            _listed("has left over", self.left),
            "; ".join(self.unfit[:_SHOWN])
            + (f" and {len(self.unfit) - _SHOWN} more" if len(self.unfit) > _SHOWN else ""),
        ]
        if any(told):
            raise M3Error(
                f"{called} is not laid out as {model_type} is in {library}: {'; '.join(filter(None, told))}: give the "
                "config.json of this model, or leave its names as they are"
            )


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it {what} {', '.join(names[:_SHOWN])}{more}"


def _needed(matches: Sequence[_Match], there: Callable[[_Match], bool]) -> list[_Match]:
    """The matches that a model is to have: those that are optional where one of its blocks has them."""
    found = {match.row for match in matches if not match.row.optional or there(match)}
    return [match for match in matches if match.row in found]


def to_huggingface(
    tensors: Mapping[str, TensorInfo], table: LibraryTable, facts: Facts, called: str, library: str
) -> dict[str, Permuted]:
    """The tensors of Hugging Face, made of those of a library.

    Args:
        tensors: The library's parameters, by canonical name.
        table: The library's, of this model.
        facts: What config.json says.
        called: What sentences call the model.
        library: What they call the library.

    Returns:
        How each is made, by its name at Hugging Face; of the tensors' own names (`TensorInfo.name`).

    Raises:
        M3Error: They are not those of the table, or of other sizes; all that is wrong is said at once.
    """
    made: dict[str, Permuted] = {}
    faults, used = _Faults(), set()
    for match in _needed(list(_matches(table, facts)), lambda match: match.own in tensors):
        info = tensors.get(match.own)
        if info is None:
            faults.lacking.append(match.own)
            continue
        used.add(match.own)
        axes, sizes = _fitting(match, info, faults)
        if axes is None:
            continue
        step, theirs = strides(axes, sizes), parse(match.row.their_axes)
        fine = [name for group in theirs for name in group]
        for picks, name in match.theirs.items():
            start = sum(at * step[axis] for axis, at in zip(match.choosing, picks, strict=True) if axis in step)
            made[name] = Permuted(
                shape_of(theirs, sizes),
                info.dtype,
                tuple(sizes[axis] for axis in fine),
                tuple(step[axis] for axis in fine),
                ((info.name, start),),
                arithmetic=match.row.to_theirs,
            )
    faults.left += [info.name for name, info in tensors.items() if name not in used]
    faults.check(called, library, facts.model_type)
    return made


def _fitting(match: _Match, info: TensorInfo, faults: _Faults) -> tuple[Axes | None, Mapping[str, int]]:
    """The axes of a library's tensor of several versions, and their sizes; of none if none fits."""
    found = [(axes, solve(axes, info.shape, match.sizes)) for axes in match.own_axes]
    fits = [(axes, sizes.known) for axes, sizes in found if sizes.fault is None]
    if not fits:
        faults.unfit.append(f"{info.name} {found[0][1].fault}")
        return None, {}
    if len(fits) > 1 and strides(*fits[0]) != strides(*fits[1]):
        faults.unfit.append(_untold(info.name, info.shape, [axes for axes, _ in fits]))
        return None, {}
    return fits[0]


def _untold(name: str, shape: tuple[int, ...], fits: Sequence[Axes]) -> str:
    """That a tensor may lie in several ways."""
    ways = " or ".join(" ".join(" ".join(group) for group in axes) for axes in fits)
    return f"{name} is {list(shape)}, of which it is not told whether it is {ways}"


def from_huggingface(
    tensors: Mapping[str, TensorInfo],
    table: LibraryTable,
    facts: Facts,
    called: str,
    library: str,
    wanted: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Permuted]:
    """The tensors of a library, made of those of Hugging Face.

    Args:
        tensors: The parameters at Hugging Face, by name.
        table: The library's, of this model.
        facts: What config.json says.
        called: What sentences call the model.
        library: What they call the library.
        wanted: Shapes by canonical name, where versions of the library differ; the newest if None.

    Returns:
        How each is made, by its canonical name.

    Raises:
        M3Error: They are not those of the table, or of other sizes; all that is wrong is said at once.
    """
    stored = {common: tensors[name] for name, common in common_names(tensors).items()}
    every = list(_matches(table, facts))
    common = common_names([name for match in every for name in match.theirs.values()])
    made: dict[str, Permuted] = {}
    faults, used = _Faults(), set()
    for match in _needed(every, lambda match: any(common[name] in stored for name in match.theirs.values())):
        infos = {picks: stored.get(common[name]) for picks, name in match.theirs.items()}
        used |= {common[name] for name in match.theirs.values()}
        absent = [match.theirs[picks] for picks, info in infos.items() if info is None]
        there = {picks: info for picks, info in infos.items() if info is not None}
        if absent or not there:
            faults.lacking += absent or [match.own]
            continue
        first, theirs = next(iter(there.values())), parse(match.row.their_axes)
        found = solve(theirs, first.shape, match.sizes)
        other = next((i for i in there.values() if (i.shape, i.dtype) != (first.shape, first.dtype)), None)
        if found.fault is not None or other is not None:
            faults.unfit.append(
                f"{first.name} {found.fault}"
                if other is None
                else f"{first.name} is {first.dtype} {list(first.shape)} but {other.name} {other.dtype} "
                f"{list(other.shape)}, which are one tensor there"
            )
            continue
        axes = _asked_for(match, found.known, (wanted or {}).get(match.own), faults)
        made[match.own] = _gathered(match, there, theirs, found.known, axes)
    faults.left += [info.name for name, info in stored.items() if name not in used]
    faults.check(called, library, facts.model_type)
    return made


def _asked_for(match: _Match, sizes: Mapping[str, int], wanted: tuple[int, ...] | None, faults: _Faults) -> Axes:
    """The axes of the version of a library whose tensor has a shape; of the newest if none has."""
    fits = [axes for axes in match.own_axes if shape_of(axes, sizes) == wanted]
    if wanted is not None and len(fits) > 1 and strides(fits[0], sizes) != strides(fits[1], sizes):
        faults.unfit.append(_untold(match.own, wanted, fits))
    return fits[0] if fits else match.own_axes[0]


def _gathered(
    match: _Match,
    there: Mapping[tuple[int, ...], TensorInfo],
    theirs: Axes,
    sizes: Mapping[str, int],
    axes: Axes,
) -> Permuted:
    """A tensor of a library, made of several of Hugging Face."""
    step = strides(theirs, sizes)
    fine = [name for group in axes for name in group]
    choosing = [name for name in fine if name in match.choosing]
    places = []
    for at in product(*(range(sizes[name]) for name in choosing)):
        chosen = dict(zip(choosing, at, strict=True))
        places.append((there[tuple(chosen.get(name, 0) for name in match.choosing)].name, 0))
    return Permuted(
        shape_of(axes, sizes),
        next(iter(there.values())).dtype,
        tuple(sizes[name] for name in fine),
        tuple(step.get(name, 0) for name in fine),
        tuple(places),
        tuple(fine.index(name) for name in choosing),
        match.row.from_theirs,
    )
