"""Fingerprints of training data, which show whether a run resumes with the same samples in the same order.

A fingerprint is a dict of JSON values. It contains indexes, names and digests of numbers, but not the bytes of images.
It contains no path, so data that was moved is the same data. A source that knows more than the sizes of its blocks has
a method ``fingerprint``.
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

#: Parts that are digests: they say what has changed, but not how.
_DIGESTS = {
    "classes": "the names or the order of the classes are others",
    "values": "the values of the training rows are others",
    "inputs": "what is known in advance of the training rows is another",
    "ids": "the names or the order of the series are others",
    "lengths": "the training rows of the series are others",
    "scalers": "the values of the training rows are others",
}
#: Parts that can be shown.
_SHOWN = {
    "columns": "columns",
    "known": "what is known in advance",
    "static": "static columns",
    "series": "number of series",
    "rows": "training rows",
}
_MOST = 8


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that knows its samples by more than their number."""

    def fingerprint(self) -> Fingerprint:
        """JSON values; the keys are those of the tables above, or "indexes" with a digest for each block."""
        ...


def fingerprint_of(source: Source) -> Fingerprint:
    """The samples in each block, and what else the source tells."""
    more = source.fingerprint() if isinstance(source, Fingerprinted) else {}
    return {"blocks": [int(size) for size in source.block_sizes], **more}


def digest(*parts: str | Iterable[str] | NDArray[Any], size: int = 16) -> str:
    """A digest of texts and arrays, as hexadecimal digits of ``size`` bytes; every NaN is the same."""
    made = hashlib.blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, np.ndarray):
            made.update(f"{part.dtype.str}{part.shape}".encode())
            for begin in range(0, len(part), 1 << 16):
                piece = np.ascontiguousarray(part[begin : begin + (1 << 16)])
                if piece.dtype.kind == "f":
                    piece = np.where(np.isnan(piece), np.nan, piece).astype(piece.dtype)
                made.update(piece.tobytes())
        else:
            made.update(json.dumps(part if isinstance(part, str) else list(part)).encode())
    return made.hexdigest()


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return the differences between two fingerprints, one text for each part; a part must be in both to count."""
    found: list[str] = []
    both = [key for key in before if key in now and before[key] != now[key]]
    for key in both:
        if isinstance(before[key], list) != isinstance(now[key], list):  # what was saved is damaged
            found.append(f"{key} is another")
        elif key == "blocks" and "rows" not in both:
            found.append(_blocks(before[key], now[key]))
        elif key == "indexes" and "blocks" not in both:
            found.append(_indexes(before[key], now[key]))
        elif key in _SHOWN:
            found.append(f"{_SHOWN[key]}: {_short(before[key])} before, {_short(now[key])} now")
        elif key not in ("blocks", "indexes"):
            found.append(_DIGESTS.get(key, f"{key} is another"))
    return list(dict.fromkeys(found))


def _blocks(before: Sequence[int], now: Sequence[int]) -> str:
    if len(before) != len(now):
        return f"{len(before)} shards before, {len(now)} now"
    place = next(number for number, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
    many = sum(old != new for old, new in zip(before, now, strict=True))
    first = f"shard {place}: {before[place]} samples before, {now[place]} now"
    return f"{many} of {len(now)} shards have other sizes ({first})"


def _indexes(before: Sequence[str], now: Sequence[str]) -> str:
    other = [number for number, (old, new) in enumerate(zip(before, now, strict=False)) if old != new]
    same = " in another order" if sorted(map(str, before)) == sorted(now) else ""
    shown = ", ".join(map(str, other[:_MOST])) + (", ..." if len(other) > _MOST else "")
    return f"{len(other)} of {len(now)} shards hold other samples{same} (counted from 0: {shown})"


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return (", ".join(map(str, value[:_MOST])) + (f", ... ({len(value)})" if len(value) > _MOST else "")) or "none"
