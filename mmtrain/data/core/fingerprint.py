"""Fingerprints of training data, which show whether a run resumes with the same samples in the same order.

A fingerprint is a dict of JSON values. It covers indexes, names and digests of numbers, but not the bytes of images.
It contains no path, so moved data has the same fingerprint. A source that knows more than the sizes of its blocks
implements ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.source import Source

Fingerprint = dict[str, Any]

#: Message for each entry that is a digest: it shows that the entry changed, but not how.
_DIGESTS = {
    "classes": "the names or the order of the classes changed",
    "values": "the values of the training rows changed",
    "inputs": "the known covariates of the training rows changed",
    "ids": "the names or the order of the series changed",
    "lengths": "the number of training rows of some series changed",
    "scalers": "the values of the training rows changed",
}
#: Label of each entry whose values can be shown.
_SHOWN = {
    "columns": "columns",
    "known": "known covariates",
    "static": "static columns",
    "series": "number of series",
    "rows": "training rows",
}
_MOST = 8


@runtime_checkable
class Fingerprinted(Protocol):
    """A data source with a fingerprint of its samples, so that a resumed run notices changed data."""

    def fingerprint(self) -> Fingerprint:
        """Return JSON values under the keys of ``_DIGESTS`` and ``_SHOWN``, or "indexes" with a digest per block."""
        ...


def fingerprint_of(source: Source) -> Fingerprint:
    """Return the number of samples in each block ("blocks"), plus the source's own fingerprint if it has one."""
    more = source.fingerprint() if isinstance(source, Fingerprinted) else {}
    return {"blocks": [int(size) for size in source.block_sizes], **more}


def digest(*parts: str | Iterable[str] | NDArray[Any], size: int = 16) -> str:
    """Return the BLAKE2b digest of texts and arrays, as hexadecimal digits. All NaNs count as equal.

    Args:
        size: bytes of the digest.
    """
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            for begin in range(0, len(part), 1 << 16):
                piece = np.ascontiguousarray(part[begin : begin + (1 << 16)])
                if piece.dtype.kind == "f":
                    piece = np.where(np.isnan(piece), np.nan, piece).astype(piece.dtype)
                state.update(piece.tobytes())
        else:
            state.update(json.dumps(part if isinstance(part, str) else list(part)).encode())
    return state.hexdigest()


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return one message for each entry that differs. Entries that only one fingerprint has are ignored."""
    found: list[str] = []
    both = [key for key in before if key in now and before[key] != now[key]]
    for key in both:
        if isinstance(before[key], list) != isinstance(now[key], list):  # the saved fingerprint is damaged
            found.append(f"{key} changed")
        elif key == "blocks" and "rows" not in both:
            found.append(_blocks(before[key], now[key]))
        elif key == "indexes" and "blocks" not in both:
            found.append(_indexes(before[key], now[key]))
        elif key in _SHOWN:
            found.append(f"{_SHOWN[key]}: {_short(before[key])} before, {_short(now[key])} now")
        elif key not in ("blocks", "indexes"):
            found.append(_DIGESTS.get(key, f"{key} changed"))
    return list(dict.fromkeys(found))


def _blocks(before: Sequence[int], now: Sequence[int]) -> str:
    if len(before) != len(now):
        return f"{len(before)} shards before, {len(now)} now"
    position = next(number for number, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
    changed = sum(old != new for old, new in zip(before, now, strict=True))
    first = f"shard {position}: {before[position]} samples before, {now[position]} now"
    return f"{changed} of {len(now)} shards have a different size ({first})"


def _indexes(before: Sequence[str], now: Sequence[str]) -> str:
    changed = [number for number, (old, new) in enumerate(zip(before, now, strict=False)) if old != new]
    what = "are in a different order" if sorted(map(str, before)) == sorted(now) else "contain different samples"
    shown = ", ".join(map(str, changed[:_MOST])) + (", ..." if len(changed) > _MOST else "")
    return f"{len(changed)} of {len(now)} shards {what} (numbers, counted from 0: {shown})"


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return (", ".join(map(str, value[:_MOST])) + (f", ... ({len(value)})" if len(value) > _MOST else "")) or "none"
