"""Tables that cannot be read as what they claim to be: one message that names the file and the cure."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.data.prepare.panel import prepare_panel
from mmtrain.data.series.describe import describe_table
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table import read_table
from mmtrain.errors import UserError
from tests.conftest import Cli

CSV = "date,a,b\n" + "".join(f"2022-01-{day:02d},{day}.5,{day}\n" for day in range(1, 29))
LONG = "unique_id,ds,y\n" + "".join(f"{name},2022-01-{day:02d},{day}\n" for name in "xy" for day in range(1, 29))


def packed(name: str, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, CSV)
    return stream.getvalue()


def changed(content: bytes, *at: tuple[int, bytes]) -> bytes:
    made = bytearray(content)
    for place, new in at:
        made[place : place + len(new)] = new
    return bytes(made)


def _directory() -> int:
    return packed("t.csv").rfind(b"PK\1\2")


ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted": (lambda: changed(packed("t.csv"), (6, b"\x01"), (_directory() + 8, b"\x01")), "encrypted"),
    "unknown": (lambda: changed(packed("t.csv"), (8, b"\x63"), (_directory() + 10, b"\x63")), "compression"),
    "damaged": (lambda: changed(packed("t.csv"), (60, b"\xff" * 40)), "damaged"),
    "lzma": (lambda: changed(packed("t.csv", zipfile.ZIP_LZMA), (60, b"\xff" * 40)), "damaged"),
    "bz2": (lambda: changed(packed("t.csv", zipfile.ZIP_BZIP2), (60, b"\xff" * 40)), "Invalid data"),
    "cut": (lambda: packed("t.csv")[:-30], "damaged"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_zips_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    make, message = ZIPS[name]
    (tmp_path / "t.zip").write_bytes(make())
    for read in (read_table, describe_table):
        with pytest.raises(UserError, match=rf"t\.zip: cannot be read as a table \(.*{message}"):
            read(tmp_path / "t.zip")


def test_a_zip_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.zip").write_bytes(packed("t.csv"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=500))
    with pytest.raises(UserError, match=r"t\.zip: unpacks to .* GB of memory are free"):
        read_table(tmp_path / "t.zip")


#: Options of ``prepare panel`` that name the id or the time.
COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"columns": ["y", "unique_id"]}, r"--columns unique_id: it is the id column"),
    ({"columns": ["ds"], "time_column": "ds"}, r"--columns ds: it is the time column"),
    ({"known": ["ds"], "columns": ["y"], "time_column": "ds"}, r"--known ds: it is the time column"),
    ({"known": ["unique_id"], "columns": ["y"]}, r"--known unique_id: it is the id column"),
]


@pytest.mark.parametrize(("options", "message"), COLUMNS, ids=[message for _, message in COLUMNS])
def test_columns_of_a_panel_that_are_none(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(LONG)
    with pytest.raises(UserError, match=message):
        prepare_panel(tmp_path / "t.csv", tmp_path / "p", split=SplitRule("ratio", parts=(0.6, 0.2, 0.2)), **options)
    assert not (tmp_path / "p").exists()


#: What ``data describe`` is given, and a part of its answer; it reads what training reads.
DESCRIBED: dict[str, tuple[bytes, int, str]] = {
    "utf-16": (CSV.encode("utf-16"), 0, "28 rows"),
    "latin-1": (CSV.replace("a", "ä").encode("latin-1"), 0, "28 rows"),
    "zero bytes": (bytes(100), 2, "t.csv"),
    "nothing": (b"", 2, "t.csv"),
    "a header alone": (b"date,a,b\n", 2, "t.csv"),
    "one row with a field more": (CSV.encode() + b"2022-02-01,1,2,3\n", 2, "line 30"),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_describe_reads_it_or_says_why_not(name: str, cli: Cli, tmp_path: Path) -> None:
    content, status, part = DESCRIBED[name]
    (tmp_path / "t.csv").write_bytes(content)
    done = cli("data", "describe", "t.csv")
    assert done.returncode == status
    assert part in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
