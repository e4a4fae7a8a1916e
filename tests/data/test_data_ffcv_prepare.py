"""``mmtrain data prepare ffcv``: what FFCV itself reads back, the same bytes every time, faults that say what to do."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beton_cases import CLASSES, LOOK, Made, make, make_shards, picture
from PIL import Image

from mmtrain.config import FFCVDataConfig, load_config
from mmtrain.data.core.loader import eval_batches
from mmtrain.data.ffcv.format import read_beton, require_ffcv
from mmtrain.data.ffcv.source import open_beton
from mmtrain.data.images.photo import decode
from mmtrain.data.prepare.ffcv import prepare_beton
from mmtrain.errors import UserError
from mmtrain.plan.dataset import describe_dataset

FILES = [picture(n, (30 + n, 40 - n)) for n in range(8)]


def order_of_shards(shards: Path, split: str = "train") -> list[bytes]:
    from mmtrain.data.images.shards import find_shards
    from mmtrain.data.images.tar_index import index_shards

    found = []
    for shard in index_shards(find_shards(shards / split)):
        content = shard.path.read_bytes()
        found += [content[a : a + n] for a, n in zip(shard.offsets.tolist(), shard.sizes.tolist(), strict=True)]
    return found


def stored(file: Path) -> list[bytes]:
    content, rows = file.read_bytes(), read_beton(file).rows
    return [content[at : at + size] for at, size in zip(rows[3].tolist(), rows[4].tolist(), strict=True)]


def test_jpeg_files_are_kept_in_the_order_of_the_shards(photos: Made) -> None:
    for split, count, blocks in (("train", 22, [6, 6, 5, 5]), ("val", 7, [4, 3])):
        file = photos.beton / f"{split}.beton"
        beton = read_beton(file)
        assert len(beton) == count
        assert beton.block_sizes == blocks
        assert beton.classes == CLASSES
        assert stored(file) == order_of_shards(photos.shards, split)
    meta = json.loads((photos.beton / "meta.json").read_text())
    assert meta["counts"] == {"train": 22, "val": 7}


def test_blocks_are_runs_of_pages(photos: Made) -> None:
    beton = read_beton(photos.beton / "train.beton")
    pages = np.split(beton.rows[3] // beton.page_size, np.cumsum(beton.block_sizes)[:-1])
    assert all(int(one.max()) < int(other.min()) for one, other in itertools.pairwise(pages))


def test_ffcv_itself_reads_the_file(pixels: Made) -> None:
    from ffcv.reader import Reader

    file = pixels.beton / "train.beton"
    reader = Reader(str(file))
    content = np.fromfile(file, dtype=np.uint8)
    size_of = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    assert reader.alloc_table["sample_id"].tolist() == list(range(22))
    assert reader.field_names == ["image", "label"]
    assert reader.metadata["f1"].tolist() == read_beton(file).labels.tolist()
    for row, expected in zip(reader.metadata["f0"], order_of_shards(pixels.shards), strict=True):
        image = content[row["data_ptr"] :][: size_of[int(row["data_ptr"])]].reshape(row["height"], row["width"], 3)
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(expected))))


@pytest.mark.slow
def test_a_file_of_ffcvs_own_writer_is_read(ffcv: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = [np.full((16, 16, 3), 20 * n, dtype=np.uint8) for n in range(5)]
    file = tmp_path / "train.beton"
    writer = DatasetWriter(str(file), {"label": IntField(), "image": RGBImageField("raw")}, num_workers=1)
    writer.from_indexed_dataset([(n % 2, image) for n, image in enumerate(images)])
    source = open_beton(file, train=False, **LOOK)
    assert source.block_sizes == [5]
    assert source.classes is None
    found = next(eval_batches(source, batch_size=5))
    levels = found["image"][:, 1, 0, 0] * LOOK["std"][1] + LOOK["mean"][1]
    assert np.allclose(levels.numpy() * 255, [0, 20, 40, 60, 80], atol=1e-3)
    assert found["label"].tolist() == [0, 1, 0, 1, 0]


def test_write_modes(ffcv: None, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", {"train": FILES}, 3)
    largest = [max(Image.open(io.BytesIO(content)).size) for content in order_of_shards(shards)]

    def written(name: str, **options: Any) -> tuple[Any, list[bytes]]:
        out = prepare_beton(shards, tmp_path / name, page_size=2, workers=1, **options).out
        return read_beton(out / "train.beton").rows, stored(out / "train.beton")

    (modes, heights, widths, _, _), contents = written("raw", write_mode="raw")
    assert modes.tolist() == [1] * 8
    assert [len(content) for content in contents] == (heights * widths * 3).tolist()
    (modes, heights, widths, _, _), contents = written("small", max_resolution=34)
    assert modes.tolist() == [0] * 8
    assert np.maximum(heights, widths).tolist() == [min(34, side) for side in largest]
    kept = [content == original for content, original in zip(contents, order_of_shards(shards), strict=True)]
    assert kept == [side <= 34 for side in largest]
    _, fine = written("fine", jpeg_quality=95)
    _, coarse = written("coarse", jpeg_quality=20)
    assert sum(map(len, coarse)) < 0.8 * sum(map(len, fine))
    (modes, *_), _ = written("some", write_mode="proportion")
    assert 0 < int(modes.sum()) < 8
    assert written("none", write_mode="proportion", compress_probability=0.0)[0][0].tolist() == [1] * 8


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_workers(ffcv: None, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", {"train": FILES}, 2)
    found = [
        prepare_beton(shards, tmp_path / f"out{n}", write_mode="proportion", page_size=2, workers=n).out for n in (1, 2)
    ]
    assert (found[0] / "train.beton").read_bytes() == (found[1] / "train.beton").read_bytes()


def test_what_is_there_is_left_alone(photos: Made, tmp_path: Path) -> None:
    out = tmp_path / "beton"
    shutil.copytree(photos.beton, out)
    assert not prepare_beton(photos.shards, out, page_size=2, workers=1).fresh
    with pytest.raises(UserError, match=r"write_mode 'jpg', not 'raw'.*--force"):
        prepare_beton(photos.shards, out, write_mode="raw", page_size=2, workers=1)
    assert prepare_beton(photos.shards, out, write_mode="raw", page_size=2, workers=1, force=True).fresh


Samples = Callable[..., list[tuple[str, bytes]]]


def test_an_image_that_cannot_be_decoded_leaves_nothing_behind(
    ffcv: None, tmp_path: Path, make_tar: Callable[..., Path], samples: Samples
) -> None:
    make_tar([*samples(2), ("000007.cls", b"1"), ("000007.jpg", FILES[0][:200])])
    with pytest.raises(UserError, match=r"shard-000000\.tar, sample '000007': the image cannot be stored"):
        prepare_beton(tmp_path, tmp_path / "out", workers=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train"]


def test_an_image_larger_than_a_page(ffcv: None, tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 800)).save(buffer, "PNG")
    make_tar([("big.cls", b"0"), ("big.png", buffer.getvalue())])
    with pytest.raises(UserError, match=r"sample 'big': 2400000 bytes.*--page-size 4"):
        prepare_beton(tmp_path, tmp_path / "out", write_mode="raw", page_size=2, workers=1)
    assert prepare_beton(tmp_path, tmp_path / "out", write_mode="raw", page_size=4, workers=1).fresh


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_and_no_hang(ffcv: None, photos: Made, tmp_path: Path) -> None:
    from mmtrain.data.prepare.ffcv import Encoding, Job, encode_block
    from mmtrain.data.prepare.pool import run_jobs

    job = Job(_Deadly(), 0, tmp_path / "part", Encoding("jpg", None, None, 0.5, 2 << 20))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a worker process died.*--workers"):
        list(run_jobs(encode_block, [job, job], 2, ordered=True))


def test_a_dataset_without_meta_json(
    ffcv: None, tmp_path: Path, make_tar: Callable[..., Path], samples: Samples
) -> None:
    make_tar(samples(4))
    done = prepare_beton(tmp_path, tmp_path / "out", page_size=2, workers=1)
    assert "classes" not in done.meta
    assert read_beton(done.out / "train.beton").classes is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"write_mode": "png"}, "--write-mode png"),
        ({"max_resolution": 0}, "--max-resolution 0"),
        ({"jpeg_quality": 101}, "--jpeg-quality 101"),
        ({"compress_probability": 2.0}, "--compress-probability 2.0"),
        ({"page_size": 3}, "--page-size 3"),
        ({"root": "nowhere"}, "--root .*nowhere: no such folder"),
        ({"root": "."}, "contains none of the folders train, val, test"),
        ({"out": "out/train.beton"}, "must be a folder"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        prepare_beton(**{"root": tmp_path, "out": tmp_path / "out", **options})


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ffcv" else real(name))
    with pytest.raises(UserError, match=r"apt-get install -y libopencv-dev .* pip install 'mmtrain\[ffcv\]'"):
        require_ffcv()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ffcv.memory_managers", None)  # as where its library does not load
    with pytest.raises(UserError, match="ffcv"):
        require_ffcv()


@pytest.fixture
def copy(photos: Made, tmp_path: Path) -> Path:
    shutil.copytree(photos.beton, tmp_path / "copy")
    return tmp_path / "copy" / "train.beton"


@pytest.mark.parametrize("kept", [0, 10, 24, 3000, 0.3, 0.999, -24, -1])
def test_a_truncated_file_is_refused(copy: Path, kept: float) -> None:
    size = copy.stat().st_size
    length = int(kept * size) if isinstance(kept, float) else kept if kept >= 0 else size + kept
    with open(copy, "r+b") as stream:
        stream.truncate(length)
    with pytest.raises(UserError, match=r"train\.beton: .*(truncated|not a \.beton).*prepare ffcv --force"):
        read_beton(copy)


def change(file: Path, **changes: Any) -> None:
    meta = json.loads((file.parent / "meta.json").read_text())
    (file.parent / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_a_file_and_a_meta_json_that_do_not_belong_together(copy: Path) -> None:
    change(copy, counts={"train": 21, "val": 7})
    with pytest.raises(UserError, match=r"22 samples, but the meta\.json in its folder lists 21 samples"):
        read_beton(copy)
    change(copy, counts={"train": 22}, blocks={"train": [6, 6, 5, 4]})
    with pytest.raises(UserError, match="blocks of 21 samples in total"):
        read_beton(copy)
    change(copy, blocks={"train": [22]}, classes=["ant", "bee"])
    with pytest.raises(UserError, match=r"label 2.*lists 2 classes"):
        read_beton(copy)
    (copy.parent / "meta.json").write_text("[")
    with pytest.raises(UserError, match=r"meta\.json: cannot be read"):
        read_beton(copy)
    (copy.parent / "meta.json").unlink()
    assert read_beton(copy).block_sizes == [22]


def test_other_files_are_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match=r"tran\.beton: no such file.*did you mean 'train\.beton'"):
        read_beton(copy.with_name("tran.beton"))
    text = tmp_path / "a.beton"
    text.write_text("words " * 1000)
    with pytest.raises(UserError, match=r"not a \.beton"):
        read_beton(text)
    content = bytearray(copy.read_bytes())
    content[25:30] = b"photo"  # the name of the first field
    copy.write_bytes(content)
    with pytest.raises(UserError, match="the fields are photo, label"):
        read_beton(copy)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_configurations_resolve_and_are_planned(photos: Made, size: str) -> None:
    config = load_config(f"vim2_{size}_in1k_ffcv")
    assert isinstance(config.data, FFCVDataConfig)
    plain = load_config(f"vim2_{size}_in1k")
    assert (config.model, config.optim, config.train) == (plain.model, plain.optim, plain.train)
    assert describe_dataset(config).samples == describe_dataset(plain).samples
    found = describe_dataset(load_config(f"vim2_{size}_in1k_ffcv", [f"data.root={photos.beton}"]))
    assert found.samples == 22
    assert found.stored == pytest.approx(np.mean([len(content) for content in stored(photos.beton / "train.beton")]))


@pytest.mark.parametrize(
    "value", ["augment=crops", "crop_pct=0", "hflip=2", "re_prob=-1", "faults=skip", "root=https://example.org/set"]
)
def test_wrong_values_are_refused_by_key(value: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{value.split('=')[0]}="):
        load_config("vim2_tiny_in1k_ffcv", [f"data.{value}"])


def test_the_command_line(cli: Any, photos: Made, tmp_path: Path) -> None:
    done = cli(
        "data", "prepare", "ffcv", "--root", photos.shards, "--out", tmp_path / "o", "--page-size", 2, "--workers", 1
    )
    assert done.returncode == 0, done.stderr
    assert "22 train, 7 val; 3 classes; written" in done.stdout
    done = cli("data", "prepare", "ffcv", "--root", tmp_path / "nowhere", "--out", tmp_path / "p")
    assert done.returncode == 2
    assert "no such folder" in done.stderr


@pytest.mark.slow
def test_a_run_on_ffcv_is_that_on_the_shards(cli: Any, ffcv: None, digits: Path, tmp_path: Path) -> None:
    """The digits, stored as they are: the same losses, bit by bit, as from the tar shards."""
    prepare_beton(digits, tmp_path / "beton", write_mode="raw", page_size=2, workers=1)
    losses = []
    for name, data in (("shards", digits), ("ffcv", tmp_path / "beton")):
        (tmp_path / f"{name}.yaml").write_text(
            f"data: {{kind: {name}, root: {data}, test: test, image_size: 32, augment: light, mean: [0.3, 0.3, 0.3],"
            " std: [0.35, 0.35, 0.35]}\nmodel: {name: vim2_nano, num_classes: 10}\n"
            "task: {kind: classification, mixup: 0.0, cutmix: 0.0}\noptim: {lr: 2.0e-3, warmup_epochs: 0.1}\n"
            "train: {epochs: 0.1, batch_size: 32, precision: fp32, log_every: 1}\n"
        )
        done = cli("train", "--config", tmp_path / f"{name}.yaml", f"run_root={tmp_path / 'runs'}")
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert len(losses[0]) >= 3
    assert losses[0] == losses[1]


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.slow
def test_a_photo_that_its_camera_turned_is_stored_upright(ffcv: None, tmp_path: Path, orientation: int) -> None:
    """FFCV does not look at EXIF: a file kept as it is would be another image than from the shards."""
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.open(io.BytesIO(picture(0, (40, 40)))).save(turned, "JPEG", quality=95, exif=exif)
    made = make(tmp_path, {"train": [turned.getvalue(), picture(1, (40, 40))]})
    upright = [np.asarray(decode(content).resize((16, 16)), float) for content in order_of_shards(made.shards)]
    images = made.source(train=False, mean=[0.0] * 3, std=[1.0] * 3).fetch(np.arange(2), None)["image"]
    for image, expected in zip(images.permute(0, 2, 3, 1).numpy() * 255, upright, strict=True):
        assert abs(image - expected).mean() < 12


def test_what_a_killed_preparation_left_is_not_taken_for_its_own(photos: Made, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial-whole"
    left.mkdir()
    for name in ("test.beton", "train.beton.000007"):
        shutil.copy(photos.beton / "val.beton", left / name)
    done = prepare_beton(photos.shards, tmp_path / "out", page_size=2, workers=1)
    assert sorted(file.name for file in done.out.iterdir()) == ["meta.json", "train.beton", "val.beton"]


def test_pages_of_no_possible_size_are_refused(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[4:8] = (3 << 20).to_bytes(4, "little")
    copy.write_bytes(content)
    with pytest.raises(UserError, match="the page size 3145728 is not a power of two"):
        read_beton(copy)


def test_places_that_wrap_around_are_refused(copy: Path) -> None:
    """A place near 2^64 plus a size is a small number."""
    content = copy.read_bytes()
    last = np.frombuffer(content[-24:], "<u8")
    moved = np.array([last[0], 2**64 - 10, 20], "<u8")
    rows = content[:-24].replace(last[1].tobytes(), moved[1].tobytes())
    copy.write_bytes(rows + moved.tobytes())
    with pytest.raises(UserError, match="the table of images is damaged"):
        read_beton(copy)


@pytest.mark.slow
def test_what_betons_cannot_do_is_said(photos: Made, caplog: pytest.LogCaptureFixture) -> None:
    photos.source(augment="imagenet", os_cache=False)
    assert "data.os_cache=false has no effect with data.augment=imagenet" in caplog.text
