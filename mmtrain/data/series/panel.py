"""Prepared panels: many series of any length in memory-mapped shards, which are opened without reading them.

A panel is a folder with these files:

- meta.json, which describes the panel;
- shards values-00000.npy, ... (rows, C): the targets of whole series, one series after another, NaN where missing;
- shards known-00000.npy, ... (rows, K): the covariates of each series that are known in advance;
- one .npy file for each other array.

Shards are float32, or float64 where float32 would lose changes of the values. No file contains a pickle, and no name
in meta.json is used as a path.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.timeline import Stamps, Timeline
from mmtrain.data.series.times import shown
from mmtrain.data.series.windows import Int64s, Numbers, runs
from mmtrain.errors import UserError

FORMAT = 1
KIND = "panel"
_CURE = "prepare it again (mmtrain data prepare panel --force)"


@dataclass(frozen=True)
class Panel:
    """A panel of S series.

    Series s has ``lengths[s]`` rows with targets, followed by ``rows[s] - lengths[s]`` rows with known columns only.
    Its row 0 is at position ``first[s]`` of ``timeline``.

    Attributes:
        ids: (S,) names of the series.
        values, known: one array for each shard.
        shared: (G, T, K2) covariates known at each position of the timeline, for each of G groups of series.
        groups: (S,) the group of each series.
        statics: for each static column (S,) numbers, or int32 codes that index ``categories`` of the column.
        columns: names of the C target columns.
        timeline: None for a panel without times.
        holes: number of missing values.
        zone: time zone of the files; the times are in UTC then.
        shard_series: (shards,) number of series in each shard.
    """

    folder: Path
    meta: dict[str, Any]
    ids: NDArray[np.str_]
    lengths: Int64s
    rows: Int64s
    first: Int64s
    values: list[Numbers]
    known: list[Numbers]
    shared: Numbers
    groups: Int64s
    statics: dict[str, NDArray[Any]]
    columns: list[str]
    known_columns: list[str]
    shared_columns: list[str]
    categories: dict[str, list[str]]
    timeline: Timeline | None
    holes: int
    zone: str | None
    shard_series: Int64s = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def shards(self) -> Int64s:
        """(S,) Shard of each series."""
        return np.repeat(np.arange(len(self.shard_series)), self.shard_series)

    @cached_property
    def offsets(self) -> Int64s:
        """(S,) First row of each series in its shard."""
        ends = np.cumsum(self.rows)
        starts = np.concatenate([[0], np.cumsum(self.shard_series)[:-1]])
        before = np.concatenate([[0], ends])[starts]
        return ends - self.rows - before[self.shards]

    def series(self, number: int) -> Numbers:
        """Return the values (T, C) of a series as a view of the file; NaN where missing."""
        offset = int(self.offsets[number])
        return self.values[self.shards[number]][offset : offset + int(self.lengths[number])]

    def stamps(self, number: int, start: int, stop: int) -> Stamps | None:
        """Return the times of rows [start, stop) of a series, which may extend past its end; None without times."""
        if self.timeline is None:
            return None
        return self.timeline.stamps(int(self.first[number]) + start, stop - start)

    def gather(self, arrays: Sequence[Numbers], series: Int64s, start: Int64s, length: int) -> Numbers:
        """Return rows [start, start + length) of each series (B,) as (B, length, C).

        Args:
            arrays: ``values`` or ``known``.
        """
        shards = self.shards[series]
        used = np.unique(shards).tolist()
        dtype = np.result_type(np.float32, *(arrays[shard] for shard in used))
        made = np.empty((len(series), length, arrays[0].shape[1]), dtype=dtype)
        for shard in used:
            inside = np.flatnonzero(shards == shard)
            made[inside] = runs(arrays[shard], self.offsets[series[inside]] + start[inside], length)
        return made

    def chunks(self, rows: int = 1 << 20) -> Iterator[slice]:
        """Yield slices of consecutive series with about ``rows`` rows in total, each within one shard."""
        begin, end = 0, 0
        for count in self.shard_series.tolist():
            end += count
            while begin < end:
                total = np.cumsum(self.rows[begin:end])
                stop = begin + max(1, int(np.searchsorted(total, rows, side="right")))
                yield slice(begin, stop)
                begin = stop

    def heads(self, arrays: Sequence[Numbers], chunk: slice, counts: Int64s) -> Numbers:
        """Return the first ``counts`` (n,) rows of each series of a chunk, concatenated.

        The memory pages that were read are released from this process, but stay in the system's page cache.
        """
        whole, offset, rows = arrays[self.shards[chunk.start]], int(self.offsets[chunk.start]), self.rows[chunk]
        stop = offset + int(rows.sum())
        row = np.arange(stop - offset) - np.repeat(np.cumsum(rows) - rows, rows)
        found = whole[offset:stop][row < np.repeat(counts, rows)]
        base: Any = whole
        while base is not None and not isinstance(base, mmap.mmap):
            base = getattr(base, "base", None)
        if base is not None and hasattr(base, "madvise"):
            base.madvise(mmap.MADV_DONTNEED)
        return found


def is_panel(path: Path) -> bool:
    """Return whether ``path`` looks like the folder of a prepared panel."""
    return path.is_dir() and (path / "meta.json").is_file()


def find_panel(name: str | Path, root: str | Path | None = None) -> Path:
    """Return the folder of a panel.

    Args:
        name: a path, or a name in ``root``.
        root: default: the environment variable MMTRAIN_DATA.

    Raises:
        UserError: if there is no such panel.
    """
    path = Path(name).expanduser()
    candidates = [path]
    folder = root or os.environ.get("MMTRAIN_DATA")
    if folder and not path.is_absolute():
        candidates.append(Path(folder).expanduser() / path)
    for candidate in candidates:
        if is_panel(candidate):
            return candidate
    raw = next((candidate for candidate in candidates if str(name) and candidate.exists()), None)
    if raw is not None:
        raise UserError(
            f"{raw}: not a prepared panel; run mmtrain data prepare panel --root {raw} --out FOLDER, and set "
            "data.path=FOLDER"
        )
    raise UserError(
        f"data.path={name}: no such prepared panel (looked for {' and '.join(str(p) for p in candidates)}); prepare "
        "one with mmtrain data prepare panel (or m5)"
    )


def open_panel(folder: str | Path) -> Panel:
    """Open a panel that ``mmtrain data prepare panel`` wrote; the shards stay on disk.

    Raises:
        UserError: if the folder is not a panel, has another format version, or its files do not match each other.
    """
    folder = Path(folder)
    meta = _meta(folder)
    try:
        names = {key: [str(name) for name in meta[key]] for key in ("columns", "known", "shared", "static")}
        shards = int(meta["shards"])
        timeline = None
        if (saved := meta["timeline"]) is not None:
            timeline = Timeline.from_json(saved)
        categories = {str(k): [str(c) for c in v] for k, v in meta["categories"].items()}
        holes = int(meta["holes"])
        if (zone := meta.get("zone")) is not None:
            shown(np.zeros(1, "datetime64[us]"), zone)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'meta.json'}: not the meta.json of a prepared panel ({error!r}); {_CURE}"
        ) from error
    panel = Panel(
        folder=folder,
        meta=meta,
        **{name: load_array(folder / f"{name}.npy") for name in ("ids", "lengths", "rows", "first", "groups")},
        values=[load_array(folder / f"values-{n:05d}.npy", mapped=True) for n in range(shards)],
        known=[load_array(folder / f"known-{n:05d}.npy", mapped=True) for n in range(shards if names["known"] else 0)],
        shared=load_array(folder / "shared.npy", mapped=True),
        statics={name: load_array(folder / f"static-{n:03d}.npy") for n, name in enumerate(names["static"])},
        columns=names["columns"],
        known_columns=names["known"],
        shared_columns=names["shared"],
        categories=categories,
        timeline=timeline,
        holes=holes,
        zone=zone,
        shard_series=load_array(folder / "shards.npy"),
    )
    _check(panel)
    return panel


def _meta(folder: Path) -> dict[str, Any]:
    """Read meta.json and check kind and format of the panel."""
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not the meta.json of a prepared panel ({error}); {_CURE}") from error
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise UserError(f"{file}: not the meta.json of a prepared panel; prepare one with mmtrain data prepare panel")
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder}: the panel has format {meta.get('format')}, but format {FORMAT} is needed; {_CURE}")
    return meta


def load_array(file: Path, mapped: bool = False) -> NDArray[Any]:
    """Read an array of a panel, or map it into memory if ``mapped``.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        found = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {_CURE}") from error
    return np.asarray(found)  # plain arrays are indexed faster than np.memmap


def _check(panel: Panel) -> None:
    """Raise UserError if sizes and positions of the arrays disagree, so that no window fails during a run."""
    count = len(panel.ids)
    per_series = {"lengths": panel.lengths, "rows": panel.rows, "first": panel.first, "groups": panel.groups}
    for name, array in {**per_series, **panel.statics}.items():
        _need(panel, array.shape == (count,), f"the array {name} has shape {array.shape}, not ({count},)")
    fits = int(panel.shard_series.sum()) == count and len(panel.shard_series) == len(panel.values)
    _need(panel, fits, "shards.npy does not match the number of series and shards")
    fits = bool((panel.lengths <= panel.rows).all() and (panel.lengths >= 0).all())
    _need(panel, fits, "lengths.npy and rows.npy do not match")
    _need(panel, count > 0 and bool((panel.shard_series > 0).all()), "a shard has no series")
    wanted = np.add.reduceat(panel.rows, np.cumsum(panel.shard_series) - panel.shard_series)
    kinds: Sequence[tuple[str, list[Numbers], int]] = (
        ("values", panel.values, len(panel.columns)),
        ("known", panel.known, len(panel.known_columns)),
    )
    for name, arrays, width in kinds:
        for number, array in enumerate(arrays):
            shape = (int(wanted[number]), width)
            fits = array.shape == shape and array.dtype in (np.float32, np.float64)
            fault = f"{name}-{number:05d}.npy is {array.dtype} {array.shape}, not float32 or float64 {shape}"
            _need(panel, fits, fault)
    _need(panel, panel.shared.ndim == 3, f"shared.npy has shape {panel.shared.shape}, not three dimensions")
    groups, length, width = panel.shared.shape
    last = int((panel.first + panel.rows).max())
    fits = width == len(panel.shared_columns) and (not width or (length >= last and int(panel.groups.max()) < groups))
    _need(panel, fits, f"shared.npy has shape {panel.shared.shape}, too small for the series and columns of the panel")
    _need(panel, int(min(panel.first.min(), panel.groups.min())) >= 0, "first.npy or groups.npy has a value below 0")


def _need(panel: Panel, condition: bool, fault: str) -> None:
    """Raise UserError with ``fault`` unless ``condition`` is true."""
    if not condition:
        raise UserError(f"{panel.folder}: {fault}; {_CURE}")
