"""Shards behind addresses: a server on loopback that fails in every way, and the cache that all processes share."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.data.core.loader import eval_batches, train_batches
from mmtrain.data.core.retry import Unreachable
from mmtrain.data.images import cache as cache_module
from mmtrain.data.images.cache import ShardCache
from mmtrain.data.images.shards import ImageShards, find_shards
from mmtrain.data.images.tar_index import index_shards
from mmtrain.errors import UserError

pytest.importorskip("aiohttp", reason="shards over http: pip install 'mmtrain[remote]'")

GREY: dict[str, Any] = {"image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}


class Server:
    """Serves ``folder``. ``faults[name]``: what happens to the next requests of a file, in order; then it works."""

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args: Any) -> None:
                return

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                outer.asked[name] += 1
                waiting = outer.faults.get(name, [])
                fault = waiting.pop(0) if waiting else ""
                if fault == "500":
                    self.send_error(500)
                elif fault == "stall":
                    time.sleep(3)
                elif fault in ("cut", "garbage"):
                    content = (folder / self.path.lstrip("/")).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if fault == "cut" else bytes(len(content)))
                else:
                    super().do_GET()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "far").mkdir()
    made = Server(tmp_path / "far")
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def far(make_tar: Callable, samples: Callable, server: Server) -> list[Path]:
    """Four shards of five samples on the server, without indexes."""
    return [make_tar(samples(5, 5 * n), f"far/train/shard-{n:06d}.tar") for n in range(4)]


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9, pause=0.01)


def pattern(server: Server) -> str:
    return f"{server.address}/train/shard-{{000000..000003}}.tar"


def source_of(server: Server, cache: ShardCache, **options: Any) -> ImageShards:
    return ImageShards(pattern(server), **{"train": True, "augment": "crop"} | GREY | options, cache=cache)


@pytest.mark.parametrize("workers", [0, 1])
def test_far_shards_are_what_near_ones_are(
    server: Server, far: list[Path], cache: ShardCache, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "far/meta.json").write_text('{"classes": ["a", "b", "c"]}')
    near = ImageShards(far[0].parent, train=True, augment="crop", **GREY)
    for shard in far:  # the server has no indexes
        shard.with_name(shard.name + ".idx").unlink()
    there = source_of(server, cache)
    assert there.block_sizes == near.block_sizes
    assert there.classes == ["a", "b", "c"]
    options: dict[str, Any] = {"seed": 1, "batch_size": 5, "start": 0, "steps": 8, "workers": workers}
    for one, two in zip(train_batches(near, **options), train_batches(there, **options), strict=True):
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["index"], two["index"])
    again = pickle.loads(pickle.dumps(there))
    assert torch.equal(again.fetch(np.arange(3), np.arange(3, dtype=np.uint64))["label"],
                       torch.tensor([0, 1, 2]))  # fmt: skip


def test_each_shard_is_fetched_once_and_its_index_is_kept(server: Server, far: list[Path], cache: ShardCache) -> None:
    for _ in range(2):
        source = source_of(server, cache)
        list(train_batches(source, seed=1, batch_size=5, start=0, steps=8))
    assert all(server.asked[shard.name] == 1 for shard in far)


def test_an_index_beside_the_address_spares_reading_the_shards(
    server: Server, far: list[Path], cache: ShardCache
) -> None:
    index_shards(far, digest=True)
    source = source_of(server, cache)
    assert len(source) == 20
    assert not any(server.asked[shard.name] for shard in far)
    source.fetch(np.array([6]), np.array([1], dtype=np.uint64))
    assert [server.asked[shard.name] for shard in far] == [0, 1, 0, 0]
    for _ in range(100):
        source.ahead([2, 3])
        if all(server.asked[shard.name] for shard in far[2:]):
            break
        time.sleep(0.05)
    assert [server.asked[shard.name] for shard in far] == [0, 1, 1, 1]


@pytest.mark.parametrize("fault", ["500", "cut", "stall", "garbage"])
def test_what_fails_once_is_tried_again(
    server: Server, far: list[Path], cache: ShardCache, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_SILENCE", 0.3)
    monkeypatch.setattr(cache_module, "_systems", threading.local())  # one with that patience
    index_shards(far, digest=True)
    source = source_of(server, cache)
    server.faults[far[1].name] = [fault]
    expected = ImageShards(far[0].parent, train=True, augment="crop", **GREY)
    keys = np.array([1], dtype=np.uint64)
    assert torch.equal(source.fetch(np.array([6]), keys)["image"], expected.fetch(np.array([6]), keys)["image"])
    assert server.asked[far[1].name] == 2


@pytest.mark.parametrize("fault", ["500", "cut", "garbage"])
def test_what_fails_always_is_said_and_leaves_nothing(
    server: Server, far: list[Path], cache: ShardCache, fault: str
) -> None:
    index_shards(far, digest=True)
    source = source_of(server, cache)
    server.faults[far[1].name] = [fault] * 99
    with pytest.raises(UserError, match=r"shard-000001\.tar: could not be fetched in 4 attempts"):
        list(eval_batches(source_of(server, cache, train=False), batch_size=4, workers=0))
    assert not list(cache.folder.glob("*shard-000001.tar*part"))
    assert not cache.place(f"{server.address}/train/{far[1].name}").exists()
    skipping = source_of(server, cache, skip=True)
    faults: list[Any] = []
    seen = []
    for batch in train_batches(skipping, seed=1, batch_size=5, start=0, steps=4, on_fault=faults.append):
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(20))
    assert {fault.index for fault in faults} == {5, 6, 7, 8, 9}
    assert len(source) == 20


def test_a_shard_that_was_replaced_since_it_was_indexed(
    server: Server, far: list[Path], cache: ShardCache, make_tar: Callable, samples: Callable
) -> None:
    index_shards(far, digest=True)
    source = source_of(server, cache)
    make_tar(samples(60), "far/train/shard-000001.tar")
    with pytest.raises(UserError, match=r"received more bytes, but its index says \d+.*mmtrain data index"):
        source.fetch(np.array([6]), np.array([1], dtype=np.uint64))
    assert len(source_of(server, cache)) == 75  # a new start sees its new size, and indexes it again


def test_what_is_not_there(server: Server, far: list[Path], cache: ShardCache) -> None:
    far[2].unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar: (there is no such file|cannot be reached)"):
        source_of(server, cache)
    source = source_of(server, cache, skip=True)
    assert source.block_sizes == [5, 5, 0, 5]
    with pytest.raises(UserError, match=r"nowhere://x/y\.tar"):
        ShardCache(cache.folder, 1, pause=0).fetch("nowhere://x/y.tar")


def test_listing_a_folder_behind_an_address(server: Server, far: list[Path]) -> None:
    found = find_shards(f"{server.address}/train")
    assert [str(shard).rpartition("/")[2] for shard in found] == [shard.name for shard in far]
    with pytest.raises(UserError, match=r"nothing.*shard-\{000000\.\.000003\}\.tar"):
        find_shards(f"{server.address}/nothing")


def test_the_cache_keeps_to_its_limit_and_drops_the_oldest(server: Server, far: list[Path], tmp_path: Path) -> None:
    size = far[0].stat().st_size
    cache = ShardCache(tmp_path / "small", 2 * size + 100, pause=0)
    addresses = [f"{server.address}/train/{shard.name}" for shard in far]
    held = os.open(cache.fetch(addresses[0]), os.O_RDONLY)  # what is open stays readable
    kept = []
    for number in (1, 0, 2, 3):
        cache.fetch(addresses[number])
        time.sleep(0.02)  # the order of use is told by times of files
        kept.append([i for i, address in enumerate(addresses) if cache.place(address).exists()])
    assert kept == [[0, 1], [0, 1], [0, 2], [2, 3]]  # 1 was used longest ago, then 0
    assert os.pread(held, 2 * size, 0) == far[0].read_bytes()
    os.close(held)


def _fetch(folder: Path, address: str, gate: Any) -> None:
    gate.wait()
    ShardCache(folder, 10**9, pause=0.01).fetch(address)


@pytest.mark.slow
def test_two_processes_fetch_a_shard_once(server: Server, far: list[Path], tmp_path: Path) -> None:
    server.faults[far[0].name] = ["stall"]  # the first one is slow: the others wait for it, and for its second attempt
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(3)
    address = f"{server.address}/train/{far[0].name}"
    processes = [context.Process(target=_fetch, args=(tmp_path / "shared", address, gate)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.asked[far[0].name] == 2  # the stalled request, and one that worked
    assert ShardCache(tmp_path / "shared", 10**9).place(address).read_bytes() == far[0].read_bytes()


def test_a_cache_that_cannot_be_written(server: Server, far: list[Path]) -> None:
    with pytest.raises(UserError, match=r"data\.cache=/proc/x: cannot be written"):
        ShardCache(Path("/proc/x"), 10**9, pause=0).fetch(f"{server.address}/train/{far[0].name}")
    with pytest.raises(Unreachable):
        ShardCache(Path("/proc/x"), 10**9, pause=0).size("http://127.0.0.1:1/x.tar")


def test_a_lock_that_cannot_be_made(server: Server, far: list[Path], cache: ShardCache) -> None:
    (cache.folder / "room.lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"room\.lock: cannot be written"):
        cache.fetch(f"{server.address}/train/{far[0].name}")


def test_a_shard_that_is_removed_before_it_is_open(
    server: Server, far: list[Path], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes room between fetching and opening."""
    sound, lost = ShardCache.fetch, Counter[str]()

    def fetch(self: ShardCache, address: str, **options: Any) -> Path:
        found = sound(self, address, **options)
        lost[address] += 1
        if lost[address] <= times and address.endswith(".tar"):
            found.unlink()
        return found

    monkeypatch.setattr(ShardCache, "fetch", fetch)
    times = 2
    source = source_of(server, cache)
    assert source.fetch(np.arange(20), np.arange(20, dtype=np.uint64))["label"].tolist() == [n % 3 for n in range(20)]
    times = 10**6
    with pytest.raises(Unreachable, match=r"is removed from .*Increase data\.cache_gb"):
        cache.open(f"{server.address}/train/{far[0].name}")


def test_a_cache_smaller_than_a_shard_still_works(server: Server, far: list[Path], tmp_path: Path) -> None:
    source = source_of(server, ShardCache(tmp_path / "small", 1, pause=0.01))
    batches = train_batches(source, seed=1, batch_size=5, start=0, steps=4)
    assert sorted(index for batch in batches for index in batch["index"].tolist()) == list(range(20))


def test_what_hinders_the_cache_is_no_fault_of_the_samples(
    server: Server, far: list[Path], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(server, cache, skip=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for file in cache.folder.glob("*.tar"):
        file.unlink()
    monkeypatch.setattr(ShardCache, "_copy", full)
    with pytest.raises(UserError, match=r"data\.cache=.*: cannot be written \(No space left on device\)"):
        source.fetch(np.arange(4), np.arange(4, dtype=np.uint64))
    assert not source.take_faults()


def test_the_end_of_a_process_waits_for_no_fetch(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mmtrain.data.images.cache import ShardCache\n"
        "ShardCache.fetch = lambda self, address, **options: time.sleep(60)\n"
        f"cache = ShardCache(Path({str(tmp_path)!r}), 1)\n"
        "cache.ahead('http://a/1.tar'); cache.ahead('http://a/2.tar')"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
