"""Models of JAX libraries seen as those of Hugging Face, and back: names and layout, entry by entry.

A library is one file and one row of `LIBRARIES`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from m3jax.anatomy.building import anatomy_of
from m3jax.anatomy.canonical import canonical_names
from m3jax.anatomy.layouts import STACKING_KEYS, is_scanned, scan_axis
from m3jax.anatomy.libraries.bonsai import BONSAI
from m3jax.anatomy.libraries.facts import read_facts
from m3jax.anatomy.libraries.gemma import GEMMA
from m3jax.anatomy.libraries.mapping import BlockLayout, Facts, Library, as_stored, from_huggingface, to_huggingface
from m3jax.anatomy.libraries.maxtext import MAXTEXT
from m3jax.anatomy.libraries.tunix import TUNIX
from m3jax.anatomy.types import Anatomy
from m3jax.checkpoints import Checkpoint, TensorInfo
from m3jax.checkpoints.views_permuted import Permuted, permuted
from m3jax.errors import M3Error

__all__ = [
    "HUGGINGFACE",
    "LIBRARIES",
    "MAXTEXT",
    "NAMES",
    "BlockLayout",
    "SeenModel",
    "WantedLayout",
    "layout_of",
    "library_of",
    "parameters_of",
    "seen_as",
    "theirs_of",
]

LIBRARIES: tuple[Library, ...] = (MAXTEXT, GEMMA, TUNIX, BONSAI)
HUGGINGFACE = "huggingface"
NAMES = (HUGGINGFACE, *(library.name for library in LIBRARIES))
_BY_NAME = {library.name: library for library in LIBRARIES}

_SUFFIX = re.compile(r"(\.mlp\.(?:gating_einsum|linear))\.w$")  # of Gemma's first files
_HEAD = re.compile(r"(?:^|\.)lm_head\.weight$")
_STACKS = re.compile(r"^decoder\.(?:(?:dense_|moe_)?layers\.(?!\d+\.)|layers_remainder\.)")
_BESIDE = ("optimizer", "step", "random", "buffer")  # kinds that no layout of another library has
_SHOWN = 5


class WantedLayout(NamedTuple):
    """Names and layout that a model is to be seen in.

    Attributes:
        name: Of the library, one of `NAMES`.
        layout: How its blocks are stacked, if it stacks any.
        like: The tensors of a model that has it already, by their canonical names; None where there is none.
    """

    name: str
    layout: BlockLayout = BlockLayout()
    like: Mapping[str, TensorInfo] | None = None


class SeenModel(NamedTuple):
    """A model under the names of a library.

    Attributes:
        checkpoint: The view; the model itself where it has the names and the layout already.
        notes: What a user should know.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()


class Theirs(NamedTuple):
    """Hugging Face's tensors of a model.

    Attributes:
        tensors: How each is made, by its name there.
        note: What a user should know; None if nothing.
    """

    tensors: Mapping[str, Permuted]
    note: str | None


def parameters_of(anatomy: Anatomy) -> dict[str, str]:
    """The stored names of a model's parameters, by the canonical ones that tables of libraries have.

    Args:
        anatomy: What its tensors are.
    """
    canonical = canonical_names(anatomy.parts)
    return {
        _SUFFIX.sub(r"\1", canonical[name]): name for name, part in anatomy.parts.items() if part.kind == "parameter"
    }


def library_of(anatomy: Anatomy) -> str | None:
    """Whose names a model has: one of `NAMES`, or None if they are of none that is known.

    Args:
        anatomy: What its tensors are.
    """
    names = parameters_of(anatomy)
    for library in LIBRARIES:
        if any(map(library.traces.search, names)):
            return library.name
    return HUGGINGFACE if any(name.endswith("embed_tokens.weight") for name in names) else None


def layout_of(anatomy: Anatomy, metadata: Mapping[str, str], called: str) -> BlockLayout:
    """How a model of MaxText stacks its blocks.

    Args:
        anatomy: What its tensors are.
        metadata: What its trainer wrote beside it.
        called: What sentences call the model.

    Raises:
        M3Error: The metadata says otherwise than the names.
    """
    scanned, told = any(map(_STACKS.search, parameters_of(anatomy))), is_scanned(metadata)
    if told is not None and told != scanned:
        found = "stacked" if scanned else "apart"
        raise M3Error(
            f"{called}: its metadata says scan_layers {str(told).lower()}, but by their names its blocks are {found}:"
            " correct the metadata, or get the checkpoint from its source"
        )
    axis = scan_axis(metadata)
    return BlockLayout(scanned, 1 if axis is None else axis)


def seen_as(
    checkpoint: Checkpoint,
    wanted: WantedLayout,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    called: str,
    *,
    rounded: bool = False,
) -> SeenModel:
    """A model under the names and in the layout of a library.

    Args:
        checkpoint: Open; the view closes it.
        wanted: What is wanted.
        config: Its config.json, in Hugging Face's terms; None if there is none.
        metadata: What its trainer wrote beside it.
        called: What sentences call the model.
        rounded: Whether entries may be rounded, each once, where one of the layouts multiplies or adds to them.

    Returns:
        The model with its parameters alone, unless it has the names and the layout already.

    Raises:
        M3Error: Its names are of no library that is known; there is no config.json where it decides; its tensors are
            not those of the library, or not of the sizes that config.json says; or entries would be rounded.
    """
    anatomy = anatomy_of(checkpoint.tensors, config, metadata)
    own = library_of(anatomy)
    if own is None:
        raise M3Error(
            f"{called}: its names are of no library whose layout is known here ({', '.join(NAMES)}), as"
            f" {_some(list(checkpoint.tensors))}: keep its names, or rename them first"
        )
    layout = layout_of(anatomy, metadata, called) if own == MAXTEXT.name else BlockLayout()
    if own == wanted.name and (not _BY_NAME.get(own, GEMMA).scans or wanted.layout == layout):
        return SeenModel(checkpoint)
    config = _stated(config, called)
    tensors, notes = _parameters(checkpoint.tensors, anatomy, called)
    if own != HUGGINGFACE:
        theirs = theirs_of(checkpoint.tensors, anatomy, config, metadata, called, arithmetic=own != wanted.name)
        told = {key: text for key, text in checkpoint.metadata.items() if key not in STACKING_KEYS}
        checkpoint = permuted(checkpoint, theirs.tensors, rounded=rounded, metadata=told)
        notes += [theirs.note] if theirs.note and wanted.name == HUGGINGFACE else []
        tensors = dict(checkpoint.tensors)
    if wanted.name == HUGGINGFACE:
        return SeenModel(checkpoint, tuple(notes))
    library = _BY_NAME[wanted.name]
    facts = read_facts(config, library.models, called, wanted.name)
    tensors = _without_tied(tensors, facts, called, notes)
    table = library.table(facts, wanted.layout)
    table = as_stored(table) if own == wanted.name else table
    like = {name: info.shape for name, info in (wanted.like or {}).items()}
    made = from_huggingface(tensors, table, facts, called, wanted.name, like)
    names = {name: info.name for name, info in (wanted.like or {}).items()}
    spelled = {names.get(name, library.spelled(name)): tensor for name, tensor in made.items()}
    notes += [table.note] if table.note else []
    told = {**checkpoint.metadata, **(_stacking(wanted.layout) if library.scans else {})}
    return SeenModel(permuted(checkpoint, spelled, rounded=rounded, metadata=told), tuple(notes))


def theirs_of(
    tensors: Mapping[str, TensorInfo],
    anatomy: Anatomy,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    called: str,
    *,
    arithmetic: bool = True,
) -> Theirs:
    """Hugging Face's tensors of a model that another library stores, made of its own.

    Args:
        tensors: The model's.
        anatomy: What they are; of a library that is known.
        config: Its config.json, in Hugging Face's terms; None if there is none.
        metadata: What its trainer wrote beside it.
        called: What sentences call the model.
        arithmetic: Whether to undo what the library's layout multiplies and adds; else entries are moved alone.

    Raises:
        M3Error: As `seen_as`.
    """
    library = _BY_NAME[library_of(anatomy) or HUGGINGFACE]
    layout = layout_of(anatomy, metadata, called) if library.scans else BlockLayout()
    facts = read_facts(_stated(config, called), library.models, called, library.name)
    table = library.table(facts, layout)
    table = table if arithmetic else as_stored(table)
    own, _ = _parameters(tensors, anatomy, called)
    return Theirs(to_huggingface(own, table, facts, called, library.name), table.note)


def _stated(config: Mapping[str, Any] | None, called: str) -> Mapping[str, Any]:
    """A configuration that is there."""
    if config is None:
        raise M3Error(
            f"{called}: there is no config.json beside it, which says model_type, num_attention_heads and more: give"
            " Hugging Face's of this model by --config, or put it beside the weights"
        )
    return config


def _stacking(layout: BlockLayout) -> dict[str, str]:
    """What tells how blocks are stacked, as MaxText says it."""
    return dict(zip(STACKING_KEYS, (str(layout.scanned).lower(), str(layout.axis)), strict=True))


def _parameters(
    tensors: Mapping[str, TensorInfo], anatomy: Anatomy, called: str
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The parameters of a model by their canonical names, and a note on what is beside them."""
    others = {name: part.kind for name, part in anatomy.parts.items() if part.kind != "parameter"}
    strange = next((name for name, kind in others.items() if kind not in _BESIDE), None)
    if strange is not None:
        raise M3Error(
            f"{called}: {strange} is {others[strange]}, for which libraries have no place: make weights of it first"
        )
    found, left = {new: tensors[name] for new, name in parameters_of(anatomy).items()}, list(others)
    count = f"{len(left)} tensors that are not the model's are" if len(left) > 1 else "what is not the model's is"
    return found, [f"{called}: {count} left out, as {left[0]}"] if left else []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _without_tied(tensors: dict[str, TensorInfo], facts: Facts, called: str, notes: list[str]) -> dict[str, TensorInfo]:
    """The tensors of Hugging Face without the copy of an embedding that is tied."""
    copies = [name for name in tensors if _HEAD.search(name)] if facts.tied else []
    if copies:
        notes.append(f"{copies[0]} of {called} is left out, as config.json says that it is the input embedding")
    return {name: info for name, info in tensors.items() if name not in copies}
