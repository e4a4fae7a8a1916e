"""Read and write the index of a checkpoint: for each tensor, where its data is stored.

``tensors.json`` lists the dtype and shape of each tensor and its parts. A part is a rectangular slice: its offset and
shape within the tensor, its file, and the position in the file. Version 0.1.0 used the ``.metadata`` of torch's
distributed checkpoint (DCP), which is a pickle. mmtrain reads such files without Python's pickle module:
:func:`_values` supports only the operations of genuine files and imports nothing. Both formats are checked before they
are passed to DCP.
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

#: Name of the index: in new checkpoints, and in those of version 0.1.0.
INDEX, PICKLED = "tensors.json", ".metadata"
#: Names of the files that contain tensors: rank and number.
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_FORMAT = 1


def write_index(folder: Path, metadata: Metadata) -> None:
    """Write ``metadata`` to ``tensors.json`` in ``folder``, with fsync."""
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), name
        parts = []
        for chunk in tensor.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            location = {"file": stored.relative_path, "at": stored.offset, "bytes": stored.length}
            parts.append({"offset": list(chunk.offsets), "shape": list(chunk.sizes), **location})
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        found[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": parts}
    path = folder / INDEX
    path.write_text(json.dumps({"format": _FORMAT, "tensors": found}))
    sync(path)


def read_index(folder: Path) -> Metadata:
    """Read the index of the checkpoint in ``folder``, as DCP metadata.

    Raises:
        SharedError: if the index is missing, damaged, or not an index of mmtrain. No code in it is ever executed.
    """
    path = folder / (INDEX if (folder / INDEX).exists() else PICKLED)
    cure = "use another checkpoint, or restore the file"
    with os_errors(f"{path}: the checkpoint cannot be read", cure, kind=SharedError):
        content = path.read_bytes()
    try:
        tensors = _from_json(content) if path.name == INDEX else _from_records(_values(content))
        metadata = _checked(tensors)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise SharedError(f"{path} is not the index of a checkpoint ({_short(error)}): {cure}") from None
    return metadata


def _short(error: BaseException) -> str:
    """Return a short description of a parsing error."""
    text = " ".join(str(error).split())
    return text[:200] if isinstance(error, ValueError) and text else f"damaged: {type(error).__name__}"


def _from_json(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if found["format"] != _FORMAT:
        raise ValueError("it was written by another version of mmtrain")
    tensors: dict[str, Any] = found["tensors"]
    return tensors


def _checked(tensors: dict[str, Any]) -> Metadata:
    """Convert the index to DCP metadata. Check every number first, since DCP does not."""
    entries: dict[str, Any] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        _require(isinstance(name, str) and tensor["dtype"] in _DTYPES, "a tensor of an unknown dtype")
        shape = _sizes(tensor["shape"])
        chunks = []
        for part in tensor["parts"]:
            offset, sizes = _sizes(part["offset"]), _sizes(part["shape"])
            inside = len(offset) == len(sizes) == len(shape)
            inside = inside and all(o + n <= most for o, n, most in zip(offset, sizes, shape, strict=True))
            _require(inside, "a part outside its tensor")
            file = part["file"]
            _require(
                isinstance(file, str) and DATA_FILE.fullmatch(file) is not None, "a part in a file with an invalid name"
            )
            at, length = _sizes([part["at"], part["bytes"]])
            index = MetadataIndex(name, offset)
            _require(index not in locations, "the same part twice")
            locations[index] = _StorageInfo(file, at, length)
            chunks.append(ChunkStorageMetadata(offset, sizes))
        _require(
            sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape), "a tensor whose parts do not cover it"
        )
        entries[name] = TensorStorageMetadata(TensorProperties(_DTYPES[tensor["dtype"]]), shape, chunks)
    return Metadata(entries, storage_data=locations, storage_meta=StorageMeta())


def _require(condition: bool, fault: str) -> None:
    """Raise ValueError("it contains <fault>") unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"it contains {fault}")


def _sizes(values: Any) -> torch.Size:
    """Convert a list of non-negative integers to a size. Raise ValueError for anything else."""
    _require(isinstance(values, list | tuple) and len(values) <= 64, "invalid sizes")
    _require(all(type(value) is int and 0 <= value < 2**62 for value in values), "invalid sizes")
    return torch.Size(values)


# ------------------------------------------------------------------ the pickles of version 0.1.0

_METADATA = "torch.distributed.checkpoint.metadata"
#: All names in genuine files. They are compared as text and never imported.
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
    """A module and name from the file, kept as text. It is never resolved to a Python object."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Record:
    """Stand-in for an object of the file: the name to call, the arguments, and the state set afterwards."""

    def __init__(self, of: _Name, arguments: tuple[Any, ...]) -> None:
        self.of, self.arguments, self.state = of, arguments, None

    def fields(self, name: str) -> dict[str, Any]:
        """Return the attributes of the object, which must be of class ``name``."""
        _require(self.of.name == name and isinstance(self.state, dict), f"{self.of.name} instead of {name}")
        return self.state  # type: ignore[return-value]


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}


def _values(content: bytes) -> Any:
    """Parse a pickle into its value, with a :class:`_Record` in place of every object.

    Only the operations of genuine files are supported. Nothing is imported or called.

    Raises:
        ValueError, IndexError, KeyError, TypeError, AttributeError: if the content is anything else.
    """
    stack: list[Any] = []
    memo: list[Any] = []

    def since_mark() -> list[Any]:
        """Pop all items above the last mark, and the mark."""
        mark = len(stack) - 1
        while stack[mark] is not _MARK:
            mark -= 1
            _require(mark >= 0, "an operation without its mark")
        items = stack[mark + 1 :]
        del stack[mark:]
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
            # Hashing a deeply nested tuple could take forever.
            _require(all(isinstance(key, str | _Record) for key in keys), "a key that is not text")
            _target(stack, dict).update(zip(keys, values, strict=True))
        elif name == "STACK_GLOBAL":
            called, module = stack.pop(), stack.pop()
            if not (isinstance(module, str) and isinstance(called, str) and (module, called) in _NAMES):
                _refuse(module, called)
            stack.append(_Name(module, called))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, of = stack.pop(), stack.pop()
            _require(isinstance(of, _Name) and isinstance(arguments, tuple), "a call of something that is not a name")
            stack.append(_Record(of, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _target(stack, _Record).state = state
        else:
            raise ValueError(f"it contains the operation {name}, which checkpoints never use: refused")
    raise ValueError("it is truncated")


def _refuse(module: object, name: object) -> NoReturn:
    raise ValueError(f"it requests {module}.{name}, which checkpoints never use: refused")


def _target(stack: list[Any], kind: type) -> Any:
    """Return the top of the stack, which must be of type ``kind``."""
    _require(isinstance(stack[-1], kind), f"an operation on something that is not a {kind.__name__.strip('_').lower()}")
    return stack[-1]


def _from_records(root: Any) -> dict[str, Any]:
    """Convert the parsed pickle to the format of ``tensors.json``."""
    fields = root.fields("Metadata")
    locations: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for index, info in fields["storage_data"].items():
        key, stored = index.fields("MetadataIndex"), info.fields("_StorageInfo")
        _require(isinstance(key["fqn"], str), "a tensor without a name")
        _require(stored.get("transform_descriptors") is None, "a part that is compressed or encrypted")
        location = {"file": stored["relative_path"], "at": stored["offset"], "bytes": stored["length"]}
        locations[key["fqn"], tuple(_size(key["offset"]))] = location
    tensors = {}
    for name, tensor in fields["state_dict_metadata"].items():
        if not isinstance(tensor, _Record) or tensor.of.name != "TensorStorageMetadata":
            raise ValueError(f"it contains {name} as an object instead of a tensor")
        described = tensor.fields("TensorStorageMetadata")
        dtype = described["properties"].state[0]
        parts = []
        for chunk in described["chunks"]:
            found = chunk.fields("ChunkStorageMetadata")
            offset = _size(found["offsets"])
            parts.append({"offset": offset, "shape": _size(found["sizes"]), **locations[name, tuple(offset)]})
        tensors[name] = {"dtype": dtype.name, "shape": _size(described["size"]), "parts": parts}
    return tensors


def _size(record: Any) -> list[int]:
    """Return the values of a ``torch.Size`` record."""
    _require(isinstance(record, _Record) and record.of.name == "Size", "an invalid shape")
    (values,) = record.arguments
    return list(_sizes(values))
