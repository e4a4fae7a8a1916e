"""Fingerprints: what changes them, and what must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.data.core.fingerprint import changes, digest, fingerprint_of
from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.data.images.tar_index import index_path
from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table_source import load_series
from tests.data.panels import LAST, long_frame, opened, write

Make = Callable[..., Path]
DATES = SplitRule("date", dates=("2020-01-04", "2020-01-05"))
RATIO = SplitRule("ratio", parts=(0.7, 0.1, 0.2))


def saved(print_: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(print_))


# ---------------------------------------------------------------- shards


@pytest.fixture
def shards(make_tar: Make, samples: Callable, tmp_path: Path) -> Path:
    """Three shards of six samples each, with names of classes."""
    for number in range(3):
        make_tar(samples(6, first=6 * number), f"set/train/shard-{number:06d}.tar")
    (tmp_path / "set" / "meta.json").write_text(json.dumps({"classes": ["ant", "bee", "cat"]}))
    return tmp_path / "set"


def print_of(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 8, "train": True}
    return saved(fingerprint_of(ImageShards(folder / "train", **options)))


def swap(folder: Path, make: Make, samples: Callable) -> None:
    """Two samples change places; numbers, sizes and labels of both shards stay."""
    first, second = samples(6), samples(6, first=6)
    make([*second[:2], *first[2:]], "set/train/shard-000000.tar")
    make([*first[:2], *second[2:]], "set/train/shard-000001.tar")


def relabel(folder: Path, make: Make, samples: Callable) -> None:
    members = samples(6)
    make([(members[0][0], b"2"), *members[1:]], "set/train/shard-000000.tar")


def replace_image(folder: Path, make: Make, samples: Callable) -> None:
    members = samples(6)
    make([members[0], (members[1][0], members[1][1] + b"more"), *members[2:]], "set/train/shard-000000.tar")


def shrink(folder: Path, make: Make, samples: Callable) -> None:
    make(samples(5), "set/train/shard-000000.tar")


def reorder(folder: Path, make: Make, samples: Callable) -> None:
    one = folder / "train" / "shard-000001.tar"
    one.rename(folder / "train" / "shard-000009.tar")
    index_path(one).rename(folder / "train" / "shard-000009.tar.idx")


def delete(folder: Path, make: Make, samples: Callable) -> None:
    (folder / "train" / "shard-000002.tar").unlink()


def rename_classes(folder: Path, make: Make, samples: Callable) -> None:
    (folder / "meta.json").write_text(json.dumps({"classes": ["cat", "bee", "ant"]}))


def forget_indexes(folder: Path, make: Make, samples: Callable) -> None:
    for file in (folder / "train").glob("*.idx"):
        file.unlink()


def pack_again(folder: Path, make: Make, samples: Callable) -> None:
    """The same samples at other places in the file, which is of another time."""
    make([("__info__", b"of another program" * 99), *samples(6)], "set/train/shard-000000.tar")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swap, ["2 of 3 shards contain different samples (numbers, counted from 0: 0, 1)"]),
        (relabel, ["1 of 3 shards contain different samples (numbers, counted from 0: 0)"]),
        (replace_image, ["1 of 3 shards contain different samples (numbers, counted from 0: 0)"]),
        (shrink, ["1 of 3 shards have a different size (shard 0: 6 samples before, 5 now)"]),
        (reorder, ["2 of 3 shards are in a different order (numbers, counted from 0: 1, 2)"]),
        (delete, ["3 shards before, 2 now"]),
        (rename_classes, ["the names or the order of the classes changed"]),
        (forget_indexes, []),
        (pack_again, []),
    ],
)
def test_shards(shards: Path, make_tar: Make, samples: Callable, change: Callable, told: list[str]) -> None:
    before = print_of(shards)
    change(shards, make_tar, samples)
    assert changes(before, print_of(shards)) == told


def test_shards_that_were_moved_or_copied_are_the_same(shards: Path, tmp_path: Path) -> None:
    before = print_of(shards)
    shutil.copytree(shards, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    assert print_of(tmp_path / "copy") == before
    shards.rename(tmp_path / "elsewhere")
    assert print_of(tmp_path / "elsewhere") == before


def test_a_source_without_a_fingerprint_has_its_blocks() -> None:
    assert fingerprint_of(SyntheticImages(2, 8, 10, seed=0)) == {"blocks": [10]}


def test_betons(photos: Any) -> None:
    found = saved(fingerprint_of(photos.source()))
    assert len(found["indexes"]) == len(found["blocks"]) > 1
    assert changes(found, saved(fingerprint_of(photos.source()))) == []
    source = photos.source()
    source.labels[0] += 1
    assert changes(found, saved(fingerprint_of(source)))[0].startswith("1 of ")


# ---------------------------------------------------------------- tables


def table(rows: int = 120) -> pd.DataFrame:
    number = np.arange(rows)
    frame = pd.DataFrame({"date": pd.date_range("2020-01-01", periods=rows, freq="h"), "a": number * 0.1})
    return frame.assign(b=np.cos(number), price=number % 7)


def table_print(frame: pd.DataFrame, file: Path, split: SplitRule = DATES, **options: Any) -> dict[str, Any]:
    frame.to_csv(file, index=False)
    data = load_series(file, 8, 4, split=split, known=["price"], calendar=True, **options)
    return saved({**fingerprint_of(data.train), **data.fingerprint()})


def with_value(row: int, column: str, value: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[row, column] = value
        return frame

    return change


@pytest.mark.parametrize(
    ("change", "split", "told"),
    [
        (lambda f: f.rename(columns={"b": "c"}), DATES, ["columns: a, b before, a, c now"]),
        (lambda f: f[["date", "b", "a", "price"]], DATES, ["columns: a, b before, b, a now", "the values of the"]),
        (with_value(70, "a", 7.0001), DATES, ["the values of the training rows changed"]),
        (with_value(70, "price", 1), DATES, ["the known covariates of the training rows changed"]),
        (lambda f: f.assign(date=f["date"] + pd.Timedelta(hours=1)), DATES, ["training rows: 72 before, 71 now"]),
        (with_value(100, "a", 9), DATES, []),  # the test rows are no samples of the training
        (lambda f: table(150), DATES, []),  # the table has grown, behind the training rows
        (lambda f: table(150), RATIO, ["training rows: 84 before, 105 now"]),
    ],
)
def test_tables(tmp_path: Path, change: Callable, split: SplitRule, told: list[str]) -> None:
    before = table_print(table(), tmp_path / "t.csv", split)
    found = changes(before, table_print(change(table()), tmp_path / "t.csv", split))
    assert [text[: len(start)] for text, start in zip(found, told, strict=False)] == told
    assert bool(found) == bool(told)


def test_a_table_that_was_moved_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert table_print(table(), tmp_path / "t.csv") == table_print(table(), tmp_path / "other" / "u.csv")


# ---------------------------------------------------------------- panels


def panel_print(frame: pd.DataFrame, folder: Path) -> dict[str, Any]:
    source = write(frame, folder / "long.csv")
    options: dict[str, Any] = {"known": ["price"], "static": ["kind", "size"]}
    prepare_panel(source, folder / "panel", split=LAST, **options, force=True)
    data = opened(folder / "panel", known=["price"], static=["kind", "size"])
    return saved({**fingerprint_of(data.train), **data.fingerprint()})


def reversed_series(frame: pd.DataFrame) -> pd.DataFrame:
    """The values of a series in the opposite order: the same mean and deviation."""
    frame.loc[:19, "y"] = frame.loc[:19, "y"].to_numpy()[::-1]
    return frame


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f, []),
        (lambda f: f.iloc[::-1], ["the names or the order of the series changed"]),
        (lambda f: f.replace({"id": {"s1": "new"}}), ["the names or the order of the series changed"]),
        (lambda f: f[f["id"] != "s1"], ["number of series: 3 before, 2 now"]),
        (with_value(5, "y", 5.5), ["the values of the training rows changed"]),
        (reversed_series, ["the values of the training rows changed"]),
        (with_value(5, "price", 5.5), ["the known covariates of the training rows changed"]),
        (lambda f: f.assign(kind="c"), ["the known covariates"]),
    ],
)
def test_panels(tmp_path: Path, change: Callable, told: list[str]) -> None:
    before = panel_print(long_frame([26, 30, 28]), tmp_path / "a")
    found = changes(before, panel_print(change(long_frame([26, 30, 28])), tmp_path / "b"))
    assert bool(found) == bool(told)
    assert all(any(text.startswith(start) for text in found) for start in told), found


# ---------------------------------------------------------------- digests


@given(st.lists(st.text(max_size=3), max_size=4), st.lists(st.text(max_size=3), max_size=4))
def test_other_texts_have_another_digest(one: list[str], other: list[str]) -> None:
    assert (digest(one) == digest(other)) == (one == other)


def test_arrays() -> None:
    values = np.random.default_rng(0).normal(size=(70_000, 2))
    assert digest(values) == digest(values.copy(order="F"))
    assert digest(values) != digest(values.reshape(2, -1))
    assert digest(values) != digest(values.astype(np.float32))
    for row in (0, 65_535, 65_536, 69_999):
        other = values.copy()
        other[row, 1] = np.nextafter(other[row, 1], 9)
        assert digest(other) != digest(values)
    nothing = np.array([np.nan, 1.0])
    assert digest(nothing) == digest(np.array([-np.nan, 1.0]))


def test_parts_that_one_version_lacks_do_not_count() -> None:
    assert changes({"blocks": [3], "new": 1}, {"blocks": [3], "other": 2}) == []
    assert changes({"blocks": [3], "new": 1}, {"blocks": [3], "new": 2}) == ["new changed"]


@pytest.mark.parametrize("value", [None, 5, "text", [None, 1], [[1]], {"a": 1}])
@pytest.mark.parametrize("key", ["blocks", "indexes", "columns", "values", "rows"])
def test_a_damaged_part_is_a_change(key: str, value: Any) -> None:
    now = {"blocks": [3, 4], "indexes": ["a", "b"], "columns": ["a"], "values": "0f", "rows": 7}
    assert len(changes({**now, key: value}, now)) == 1
