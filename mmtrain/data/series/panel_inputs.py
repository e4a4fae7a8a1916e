"""Scalers and covariates (static, and known in advance) of the windows of a panel.

Targets are standardised for each series and column with the training rows of the series; known columns with the
training rows of all series. Static numbers are standardised. Static categories are one-hot encoded, or become one code
if there are many.

Calendar features encode a date as numbers in [-0.5, 0.5], as in Informer. They depend on the date only, so they are
known for any future time. Tables use them too.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.panel import Panel, load_array
from mmtrain.data.series.split import NOISE, Scaler, check_scaler
from mmtrain.data.series.timeline import UNITS, Stamps, Step
from mmtrain.data.series.windows import Floats, Int64s, Numbers, known_batch, runs
from mmtrain.errors import UserError, nearest
from mmtrain.log import logger

if TYPE_CHECKING:
    from torch import Tensor

#: A static column with more categories than this becomes one number (the code), instead of one column per category.
MOST_ONE_HOT = 64


@dataclass(frozen=True)
class PanelScalers:
    """The scalers of a panel."""

    mean: NDArray[np.float64]  # (S, C) of the targets
    std: NDArray[np.float64]  # (S, C)
    known: Scaler  # of the known columns, followed by the shared columns


def fit_scalers(panel: Panel, train_rows: Int64s) -> PanelScalers:
    """Fit the scalers of a panel in one pass over its shards, one chunk at a time.

    A series without any value in its training rows gets mean 0 and standard deviation 1. A constant column gets
    standard deviation 1. Known columns of only 0 and 1 are flags and are not scaled.

    Args:
        train_rows: (S,) number of training rows of each series.
    """
    shape = (len(panel), len(panel.columns))
    mean, std = np.zeros(shape), np.ones(shape)
    known, shared = _Sums(len(panel.known_columns)), _Sums(len(panel.shared_columns))
    for piece in panel.chunks():
        kept = np.minimum(train_rows[piece], panel.lengths[piece])
        some = np.flatnonzero(kept)
        if not len(some):
            continue
        begins = np.cumsum(kept[some]) - kept[some]
        numbers = piece.start + some
        mean[numbers], std[numbers] = _fit(panel.heads(panel.values, piece, kept), begins, kept[some])
        if known.width:
            known.add(panel.heads(panel.known, piece, kept))
    if shared.width:
        shared.add(panel.shared[:, : int((panel.first + train_rows).max())].reshape(-1, shared.width))
    both = [sums.scaler() for sums in (known, shared)]
    return PanelScalers(
        mean, std, Scaler(np.concatenate([s.mean for s in both]), np.concatenate([s.std for s in both]))
    )


def _fit(values: Numbers, begins: Int64s, counts: Int64s) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and population standard deviation (n, C) of each run of rows of ``values`` (R, C), ignoring NaN.

    Args:
        begins, counts: (n,) first row and length of each run.
    """
    wide = values.astype(np.float64)
    good = np.isfinite(wide)
    wide[~good] = 0
    held = np.add.reduceat(good, begins, axis=0, dtype=np.int64)
    mean = np.add.reduceat(wide, begins, axis=0) / np.maximum(held, 1)
    wide -= np.repeat(mean, counts, axis=0)
    wide[~good] = 0
    low, high = np.minimum.reduceat(wide, begins, axis=0), np.maximum.reduceat(wide, begins, axis=0)
    std = np.sqrt(np.add.reduceat(np.square(wide, out=wide), begins, axis=0) / np.maximum(held, 1))
    # The deviation of a constant column is rounding noise of its mean, not exactly 0.
    flat = (high - low) <= NOISE[values.dtype] * np.abs(mean)
    std[flat | (std.astype(np.float32) == 0)] = 1
    return mean, std


class _Sums:
    """Running mean and standard deviation of the columns of many arrays (Chan, Golub & LeVeque 1983)."""

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self.mean, self.squares = np.zeros(width), np.zeros(width)
        self.flag = np.ones(width, dtype=bool)
        self.noise = 0.0

    def add(self, values: Numbers) -> None:
        """Add the rows of an array (n, width)."""
        if not len(values) or not self.width:
            return
        wide = values.astype(np.float64)
        mean = wide.mean(axis=0)
        gap, total = mean - self.mean, self.count + len(wide)
        self.squares += np.square(wide - mean).sum(axis=0) + np.square(gap) * self.count * len(wide) / total
        self.mean = self.mean + gap * len(wide) / total
        self.count = total
        self.noise = max(self.noise, NOISE[values.dtype])
        self.flag &= ((wide == 0) | (wide == 1)).all(axis=0)

    def scaler(self) -> Scaler:
        """Return the scaler of all rows; flags (columns of only 0 and 1) keep mean 0 and standard deviation 1."""
        std = np.sqrt(self.squares / max(self.count, 1))
        std[std <= self.noise * np.abs(self.mean)] = 1
        std[std.astype(np.float32) == 0] = 1
        return Scaler(np.where(self.flag, 0, self.mean), np.where(self.flag, 1, std))


def prepared_scalers(panel: Panel) -> PanelScalers:
    """Load the scalers saved with the panel, which were fitted for the split that it was prepared with.

    Raises:
        UserError: if they are damaged.
    """
    names = ("scaler-mean", "scaler-std", "known-mean", "known-std")
    mean, std, known_mean, known_std = (load_array(panel.folder / f"{name}.npy").astype(np.float64) for name in names)
    wanted = (len(panel), len(panel.columns))
    cure = "prepare the panel again (mmtrain data prepare panel --force)"
    if mean.shape != wanted or std.shape != wanted:
        raise UserError(
            f"{panel.folder}: scaler-mean.npy and scaler-std.npy are not for {wanted[0]} series and {wanted[1]} "
            f"column(s); {cure}"
        )
    for kind, pair in (("scaler", (mean, std)), ("known", (known_mean, known_std))):
        check_scaler(*pair, f"{panel.folder}: {kind}-mean.npy and {kind}-std.npy are damaged", cure)
    return PanelScalers(mean, std, Scaler(known_mean, known_std))


@dataclass(frozen=True)
class StaticColumn:
    """The encoding of a static column: by ``categories`` if it has any, else standardised by ``mean`` and ``std``."""

    name: str
    categories: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def width(self) -> int:
        """Number of columns of the encoding."""
        return len(self.categories) if 0 < len(self.categories) <= MOST_ONE_HOT else 1

    def encode(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Encode ``values`` (S,) as (S, width) float32.

        Args:
            values: numbers, or codes that index ``categories`` (below 0: not among them).
        """
        if not self.categories:
            made = (values.astype(np.float64) - self.mean) / self.std
            made[~np.isfinite(made)] = 0  # a missing number becomes the mean
            return made[:, None].astype(np.float32)
        if self.width == 1 and len(self.categories) > 1:
            return (values[:, None] / (len(self.categories) - 1) - 0.5).astype(np.float32)
        return (values[:, None] == np.arange(len(self.categories))).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "categories": list(self.categories), "mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> StaticColumn:
        """Build the encoding from the result of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: if ``saved`` is damaged.
        """
        made = cls(str(saved["name"]), tuple(saved["categories"]), float(saved["mean"]), float(saved["std"]))
        if not (np.isfinite(made.mean) and 0 < made.std < np.inf):
            raise ValueError(f"static column {made.name!r}: invalid mean {made.mean} or standard deviation {made.std}")
        return made


def fit_static(panel: Panel, names: Sequence[str], trained: NDArray[np.bool_]) -> list[StaticColumn]:
    """Return the encodings of the static columns ``names``.

    Args:
        trained: (S,) whether a series is used in training. Only these series determine how numbers are standardised.

    Raises:
        UserError: for a column that the panel does not have.
    """
    columns = []
    for name in names:
        if name not in panel.statics:
            raise UserError(
                f"{panel.folder}: data.static: there is no static column {name!r}{nearest(name, panel.statics)}; the "
                f"panel has {', '.join(panel.statics) or 'none: prepare it with --static'}"
            )
        if name in panel.categories:
            columns.append(StaticColumn(name, tuple(panel.categories[name])))
            count = len(panel.categories[name])
            if count > MOST_ONE_HOT:
                logger.info(
                    "%s: static column %r has %d categories, more than %d: it is encoded as one number, not one-hot",
                    panel.folder,
                    name,
                    count,
                    MOST_ONE_HOT,
                )
        else:
            values = panel.statics[name][trained].astype(np.float64)
            good = values[np.isfinite(values)]
            mean, std = (float(good.mean()), float(good.std())) if len(good) else (0.0, 1.0)
            columns.append(StaticColumn(name, (), mean, std if std > 1e-6 * abs(mean) else 1.0))
    return columns


def encode_static(panel: Panel, columns: Sequence[StaticColumn]) -> NDArray[np.float32]:
    """Return the encoded static columns of all series, concatenated: (S, C_S) float32.

    Raises:
        UserError: if the panel lacks a column, or has numbers in place of categories or the reverse.
    """
    parts = []
    for column in columns:
        values = panel.statics.get(column.name)
        if values is None or bool(panel.categories.get(column.name)) != bool(column.categories):
            kind = "categories" if column.categories else "numbers"
            raise UserError(
                f"{panel.folder}: there is no static column {column.name!r} of {kind}, which the model was trained "
                "with; prepare the panel with this column (--static)"
            )
        if column.categories:
            names = panel.categories[column.name]
            codes = {name: code for code, name in enumerate(column.categories)}
            values = np.array([codes.get(name, -1) for name in names], dtype=np.int64)[values]
        parts.append(column.encode(values))
    return np.concatenate(parts, axis=1) if parts else np.empty((len(panel), 0), dtype=np.float32)


class PanelInputs:
    """The covariates of the windows of a panel.

    Known covariates come in this order: calendar features, the chosen columns of each series, the chosen columns that
    a group of series shares.

    Args:
        steps: T_Z, the number of time steps of known covariates in a window; they end with its last target.
        known: names of the chosen columns.
        calendar: names of calendar features.
        static: encodings of the static columns.

    Raises:
        UserError: for a column that the panel does not have.
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
                    f"{panel.folder}: data.known: there is no known column {name!r}{nearest(name, [*own, *shared])}; "
                    f"the panel has {', '.join((*own, *shared)) or 'none: prepare it with --known or --calendar'}"
                )
        self.own = [own.index(name) for name in known if name in own]
        self.shared = [shared.index(name) for name in known if name in shared]
        chosen = [*self.own, *(len(own) + number for number in self.shared)]
        self.mean, self.std = scalers.known.mean[chosen], scalers.known.std[chosen]
        self.names = [*calendar, *(own[i] for i in self.own), *(shared[i] for i in self.shared)]
        self.static = encode_static(panel, self.columns)
        self._calendar_rows: Floats | None = None

    def batch(self, series: Int64s, stop: Int64s, variates: int) -> dict[str, Tensor]:
        """Return the covariates of a batch of windows; see :class:`~mmtrain.data.series.windows.Covariates`."""
        import torch

        made = {}
        if self.names:
            made["known"] = known_batch(self.known(series, stop - self.steps), variates)
        if self.columns:
            made["static"] = torch.from_numpy(self.static[series]).unsqueeze(1).expand(-1, variates, -1)
        return made

    def known(self, series: Int64s, start: Int64s) -> Floats:
        """Return the C_Z standardised known covariates (B, T_Z, C_Z) of each series (B,) from row ``start`` (B,)."""
        panel = self.panel
        made = np.empty((len(series), self.steps, len(self.names)), dtype=np.float32)
        position = panel.first[series] + start  # on the timeline
        low, high = len(self.calendar_names), len(self.calendar_names) + len(self.own)
        if low:
            made[:, :, :low] = runs(self._calendar(int(position.max(initial=0)) + self.steps), position, self.steps)
        if self.own:
            own = panel.gather(panel.known, series, start, self.steps)[:, :, self.own]
            made[:, :, low:high] = (own - self.mean[: high - low]) / self.std[: high - low]
        if self.shared:
            groups, length, width = panel.shared.shape
            flat = panel.shared.reshape(groups * length, width)
            shared = runs(flat, panel.groups[series] * length + position, self.steps)[:, :, self.shared]
            made[:, :, high:] = (shared - self.mean[high - low :]) / self.std[high - low :]
        return made

    def _calendar(self, stop: int) -> Floats:
        """Return calendar features of at least the first ``stop`` positions of the timeline, one row for each.

        They are cached, and computed again when a forecast needs positions past the end of the panel.
        """
        assert self.panel.timeline is not None
        if self._calendar_rows is None or len(self._calendar_rows) < stop:
            count = max(stop, int((self.panel.first + self.panel.rows).max()))
            self._calendar_rows = calendar_features(self.panel.timeline.local.stamps(0, count), self.calendar_names)
        return self._calendar_rows


def calendar_of(panel: Panel) -> list[str]:
    """Return the names of the calendar features that vary at the time step of a panel.

    Raises:
        UserError: for a panel without times.
    """
    if panel.timeline is None:
        raise UserError(
            f"{panel.folder}: data.calendar=true needs times, but the panel was prepared without them; prepare it with "
            "--time, or set data.calendar=false"
        )
    return calendar_names(panel.timeline.step)


def pack(array: NDArray[np.floating]) -> dict[str, Any]:
    """Encode an array for JSON: its "shape", and under "float64" or "float32" its little-endian bytes in base64."""
    raw = base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")
    return {"shape": list(array.shape), array.dtype.name: raw}


def unpack(saved: dict[str, Any]) -> NDArray[np.float64]:
    """Decode the result of :func:`pack`.

    Raises:
        ValueError: if the bytes do not match the shape.
    """
    kind = "float64" if "float64" in saved else "float32"
    raw = np.frombuffer(base64.b64decode(saved[kind], validate=True), dtype=np.dtype(kind).newbyteorder("<"))
    return raw.reshape(saved["shape"]).astype(np.float64)


#: Period (µs) of each feature. A feature is constant if the time step is a multiple of its period.
_PERIODS = {"second": UNITS["min"], "minute": UNITS["h"], "hour": UNITS["D"], "weekday": UNITS["W"]}
FEATURES = (*_PERIODS, "day", "yearday", "month")


def calendar_names(step: Step) -> list[str]:
    """Return the features that vary at a time step, such as hour, weekday, day, yearday and month for hourly data."""
    if step.months:
        return ["month"] if step.count % 12 else []
    length = step.count * UNITS["D"] if step.business else step.count
    return [name for name in FEATURES if name not in _PERIODS or length % _PERIODS[name]]


def calendar_features(stamps: Stamps, names: list[str]) -> NDArray[np.float32]:
    """Return features (T, len(names)) float32 of times (T,). Each feature is scaled to the range from -0.5 to 0.5."""
    us = stamps.astype("datetime64[us]")
    days, months, years = (us.astype(f"datetime64[{unit}]") for unit in "DMY")
    seconds = (us - days).astype(np.int64) // UNITS["s"]
    scaled = {
        "second": lambda: seconds % 60 / 59,
        "minute": lambda: seconds // 60 % 60 / 59,
        "hour": lambda: seconds // 3600 / 23,
        # 1970-01-01 was a Thursday; Monday is 0
        "weekday": lambda: (days.astype(np.int64) + 3) % 7 / 6,
        "day": lambda: (days - months).astype(np.int64) / 30,
        "yearday": lambda: (days - years).astype(np.int64) / 365,
        "month": lambda: months.astype(np.int64) % 12 / 11,
    }
    made = np.empty((len(stamps), len(names)), dtype=np.float32)
    for column, name in enumerate(names):
        made[:, column] = scaled[name]() - 0.5
    return made
