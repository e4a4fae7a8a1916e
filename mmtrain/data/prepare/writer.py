"""Write a dataset of tar shards: OUT/{train,val,test}/shard-000000.tar, their indexes, and OUT/meta.json.

The same input gives identical files, whatever the number of workers and interruptions: samples are ordered by hash, and
times and owners in the tars are fixed. Shards finished before an interruption are recorded, checked and reused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mmtrain.data.core.order import mix64
from mmtrain.data.images.tar_index import index_shard
from mmtrain.data.prepare.encode import BadSample, ClassEncoder, Encoder, Item
from mmtrain.data.prepare.output import FORMAT, Origin, Prepared, prepared_folder, write_meta
from mmtrain.data.prepare.pool import progress, run_jobs
from mmtrain.errors import UserError, os_errors
from mmtrain.files import append_json_line, read_json_lines, write_atomically
from mmtrain.log import logger


class _Job(NamedTuple):
    """One shard to write."""

    folder: Path
    name: str  # path of the shard in the folder
    first: int  # number of its first sample in the split
    items: list[Item]
    encoder: Encoder
    skip_bad: bool
    known: Finished | None  # record of an earlier process


def write_dataset(
    out: Path,
    splits: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    origin: Origin,
    settings: Mapping[str, Any],
    *,
    shard_size: int,
    encoder: Encoder | None = None,
    workers: int | None = 1,
    force: bool = False,
    keep: bool = False,
    skip_bad: bool = False,
    summarise: Callable[[Mapping[str, Mapping[str, int]]], Mapping[str, Any]] | None = None,
) -> Prepared:
    """Write all splits to a temporary folder and rename it to ``out``. Items are shuffled, so that shards mix classes.

    Args:
        shard_size: most samples in a shard.
        encoder: creates the members of a sample; None: the image and its class.
        workers: number of processes; None: one per core, at most 8.
        force: replace an existing ``out``.
        keep: keep finished shards after an error too, not only after an interruption.
        skip_bad: leave out items that cannot be used, and list them in OUT/skipped.txt.
        summarise: function that returns more entries of meta.json from the encoder's counts for each split.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: must be at least 1 (samples in a shard)")
    encoder = encoder or ClassEncoder()
    recipe = recipe_digest(origin.name, {**settings, "format": FORMAT}, splits)
    with prepared_folder(out, force=force, recipe=recipe, keep=keep) as part:
        ledger = Ledger(part)
        known, jobs = ledger.read(), []
        for split, items in splits.items():
            (part / split).mkdir(exist_ok=True)
            order = np.argsort(mix64(0, np.arange(len(items))), kind="stable")
            first = 0
            # Shards get nearly equal sizes, which avoids a last one with very few samples.
            for number, indices in enumerate(np.array_split(order, max(1, -(-len(items) // shard_size)))):
                name, some = f"{split}/shard-{number:06d}.tar", [items[index] for index in indices.tolist()]
                jobs.append(_Job(part, name, first, some, encoder, skip_bad, known.get(name)))
                first += len(some)
        if known:
            logger.info("%s: resuming; %d of %d shards were finished before", out, len(known), len(jobs))
        done: dict[str, Finished] = {}
        with progress(f"writing {out.name}", sum(len(job.items) for job in jobs)) as advance:
            for entry in run_jobs(_write_shard, jobs, workers, ordered=False):
                done[entry.name] = entry
                fresh = entry != known.get(entry.name)
                if fresh:
                    ledger.add(entry)
                advance(entry.samples + len(entry.skipped), fresh=fresh)
        ledger.path.unlink(missing_ok=True)
        of_split = {split: [done[job.name] for job in jobs if job.name.startswith(f"{split}/")] for split in splits}
        meta = {
            "classes": list(classes),
            "counts": {split: sum(entry.samples for entry in entries) for split, entries in of_split.items()},
            **origin.to_meta(),
            "settings": dict(settings),
            "format": FORMAT,
        }
        if summarise is not None:
            meta |= summarise({split: _summed(entries) for split, entries in of_split.items()})
        if skipped := [f"{path}: {reason}\n" for job in jobs for path, reason in done[job.name].skipped]:
            meta["skipped"] = len(skipped)
            write_atomically(part / "skipped.txt", "".join(skipped), durable=True)
        write_meta(part, meta)
    return Prepared(out, meta, fresh=True)


def _summed(entries: Sequence[Finished]) -> dict[str, int]:
    """Add up the encoder's counts over the shards of a split, sorted by key."""
    total: Counter[str] = Counter()
    for entry in entries:
        total.update(entry.counts)
    return {key: total[key] for key in sorted(total, key=lambda key: (len(key), key))}


def _write_shard(job: _Job) -> Finished:
    """Write one shard, or reuse the existing one if it matches its record."""
    complete = job.known is not None and (job.skip_bad or not job.known.skipped)
    if job.known is not None and complete and job.known.matches(job.folder, job.items):
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
    """Write the samples of a job as a tar; add bad items to ``skipped`` and the encoder's counts to ``counts``."""
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
            # A skipped sample leaves a gap in the numbers, so that the other samples keep their keys.
            tar.write({"__key__": f"{number:08d}", **members})
            counts.update(found)


class _Hashed:
    """A stream that computes the size and the SHA-256 of its content."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.size, self.sha256 = stream, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self.sha256.update(content)
        return self.stream.write(content)


@dataclass(frozen=True)
class Finished:
    """The record of a finished shard."""

    name: str  # such as train/shard-000000.tar
    size: int  # bytes; 0 if there is no file, because all samples were skipped
    sha256: str
    sources: str  # digest of the names, sizes and times of the source files
    samples: int
    skipped: list[list[str]] = field(default_factory=list)  # path and reason
    counts: dict[str, int] = field(default_factory=dict)  # counts of the encoder

    def matches(self, folder: Path, items: Sequence[Item]) -> bool:
        """Return whether the shard in ``folder`` is unchanged, and so are its source files."""
        path = folder / self.name
        try:
            if self.sources != sources_digest(items):
                return False
            if not self.size:
                return not path.exists()
            if path.stat().st_size != self.size:
                return False
            with open(path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256
        except (OSError, UserError):
            return False  # the shard is then written again, which reports the error


class Ledger:
    """A file with one JSON line for each finished shard."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "finished.jsonl"

    def read(self) -> dict[str, Finished]:
        """Return the records by name of the shard; an incomplete line is ignored."""
        known = {}
        for line in read_json_lines(self.path):
            with suppress(TypeError):
                entry = Finished(**line)
                known[entry.name] = entry
        return known

    def add(self, entry: Finished) -> None:
        """Append the record of a shard."""
        append_json_line(self.path, asdict(entry))


def recipe_digest(source: str, settings: Mapping[str, Any], splits: Mapping[str, Sequence[Item]]) -> str:
    """Return a digest (12 hex digits) of the source, the settings and the items."""
    found = hashlib.sha256(json.dumps([source, dict(settings)], sort_keys=True).encode())
    for split, items in splits.items():
        found.update(f"\n{split} {len(items)}\n".encode())
        for item in items:
            found.update(f"{item.label} {item.path!r} {item.target!r} {len(item.content)} {len(item.note)}\n".encode())
            found.update(item.content + item.note)
    return found.hexdigest()[:12]


def sources_digest(items: Sequence[Item]) -> str:
    """Return the SHA-256 of names, sizes and modification times of the files of ``items``; no file is read."""
    found = hashlib.sha256()
    for item in items:
        for path in (item.path, item.target):
            if path:
                with os_errors(f"{path}: cannot read the file"):
                    stat = os.stat(path)
                found.update(f"{path!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()
