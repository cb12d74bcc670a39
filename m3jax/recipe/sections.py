"""Sections of a recipe: the tensors that are merged from the same sources, and the parameters that hold for them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from m3jax.errors import M3Error
from m3jax.methods.rows import MethodRow
from m3jax.naming import block_of, position
from m3jax.recipe.entries import ModelEntry, Module, Slice, Source
from m3jax.recipe.settings import Place, Setting, dotted

if TYPE_CHECKING:
    from m3jax.recipe.schema import Recipe


class Section(NamedTuple):
    """A whole model or module, or a slice of its layers with what stands before or after them.

    Attributes:
      place: where it is in the recipe.
      experts: what is merged, in order.
      base: the model that differences are taken from; None if there is none.
      base_layers: which layers of the base stand below it; None where it has all layers, or they cannot be told.
      first: its first layer in the output.
      layers: how many it has; None for all that there are.
      levels: the blocks of parameters that hold for all of it, the first to decide first.
    """

    place: Place
    experts: tuple[ModelEntry, ...]
    base: str | None
    base_layers: tuple[int, int] | None
    first: int
    layers: int | None
    levels: tuple[dict[str, Setting], ...]


def sections_of(recipe: "Recipe") -> dict[str | None, tuple[Section, ...]]:
    """The sections of a recipe by module; of a recipe without `modules` under None."""
    if recipe.modules is None:
        return {None: tuple(_sections(recipe, (), recipe.models or (), recipe.slices or (), (recipe.parameters,)))}
    return {
        name: tuple(
            _sections(
                recipe,
                ("modules", name),
                module.models or (),
                module.slices or (),
                (module.parameters, recipe.parameters),
            )
        )
        for name, module in recipe.modules.items()
    }


def _sections(
    recipe: "Recipe",
    place: Place,
    models: Sequence[ModelEntry],
    slices: Sequence[Slice],
    levels: tuple[dict[str, Setting], ...],
) -> Iterator[Section]:
    if not slices:
        experts = _experts(recipe.row, models, recipe.base_model)
        yield Section((*place, "models"), experts, recipe.base_model, None, 0, None, levels)
        return
    order = None if stacks(slices) else [source.model for source in slices[0].sources]
    first = 0
    for number, part in enumerate(slices):
        base = part.base_model or recipe.base_model
        sources = part.sources
        if order is not None:  # runs of one model: each source is the same expert in all of them
            sources = tuple(sorted(sources, key=lambda source: order.index(source.model)))
        experts = _experts(recipe.row, sources, base)
        layers = part.layers[1] - part.layers[0]
        own = (part.parameters, *levels)
        yield Section((*place, "slices", number), experts, base, _base_layers(part, base), first, layers, own)
        first += layers


def _experts(row: MethodRow, entries: Sequence[ModelEntry], base: str | None) -> tuple[ModelEntry, ...]:
    """The models to be merged, in order.

    Methods on task vectors drop the base where it stands among the models; those that interpolate put it first; to
    averages it is a model like any other.
    """
    if row.base == "expert" or base is None:
        return tuple(entries)
    others = tuple(entry for entry in entries if entry.model != base)
    if row.base != "first":
        return others
    ranges = {entry.layer_range for entry in others if isinstance(entry, Source)}
    added: list[ModelEntry] = [Source(model=base, layer_range=layers) for layers in ranges]
    added = added or [ModelEntry(model=base)]
    own = [entry for entry in entries if entry.model == base] or (added if len(added) == 1 else [])
    return (*own[:1], *others)


def _base_layers(part: Slice, base: str | None) -> tuple[int, int] | None:
    """Those of the base that is a source of a slice, or else those of all its sources."""
    own = [source.layer_range for source in part.sources if source.model == base]
    ranges = own or list({source.layer_range for source in part.sources})
    return ranges[0] if len(ranges) == 1 else None


def base_layers(section: Section) -> tuple[int, int]:
    """The layers of the base that stand below a slice.

    Raises:
      M3Error: the sources give different layers, and the base is none of them.
    """
    if section.base_layers is None:
        raise M3Error(
            f"{dotted(section.place)}: the sources give different layers, so which of the base belong to them cannot "
            "be told; add the base as a source with its layer_range"
        )
    return section.base_layers


def stacks(slices: Sequence[Slice]) -> bool:
    """Whether slices stack layers into another model, and do not only give runs of layers other parameters."""
    same = sorted(source.model for source in slices[0].sources)
    ends = [0, *(part.layers[1] for part in slices)]
    return not all(
        sorted(source.model for source in part.sources) == same
        and part.base_model == slices[0].base_model
        and part.layers[0] == end
        and all(source.layer_range == part.layers for source in part.sources)
        for part, end in zip(slices, ends, strict=False)
    )


def section_at(
    sections: Sequence[Section], tensor_name: str, t: float, layer: int | None = None
) -> tuple[Section, float]:
    """The section of a tensor, and where gradients are read in it.

    Args:
      sections: those of a module or model.
      tensor_name: the tensor's full name.
      t: its position in the model. Gradients run over each slice anew, as they do in mergekit: t then only tells what
        is before the blocks (0) from what is after them (1).
      layer: the block that it is of; told by its name if None.
    """
    if sections[0].layers is None:
        return sections[0], t
    block = block_of(tensor_name)
    if layer is None and block is not None:
        layer = block[1]
    if layer is None:
        return sections[0 if t < 0.5 else -1], t
    section = next((each for each in sections if layer < each.first + (each.layers or 0)), sections[-1])
    return section, position(layer - section.first, section.layers or 0)


def name_in(section: Section, expert: ModelEntry, tensor_name: str) -> str:
    """What a tensor of a slice is called in the model that an expert's layers are taken from."""
    block = block_of(tensor_name)
    if not isinstance(expert, Source) or block is None:
        return tensor_name
    stem = block[0].rpartition(".")[0]
    return f"{stem}.{expert.layer_range[0] + block[1] - section.first}{tensor_name[len(block[0]) :]}"


def entries_of(holder: "Recipe | Module") -> Iterator[tuple[Place, ModelEntry]]:
    """The models and sources that stand in a recipe itself, or in one of its modules, with their places."""
    for i, entry in enumerate(holder.models or ()):
        yield ("models", i), entry
    for i, part in enumerate(holder.slices or ()):
        for j, source in enumerate(part.sources):
            yield ("slices", i, "sources", j), source
