"""Objects in S3 and Google Cloud Storage: their paths, their drivers, and sentences for what fails.

Remote storage goes through fsspec and its drivers (s3fs, gcsfs), which find the credentials, sign and retry. They are
imported when the first remote path is used. Nothing that a driver says is repeated, as it may hold what is secret.
"""

import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from m3jax.errors import M3Error

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_EXTRAS = {"s3": "s3", "gs": "gcs"}
_ELSEWHERE = ("301", "400", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_CONNECTIONS = 32  # at a time, of this process to one storage


class Identity(NamedTuple):
    """What differs when a file or an object is another one under the same name.

    Attributes:
        tag: The inode, or the object's ETag or generation.
        size: In bytes.
        mtime_ns: Time of last modification, in nanoseconds.
        ctime_ns: Of a local file, the time of its last change, in nanoseconds.
    """

    tag: int | str
    size: int
    mtime_ns: int
    ctime_ns: int = 0


class Memory(NamedTuple):
    """What was found under prefixes, by whoever asks for several names in each.

    Attributes:
        root: The prefix above which nothing is listed.
        found: What is directly under each prefix, and whether that is one.
    """

    root: PurePosixPath
    found: dict[PurePosixPath, dict[str, bool]]


# --- Remote paths ----------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Base = Path  # for the type checker, so that what takes a model's path can be given a remote one
else:
    _Base = object


@dataclass(frozen=True)
class RemotePath(_Base):
    """An object, or a prefix that stands for a directory, with those methods of `Path` that readers use.

    Attributes:
        scheme: `s3` or `gs`.
        key: The bucket and the object's name in it.
        memory: What was found under prefixes; None where nothing is remembered.

    Example:
        >>> model = as_path("s3://bucket/models/tiny/")
        >>> str(model / "config.json"), model.name
        ('s3://bucket/models/tiny/config.json', 'tiny')
    """

    scheme: str
    key: PurePosixPath
    memory: Memory | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: "str | os.PathLike[str]") -> Self:
        return replace(self, key=self.key / name)

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.name

    @property
    def suffix(self) -> str:
        """The last part's ending, with its dot."""
        return self.key.suffix

    @property
    def parent(self) -> Self:
        """The prefix that the object is in; a bucket is its own."""
        return replace(self, key=self.key.parent) if len(self.key.parts) > 1 else self

    @property
    def parents(self) -> tuple[Self, ...]:
        """All prefixes that the object is in, the nearest first."""
        return tuple(replace(self, key=key) for key in self.key.parents if key.parts)

    def resolve(self, strict: bool = False) -> Self:
        """The path itself: there are no links."""
        return self

    def absolute(self) -> Self:
        """The path itself."""
        return self

    def with_name(self, name: str) -> Self:
        """What is beside it under another name."""
        return replace(self, key=self.key.with_name(name))

    def remembering(self) -> Self:
        """The same path, which lists each prefix once; so do the paths that are made of it.

        Whoever looks for the same few names in many prefixes would otherwise ask for each.
        """
        return replace(self, memory=Memory(self.key, {}))

    def info(self) -> dict[str, Any] | None:
        """What the storage says of it now; None where nothing is there.

        Raises:
            M3Error: The storage cannot be reached or refuses.
        """
        with saying(self):
            try:
                found: dict[str, Any] = file_system(self.scheme).info(str(self.key))
            except FileNotFoundError:
                return None
        return found

    def is_file(self) -> bool:
        """Whether it is an object."""
        if (told := self._told_by_parent()) is not None:
            return told.get(self.name) is False
        info = self.info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        """Whether it is a bucket, or a prefix that objects are under."""
        if (told := self._told_by_parent()) is not None:
            return told.get(self.name) is True
        if self.memory is not None:
            return bool(self._listing())
        info = self.info()
        return info is not None and info["type"] == "directory"

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is an object, or a prefix that objects are under."""
        return self.is_file() or self.is_dir()

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size and time of last modification of an object.

        Raises:
            M3Error: There is no such object.
        """
        _, size, mtime_ns, _ = self.identity()
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, *[mtime_ns // 10**9] * 3))

    def identity(self) -> Identity:
        """What tells the object from another one under its name.

        Raises:
            M3Error: There is no such object.
        """
        info = self.info()
        if info is None or info["type"] != "file":
            raise absent(self)
        return identity_of(info)

    def iterdir(self) -> Iterator[Self]:  # type: ignore[override]  # some versions say Generator
        """What is directly under the prefix.

        Raises:
            M3Error: Nothing is.
        """
        names = self._listing() if self.memory is not None else self._list()
        yield from (self / name for name in names)

    def glob(self, pattern: str) -> Iterator[Self]:  # type: ignore[override]  # as above
        """What is directly under the prefix and has such a name."""
        yield from (self / name for name in self._listing() if fnmatchcase(name, pattern))

    def _told_by_parent(self) -> dict[str, bool] | None:
        """What is beside the path, where that is remembered, and not above what was to be."""
        if self.memory is None or self.memory.root not in self.key.parents:
            return None
        return self.parent._listing()

    def _listing(self) -> dict[str, bool]:
        """What is directly under the prefix, and whether each is a prefix; nothing where nothing is there."""
        if self.memory is not None and self.key in self.memory.found:
            return self.memory.found[self.key]
        told = self._told_by_parent()
        try:
            found = {} if told is not None and not told.get(self.name) else self._list()
        except M3Error as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            found = {}
        if self.memory is not None:
            self.memory.found[self.key] = found
        return found

    def _list(self) -> dict[str, bool]:
        """What is directly under the prefix now, and whether each is a prefix."""
        with saying(self):
            entries = file_system(self.scheme).ls(str(self.key), detail=True)
        keys = {PurePosixPath(entry["name"]): entry["type"] == "directory" for entry in entries}
        # Some tools make an empty object of the prefix's own name.
        return {key.name: is_prefix for key, is_prefix in keys.items() if key.parent == self.key}

    def objects(self) -> "dict[str, Identity]":
        """Every object under the prefix, however deep, by its name under it."""
        with saying(self):
            found = file_system(self.scheme).find(str(self.key), detail=True)
        return {
            key.removeprefix(f"{self.key}/"): identity_of(info)
            for key, info in sorted(found.items())
            if info["type"] == "file" and key != str(self.key)
        }

    def read_bytes(self) -> bytes:
        """The whole of a small object.

        Raises:
            M3Error: It cannot be read.
        """
        with saying(self):
            content: bytes = file_system(self.scheme).cat_file(str(self.key))
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The whole of a small object, decoded."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")


def is_url(text: str) -> bool:
    """Whether a name is written as a URL, which no local path or hub id is."""
    return _URL.fullmatch(text) is not None


def as_path(place: "str | os.PathLike[str]") -> Path:
    """The local or remote path that a user means.

    Args:
        place: A path, or a URL such as `s3://bucket/model` or `gs://bucket/model`.

    Returns:
        A `Path`, or a `RemotePath`, which can stand in for one.

    Raises:
        M3Error: The URL is of no known storage, or says more than where something is.
    """
    if isinstance(place, RemotePath):
        return place
    text = os.fspath(place)
    url = _URL.fullmatch(text)
    if url is None:
        return Path(text)
    scheme, rest = url[1].lower(), url[2]
    known = ", ".join(f"{name}://bucket/path" for name in _PACKAGES)
    if scheme not in _PACKAGES:
        raise M3Error(f"{scheme}:// is no storage that can be read here: write {known}, a local path or a hub id.")
    if "@" in rest.split("/")[0] or "?" in rest or "#" in rest:
        # Not repeated: what is between may be a key or a signature.
        raise M3Error(
            f"the {scheme}:// address has more than a bucket and a path in it: write {scheme}://bucket/path and leave"
            " credentials to the environment or a profile."
        )
    key = PurePosixPath(rest)
    if not key.parts or key.is_absolute() or ".." in key.parts:
        raise M3Error(f"{text!r} does not name a bucket and a path in it: write {scheme}://bucket/path.")
    return RemotePath(scheme, key)


# --- Drivers and what they report ------------------------------------------------------------------------


@cache  # fsspec keeps one for each thread, each with its own connections
def file_system(scheme: str) -> Any:
    """The driver of a storage, with waits that end within a minute.

    Args:
        scheme: `s3` or `gs`.

    Returns:
        An fsspec file system; its environment and configuration files hold, and win over what is set here.

    Raises:
        M3Error: The driver is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped]
        from fsspec.config import conf  # type: ignore[import-untyped]

        options = {"use_listings_cache": False, **_options(scheme), **conf.get(scheme, {})}
        driver = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        package, extra = _PACKAGES[scheme], _EXTRAS[scheme]
        raise M3Error(f"{scheme}:// needs the package {package}: run `pip install 'm3jax[{extra}]'`.") from error
    if scheme == "s3":
        driver.retries = 2  # of the retries of the layer below, and for a range squared
    else:  # its driver logs each failure in full; whoever wants that configures logging
        logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    return driver


def _options(scheme: str) -> dict[str, Any]:
    """What the drivers would otherwise wait for too long, and read too much of at a time."""
    if scheme == "s3":
        retries = {"mode": "standard", "total_max_attempts": 3}
        waits = {"connect_timeout": 3, "read_timeout": 10, "retries": retries}
        return {"config_kwargs": {**waits, "max_pool_connections": _CONNECTIONS}, "max_concurrency": 4}
    from aiohttp import ClientTimeout

    return {"requests_timeout": ClientTimeout(sock_connect=3, sock_read=30)}


@contextmanager
def saying(path: RemotePath) -> Iterator[None]:
    """Turns what a driver raises into a sentence; `FileNotFoundError` of a path inside its own `try` can be caught."""
    try:
        yield
    except FileNotFoundError as error:
        raise absent(path) from error
    except M3Error:
        raise
    except Exception as error:
        raise M3Error(f"{path} {_complaint(_seen(error))}.") from _cause(_seen(error))


def _cause(error: Exception) -> OSError | None:
    """The cause to give with the sentence: an OSError where the same merge may go on once it is mended."""
    if _is_change(error):
        return None
    if isinstance(error, OSError):
        return error
    cause = ConnectionError(type(error).__name__)
    cause.__cause__ = error
    return cause


def _seen(error: Exception) -> Exception:
    """The error itself, or the one that s3fs hid by looking for a number in it that it did not have."""
    hidden = error.__context__ if isinstance(error, IndexError) else None
    return hidden if isinstance(hidden, OSError) else error


def absent(path: RemotePath) -> M3Error:
    """The sentence for an object that is not there, or whose bucket is not."""
    bucket = RemotePath(path.scheme, PurePosixPath(path.key.parts[0]))
    try:
        file_system(path.scheme).info(str(bucket.key))
    except FileNotFoundError:
        return M3Error(f"{bucket} does not exist: check the name of the bucket.")
    except Exception:  # who may read an object may not always ask for its bucket
        pass
    return M3Error(f"{path} does not exist: check the path.")


def changed(path: Path) -> M3Error:
    """The sentence for a file or object that is no longer what its header was read from."""
    return M3Error(f"{path} has changed since its header was read: start again.")


def _is_change(error: Exception) -> bool:
    """Whether the storage says that an object is not the one that was asked for."""
    return type(error).__name__ == "FileExpired" or _code(error) in ("PreconditionFailed", "412")


def _code(error: BaseException) -> str:
    """The short code of a storage's answer, such as `SlowDown`; empty where there is none."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(link, "code", None)
        if code is not None and re.fullmatch(r"\w{1,40}", str(code)):
            return str(code)
    return ""


def _complaint(error: Exception) -> str:
    """What went wrong and the mend, as the rest of a sentence."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    code = _code(error)
    if _is_change(error):
        return "has changed since its header was read: start again"
    if kinds & {"NoCredentialsError", "DefaultCredentialsError"}:
        return "needs credentials, and none are found: set up the environment or a profile of the storage's own tools"
    denied = {"PermissionError", "CredentialRetrievalError", "PartialCredentialsError", "GoogleAuthError"}
    if kinds & denied or code in ("401", "403") or str(error).startswith("Forbidden"):
        told = f" ({code})" if code else ""
        return f"is refused{told}: check that the credentials in use are valid and may do this in the bucket"
    network = {"ConnectionError", "TimeoutError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError"}
    if kinds & network or "FSTimeoutError" in kinds or "RequestException" in kinds:
        return f"cannot be reached ({type(error).__name__}): check the network and the endpoint, then start again"
    if code in _ELSEWHERE:
        return (
            f"cannot be used ({code}), as it is where the bucket is in another region: check AWS_DEFAULT_REGION, the "
            "endpoint, and that the credentials have not expired"
        )
    return f"cannot be used ({code or type(error).__name__}): check the path, or try again later"


def range_reader(path: RemotePath) -> tuple[Identity, Callable[[int, int], bytes]]:
    """What an object is now, and a function that gives a range of it, and of no other that takes its name."""
    driver, key = file_system(path.scheme), str(path.key)
    if path.scheme == "s3":
        # Every range that an open file asks for has the ETag that was found at its opening as its condition.
        handle = driver.open(key, "rb", cache_type="none")
        return identity_of(handle.details), handle.cache.fetcher
    info = driver.info(key)
    return identity_of(info), partial(driver.cat_file, key, generation=info.get("generation"))


def download(path: RemotePath, target: Path) -> None:
    """Copies an object to a file of this disk.

    Raises:
        M3Error: It cannot be read.
    """
    with saying(path):
        file_system(path.scheme).get_file(str(path.key), str(target))


def identity_of(info: dict[str, Any]) -> Identity:
    """What a driver says of an object, under one set of names."""
    if info.get("type") != "file":
        raise FileNotFoundError(errno.ENOENT, "no object")
    time = info.get("LastModified") or info.get("mtime") or info.get("updated")
    when = datetime.fromisoformat(time) if isinstance(time, str) else time
    mtime_ns = int(when.timestamp()) * 10**9 if isinstance(when, datetime) else 0
    return Identity(str(info.get("generation") or info.get("ETag") or ""), int(info["size"]), mtime_ns)
