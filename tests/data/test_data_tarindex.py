"""Shard indexes: right offsets, and every damaged shard named with its cure."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmtrain.data.images import tar_index
from mmtrain.data.images.tar_index import index_path, index_shard, index_shards
from mmtrain.errors import UserError

Make = Callable[..., Path]


def test_offsets_and_labels_are_what_webdataset_reads(make_tar: Make, samples: Callable) -> None:
    import webdataset

    shard = make_tar(samples(7))
    index = index_shard(shard)
    raw = shard.read_bytes()
    found = list(webdataset.WebDataset([str(shard)], shardshuffle=False))
    assert len(index) == len(found) == 7
    for place, sample in enumerate(found):
        assert index.keys[place] == sample["__key__"]
        assert raw[index.offsets[place] :][: index.sizes[place]] == sample["png"]
        assert index.labels[place] == int(sample["cls"])


def test_names_and_labels_of_all_kinds(make_tar: Make, image_bytes: Callable) -> None:
    long = "folder/" + "x" * 150
    index = index_shard(
        make_tar(
            [
                ("__worker_info__.txt", b"ours to skip"),
                ("a/one.JPG", image_bytes(kind="JPEG")),
                ("a/one.json", json.dumps({"label": 4, "text": "é"}).encode()),
                ("a/one.seg.png", b"another kind of member"),
                ("b/one.cls", b"2\n"),
                ("b/one.webp", image_bytes(kind="WEBP")),
                ("b/one.json", b'{"no": "label"}'),
                (f"{long}.cls", b"0"),
                (f"{long}.png", image_bytes()),
            ]
        )
    )
    assert index.keys.tolist() == ["a/one", "b/one", long]
    assert index.labels.tolist() == [4, 2, 0]


def test_the_index_is_read_again_without_walking(
    make_tar: Make, samples: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_tar(samples(5))
    made = index_shard(shard)
    assert index_path(shard).is_file()
    monkeypatch.setattr(tar_index, "_walk", lambda shard: pytest.fail("walked an indexed shard"))
    read = index_shard(shard)
    for name in ("keys", "offsets", "sizes", "labels"):
        assert np.array_equal(getattr(made, name), getattr(read, name))
    assert sorted(file.name for file in shard.parent.iterdir()) == [shard.name, shard.name + ".idx"]


def test_changed_shards_are_indexed_again_with_one_warning(
    make_tar: Make, samples: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    shards = [make_tar(samples(3), f"train/{name}.tar") for name in "abc"]
    index_shards(shards)
    for name in "ab":
        make_tar(samples(4, first=9), f"train/{name}.tar")
    with caplog.at_level(logging.WARNING, "mmtrain"):
        assert [len(index) for index in index_shards(shards)] == [4, 4, 3]
    assert len(caplog.records) == 1
    assert "2 shard(s) changed" in caplog.text
    caplog.clear()
    index_shards(shards)
    assert not caplog.records


def test_same_size_but_newer_is_changed_too(make_tar: Make, samples: Callable) -> None:
    shard = make_tar(samples(3, classes=3))
    assert index_shard(shard).labels.tolist() == [0, 1, 2]
    size = shard.stat().st_size
    make_tar(samples(3, classes=1))
    assert shard.stat().st_size == size
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert index_shard(shard).labels.tolist() == [0, 0, 0]


def test_a_damaged_index_is_made_again(make_tar: Make, samples: Callable) -> None:
    shard = make_tar(samples(3))
    index_shard(shard)
    index_path(shard).write_bytes(b"PK\x03\x04 nonsense")
    assert len(index_shard(shard)) == 3
    with open(index_path(shard), "wb") as stream:
        np.save(stream, np.zeros(3))  # an array, and no archive of them
    assert len(index_shard(shard)) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": np.zeros(2, np.int64)},
        {"labels": np.array([0.0, 1.0, 2.0])},
        {"sizes": np.array([1, 1, -1])},
        {"offsets": np.array([0, 0, 10**9])},
        {"sizes": np.array([1, 1, 2**63 - 1])},
        {"keys": np.array([1, 2, 3])},
        {"stamp": np.int64(1)},
    ],
)
def test_an_index_that_does_not_point_into_its_shard_is_made_again(
    make_tar: Make, samples: Callable, wrong: dict
) -> None:
    """An index may come from elsewhere."""
    shard = make_tar(samples(3))
    sound = index_shard(shard)
    with np.load(index_path(shard)) as archive:
        arrays = {**archive, **wrong}
    with open(index_path(shard), "wb") as stream:
        np.savez(stream, **arrays)
    found = index_shard(shard)
    for name in ("keys", "offsets", "sizes", "labels"):
        assert getattr(found, name).dtype == getattr(sound, name).dtype
        assert getattr(found, name).tolist() == getattr(sound, name).tolist()


def test_a_folder_that_cannot_be_written_is_said_once(
    make_tar: Make, samples: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    shards = [make_tar(samples(2), f"train/{name}.tar") for name in "ab"]
    monkeypatch.setattr(tar_index.os, "replace", refuse)
    with caplog.at_level(logging.WARNING, "mmtrain"):
        assert [len(index) for index in index_shards(shards)] == [2, 2]
    assert len(caplog.records) == 1
    assert "Read-only file system" in caplog.text
    assert sorted(file.name for file in shards[0].parent.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize("where", ["in data", "in header", "at a member's end", "only the first block"])
def test_truncated_shards(make_tar: Make, samples: Callable, where: str) -> None:
    shard = make_tar(samples(6))
    raw, index = shard.read_bytes(), index_shard(shard)
    end = int(index.offsets[3] + index.sizes[3])
    padded = -(-end // 512) * 512
    cut = {"in data": end - 5, "in header": padded + 100, "at a member's end": padded, "only the first block": 512}
    shard.write_bytes(raw[: cut[where]])
    with pytest.raises(UserError, match=r"(?s)shard-000000\.tar: .*truncated.*prepare"):
        index_shard(shard)


def test_damage_in_the_middle_is_not_taken_for_the_end(make_tar: Make, samples: Callable) -> None:
    shard = make_tar(samples(6))
    raw = bytearray(shard.read_bytes())
    index = index_shard(shard)
    header = -(-int(index.offsets[2] + index.sizes[2]) // 512) * 512
    raw[header : header + 512] = b"\x55" * 512
    shard.write_bytes(raw)
    with pytest.raises(UserError, match="not a tar member"):
        index_shard(shard)
    shard.write_bytes(bytes(512 * 4) + b"x" * 512)
    with pytest.raises(UserError, match="shard"):
        index_shard(shard)


def test_joined_tars_are_refused(make_tar: Make, samples: Callable) -> None:
    one, two = make_tar(samples(2)), make_tar(samples(2, first=5), "train/b.tar")
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="several tar files"):
        index_shard(one)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", ".."])
def test_names_that_point_outside(make_tar: Make, samples: Callable, name: str) -> None:
    with pytest.raises(UserError, match="outside of the archive"):
        index_shard(make_tar([*samples(1), (name, b"x")]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.png", b"y"), ("a.cls", b"1")], "'a' has two image members"),
        ([("a.png", b"x"), ("a.jpg", b"y"), ("a.cls", b"1")], "'a' has two image members"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], "'a' has two cls members"),
        ([("a.png", b"x")], "'a' has no label"),
        ([("a.png", b"x"), ("a.json", b'{"label": "cat"}')], "'a' has no label"),
        ([("a.cls", b"1")], "'a' has no image"),
        ([("a.png", b"x"), ("a.cls", b"cat")], r"'a\.cls' contains b'cat'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], r"'a\.cls' contains b'-1'"),
        ([("a.txt", b"x")], "no samples"),
        ([], "no samples"),
    ],
)
def test_faulty_shards(make_tar: Make, members: list, message: str) -> None:
    with pytest.raises(UserError, match=rf"shard-000000\.tar: .*{message}"):
        index_shard(make_tar(members))


def test_no_tar_at_all(tmp_path: Path) -> None:
    for name, content, message in (("a.tar", b"", "empty"), ("b.tar", b"text" * 500, "not an uncompressed tar")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            index_shard(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        index_shard(tmp_path / "none.tar")
