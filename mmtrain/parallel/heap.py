"""Memory of the C library that training steps free and ask for again."""

from __future__ import annotations

import ctypes
import sys

# of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = -1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: activations and gradients come again at every step, and fresh pages cost time.

    Without it, what lies at the end of the heap goes back to the system whenever it exceeds 64 MB. Does nothing where
    the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # setting one of the two ends the adaptation of the other, so that both are set, to the largest allowed
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
