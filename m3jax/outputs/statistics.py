"""Statistics of a model, written and read: a checkpoint with the model's names, and what tells of which model they are.

They are told of in m3jax-conversion.json, as what is written from one model is, so that `verify` knows them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints.remote import RemotePath
from m3jax.checkpoints.storage import is_dir, is_file, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.outputs import mark
from m3jax.outputs.local import CONVERSION


class StatisticsRecord(NamedTuple):
    """What is told of statistics.

    Attributes:
        kind: Which they are: "fisher".
        model: What they were measured of, as it was named.
        adapter: The digest of the configuration of the adapter that was on it; None without one.
        tensors: Digests of the model's tensors, as they are stored.
        measured: How they were measured: data, examples, settings.
    """

    kind: str
    model: str
    adapter: str | None
    tensors: Mapping[str, str]
    measured: Mapping[str, Any]


def read_record(place: Path) -> StatisticsRecord | None:
    """What is told of statistics; None where nothing is, as of a model.

    Args:
        place: Their directory, or the file in it.

    Raises:
        M3Error: It is damaged or edited.
    """
    directory = place if is_dir(place) else place.parent
    if not is_file(directory / CONVERSION):
        return None
    try:
        told = parse_json(read_file(directory / CONVERSION))
    except FAULTS:
        return None  # of some conversion, which is not asked for here
    if not isinstance(told, dict) or mark.STATISTICS not in told:
        return None
    told = mark.read(directory)
    (model,) = told["inputs"]
    kept = dict(told[mark.STATISTICS])
    adapter = model.get("adapter")
    return StatisticsRecord(
        kept.pop("kind"), model["name"], None if adapter is None else adapter["config"], model["tensors"], kept
    )


def check_no_statistics(name: str, place: Path) -> None:
    """Raise M3Error where a model is asked for, and statistics are there.

    Args:
        name: What the model is called.
        place: Where it is.
    """
    record = None if isinstance(place, RemotePath) else read_record(place)
    if record is not None:
        raise M3Error(
            f"{name}: holds {record.kind} statistics of {record.model}, no model: name the model, and these under "
            "`statistics`"
        )
