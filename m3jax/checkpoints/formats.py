"""Which formats of checkpoints there are: one row each, from which all that reads, writes and names them follows.

A new format is one file, which reads and perhaps writes it, and one row here. Rows import that file when it is first
needed, so that whoever only asks for names starts at once.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from m3jax.errors import M3Error

if TYPE_CHECKING:
    from m3jax.checkpoints.protocol import Checkpoint

INDEX_ENDING = ".index.json"
"""How the name of an index ends, whose beginning ends as its files' names do."""

Opener: TypeAlias = Callable[[Path], "Checkpoint"]
Writer: TypeAlias = Callable[[Path, "Checkpoint", int], None]


class Format(NamedTuple):
    """One format.

    Attributes:
        name: What users call it.
        traces: What a directory is searched for, in words.
        open: From a file or a directory to the checkpoint in it.
        write: Writes an open checkpoint into a directory that exists, with at most so many bytes of tensors in a file
            if it `divides`; None where nothing is written.
        endings: How its files' names end; empty where names tell nothing.
        resembles: Whether a path whose name tells nothing is of it; None where only names tell.
        yields: Whether it is taken only from a directory that holds no other format.
        single_file: The name of a file that has all weights; empty where there is none.
        index_file: The name of the index of several files; empty where there is none.
        divides: Whether its writer divides weights among files of a largest size.
        remote: Whether `open` takes paths in remote storage.
        published: Patterns of its files on the hub, where not all files of its endings are weights.
    """

    name: str
    traces: str
    open: Opener
    write: Writer | None = None
    endings: tuple[str, ...] = ()
    resembles: Callable[[Path], bool] | None = None
    yields: bool = False
    single_file: str = ""
    index_file: str = ""
    divides: bool = False
    remote: bool = False
    published: tuple[str, ...] = ()

    def names(self, file: str) -> bool:
        """Whether a file's name, or an index's, is one of this format.

        Example:
            >>> SAFETENSORS.names("model.safetensors.index.json"), SAFETENSORS.names("pytorch_model.bin")
            (True, False)
        """
        return bool(self.endings) and file.removesuffix(INDEX_ENDING).endswith(self.endings)


def _later(place: str) -> Callable[..., Any]:
    """A function of this package, `module.function`, whose module is imported when it is called."""
    module, _, function = place.partition(".")

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"m3jax.checkpoints.{module}"), function)(*arguments)

    return call


SAFETENSORS = Format(
    name="safetensors",
    traces="*.safetensors",
    open=_later("safetensors.open_safetensors"),
    write=_later("copying.write_safetensors"),
    endings=(".safetensors",),
    single_file="model.safetensors",
    index_file="model.safetensors.index.json",
    divides=True,
    remote=True,
)
ORBAX = Format(
    name="orbax",
    traces="Orbax's _METADATA, manifest.ocdbt, checkpoint, zarr arrays and steps",
    open=_later("orbax.open_orbax"),
    write=_later("orbax_writer.fill_with_orbax"),
    resembles=_later("orbax_tree.is_orbax"),
    remote=True,
)
MSGPACK = Format(
    name="msgpack",
    traces="*.msgpack and Flax's checkpoint_…",
    open=_later("msgpack.open_msgpack"),
    write=_later("msgpack_writer.write_msgpack"),
    endings=(".msgpack",),
    resembles=_later("msgpack.is_msgpack"),
    single_file="flax_model.msgpack",
    index_file="flax_model.msgpack.index.json",
    divides=True,
)
PYTORCH = Format(
    name="pytorch",
    traces="pytorch_model*.bin",
    open=_later("pytorch.open_pytorch"),
    endings=(".bin", ".pt", ".pth", ".ckpt"),
    resembles=_later("pytorch.is_pytorch"),
    yields=True,
    single_file="pytorch_model.bin",
    index_file="pytorch_model.bin.index.json",
    remote=True,
    published=("pytorch_model*.bin",),
)

FORMATS = (SAFETENSORS, ORBAX, MSGPACK, PYTORCH)
"""All formats, the one that is taken first where a directory holds several at the front."""

WRITTEN = tuple(format.name for format in FORMATS if format.write is not None)
"""The names of those that are written."""

PUBLISHED = tuple(
    format.published or tuple(f"*{ending}" for ending in format.endings) for format in FORMATS if format.endings
)
"""The patterns of each format's files on the hub, of that first which is fetched where a model has several."""


def written(name: str) -> Format:
    """The format of a name, which can be written.

    Raises:
        M3Error: There is none.

    Example:
        >>> written("msgpack").single_file
        'flax_model.msgpack'
    """
    for format in FORMATS:
        if format.name == name and format.write is not None:
            return format
    raise M3Error(f"{name!r} is no format to convert to: choose {', '.join(WRITTEN)}.")
