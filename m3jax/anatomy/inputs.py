"""Which axes of a weight its inputs lie along: the last one, as PyTorch has it, or the first ones, as Flax has it."""

from collections.abc import Sequence
from math import prod

from m3jax.errors import M3Error

_EITHER_WAY = frozenset(
    {"c_attn", "c_fc", "c_proj", "q_attn"}
)  # GPT-2's are [inputs, outputs], those of others are not


def _first_axes(shape: Sequence[int], width: int) -> bool:
    """Whether some of the leading axes, not all, together have as many entries as there are inputs."""
    return any(prod(shape[:count]) == width for count in range(1, len(shape)))


def inputs_first(name: str, shape: Sequence[int], width: int, told: bool | None = None) -> bool:
    """Whether the inputs of a weight lie along its first axes, and not along its last one.

    Args:
        name: The weight.
        shape: Of the weight, of one block if it stacks blocks.
        width: How many inputs there are.
        told: What is known of it; None where nothing is.

    Raises:
        M3Error: The weight has no such axes, or name and shape do not tell.

    Example:
        >>> inputs_first("layers.0.mlp.up_proj.weight", (16, 4), 4), inputs_first("mlp.up.kernel", (4, 16), 4)
        (False, True)
    """
    first, last = _first_axes(shape, width), len(shape) > 1 and shape[-1] == width
    words = name.removesuffix(".value").split(".")
    if told is not None:
        first, last = first and told, last and not told
    elif words[-1] == "kernel":
        last = False
    elif words[-1] == "weight" and words[-2:-1] not in [[word] for word in _EITHER_WAY]:
        first = False
    if first == last:
        said = "neither its first axes nor its last one have as many" if not first else "they may lie along either axis"
        raise M3Error(
            f"{name}: is {list(shape)}, and its statistics are of {width} inputs, but {said}: measure this model with "
            "m3jax statistics, which tells"
        )
    return first
