"""Preparations that were killed go on: the same bytes, wherever it was, with any number of workers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.prepare import writer
from mmtrain.data.prepare.encode import ClassEncoder, Item
from mmtrain.data.prepare.images import prepare_images
from mmtrain.data.prepare.output import Origin
from mmtrain.data.prepare.writer import Finished, Ledger, write_dataset
from mmtrain.errors import UserError
from mmtrain.files import exclusive
from tests.data.conftest import png

SHARDS = 6


def folder(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(15):
            (root / name / f"{number}.png").write_bytes(png(number, size=(6, 5)))
    return root


def prepare(root: Path, out: Path, workers: int = 1, **options: Any) -> writer.Prepared:
    return prepare_images(root, out, shard_size=6, workers=workers, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".idx"  # which remembers the time at which its shard was written
    }


@contextmanager
def interrupted_after(shards: int) -> Iterator[list[str]]:
    """Ctrl-C after so many shards; yields the names of those that were begun."""
    write, begun = writer._write_shard, []

    def bomb(job: Any) -> Any:
        if len(begun) == shards:
            raise KeyboardInterrupt
        begun.append(job.name)
        return write(job)

    writer._write_shard = bomb
    try:
        yield begun
    finally:
        writer._write_shard = write


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the shards that are written, not only looked at."""
    fill, written = writer._fill, []

    def noted(stream: Any, job: Any, *rest: Any) -> None:
        written.append(job.name)
        fill(stream, job, *rest)

    writer._fill = noted
    try:
        yield written
    finally:
        writer._fill = fill


@settings(max_examples=15, deadline=None)
@given(stops=st.lists(st.integers(0, SHARDS - 1), min_size=1, max_size=3))
@pytest.mark.slow
def test_interrupted_anywhere_and_gone_on(stops: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = folder(Path(name) / "in")
        prepare(root, Path(name) / "whole")
        out, finished = Path(name) / "out", 0
        for stop in stops:
            with interrupted_after(stop), pytest.raises(KeyboardInterrupt):
                prepare(root, out)
            assert not out.exists()
            finished = max(finished, stop)
        with counted() as written:
            prepare(root, out)
        assert len(written) == SHARDS - finished
        assert contents(out) == contents(Path(name) / "whole")
        assert {entry.name for entry in Path(name).iterdir()} == {"in", "whole", "out"}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_killed_and_gone_on_with_other_workers(tmp_path: Path, first: int, second: int) -> None:
    root = folder(tmp_path / "in")
    code = (
        "import os, sys\n"
        "from mmtrain.data.prepare import images, writer\n"
        "add, count = writer.Ledger.add, []\n"
        "def bomb(self, entry):\n"
        "    add(self, entry), count.append(1)\n"
        "    if len(count) == 3: os.kill(os.getpid(), 9)\n"
        "writer.Ledger.add = bomb\n"
        "if __name__ == '__main__':\n"
        "    images.prepare_images(sys.argv[1], sys.argv[2], shard_size=6, workers=int(sys.argv[3]))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script, root, tmp_path / "out", str(first)], timeout=60, env={**os.environ})
    assert done.returncode == -9
    [part] = tmp_path.glob(".out.partial-*")
    assert len((part / "finished.jsonl").read_text().splitlines()) == 3
    prepare(root, tmp_path / "out", second)
    prepare(root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def spoil_shard(part: Path) -> None:
    shard = part / "train" / "shard-000001.tar"
    raw = bytearray(shard.read_bytes())
    raw[700] ^= 1
    shard.write_bytes(raw)


def cut_shard(part: Path) -> None:
    shard = part / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])


def lose_shard(part: Path) -> None:
    (part / "train" / "shard-000001.tar").unlink()


def cut_line(part: Path) -> None:
    ledger = part / "finished.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + lines[2] + lines[1][:30])


def garbage_line(part: Path) -> None:
    ledger = part / "finished.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + b"\xff\x00{}\n[1]\n" + lines[2])


@pytest.mark.parametrize("harm", [spoil_shard, cut_shard, lose_shard, cut_line, garbage_line])
def test_what_was_damaged_since_is_written_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    root = folder(tmp_path / "in")
    prepare(root, tmp_path / "whole")
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        prepare(root, tmp_path / "out")
    [part] = tmp_path.glob(".out.partial-*")
    harm(part)
    with counted() as written:
        prepare(root, tmp_path / "out")
    assert "train/shard-000001.tar" in written
    assert len(written) == SHARDS - 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_sources_that_changed_since_are_read_again(tmp_path: Path) -> None:
    root = folder(tmp_path / "in")
    with interrupted_after(SHARDS - 1), pytest.raises(KeyboardInterrupt):
        prepare(root, tmp_path / "out")
    for image in root.rglob("*.png"):
        image.write_bytes(png(99, size=(8, 8)))
    prepare(root, tmp_path / "out")
    prepare(root, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_or_images_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "in")
    for change in ("settings", "images"):
        with interrupted_after(2), pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path / "out")
        if change == "images":
            (root / "cat" / "new.png").write_bytes(png(5))
        options = {"image_size": 4} if change == "settings" else {}
        caplog.clear()
        with counted() as written, caplog.at_level(logging.WARNING, "mmtrain"):
            prepare(root, tmp_path / "out", force=True, **options)
        assert len(written) >= SHARDS
        assert "removed; it was left by a preparation with other settings" in caplog.text
        assert not list(tmp_path.glob(".out*"))
        (tmp_path / "out").rename(tmp_path / change)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    root = folder(tmp_path / "in")
    with exclusive(tmp_path / ".out.lock", wait=False), pytest.raises(UserError, match="another process is writing it"):
        prepare(root, tmp_path / "out")
    assert prepare(root, tmp_path / "out").fresh


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    code = (
        "import os, sys; from pathlib import Path; from mmtrain.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), wait=False): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, lock], timeout=60).returncode == -9
    assert lock.exists()
    with exclusive(lock, wait=False), pytest.raises(BlockingIOError), exclusive(lock, wait=False):
        pass
    assert not lock.exists()
    lock.touch()
    with pytest.raises(UserError, match="cannot be written or locked"), exclusive(lock / "in a file", wait=True):
        pass


def bad_items(tmp_path: Path) -> list[Item]:
    items = []
    for number in range(8):
        file = tmp_path / f"{number}.png"
        file.write_bytes(png(number)[: 40 if number in (2, 5) else None])
        items.append(Item(number % 2, str(file)))
    return items


def write(tmp_path: Path, items: list[Item], **options: Any) -> writer.Prepared:
    return write_dataset(
        tmp_path / "out", {"train": items}, ["a", "b"], Origin("made up"), {}, encoder=ClassEncoder(), **options
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_images_are_an_error_or_left_out(tmp_path: Path, workers: int) -> None:
    items = bad_items(tmp_path)
    with pytest.raises(UserError, match=r"[25]\.png: the image cannot be decoded"):
        write(tmp_path, items, shard_size=2, workers=workers, keep=True)
    done = write(tmp_path, items, shard_size=2, workers=workers, keep=True, skip_bad=True)
    assert done.meta["counts"] == {"train": 6}
    assert done.meta["skipped"] == 2
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split(": ")[0] for line in listed) == [items[2].path, items[5].path]


def test_skipping_is_not_inherited(tmp_path: Path) -> None:
    """What was left out with --skip-bad is an error again without it."""
    items = bad_items(tmp_path)
    with interrupted_after(7), pytest.raises(KeyboardInterrupt):
        write(tmp_path, items, shard_size=1, skip_bad=True)
    [part] = tmp_path.glob(".out.partial-*")
    skipped = {path for entry in Ledger(part).read().values() for path, _ in entry.skipped}
    assert skipped
    for number in (2, 5):
        if items[number].path not in skipped:
            Path(items[number].path).write_bytes(png(number))
    with pytest.raises(UserError, match="cannot be decoded"):
        write(tmp_path, items, shard_size=1)


def test_a_line_after_one_that_was_cut_short(tmp_path: Path) -> None:
    ledger, entries = Ledger(tmp_path), [Finished(f"train/{n}.tar", n, "", "", n) for n in range(3)]
    ledger.add(entries[0])
    ledger.add(entries[1])
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    ledger.add(entries[2])
    assert list(ledger.read().values()) == [entries[0], entries[2]]


def test_a_shard_of_bad_images_alone(tmp_path: Path) -> None:
    done = write(tmp_path, bad_items(tmp_path), shard_size=1, skip_bad=True)
    assert len(list((done.out / "train").glob("*.tar"))) == 6
    assert json.loads((done.out / "meta.json").read_text())["counts"] == {"train": 6}


def test_an_error_keeps_what_is_finished_where_that_is_wanted(tmp_path: Path) -> None:
    items = bad_items(tmp_path)
    with pytest.raises(UserError):
        write(tmp_path, items, shard_size=1, keep=True)
    [part] = tmp_path.glob(".out.partial-*")
    kept = len(list(part.rglob("*.tar")))
    for number in (2, 5):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    with counted() as written:
        write(tmp_path, items, shard_size=1, keep=True)
    assert kept
    assert len(written) == 8 - kept
