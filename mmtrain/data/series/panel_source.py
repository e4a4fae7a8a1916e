"""Forecasting windows over a prepared panel, numbered one series after another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmtrain.data.core.fingerprint import Fingerprint, digest
from mmtrain.data.series.panel import Panel, find_panel, open_panel
from mmtrain.data.series.panel_inputs import (
    PanelInputs,
    calendar_of,
    fit_scalers,
    fit_static,
    pack,
    prepared_scalers,
)
from mmtrain.data.series.split import Scaler, SplitRule
from mmtrain.data.series.windows import Floats, ForecastingData, Int64s, Spans, WindowOrigin, Windows, known_steps
from mmtrain.errors import UserError
from mmtrain.log import logger

if TYPE_CHECKING:
    from mmtrain.config import PanelDataConfig

#: Number of values that are standardised at a time.
_AT_ONCE = 8192
#: Number of series whose values enter the fingerprint, and the most rows of each.
_PROBED, _ROWS = 256, 4096


class PanelWindows(Windows):
    """Windows of a panel. Each shows one series, standardised by its own scaler; the variates are its columns."""

    def __init__(
        self, panel: Panel, spans: Spans, lookback: int, horizon: int, inputs: PanelInputs, *, masked: bool = False
    ) -> None:
        super().__init__(spans, lookback, horizon, inputs, masked=masked)
        self.panel, self.scalers = panel, inputs.scalers

    def read(self, series: Int64s, start: Int64s, length: int) -> Floats:
        found = self.panel.gather(self.panel.values, series, start, length)
        mean, std = self.scalers.mean[series][:, None], self.scalers.std[series][:, None]
        made = found if found.dtype == np.float32 else np.empty(found.shape, np.float32)
        some = max(1, _AT_ONCE // max(1, length * found.shape[2]))
        for begin in range(0, len(found), some):  # small blocks, whose float64 values stay in the processor's cache
            part = slice(begin, begin + some)
            made[part] = (found[part] - mean[part]) / std[part]
        return made


@dataclass(frozen=True)
class PanelData(ForecastingData):
    """The windows of a panel."""

    panel: Panel
    borders: Int64s  # (S, 3) end rows of the train, validation and test split of each series
    inputs: PanelInputs

    def _origin(self, series: int, rows: Int64s) -> WindowOrigin:
        scalers, name = self.inputs.scalers, self.panel.ids[series]
        return WindowOrigin(
            labels=[f"{name} · {column}" for column in self.columns],
            scaler=Scaler(scalers.mean[series], scalers.std[series]),
            rows=rows,
            stamps=self.panel.stamps(series, int(rows[0]), int(rows[-1]) + 1),
        )

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint. It covers values of some series only, since a panel may be larger than memory."""
        panel, rows, scalers = self.panel, self.borders[:, 0], self.inputs.scalers
        some = np.linspace(0, len(panel) - 1, min(len(panel), _PROBED)).astype(np.int64).tolist()
        return {
            "columns": self.columns,
            "known": self.known,
            "static": list(self.static),
            "series": len(panel),
            "rows": int(rows.sum()),
            "ids": digest(panel.ids.tolist()),
            "lengths": digest(rows, panel.first if self.known else rows),
            "scalers": digest(scalers.mean.astype(np.float32), scalers.std.astype(np.float32)),
            "values": digest(*(panel.series(n)[: min(int(rows[n]), _ROWS)].astype(np.float32) for n in some)),
            "inputs": digest(
                self.inputs.static, self.inputs.mean.astype(np.float32), self.inputs.std.astype(np.float32)
            ),
        }

    def assets(self) -> dict[str, Any]:
        scalers = self.inputs.scalers
        return {
            "ids": self.panel.ids.tolist(),
            "step": self.panel.timeline and str(self.panel.timeline.step),
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
    data: PanelDataConfig, lookback: int, horizon: int, steps: int = 0, root: Path | None = None
) -> PanelData:
    """Open the panel ``data.path`` and number its windows.

    A series that is too short for one window of a split is left out of that split. Their number is logged.

    Args:
        steps: T_Z, the time steps of known covariates in a window; 0: lookback + horizon.
        root: folder of panels, if ``data.root`` is not set.

    Raises:
        UserError: if the panel does not exist, lacks columns that ``data`` names, or has no window in some split.
    """
    panel = open_panel(find_panel(data.path, data.root or root))
    if data.columns is not None and list(data.columns) != panel.columns:
        raise UserError(
            f"{panel.folder}: data.columns={data.columns}, but the panel was prepared with {panel.columns}; leave "
            "data.columns out, or prepare it again with --columns"
        )
    masked = data.missing == "mask"
    if panel.holes and not masked:
        raise UserError(
            f"{panel.folder}: {panel.holes} values are missing; set data.missing=mask, or prepare the panel again with "
            "--missing ffill (or interpolate, zero)"
        )
    rule = SplitRule.from_json(panel.meta["split"]) if data.split == "prepared" else SplitRule.of(data)
    borders = rule.cut_panel(panel.lengths, panel.first, panel.timeline, panel.zone)
    spans = {
        "train": Spans.of(np.zeros_like(panel.lengths), borders[:, 0], lookback, horizon, data.stride),
        "val": Spans.of(borders[:, 0], borders[:, 1], lookback, horizon),
        "test": Spans.of(borders[:, 1], borders[:, 2], lookback, horizon),
    }
    _count_left_out(panel, spans, rule, lookback, horizon)
    if rule.to_json() == panel.meta["split"]:
        scalers = prepared_scalers(panel)
    else:
        begin = time.perf_counter()
        scalers = fit_scalers(panel, borders[:, 0])
        logger.info(
            "%s: the saved scalers are for another split; fitted new ones for %s in %.1f s. Each start repeats this, "
            "unless the panel is prepared with this split",
            panel.folder,
            rule,
            time.perf_counter() - begin,
        )
    inputs = PanelInputs(
        panel,
        scalers,
        steps=known_steps(steps, lookback, horizon),
        known=data.known,
        calendar=calendar_of(panel) if data.calendar else (),
        static=fit_static(panel, data.static, spans["train"].counts > 0),
    )
    return PanelData(
        **{name: PanelWindows(panel, span, lookback, horizon, inputs, masked=masked) for name, span in spans.items()},
        path=panel.folder,
        columns=list(panel.columns),
        known=inputs.names,
        static={column.name: column.width for column in inputs.columns},
        panel=panel,
        borders=borders,
        inputs=inputs,
    )


def _count_left_out(panel: Panel, spans: dict[str, Spans], rule: SplitRule, lookback: int, horizon: int) -> None:
    """Log how many series are too short for each split; raise UserError if a split has none left."""
    left_out = {name: int((span.counts == 0).sum()) for name, span in spans.items()}
    for name, count in left_out.items():
        if count == len(panel):
            raise UserError(
                f"{panel.folder}: in the {name} split ({rule}) no series is long enough for one window of lookback "
                f"{lookback} + horizon {horizon}; the longest series has {int(panel.lengths.max(initial=0))} rows over "
                "all splits. Use a shorter model.lookback or model.horizon, or another data.split"
            )
    if any(left_out.values()):
        counts = ", ".join(f"{count} from {name}" for name, count in left_out.items() if count)
        logger.warning(
            "%s: of %d series, those too short for one window of lookback %d + horizon %d are left out: %s",
            panel.folder,
            len(panel),
            lookback,
            horizon,
            counts,
        )
