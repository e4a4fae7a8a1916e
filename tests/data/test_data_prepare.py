"""Preparing data: complete or absent, the same bytes each time, and commands that say what is wrong."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmtrain.cli.data import app
from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.tar_index import index_shard
from mmtrain.data.prepare import demo
from mmtrain.data.prepare import output as folder_module
from mmtrain.data.prepare.demo import prepare_digits
from mmtrain.data.prepare.images import prepare_images
from mmtrain.errors import UserError

GREY = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def folder(tmp_path: Path, image_bytes: Callable) -> Path:
    """20 images of each of 3 classes in class folders."""
    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            content = image_bytes(100 * label + number, kind="JPEG" if number % 2 else "PNG")
            (tmp_path / "images" / name / f"{number}.{'JPEG' if number % 2 else 'png'}").write_bytes(content)
    return tmp_path / "images"


def tars(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.tar"))}


def test_class_folders_become_stratified_shards(folder: Path, tmp_path: Path) -> None:
    done = prepare_images(folder, tmp_path / "out", shard_size=7, workers=1)
    assert done.fresh
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["classes"] == ["cat", "dog", "eel"]
    assert meta["counts"] == {"train": 48, "val": 6, "test": 6}
    assert meta["source"] == str(folder)
    contents = []
    for split, count in meta["counts"].items():
        source = ImageShards(tmp_path / "out" / split, image_size=8, train=False, **GREY)
        assert (len(source), source.num_classes) == (count, 3)
        assert Counter(source.labels.tolist()) == dict.fromkeys(range(3), count // 3)
        assert max(source.block_sizes) <= 7
        assert max(source.block_sizes) - min(source.block_sizes) <= 1
        for shard in source.paths:
            assert shard.with_name(shard.name + ".idx").is_file()
            index, raw = index_shard(shard), shard.read_bytes()
            contents += [raw[o : o + s] for o, s in zip(index.offsets, index.sizes, strict=True)]
            assert split != "train" or len(set(index.labels.tolist())) > 1  # shuffled: shards mix the classes
    assert sorted(contents) == sorted(file.read_bytes() for file in folder.rglob("*.*"))  # stored as they are


def test_the_same_bytes_whatever_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    prepare_images(folder, tmp_path / "one", shard_size=10, workers=1)
    prepare_images(folder, tmp_path / "two", shard_size=10, workers=2)
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    assert len(tars(tmp_path / "one")) == 7


def test_split_folders_and_a_val_taken_from_train(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    root.mkdir()
    folder.rename(root / "train")
    prepare_images(root, tmp_path / "a", workers=1, val_fraction=0)
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["counts"] == {"train": 60}
    assert prepare_images(root, tmp_path / "b", workers=1).meta["counts"] == {"train": 54, "val": 6}
    (root / "test" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "0.png").rename(root / "test" / "cat" / "0.png")
    (root / "valid" / "dog").mkdir(parents=True)
    (root / "train" / "dog" / "0.png").rename(root / "valid" / "dog" / "0.png")
    done = prepare_images(root, tmp_path / "c", workers=1)
    assert done.meta["counts"] == {"train": 58, "val": 1, "test": 1}
    (root / "valid" / "cow").mkdir()
    with pytest.raises(UserError, match=r"classes that .*train does not have: cow"):
        prepare_images(root, tmp_path / "d", workers=1)


def test_images_are_shrunk_and_odd_formats_converted(tmp_path: Path, image_bytes: Callable) -> None:
    folder = tmp_path / "in" / "only"
    folder.mkdir(parents=True)
    (folder / "big.jpg").write_bytes(image_bytes(size=(90, 60), kind="JPEG"))
    (folder / "small.png").write_bytes(image_bytes(size=(20, 10)))
    (folder / "odd.bmp").write_bytes(image_bytes(size=(20, 10), kind="BMP"))
    Image.fromarray(np.full((50, 80), 7, np.uint8)).save(folder / "grey.tiff")
    prepare_images(tmp_path / "in", tmp_path / "out", image_size=30, workers=1, val_fraction=0, test_fraction=0)
    index = index_shard(tmp_path / "out" / "train" / "shard-000000.tar")
    raw = index.path.read_bytes()
    images = [Image.open(io.BytesIO(raw[o : o + s])) for o, s in zip(index.offsets, index.sizes, strict=True)]
    found = sorted((image.format, image.mode, image.size) for image in images)
    assert found == [
        ("JPEG", "RGB", (45, 30)),
        ("PNG", "L", (48, 30)),
        ("PNG", "RGB", (20, 10)),
        ("PNG", "RGB", (20, 10)),
    ]


def test_a_finished_set_is_left_alone_and_others_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_images(folder, out, workers=1)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    again = prepare_images(folder, out, workers=1)
    assert not again.fresh
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    with pytest.raises(UserError, match="prepared with shard_size 1000, not 5; give --force"):
        prepare_images(folder, out, workers=1, shard_size=5)
    assert prepare_images(folder, out, workers=1, shard_size=5, force=True).fresh
    assert len(tars(out)) == 14
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a finished dataset"):
        prepare_images(folder, tmp_path / "else", workers=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["else", "images", "out"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corrupt_image_is_named_and_nothing_is_left(folder: Path, tmp_path: Path, workers: int) -> None:
    broken = folder / "dog" / "7.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"dog/7\.JPEG: the image cannot be decoded"):
        prepare_images(folder, tmp_path / "out", shard_size=20, workers=workers)
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_killed_half_way(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from mmtrain.data.prepare import writer, images\n"
        "write, done = writer._write_shard, []\n"
        "def bomb(job):\n"
        "    done.append(write(job))\n"
        "    if len(done) == 3: os.kill(os.getpid(), 9)\n"
        "    return done[-1]\n"
        "writer._write_shard = bomb\n"
        "images.prepare_images(sys.argv[1], sys.argv[2], shard_size=10, workers=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out")], timeout=60)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    left = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".out.partial-")]
    assert len(left) == 1
    assert prepare_images(folder, tmp_path / "out", shard_size=10, workers=1).fresh
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "out"]


def test_bad_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        prepare_images(tmp_path / "none", tmp_path / "out")
    (tmp_path / "flat").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        prepare_images(tmp_path / "flat", tmp_path / "out")
    (folder / "fox").mkdir()
    with pytest.raises(UserError, match="no images of class 'fox'"):
        prepare_images(folder, tmp_path / "out")
    (folder / "fox").rmdir()
    with pytest.raises(UserError, match="too few"):
        prepare_images(folder, tmp_path / "out", val_fraction=0.49, test_fraction=0.5)
    assert not (tmp_path / "out").exists()


def test_digits(digits: Path, tmp_path: Path) -> None:
    meta = json.loads((digits / "meta.json").read_text())
    assert meta["classes"] == [str(number) for number in range(10)]
    assert sum(meta["counts"].values()) == 1797
    source = ImageShards(digits / "test", image_size=32, train=False, **GREY)
    assert len(source) == meta["counts"]["test"] == pytest.approx(0.2 * 1797, abs=5)
    assert min(Counter(source.labels.tolist()).values()) >= 34
    batch = source.fetch(np.arange(len(source)), None)
    assert batch["image"].shape[1:] == (3, 32, 32)
    assert float(batch["image"].min()) >= -1
    assert float(batch["image"].max()) == 1
    means = [batch["image"][batch["label"] == number].mean(0).flatten() for number in range(10)]
    near = np.array([[float((image.flatten() - mean).norm()) for mean in means] for image in batch["image"]])
    assert (near.argmin(1) == batch["label"].numpy()).mean() > 0.85  # real digits with their own labels
    again = prepare_digits(tmp_path / "again")
    assert tars(again.out) == tars(digits)
    assert not prepare_digits(digits).fresh


def fake_autots(root: Path, table: pd.DataFrame) -> None:
    data = root / "autots" / "datasets" / "data"
    data.mkdir(parents=True)
    (root / "autots" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    table.to_csv(data / "traffic_hourly.zip", index=False, compression={"method": "zip", "archive_name": "t.csv"})


def hours(rows: int = 200) -> pd.DataFrame:
    table = pd.DataFrame({"datetime": pd.date_range("2016-10-01", periods=rows, freq="h")})
    for place, name in enumerate(demo.COLUMNS):
        table[name] = np.arange(rows) * (place + 1.0)
    return table.assign(weather_main="Clear")


def test_traffic_fills_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = hours()
    table.loc[[10, 11, 50], list(demo.COLUMNS)] = np.nan
    table.loc[100, "rain_1h"] = 1e6
    fake_autots(tmp_path, table)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "autots", raising=False)
    report = demo.prepare_traffic(tmp_path / "out")
    assert (report.rows, report.holes, report.longest, report.outliers, report.fresh) == (
        200,
        3,
        2,
        {"rain_1h": 1},
        True,
    )
    written = pd.read_csv(report.file)
    assert list(written.columns) == ["date", *demo.COLUMNS]
    assert written["traffic_volume"].tolist() == [5.0 * hour for hour in range(200)]
    assert written["date"][1] == "2016-10-01 01:00:00"
    assert not demo.prepare_traffic(tmp_path / "out").fresh
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["traffic.csv"]


def test_traffic_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmtrain\[demo\]'"):
        demo.prepare_traffic(tmp_path)


def test_traffic_with_gaps_in_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_autots(tmp_path, hours().drop(index=[5]))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="1 irregular"):
        demo.prepare_traffic(tmp_path / "out")


def test_the_real_traffic_file(tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("autots") is None:
        pytest.skip("AutoTS is not installed: pip install 'mmtrain[demo]'")
    report = demo.prepare_traffic(tmp_path)
    assert report.rows == 17520
    assert "autots" not in sys.modules
    from mmtrain.data.series.table_source import load_series

    data = load_series(report.file, 336, 96)
    assert data.table.columns[-1] == "traffic_volume"
    assert len(data.test) == int(17520 * 0.2) - 95


def test_commands(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = str(tmp_path / "out")
    made = run(app, ["prepare", "images", "--root", str(folder), "--out", out, "--workers", "1"])
    assert made.exit_code == 0, made.output
    assert "48 train, 6 val, 6 test; 3 classes; written" in made.output
    again = run(app, ["prepare", "images", "--root", str(folder), "--out", out, "--workers", "1"])
    assert "already exists" in again.output
    indexed = run(app, ["index", f"{out}/train", f"{out}/val"])
    assert "2 shard(s), 54 samples, 3 classes: all valid" in indexed.output
    failed = run(app, ["index", f"{out}/nowhere"])
    assert isinstance(failed.exception, UserError)
    table = hours(48)
    table.loc[3, "temp"] = np.nan
    table.to_csv(tmp_path / "t.csv", index=False)
    told = run(app, ["describe", str(tmp_path / "t.csv")], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert "48 rows, 6 columns" in told.output
    assert "0 repeated, 0 irregular" in told.output
    for name in ("temp", "weather_main", "text"):
        assert name in told.output


def test_the_command_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, mmtrain.cli.data\n"
        "heavy = {'torch', 'pandas', 'timm', 'torchvision', 'webdataset', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_indexes_are_written_elsewhere_all_of_them_or_not_at_all(
    make_tar: Callable, samples: Callable, tmp_path: Path
) -> None:
    train, val = (make_tar(samples(2), f"{split}/shard-000000.tar") for split in ("train", "val"))
    run, out = CliRunner().invoke, tmp_path / "indexes"
    done = run(app, ["index", str(train), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert [file.name for file in out.iterdir()] == ["shard-000000.tar.idx"]
    both = run(app, ["index", str(train), str(val), "--out", str(out)])
    assert "two shards would write shard-000000.tar.idx" in str(both.exception)
    (tmp_path / "file").touch()
    failed = run(app, ["index", str(train), "--out", str(tmp_path / "file")])
    assert isinstance(failed.exception, UserError)
    (out / "shard-000000.tar.idx").unlink()
    (out / "shard-000000.tar.idx").mkdir()
    failed = run(app, ["index", str(train), "--out", str(out)])
    assert "shard-000000.tar.idx cannot be written" in str(failed.exception)


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = folder_module.exclusive

    @contextmanager
    def late(path: Path, *, wait: bool) -> Iterator[None]:
        with sound(path, wait=wait):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/meta.json").write_text("theirs")
            yield

    monkeypatch.setattr(folder_module, "exclusive", late)
    with (
        pytest.raises(UserError, match="another process has just written it"),
        folder_module.prepared_folder(tmp_path / "out", force=False) as part,
    ):
        (part / "meta.json").write_text("ours")
    assert (tmp_path / "out/meta.json").read_text() == "theirs"
