"""The two real data sets of the demo, from packages and without a network.

The 1,797 hand-written digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits", test part), and hourly
traffic on Interstate 94 with the weather, 17,520 hours from 2016-10-01 (UCI "Metro Interstate Traffic Volume", Hogue
2019, CC BY 4.0, as shipped with the PyPI package AutoTS).
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
    """Write the 8 × 8 scans, enlarged with Lanczos' filter, as grey PNGs in shards; split 70/10/20 % within each class.

    Needs scikit-learn (``pip install 'mmtrain[demo]'``), no network.
    """
    from PIL import Image

    if image_size < 8:
        raise UserError(f"--image-size {image_size}: 8 pixels or more")
    out = Path(out).expanduser()
    settings = {"image_size": image_size}
    if (done := existing(out, Origin(SOURCE), settings, force=force)) is not None:
        return done
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn: pip install 'mmtrain[demo]' ({error})") from error
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


@dataclass(frozen=True)
class TrafficReport:
    file: Path
    rows: int
    holes: int  # hours without a measurement, filled linearly between their neighbours
    longest: int  # longest run of such hours
    outliers: dict[str, int]  # values more than 8 standard deviations from the mean, left as they are
    fresh: bool  # False: the same file was there already


def prepare_traffic(out: str | Path) -> TrafficReport:
    """Write OUT/traffic.csv: ``date``, four weather columns, ``traffic_volume`` last.

    Hours without a measurement are filled linearly and counted in the report. Needs AutoTS (its file, not its code).
    """
    import pandas as pd

    source = _locate()
    frame = read_frame(source)
    if missing := [name for name in ("datetime", *COLUMNS) if name not in frame.columns]:
        raise UserError(f"{source}: columns {', '.join(missing)} are missing: pip install 'AutoTS==1.0.4'")
    times = read_times(frame, source, "datetime")
    if times is None:
        raise UserError(f"{source}: datetime holds numbers, not dates: pip install 'AutoTS==1.0.4'")
    stamps = pd.Series(times[0])
    even = regularity(times[0])
    irregular = even.irregular + even.backward
    if even.duplicates or irregular or even.step != pd.Timedelta(1, unit="h"):
        raise UserError(
            f"{source}: {even.duplicates} repeated and {irregular} irregular hours; pip install 'AutoTS==1.0.4'"
        )
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
    if (file := package_file("autots", _MEMBER)) is not None:  # to import it would take seconds
        return file
    raise UserError(
        "the traffic data comes with the package AutoTS, which is not installed here: pip install 'mmtrain[demo]' (its "
        "data file alone will do: pip install --no-deps AutoTS==1.0.4)"
    )
