"""Where each tensor of a checkpoint is stored: written as JSON, and read from JSON or from an earlier version's pickle.

``tensors.json`` has, for each tensor, its type and shape, and for each part its place in the tensor, its file, and the
position in the file. Version 0.1.0 left this to torch's distributed checkpoint (DCP), whose ``.metadata`` is a pickle.
Such a file is still read, but not by Python's pickle: :func:`_values` knows only the operations of a genuine file, and
it never looks a name up. Both kinds pass the same checks before DCP sees them.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmtrain.errors import SharedError, os_errors
from mmtrain.files import sync

#: The file that new checkpoints have, and the one of version 0.1.0.
INDEX, PICKLED = "tensors.json", ".metadata"
#: The names of the files that hold tensors: rank, and number.
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_FORMAT = 1


def write_index(folder: Path, metadata: Metadata) -> None:
    """Write ``tensors.json`` durably."""
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), name
        parts = []
        for chunk in tensor.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            where = {"file": place.relative_path, "at": place.offset, "bytes": place.length}
            parts.append({"offset": list(chunk.offsets), "shape": list(chunk.sizes), **where})
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        found[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": parts}
    path = folder / INDEX
    path.write_text(json.dumps({"format": _FORMAT, "tensors": found}))
    sync(path)


def read_index(folder: Path) -> Metadata:
    """What the checkpoint in ``folder`` holds, for DCP.

    Raises:
        SharedError: for a file that is missing, damaged, or no index of ours. Nothing in it is executed.
    """
    path = folder / (INDEX if (folder / INDEX).exists() else PICKLED)
    with os_errors(f"{path}: the checkpoint cannot be read", "use another one, or restore the file", kind=SharedError):
        content = path.read_bytes()
    try:
        tensors = _from_json(content) if path.name == INDEX else _from_records(_values(content))
        metadata = _checked(tensors)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise SharedError(
            f"{path} is not the index of a checkpoint ({_short(error)}): use another checkpoint, or restore the file"
        ) from None
    return metadata


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said[:200] if isinstance(error, ValueError) and said else f"damaged: {type(error).__name__}"


def _from_json(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if found["format"] != _FORMAT:
        raise ValueError("it is of another version of mmtrain")
    tensors: dict[str, Any] = found["tensors"]
    return tensors


def _checked(tensors: dict[str, Any]) -> Metadata:
    """The index as DCP's records. Every number is checked: DCP would take the parts at their word."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        _require(isinstance(name, str) and tensor["dtype"] in _DTYPES, "a tensor of an unknown type")
        shape = _sizes(tensor["shape"])
        chunks = []
        for part in tensor["parts"]:
            offset, sizes = _sizes(part["offset"]), _sizes(part["shape"])
            inside = len(offset) == len(sizes) == len(shape)
            inside = inside and all(o + n <= most for o, n, most in zip(offset, sizes, shape, strict=True))
            _require(inside, "a part outside of its tensor")
            file = part["file"]
            _require(
                isinstance(file, str) and DATA_FILE.fullmatch(file) is not None, "a part in a file of a wrong name"
            )
            at, length = _sizes([part["at"], part["bytes"]])
            index = MetadataIndex(name, offset)
            _require(index not in places, "a part that is there twice")
            places[index] = _StorageInfo(file, at, length)
            chunks.append(ChunkStorageMetadata(offset, sizes))
        _require(sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape), "a tensor whose parts do not fit")
        entries[name] = TensorStorageMetadata(TensorProperties(_DTYPES[tensor["dtype"]]), shape, chunks)
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"it names {what}")


def _sizes(values: Any) -> torch.Size:
    _require(isinstance(values, list | tuple) and len(values) <= 64, "sizes that are none")
    _require(all(type(value) is int and 0 <= value < 2**62 for value in values), "sizes that are none")
    return torch.Size(values)


# ------------------------------------------------------------------ the pickles of version 0.1.0

_METADATA = "torch.distributed.checkpoint.metadata"
#: Every name that a genuine file has. They are compared as text, and never imported.
_NAMES = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    *(("torch", name) for name in _DTYPES),
}


class _Name:
    """A name that the file gives: text, never an object of Python."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Record:
    """What the file would make by calling ``of`` with ``arguments``, and the state that it would set."""

    def __init__(self, of: _Name, arguments: tuple[Any, ...]) -> None:
        self.of, self.arguments, self.state = of, arguments, None

    def fields(self, name: str) -> dict[str, Any]:
        _require(self.of.name == name and isinstance(self.state, dict), f"{self.of.name} where {name} belongs")
        return self.state  # type: ignore[return-value]


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}


def _values(content: bytes) -> Any:
    """The value of a pickle, with a :class:`_Record` in place of every object.

    Only the operations of genuine files are known. None of them imports a name or calls anything.

    Raises:
        ValueError, IndexError, KeyError, TypeError, AttributeError: for anything else.
    """
    stack: list[Any] = []
    memo: list[Any] = []

    def since_mark() -> list[Any]:
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            _require(place >= 0, "an operation without its mark")
        items = stack[place + 1 :]
        del stack[place:]
        return items

    argument: Any
    for operation, argument, _ in pickletools.genops(content):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = [stack.pop() for _ in range(count)]
            stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            _target(stack, list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else since_mark()
            keys, values = items[::2], items[1::2]
            # a key that is a tuple of tuples could take for ever to hash
            _require(all(isinstance(key, str | _Record) for key in keys), "a key that is no text")
            _target(stack, dict).update(zip(keys, values, strict=True))
        elif name == "STACK_GLOBAL":
            called, module = stack.pop(), stack.pop()
            if not (isinstance(module, str) and isinstance(called, str) and (module, called) in _NAMES):
                _refuse(module, called)
            stack.append(_Name(module, called))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, of = stack.pop(), stack.pop()
            _require(isinstance(of, _Name) and isinstance(arguments, tuple), "a call of what is no name")
            stack.append(_Record(of, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _target(stack, _Record).state = state
        else:
            raise ValueError(f"it holds the operation {name}, which no checkpoint needs: not loaded")
    raise ValueError("it is cut short")


def _refuse(module: object, name: object) -> NoReturn:
    raise ValueError(f"it asks for {module}.{name}, which no checkpoint needs: not loaded")


def _target(stack: list[Any], kind: type) -> Any:
    _require(isinstance(stack[-1], kind), f"an operation on something that is no {kind.__name__.strip('_').lower()}")
    return stack[-1]


def _from_records(root: Any) -> dict[str, Any]:
    """The tensors as in ``tensors.json``."""
    fields = root.fields("Metadata")
    places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for index, place in fields["storage_data"].items():
        key, stored = index.fields("MetadataIndex"), place.fields("_StorageInfo")
        _require(isinstance(key["fqn"], str), "a tensor without a name")
        _require(stored.get("transform_descriptors") is None, "a part that is stored in another way")
        where = {"file": stored["relative_path"], "at": stored["offset"], "bytes": stored["length"]}
        places[key["fqn"], tuple(_size(key["offset"]))] = where
    tensors = {}
    for name, tensor in fields["state_dict_metadata"].items():
        if not isinstance(tensor, _Record) or tensor.of.name != "TensorStorageMetadata":
            raise ValueError(f"it holds {name} as an object and not as a tensor")
        described = tensor.fields("TensorStorageMetadata")
        dtype = described["properties"].state[0]
        parts = []
        for chunk in described["chunks"]:
            found = chunk.fields("ChunkStorageMetadata")
            offset = _size(found["offsets"])
            parts.append({"offset": offset, "shape": _size(found["sizes"]), **places[name, tuple(offset)]})
        tensors[name] = {"dtype": dtype.name, "shape": _size(described["size"]), "parts": parts}
    return tensors


def _size(record: Any) -> list[int]:
    """The values of a ``torch.Size``."""
    _require(isinstance(record, _Record) and record.of.name == "Size", "a shape that is none")
    (values,) = record.arguments
    return list(_sizes(values))
