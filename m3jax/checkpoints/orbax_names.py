"""What the files of an Orbax checkpoint are called that is written here: patterns that match them and nothing else.

Patterns are those of `fnmatch`, in which `[0-9]+` is a number. TensorStore names values by 32 hexadecimal digits, other
ones each time, and chunks by where they are in the array.
"""

import glob
from collections.abc import Iterable

from m3jax.checkpoints.orbax_tree import COMMITTED, MANIFEST, TREE, part_name

SHARDINGS, STRINGS, ARRAYS = "_sharding", "_strings.json", "array_metadatas"
VALUES, NODES = "d", "ocdbt_meta"  # where a database keeps values, and a part's what tells where they are
NUMBER = "[0-9]+"
LOCKED = ".__lock"  # ends a file's name while TensorStore writes it
_HEX = "[0-9a-f]" * 32


def database_patterns() -> tuple[str, ...]:
    """Patterns of the files of a database and of its parts, in their item's directory."""
    part = part_name(NUMBER)
    own = (MANIFEST, f"{VALUES}/{_HEX}")
    return (*own, *(f"{part}/{name}" for name in (*own, f"{NODES}/{_HEX}")))


def array_patterns(name: str, rank: int) -> tuple[str, ...]:
    """Patterns of the files of an array in a directory of its own, of zarr or zarr3.

    Args:
        name: Of the array.
        rank: How many axes it has.

    Example:
        >>> array_patterns("w", 2)
        ('w/.zarray', 'w/zarr.json', 'w/[0-9]+.[0-9]+', 'w/[0-9]+/[0-9]+', 'w/c/[0-9]+/[0-9]+', 'w/c.[0-9]+.[0-9]+')
    """
    numbers = [NUMBER] * rank
    chunks = [".".join(numbers), "/".join(numbers), "/".join(["c", *numbers]), ".".join(["c", *numbers])]
    chunks = chunks if rank else ["0", "c"]
    return tuple(f"{glob.escape(name)}/{each}" for each in (".zarray", "zarr.json", *dict.fromkeys(chunks)))


def description_patterns() -> tuple[str, ...]:
    """Patterns of the small files of an item."""
    return (TREE, COMMITTED, SHARDINGS, STRINGS, f"{ARRAYS}/process_{NUMBER}")


def below(directory: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Patterns of files in a directory.

    Args:
        directory: Its name; empty where it is the one that they are in already.
        patterns: Of the files, in it.
    """
    return tuple(f"{glob.escape(directory)}/{pattern}" if directory else pattern for pattern in patterns)
