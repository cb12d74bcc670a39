"""The anatomy of a checkpoint, from names, shapes, config.json and metadata; values are never read."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from m3jax import documents
from m3jax.anatomy.aliases import find_aliases, read_ties
from m3jax.anatomy.blocks import Spot, find_blocks, segment_offsets
from m3jax.anatomy.canonical import canonical_names, is_flax_tree, split_collection
from m3jax.anatomy.families import Family, depth_of, family_of, subconfig, vocabulary_size
from m3jax.anatomy.kinds import kind_of, quantised
from m3jax.anatomy.layouts import is_scanned, layout_of, scan_axis
from m3jax.anatomy.stacks import Evidence, Stack, Stacks, find_stacks
from m3jax.anatomy.towers import Placing, name_towers, place_towers, tower_of
from m3jax.anatomy.types import KINDS, OUTSIDE_BLOCKS, Anatomy, Kind, Overrides, Part, Tower, position
from m3jax.anatomy.vocabulary import Words, find_words
from m3jax.checkpoints.protocol import TensorInfo
from m3jax.documents import Pattern
from m3jax.errors import M3Error

_NUMBERLESS: frozenset[Kind] = frozenset({"optimizer", "step", "random"})
_OUTPUT = re.compile(r"embed_out|unembed|output_embed")
_INPUT = re.compile(r"embed|(?:^|\.)w[tp]e(?:\.|$)")
# What else comes before the first block: CLIP's first norm, Whisper's convolutions, OPT's projection, audio front ends.
_BEFORE = re.compile(
    r"(?:^|\.)(?:pre_layrnorm|conv[12]|project_in|feature_extractor|feature_projection|ln_pre|shared)(?:\.|$)"
)


def anatomy_of(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
) -> Anatomy:
    """Tells what every tensor of a checkpoint is.

    What the recipe says outranks metadata, metadata config.json, and config.json names and shapes. What cannot be told
    is said in `Part.doubt` and `Anatomy.notes`, never guessed.

    Args:
        tensors: The checkpoint's tensors, by stored name.
        config: config.json, or the like of a run in JAX; None if there is none.
        metadata: The texts that the checkpoint carries; `scan_layers`, `param_scan_axis` and depths are understood.
        overrides: The recipe's key `anatomy`.

    Returns:
        The anatomy.

    Raises:
        M3Error: An override matches no tensor, names no kind or an axis that cannot be, or is no regular expression.

    Example:
        >>> names = ["wte.weight", "h.0.mlp.weight", "h.1.mlp.weight", "lm_head.weight"]
        >>> found = anatomy_of({name: TensorInfo(name, (8, 4), "F32") for name in names})
        >>> found.towers["model"].depth, found.parts["h.1.mlp.weight"].block, found.parts["lm_head.weight"].block
        (2, 1, None)
    """
    overrides = overrides or Overrides()
    facts = _Facts(dict(config or {}), dict(metadata or {}), overrides)
    names = canonical_names(tensors)
    flax = is_flax_tree(tensors)
    family = family_of(facts.config.get("model_type"))
    text = family_of((subconfig(facts.config, "text") or {}).get("model_type"))
    family = family._replace(words=family.words or text.words)
    schemes = quantised(tensors)
    kinds = _kinds(tensors, schemes, overrides)
    shapes = {names[name]: info.shape for name, info in tensors.items()}
    model = [name for name in tensors if kinds[name] not in _NUMBERLESS]

    stacks = _find_stacks(tensors, names, kinds, facts, flax)
    stacked = {name: stacks.stacks[names[name]] for name in model if names[name] in stacks.stacks}
    pattern = _compiled(overrides.blocks, "blocks") if overrides.blocks is not None else None
    loose = [name for name in model if name not in stacked]
    # A recipe's pattern is of stored names; all else is found in canonical ones.
    numbered = find_blocks([name if pattern else names[name] for name in loose], family, pattern)
    spots = {name: s for name in loose if (s := numbered.spots.get(name if pattern else names[name])) is not None}
    if pattern is not None and not spots:
        raise M3Error(f"anatomy: blocks: {overrides.blocks!r} is found in no tensor's name: correct the pattern.")
    between = {name: numbered.between[names[name]] for name in loose if names[name] in numbered.between}
    adapters = bool(model) and all(kinds[name] == "adapter" for name in model)
    layout = _Layout.of(spots, stacked, facts.config, partial=adapters)

    outside = {names[n]: tensors[n].shape for n in loose if n not in spots and kinds[n] in {"parameter", "quantised"}}
    words = find_words(outside, family, flax, vocabulary_size(facts.config))
    ties = read_ties(facts.config or None, family, bool(words.heads), overrides.tied)
    tied = ties.tied if words.embeddings or words.heads else None
    if tied is None and flax and words.embeddings and words.heads:
        tied = False  # Flax ties by calling the embedding's own `attend`: a head that is stored is one of its own
    aliases = find_aliases(shapes, words, family, tied)
    stored = {canonical: name for name, canonical in names.items()}

    parts = {}
    for name, info in tensors.items():
        canonical = names[name]
        part = Part(
            kind=kinds[name],
            canonical=canonical,
            vocabulary_axis=words.axes.get(canonical),
            alias_of=stored.get(aliases.of.get(canonical, "")),
            doubt=stacks.doubts.get(canonical),
        )
        if name in stacked:
            part = layout.stacked_part(part, stacked[name])
        elif name in spots:
            part = layout.numbered_part(part, spots[name], info.name if pattern else canonical)
        elif kinds[name] not in _NUMBERLESS:
            part = layout.outer_part(part, between.get(name), words)
        parts[name] = part
    notes = [*dict.fromkeys(stacks.doubts.values()), *layout.notes, *([ties.note] if ties.note else [])]
    if tied is None and words.embeddings and words.heads and aliases.candidates:
        notes.append(
            f"nothing says whether {stored[words.heads[0]]} is {stored[words.embeddings[0]]}: "
            "say so by `anatomy: {tied: true}` or `{tied: false}`"
        )
    if tied and words.heads and words.embeddings and not aliases.candidates:
        head, embedding = stored[words.heads[0]], stored[words.embeddings[0]]
        notes.append(f"{head} and {embedding} are to be tied but differ in shape: they count as two tensors")
    notes += _shared_layers(family, facts.config, layout)
    return Anatomy(
        parts=MappingProxyType(parts),
        towers=MappingProxyType(layout.towers),
        family=family.model_type or (layout_of(names.values()) if flax else None),
        ties_embeddings=tied,
        notes=tuple(notes),
        quantisation=next(iter(schemes.values()), None) or _declared_scheme(facts.config),
        embedding=stored[words.embeddings[0]] if words.embeddings else None,
        head=stored[words.heads[0]] if words.heads else None,
        tied_candidates=tuple((stored[copy], stored[original]) for copy, original in aliases.candidates),
    )


class _Facts(NamedTuple):
    config: dict[str, Any]
    metadata: dict[str, Any]
    overrides: Overrides


def _compiled(pattern: str, key: str) -> Pattern:
    try:
        compiled = documents.pattern(pattern)
    except ValueError as error:
        raise M3Error(f"anatomy: {key}: {pattern!r} is no regular expression ({error}): correct it.") from error
    if key == "blocks" and compiled.groups < 1:
        raise M3Error(f"anatomy: blocks: {pattern!r} has no group: put the block's number in parentheses.")
    return compiled


def _matching(pattern: str, key: str, names: Sequence[str]) -> list[str]:
    compiled = _compiled(pattern, key)
    found = [name for name in names if compiled.search(name)]
    if not found:
        raise M3Error(f"anatomy: {key}: {pattern!r} is found in no tensor's name: correct the pattern.")
    return found


def _kinds(tensors: Mapping[str, TensorInfo], schemes: Mapping[str, str], overrides: Overrides) -> dict[str, Kind]:
    kinds = {name: kind_of(info, tensors, schemes) for name, info in tensors.items()}
    for pattern, kind in overrides.kinds.items():
        if kind not in KINDS:
            raise M3Error(f"anatomy: kinds: {kind!r} is no kind of tensor: choose one of {', '.join(KINDS)}.")
        kinds |= dict.fromkeys(_matching(pattern, "kinds", list(tensors)), kind)
    return kinds


def _declared_scheme(config: Mapping[str, Any]) -> str | None:
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return method if isinstance(method, str) else None


def _find_stacks(
    tensors: Mapping[str, TensorInfo],
    names: Mapping[str, str],
    kinds: Mapping[str, Kind],
    facts: _Facts,
    flax: bool,
) -> Stacks:
    fixed = {}
    for pattern, axis in facts.overrides.stacked.items():
        for name in _matching(pattern, "stacked", list(tensors)):
            rank = len(tensors[name].shape)
            if not -1 <= axis < rank:
                raise M3Error(
                    f"anatomy: stacked: {pattern!r} gives axis {axis}, but {name} has {rank} axes: correct the axis."
                )
            fixed[names[name]] = axis
    by_shape = facts.overrides.blocks is None
    leading: dict[str, tuple[int, ...]] = {}
    following: dict[str, tuple[int, ...]] = {}
    for name, info in tensors.items():
        if kinds[name] in _NUMBERLESS or not (by_shape or names[name] in fixed):
            continue
        (leading if kinds[name] == "parameter" else following)[names[name]] = info.shape
    if not leading:  # a tree of adapters alone
        leading, following = following, leading
    numbered: dict[str, int] = {}
    for spot in find_blocks(leading if flax else (), Family()).spots.values():
        if not spot.segment:
            numbered[spot.tower] = max(numbered.get(spot.tower, 0), spot.number + 1)
    evidence = Evidence(scan_axis(facts.metadata), is_scanned(facts.metadata), _known_depth(facts), numbered)
    return find_stacks(leading, following, evidence, fixed)


def _known_depth(facts: _Facts) -> int | None:
    numbers = {key: int(value) for key, value in facts.metadata.items() if str(value).strip().isdecimal()}
    told = depth_of(numbers, "model")
    if told is not None:
        return told
    # A configuration of several towers has no one depth that all lists of blocks have to fit.
    several = sum(depth_of(facts.config, role) is not None for role in ("vision", "audio", "qformer")) > 0
    return None if several else depth_of(facts.config, "model")


class _Layout:
    """Which blocks there are, and where each tensor stands among them."""

    def __init__(self) -> None:
        self.placing = Placing({}, (None, None))
        self.towers: dict[str, Tower] = {}
        self.offsets: Mapping[tuple[str, str], int] = {}
        self.last: Mapping[tuple[str, str], int] = {}
        self.notes: list[str] = []

    @classmethod
    def of(
        cls, spots: Mapping[str, Spot], stacked: Mapping[str, Stack], config: Mapping[str, Any], partial: bool
    ) -> "_Layout":
        layout = cls()
        everything = [*spots.values(), *(_last_spot(stack) for stack in stacked.values())]
        layout.offsets = segment_offsets(everything)
        ends: dict[tuple[str, str], int] = {}
        counts: dict[str, int] = {}
        for spot in everything:
            key = (spot.tower, spot.segment)
            end = layout.offsets[key] + spot.number + 1
            ends[key] = max(ends.get(key, 0), end)
            counts[spot.tower] = max(counts.get(spot.tower, 0), end)
        layout.last = {key: end - 1 for key, end in ends.items()}
        layout.placing = place_towers(name_towers(counts))
        with_stacks = {stack.place.tower for stack in stacked.values()}
        for path, count in counts.items():
            name = layout.placing.names[path]
            told = depth_of(config, name)
            beyond = config.get("num_nextn_predict_layers")  # DeepSeek's blocks of another head, numbered on
            if told is None or told == count:
                depth = count
            elif partial or count - told == beyond:
                depth = told
            else:
                depth = count
                layout.notes.append(f"{path} has {count} blocks, not the {told} of config.json: those stored count")
            layout.towers[name] = Tower(name, depth, path in with_stacks)
        return layout

    def _position(self, tower: str, block: int) -> float:
        return position(block, self.towers[tower].depth)

    def _end(self, path: str, stage: str) -> int:
        """The last block up to the end of a stage, which itself may have none."""
        ends = (last for (tower, segment), last in self.last.items() if tower == path and int(segment) <= int(stage))
        return max(ends, default=0)

    def stacked_part(self, part: Part, stack: Stack) -> Part:
        place = stack.place
        tower = self.placing.names[place.tower]
        offset = self.offsets[place.tower, place.segment]
        collection = split_collection(part.canonical)[0]
        local = [stack.local(index) for index in range(stack.length)]
        stem = place.tower if place.cyclic else place.stored.replace("stacked_layers", "layers")
        groups = tuple(f"{stem}.{number}" for number in local)
        blocks = tuple(offset + number for number in local)
        return part._replace(
            tower=tower,
            stack_axis=stack.axis,
            blocks=blocks,
            block_names=tuple(f"{collection}{group}.{place.rest}" for group in groups),
            groups=groups,
            position=self._position(tower, blocks[0]) if blocks else 1.0,
        )

    def numbered_part(self, part: Part, spot: Spot, name: str) -> Part:
        tower = self.placing.names[spot.tower]
        block = self.offsets[spot.tower, spot.segment] + spot.number
        group, canonical = spot.group, part.canonical
        if spot.segment == _REMAINDER:  # what a cycle left over is called as if no cycle had been stacked
            group = f"{spot.tower}.{block}"
            collection, path = split_collection(name)
            canonical = collection + group + path[len(spot.group) :]
        return part._replace(
            canonical=canonical, tower=tower, block=block, groups=(group,), position=self._position(tower, block)
        )

    def outer_part(self, part: Part, between: tuple[str, str] | None, words: Words) -> Part:
        if between is not None:
            own = self.placing.names[between[0]]
            return part._replace(tower=own, position=self._position(own, self._end(*between)))
        name = part.canonical
        before = _BEFORE.search(name) or (_INPUT.search(name) and not _OUTPUT.search(name)) or name in words.embeddings
        if name in words.heads:
            before = False
        tower = tower_of(name, self.placing) if self.placing.names else None
        if name in words.axes or (tower is None and before and set(self.towers) == {"encoder", "decoder"}):
            tower = self.placing.language[0 if before else 1]
        return part._replace(tower=tower, position=0.0 if before else 1.0)


_REMAINDER = "9"


def _last_spot(stack: Stack) -> Spot:
    place = stack.place
    return Spot(place.tower, place.segment, stack.local(max(stack.length - 1, 0)), place.stored)


def _shared_layers(family: Family, config: Mapping[str, Any], layout: _Layout) -> list[str]:
    layers = config.get("num_hidden_layers")
    if not family.shared or not isinstance(layers, int):
        return []
    return [
        f"{layers} layers share {tower.depth} stored block{'s' if tower.depth > 1 else ''}"
        for tower in layout.towers.values()
    ]


# --- Groups ----------------------------------------------------------------------------------------------


def block_name(name: str, part: Part, block: int) -> str:
    """What the tensor of one block is called: the canonical name it would have, were it stored by itself.

    Args:
        name: The stored name of a leaf that stacks blocks.
        part: What it is.
        block: One of `part.blocks`.

    Raises:
        ValueError: The leaf does not stack that block.
    """
    if block not in part.blocks:
        raise ValueError(f"{name} does not stack block {block}")
    return part.block_names[part.blocks.index(block)]


def block_position(anatomy: Anatomy, name: str, block: int) -> float:
    """Where gradients are read for one block of a leaf, in [0, 1].

    Args:
        anatomy: The anatomy.
        name: The stored name of a tensor that is in a block or stacks some.
        block: The block's number within its tower.
    """
    tower = anatomy.parts[name].tower
    return 1.0 if tower is None else position(block, anatomy.towers[tower].depth)


def group_of(anatomy: Anatomy, name: str, granularity: str, block: int | None = None) -> str:
    """The group of tensors that share one draw of weights with a tensor, or with one block of a stacked leaf.

    Args:
        anatomy: The anatomy.
        name: The tensor's stored name.
        granularity: "layer" or "tensor".
        block: For a leaf that stacks blocks, which one.

    Raises:
        ValueError: The leaf stacks blocks and none of them is named.

    Example:
        >>> info = TensorInfo("model.layers.3.mlp.up_proj.weight", (4, 4), "F32")
        >>> group_of(anatomy_of({info.name: info}), info.name, "layer")
        'model.layers.3'
    """
    part = anatomy.parts[name]
    if part.stack_axis is not None:
        if block is None:
            raise ValueError(f"{name} stacks {len(part.blocks)} blocks: name one of them")
        own = block_name(name, part, block)
        return own if granularity == "tensor" else part.groups[part.blocks.index(block)]
    if granularity == "tensor":
        return part.canonical
    return part.groups[0] if part.groups else OUTSIDE_BLOCKS
