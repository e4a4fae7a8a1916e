"""Writing a dataset of tar shards: OUT/{train,val,test}/shard-000000.tar, their indexes, and OUT/meta.json.

The same input gives the same bytes, whatever the number of workers and interruptions: order by hash, fixed times and
owners in the tars. Shards that were finished before an interruption are checked and kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mmtrain.data.core.order import mix64
from mmtrain.data.images.tar_index import index_shard
from mmtrain.data.prepare.encode import (
    BadSample,
    ClassEncoder,
    Encoder,
    Finished,
    Item,
    Ledger,
    recipe_digest,
    sources_digest,
)
from mmtrain.data.prepare.output import complete_or_absent, existing_meta
from mmtrain.data.prepare.pool import progress, run_jobs
from mmtrain.errors import UserError

FORMAT = 1
logger = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Prepared:
    out: Path
    meta: dict[str, Any]
    fresh: bool  # False: it was there already


class _Job(NamedTuple):
    folder: Path
    name: str  # of the shard, below the folder
    first: int  # number of the first sample in its split
    items: list[Item]
    encoder: Encoder
    skip_bad: bool
    known: Finished | None  # what an earlier process wrote down of it


def existing(out: Path, source: str, settings: Mapping[str, Any], *, force: bool) -> Prepared | None:
    """The dataset at ``out`` if it is complete and was made from the same source with the same settings."""
    meta = existing_meta(out, source, settings, {"format": FORMAT}, force=force)
    return None if meta is None else Prepared(out, meta, fresh=False)


def write_dataset(
    out: Path,
    splits: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    source: str,
    settings: Mapping[str, Any],
    *,
    shard_size: int,
    encoder: Encoder | None = None,
    workers: int | None = 1,
    force: bool = False,
    keep: bool = False,
    skip_bad: bool = False,
    further: Mapping[str, Any] | None = None,
    summarise: Callable[[Mapping[str, Mapping[str, int]]], Mapping[str, Any]] | None = None,
) -> Prepared:
    """Write all splits beside ``out``, then rename. Items are shuffled, so that shards mix the classes.

    ``encoder``: makes the members of a sample (None: the image and its class). ``workers``: processes (None: one per
    core, at most 8). ``keep``: finished shards stay after an error, as they do after an interruption. ``skip_bad``:
    leave out items that cannot be used, and list them in OUT/skipped.txt. ``further``: more of meta.json, to which
    ``summarise`` adds what it makes of the encoder's counts for each split.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: samples in a shard, 1 or more")
    workers = min(8, os.cpu_count() or 1) if workers is None else max(1, workers)
    recipe = recipe_digest(source, {**settings, "format": FORMAT}, splits)
    with complete_or_absent(out, force=force, recipe=recipe, keep=keep) as part:
        ledger = Ledger(part)
        known = ledger.read()
        jobs = [
            job
            for split, items in splits.items()
            for job in _jobs(part, split, items, shard_size, encoder or ClassEncoder(), skip_bad, known)
        ]
        if known:
            logger.info("%s: goes on; %d of %d shards were finished before", out, len(known), len(jobs))
        done = _write_all(jobs, workers, ledger, known, f"writing {out.name}")
        ledger.path.unlink(missing_ok=True)
        skipped = [entry for job in jobs for entry in done[job.name].skipped]
        meta = {
            "classes": list(classes),
            "counts": {split: _samples(split, jobs, done) for split in splits},
            "source": source,
            "settings": dict(settings),
            "format": FORMAT,
            **(further or {}),
            **(summarise(_counts(splits, jobs, done)) if summarise is not None else {}),
        }
        if skipped:
            meta["skipped"] = len(skipped)
            _write_text(part / "skipped.txt", "".join(f"{path}: {reason}\n" for path, reason in skipped))
        _write_text(part / "meta.json", json.dumps(meta, indent=1) + "\n")
    return Prepared(out, meta, fresh=True)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _counts(splits: Iterable[str], jobs: list[_Job], done: Mapping[str, Finished]) -> dict[str, dict[str, int]]:
    totals: dict[str, Counter[str]] = {split: Counter() for split in splits}
    for job in jobs:
        totals[job.name.partition("/")[0]].update(done[job.name].counts)
    by_number = {split: sorted(total, key=lambda key: (len(key), key)) for split, total in totals.items()}
    return {split: {key: totals[split][key] for key in keys} for split, keys in by_number.items()}


def _samples(split: str, jobs: list[_Job], done: Mapping[str, Finished]) -> int:
    return sum(done[job.name].samples for job in jobs if job.name.startswith(f"{split}/"))


def _jobs(
    part: Path,
    split: str,
    items: Sequence[Item],
    shard_size: int,
    encoder: Encoder,
    skip_bad: bool,
    known: Mapping[str, Finished],
) -> Iterator[_Job]:
    (part / split).mkdir(exist_ok=True)
    order = np.argsort(mix64(0, np.arange(len(items))), kind="stable").tolist()
    # Shards of nearly equal size: no last one with a handful of samples.
    parts = np.array_split(np.array(order, dtype=np.int64), max(1, -(-len(items) // shard_size)))
    first = 0
    for number, places in enumerate(parts):
        name = f"{split}/shard-{number:06d}.tar"
        yield _Job(part, name, first, [items[place] for place in places], encoder, skip_bad, known.get(name))
        first += len(places)


def _write_all(
    jobs: list[_Job], workers: int, ledger: Ledger, known: Mapping[str, Finished], title: str
) -> dict[str, Finished]:
    done: dict[str, Finished] = {}
    with progress(title, sum(len(job.items) for job in jobs)) as advance:
        for entry in run_jobs(_write_shard, jobs, workers, ordered=False):
            done[entry.name] = entry
            fresh = entry != known.get(entry.name)
            if fresh:
                ledger.add(entry)
            advance(entry.samples + len(entry.skipped), fresh=fresh)
    return done


def _write_shard(job: _Job) -> Finished:
    """Write one shard, or keep the one that is there if it is what was written down."""
    complete = job.known is not None and (job.skip_bad or not job.known.skipped)
    if job.known is not None and complete and job.known.holds(job.folder, job.items):
        if job.known.size and job.encoder.labelled:
            index_shard(job.folder / job.name)
        return job.known
    sources = sources_digest(job.items)
    target = job.folder / job.name
    part = target.with_name(f"{target.name}.part")
    skipped: list[list[str]] = []
    counts: Counter[str] = Counter()
    with open(part, "wb") as stream:
        hashed = _Hashed(stream)
        _fill(hashed, job, skipped, counts)
        stream.flush()
        os.fsync(stream.fileno())
    samples = len(job.items) - len(skipped)
    if not samples:
        part.unlink()
        target.unlink(missing_ok=True)
        return Finished(job.name, 0, "", sources, 0, skipped)
    os.replace(part, target)
    if job.encoder.labelled:
        index_shard(target)
    return Finished(job.name, hashed.size, hashed.sha256.hexdigest(), sources, samples, skipped, dict(counts))


def _fill(stream: _Hashed, job: _Job, skipped: list[list[str]], counts: Counter[str]) -> None:
    from webdataset.writer import TarWriter

    with TarWriter(stream, user="mmtrain", group="mmtrain", mtime=0, encoder=False) as tar:
        for number, item in enumerate(job.items, job.first):
            try:
                members, found = job.encoder(item)
            except BadSample as error:
                if not job.skip_bad:
                    raise
                skipped.append([error.path, error.reason])
                continue
            # A skipped sample leaves a gap: the others keep their keys.
            tar.write({"__key__": f"{number:08d}", **members})
            counts.update(found)


class _Hashed:
    """A stream that knows the size and the SHA-256 of what went through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.size, self.sha256 = stream, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self.sha256.update(content)
        return self.stream.write(content)
