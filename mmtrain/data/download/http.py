"""Downloading one file over HTTP, with retries and resumption.

The received data is in ``TARGET``, and ``TARGET.json`` stores the URL, the ETag and the length. A download is resumed
only if the server confirms that its file still has the same ETag. Otherwise it starts again from the first byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urljoin, urlsplit

from mmtrain.data.core.retry import is_temporary, pause_after, requested_pause
from mmtrain.errors import UserError
from mmtrain.files import write_atomically
from mmtrain.log import logger
from mmtrain.version import __version__

if TYPE_CHECKING:
    import requests

_REDIRECTS = 5
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Patience:
    """Timeouts and retries of a download. Times are in seconds."""

    connect: float = 10.0  # timeout of a connection
    stall: float = 30.0  # timeout between two pieces of data
    attempts: int = 4  # maximum number of consecutive failures
    backoff: float = 1.0  # pause before the second attempt; it doubles for each further attempt
    slowest: float = 512.0  # bytes/s, averaged over 2 * stall; slower downloads count as stalled
    progress: int = 1 << 20  # bytes of new data after which earlier failures are not counted


@dataclass(frozen=True)
class _State:
    """The content of ``TARGET.json``."""

    url: str
    etag: str
    length: int | None


class _Again(Exception):
    """A temporary failure. ``wait``: seconds that the server requested to wait."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def download(
    url: str,
    target: Path,
    *,
    limit: int,
    patience: Patience | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Download ``url`` to the file ``target``. Proxies are taken from the environment.

    After an error, the received data is kept for the next call, unless it is unusable.

    Args:
        limit: maximum size of the file, in bytes.
        patience: timeouts and retries.
        progress: callback ``progress(bytes received, total bytes or None)``.

    Raises:
        UserError: if the download fails. The message names the URL and the reason.
    """
    import requests

    patience = patience or Patience()
    failures, best = 0, _size(target)
    with requests.Session() as session:
        session.headers.update({"User-Agent": f"mmtrain/{__version__}", "Accept-Encoding": "identity"})
        attempt = _Attempt(session, url, target, limit, patience, progress or (lambda done, length: None))
        while True:
            try:
                attempt.run()
                return
            except _Again as fault:
                # Progress counts from the largest size so far, so a server that always stops at the same byte fails.
                failures = 1 if _size(target) >= best + patience.progress else failures + 1
                best = max(best, _size(target))
                if failures >= patience.attempts:
                    raise UserError(f"{url}: {fault} (tried {failures} times)") from fault
                wait = pause_after(failures, patience.backoff, fault.wait)
                logger.info("%s: %s; retrying in %g s", url, fault, wait)
                time.sleep(wait)
            except OSError as error:  # an error of the disk: network errors are raised as _Again
                raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def discard(target: Path) -> None:
    """Remove the received data of a download to ``target``."""
    for file in (target, _state_file(target)):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Attempt:
    """One attempt of a download, which resumes from the received data."""

    session: requests.Session
    url: str
    target: Path
    limit: int
    patience: Patience
    progress: Callable[[int, int | None], None]

    def run(self) -> None:
        state = _known(self.url, self.target)
        offset = _size(self.target) if state else 0
        if state and state.length is not None and offset == state.length:
            return  # the file is complete already; the caller checks its content
        headers = {"Range": f"bytes={offset}-", "If-Range": state.etag} if state and offset else {}
        with contextlib.closing(self.request(headers)) as response:
            length = self.judge(response, state, offset)
            if response.status_code == 200:
                offset = 0
            total = None if length is None else offset + length
            if total is not None and total > self.limit:
                discard(self.target)
                raise UserError(f"{self.url}: the server announces {total} bytes, more than the limit of {self.limit}")
            if offset == 0:
                etag = response.headers.get("ETag", "")
                state = _State(self.url, "" if etag.startswith("W/") else etag, total)
                self.target.unlink(missing_ok=True)  # old data must never exist together with the new state
                write_atomically(_state_file(self.target), json.dumps(asdict(state)) + "\n")
            with open(self.target, "ab" if offset else "wb") as stream:
                try:
                    self.receive(response, stream, offset, total)
                finally:
                    stream.flush()
                    os.fsync(stream.fileno())
                    if _size(self.target) > self.limit:
                        discard(self.target)

    def request(self, headers: dict[str, str]) -> requests.Response:
        """Return the response after redirects. Redirects must lead to http or https, and from https only to https."""
        import requests

        here = self.url
        for _ in range(_REDIRECTS + 1):
            _check_scheme(self.url, here)
            self.session.close()  # use a new connection for each request: the server may have closed the old one
            try:
                response = self.session.get(
                    here,
                    headers=headers,
                    stream=True,
                    allow_redirects=False,
                    timeout=(self.patience.connect, self.patience.stall),
                )
            except requests.exceptions.SSLError as error:
                raise UserError(
                    f"{here}: the server's certificate was not accepted ({_why(error)}). If a proxy uses its own "
                    "certificate, set the environment variable REQUESTS_CA_BUNDLE to it"
                ) from error
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidProxyURL) as error:
                raise UserError(f"{here}: {_why(error)}") from error
            except requests.RequestException as error:
                raise _Again(f"cannot be reached ({_why(error)})") from error
            if not response.is_redirect:
                return response
            response.close()
            here = urljoin(here, response.headers["Location"])
        raise UserError(f"{self.url}: redirected more than {_REDIRECTS} times, most recently to {here}")

    def judge(self, response: requests.Response, state: _State | None, offset: int) -> int | None:
        """Check the status and the headers of a response. Return the length of its body in bytes (None: unknown).

        Raises:
            _Again: for a temporary failure.
            UserError: for a permanent failure.
        """
        code, headers = response.status_code, response.headers
        if is_temporary(code):
            raise _Again(f"the server answered {code} {response.reason}", requested_pause(headers.get("Retry-After")))
        if code == 416 and offset:
            discard(self.target)
            raise _Again("the server's file has changed")
        if code not in (200, 206) or (code == 206 and not offset):
            raise UserError(f"{self.url}: the server answered {code} {response.reason}")
        if headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise UserError(
                f"{self.url}: was sent with the encoding {headers['Content-Encoding']}, which was not requested. Check "
                "the proxy"
            )
        announced = re.fullmatch(r"[0-9]{1,18}", headers.get("Content-Length", ""))
        length = None if announced is None else int(announced[0])
        if code == 200 or state is None:
            return length
        span = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", headers.get("Content-Range", ""))
        total = None if span is None or span[2] == "*" else int(span[2])
        if (
            span is None
            or int(span[1]) != offset
            or headers.get("ETag", state.etag) != state.etag
            or (None not in (total, state.length) and total != state.length)
        ):
            discard(self.target)
            raise _Again("the server's file has changed, or it sent a different range than requested")
        return total - offset if total is not None else length

    def receive(self, response: requests.Response, stream: BinaryIO, offset: int, total: int | None) -> None:
        """Write the body of a response to ``stream``. Raises _Again if it is interrupted, UserError if too long."""
        from urllib3.exceptions import HTTPError

        done, mark, since = offset, offset, time.monotonic()
        while True:
            try:
                piece = response.raw.read1(_CHUNK)  # not read(), which would wait for a full chunk
            except (HTTPError, OSError) as error:
                raise _Again(f"was interrupted after {done} bytes ({_why(error)})") from error
            if not piece:
                break
            stream.write(piece)
            done += len(piece)
            self.progress(done, total)
            if done > self.limit:
                raise UserError(f"{response.url}: the server sends more than the limit of {self.limit} bytes")
            now = time.monotonic()
            if now - since > 2 * self.patience.stall:
                if done - mark < self.patience.slowest * (now - since):
                    raise _Again(f"stalled after {done} bytes")
                mark, since = done, now
        if total is not None and done != total:
            raise _Again(f"ended after {done} of {total} bytes")


def _check_scheme(url: str, here: str) -> None:
    scheme = urlsplit(here).scheme
    if scheme not in ("http", "https"):
        raise UserError(f"{url}: redirects to {here}, but only http and https are allowed")
    if urlsplit(url).scheme == "https" and scheme != "https":
        raise UserError(f"{url}: redirects from https to {here}, which is not encrypted. Such redirects are rejected")


def _known(url: str, target: Path) -> _State | None:
    """Return the state of an earlier download if it can be resumed, else None."""
    try:
        state = _State(**json.loads(_state_file(target).read_text(encoding="utf-8")))
        size = _size(target)
    except (OSError, ValueError, TypeError):
        return None
    fits = state.url == url and bool(state.etag) and target.is_file() and (state.length is None or size <= state.length)
    return state if fits else None


def _state_file(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _size(target: Path) -> int:
    try:
        return target.stat().st_size
    except OSError:
        return 0


def _why(error: BaseException) -> str:
    """Return the innermost reason of an exception in one line, without object addresses."""
    reason = error
    while True:
        parts = (getattr(reason, "reason", None), *reason.args)
        deeper = next((part for part in parts if isinstance(part, BaseException)), None)
        if deeper is None:
            break
        reason = deeper
    text = str(getattr(reason, "strerror", None) or reason)
    text = re.sub(r"^.*object at 0x\w+>: |^\w+\(.*?\): ", "", text)  # urllib3's messages begin with the connection
    return " ".join(text.split())[:200] or type(reason).__name__
