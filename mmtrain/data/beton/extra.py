"""The optional packages, and an error that says how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmtrain.errors import UserError

INSTALL = (
    "install it with: apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config && pip install 'mmtrain[ffcv]' "
    "(or read the same images as tar shards: data.kind=shards)"
)
_PACKAGES = ("ffcv", "numba", "cv2")


def require_ffcv() -> None:
    """Import ffcv, or raise UserError with the commands that install it."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"data.kind=ffcv: {' and '.join(lacking)} cannot be found; {INSTALL}")
    try:
        with torch_threads_kept():
            import ffcv.memory_managers  # noqa: F401
    except (ImportError, OSError) as error:  # its library is compiled: OpenCV or libturbojpeg may be gone
        raise UserError(f"data.kind=ffcv: ffcv does not load ({error}); {INSTALL}") from error


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """ffcv sets torch's number of threads when it is imported and when a loader is made: put it back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
