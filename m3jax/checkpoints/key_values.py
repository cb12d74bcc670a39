"""Where TensorStore finds files: on this disk, and in buckets, which it reads by range with drivers of its own.

They look for credentials as the storage's own tools do. A place other than the provider's own (an endpoint of S3, an
emulator of Google's storage) is where the drivers of `remote` go too.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from m3jax.checkpoints.remote import RemotePath, file_system, saying
from m3jax.errors import M3Error

# Waits end within a minute, as those of `remote` do; TensorStore's own go on for a quarter of an hour.
_RETRIES = {"max_retries": 6, "initial_delay": "250ms", "max_delay": "8s"}
_CONNECTING = ("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "5")
_EMULATOR = "STORAGE_EMULATOR_HOST"

_FAILURES = {
    "PERMISSION_DENIED": "is refused: check that the credentials in use are valid and may read in the bucket",
    "UNAUTHENTICATED": "needs credentials, and none are found: set up the environment or a profile of the storage's "
    "own tools",
    "UNAVAILABLE": "cannot be reached: check the network and the endpoint, then start again",
    "ABORTED": "cannot be reached: check the network and the endpoint, then start again",
    "DEADLINE_EXCEEDED": "cannot be reached: check the network and the endpoint, then start again",
}
_STATUS = re.compile(r"[A-Z_]+")  # a canonical status, which TensorStore's errors begin with


def files_at(directory: Path) -> dict[str, Any]:
    """Where TensorStore finds what is in a directory.

    Args:
        directory: Here or in remote storage.

    Returns:
        A specification of a `tensorstore.KvStore` whose `path` ends in a slash.

    Raises:
        M3Error: The storage's driver cannot be used.
    """
    if not isinstance(directory, RemotePath):
        return {"driver": "file", "path": f"{directory.absolute()}/"}
    os.environ.setdefault(*_CONNECTING)
    bucket, *below = directory.key.parts
    path = "".join(f"{part}/" for part in below)
    if directory.scheme == "gs":
        if emulator := os.environ.get(_EMULATOR):
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")  # which takes any
        return {"driver": "gcs", "bucket": bucket, "path": path}
    return {"driver": "s3", "bucket": bucket, "path": path, **_of_s3(directory)}


def _of_s3(directory: RemotePath) -> dict[str, Any]:
    """The endpoint and the credentials that the driver of `remote` has found."""
    driver = file_system("s3")
    with saying(directory):
        driver.connect()
        meta = driver.s3.meta
    told: dict[str, Any] = {}
    host = urlsplit(meta.endpoint_url).hostname or ""
    if not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        told |= {"endpoint": meta.endpoint_url, "aws_region": meta.region_name or "us-east-1"}
    if driver.anon:
        told["aws_credentials"] = {"type": "anonymous"}
    elif os.environ.get("AWS_ACCESS_KEY_ID"):
        told["aws_credentials"] = {"type": "environment"}
    return told


def context(cache: int | None = None) -> Any:
    """TensorStore's context: how often it asks again, and how much it keeps.

    Args:
        cache: Bytes of decoded chunks; as TensorStore has it if None.
    """
    import tensorstore as ts

    told: dict[str, Any] = {"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES}
    return ts.Context(told if cache is None else {**told, "cache_pool": {"total_bytes_limit": cache}})


def open_array(spec: Mapping[str, Any], name: str, directory: Path, shared: Any) -> Any:
    """A future of TensorStore's handle of an array.

    Args:
        spec: Where and how it is stored.
        name: Of the array.
        directory: Where it is, for people.
        shared: As `context` gives it.

    Raises:
        M3Error: Nothing can be stored so.
    """
    import tensorstore as ts

    try:
        return ts.open(spec, open=True, read=True, context=shared)
    except MemoryError:
        raise
    except Exception as error:  # of many types
        raise unusable(f"array {name!r}", directory, error) from error


def unusable(what: str, directory: Path, error: Exception) -> M3Error:
    """The sentence for something that TensorStore does not give us.

    Args:
        what: That is in the directory.
        directory: Here or in remote storage.
        error: What TensorStore says, of many types.
    """
    reason = str(error).partition(":")[0]  # the rest repeats paths and source lines, and may hold what is secret
    if not _STATUS.fullmatch(reason):  # nor what its bindings say of C++
        reason = type(error).__name__
    if isinstance(directory, RemotePath) and reason in _FAILURES:
        return M3Error(f"{what} in {directory} {_FAILURES[reason]}.")
    return M3Error(f"{what} in {directory} is damaged or missing ({reason}): get the checkpoint again from its source.")
