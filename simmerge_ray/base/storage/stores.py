"""Object stores by fsspec: one call, one object; what fails for a while is tried again, what cannot succeed is not.

Credentials, endpoint and region come from the libraries' own chains (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, a node's role,
`GOOGLE_APPLICATION_CREDENTIALS`, `FSSPEC_S3_...`), never from a file or an argument of ours. An object appears under
its name when the last byte of it is there: stores make an upload visible as a whole.

`SIMMERGE_STORE_PATIENCE`: seconds for which a store may be away (default 180).
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from simmerge_ray.base.errors import AccessError, InputError, StorageError, unknown_name
from simmerge_ray.base.storage.places import RemotePath, number_in_environment

PATIENCE_VARIABLE = "SIMMERGE_STORE_PATIENCE"
_DEFAULT_PATIENCE_S = 180.0
_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 15.0
_TRANSIENT_ERRNOS = {
    errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EAGAIN,
}  # fmt: skip
_TRANSIENT_CODES = {408, 425, 429, *range(500, 600)}
# By the names of classes, so that no library is imported that is not used. botocore, aiohttp, urllib3, google.
_TRANSIENT_CLASSES = {
    "HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError",
    "ProxyConnectionError", "ResponseStreamingError", "IncompleteReadError", "ResponseParserError", "ClientError",
    "ClientPayloadError", "ServerDisconnectedError", "FSTimeoutError", "TransportError", "ChecksumError",
    "IncompleteRead", "IncompleteUploadError",
}  # fmt: skip
_ACCESS_CLASSES = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError",
    "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "ProfileNotFound",
    "DefaultCredentialsError", "RefreshError",
}  # fmt: skip
_RANGE_BYTES, _PART_BYTES = 1 << 26, 1 << 24
_REFUSED = (401, 403)

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class IncompleteUploadError(Exception):
    """What was written is not what the store has."""


@dataclass(frozen=True)
class Entry:
    """An object or a directory in a store. version: another one when the object is written again."""

    path: RemotePath
    size: int
    version: str
    is_directory: bool = False


def filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme; it remembers no listings, since other processes write.

    Raises:
        InputError: no such scheme, or its library is not installed.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        # The one back-off is `retried`; libraries below it try twice, so that a hiccup costs no whole upload.
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": 30,
            "retries": {"total_max_attempts": 2, "mode": "standard"},
        } | own
    try:
        made = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise InputError(f"{scheme}:// needs a library: pip install 'simmerge_ray[cloud]' ({error})") from None
    except ValueError:
        known = ("file", "gs", "s3")
        raise InputError(unknown_name("scheme of a URI", scheme, known)) from None
    if scheme == "s3":
        made.retries = 2
    return made


def patience_s() -> float:
    """For how many seconds a store may be away.

    Raises:
        ConfigError: the variable is no number.
    """
    return number_in_environment(PATIENCE_VARIABLE, _DEFAULT_PATIENCE_S, "seconds")


def retried(place: RemotePath, action: str, call: Callable[[], Result]) -> Result:
    """The result of `call`, tried again with growing pauses while the store does not answer.

    Args:
        action: for messages, as in "cannot read s3://...".

    Raises:
        FileNotFoundError, FileExistsError: as the store says, at once.
        AccessError: the store refuses the credentials, or there are none.
        StorageError: it refuses for another reason, or did not answer for `SIMMERGE_STORE_PATIENCE` seconds.
    """
    started, delay = time.monotonic(), _FIRST_DELAY_S
    patience = patience_s()
    while True:
        try:
            return call()
        except (FileNotFoundError, FileExistsError, StorageError, InputError):
            raise
        except Exception as error:  # libraries of stores raise errors of their own
            if _is_refusal(error):
                raise AccessError(f"cannot {action} {place}: {_said(error)}; {_remedy(place)}") from None
            waited = time.monotonic() - started
            if not is_transient(error):
                raise StorageError(f"cannot {action} {place}: {_said(error)}") from error
            if waited + delay > patience:
                raise StorageError(
                    f"cannot {action} {place}: {_said(error)}; tried for {waited:.0f} s ({PATIENCE_VARIABLE} sets it)"
                ) from error
            _log.warning(
                "cannot %s %s now (%s); trying for %.0f s more", action, place, _said(error), patience - waited
            )
            time.sleep(delay * random.uniform(0.7, 1.0))  # many workers should not come back in one moment
            delay = min(2 * delay, _MAX_DELAY_S)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a while later."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {one.__name__ for one in type(error).__mro__}
    if names & {"FSTimeoutError", "IncompleteUploadError"}:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNOS
    code = _code(error)
    if code is not None:
        return code in _TRANSIENT_CODES
    return bool(names & _TRANSIENT_CLASSES)


def _is_refusal(error: BaseException) -> bool:
    names = {one.__name__ for one in type(error).__mro__}
    return isinstance(error, PermissionError) or bool(names & _ACCESS_CLASSES) or _code(error) in _REFUSED


def _code(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    response = getattr(error, "response", None)
    found = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode", found)
    try:
        return int(found)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _remedy(place: RemotePath) -> str:
    if place.scheme == "s3":
        return "check AWS_ACCESS_KEY_ID, AWS_PROFILE or the node's role, and AWS_ENDPOINT_URL for a store of your own"
    if place.scheme == "gs":
        return "check GOOGLE_APPLICATION_CREDENTIALS or the node's service account"
    return "check the credentials"


def find(place: RemotePath) -> Entry | None:
    """The object or directory of that name; None where there is none."""
    try:
        return _entry(place.scheme, retried(place, "look at", lambda: filesystem(place.scheme).info(place.key)))
    except FileNotFoundError:
        return None


def list_children(place: RemotePath) -> list[Entry]:
    """The objects and directories in a directory, sorted; an object itself; none if there is neither."""
    try:
        found = retried(place, "list", lambda: filesystem(place.scheme).ls(place.key, detail=True))
    except FileNotFoundError:
        return []
    entries = (_entry(place.scheme, info) for info in found)
    return sorted((one for one in entries if place in (one.path, one.path.parent)), key=lambda one: one.path)


def list_below(place: RemotePath) -> list[Entry]:
    """All objects below a directory, sorted."""
    try:
        found = retried(place, "list", lambda: filesystem(place.scheme).find(place.key, detail=True))
    except FileNotFoundError:
        return []
    entries = (_entry(place.scheme, info) for info in found.values())
    return sorted(
        (one for one in entries if one.path.is_relative_to(place) and one.path != place), key=lambda one: one.path
    )


def read_object(place: RemotePath, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes of an object, or bytes [start, stop) of it.

    Raises:
        FileNotFoundError: there is no such object. StorageError: see `retried`.
    """

    def read() -> bytes:
        found: bytes = filesystem(place.scheme).cat_file(place.key, start=start, end=stop)
        if start is not None and stop is not None and len(found) > stop - start:
            return found[start:stop]  # a store without ranges sends all of it
        return found

    try:
        return retried(place, "read", read)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(place)) from None


def download_file(entry: Entry, target: Path) -> None:
    """Copy an object into a new local file, range by range, so that an interruption costs one range.

    Raises:
        FileNotFoundError, StorageError: see `read_object`; the object was written again meanwhile. OSError: the file
        cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as stream:
        for start in range(0, entry.size, _RANGE_BYTES):
            stream.write(read_object(entry.path, start, min(start + _RANGE_BYTES, entry.size)))
    now = find(entry.path)
    if now is None or now.version != entry.version or target.stat().st_size != entry.size:
        raise StorageError(f"{entry.path} was changed while it was read; run again")


def write_object(place: RemotePath, data: bytes) -> None:
    """Write an object, whole or not at all; one of that name is replaced.

    Raises:
        StorageError: see `retried`; there is no such bucket.
    """
    _written(place, lambda: filesystem(place.scheme).pipe_file(place.key, data))


def upload_file(source: Path, place: RemotePath) -> Entry:
    """Write a local file as an object, in parts where it is large; it is visible when all of it is there.

    Raises:
        StorageError: see `retried`; there is no such bucket; the source cannot be read.
    """
    size = source.stat().st_size
    options: dict[str, Any] = {}
    if place.scheme == "s3":  # memory: parts at the same time; S3 takes 10,000 parts of an object
        options = {"chunksize": max(_PART_BYTES, -(-size // 9000)), "max_concurrency": 4}

    def upload() -> Entry:
        store = filesystem(place.scheme)
        store.put_file(str(source), place.key, **options)
        entry = _entry(place.scheme, store.info(place.key))
        if entry.size != size:
            raise IncompleteUploadError(f"{entry.size} of {size} bytes have arrived")
        return entry

    return _written(place, upload)


def _written(place: RemotePath, write: Callable[[], Result]) -> Result:
    try:
        return retried(place, "write", write)
    except FileNotFoundError as error:
        raise StorageError(f"cannot write {place}: {_said(error)}; is there such a bucket?") from None


def delete_object(place: RemotePath) -> None:
    """Delete an object; one that is gone already is as wanted."""
    try:
        retried(place, "delete", lambda: filesystem(place.scheme).rm_file(place.key))
    except FileNotFoundError:
        return


def _entry(scheme: str, info: Mapping[str, Any]) -> Entry:
    path = RemotePath(scheme, str(info["name"]).strip("/"))
    if info.get("type") == "directory":
        return Entry(path, 0, "", True)
    marks = ("ETag", "etag", "generation", "md5Hash", "LastModified", "updated", "mtime", "created", "mode")
    known = [f"{key}={info[key]}" for key in marks if info.get(key) is not None]
    return Entry(path, int(info.get("size") or 0), f"{info.get('size')} {known[0] if known else ''}")
