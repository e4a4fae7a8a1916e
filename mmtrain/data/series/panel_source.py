"""Forecasting windows over a panel: one series a sample, numbered and read when they are wanted.

A prepared panel cut into training, validation and test windows.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.panel import Panel, find_panel, open_panel
from mmtrain.data.series.panel_inputs import (
    PanelInputs,
    PanelScalers,
    calendar_of,
    fit_scalers,
    fit_static,
    pack,
    prepared_scalers,
)
from mmtrain.data.series.split import Scaler, SplitRule
from mmtrain.data.series.timeline import Stamps
from mmtrain.data.series.windows import hide_holes, known_batch, runs
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mmtrain.config import PanelDataConfig

Int64s = NDArray[np.int64]

#: Windows in a block of the data clock: consecutive series, so that a block lies together on disk. A constant, since
#: the order of the samples depends on it.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Spans:
    """The first targets of a split's windows: series s has ``counts[s]`` of them, from row ``begin[s]`` on."""

    begin: Int64s
    counts: Int64s
    stride: int

    @classmethod
    def of(cls, begin: Int64s, end: Int64s, lookback: int, horizon: int, stride: int = 1) -> Spans:
        """Windows whose targets all lie in rows [begin, end) (S,), and whose look-back lies in the series."""
        first = np.maximum(begin, lookback)
        return cls(first, np.maximum((end - horizon - first) // stride + 1, 0), stride)


class PanelWindows:
    """Source of {"past": float32 (B, L, C), "future": float32 (B, H, C)} for the C columns of one series a sample.

    Both are standardised by the series' own scaler. With ``inputs`` that the model wants also "static" (B, C, C_S) and
    "known" (B, T_Z, C, C_Z); with ``masked`` "mask" (B, L, C) and "future_mask" (B, H, C), True where observed, and 0
    in the place of holes.
    """

    def __init__(
        self, panel: Panel, spans: Spans, lookback: int, horizon: int, inputs: PanelInputs, *, masked: bool = False
    ) -> None:
        if min(lookback, horizon, spans.stride) < 1:
            raise UserError(f"lookback={lookback}, horizon={horizon}, stride={spans.stride}: each must be 1 or more")
        self.panel, self.spans, self.inputs, self.masked = panel, spans, inputs, masked
        self.lookback, self.horizon = lookback, horizon
        self.ends = np.cumsum(spans.counts)
        self.block_sizes = _blocks(spans.counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """The series of each window, and the row of its first target in that series."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}")
        series = np.searchsorted(self.ends, indices, side="right")
        number = indices - (self.ends[series] - self.spans.counts[series])
        return series, self.spans.begin[series] + number * self.spans.stride

    def fetch(self, indices: Int64s, keys: NDArray[np.uint64] | None) -> dict[str, Tensor]:
        import torch

        columns = len(self.panel.columns)
        series, target = self.locate(indices)
        past = self._scaled(series, target - self.lookback, self.lookback)
        future = self._scaled(series, target, self.horizon)
        batch = hide_holes(past, future) if self.masked else {}
        batch |= {"past": torch.from_numpy(past), "future": torch.from_numpy(future)}
        if self.inputs.known_width:
            known = self.inputs.known(series, target + self.horizon - self.inputs.steps)
            batch["known"] = known_batch(known, columns)
        if self.inputs.static_width:
            batch["static"] = torch.from_numpy(self.inputs.static[series]).unsqueeze(1).expand(-1, columns, -1)
        return batch

    def _scaled(self, series: Int64s, start: Int64s, length: int) -> NDArray[np.float32]:
        made = gather(self.panel, series, start, length)
        made -= self.inputs.scalers.mean[series][:, None]
        made /= self.inputs.scalers.std[series][:, None]
        return made


def gather(panel: Panel, series: Int64s, start: Int64s, length: int) -> NDArray[np.float32]:
    """(B, length, C): rows [start, start + length) of each series (B,), in the units of the data, NaN in holes."""
    made = np.empty((len(series), length, len(panel.columns)), dtype=np.float32)
    shards = panel.shards[series]
    for shard in np.unique(shards).tolist():
        mine = np.flatnonzero(shards == shard)
        made[mine] = runs(panel.values[shard], panel.offsets[series[mine]] + start[mine], length)
    return made


def _blocks(counts: Int64s) -> list[int]:
    """Sizes of blocks of whole series, each of :data:`BLOCK` windows or a little more."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return []
    cuts = [0]
    while cuts[-1] < total:
        cuts.append(int(ends[min(int(np.searchsorted(ends, cuts[-1] + BLOCK)), len(ends) - 1)]))
    return np.diff(cuts).tolist()


logger = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class PanelData:
    """The sources of a panel; ``borders`` (S, 3): where the splits of each series end."""

    train: PanelWindows
    val: PanelWindows
    test: PanelWindows
    panel: Panel
    borders: Int64s
    inputs: PanelInputs

    @property
    def path(self) -> Path:
        return self.panel.folder

    @property
    def columns(self) -> list[str]:
        return list(self.panel.columns)

    def scaler_of(self, source: PanelWindows, index: int) -> Scaler:
        """That of the series which window ``index`` is of."""
        series = int(source.locate(np.array([index]))[0][0])
        return Scaler(self.inputs.scalers.mean[series], self.inputs.scalers.std[series])

    def stamps_of(self, source: PanelWindows, index: int) -> Stamps | None:
        """(L + H,) times of window ``index``, or None for a panel without times."""
        series, target = (int(found[0]) for found in source.locate(np.array([index])))
        return self.panel.stamps(series, target - source.lookback, target + source.horizon)

    def rows_of(self, source: PanelWindows, index: int) -> Int64s:
        """(L + H,) numbers of the rows of window ``index`` in its series."""
        target = int(source.locate(np.array([index]))[1][0])
        return np.arange(target - source.lookback, target + source.horizon)

    def labels_of(self, source: PanelWindows, index: int) -> list[str]:
        """What the variates of window ``index`` are called: its series, and the column."""
        name = self.panel.ids[source.locate(np.array([index]))[0][0]]
        return [f"{name} · {column}" for column in self.columns]

    def assets(self) -> dict[str, Any]:
        """What prediction needs, as JSON values; the scalers of all series packed."""
        scalers = self.inputs.scalers
        return {
            "ids": self.panel.ids.tolist(),
            "mean": pack(scalers.mean),
            "std": pack(scalers.std),
            "known": {
                "calendar": self.inputs.calendar_names,
                "columns": self.inputs.names[len(self.inputs.calendar_names) :],
                "scaler": Scaler(self.inputs.mean, self.inputs.std).to_dict(),
            },
            "static": [column.to_json() for column in self.inputs.columns],
        }


def load_panel(
    data: PanelDataConfig, lookback: int, horizon: int, steps: int = 0, root: str | None = None
) -> PanelData:
    """Open the panel ``data.path`` and number its windows. ``steps``: T_Z, 0 for look-back + horizon.

    Series in which not one window of a split fits are left out of that split, and counted.

    Raises:
        UserError: for a panel that does not exist, lacks what ``data`` asks for, or has no window in some split.
    """
    panel = open_panel(find_panel(data.path, data.root or root))
    if data.columns is not None and list(data.columns) != panel.columns:
        raise UserError(f"{panel.folder}: data.columns={data.columns}, but it was prepared with {panel.columns}")
    masked = data.missing == "mask"
    if panel.holes and not masked:
        raise UserError(
            f"{panel.folder}: {panel.holes} values are missing: set data.missing=mask, or prepare it again with "
            "--missing ffill (or interpolate, zero)"
        )
    rule = _rule(data, panel)
    borders = rule.cut_panel(panel.lengths, panel.first, panel.timeline)
    spans = {
        "train": Spans.of(np.zeros_like(panel.lengths), borders[:, 0], lookback, horizon, data.stride),
        "val": Spans.of(borders[:, 0], borders[:, 1], lookback, horizon),
        "test": Spans.of(borders[:, 1], borders[:, 2], lookback, horizon),
    }
    _count_left_out(panel, spans, rule, lookback, horizon)
    inputs = PanelInputs(
        panel,
        _scalers(panel, rule, borders[:, 0]),
        steps=known_steps(steps, lookback, horizon),
        known=data.known,
        calendar=calendar_of(panel) if data.calendar else (),
        static=fit_static(panel, data.static, spans["train"].counts > 0),
    )
    made = {name: PanelWindows(panel, span, lookback, horizon, inputs, masked=masked) for name, span in spans.items()}
    return PanelData(made["train"], made["val"], made["test"], panel, borders, inputs)


def known_steps(wanted: int, lookback: int, horizon: int) -> int:
    """T_Z of ``model.future_length``: the steps of what is known in advance, the last of them the last target's.

    Raises:
        UserError: for more steps than a window has.
    """
    if wanted > lookback + horizon:
        raise UserError(
            f"model.future_length={wanted}: a window has model.lookback + model.horizon = {lookback + horizon} steps; "
            "give at most so many, or 0 for all"
        )
    return wanted or lookback + horizon


def _rule(data: PanelDataConfig, panel: Panel) -> SplitRule:
    if data.split != "prepared":
        return SplitRule.of(data)
    saved = panel.meta["split"]
    return SplitRule.make(saved["split"], saved.get("parts"), saved.get("dates"), saved.get("last"))


def _scalers(panel: Panel, rule: SplitRule, train_rows: Int64s) -> PanelScalers:
    if rule.to_json() == panel.meta["split"]:
        return prepared_scalers(panel)
    begin = time.perf_counter()
    made = fit_scalers(panel, train_rows)
    logger.info(
        "%s: its scalers are of another split: fitted again for %s in %.1f s, as each start will (prepare it with that "
        "split to save the time)",
        panel.folder,
        rule,
        time.perf_counter() - begin,
    )
    return made


def _count_left_out(panel: Panel, spans: dict[str, Spans], rule: SplitRule, lookback: int, horizon: int) -> None:
    left_out = {name: int((span.counts == 0).sum()) for name, span in spans.items()}
    for name, count in left_out.items():
        if count == len(panel):
            raise UserError(
                f"{panel.folder}: in the {name} split ({rule}) no series is long enough for one window of look-back "
                f"{lookback} + horizon {horizon}; the longest has {int(panel.lengths.max(initial=0))} rows in all: use "
                "a shorter model.lookback or model.horizon, or another data.split"
            )
    if any(left_out.values()):
        counts = ", ".join(f"{count} from {name}" for name, count in left_out.items() if count)
        logger.warning(
            "%s: of %d series, those too short for one window of look-back %d + horizon %d are left out: %s",
            panel.folder,
            len(panel),
            lookback,
            horizon,
            counts,
        )
