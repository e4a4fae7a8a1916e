"""Fetching one file over HTTP: resumed after an interruption, patient for a while, never for ever.

What has arrived lies in ``TARGET`` with ``TARGET.json`` beside it (address, ETag, length). It is continued only if the
server says that its file is still the one with that ETag; otherwise it starts from the first byte.
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

from mmtrain.data.core.retry import asked_pause, passes, pause_after
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
    """Seconds to wait for a connection and between two pieces; ``attempts`` without progress before giving up."""

    connect: float = 10.0
    stall: float = 30.0
    attempts: int = 4
    backoff: float = 1.0  # before the second attempt; doubled for each further one
    slowest: float = 512.0  # bytes/s over two stalls: what is slower counts as stalled
    progress: int = 1 << 20  # bytes after which earlier failures are forgotten


@dataclass(frozen=True)
class _State:
    url: str
    etag: str
    length: int | None


class _Again(Exception):
    """A fault that may pass. ``wait``: seconds the server asked for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def download(
    url: str,
    target: Path,
    *,
    limit: int,
    patience: Patience | None = None,
    told: Callable[[int, int | None], None] | None = None,
) -> None:
    """Fetch ``url`` into ``target``, at most ``limit`` bytes.

    ``told(bytes, length)`` hears how far it is. On an error what has arrived stays for the next call, unless it cannot
    be used. Raises UserError naming the address and what happened. Proxies are taken from the environment.
    """
    import requests

    patience = patience or Patience()
    failures, best = 0, _size(target)
    with requests.Session() as session:
        session.headers.update({"User-Agent": f"mmtrain/{__version__}", "Accept-Encoding": "identity"})
        attempt = _Attempt(session, url, target, limit, patience, told or (lambda done, length: None))
        while True:
            try:
                attempt.run()
                return
            except _Again as fault:
                # Measured from the furthest point ever: a server that breaks off at the same byte is not waited for.
                failures = 1 if _size(target) >= best + patience.progress else failures + 1
                best = max(best, _size(target))
                if failures >= patience.attempts:
                    raise UserError(f"{url}: {fault} (tried {failures} times)") from fault
                wait = pause_after(failures, patience.backoff, fault.wait)
                logger.info("%s: %s; trying again in %g s", url, fault, wait)
                time.sleep(wait)
            except OSError as error:  # what the network does has become _Again: this is the disk
                raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def discard(target: Path) -> None:
    """Remove what was fetched for ``target``."""
    for file in (target, _beside(target)):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Attempt:
    """One request, which continues what has arrived so far."""

    session: requests.Session
    url: str
    target: Path
    limit: int
    patience: Patience
    told: Callable[[int, int | None], None]

    def run(self) -> None:
        state = _known(self.url, self.target)
        offset = _size(self.target) if state else 0
        if state and state.length is not None and offset == state.length:
            return  # it was complete before the process ended; the caller checks the content
        headers = {"Range": f"bytes={offset}-", "If-Range": state.etag} if state and offset else {}
        with contextlib.closing(self.request(headers)) as response:
            length = self.judge(response, state, offset)
            if response.status_code == 200:
                offset = 0
            total = None if length is None else offset + length
            if total is not None and total > self.limit:
                discard(self.target)
                raise UserError(f"{self.url}: {total} bytes are announced, and no more than {self.limit} can be right")
            if offset == 0:
                etag = response.headers.get("ETag", "")
                state = _State(self.url, "" if etag.startswith("W/") else etag, total)
                self.target.unlink(missing_ok=True)  # the old bytes must never stand beside the new state
                write_atomically(_beside(self.target), json.dumps(asdict(state)) + "\n")
            with open(self.target, "ab" if offset else "wb") as stream:
                try:
                    self.receive(response, stream, offset, total)
                finally:
                    stream.flush()
                    os.fsync(stream.fileno())
                    if _size(self.target) > self.limit:
                        discard(self.target)

    def request(self, headers: dict[str, str]) -> requests.Response:
        """The response after redirects, which lead to http(s) only, and from https to https only."""
        import requests

        here = self.url
        for _ in range(_REDIRECTS + 1):
            _check_scheme(self.url, here)
            self.session.close()  # a connection that was kept may be gone by now: each request has its own
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
                    f"{here}: the server's certificate was not accepted ({_why(error)}); behind a proxy with a "
                    "certificate of its own set REQUESTS_CA_BUNDLE"
                ) from error
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidProxyURL) as error:
                raise UserError(f"{here}: {_why(error)}") from error
            except requests.RequestException as error:
                raise _Again(f"cannot be reached ({_why(error)})") from error
            if not response.is_redirect:
                return response
            response.close()
            here = urljoin(here, response.headers["Location"])
        raise UserError(f"{self.url}: redirected more than {_REDIRECTS} times, the last time to {here}")

    def judge(self, response: requests.Response, state: _State | None, offset: int) -> int | None:
        """Bytes that the body will have (None: not said), if this is the answer that was wanted."""
        code, headers = response.status_code, response.headers
        if passes(code):
            raise _Again(f"the server answered {code} {response.reason}", asked_pause(headers.get("Retry-After")))
        if code == 416 and offset:
            discard(self.target)
            raise _Again("the server's file has changed")
        if code not in (200, 206) or (code == 206 and not offset):
            raise UserError(f"{self.url}: the server answered {code} {response.reason}")
        if headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise UserError(
                f"{self.url}: sent as {headers['Content-Encoding']} although asked for as it is (by a proxy?)"
            )
        told = re.fullmatch(r"[0-9]{1,18}", headers.get("Content-Length", ""))
        length = None if told is None else int(told[0])
        if code == 200 or state is None:
            return length
        place = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", headers.get("Content-Range", ""))
        total = None if place is None or place[2] == "*" else int(place[2])
        if (
            place is None
            or int(place[1]) != offset
            or headers.get("ETag", state.etag) != state.etag
            or (None not in (total, state.length) and total != state.length)
        ):
            discard(self.target)
            raise _Again("the server's file has changed, or it sent another part than the one asked for")
        return total - offset if total is not None else length

    def receive(self, response: requests.Response, stream: BinaryIO, offset: int, total: int | None) -> None:
        from urllib3.exceptions import HTTPError

        done, mark, since = offset, offset, time.monotonic()
        while True:
            try:
                piece = response.raw.read1(_CHUNK)  # what is there: read() would wait for a full chunk
            except (HTTPError, OSError) as error:
                raise _Again(f"broke off after {done} bytes ({_why(error)})") from error
            if not piece:
                break
            stream.write(piece)
            done += len(piece)
            self.told(done, total)
            if done > self.limit:
                raise UserError(f"{response.url}: sends more than the {self.limit} bytes that can be right")
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
        raise UserError(f"{url}: leads to {here}, and only http and https are followed")
    if urlsplit(url).scheme == "https" and scheme != "https":
        raise UserError(f"{url}: leads to {here}, which is not encrypted: not followed")


def _known(url: str, target: Path) -> _State | None:
    try:
        state = _State(**json.loads(_beside(target).read_text(encoding="utf-8")))
        size = _size(target)
    except (OSError, ValueError, TypeError):
        return None
    fits = state.url == url and bool(state.etag) and target.is_file() and (state.length is None or size <= state.length)
    return state if fits else None


def _beside(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _size(target: Path) -> int:
    try:
        return target.stat().st_size
    except OSError:
        return 0


def _why(error: BaseException) -> str:
    """The innermost reason, in one line without object addresses."""
    reason = error
    while True:
        parts = (getattr(reason, "reason", None), *reason.args)
        deeper = next((part for part in parts if isinstance(part, BaseException)), None)
        if deeper is None:
            break
        reason = deeper
    said = str(getattr(reason, "strerror", None) or reason)
    said = re.sub(r"^.*object at 0x\w+>: |^\w+\(.*?\): ", "", said)  # urllib3 begins with its connection
    return " ".join(said.split())[:200] or type(reason).__name__
