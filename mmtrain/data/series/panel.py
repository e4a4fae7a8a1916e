"""A prepared panel: many series of any lengths in memory-mapped shards, opened without reading them.

The folder holds meta.json, shards values-00000.npy, ... (rows, C) float32, the rows of whole series one after the
other (NaN where a value is missing), shards known-00000.npy, ... (rows, K) of what is known of each series in advance,
and one array a file for the rest. Shards in which float32 would lose what changes are float64. No file holds a pickle,
and no name in meta.json is a path.
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
    """S series; ``ids`` (S,); ``columns``: the C target columns.

    Series s has ``lengths[s]`` rows with targets, and ``rows[s] - lengths[s]`` more in which only the known columns
    hold anything. Its row 0 lies at place ``first[s]`` of ``timeline`` (None: without times). ``shared`` (G, T, K2):
    what is known of the places of the timeline, for each of G groups of series; ``groups`` (S,). ``statics``: for each
    static column (S,) float32, or int32 codes of ``categories``.
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
    zone: str | None  # the time zone of the files; times are in UTC then
    shard_series: Int64s = field(repr=False)  # (shards,) series in each shard

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def shards(self) -> Int64s:
        """(S,) the shard of each series."""
        return np.repeat(np.arange(len(self.shard_series)), self.shard_series)

    @cached_property
    def offsets(self) -> Int64s:
        """(S,) the first row of each series in its shard."""
        ends = np.cumsum(self.rows)
        starts = np.concatenate([[0], np.cumsum(self.shard_series)[:-1]])
        before = np.concatenate([[0], ends])[starts]
        return ends - self.rows - before[self.shards]

    def series(self, number: int) -> Numbers:
        """Values (T, C) of a series, NaN where missing: a view of the file."""
        offset = int(self.offsets[number])
        return self.values[self.shards[number]][offset : offset + int(self.lengths[number])]

    def stamps(self, number: int, start: int, stop: int) -> Stamps | None:
        """Times of the rows [start, stop) of a series, or None for a panel without times; rows may lie beyond it."""
        if self.timeline is None:
            return None
        return self.timeline.stamps(int(self.first[number]) + start, stop - start)

    def gather(self, arrays: Sequence[Numbers], series: Int64s, start: Int64s, length: int) -> Numbers:
        """(B, length, C): rows [start, start + length) of each series (B,) from ``values`` or ``known``."""
        shards = self.shards[series]
        used = np.unique(shards).tolist()
        dtype = np.result_type(np.float32, *(arrays[shard] for shard in used))
        made = np.empty((len(series), length, arrays[0].shape[1]), dtype=dtype)
        for shard in used:
            mine = np.flatnonzero(shards == shard)
            made[mine] = runs(arrays[shard], self.offsets[series[mine]] + start[mine], length)
        return made

    def chunks(self, rows: int = 1 << 20) -> Iterator[slice]:
        """Consecutive series of about ``rows`` rows together, each chunk within one shard."""
        begin, end = 0, 0
        for count in self.shard_series.tolist():
            end += count
            while begin < end:
                total = np.cumsum(self.rows[begin:end])
                stop = begin + max(1, int(np.searchsorted(total, rows, side="right")))
                yield slice(begin, stop)
                begin = stop

    def heads(self, arrays: Sequence[Numbers], chunk: slice, counts: Int64s) -> Numbers:
        """The first ``counts`` (n,) rows of each series of a chunk, one series after the other.

        The pages that were read stay in the system's cache, but not in this process.
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
    """Whether ``path`` looks like a prepared panel."""
    return path.is_dir() and (path / "meta.json").is_file()


def find_panel(name: str | Path, root: str | Path | None = None) -> Path:
    """The folder of a panel: a path, or a name in ``root`` (default: the environment variable MMTRAIN_DATA)."""
    path = Path(name).expanduser()
    places = [path]
    folder = root or os.environ.get("MMTRAIN_DATA")
    if folder and not path.is_absolute():
        places.append(Path(folder).expanduser() / path)
    for place in places:
        if is_panel(place):
            return place
    raw = next((place for place in places if str(name) and place.exists()), None)
    if raw is not None:
        raise UserError(
            f"{raw}: not a prepared panel; make one: mmtrain data prepare panel --root {raw} --out FOLDER, and set "
            "data.path=FOLDER"
        )
    raise UserError(
        f"data.path={name}: there is no such prepared panel (looked for {' and '.join(str(p) for p in places)}); make "
        "one with mmtrain data prepare panel (or m5)"
    )


def open_panel(folder: str | Path) -> Panel:
    """Open what ``mmtrain data prepare panel`` wrote; the shards stay on disk.

    Raises:
        UserError: for a folder that is not one, of another format, or with files that do not fit together.
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
        raise UserError(f"{folder / 'meta.json'}: not that of a panel ({error!r}); {_CURE}") from error
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
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not the meta.json of a prepared panel ({error})") from error
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise UserError(f"{file}: not the meta.json of a prepared panel; make one with mmtrain data prepare panel")
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder}: a panel of format {meta.get('format')}, not {FORMAT}: {_CURE}")
    return meta


def load_array(file: Path, mapped: bool = False) -> NDArray[Any]:
    """An array of a panel, ``mapped`` into memory or read.

    Raises:
        UserError: for a file that is missing or damaged.
    """
    try:
        found = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {_CURE}") from error
    return np.asarray(found)  # a memory map as a plain array, which is indexed faster


def _check(panel: Panel) -> None:
    """Every window must lie where the arrays say: what does not fit is found here, not in the middle of a run."""
    count = len(panel.ids)
    per_series = {"lengths": panel.lengths, "rows": panel.rows, "first": panel.first, "groups": panel.groups}
    for name, array in {**per_series, **panel.statics}.items():
        _need(panel, array.shape == (count,), f"{name} has shape {array.shape}, not ({count},)")
    fits = int(panel.shard_series.sum()) == count and len(panel.shard_series) == len(panel.values)
    _need(panel, fits, "shards.npy does not add up to the series and shards")
    _need(panel, bool((panel.lengths <= panel.rows).all() and (panel.lengths >= 0).all()), "lengths and rows disagree")
    _need(panel, count > 0 and bool((panel.shard_series > 0).all()), "there is a shard without a series")
    wanted = np.add.reduceat(panel.rows, np.cumsum(panel.shard_series) - panel.shard_series)
    kinds: Sequence[tuple[str, list[Numbers], int]] = (
        ("values", panel.values, len(panel.columns)),
        ("known", panel.known, len(panel.known_columns)),
    )
    for name, arrays, width in kinds:
        for number, array in enumerate(arrays):
            shape = (int(wanted[number]), width)
            fits = array.shape == shape and array.dtype in (np.float32, np.float64)
            _need(panel, fits, f"{name}-{number:05d}.npy holds {array.dtype} {array.shape}, not float32 {shape}")
    _need(panel, panel.shared.ndim == 3, f"shared.npy has shape {panel.shared.shape}")
    groups, places, width = panel.shared.shape
    last = int((panel.first + panel.rows).max())
    fits = width == len(panel.shared_columns) and (not width or (places >= last and int(panel.groups.max()) < groups))
    _need(panel, fits, f"shared.npy has shape {panel.shared.shape}")
    _need(panel, int(min(panel.first.min(), panel.groups.min())) >= 0, "first or groups below 0")


def _need(panel: Panel, condition: bool, fault: str) -> None:
    if not condition:
        raise UserError(f"{panel.folder}: {fault}; {_CURE}")
