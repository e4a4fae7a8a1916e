"""Memory of the image loader: over three epochs, and with the index of 1.28 million samples in eight workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from trainer_parts.figure import Figure

from data_parts.photos import make_images
from mmtrain.data.images.tar_index import ShardIndex, index_path, write_index
from mmtrain.data.prepare.output import Origin
from mmtrain.data.prepare.writer import Item, write_dataset

PART = "memory"
_MIB = 1 << 20


def measure(folder: Path, *, samples: int, shards: int, epoch: int) -> Iterator[Figure]:
    """Yield the growth over epochs of ``epoch`` images, and the memory of an index of ``samples`` in ``shards``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make_images(min(epoch, 64))
    items = [Item(0, content=files[number % len(files)]) for number in range(epoch)]
    small = (
        write_dataset(folder / "small", {"train": items}, ["0"], Origin("benchmark"), {}, shard_size=128).out / "train"
    )
    found = _in_its_own_process("epochs", small, epoch, 2)
    growth = (found["rss"][-1] - found["rss"][0]) / (len(found["rss"]) - 1) / _MIB
    yield Figure(
        PART,
        "growth of the training process per epoch",
        growth,
        "MiB",
        f"resident memory after each of {len(found['rss'])} epochs of {epoch} photos, 2 workers: "
        f"{', '.join(f'{rss / _MIB:.0f}' for rss in found['rss'])} MiB; after the first one",
        target=2.0,
    )
    large = _large_index(folder / "large", files[0], samples, shards)
    found, alone = (_in_its_own_process("index", path, 64, 8) for path in (large, small))
    yield Figure(
        PART,
        f"an index of {samples:,} samples, in 8 workers",
        found["pss"] / _MIB,
        "MiB",
        f"proportional set size of the training process and its 8 workers after {found['batches']} batches; with "
        f"{epoch} samples: {alone['pss'] / _MIB:.0f} MiB",
        target=1024,
    )
    yield Figure(
        PART,
        "seconds to the first batch in the middle of an epoch of them",
        found["seek"],
        "s",
        f"{samples:,} samples in {shards:,} shards, no workers, indexes read before",
        target=1.0,
    )


def _large_index(folder: Path, photo: bytes, samples: int, shards: int) -> Path:
    """Write sparse shards that contain one photo, with indexes of ``samples`` samples that all refer to it."""
    folder.mkdir(parents=True, exist_ok=True)
    each = samples // shards
    for number in range(shards):
        path = folder / f"shard-{number:06d}.tar"
        with open(path, "wb") as stream:
            stream.write(bytes(512) + photo)
            stream.truncate(each * 110_000)
        stat = path.stat()
        count = each + (samples % shards if number == 0 else 0)
        index = ShardIndex(
            path,
            np.array([f"{number * each + sample:08d}" for sample in range(count)]),
            np.full(count, 512, np.int64),
            np.full(count, len(photo), np.int64),
            np.arange(count, dtype=np.int64) % 1000,
            bytes=stat.st_size,
            changed=stat.st_mtime_ns,
        )
        write_index(index, index_path(path))
    return folder


def _in_its_own_process(what: str, folder: Path, count: int, workers: int) -> dict:
    command = [sys.executable, "-m", "data_parts.memory", what, str(folder), str(count), str(workers)]
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(here), str(here.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _main(what: str, folder: Path, count: int, workers: int) -> None:
    from mmtrain.data.core.loader import train_batches
    from mmtrain.data.images.shards import ImageShards

    mean, std = [0.5] * 3, [0.25] * 3
    source = ImageShards(folder, image_size=224, train=True, augment="crop", mean=mean, std=std)
    if what == "epochs":
        steps, rss = count // 32, []
        batches = train_batches(source, seed=0, batch_size=32, start=0, steps=4 * steps, workers=workers)
        for number, _ in enumerate(batches, 1):
            if number % steps == 0:
                rss.append(_status(os.getpid(), "status", "VmRSS"))
        print(json.dumps({"rss": rss[1:]}))
        return
    begun = time.perf_counter()
    middle = len(source) // 2
    next(train_batches(source, seed=0, batch_size=8, start=middle, steps=1))
    seek = time.perf_counter() - begun
    batches = train_batches(source, seed=0, batch_size=8, start=middle, steps=count, workers=workers)
    for number, _ in enumerate(batches, 1):
        if number == count // 2:
            processes = [os.getpid(), *_children()]
            pss = sum(_status(process, "smaps_rollup", "Pss") for process in processes)
    print(json.dumps({"pss": pss, "seek": seek, "batches": count // 2}))


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _status(process: int, file: str, field: str) -> int:
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
