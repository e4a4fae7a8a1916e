"""Read DCP's metadata, which is a pickle, without letting it run code."""

from __future__ import annotations

import pickle
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata

from mmtrain.errors import UserError

# what DCP itself puts there: its records, shapes, dtypes, and plain containers
_ALLOWED_MODULES = ("torch.distributed.checkpoint.",)
_ALLOWED = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and name in {"float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"}
        if dtype or (module, name) in _ALLOWED or module.startswith(_ALLOWED_MODULES):
            return super().find_class(module, name)
        raise UserError(f"a checkpoint's metadata asks for {module}.{name}, which no checkpoint needs: not loaded")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, with its metadata unpickled from a list of allowed types only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.fs.concat_path(self.path, ".metadata")
        with self.fs.create_stream(path, "rb") as stream:
            metadata: Metadata = _Unpickler(stream).load()
        if metadata.storage_meta is None:
            raise UserError(f"{path}: not the metadata of a checkpoint")
        metadata.storage_meta.load_id = self.load_id
        return metadata
