"""Requests over a network: which failures may pass, how long to wait, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mmtrain.errors import UserError
from mmtrain.log import logger

Result = TypeVar("Result")

ATTEMPTS = 4
#: The longest pause that a server is granted, in seconds.
_LONGEST = 120.0


class Unreachable(UserError):
    """The file at an address cannot be fetched."""


class Absent(Unreachable):
    """There is nothing at an address."""


def passes(status: int) -> bool:
    """Whether another request may be answered better than with this status code of HTTP."""
    return status in (408, 425, 429) or status >= 500


def asked_pause(retry_after: str | None) -> float:
    """Seconds that a ``Retry-After`` header asks for: a number, or a date. 0 without one, or for nonsense."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return 0.0 if not retry_after else float(Retry().parse_retry_after(retry_after))
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def pause_after(failures: int, first: float, asked: float = 0.0) -> float:
    """Seconds before the next request: ``first``, doubled for each further failure, or as long as the server asked."""
    return min(max(first * 2 ** (failures - 1), asked), _LONGEST)


def persistently(address: str, action: Callable[[], Result], first: float) -> Result:
    """What ``action``, which uses fsspec, returns; a failure that may pass is waited for, a few times.

    Raises Absent, Unreachable, and UserErrors of ``action``.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each kind of storage has its own
            wait = _pause_for(address, error)
            if attempt == ATTEMPTS:
                raise Unreachable(
                    f"{address}: could not be fetched in {ATTEMPTS} attempts ({reason(error)}). If the file was "
                    "replaced, index it again: mmtrain data index"
                ) from error
            wait = pause_after(attempt, first, wait)
            logger.debug("%s: attempt %d: %s; trying again in %g s", address, attempt, reason(error), wait)
            time.sleep(wait)
    raise AssertionError


def _pause_for(address: str, error: Exception) -> float:
    """Seconds that the server asked for. Raises Absent or Unreachable for a failure that will not pass.

    fsspec makes a FileNotFoundError of whatever happened to an HTTP request: its cause tells what did.
    """
    cause = list(_causes(error))[-1]
    status = getattr(cause, "status", None)  # of aiohttp's answers
    name = type(cause).__name__
    if name == "TooManyRedirects":
        raise Unreachable(f"{address}: is redirected again and again; check the address") from error
    if "Certificate" in name or "SSL" in name:
        raise Unreachable(
            f"{address}: the server's certificate was not accepted ({reason(cause)}); behind a proxy with a "
            "certificate of its own set SSL_CERT_FILE"
        ) from error
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        raise Absent(f"{address}: there is no such file") from error
    if isinstance(cause, PermissionError):
        raise Unreachable(f"{address}: may not be read ({reason(cause)})") from error
    if isinstance(status, int) and status and not passes(status):
        raise Unreachable(f"{address}: the server answered {status} {getattr(cause, 'message', '')}") from error
    if isinstance(cause, ValueError) and not isinstance(cause, OSError):  # an address that is none
        raise Unreachable(f"{address}: cannot be read ({reason(cause)})") from error
    headers = getattr(cause, "headers", None) or {}
    return asked_pause(headers.get("Retry-After"))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, and what it was raised for where it is a FileNotFoundError of fsspec."""
    yield error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        yield from _causes(error.__cause__)


def reason(error: BaseException) -> str:
    """An error of some library in one line."""
    last = list(_causes(error))[-1]
    status = getattr(last, "status", None)
    if isinstance(status, int) and status:
        return f"the server answered {status} {getattr(last, 'message', '')}".strip()
    return " ".join(f"{type(last).__name__}: {last}".split())[:200]
