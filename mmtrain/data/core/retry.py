"""Retries of network requests: which failures are temporary, how long to wait, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mmtrain.errors import UserError
from mmtrain.log import logger

Result = TypeVar("Result")

ATTEMPTS = 4
#: Longest pause between two requests, in seconds, even if the server requests a longer one.
_LONGEST = 120.0


class Unreachable(UserError):
    """The file at a URL cannot be fetched."""


class Absent(Unreachable):
    """The file at a URL does not exist."""


def is_temporary(status: int) -> bool:
    """Return whether the HTTP status code is a temporary failure, so that a retry may succeed."""
    return status in (408, 425, 429) or status >= 500


def requested_pause(retry_after: str | None) -> float:
    """Return the seconds to wait according to a ``Retry-After`` header (a number or a date); 0 if absent or invalid."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return 0.0 if not retry_after else float(Retry().parse_retry_after(retry_after))
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def pause_after(failures: int, first: float, requested: float = 0.0) -> float:
    """Return the seconds to wait before the next request, at most ``_LONGEST``.

    Args:
        failures: failed requests so far.
        first: pause after the first failure. It doubles with each further failure.
        requested: pause that the server requested; used if it is longer.
    """
    return min(max(first * 2 ** (failures - 1), requested), _LONGEST)


def persistently(address: str, action: Callable[[], Result], first: float) -> Result:
    """Return the result of ``action``, which uses fsspec. Temporary failures are retried, ``ATTEMPTS`` times in total.

    Args:
        address: URL for the messages.
        first: seconds to wait after the first failure.

    Raises:
        Absent: if the file does not exist.
        Unreachable: if the file cannot be fetched.
        UserError: from ``action``; it is not retried.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each storage library has its own exceptions
            wait = _pause_for(address, error)
            if attempt == ATTEMPTS:
                raise Unreachable(
                    f"{address}: could not be fetched in {ATTEMPTS} attempts ({reason(error)}). If the file was "
                    "replaced, index it again with `mmtrain data index`"
                ) from error
            wait = pause_after(attempt, first, wait)
            logger.debug("%s: attempt %d failed: %s; retrying in %g s", address, attempt, reason(error), wait)
            time.sleep(wait)
    raise AssertionError


def _pause_for(address: str, error: Exception) -> float:
    """Return the seconds that the server requested to wait. Raise Absent or Unreachable for a permanent failure.

    fsspec raises FileNotFoundError for every failed HTTP request. The cause of that exception has the details.
    """
    cause = list(_causes(error))[-1]
    status = getattr(cause, "status", None)  # set by aiohttp
    name = type(cause).__name__
    if name == "TooManyRedirects":
        raise Unreachable(f"{address}: too many redirects. Check the URL") from error
    if "Certificate" in name or "SSL" in name:
        raise Unreachable(
            f"{address}: the server's certificate was not accepted ({reason(cause)}). If a proxy uses its own "
            "certificate, set the environment variable SSL_CERT_FILE to it"
        ) from error
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        raise Absent(f"{address}: there is no such file") from error
    if isinstance(cause, PermissionError):
        raise Unreachable(f"{address}: permission denied ({reason(cause)})") from error
    if isinstance(status, int) and status and not is_temporary(status):
        raise Unreachable(f"{address}: the server answered {status} {getattr(cause, 'message', '')}") from error
    if isinstance(cause, ValueError) and not isinstance(cause, OSError):  # an invalid URL
        raise Unreachable(f"{address}: cannot be read ({reason(cause)})") from error
    headers = getattr(cause, "headers", None) or {}
    return requested_pause(headers.get("Retry-After"))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and, while it is a FileNotFoundError, the exception that caused it."""
    yield error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        yield from _causes(error.__cause__)


def reason(error: BaseException) -> str:
    """Return a one-line description of an exception raised by a storage library."""
    last = list(_causes(error))[-1]
    status = getattr(last, "status", None)
    if isinstance(status, int) and status:
        return f"the server answered {status} {getattr(last, 'message', '')}".strip()
    return " ".join(f"{type(last).__name__}: {last}".split())[:200]
