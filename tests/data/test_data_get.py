"""Fetching tables: whatever the server does, there is a right file or a clear error, and no half file."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import multiprocessing
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmtrain.data.download import fetch, http
from mmtrain.data.download.check import canonical_digest, check_table, file_sha256, read_content
from mmtrain.data.download.fetch import get_dataset, verify_dataset
from mmtrain.data.download.http import Patience
from mmtrain.data.download.registry import DATASETS, Dataset, Source, find_dataset
from mmtrain.data.series.table import read_table
from mmtrain.errors import UserError
from tests.data.served import Server, serving

ROWS = 300
QUICK = Patience(connect=5, stall=5, attempts=3, backoff=0.01)


def table(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    frame = pd.DataFrame(values, columns=["0", "1", "OT"])
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=rows, freq="h"))
    return frame


def csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


def entry(*sources: Source, digest: str | None = None) -> Dataset:
    last = str(table()["date"].iloc[-1])
    first = "2020-01-01 00:00:00"
    return Dataset("toy", "toy", ROWS, ("0", "1", "OT"), first, last, 3600, sources, "free", "nobody", digest)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as served:
        served.content = csv(table())
        yield served


def get(server: Server, root: Path, dataset: Dataset | None = None, **options: Any) -> fetch.Fetched:
    return get_dataset(dataset or entry(Source(server.url)), root, patience=QUICK, **options)


def names(root: Path) -> set[str]:
    return {file.name for file in root.iterdir()}


def right(server: Server, root: Path) -> None:
    assert (root / "toy.csv").read_bytes() == server.content
    assert names(root) == {"toy.csv", "toy.csv.sha256"}


def test_a_fetched_table_is_found_by_its_name(server: Server, tmp_path: Path) -> None:
    got = get(server, tmp_path)
    right(server, tmp_path)
    assert (got.origin, got.known) == (server.url, False)
    assert "the values are not checked" in got.checked.how
    assert read_table("toy", data_root=tmp_path).values.shape == (ROWS, 3)
    kept = (tmp_path / "toy.csv.sha256").read_text()
    assert kept == f"{file_sha256(tmp_path / 'toy.csv')}  toy.csv\n"
    again = get(server, tmp_path)
    assert (again.origin, again.known, len(server.asked)) == ("", True, 1)
    assert get(server, tmp_path, force=True).known
    assert len(server.asked) == 2


def test_the_content_decides_where_a_digest_is_known(server: Server, tmp_path: Path) -> None:
    known = entry(Source(server.url), digest=read_content_of(server.content, tmp_path))
    assert "official" in get(server, tmp_path / "a", known).checked.how
    server.content = csv(table(seed=1))
    with pytest.raises(UserError, match="digest of the values: found"):
        get(server, tmp_path / "b", known)
    assert names(tmp_path / "b") == set()


def read_content_of(content: bytes, folder: Path) -> str:
    file = folder / "content.csv"
    file.write_bytes(content)
    return read_content(file).digest


def test_a_pinned_sha256_and_size(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(server.content)
    source = Source(server.url, sha256=file_sha256(tmp_path / "x"), size=len(server.content))
    get(server, tmp_path / "a", entry(source))
    right(server, tmp_path / "a")
    for wrong, said in (
        (dataclasses.replace(source, sha256="0" * 64), "SHA-256"),
        (Source(server.url, size=5), "instead of 5"),
    ):
        with pytest.raises(UserError, match=said):
            get(server, tmp_path / "b", entry(wrong))
        assert names(tmp_path / "b") == set()


def test_broken_off_and_resumed(server: Server, tmp_path: Path) -> None:
    def half(handler: Any, number: int) -> bool:
        if number == 1:
            handler.answer(200, server.content[:1000], {"ETag": server.etag}, length=len(server.content))
        return number == 1

    server.trick = half
    get(server, tmp_path)
    right(server, tmp_path)
    assert server.asked == ["", "bytes=1000-"]
    assert server.conditions == ["", server.etag]


def test_parts_that_are_shorter_than_asked_for(server: Server, tmp_path: Path) -> None:
    """A server may send less than the rest of the file."""

    def less(handler: Any, number: int) -> bool:
        start = [0, 1000, 3000][min(number, 3) - 1]
        stop = [1000, 3000][min(number, 2) - 1]
        if number == 1:
            handler.answer(200, server.content[:stop], {"ETag": server.etag}, length=len(server.content))
        elif number == 2:
            place = f"bytes {start}-{stop - 1}/{len(server.content)}"
            handler.answer(206, server.content[start:stop], {"ETag": server.etag, "Content-Range": place})
        return number <= 2

    server.trick = less
    get(server, tmp_path)
    right(server, tmp_path)
    assert server.asked == ["", "bytes=1000-", "bytes=3000-"]


def test_what_arrived_outlives_the_process(server: Server, tmp_path: Path) -> None:
    server.trick = lambda handler, number: (
        handler.answer(200, server.content[:1000], {"ETag": server.etag}, length=len(server.content))
        or handler.connection.close()
        or True
    )
    with pytest.raises(UserError, match="To add it manually"):
        get(server, tmp_path)
    assert names(tmp_path) == {"toy.csv.part", "toy.csv.part.json"}
    server.trick, server.asked = lambda handler, number: False, []
    get(server, tmp_path)
    right(server, tmp_path)
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("how", ["If-Range", "another ETag in a 206", "416"])
def test_a_file_that_changes_between_attempts_starts_over(server: Server, tmp_path: Path, how: str) -> None:
    old = server.content
    server.content = old.replace(b".1", b".2")  # of the same length
    assert server.content != old

    def change(handler: Any, number: int) -> bool:
        if number == 1:
            handler.answer(200, old[:1000], {"ETag": '"old"'}, length=len(old))
        elif number == 2 and how != "If-Range":
            place = f"bytes 1000-{len(server.content) - 1}/{len(server.content)}"
            headers = {"ETag": server.etag, "Content-Range": place}
            handler.answer(416 if how == "416" else 206, b"" if how == "416" else server.content[1000:], headers)
        return number == 1 or (number == 2 and how != "If-Range")

    server.trick = change
    get(server, tmp_path)
    right(server, tmp_path)


def test_without_a_strong_etag_nothing_is_joined(server: Server, tmp_path: Path) -> None:
    server.etag = 'W/"weak"'

    def half(handler: Any, number: int) -> bool:
        if number == 1:
            handler.answer(200, csv(table(seed=1))[:1000], {"ETag": server.etag}, length=len(server.content))
        return number == 1

    server.trick = half
    get(server, tmp_path)
    right(server, tmp_path)
    assert server.asked == ["", ""]


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False

    def half(handler: Any, number: int) -> bool:
        if number == 1:
            handler.answer(200, server.content[:1000], {"ETag": server.etag}, length=len(server.content))
        return number == 1

    server.trick = half
    get(server, tmp_path)
    right(server, tmp_path)


@pytest.mark.parametrize("code", [500, 429])
def test_a_passing_fault_is_waited_for(server: Server, tmp_path: Path, code: int) -> None:
    server.trick = lambda handler, number: number == 1 and (handler.answer(code, b"") or True)
    get(server, tmp_path)
    right(server, tmp_path)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("code", "asked", "said"), [(500, 3, r"500 Internal Server Error \(tried 3 times\)"), (404, 1, "404 Not Found")]
)
def test_a_lasting_fault_is_an_error(server: Server, tmp_path: Path, code: int, asked: int, said: str) -> None:
    server.trick = lambda handler, number: handler.answer(code, b"") or True
    with pytest.raises(UserError, match=said):
        get(server, tmp_path)
    assert len(server.asked) == asked
    assert names(tmp_path) == set()


@pytest.mark.parametrize("pause", [5.0, 0.02])
def test_a_stalled_server_is_given_up(server: Server, tmp_path: Path, pause: float) -> None:
    """Silent after the first byte, and one byte now and then."""
    server.trick = lambda handler, number: (
        handler.answer(200, server.content, {"ETag": server.etag}, pause=pause) or True
    )
    began = time.monotonic()
    with pytest.raises(UserError, match=r"stalled|timed out"):
        get_dataset(entry(Source(server.url)), tmp_path, patience=dataclasses.replace(QUICK, stall=0.15))
    assert time.monotonic() - began < 10
    assert not (tmp_path / "toy.csv").exists()


def test_slow_and_steady_is_waited_for(server: Server, tmp_path: Path) -> None:
    pause = {"pause": 0.05, "step": 1000}
    server.trick = lambda handler, number: handler.answer(200, server.content, **pause) or True
    get_dataset(entry(Source(server.url)), tmp_path, patience=dataclasses.replace(QUICK, stall=0.2))
    right(server, tmp_path)


@pytest.mark.parametrize(
    ("announced", "said"), [(+7, "was interrupted|ended after"), (-700, "rows: found 2|not numeric|no date")]
)
def test_a_wrong_length_is_an_error(server: Server, tmp_path: Path, announced: int, said: str) -> None:
    length = len(server.content) + announced
    server.trick = lambda handler, number: handler.answer(200, server.content, length=length) or True
    with pytest.raises(UserError, match=said):
        get(server, tmp_path)
    assert not (tmp_path / "toy.csv").exists()


def test_a_server_that_breaks_off_at_the_same_byte_is_not_asked_for_ever(server: Server, tmp_path: Path) -> None:
    """Much arrives each time, and never more than the first time."""
    patience = dataclasses.replace(QUICK, progress=1000)
    server.ranges = False
    server.trick = lambda handler, number: handler.answer(200, server.content[:5000], length=9000) or True
    with pytest.raises(UserError, match="5000"):
        get_dataset(entry(Source(server.url)), tmp_path, patience=patience)
    assert len(server.asked) <= 4


@pytest.mark.parametrize("garbage", [b"\x00\xff" * 4000, b"<html>sign in</html>" * 20, b"", b"date,0,1,OT\n"])
def test_garbage_is_an_error(server: Server, tmp_path: Path, garbage: bytes) -> None:
    server.content = garbage
    with pytest.raises(UserError, match="toy could not be fetched"):
        get(server, tmp_path)
    assert names(tmp_path) == set()


def test_too_much_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than the limit of 100"):
        get(server, tmp_path, entry(Source(server.url, limit=100)))

    def unannounced(handler: Any, number: int) -> bool:
        handler.send_response(200)
        handler.send_header("ETag", '"one"')
        handler.end_headers()
        handler.wfile.write(server.content)
        return True

    server.trick = unannounced
    with pytest.raises(UserError, match="more than the limit of 100 bytes"):
        get(server, tmp_path, entry(Source(server.url, limit=100)))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("{url}", "redirected more than 5 times"),
        ("file:///etc/passwd", "redirects to file:///etc/passwd, but only http"),
        ("ftp://127.0.0.1/t.csv", "only http and https"),
    ],
)
def test_redirects_that_are_not_followed(server: Server, tmp_path: Path, location: str, said: str) -> None:
    there = location.format(url=server.url)
    server.trick = lambda handler, number: handler.answer(302, b"", {"Location": there}) or True
    with pytest.raises(UserError, match=said):
        get(server, tmp_path)
    assert names(tmp_path) == set()


def test_a_redirect_is_followed_but_not_out_of_encryption(server: Server, tmp_path: Path) -> None:
    server.trick = lambda handler, number: number == 1 and (handler.answer(302, b"", {"Location": "/x.csv"}) or True)
    get(server, tmp_path)
    right(server, tmp_path)
    with pytest.raises(UserError, match="not encrypted"):
        http._check_scheme("https://a.example/t.csv", "http://a.example/t.csv")


def test_content_that_a_proxy_compressed(server: Server, tmp_path: Path) -> None:
    packed = gzip.compress(server.content)
    server.trick = lambda handler, number: handler.answer(200, packed, {"Content-Encoding": "gzip"}) or True
    with pytest.raises(UserError, match="sent with the encoding gzip"):
        get(server, tmp_path)


def test_the_next_address_is_tried_and_said(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.trick = lambda handler, number: handler.path == "/gone.csv" and (handler.answer(404, b"") or True)
    gone = server.url.replace("t.csv", "gone.csv")
    with caplog.at_level(logging.WARNING, "mmtrain"):
        got = get(server, tmp_path, entry(Source(gone), Source(server.url)))
    assert got.origin == server.url
    assert "404 Not Found; trying the next URL" in caplog.text
    right(server, tmp_path)


def test_without_a_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/t.csv"
    with pytest.raises(UserError) as caught:
        get_dataset(entry(Source(url)), tmp_path, patience=QUICK)
    said = str(caught.value)
    assert f"{url}: cannot be reached (" in said
    assert "refused" in said
    assert "object at 0x" not in said
    assert f"to {tmp_path} and run `mmtrain data get toy --verify`" in said


def test_the_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/t.csv"))
    monkeypatch.setenv("no_proxy", "")
    seen = []
    server.trick = lambda handler, number: bool(seen.append(handler.path))
    get(server, tmp_path, entry(Source("http://tables.example/t.csv")))
    right(server, tmp_path)
    assert seen == ["http://tables.example/t.csv"]


def _get_in_process(url: str, root: str, results: Any) -> None:
    try:
        results.put(get_dataset(entry(Source(url)), Path(root), patience=QUICK).origin)
    except BaseException as error:
        results.put(repr(error))


def test_two_processes_fetch_once(server: Server, tmp_path: Path) -> None:
    server.trick = lambda handler, number: bool(time.sleep(0.1))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_get_in_process, args=(server.url, str(tmp_path), results)) for _ in range(2)]
    for process in both:
        process.start()
    origins = sorted(results.get(timeout=30) for _ in both)
    for process in both:
        process.join(30)
    assert origins == ["", server.url]
    assert len(server.asked) == 1
    right(server, tmp_path)


def test_another_file_than_the_first_time_is_refused(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path)
    before = (tmp_path / "toy.csv").read_bytes()
    server.content = csv(table(seed=1))
    with pytest.raises(UserError, match=r"delete .*toy\.csv\.sha256 to accept"):
        get(server, tmp_path, force=True)
    assert (tmp_path / "toy.csv").read_bytes() == before
    changed = before.replace(b"\n2020-01-01 05:00:00,-", b"\n2020-01-01 05:00:00,")
    assert changed != before
    (tmp_path / "toy.csv").write_bytes(changed)
    for call in (lambda: verify_dataset(entry(), tmp_path), lambda: get(server, tmp_path)):
        with pytest.raises(UserError, match="but was"):
            call()
    (tmp_path / "toy.csv.sha256").unlink()
    assert not verify_dataset(entry(), tmp_path).known
    (tmp_path / "toy.csv.sha256").write_text("nonsense\n")
    with pytest.raises(UserError, match="does not begin with a SHA-256"):
        verify_dataset(entry(), tmp_path)


def test_bare_tables_become_csv_with_stamps(server: Server, tmp_path: Path) -> None:
    frame = table()
    bare = frame.drop(columns="date").to_csv(index=False, header=False, lineterminator="\n").encode()
    server.content = gzip.compress(bare)
    dataset = entry(Source(server.url, "table.gz"), digest=read_content_of(csv(frame), tmp_path))
    got = get(server, tmp_path / "a", dataset)
    lines = (tmp_path / "a" / "toy.csv").read_text().splitlines()
    assert lines[0] == "date,0,1,OT"
    assert lines[1].startswith("2020-01-01 00:00:00,")
    assert [line.split(",", 1)[1] for line in lines[1:]] == bare.decode().splitlines()
    assert got.checked.content.rows == ROWS
    (tmp_path / "by_hand.txt.gz").write_bytes(server.content)
    served = len(server.asked)
    get(server, tmp_path / "b", dataset, from_file=tmp_path / "by_hand.txt.gz")
    assert (tmp_path / "b" / "toy.csv").read_bytes() == (tmp_path / "a" / "toy.csv").read_bytes()
    assert (tmp_path / "by_hand.txt.gz").exists()
    assert len(server.asked) == served
    with pytest.raises(UserError, match="no such file"):
        get(server, tmp_path / "c", dataset, from_file=tmp_path / "none.gz")


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (b"1,2,3\n", "not a complete gzip file"),
        (gzip.compress(b"1,2,3\n" * ROWS)[:-6], "not a complete gzip file"),
        (gzip.compress(b"1,2,3\n" * (ROWS + 1)), f"line {ROWS + 1}"),
        (gzip.compress(b"1,2,3\n" * (ROWS - 1)), "299 rows instead of 300"),
        (gzip.compress(b"1,2\n" * ROWS), "line 1: b'1,2'"),
        (gzip.compress(b"1,2,x\n" * ROWS), "column 'OT' is not numeric"),
        (gzip.compress(b"1" * (1 << 21)), "far more data"),
        (gzip.compress(b"\n" * (1 << 24)), "far more data"),
    ],
    ids=["plain", "cut", "a row more", "a row less", "a column less", "text", "one long line", "empty lines"],
)
def test_bad_bare_tables(server: Server, tmp_path: Path, packed: bytes, said: str) -> None:
    server.content = packed
    with pytest.raises(UserError, match=said):
        get(server, tmp_path, entry(Source(server.url, "table.gz")))
    assert names(tmp_path) == set()


def test_the_digest_does_not_depend_on_the_format(tmp_path: Path) -> None:
    frame = table()
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "b.parquet")
    wide = frame.astype({"0": "float64", "1": "float64", "OT": "float64"})
    wide.assign(date=frame["date"].dt.strftime("%Y/%m/%d %H:%M")).to_csv(tmp_path / "c.csv", index=False)
    wide.astype({"date": "datetime64[ns]"}).to_parquet(tmp_path / "d.parquet")
    digests = {read_content(file).digest for file in sorted(tmp_path.iterdir())}
    assert len(digests) == 1
    for number, changed in enumerate(
        (
            frame.rename(columns={"0": "2"}),
            frame.iloc[:-1],
            frame.assign(date=frame["date"] + pd.Timedelta(1, unit="s")),
            frame.assign(OT=frame["OT"] * (1 + 2e-7)),
            frame[["date", "1", "0", "OT"]],
        )
    ):
        changed.to_parquet(tmp_path / f"other{number}.parquet")
        assert read_content(tmp_path / f"other{number}.parquet").digest not in digests


def test_the_digest_is_the_one_described() -> None:
    import hashlib

    values = np.array([[1.5, -0.0], [np.nan, 2.0]], dtype=np.float32)
    plain = np.array([[1.5, 0.0], [np.nan, 2.0]], dtype="<f4")
    wanted = hashlib.sha256(b'mmtrain-series-1\n["a", "b"]\n' + np.array([0, 60], "<i8").tobytes() + plain.tobytes())
    assert canonical_digest(["a", "b"], np.array([0, 60]), values) == wanted.hexdigest()


@pytest.mark.parametrize("name", list(DATASETS))
def test_the_registry_is_in_order(name: str) -> None:
    dataset = DATASETS[name]
    assert find_dataset(dataset.stem.upper() + ".csv") is dataset
    assert len(set(dataset.columns)) == len(dataset.columns)
    assert dataset.columns[-1] == "OT"
    span = np.datetime64(dataset.last) - np.datetime64(dataset.first)
    if not dataset.irregular:
        assert span == np.timedelta64((dataset.rows - 1) * dataset.step, "s")
    assert all(source.url.startswith("https://") for source in dataset.sources)


def test_the_real_tables_are_what_the_registry_says(benchmarks: Path, tmp_path: Path) -> None:
    checked = 0
    for dataset in DATASETS.values():
        path = next((p for s in (".csv", ".parquet") if (p := benchmarks / f"{dataset.stem}{s}").is_file()), None)
        if path is None:
            continue
        content = check_table(path, dataset).content
        checked += 1
        if path.suffix == ".parquet":
            pd.read_parquet(path).to_csv(tmp_path / f"{dataset.stem}.csv", index=False)
            assert check_table(tmp_path / f"{dataset.stem}.csv", dataset).content.digest == content.digest
    if not checked:
        pytest.skip(f"none of the benchmark tables is in {benchmarks}")


def test_commands(cli: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "toy", entry(Source(server.url)))
    monkeypatch.delenv("MMTRAIN_DATA", raising=False)
    listed = cli("data", "get", "--list")
    assert listed.returncode == 0
    assert "raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTm2.csv" in listed.stdout
    assert "exchange_rate" in listed.stdout
    missing = cli("data", "get", "toy", "--verify")
    assert missing.returncode == 2
    assert "data/toy.csv or .parquet: no such file. Fetch it with `mmtrain data get toy`" in missing.stderr
    got = cli("data", "get", "toy")
    assert got.returncode == 0, got.stderr
    assert f"data/toy.csv: 300 rows, 3 columns; from {server.url}" in got.stdout
    assert "the values are not checked" in got.stdout
    assert "licence: free" in got.stdout
    assert "unchanged" in cli("data", "get", "TOY.csv", "--verify", "--data-root", "data").stdout
    digest = cli("data", "digest", "data/toy.csv")
    assert digest.stdout.split()[0] == read_content(tmp_path / "data" / "toy.csv").digest
    for words, said in (
        (["get"], "name at least one table"),
        (["get", "etth3"], "did you mean 'etth"),
        (["get", "toy", "ili", "--from-file", "x"], "exactly one name"),
        (["digest", "none.csv"], "no such file"),
    ):
        failed = cli("data", *words)
        assert failed.returncode == 2, words
        assert said in failed.stderr
        assert failed.stderr.count("\n") == 1
