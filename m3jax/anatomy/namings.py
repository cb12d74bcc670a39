"""Several namings of one architecture: which tensors of one model are which of another's. No values.

Names are brought to a common form by the renamings that transformers 5 makes when it reads checkpoints of older
versions (its conversion_mapping), and weights of experts that are stored together are taken apart: `gate_up_proj`
[experts, 2·inner, width] is, expert by expert, `gate_proj` and then `up_proj`, `down_proj` [experts, width, inner] one
matrix after the other. Wherever both forms are rows after rows, one is the other by byte range.

Source: conversion_mapping.py of transformers 5.24.0 (WeightRenaming, PrefixChange, MergeModulelist, Concatenate).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from m3jax.checkpoints.protocol import DTYPES, TensorInfo
from m3jax.checkpoints.views_assembled import Assembly, Piece
from m3jax.errors import M3Error


class _Renaming(NamedTuple):
    """One step towards the common form.

    Attributes:
        old: What is replaced.
        new: By what.
        among: What some name of the model must hold; anything if None.
    """

    old: re.Pattern[str]
    new: str
    among: re.Pattern[str] | None = None


_SEES_OR_HEARS = re.compile(
    r"^(?:model\.)?(?:vision_tower|vision_model|vision_embed_tokens|image_tower|video_tower|audio_tower|visual|"
    r"multi_modal_projector|acoustic_tokenizer_encoder)\."
)
_PARTS = (
    "vision_tower|vision_model|vision_embed_tokens|image_tower|video_tower|audio_tower|visual|multi_modal_projector|"
    "image_newline|acoustic_tokenizer_encoder|semantic_tokenizer_encoder"
)
_RENAMINGS = (
    # wrappers: DataParallel, torch.compile, FSDP, PEFT
    _Renaming(re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|module)\."), ""),
    _Renaming(re.compile(r"^base_model\.model\."), ""),
    # Qwen2.5-Omni's thinker; Qwen2-VL and what is built like it: `visual`, and a language model called `model`
    _Renaming(re.compile(r"^thinker\."), ""),
    _Renaming(
        re.compile(rf"^model\.(?!(?:language_model|{_PARTS})(?:\.|$))"),
        "model.language_model.",
        re.compile(r"^(?:thinker\.)?(?:model\.)?visual\."),
    ),
    # LLaVA and its kin
    _Renaming(re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    _Renaming(re.compile(r"^(?:model\.)?language_model\.(?:model\.)*"), "model.language_model.", _SEES_OR_HEARS),
    _Renaming(re.compile(rf"^({_PARTS})(?=\.|$)"), r"model.\1"),
    _Renaming(re.compile(r"(?<=_tower\.)vision_model\."), ""),  # CLIP's and SigLIP's own prefix, inside others
    # what stands before the names of a model with a head, and not before those of one without
    _Renaming(re.compile(r"^(?:model|transformer|backbone|gpt_neox|bert|roberta|electra|distilbert|vit)\."), ""),
    _Renaming(
        re.compile(r"^embed_out\."), "lm_head.", re.compile(r"^(?:gpt_neox\.)?layers\.\d+\.attention\.query_key")
    ),
    # norms and weight norms as they were called once
    _Renaming(re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    _Renaming(re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    _Renaming(re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    _Renaming(re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
    # ViT, BEiT, DINOv2, Swin, SegFormer
    _Renaming(re.compile(r"(?<!\w)encoder\.block\.(\d+)\."), r"stages.\1.blocks."),
    _Renaming(re.compile(r"(?<!\w)encoder\.patch_embeddings\.(\d+)\."), r"stages.\1.patch_embeddings."),
    _Renaming(re.compile(r"(?<!\w)encoder\.layer_norm\.(\d+)\."), r"stages.\1.layer_norm."),
    _Renaming(re.compile(r"(?<!\w)encoder\.layer\.(?=\d)"), "layers."),
    _Renaming(re.compile(r"(?<=attention\.)(?:attention|self)\.query\."), "q_proj."),
    _Renaming(re.compile(r"(?<=attention\.)(?:attention|self)\.key\."), "k_proj."),
    _Renaming(re.compile(r"(?<=attention\.)(?:attention|self)\.value\."), "v_proj."),
    _Renaming(re.compile(r"(?<=attention\.)self\.sr\."), "sequence_reduction.sequence_reduction."),
    _Renaming(re.compile(r"(?<=attention\.)self\.layer_norm\."), "sequence_reduction.layer_norm."),
    _Renaming(
        re.compile(r"(?:attention\.)*(?:self\.)?(?:relative_position_bias\.)?(?=relative_position_bias_table$)"), ""
    ),
    _Renaming(re.compile(r"(?<=attention\.)output\.dense\."), "o_proj."),
    _Renaming(re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    _Renaming(re.compile(r"\.output\.dense\."), ".mlp.fc2."),
    _Renaming(re.compile(r"\.mlp\.dense([12])\."), r".mlp.fc\1."),
    _Renaming(re.compile(r"\.layer_norm_1\."), ".layernorm_before."),
    _Renaming(re.compile(r"\.layer_norm_2\."), ".layernorm_after."),
    # Mixtral, PhiMoE, Granite and their kin
    _Renaming(re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".mlp.experts.gate_up_proj"),
    _Renaming(re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".mlp.experts.down_proj"),
    _Renaming(re.compile(r"\.block_sparse_moe\.router\.layer\."), ".mlp.router."),
    _Renaming(re.compile(r"\.block_sparse_moe\.(?=experts\.|gate\.|router\.)"), ".mlp."),
    _Renaming(re.compile(r"\.mlp\.gate\.(?=weight$)"), ".mlp.router."),
    _Renaming(re.compile(r"\.experts\.(\d+)\.w1\.(?=weight$)"), r".experts.\1.gate_proj."),
    _Renaming(re.compile(r"\.experts\.(\d+)\.w3\.(?=weight$)"), r".experts.\1.up_proj."),
    _Renaming(re.compile(r"\.experts\.(\d+)\.w2\.(?=weight$)"), r".experts.\1.down_proj."),
)
_TOGETHER = re.compile(r"^(.*\.experts)\.(?:(gate_up)|(down))_proj$")
_INTERLEAVED = frozenset({"gpt_oss", "inkling_mm_model", "inkling2", "inkling2_text"})  # gate and up alternate


class _Atom(NamedTuple):
    """A tensor in the common form: a stored one, or rows of one that holds several."""

    stored: str
    start: int
    shape: tuple[int, ...]


class Mapped(NamedTuple):
    """One model's tensors under another's names.

    Attributes:
        assemblies: What each tensor is made of, by new name; those that keep their names are there too.
        note: A sentence that says what was mapped.
    """

    assemblies: Mapping[str, Assembly]
    note: str


def common_names(names: Collection[str]) -> dict[str, str]:
    """Names in the common form of all namings that are known, by name.

    Args:
        names: All names of a model.

    Example:
        >>> list(common_names(["language_model.model.norm.weight", "vision_tower.norm.weight"]).values())
        ['language_model.norm.weight', 'vision_tower.norm.weight']
        >>> list(common_names(["model.language_model.norm.weight", "model.vision_tower.norm.weight"]).values())
        ['language_model.norm.weight', 'vision_tower.norm.weight']
    """
    found = {name: name for name in names}
    for renaming in _RENAMINGS:
        if renaming.among is None or any(map(renaming.among.search, found.values())):
            found = {name: renaming.old.sub(renaming.new, common) for name, common in found.items()}
    return found


def find_mapping(
    own: Mapping[str, TensorInfo],
    wanted: Mapping[str, TensorInfo],
    *,
    called: tuple[str, str],
    optional: Collection[str] = (),
    family: str | None = None,
) -> Mapped | None:
    """How the tensors of one model are those of another that stores the same architecture under other names.

    Args:
        own: The model's tensors.
        wanted: Those whose names are to be had.
        called: What sentences call the two models.
        optional: Names of either that need no counterpart, such as buffers and heads.
        family: The model's `model_type`.

    Returns:
        None where names are the same, or are not of one architecture as far as is known.

    Raises:
        M3Error: They are two namings of one architecture, and no view makes one of the other.
    """
    _check_transposed(own, wanted, called)
    if own.keys() == wanted.keys():
        return None
    ours, theirs = _in_common(own), _in_common(wanted)
    needed = [
        {atom for name, atoms in each.members.items() if name not in optional for atom in atoms}
        for each in (ours, theirs)
    ]
    if not (needed[0] <= theirs.atoms.keys() or needed[1] <= ours.atoms.keys()):
        return None
    shared = dict.fromkeys(atom for atom in theirs.atoms if atom in ours.atoms)  # in their order
    _check_expressible(own, ours, theirs, shared, called, family)
    made, used = {}, set()
    for name, atoms in theirs.members.items():
        if all(atom in shared for atom in atoms):
            parts = [_own_first(ours.atoms[atom], name) for atom in atoms]
            made[name] = Assembly(wanted[name].shape, own[parts[0].stored].dtype, tuple(_pieces(own, parts)))
            used |= {part.stored for part in parts}
    if any(atom not in shared for stored in used for atom in ours.members[stored]):
        return None  # a tensor of which only a part is wanted: more experts are another model's
    for name in [name for name, assembly in made.items() if len(assembly.pieces) == 1]:
        stored = made[name].pieces[0].stored
        if made[name].pieces[0] == Piece(stored, 0, own[stored].nbytes):
            made[name] = made[name]._replace(shape=own[stored].shape)  # whose rows a plan compares
    whole = {name: Assembly(info.shape, info.dtype, (Piece(name, 0, info.nbytes),)) for name, info in own.items()}
    kept = {name: assembly for name, assembly in whole.items() if name not in used and name not in made}
    changed = [name for name in made if made[name] != whole.get(name)]
    if not changed:
        return None
    example = changed[0]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    note = (
        f"{called[0]}: its names are read as those of {called[1]}: {made[example].pieces[0].stored} as {example}{more}"
    )
    return Mapped({**made, **kept}, note)


class _Common(NamedTuple):
    """A model in the common form.

    Attributes:
        atoms: Where each tensor is stored; once, if no two names mean the same.
        members: What each stored tensor holds, in its order.
    """

    atoms: Mapping[str, list[_Atom]]
    members: Mapping[str, list[str]]


def _in_common(tensors: Mapping[str, TensorInfo]) -> _Common:
    atoms: dict[str, list[_Atom]] = {}
    members: dict[str, list[str]] = {name: [] for name in tensors}
    for name, common in common_names(tensors).items():
        for atom, place in _taken_apart(tensors[name], common):
            atoms.setdefault(atom, []).append(place)
            members[name].append(atom)
    return _Common(atoms, members)


def _taken_apart(info: TensorInfo, common: str) -> Iterator[tuple[str, _Atom]]:
    together = _TOGETHER.match(common)
    if together is None or len(info.shape) != 3:
        yield common, _Atom(info.name, 0, info.shape)
        return
    parts = ("gate", "up") if together[2] else ("down",)
    experts, rows, columns = info.shape
    if rows % len(parts):  # no gate and up, whatever it is called
        yield common, _Atom(info.name, 0, info.shape)
        return
    shape = (rows // len(parts), columns)
    size = shape[0] * columns * DTYPES[info.dtype].itemsize
    for number in range(experts):
        for place, part in enumerate(parts):
            start = (number * len(parts) + place) * size
            yield f"{together[1]}.{number}.{part}_proj.weight", _Atom(info.name, start, shape)


def _own_first(places: Sequence[_Atom], name: str) -> _Atom:
    """Of several tensors that mean the same, the one that is called as it is wanted."""
    return next((place for place in places if place.stored == name), places[0])


def _pieces(tensors: Mapping[str, TensorInfo], parts: Sequence[_Atom]) -> Iterator[Piece]:
    """Byte ranges, where one that goes on is one."""
    found: list[Piece] = []
    for part in parts:
        size = prod(part.shape) * DTYPES[tensors[part.stored].dtype].itemsize
        last = found[-1] if found else None
        if last is not None and (last.stored, last.start + last.nbytes) == (part.stored, part.start):
            found[-1] = last._replace(nbytes=last.nbytes + size)
        else:
            found.append(Piece(part.stored, part.start, size))
    yield from found


def _check_expressible(
    own: Mapping[str, TensorInfo],
    ours: _Common,
    theirs: _Common,
    shared: Collection[str],
    called: tuple[str, str],
    family: str | None,
) -> None:
    """Raise M3Error where one naming is the other's, but not by names and byte ranges alone."""
    for atom in shared:
        mine, others = ours.atoms[atom], theirs.atoms[atom]
        same = {place.stored for place in mine} == {place.stored for place in others}
        for whose, places in () if same else ((called[0], mine), (called[1], others)):
            if len(places) > 1:
                raise _two_namings(
                    called,
                    (mine[0].stored, others[0].stored),
                    f"{places[0].stored} and {places[1].stored} of {whose} would be one tensor of the other",
                )
        apart = len(ours.members[mine[0].stored]) != len(theirs.members[others[0].stored])
        named = mine[0].stored, others[0].stored
        if apart and prod(mine[0].shape) != prod(others[0].shape):
            sizes = f"an expert's {atom} is {list(mine[0].shape)} in one and {list(others[0].shape)} in the other"
            raise M3Error(f"{called[0]} and {called[1]}: {sizes}: merge models of one architecture")
        if apart and mine[0].shape != others[0].shape:
            raise _two_namings(called, named, "one stores the weights of experts transposed")
        if apart and family in _INTERLEAVED:
            raise _two_namings(called, named, f"{family} stores gate and up interleaved")
    for name, atoms in theirs.members.items():
        parts = [ours.atoms[atom][0] for atom in atoms if atom in shared]
        dtypes = {own[part.stored].dtype for part in parts}
        if len(dtypes) > 1:
            why = f"its experts are of several dtypes ({', '.join(sorted(dtypes))})"
            raise _two_namings(called, (parts[0].stored, name), why)


def _check_transposed(own: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], called: tuple[str, str]) -> None:
    """Raise M3Error where the weights of all experts are stored the other way round, under the same name."""
    for name, info in own.items():
        other = wanted.get(name)
        if other is None or other.shape == info.shape or not _TOGETHER.match(name) or len(info.shape) != 3:
            continue
        if other.shape == (info.shape[0], info.shape[2], info.shape[1]):
            raise _two_namings(called, (name, name), "one stores the weights of experts transposed")


def _two_namings(called: tuple[str, str], names: tuple[str, str], why: str) -> M3Error:
    return M3Error(
        f"{called[0]} and {called[1]} store one architecture in two ways ({names[0]} and {names[1]}), but {why}: load"
        " one with transformers and save it as the other is, by save_pretrained(…, save_original_format=True or False)"
    )
