"""Measure the speed and memory of the data pipelines and compare them with their targets.

    python benchmarks/data.py [--only images,memory,windows,share,panel,ffcv] [--images FOLDER] [--series FOLDER]
                              [--m5 FOLDER] [--json FILE] [--smoke]

Ratios are medians of alternating measurements. Comparisons of several processes use processor time. Synthetic data
replaces data that is not given. A missed target is reported but does not change the exit status, which is 0.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from data_parts import images, memory, series
from trainer_parts.figure import Figure, measure_parts


def parts(given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Iterator[Figure]]]:
    """Return the measurements by name. Each one starts when it is called."""
    smoke = given.smoke

    def ffcv() -> Iterator[Figure]:
        if importlib.util.find_spec("ffcv") is None:
            print("ffcv is skipped, because it is not installed (see docs/install.md)", flush=True)
            return
        from data_parts import ffcv_part

        sizes = {"pairs": 2, "count": 16, "batch": 8} if smoke else {"pairs": given.rounds, "count": given.count}
        yield from ffcv_part.measure(folder / "ffcv", images=given.images, threads=given.workers, **sizes)

    return {
        "images": lambda: images.measure(
            folder / "images",
            source=given.images,
            count=128 if smoke else given.count,
            rounds=1 if smoke else given.rounds,
            workers=1 if smoke else given.workers,
        ),
        "memory": lambda: memory.measure(
            folder / "memory",
            samples=2000 if smoke else 1_281_167,
            shards=4 if smoke else 1282,
            epoch=64 if smoke else 1024,
        ),
        **series.parts(folder / "series", tiny=smoke, data=given.series, m5=given.m5),
        "ffcv": ffcv,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="parts to measure: images, memory, windows, share, panel, ffcv")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of images to enlarge, such as Tiny-ImageNet"
    )
    parser.add_argument("--series", type=Path, metavar="FOLDER", help="folder with ETTh1.parquet")
    parser.add_argument("--m5", type=Path, metavar="FOLDER", help="folder with M5's three files")
    parser.add_argument("--count", type=int, default=2048, help="images per epoch, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as JSON")
    parser.add_argument(
        "--smoke", action="store_true", help="use tiny sizes to check that it runs; the figures have no meaning"
    )
    given = parser.parse_args()
    measure_parts(parser, given, lambda folder: parts(given, folder), "Data pipelines and their targets")


if __name__ == "__main__":
    main()
