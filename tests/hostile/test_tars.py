"""Tar shards and indexes made to harm: each is refused in one message, or counted as a fault, in little memory."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.data.images.shards import find_shards
from mmtrain.data.images.tar_index import index_path, index_shard, index_shards
from mmtrain.data.images.targets import read_samples
from mmtrain.errors import UserError

END = bytes(1024)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One block; the size may be any number, as large or negative ones have a form of their own."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    """An extended header for the next member."""
    content = b""
    for key, value in records.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(record) + len(str(len(record) + len(str(len(record)))))
        content += str(length).encode() + record
    return member("pax", content, b"x")


def sample(key: str, label: bytes = b"1", suffix: str = "cls") -> bytes:
    return member(f"{key}.png", b"pixels") + member(f"{key}.{suffix}", label)


#: What stands between two good samples; a part of the message; whether the second sample can still be found.
CASES: dict[str, tuple[bytes, str, bool]] = {
    "a label of 20 digits": (sample("b", b"9" * 20), r"'b\.cls' contains b'9999.*class number", True),
    "a label of 5,000 digits": (sample("b", b"9" * 5000), r"'b\.cls' contains b'9999.*class number", True),
    "a label of 2**31": (sample("b", b"2147483648"), r"'b\.cls' contains b'2147483648'", True),
    "a JSON label of 2**70": (sample("b", b'{"label": %d}' % 2**70, "json"), "'b' has no label", True),
    "deep JSON": (sample("b", b"[" * 100_000, "json"), "'b' has no label", True),
    "JSON without end": (sample("b", b'{"label":' * 30_000, "json"), "'b' has no label", True),
    "a label of 17 MB": (sample("b", b" " * (17 << 20)), r"'b\.cls' has 17825792 bytes", True),
    "a label of 2**40 bytes": (header("b.cls", 2**40), r"ends within 'b\.cls'", False),
    "an image of 2**63 bytes": (header("b.png", 2**63), r"ends within 'b\.png'", False),
    "an image of 2**80 bytes": (header("b.png", 2**80), r"ends within 'b\.png'", False),
    "a size below zero": (header("b.png", -(2**40)), "ends before it begins", False),
    "a size just below zero": (header("b.png", -5), "ends before it begins", False),
    "attributes of a size just below zero": (pax(size="-5") + header("b.cls", 1), "ends before it begins", False),
    "a size that leads back to the start": (header("b.png", -1536), "ends before it begins", False),
    "a long name of 2**40 bytes": (header("x", 2**40, b"L"), "a header claims", False),
    "a long name of -1024 bytes": (header("x", -1024, b"L"), "a header claims", False),
    "attributes of 2**40 bytes": (header("x", 2**40, b"x"), "a header claims", False),
    "thousands of long names": (member("x", b"name", b"L") * 3000, "nested too deeply", False),
    "thousands of attributes": (pax(comment="x") * 3000, "nested too deeply", False),
    "a number without end": (member("x", b"7" * 60_000, b"x"), "too many digits", False),
    "attributes of size 9**99": (pax(size="9" * 99) + header("b.png", 1), r"ends within 'b\.png'", False),
    "attributes of size -5": (pax(size="-99999") + header("b.png", 1), "ends before it begins", False),
    "sparse 1.0": (pax(GNU__sparse__major="1", GNU__sparse__minor="0") + member("b.png", b"PNG\n"), "damaged", False),
    "sparse 1.0, many": (
        pax(GNU__sparse__major="1", GNU__sparse__minor="0") + member("b.png", b"999999999999\n"),
        "damaged",
        False,
    ),
    "sparse 0.1": (pax(GNU__sparse__map="0,1,x", GNU__sparse__size="1") + member("b.png", b"P"), "damaged", False),
    "sparse 0.1, well formed": (
        pax(GNU__sparse__map="0,1", GNU__sparse__size="99999999") + member("b.png", b"P"),
        "a sparse file",
        True,
    ),
    "a name of 1,025 characters": (member("x", b"n" * 1025 + b"\0", b"L") + member("b.png", b"P"), "a name of", True),
    "a name that points outside": (member("../b.png", b"P"), "has a path outside", True),
    "bytes that are no header": (b"\x55" * 512, "not a tar member", False),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_members(tmp_path: Path, case: str) -> None:
    content, said, readable = CASES[case]
    shard = tmp_path / "shard.tar"
    shard.write_bytes(sample("a") + content + sample("c", b"2") + END)
    tracemalloc.start()
    with pytest.raises(UserError, match=said) as caught:
        index_shard(shard)
    assert str(caught.value).startswith(f"{shard}: ")
    assert len(str(caught.value)) < 800
    [index] = index_shards([shard], skip=True)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20 * shard.stat().st_size + (4 << 20)
    assert index.keys.tolist() == (["a", "c"] if readable else ["a"])
    assert index.fault
    assert not index_path(shard).exists()


@pytest.mark.parametrize("case", [case for case, (_, _, readable) in CASES.items() if not readable])
def test_hostile_members_of_shards_with_targets(tmp_path: Path, case: str) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(sample("a") + CASES[case][0] + END)
    with pytest.raises(UserError, match=r"shard\.tar"):
        list(read_samples(shard))


def npy(shape: object, dtype: str = "<i8", body: bytes = b"", fortran: bool = False) -> bytes:
    text = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


LABELS = {
    "7 TiB": npy((10**12,)),
    "7 TiB in two dimensions": npy((10**6, 10**6)),
    "a negative length": npy((-1,)),
    "lengths whose product is 2": npy((-1, -2), body=bytes(16)),
    "a length of 9**99": npy((9**99,)),
    "no length": npy(None),
    "objects": npy((2,), "|O", b"cos\nsystem\n(S'true'\ntR."),
    "a type of 2**40 bytes": npy((2,), f"<U{2**38}"),
    "a deep header": b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000,
    "a long header": b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little"),
    "a header that is a call": b"\x93NUMPY\x01\x00" + (16).to_bytes(2, "little") + b"__import__('os')",
    "no array": b"text",
    "labels of 2**40": npy((2,), body=np.array([1, 2**40]).tobytes()),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hostile_indexes_are_made_again(tmp_path: Path, case: str, packed: int) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(sample("a") + sample("c", b"2") + END)
    sound = index_shard(shard)
    with zipfile.ZipFile(index_path(shard)) as archive:
        arrays = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(index_path(shard), "w", packed) as archive:
        for name, content in (arrays | {"labels.npy": LABELS[case]}).items():
            archive.writestr(name, content)
    for skip in (False, True):
        [index] = index_shards([shard], skip=skip)
        assert index.labels.tolist() == sound.labels.tolist() == [1, 2]
        assert not index.fault


def _mutated(data: st.DataObject, sound: bytes) -> bytes:
    """Some bytes of some blocks changed, blocks repeated, moved or cut off."""
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        what = data.draw(st.sampled_from(("byte", "field", "cut", "repeat")))
        if what == "byte":
            content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif what == "field":
            content[place : place + 12] = data.draw(st.sampled_from((b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7" * 12)))
        elif what == "cut":
            del content[place:]
        else:
            block = place // 512 * 512
            content[block:block] = content[block : block + 512] * data.draw(st.integers(1, 3))
    return bytes(content)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "shard.tar"


def _checksummed(content: bytes) -> bytes:
    """The checksums of all blocks that have one made right, so that a change reaches what reads the fields."""
    out = bytearray(content)
    for at in range(0, len(out) - 511, 512):
        block = out[at : at + 512]
        if block[257:262] == b"ustar":
            total = sum(block) - sum(block[148:156]) + 8 * 32
            out[at + 148 : at + 156] = f"{total:06o}\0 ".encode()
    return bytes(out)


SOUND: list[Callable[[], bytes]] = [
    lambda: sample("a") + sample("b", b'{"label": 3}', "json") + END,
    lambda: pax(path="x/a.png", size="6") + member("y", b"pixels") + member("x/a.cls", b"1") + END,
    lambda: member("x", b"d/" * 90 + b"a.png\0", b"L") + member("y", b"pixels") + sample("c") + END,
    lambda: pax(GNU__sparse__map="0,1", GNU__sparse__size="1") + member("b.png", b"P") + sample("c") + END,
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.integers(0, len(SOUND) - 1))
def test_changed_shards_are_read_or_refused(target: Path, data: st.DataObject, kind: int) -> None:
    target.write_bytes(_checksummed(_mutated(data, SOUND[kind]())))
    [found] = index_shards([target], skip=True, rebuild=True)
    size = target.stat().st_size
    assert all(0 <= at <= at + length <= size for at, length in zip(found.offsets, found.sizes, strict=True))
    if found.fault:
        with pytest.raises(UserError, match=r"^.*shard\.tar: "):
            index_shard(target, rebuild=True)
    else:
        index_shard(target, rebuild=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.slow
def test_changed_indexes_are_read_or_made_again(target: Path, data: st.DataObject) -> None:
    target.write_bytes(sample("a") + sample("c", b"2") + END)
    index_path(target).unlink(missing_ok=True)
    index_shard(target)
    index_path(target).write_bytes(_mutated(data, index_path(target).read_bytes()))
    found = index_shard(target)
    assert len(found.keys) == len(found.labels) == len(found.offsets)
    assert all(found.offsets + found.sizes <= target.stat().st_size)


def test_what_is_well_formed_and_rare_is_still_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("é" * 90 + "/a", "d/" * 300 + "b"):
            for suffix, content in (("png", b"pixels"), ("cls", b"4")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size, info.mtime, info.pax_headers = len(content), 1.5, {"SCHILY.xattr.user.x": "y" * 5000}
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert index_shard(tmp_path / "a.tar").labels.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("s-{01..9999999999}.tar", "more than 1,000,000 names"),
        ("s-{0..999}{0..999}{0..9}.tar", "more than 1,000,000 names"),
        ("s-" + "{1,2}" * 40 + ".tar", "more than 1,000,000 names"),
        ("{" * 2000 + "a" + "}" * 2000, "not a valid brace pattern"),
        ("{" * 5000, "more than 4096 characters"),
        ("{a{1..9999999999},b}", "more than 1,000,000 names"),
        ("{a,b", "not a valid brace pattern"),
    ],
)
def test_brace_patterns_that_name_too_much(tmp_path: Path, pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_shards(pattern)
