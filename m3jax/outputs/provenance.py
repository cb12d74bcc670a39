"""Which package outside brought the method of a merge: recorded, said, and checked by a replay. Needs no JAX."""

import os
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints.remote import as_path
from m3jax.checkpoints.storage import is_dir, read_file
from m3jax.documents import FAULTS, parse_json
from m3jax.errors import M3Error
from m3jax.methods import catalogue
from m3jax.methods.catalogue import Origin

FILE_NAME = "m3jax.json"
"""The manifest's, which stands beside the weights."""

KEY = "method_from"
"""Where a manifest has it; absent where the method is one of m3jax's own."""


def record_of(method: str) -> dict[str, dict[str, str]]:
    """What a manifest says of the package that brings a method; nothing where it is one of our own.

    Args:
        method: Its name.
    """
    origin = catalogue.origin_of(method)
    return {} if origin is None else {KEY: dict(origin._asdict())}


def recorded_origin(manifest: Mapping[str, Any]) -> Origin | None:
    """The package that a manifest names; None where the method was one of m3jax's own.

    Raises:
        TypeError: What is said of it is not that.
    """
    told = manifest.get(KEY)
    if told is None:
        return None
    if not (isinstance(told, dict) and all(isinstance(told.get(field), str) for field in Origin._fields)):
        raise TypeError(f"{KEY} is not a package and its version")
    return Origin(told["package"], told["version"])


def said(method: str, origin: Origin | None) -> str:
    """A method as people read of it, with the package that brings it if that is one outside.

    Example:
        >>> said("ties", None), said("pull", Origin("m3jax-pull", "1.0"))
        ('ties', 'pull, of the package m3jax-pull 1.0')
    """
    return method if origin is None else f"{method}, of the package {origin}"


def check(manifest: Mapping[str, Any]) -> None:
    """Raise M3Error where a method that a manifest records is not that of then: its package is gone or another one."""
    method, then = str(manifest["recipe"].get("merge_method")), recorded_origin(manifest)
    now = catalogue.origin_of(method)
    if then is None and now is not None:
        raise M3Error(
            f"merge method {method!r} was m3jax's own when this merge was made, but here it is that of the package "
            f"{now}: remove the package, or use the version of m3jax that the manifest names"
        )
    if then is None or (now is not None and now.package == then.package):
        return
    what = f"merge method {method!r} was that of the package {then} when this merge was made"
    if now is not None:
        raise M3Error(f"{what}, but here it is that of {now}: install {then.package} in its place")
    if catalogue.own_row(method) is not None:
        raise M3Error(f"{what}, but here it is m3jax's own: use the version of m3jax that the manifest names")
    raise M3Error(f"{what}, which is not here: install {then.package} {then.version}")


def change(manifest: Mapping[str, Any]) -> str | None:
    """A sentence on a package whose version is not that of then; None where nothing has changed."""
    method, then = str(manifest["recipe"].get("merge_method")), recorded_origin(manifest)
    now = catalogue.origin_of(method)
    if then is None or now is None or then.version == now.version:
        return None
    return f"merge method {method!r} is that of {now.package} {now.version} here, and was that of {then.version} then"


def method_of(model: str | os.PathLike[str]) -> dict[str, str] | None:
    """The method by which a model was merged and the package outside that brought it, as its manifest says.

    Args:
        model: A directory or a weight file that m3jax may have made.

    Returns:
        "method", "package" and "version"; None where there is no manifest, or none that names a package.
    """
    try:
        place = as_path(model)
        file = (place if is_dir(place) else place.parent) / FILE_NAME
        manifest = parse_json(read_file(file))
        origin = recorded_origin(manifest)
        return None if origin is None else {"method": str(manifest["recipe"]["merge_method"]), **origin._asdict()}
    except (OSError, M3Error, *FAULTS):
        return None  # whoever looks at weights is not to be stopped by what lies beside them
