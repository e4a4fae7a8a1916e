"""FFCV's stream: it stops when it is left, leaves the process as it was, and its batches are the caller's own."""

from __future__ import annotations

import gc
import logging
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from beton_cases import LOOK, Made, make, picture

from mmtrain.data.core.loader import eval_batches, train_batches
from mmtrain.data.ffcv import source as memory
from mmtrain.data.ffcv.format import read_beton
from mmtrain.errors import UserError


def forever(source: Any, **options: Any) -> Any:
    return train_batches(source, **{"seed": 0, "batch_size": 8, "start": 0, "steps": 10**6, "workers": 1, **options})


def test_leaving_early_stops_the_threads(photos: Made) -> None:
    for os_cache in (True, False):
        source = photos.source(augment="crop", os_cache=os_cache)
        before = set(threading.enumerate())
        batches = forever(source)
        next(batches)
        assert set(threading.enumerate()) - before
        batches.close()
        assert not set(threading.enumerate()) - before


@pytest.mark.slow
def test_exit_in_the_middle_of_a_run_is_quiet(photos: Made) -> None:
    code = (
        "import sys; from mmtrain.data.ffcv.source import open_beton\n"
        "from mmtrain.data.core.loader import train_batches\n"
        f"source = open_beton({str(photos.beton / 'train.beton')!r}, train=True, augment='crop', **{LOOK!r})\n"
        "batches = train_batches(source, seed=0, batch_size=8, start=0, steps=10**6, workers=2)\n"
        "next(batches); sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.slow
def test_two_streams_at_once(photos: Made) -> None:
    train, val = photos.source(augment="crop"), photos.source("val", train=False)
    expected = [next(forever(train, workers=3))["image"], next(eval_batches(val, batch_size=7, workers=3))["image"]]
    streams = forever(train, workers=3), forever(val, workers=3, batch_size=7)
    for stream in streams:
        next(stream)
    again = next(eval_batches(val, batch_size=7, workers=3))["image"]
    for stream in streams:
        stream.close()
    assert torch.equal(again, expected[1])


def test_batches_stay_as_they_are(photos: Made) -> None:
    """Kept batches, and views of them, are never written again; memory that nobody holds is."""
    source = photos.source(augment="crop")
    stream = forever(source)
    kept = [next(stream)["image"][2:] for _ in range(12)]
    copies = [image.clone() for image in kept]
    for _ in range(12):
        next(stream)
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    del kept
    places = [next(stream)["image"].data_ptr() for _ in range(40)]
    stream.close()
    assert len(set(places)) < 20


@pytest.mark.slow
def test_the_process_is_left_as_it_was(photos: Made) -> None:
    def state() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads()

    before = state()
    for augment in ("crop", "light", "imagenet"):
        stream = forever(photos.source(augment=augment), workers=0)
        next(stream)
        stream.close()
    assert state() == before


def test_a_failure_in_the_thread_comes_out(photos: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photos.source(augment="crop")

    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(source, "_batch", fail)
    before = threading.active_count()
    with pytest.raises(KeyError, match="a bug"):
        list(forever(source))
    assert threading.active_count() == before


def test_an_image_that_cannot_be_decoded_is_named(ffcv: None, tmp_path: Path) -> None:
    made = make(tmp_path, {"train": [picture(n, (40, 40)) for n in range(6)]})
    file = made.beton / "train.beton"
    beton = read_beton(file)
    begin, size = int(beton.rows[3][4]), int(beton.rows[4][4])
    with open(file, "r+b") as stream:
        stream.seek(begin)
        stream.write(bytes(size))
    for os_cache in (True, False):
        with pytest.raises(UserError, match=r"train\.beton: image number 4 cannot be decoded"):
            list(eval_batches(made.source(train=False, os_cache=os_cache), batch_size=2))


def test_a_file_that_changes_under_the_run_is_refused(ffcv: None, tmp_path: Path) -> None:
    made = make(tmp_path, {"train": [picture(n, (40, 40)) for n in range(6)]})
    sources = [made.source(train=False, os_cache=os_cache) for os_cache in (True, False)]
    file = made.beton / "train.beton"
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 24)
    for source in sources:
        with pytest.raises(UserError, match="changed after the run started"):
            list(eval_batches(source, batch_size=2))
    file.unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        list(eval_batches(sources[0], batch_size=2))


@pytest.mark.slow
def test_more_threads_than_numba_has_are_told_of(photos: Made, caplog: pytest.LogCaptureFixture) -> None:
    source = photos.source("val", train=False)
    with caplog.at_level(logging.WARNING, "mmtrain"):
        parts = list(eval_batches(source, batch_size=7, workers=99))
    assert len(parts) == 1
    assert "data.workers=99: numba is limited to" in caplog.text
    with pytest.raises(UserError, match=r"data\.workers=-1"):
        eval_batches(source, batch_size=7, workers=-1)


def test_a_file_larger_than_memory_is_told_of_once(
    photos: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr(memory, "_warned", set())
    with caplog.at_level(logging.WARNING, "mmtrain"):
        for _ in range(2):
            photos.source(augment="crop")
        photos.source("val", train=False)
    assert caplog.text.count("Set data.os_cache=false") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mmtrain"):
        photos.source(augment="crop", os_cache=False, window=3)
    assert "Set data.shuffle_window below 3" in caplog.text
    caplog.clear()
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 40)
    with caplog.at_level(logging.WARNING, "mmtrain"):
        photos.source(augment="crop", os_cache=False)
    assert not caplog.text


def test_free_memory_minds_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(available=50 * 1024)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory.free_memory() == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 4096\nfile 9999\n")
    assert memory.free_memory() == 50 * 1024
    (tmp_path / "memory.max").write_text("10240\n")
    assert memory.free_memory() == 10240 - 4096
    (tmp_path / "memory.max").unlink()
    assert memory.free_memory() == 50 * 1024


def test_a_stream_that_is_forgotten_can_be_collected(photos: Made) -> None:
    before = set(threading.enumerate())
    stream = forever(photos.source(augment="crop"))
    next(stream)
    del stream
    gc.collect()
    assert not set(threading.enumerate()) - before
