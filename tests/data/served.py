"""A server on loopback that misbehaves in the ways a download has to survive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """What is served and how. ``asked`` and ``conditions``: Range and If-Range of each request ("" without)."""

    def __init__(self) -> None:
        self.content = b""
        self.etag = '"one"'
        self.asked: list[str] = []
        self.conditions: list[str] = []
        self.ranges = True
        #: Called with (handler, number of the request) before the answer; True: it has answered itself.
        self.trick: Callable[[Any, int], bool] = lambda handler, number: False
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        served: Server = self.server.served
        served.asked.append(self.headers.get("Range", ""))
        served.conditions.append(self.headers.get("If-Range", ""))
        self.close_connection = True
        if served.trick(self, len(served.asked)):
            return
        start = 0
        if served.ranges and "Range" in self.headers and self.headers.get("If-Range") in (None, served.etag):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(served.content):
            self.answer(416, b"")
            return
        extra = {"ETag": served.etag}
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(served.content) - 1}/{len(served.content)}"
        self.answer(206 if start else 200, served.content[start:], extra)

    def answer(
        self,
        code: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
        pause: float = 0,
        step: int = 1,
    ) -> None:
        """``length``: the one announced; ``pause``: seconds between two pieces of ``step`` bytes."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")  # as it does, or a client may ask again on a connection that is gone
        self.end_headers()
        try:
            if not pause:
                self.wfile.write(body)
            for place in range(0, len(body) if pause else 0, step):
                self.wfile.write(body[place : place + step])
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass  # the client gave up, as it should

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving() -> Iterator[Server]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    served = Server()
    server.served = served  # type: ignore[attr-defined]
    served.url = f"http://127.0.0.1:{server.server_address[1]}/t.csv"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
