"""Parts of a model by the names that recipes give them: towers, what joins them, or where names begin."""

from collections.abc import Iterable, Sequence

from m3jax.anatomy.types import Anatomy
from m3jax.errors import M3Error

CONNECTOR = "multi_modal_projector"
"""What stands between towers, as mergekit calls it."""

REST = "default"
"""What no other module of a recipe has, as mergekit calls it."""

_TOWERS = {
    "text_decoder": "text",
    "language_model": "text",
    "vision_tower": "vision",
    "vision_model": "vision",
    "audio_tower": "audio",
}
"""Towers by what mergekit and models call them."""


def tower_called(module: str) -> str:
    """The name of a tower that a recipe may call otherwise."""
    return _TOWERS.get(module, module)


def modules_of(anatomy: Anatomy, modules: Sequence[str], model: str) -> dict[str, str]:
    """Which module each tensor is of.

    A module is the beginning of names, up to a dot, or else a tower, or what joins towers. Of several beginnings the
    longest decides; `default` is the rest.

    Args:
        anatomy: Of the model.
        modules: What a recipe calls them.
        model: The model's name, for sentences.

    Raises:
        M3Error: A tensor is of none of the modules.

    Example:
        >>> from m3jax.anatomy import anatomy_of
        >>> from m3jax.checkpoints import TensorInfo
        >>> names = ["language_model.layers.0.w", "vision_tower.layers.0.w", "projector.w"]
        >>> told = anatomy_of({name: TensorInfo(name, (2, 2), "F32") for name in names})
        >>> list(modules_of(told, ["text_decoder", "vision_tower", "multi_modal_projector"], "a").values())
        ['text_decoder', 'vision_tower', 'multi_modal_projector']
    """
    found = {}
    for name, part in anatomy.parts.items():
        begun = [module for module in modules if name.startswith(f"{module}.") or name == module]
        tower = part.tower or (None if len(anatomy.towers) > 1 else next(iter(anatomy.towers), None))
        own = [module for module in modules if tower is not None and tower_called(module) in _called(tower)]
        joining = [module for module in modules if tower is None and module == CONNECTOR]
        rest = [module for module in modules if module == REST]
        module = max(begun, key=len, default=None) or next(iter([*own, *joining, *rest]), None)
        if module is None:
            there = ", ".join(sorted(_parts(anatomy)))
            said = f"modules: {name} of {model} is in none of {', '.join(modules)}"
            raise M3Error(f"{said}: name its part too; the model has {there}")
        found[name] = module
    return found


def _called(tower: str) -> tuple[str, ...]:
    """What a tower may be called: the only one of a model is its text too."""
    return ("model", "text") if tower == "model" else (tower,)


def _parts(anatomy: Anatomy) -> Iterable[str]:
    return {*anatomy.towers, *([CONNECTOR] if any(part.tower is None for part in anatomy.parts.values()) else [])}
