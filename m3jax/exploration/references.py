"""What samples are measured against: the base, every expert, and equal weights; none of them is ever chosen."""

from collections.abc import Callable
from typing import NamedTuple

from m3jax.exploration.resident import Params, Resident
from m3jax.exploration.samples import Space, Weights, equal_weights
from m3jax.streaming.jobs import Ready

EQUAL = "equal weights"


class Reference(NamedTuple):
    """One of them.

    Attributes:
        name: "base", "equal weights", or what the recipe calls an expert.
        weights: Of a merge; none for an input by itself.
        params: Makes its arrays by tensor name.
    """

    name: str
    weights: Weights
    params: Callable[[], Params]


def _input_params(resident: Resident, place: int) -> Params:
    """An input's own arrays; copied tensors are the same in all of them."""
    arrays = resident.arrays
    return {t.output.name: arrays[t.output.name][place if t.pipeline is not None else 0] for t in resident.plan.tensors}


def references_of(ready: Ready, space: Space, resident: Callable[[], Resident]) -> list[Reference]:
    """The references of an exploration, as the merge sees them: under its names, with its rows.

    The base is one where the method takes differences from it. Where parts of the models are merged from other inputs
    than the rest (slices, modules), no input is a model by itself, and equal weights are left.

    Args:
        ready: Of `streaming.prepared`.
        space: Of its weights.
        resident: Loads the inputs.
    """
    merged = [tensor for tensor in ready.plan.tensors if tensor.pipeline is not None]
    alike = {(tensor.models, tensor.has_base) for tensor in merged}
    found: list[Reference] = []
    if len(alike) == 1:
        ((models, has_base),) = alike
        for place, position in enumerate(models):
            name = "base" if has_base and place == 0 else ready.models[position].input.name

            def params(place: int = place) -> Params:
                return _input_params(resident(), place)

            found.append(Reference(name, {}, params))
    equal = equal_weights(space)
    return [*found, Reference(EQUAL, equal, lambda: resident().merge(equal))]


def expert_names(ready: Ready) -> tuple[str, ...]:
    """What the recipe calls the experts, in the order of their weights."""
    return tuple(model.input.name for model in ready.models if model.role == "expert")
