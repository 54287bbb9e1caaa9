"""The file systems of object stores (fsspec), and their one back-off: a store that does not answer is asked again, one
that refuses is not.

Credentials, endpoint and region come from the libraries' own chains (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, a node's role,
`GOOGLE_APPLICATION_CREDENTIALS`, `FSSPEC_S3_...`), never from a file or an argument of ours.

`SIMMERGE_STORE_PATIENCE`: seconds for which a store may be away (default 180).
"""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec
import tenacity

from simmerge_ray.base.errors import AccessError, ConfigError, InputError, StorageError, unknown_name
from simmerge_ray.base.extras import require

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
_REFUSED = (401, 403)
_FINAL = (FileNotFoundError, FileExistsError, StorageError, InputError)  # raised as they are
_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs"}
_REMEDIES = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_PROFILE or the node's role, and AWS_ENDPOINT_URL for a store of your own",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS or the node's service account",
}

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class IncompleteUploadError(Exception):
    """What was written is not what the store has."""


def filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme; it remembers no listings, since other processes write.

    Raises InputError: no such scheme, or its library is not installed.
    """
    if scheme in _LIBRARIES:
        require(_LIBRARIES[scheme], "cloud")
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
        raise InputError(f"{scheme}:// needs a library: {error}") from None
    except ValueError:
        raise InputError(unknown_name("scheme of a URI", scheme, ("file", *_LIBRARIES))) from None
    if scheme == "s3":
        made.retries = 2
    return made


def patience_s() -> float:
    """For how many seconds a store may be away. Raises ConfigError: the variable is no number."""
    return number_in_environment(PATIENCE_VARIABLE, _DEFAULT_PATIENCE_S, "seconds")


def retried(uri: str, action: str, call: Callable[[], Result]) -> Result:
    """The result of `call`, tried again with growing pauses while the store does not answer.

    Args:
        action: for messages, as in "cannot read s3://...".

    Raises:
        FileNotFoundError, FileExistsError: as the store says, at once.
        AccessError: the store refuses the credentials, or there are none.
        StorageError: it refuses for another reason, or did not answer for `SIMMERGE_STORE_PATIENCE` seconds.
    """
    patience = patience_s()

    def warn(state: tenacity.RetryCallState) -> None:
        left = patience - (state.seconds_since_start or 0.0)
        error = state.outcome.exception() if state.outcome else None
        _log.warning("cannot %s %s now (%s); trying for %.0f s more", action, uri, error and error_text(error), left)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=_pause,
        stop=tenacity.stop_before_delay(patience),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(call)
    except _FINAL:
        raise
    except Exception as error:  # libraries of stores raise errors of their own
        problem = f"cannot {action} {uri}: {error_text(error)}"
        if _is_refusal(error):
            remedy = _REMEDIES.get(uri.split("://")[0], "check the credentials")
            raise AccessError(f"{problem}; {remedy}") from None
        if is_transient(error):
            waited = retrying.statistics["delay_since_first_attempt"]
            problem += f"; tried for {waited:.0f} s ({PATIENCE_VARIABLE} sets it)"
        raise StorageError(problem) from error


def _pause(state: tenacity.RetryCallState) -> float:
    """Twice as long each time, and by chance a little less: many workers should not come back in one moment."""
    longest = min(_FIRST_DELAY_S * 2.0 ** (state.attempt_number - 1), _MAX_DELAY_S)
    return longest * random.uniform(0.7, 1.0)


def _may_pass(error: BaseException) -> bool:
    is_offline = type(error).__name__ == "OfflineModeIsEnabled"  # of the hub: a connection error that stays
    return not isinstance(error, _FINAL) and not is_offline and not _is_refusal(error) and is_transient(error)


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


def error_text(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def number_in_environment(variable: str, default: float, unit: str) -> float:
    """A number, 0 or more, that an environment variable may set. Raises ConfigError: it sets something else."""
    text = os.environ.get(variable)
    try:
        number = default if text is None else float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise ConfigError(f"{variable} is {text!r}; expected a number of {unit}")
    return number
