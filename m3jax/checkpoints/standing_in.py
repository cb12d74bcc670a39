"""Tensors that stand for others too: one Gram matrix is stored for all weights that read the same inputs."""

from collections.abc import Mapping
from types import MappingProxyType

from m3jax.checkpoints.locate import ModelDirectory
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error

CONVERSION = "m3jax-conversion.json"
"""What tells that a directory is the output of a conversion, as the manifest tells that it is a merge's."""

STATISTICS, SHARED = "statistics", "shared"
"""What the file calls what it tells of statistics, and in that the names that have the statistics of another."""


def standing_in(place: ModelDirectory) -> Mapping[str, str]:
    """By the name of a tensor that is not stored, the one that stands for it; nothing of a model.

    Args:
        place: Where the statistics, or the model, are.

    Raises:
        M3Error: What tells it cannot be read.
    """
    directory = place.path if is_dir(place.path) else place.path.parent
    file = directory / CONVERSION
    if not is_file(file):
        return MappingProxyType({})
    try:
        told = parse_json(read_file(file))
        kept = told.get(STATISTICS, {}) if isinstance(told, dict) else {}
        return {str(name): str(other) for name, other in dict(kept.get(SHARED, {})).items()}
    except (*FAULTS, AttributeError) as error:
        raise M3Error(f"{file}: is damaged ({error}): restore it, or write anew what it is beside") from None
