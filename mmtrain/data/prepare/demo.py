"""The two real data sets of the demo, which come from installed packages and need no network.

Digits: the 1,797 hand-written digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits", test set).
Traffic: hourly traffic on Interstate 94 with the weather, 17,520 hours from 2016-10-01 (UCI "Metro Interstate Traffic
Volume", Hogue 2019, CC BY 4.0, as shipped with the PyPI package AutoTS).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtrain.data.prepare.encode import Item, package_file, to_bytes
from mmtrain.data.prepare.images import stratify
from mmtrain.data.prepare.output import Origin, Prepared, existing
from mmtrain.data.prepare.writer import write_dataset
from mmtrain.data.series.files import read_frame
from mmtrain.data.series.order import regularity
from mmtrain.data.series.table import read_times
from mmtrain.errors import UserError, os_errors
from mmtrain.files import write_atomically

SOURCE = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
SHARD_SIZE = 150


def prepare_digits(out: str | Path, image_size: int = 32, *, force: bool = False) -> Prepared:
    """Write the digits as tar shards of grey PNGs, split 70/10/20 % within each class.

    The 8 × 8 scans are enlarged with a Lanczos filter. Needs scikit-learn (``pip install 'mmtrain[demo]'``).

    Args:
        out: folder to write.
        image_size: side of the images, in pixels.
        force: replace an existing folder.
    """
    from PIL import Image

    if image_size < 8:
        raise UserError(f"--image-size {image_size}: must be at least 8 pixels")
    out = Path(out).expanduser()
    settings = {"image_size": image_size}
    if (done := existing(out, Origin(SOURCE), settings, force=force)) is not None:
        return done
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"the digits are part of scikit-learn, which cannot be imported ({error}). Run pip install 'mmtrain[demo]'"
        ) from error
    digits = load_digits()
    items = []
    for scan, label in zip(digits.images, digits.target, strict=True):  # scan: (8, 8) float, 0..16
        image = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        large = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
        items.append(Item(int(label), content=to_bytes(large, None)))
    splits = stratify(Path(), items, val_fraction=0.1, test_fraction=0.2)
    classes = [str(name) for name in digits.target_names]
    return write_dataset(out, splits, classes, Origin(SOURCE), settings, shard_size=SHARD_SIZE, force=force)


COLUMNS = ("clouds_all", "rain_1h", "snow_1h", "temp", "traffic_volume")
_MEMBER = "datasets/data/traffic_hourly.zip"
_REINSTALL = "Run pip install 'AutoTS==1.0.4'"


@dataclass(frozen=True)
class TrafficReport:
    """Summary of the prepared traffic table."""

    file: Path
    rows: int
    holes: int  # hours without a measurement, filled by linear interpolation
    longest: int  # longest run of such hours
    outliers: dict[str, int]  # per column: values more than 8 standard deviations from the mean, which are kept
    fresh: bool  # False: the identical file existed already


def prepare_traffic(out: str | Path) -> TrafficReport:
    """Write OUT/traffic.csv with the columns ``date``, four weather columns, and ``traffic_volume``.

    Hours without a measurement are interpolated linearly and counted in the report. The data file of the package AutoTS
    must be installed.
    """
    import pandas as pd

    source = _locate()
    frame = read_frame(source)
    if missing := [name for name in ("datetime", *COLUMNS) if name not in frame.columns]:
        raise UserError(f"{source}: columns {', '.join(missing)} are missing. {_REINSTALL}")
    times = read_times(frame, source, "datetime")
    if times is None:
        raise UserError(f"{source}: the column datetime contains numbers, not dates. {_REINSTALL}")
    stamps = pd.Series(times[0])
    even = regularity(times[0])
    irregular = even.irregular + even.backward
    if even.duplicates or irregular or even.step != pd.Timedelta(1, unit="h"):
        raise UserError(f"{source}: {even.duplicates} repeated and {irregular} irregular timestamps. {_REINSTALL}")
    values = frame[list(COLUMNS)].astype("float64")
    empty = values.isna().any(axis=1)
    filled = values.interpolate(limit_direction="both")
    spread = (filled - filled.mean()).abs() > 8 * filled.std()
    outliers = {str(name): int(count) for name, count in spread.sum().items() if count}
    table = filled.round(4).assign(date=stamps.dt.strftime("%Y-%m-%d %H:%M:%S"))[["date", *COLUMNS]]
    runs = (empty != empty.shift()).cumsum()[empty].value_counts()
    longest = int(runs.max()) if len(runs) else 0
    file, text = Path(out).expanduser() / "traffic.csv", table.to_csv(index=False, lineterminator="\n")
    with os_errors(f"{file}: cannot be written", "give another --out"):
        fresh = not file.is_file() or file.read_text(encoding="utf-8") != text
        if fresh:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)
    return TrafficReport(file, len(table), int(np.count_nonzero(empty)), longest, outliers, fresh)


def _locate() -> Path:
    if (file := package_file("autots", _MEMBER)) is not None:  # importing the package would take seconds
        return file
    raise UserError(
        "the traffic data is part of the package AutoTS, which is not installed. Run pip install 'mmtrain[demo]' (or, "
        "for the data file alone, pip install --no-deps AutoTS==1.0.4)"
    )
