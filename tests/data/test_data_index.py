"""``mmtrain data index``: what it says, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmtrain.data.images.tar_index import index_path, index_shard


def test_the_mixing_follows_the_window(cli: Any, make_tar: Callable, samples: Callable) -> None:
    for number in range(8):
        folder = make_tar(samples(20, 20 * number), f"train/shard-{number:06d}.tar").parent
    said = [cli("data", "index", folder, "--window", window).stdout for window in (1, 8)]
    assert all("8 shard(s), 160 samples, 3 classes: all valid" in text for text in said)
    figures = [float(text.partition("neighbours in a shard are ")[2].split()[0]) for text in said]
    assert figures == [pytest.approx(1 / 8, rel=0.3), pytest.approx(1, rel=0.2)]


def test_indexes_of_one_name_do_not_replace_each_other(cli: Any, make_tar: Callable, samples: Callable) -> None:
    train, val = (make_tar(samples(4), f"{split}/shard-000000.tar") for split in ("train", "val"))
    out = train.parents[1] / "indexes"
    done = cli("data", "index", train.parent, val.parent, "--out", out)
    assert done.returncode == 2
    assert "two shards would write shard-000000.tar.idx. Call the command once per split" in done.stderr
    assert not out.exists()
    assert cli("data", "index", train.parent, "--out", out).returncode == 0
    assert (out / "shard-000000.tar.idx").read_bytes() == index_path(train).read_bytes()
    assert index_shard(train).digest
