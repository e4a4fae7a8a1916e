"""A thread that keeps batches ready: numba leaves Python's lock alone while it decodes, so nothing need be forked."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from mmtrain.data.beton.engine import Engine, Request

_END = object()


class Stream:
    """Iterator over what ``finish(request, about, images)`` makes of each request, ``ahead`` of them in advance.

    ``segment``: requests whose pages are read together where the engine has no ``os_cache``. What fails in the thread
    is raised by ``next``. ``close`` (or the end of the process) stops the thread, whatever it is doing.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Iterator[tuple[Request, Any]],
        take: Callable[[int], Any],
        finish: Callable[[Request, Any, Any], Any],
        *,
        ahead: int,
        segment: int,
    ) -> None:
        self._engine, self._requests, self._take, self._finish = engine, requests, take, finish
        self._segment = segment
        self._ready: queue.Queue[Any] = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        # daemon: the interpreter waits for other threads before it calls what atexit knows
        self._thread = threading.Thread(target=self._work, name="ffcv", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if item is _END:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it: at most for the batch it is at."""
        self._stop.set()
        self._thread.join()
        atexit.unregister(self.close)

    def _work(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(_END)
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self) -> Iterator[Any]:
        if self._engine.os_cache:
            with self._engine.opened([]) as state:
                for request, about in self._requests:
                    yield self._one(state(0), request, about)
            return
        while segment := list(islice(self._requests, self._segment)):
            with self._engine.opened([request for request, _ in segment]) as state:
                for number, (request, about) in enumerate(segment):
                    yield self._one(state(number), request, about)

    def _one(self, state: Any, request: Request, about: Any) -> Any:
        images = self._take(len(request[0]))
        self._engine.run(state, request, images)
        return self._finish(request, about, images)
