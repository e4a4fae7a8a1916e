"""What a window of a panel needs beside the values: scalers, static numbers, and what is known in advance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.calendar import calendar_features, calendar_names
from mmtrain.data.panel import Panel
from mmtrain.data.panel_scalers import PanelScalers
from mmtrain.data.static import StaticColumn, encode_static
from mmtrain.data.windows import runs
from mmtrain.errors import UserError, nearest

Floats = NDArray[np.float32]
Int64s = NDArray[np.int64]


class PanelInputs:
    """``steps``: how many steps of what is known a window has; they end with its last target.

    Known, in this order: calendar features, the chosen columns of each series, the chosen columns shared by a group.
    """

    def __init__(
        self,
        panel: Panel,
        scalers: PanelScalers,
        *,
        steps: int,
        known: Sequence[str] = (),
        calendar: Sequence[str] = (),
        static: Sequence[StaticColumn] = (),
    ) -> None:
        self.panel, self.scalers, self.steps = panel, scalers, steps
        self.calendar_names, self.columns = list(calendar), list(static)
        own, shared = panel.known_columns, panel.shared_columns
        for name in known:
            if name not in (*own, *shared):
                raise UserError(
                    f"{panel.folder}: data.known: {name!r} is not there{nearest(name, [*own, *shared])}; what it has "
                    f"known in advance: {', '.join((*own, *shared)) or 'nothing: prepare it with --known, --calendar'}"
                )
        self.own = [own.index(name) for name in known if name in own]
        self.shared = [shared.index(name) for name in known if name in shared]
        chosen = [*self.own, *(len(own) + place for place in self.shared)]
        self.mean, self.std = scalers.known.mean[chosen], scalers.known.std[chosen]
        self.names = [*calendar, *(own[i] for i in self.own), *(shared[i] for i in self.shared)]
        self.static = encode_static(panel, self.columns)
        self._of_places: Floats | None = None

    @property
    def known_width(self) -> int:
        """C_Z."""
        return len(self.names)

    @property
    def static_width(self) -> int:
        """C_S."""
        return self.static.shape[1]

    def _until(self, stop: int) -> Floats:
        """(at least ``stop``, ·) the calendar features of the places of the timeline: a forecast goes on behind it."""
        assert self.panel.timeline is not None
        if self._of_places is None or len(self._of_places) < stop:
            count = max(stop, int((self.panel.first + self.panel.rows).max()))
            self._of_places = calendar_features(self.panel.timeline.stamps(0, count), self.calendar_names)
        return self._of_places

    def known(self, series: Int64s, start: Int64s) -> Floats:
        """What is known of ``steps`` rows of each series from row ``start`` (B,) on: (B, T_Z, C_Z), standardised."""
        panel = self.panel
        made = np.empty((len(series), self.steps, self.known_width), dtype=np.float32)
        place = panel.first[series] + start
        low, high = len(self.calendar_names), len(self.calendar_names) + len(self.own)
        if low:
            made[:, :, :low] = runs(self._until(int(place.max(initial=0)) + self.steps), place, self.steps)
        if self.own:
            shards = panel.shards[series]
            for shard in np.unique(shards).tolist():
                mine = np.flatnonzero(shards == shard)
                row = panel.offsets[series[mine]] + start[mine]
                made[mine, :, low:high] = runs(panel.known[shard], row, self.steps)[:, :, self.own]
        if self.shared:
            groups, places, width = panel.shared.shape
            flat = panel.shared.reshape(groups * places, width)
            row = panel.groups[series] * places + place
            made[:, :, high:] = runs(flat, row, self.steps)[:, :, self.shared]
        made[:, :, low:] -= self.mean
        made[:, :, low:] /= self.std
        return made


def calendar_of(panel: Panel) -> list[str]:
    """The calendar features of a panel's step.

    Raises:
        UserError: for a panel without times.
    """
    if panel.timeline is None:
        raise UserError(f"{panel.folder}: data.calendar=true, but this panel was prepared without times (--time)")
    return calendar_names(panel.timeline.step)
