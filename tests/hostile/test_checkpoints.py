"""Checkpoints made to attack: every way of using one refuses it with one message, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.errors import UserError
from mmtrain.inference import from_pretrained
from mmtrain.train.checkpoint.metadata import INDEX, PICKLED, read_index, write_index
from tests.conftest import Cli
from tests.hostile.made import RUN, USES, newest, sign


def attack(folder: Path, content: bytes) -> None:
    """Put ``content`` into every checkpoint's index."""
    for path in (folder / RUN / "checkpoints").glob("step_*"):
        (path / PICKLED).write_bytes(content)
        sign(path)


# ------------------------------------------------------------------ the pickle of version 0.1.0


def text(value: str) -> bytes:
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def command(marker: str = "executed") -> bytes:
    return text(f"touch {marker}")


GENUINE = named("torch.distributed.checkpoint.metadata", "Metadata")
DOTTED = b"\x80\x04" + named("torch.distributed.checkpoint.filesystem", "os.system") + command() + b"\x85R."
#: What could make Python's pickle run something, and the word of the refusal.
ATTACKS: dict[str, tuple[bytes, str]] = {
    "a dotted name": (DOTTED, "os.system"),
    "a function that loads another pickle": (
        b"\x80\x04"
        + named("torch.distributed.checkpoint.format_utils", "torch_save_to_dcp")
        + text("x.pt")
        + text("dcp")
        + b"\x86R.",
        "torch_save_to_dcp",
    ),
    "os.system": (b"\x80\x04" + named("os", "system") + command() + b"\x85R.", "os.system"),
    "builtins": (b"\x80\x04" + named("builtins", "eval") + text("1") + b"\x85R.", "builtins.eval"),
    "GLOBAL": (b"\x80\x04cos\nsystem\n" + command() + b"\x85R.", "GLOBAL"),
    "INST": (b"\x80\x04(" + command() + b"ios\nsystem\n.", "INST"),
    "OBJ": (b"\x80\x04(" + named("os", "system") + command() + b"o.", "os.system"),
    "OBJ of an allowed name": (b"\x80\x04(" + GENUINE + b"o.", "OBJ"),
    "NEWOBJ_EX": (b"\x80\x04" + GENUINE + b")}\x92.", "NEWOBJ_EX"),
    "EXT1": (b"\x80\x04\x82\x01.", "EXT1"),
    "EXT4": (b"\x80\x04\x84\x01\x00\x00\x00.", "EXT4"),
    "PERSID": (b"\x80\x04Pname\n.", "PERSID"),
    "BINPERSID": (b"\x80\x04" + text("name") + b"Q.", "BINPERSID"),
    "a huge place in the memo": (b"\x80\x04Nr\xff\xff\xff\x7f.", "LONG_BINPUT"),
    "the state of a class": (b"\x80\x04" + GENUINE + b"}b.", "not a record"),
    "a name that is no text": (b"\x80\x04" + GENUINE + text("Metadata") + b"\x93.", "which checkpoints never use"),
    "a key that takes for ever to hash": (b"\x80\x04}" + b")" + b"2\x86" * 60 + b"Ns.", "DUP"),
    "a key that is a tuple": (b"\x80\x04})\x94h\x00h\x00\x86Ns.", "not text"),
    "not a pickle": (b"\x00" * 40, "not the index"),
    "empty": (b"", "not the index"),
    "cut short": (b"\x80\x04}", "not the index"),
    "another object": (pickle.dumps({"a": 1}, 4), "not the index"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, said = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / PICKLED).write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_index(tmp_path)
    assert str(tmp_path / PICKLED) in str(refused.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("use", [*USES, "from_pretrained"])
def test_no_use_of_a_run_executes_its_checkpoint(use: str, here: Path, cli: Cli) -> None:
    attack(here, DOTTED)
    if use == "from_pretrained":
        with pytest.raises(UserError, match=r"os\.system"):
            from_pretrained(here / RUN)
    else:
        ended = cli(*USES[use])
        assert ended.returncode == 2
        assert "os.system, which checkpoints never use" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not (here / "executed").exists()
    assert not (here / "exported").exists()


# fragments of every family of operations, to be put together at random
_NAMES = [("os", "system"), ("torch.distributed.checkpoint.filesystem", "os.system"), ("builtins", "exec")]
_NAMES += [("torch.distributed.checkpoint.metadata", name) for name in ("Metadata", "MetadataIndex")]
_NAMES += [("torch", "Size"), ("torch", "float32"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")]
_FRAGMENTS = [named(*name) for name in _NAMES]
_FRAGMENTS += [f"c{module}\n{name}\n".encode() for module, name in _NAMES]
_FRAGMENTS += [f"(i{module}\n{name}\n".encode() for module, name in _NAMES]
_FRAGMENTS += [b"(", b")", b"]", b"}", b"N", b"\x88", b"\x89", b"K\x01", b"M\x01\x00", b"J\x01\x00\x00\x00"]
_FRAGMENTS += [b"R", b"\x81", b"\x92", b"b", b"o", b"s", b"u", b"a", b"e", b"t", b"\x85", b"\x86", b"\x87"]
_FRAGMENTS += [b"\x94", b"h\x00", b"h\x01", b"j\x02\x00\x00\x00", b"q\x00", b"r\x01\x00\x00\x00", b"p0\n", b"g0\n"]
_FRAGMENTS += [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Px\n", b"Q", b"0", b"1", b"2"]
_FRAGMENTS += [b"\x8f", b"\x91"]
_FRAGMENTS += [
    b"I1\n",
    b"L1L\n",
    b"F1\n",
    b"S'a'\n",
    b"Va\n",
    b"C\x01a",
    b"\x8e" + b"\xff" * 8,
    b"\x8b\xff\xff\xff\x7f",
]
_FRAGMENTS += [b"\x95" + b"\x01" * 8, b"\x80\x05", b".", b"\x93", text("fqn"), command(), b"\x8a\x02\x01\x01", b"\x90"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(_FRAGMENTS), max_size=30))
def test_random_operations_are_refused(tmp_path: Path, fragments: list[bytes]) -> None:
    """Before a genuine file or in its place."""
    (tmp_path / PICKLED).write_bytes(b"\x80\x04" + b"".join(fragments) + b".")
    with pytest.raises(UserError, match="not the index"):
        read_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PICKLED]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(_FRAGMENTS) | st.binary(max_size=4)), min_size=1, max_size=3)
)
def test_a_genuine_file_with_other_operations_in_it(
    made: Path, tmp_path: Path, changes: list[tuple[float, bytes]]
) -> None:
    content = (newest(made) / PICKLED).read_bytes()[:4000]
    for place, fragment in changes:
        at = int(place * len(content))
        content = content[:at] + fragment + content[at + len(fragment) :]
    (tmp_path / PICKLED).write_bytes(content)
    with pytest.raises(UserError, match="not the index"):
        read_index(tmp_path)


def test_a_genuine_file_is_read_as_python_reads_it(made: Path) -> None:
    for file in made.glob(f"{RUN}/checkpoints/*/{PICKLED}"):
        found, expected = read_index(file.parent), pickle.loads(file.read_bytes())
        assert len(found.state_dict_metadata) > 10
        for name, tensor in expected.state_dict_metadata.items():
            ours: Any = found.state_dict_metadata[name]
            assert (ours.size, ours.properties.dtype, ours.chunks) == (
                tensor.size,
                tensor.properties.dtype,
                tensor.chunks,
            )
        assert found.storage_data == expected.storage_data


# ------------------------------------------------------------------ the JSON of today


@pytest.fixture
def written(made: Path, tmp_path: Path) -> Path:
    """A folder with the index of today."""
    write_index(tmp_path, read_index(newest(made)))
    return tmp_path / INDEX


def test_the_two_kinds_say_the_same(made: Path, written: Path) -> None:
    assert read_index(written.parent) == read_index(newest(made))
    assert [path.name for path in written.parent.iterdir()] == [INDEX]


def _part(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        next(iter(content["tensors"].values()))["parts"][0].update(changes)

    return change


def _tensor(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: next(iter(content["tensors"].values())).update(changes)


#: Changes of the index, and the word of the refusal.
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda content: content.update(format=2), "another version of mmtrain"),
    "no format": (lambda content: content.pop("format"), "damaged: KeyError"),
    "no tensors": (lambda content: content.update(tensors=None), "damaged"),
    "a file elsewhere": (_part(file="../../x/__0_0.distcp"), "an invalid name"),
    "an absolute file": (_part(file="/etc/passwd"), "an invalid name"),
    "a file that is no text": (_part(file=5), "an invalid name"),
    "a negative place": (_part(at=-1), "invalid sizes"),
    "a place that is no number": (_part(at=True), "invalid sizes"),
    "a huge place": (_part(at=2**70), "invalid sizes"),
    "a part outside": (_part(offset=[10**6, 0, 0]), "outside"),
    "a part of other dimensions": (_part(offset=[]), "outside"),
    "too few parts": (_tensor(parts=[]), "parts do not cover it"),
    "parts that are none": (_tensor(parts=[5]), "damaged: TypeError"),
    "an unknown type": (_tensor(dtype="object"), "unknown dtype"),
    "a type that is none": (_tensor(dtype=[1]), "damaged"),
    "a shape that is none": (_tensor(shape="ab"), "invalid sizes"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_index_is_refused(name: str, written: Path) -> None:
    change, said = CHANGES[name]
    content = json.loads(written.read_text())
    change(content)
    written.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_index(written.parent)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"5", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_an_index_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=f"{INDEX} is not the index of a checkpoint"):
        read_index(tmp_path)


def test_no_index_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_index(tmp_path)


# ------------------------------------------------------------------ the files of tensors


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("use", ["predict", "resume"])
def test_a_file_of_tensors_runs_nothing(use: str, here: Path, cli: Cli) -> None:
    for path in here.glob(f"{RUN}/checkpoints/step_*"):
        data = path / "__0_0.distcp"
        torch.save(Evil(), data)
        index = read_index(path)
        for place in index.storage_data.values():
            place.offset, place.length = 0, data.stat().st_size
        write_index(path, index)
        sign(path)
    ended = cli(*USES[use])
    assert ended.returncode == 2
    assert "step_00000004 cannot be read (a file contains something other than tensors" in ended.stderr
    assert "weights_only" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (here / "executed").exists()
