"""A prepared panel cut into training, validation and test windows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.borders import SplitRule
from mmtrain.data.packed import pack
from mmtrain.data.panel import Panel, find_panel, open_panel
from mmtrain.data.panel_inputs import PanelInputs, calendar_of
from mmtrain.data.panel_scalers import PanelScalers, fit_scalers, prepared_scalers
from mmtrain.data.panel_windows import PanelWindows, Spans
from mmtrain.data.split import Scaler
from mmtrain.data.static import fit_static
from mmtrain.data.timeline import Stamps
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from mmtrain.config import PanelDataConfig

Int64s = NDArray[np.int64]
_log = logging.getLogger("mmtrain")


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
    _log.info(
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
        _log.warning(
            "%s: of %d series, those too short for one window of look-back %d + horizon %d are left out: %s",
            panel.folder,
            len(panel),
            lookback,
            horizon,
            counts,
        )
