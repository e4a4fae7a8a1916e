"""Decoding of batches from a beton: a compiled decoder, and the memory through which the file is read.

FFCV provides the library that decodes and resizes images, and the process cache that reads pages ahead. FFCV's Loader
is not used: it has no random keys and no endless stream, waits forever if its thread fails, returns memory that it
overwrites later, and changes array types that numba shares, so that a second Loader may compile without end.

The decoder decodes, crops, flips and normalises one sample at a time. It differs from FFCV's own transforms:
- random numbers are hashed from the sample's random key (``order.mix64``), not drawn from a thread's NumPy generator;
- all four steps run while the image is in the CPU cache, and the result has the layout (C, H, W);
- an image that cannot be decoded is reported, whereas FFCV returns the previous content of the memory.

Resizing is FFCV's (OpenCV's area interpolation; linear if the image is enlarged), so it differs from the bicubic
interpolation for tar shards. FFCV's JPEG decoder uses the fast inverse DCT, whose result differs by a few grey levels
from Pillow's. Evaluation otherwise has timm's geometry: shorter side to S / crop_pct, then the centre S × S.
"""

from __future__ import annotations

import atexit
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numba
import numpy as np
from ffcv.libffcv import imdecode, resize_crop
from ffcv.memory_managers import ProcessCacheManager
from ffcv.reader import Reader
from numpy.typing import NDArray

from mmtrain.data.ffcv.augment import Recipe
from mmtrain.data.ffcv.format import JPG, Beton
from mmtrain.data.images.photo import FLIP_DRAW, RATIO, SCALE, TRIES, Keys
from mmtrain.errors import UserError, os_errors
from mmtrain.log import logger

#: Sample indices and their random keys (None in evaluation).
Request = tuple[NDArray[np.int64], Keys | None]

# No fastmath: otherwise two builds may round differently, and a crop may move by a pixel.
_options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_compiled = numba.njit(**_options)
_decode_jpg = _compiled(imdecode)
_resize = _compiled(resize_crop)
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_LOG_LOW, _LOG_HIGH = math.log(RATIO[0]), math.log(RATIO[1])

#: Lock for parallel code: numba's fallback threading layer ends the process if two threads run parallel code at once.
_one_kernel = threading.Lock()
#: Compiled decoders, shared in the process because compiling takes seconds.
_decoders: dict[tuple[Any, ...], Callable[..., None]] = {}


class Engine:
    """Decodes batches from a beton. The result does not depend on ``threads`` and ``os_cache``.

    Args:
        beton: the file.
        recipe: the compiled transform.
        threads: threads that decode.
        os_cache: True: map the file, and let the operating system cache it. False: read the pages of the requests that
            are ``opened`` together ahead of their use, and drop each page after its last use.
    """

    def __init__(self, beton: Beton, recipe: Recipe, threads: int, os_cache: bool) -> None:
        self.beton, self.recipe, self.os_cache = beton, recipe, os_cache
        limit = int(vars(numba.config)["NUMBA_NUM_THREADS"])
        if threads > limit:
            logger.warning(
                "data.workers=%d: numba is limited to %d threads; set the environment variable NUMBA_NUM_THREADS=%d to "
                "use all of them",
                threads,
                limit,
                threads,
            )
        self.threads = max(1, min(threads, limit))
        table = None if recipe.table is None else recipe.table.tobytes()
        key = (recipe.size, recipe.random, recipe.crop_pct, recipe.hflip, table, os_cache, self.threads > 1)
        if key not in _decoders:
            _decoders[key] = compile_decoder(recipe, os_cache, self.threads > 1)
        self._decode = _decoders[key]
        self._pages = None if os_cache else ProcessCacheManager(Reader(str(beton.path)))

    @contextmanager
    def opened(self, requests: Sequence[Request]) -> Iterator[Callable[[int], Any]]:
        """Open the file for ``requests``.

        The context is a function ``state(number)`` that returns the memory from which request ``number`` is decoded.
        With ``os_cache``, ``requests`` may be empty, and the memory is the same for all requests.

        Raises:
            UserError: if the file cannot be read, or has changed.
        """
        with os_errors(f"{self.beton.path}: can no longer be read"):
            if self.beton.path.stat().st_size != self.beton.file_size:
                raise UserError(f"{self.beton.path}: the file changed after the run started. Start the run again")
            mapped = np.memmap(self.beton.path, np.uint8, mode="r") if self.os_cache else None
        if mapped is not None:
            plain = np.asarray(mapped)
            yield lambda number: plain
            return
        assert self._pages is not None
        context = self._pages.schedule_epoch([indices for indices, _ in requests])
        shift = self.beton.page_size.bit_length() - 1

        def state(number: int) -> Any:
            context.start_batch(number)
            return context.memory, context.page_to_slot, shift

        context.__enter__()
        try:
            yield state
        finally:
            context.__exit__(None, None, None)
            for reader in context.executor.threads:
                reader.join()

    def run(self, state: Any, request: Request, images: NDArray[Any]) -> None:
        """Decode the images of ``request`` into ``images`` (``recipe.shape``, ``recipe.dtype``).

        Args:
            state: memory from ``opened``.

        Raises:
            UserError: if an image cannot be decoded.
        """
        indices, keys = request
        faults = np.zeros(len(indices), dtype=np.uint8)
        # With one thread, no lock is used: a worker process may have been forked while another thread held it.
        with _one_kernel if self.threads > 1 else nullcontext():
            if self.threads > 1:
                numba.set_num_threads(self.threads)
            keys = np.zeros(len(indices), dtype=np.uint64) if keys is None else keys
            self._decode(indices, keys, images, faults, self.beton.rows, state)
        if faults.any():
            bad = int(indices[int(np.argmax(faults))])
            raise UserError(
                f"{self.beton.path}: image number {bad} cannot be decoded, so the file is damaged. Copy it again, or "
                "create it again with `mmtrain data prepare ffcv --force`"
            )


_END = object()


class Stream:
    """Iterator that decodes requests in a background thread and yields ``finish(request, about, images)`` for each.

    Exceptions of the thread are raised by ``next``. ``close`` (or the end of the process) stops the thread.

    Args:
        engine: decoder.
        requests: pairs of a request and any object ``about``, which is passed to ``finish``.
        take: function that allocates the images of a batch of the given size.
        finish: function that converts decoded images to the item to yield.
        ahead: number of batches that are decoded in advance.
        segment: number of requests whose pages are read together, if the engine has no ``os_cache``.
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
        # A daemon thread, because at exit the interpreter waits for other threads before it runs atexit functions.
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
        """Stop the thread and wait for it, at most until it has decoded its current batch."""
        self._stop.set()
        self._thread.join()
        atexit.unregister(self.close)

    def _work(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(_END)
        except BaseException as error:  # passed to the thread that waits in ``next``
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


def compile_decoder(recipe: Recipe, mapped: bool, parallel: bool) -> Callable[..., None]:
    """Return the function ``decode(indices, keys, images, faults, rows, state)``, which is compiled at its first call.

    Its arguments are: ``indices`` int64 (B,); ``keys`` uint64 (B,); ``images``, the output, ``recipe.shape(B)``;
    ``faults``, an output uint8 (B,), 1 for an image that cannot be decoded; ``rows`` of ``format.Beton``; and
    ``state``: the bytes of the file if ``mapped``, otherwise pages (slots, page size), the slot of each page, and log2
    of the page size.
    """
    read, cropped, finish = _read_mapped if mapped else _read_paged, _cropped(recipe), _finisher(recipe)

    @numba.njit(**_options, parallel=parallel)
    def decode(indices, keys, images, faults, rows, state):  # type: ignore[no-untyped-def]
        modes, heights, widths, places, sizes = rows
        for slot in numba.prange(len(indices)):
            sample = indices[slot]
            height, width = heights[sample], widths[sample]
            content = read(state, places[sample], sizes[sample])
            faults[slot] = 1
            # The calls are duplicated, because a read-only array of the mapped file has a different type in numba.
            if modes[sample] == JPG:
                image = np.empty((height, width, 3), np.uint8)
                if _decode_jpg(content, image, height, width, height, width, 0, 0, 1, 1, False, False) == 0:
                    finish(cropped(image, height, width, keys[slot]), keys[slot], images[slot])
                    faults[slot] = 0
            elif content.size == height * width * 3:
                stored = content.reshape(height, width, 3)
                finish(cropped(stored, height, width, keys[slot]), keys[slot], images[slot])
                faults[slot] = 0

    return decode


@_compiled
def _read_mapped(state, place, size):  # type: ignore[no-untyped-def]
    return state[place : place + size]


@_compiled
def _read_paged(state, place, size):  # type: ignore[no-untyped-def]
    pages, slots, shift = state
    page = place >> shift
    begin = place - (page << shift)
    return pages[np.int64(slots[page]), begin : begin + size]


def _cropped(recipe: Recipe) -> Callable[..., Any]:
    """Return the function (image, height, width, key) → uint8 (S, S, 3) that crops and resizes an image."""
    size = recipe.size
    shorter = math.floor(size / recipe.crop_pct)

    @_compiled
    def at_random(image, height, width, key):  # type: ignore[no-untyped-def]
        top, left, high, wide = crop_box(key, height, width)
        patch = np.empty((size, size, 3), np.uint8)
        _resize(image, top, top + high, left, left + wide, patch)
        return patch

    @_compiled
    def centre(image, height, width, key):  # type: ignore[no-untyped-def]
        patch = np.empty((size, size, 3), np.uint8)
        if height == size and width == size:
            patch[:] = image
            return patch
        if height <= width:
            high, wide = shorter, shorter * width // height
        else:
            high, wide = shorter * height // width, shorter
        whole = np.empty((high, wide, 3), np.uint8)
        _resize(image, 0, height, 0, width, whole)
        top, left = np.int64(np.round((high - size) / 2)), np.int64(np.round((wide - size) / 2))
        patch[:] = whole[top : top + size, left : left + size]
        return patch

    return at_random if recipe.random else centre


def _finisher(recipe: Recipe) -> Callable[..., Any]:
    """Return the function (patch uint8 (S, S, 3), key, target) that writes a flipped and normalised image to target."""
    size, hflip = recipe.size, recipe.hflip if recipe.random else 0.0

    if recipe.table is None:

        @_compiled
        def keep(patch, key, target):  # type: ignore[no-untyped-def]
            if flipped(key, hflip):
                target[:] = patch[:, ::-1]
            else:
                target[:] = patch

        return keep

    red, green, blue = (np.ascontiguousarray(values) for values in recipe.table)

    @_compiled
    def look_up(patch, key, target):  # type: ignore[no-untyped-def]
        mirror = flipped(key, hflip)
        for y in range(size):
            for x in range(size):
                at = size - 1 - x if mirror else x
                target[0, y, x] = red[patch[y, at, 0]]
                target[1, y, x] = green[patch[y, at, 1]]
                target[2, y, x] = blue[patch[y, at, 2]]

    return look_up


@_compiled
def mixed(state, value):  # type: ignore[no-untyped-def]  # numba infers: uint64, uint64 -> uint64
    """Return the state of ``order.mix64`` after one step."""
    state = (state ^ value) + _GOLDEN
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)


@_compiled
def draw(key, number):  # type: ignore[no-untyped-def]  # uint64, int -> float64
    """Return draw ``number`` of a random key, uniform in [0, 1), as ``photo.uniform`` does."""
    return np.float64(mixed(mixed(np.uint64(0), key), np.uint64(number)) >> _11) * 2.0**-53


@_compiled
def crop_box(key, height, width):  # type: ignore[no-untyped-def]  # uint64, int64, int64 -> four int64
    """Return top, left, height and width of the random resized crop of an image, in pixels."""
    area = np.float64(height) * np.float64(width)
    for attempt in range(TRIES):
        target = area * (SCALE[0] + (SCALE[1] - SCALE[0]) * draw(key, 4 * attempt))
        ratio = math.exp(_LOG_LOW + (_LOG_HIGH - _LOG_LOW) * draw(key, 4 * attempt + 1))
        wide = np.int64(math.floor(math.sqrt(target * ratio) + 0.5))
        high = np.int64(math.floor(math.sqrt(target / ratio) + 0.5))
        if 0 < wide <= width and 0 < high <= height:
            top = np.int64(draw(key, 4 * attempt + 2) * (height - high + 1))
            left = np.int64(draw(key, 4 * attempt + 3) * (width - wide + 1))
            return top, left, high, wide
    wide, high = width, height
    if width < RATIO[0] * height:
        high = min(height, max(np.int64(1), np.int64(math.floor(width / RATIO[0] + 0.5))))
    elif width > RATIO[1] * height:
        wide = min(width, max(np.int64(1), np.int64(math.floor(height * RATIO[1] + 0.5))))
    return (height - high) // 2, (width - wide) // 2, high, wide


@_compiled
def flipped(key, probability):  # type: ignore[no-untyped-def]  # uint64, float64 -> bool
    """Return whether a sample is mirrored."""
    return draw(key, FLIP_DRAW) < probability
