"""What ``tests.hostile.fuzz`` reads: for each target, how its inputs are made from good ones, and what reads them."""

from __future__ import annotations

import contextlib
import io
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hypothesis import strategies as st

from mmtrain.cli import main as run_command
from mmtrain.config import load_config, to_yaml
from mmtrain.data.images.tar_index import index_path, index_shard, write_index
from mmtrain.data.images.targets import read_samples
from mmtrain.data.series.describe import describe_table
from mmtrain.data.series.table import read_table
from mmtrain.errors import UserError
from mmtrain.inference.trained import load_trained
from mmtrain.train.checkpoint.metadata import INDEX, PICKLED, read_index
from mmtrain.train.checkpoint.metadata import write_index as write_tensor_index
from mmtrain.train.checkpoint.store import verify
from mmtrain.train.state import TrainState
from tests.compat import reading
from tests.hostile.made import EXPORT, RUN, newest, sign

# ------------------------------------------------------------------ inputs

WORDS = [
    *(b"0", b"-1", b"1e999", b"nan", b"inf", b"99999999999999999999", b"null", b"true", b'""', b"[]", b"{}", b"[[[["),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n", b",", b";", b"\t", b'"', b"'", b"${", b"}", b"../", b"/"),
    *(
        b"os.system",
        b"touch executed",
        b"${oc.env:HOME}",
        b"!!python/object/apply:os.system",
        b"2020-02-30",
        b"31/12/99",
    ),
    *(b"\x80\x04", b"cos\nsystem\n", b"\x93", b"R.", b"GNU.sparse.size=", b"\xc3\xa9", b"1.234,5", b"12:30"),
]


@st.composite
def damaged(draw: st.DrawFn, samples: list[bytes]) -> bytes:
    """One of ``samples`` with up to six changes: bytes replaced, taken out, doubled, or a word put in."""
    content = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 64, 512]))
        change = draw(st.sampled_from(["word", "byte", "cut", "double", "end"]))
        if change == "word":
            content[at : at + length] = draw(st.sampled_from(WORDS))
        elif change == "byte":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif change == "cut":
            del content[at : at + length]
        elif change == "double":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 3))
        else:
            del content[at:]
    return bytes(content)


_VALUE = st.one_of(
    st.sampled_from([word.decode(errors="replace") for word in WORDS]),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)
_KEYS = [
    "name",
    "seed",
    "threads",
    "model.name",
    "model.dim",
    "model.depth",
    "model",
    "data",
    "data.columns",
    "data.path",
]
_KEYS += ["optim.lr", "optim.betas", "train.epochs", "train.profile", "eval.select", "cluster.time", "task"]
_OVERRIDE = st.tuples(st.one_of(st.sampled_from(_KEYS), st.text(max_size=8)), _VALUE).map("=".join)


def _words(*starts: list[str]) -> st.SearchStrategy[list[str]]:
    """Command lines that begin with one of ``starts``, with arguments of any kind behind."""
    argument = st.one_of(
        _OVERRIDE, _VALUE, st.sampled_from(["--help", "--out", "x", "--config", "tsm2", "-", "--", "."])
    )
    return st.tuples(st.sampled_from(starts), st.lists(argument, max_size=3)).map(lambda pair: [*pair[0], *pair[1]])


# ------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """How inputs of one kind are made, and what reads one."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], object]


def make_targets(folder: Path) -> dict[str, Target]:
    """The targets, by name. Samples of good files are made, and inputs are written, in ``folder``."""
    reading.unpack(folder, "data", RUN)
    reading.unpack(folder, "data", EXPORT)
    return {
        "configs": _configs(folder),
        "tables": _tables(folder),
        "tars": _tars(folder),
        "indexes": _indexes(folder),
        "checkpoints": _checkpoints(folder),
        "exports": _exports(folder),
        "arguments": _arguments(folder),
    }


def _configs(folder: Path) -> Target:
    file = folder / "config.yaml"
    good = [to_yaml(load_config(name)).encode() for name in ("tsm2_etth1", "vim2_digits")]

    def read(case: tuple[bytes, list[str]]) -> None:
        file.write_bytes(case[0])
        config = load_config(file, case[1])
        file.write_text(to_yaml(config))
        assert load_config(file) == config, "a configuration that is written and read again is another one"

    intact = st.sampled_from(good)
    return Target(st.tuples(st.one_of(intact, damaged(good)), st.lists(_OVERRIDE, max_size=3)), read)


def _tables(folder: Path) -> Target:
    rows = [f"2020-01-{day:02d},{day}.5,{day}" for day in range(1, 29)]
    plain = "date,a,b\n" + "\n".join(rows) + "\n"
    european = plain.replace(",", ";").replace(".", ",")
    epochs = "time,v\n" + "".join(f"{1577836800 + 3600 * i},{i}\n" for i in range(20))
    days = "when,v\n" + "".join(f"{i:02d}/01/2020,{i}\n" for i in range(1, 20))
    zoned = "date,v\n" + "".join(f"2020-03-{i:02d}T00:00:00+01:00,{i}\n" for i in range(1, 20))
    texts = [plain, european, epochs, days, zoned, plain.replace(",", "\t"), "a\n1\n2\n"]
    good = [*(text.encode() for text in texts), plain.encode("utf-16"), plain.replace("a", "ä").encode("latin-1")]
    packed = io.BytesIO()
    pd.read_csv(io.StringIO(plain), parse_dates=["date"]).to_parquet(packed)
    binary = [packed.getvalue()]

    def read(case: tuple[str, bytes]) -> None:
        file = folder / f"table.{case[0]}"
        file.write_bytes(case[1])
        for use in (lambda: read_table(file, missing="mask"), lambda: describe_table(file)):
            with contextlib.suppress(UserError):
                use()

    text = st.tuples(st.just("csv"), st.one_of(damaged(good), st.binary(max_size=60)))
    return Target(
        st.one_of(text, text, st.tuples(st.sampled_from(["parquet", "zip", "csv.gz"]), damaged(binary))), read
    )


def _shard() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            for suffix, content in (("png", b"pixels"), ("cls", b"1"), ("json", b'{"label": 1}')):
                name = f"{number}{'é' * (number == 2)}.{suffix}"
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def _tars(folder: Path) -> Target:
    shard = folder / "shard.tar"

    def read(content: bytes) -> None:
        shard.write_bytes(content)
        index_path(shard).unlink(missing_ok=True)
        for use in (lambda: index_shard(shard), lambda: list(read_samples(shard))):
            with contextlib.suppress(UserError):
                use()

    return Target(damaged([_shard()]), read)


def _indexes(folder: Path) -> Target:
    shard = folder / "indexed.tar"
    shard.write_bytes(_shard())
    good = index_shard(shard, rebuild=True)
    write_index(good, index_path(shard))
    content = index_path(shard).read_bytes()

    def read(damage: bytes) -> None:
        index_path(shard).write_bytes(damage)
        found = index_shard(shard)
        assert len(found.labels) == len(good.labels), "a damaged index was believed"

    return Target(damaged([content]), read)


def _checkpoints(folder: Path) -> Target:
    place = newest(folder)
    pickled = (place / PICKLED).read_bytes()
    write_tensor_index(place, read_index(place))
    originals = {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()}

    def read(case: tuple[str, bytes]) -> None:
        for name, content in originals.items():
            (place / name).write_bytes(content)
        if case[0] == PICKLED:
            (place / INDEX).unlink()
        (place / case[0]).write_bytes(case[1])
        verify(place)  # of a manifest: says in words what does not fit
        if case[0] != "manifest.json":
            sign(place)
        for use in (lambda: read_index(place), lambda: TrainState.read(place), lambda: load_trained(folder / RUN)):
            with contextlib.suppress(UserError):
                use()

    originals[PICKLED] = pickled
    named = ["state.json", "manifest.json", "config.yaml", INDEX, PICKLED]
    kinds = [st.tuples(st.just(name), damaged([originals[name]])) for name in named if name in originals]
    return Target(st.one_of(kinds), read)


def _exports(folder: Path) -> Target:
    place = folder / EXPORT
    originals = {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()}

    def read(case: tuple[str, bytes]) -> None:
        for name, content in originals.items():
            (place / name).write_bytes(content)
        (place / case[0]).write_bytes(case[1])
        load_trained(place)

    return Target(st.one_of([st.tuples(st.just(name), damaged([raw])) for name, raw in originals.items()]), read)


def _arguments(folder: Path) -> Target:
    starts = [
        ["train", "--print-config", "--config", "tsm2_etth1"],
        ["submit", "--dry-run", "--config", "tsm2_etth1"],
        ["model", "tsm2"],
        *(["runs"], ["configs"], ["data", "describe"], ["data"], ["predict"], ["predict", RUN], ["eval"], ["export"]),
        *(["report"], ["runs", "logs"], ["runs", "stop"], ["data", "prepare", "panel"], ["data", "prepare", "images"]),
    ]

    def read(words: list[str]) -> None:
        argv, sys.argv = sys.argv, ["mmtrain", *words]
        try:
            run_command()
        except SystemExit as end:
            if end.code not in (0, None, 2):
                raise AssertionError(f"exit status {end.code}") from end
        finally:
            sys.argv = argv

    return Target(_words(*starts), read)
