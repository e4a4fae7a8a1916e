"""Standardisation of a panel: each series and column by its own training rows, known columns by those of all series."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.panel import Panel, release
from mmtrain.data.split import Scaler
from mmtrain.errors import UserError

Floats = NDArray[np.float32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class PanelScalers:
    """``mean`` and ``std`` (S, C) of the targets; ``known`` of the known columns, then of the shared ones."""

    mean: Floats
    std: Floats
    known: Scaler


def fit_scalers(panel: Panel, train_rows: Int64s) -> PanelScalers:
    """One pass over the shards, a piece at a time. ``train_rows`` (S,): how many rows of each series may be looked at.

    A series without a value in its training rows keeps mean 0 and deviation 1, as does what does not vary its
    deviation; flags (columns of 0 and 1) stay as they are.
    """
    shape = (len(panel), len(panel.columns))
    mean, std = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    width = len(panel.known_columns)
    known = _Sums(width)
    for piece in panel.chunks():
        shard, offset = int(panel.shards[piece.start]), int(panel.offsets[piece.start])
        rows, kept = panel.rows[piece], np.minimum(train_rows[piece], panel.lengths[piece])
        stop = offset + int(rows.sum())
        starts = np.cumsum(rows) - rows
        row = np.arange(stop - offset) - np.repeat(starts, rows)
        seen = row < np.repeat(kept, rows)
        some = np.flatnonzero(kept)
        if not len(some):
            continue
        begins = np.cumsum(kept[some]) - kept[some]
        place = np.arange(piece.start, piece.stop)[some]
        mean[place], std[place] = _fit(panel.values[shard][offset:stop][seen], begins, kept[some])
        if width:
            known.add(panel.known[shard][offset:stop][seen])
            release(panel.known[shard])
        release(panel.values[shard])
    shared = _Sums(len(panel.shared_columns))
    if shared.width:
        last = int((panel.first + train_rows).max()) if len(panel) else 0
        shared.add(panel.shared[:, :last].reshape(-1, shared.width))
    both = [sums.scaler() for sums in (known, shared)]
    return PanelScalers(
        mean,
        std,
        Scaler(np.concatenate([s.mean for s in both]), np.concatenate([s.std for s in both])),
    )


def _fit(values: Floats, begins: Int64s, counts: Int64s) -> tuple[Floats, Floats]:
    """Mean and population deviation of each run of rows of ``values`` (R, C), holes left out: (n, C) each."""
    wide = values.astype(np.float64)
    good = np.isfinite(wide)
    wide[~good] = 0
    held = np.add.reduceat(good, begins, axis=0, dtype=np.int64)
    mean = np.add.reduceat(wide, begins, axis=0) / np.maximum(held, 1)
    wide -= np.repeat(mean, counts, axis=0)
    wide[~good] = 0
    low, high = np.minimum.reduceat(wide, begins, axis=0), np.maximum.reduceat(wide, begins, axis=0)
    std = np.sqrt(np.add.reduceat(np.square(wide, out=wide), begins, axis=0) / np.maximum(held, 1))
    # a constant column's deviation is rounding noise of its mean, not exactly 0
    flat = (high - low) <= 1e-6 * np.abs(mean)
    std[flat | (std.astype(np.float32) == 0)] = 1
    return mean.astype(np.float32), std.astype(np.float32)


class _Sums:
    """Mean and deviation of the columns of many arrays, without keeping them (Chan, Golub & LeVeque 1983)."""

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self.mean, self.squares = np.zeros(width), np.zeros(width)
        self.flag = np.ones(width, dtype=bool)

    def add(self, values: Floats) -> None:
        if not len(values) or not self.width:
            return
        wide = values.astype(np.float64)
        mean = wide.mean(axis=0)
        gap, total = mean - self.mean, self.count + len(wide)
        self.squares += np.square(wide - mean).sum(axis=0) + np.square(gap) * self.count * len(wide) / total
        self.mean = self.mean + gap * len(wide) / total
        self.count = total
        self.flag &= ((wide == 0) | (wide == 1)).all(axis=0)

    def scaler(self) -> Scaler:
        std = np.sqrt(self.squares / max(self.count, 1))
        std[std <= 1e-6 * np.abs(self.mean)] = 1
        std[std.astype(np.float32) == 0] = 1
        return Scaler(
            np.where(self.flag, 0, self.mean).astype(np.float32), np.where(self.flag, 1, std).astype(np.float32)
        )


def prepared_scalers(panel: Panel) -> PanelScalers:
    """Those which lie in the panel's folder, of the split that it was prepared with."""
    arrays = {}
    for name in ("scaler-mean", "scaler-std", "known-mean", "known-std"):
        file = panel.folder / f"{name}.npy"
        try:
            arrays[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); prepare the panel again with --force") from error
    wanted = (len(panel), len(panel.columns))
    if arrays["scaler-mean"].shape != wanted or arrays["scaler-std"].shape != wanted:
        raise UserError(f"{panel.folder}: the scalers are not of {wanted[0]} series; prepare the panel again, --force")
    return PanelScalers(arrays["scaler-mean"], arrays["scaler-std"], Scaler(arrays["known-mean"], arrays["known-std"]))
