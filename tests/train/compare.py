"""Whether two runs came to the same: all tensors of their last checkpoints, bit by bit, and where they stand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mmtrain.train.checkpoint.metadata import read_index
from mmtrain.train.checkpoint.store import load_state
from mmtrain.train.checkpoint.tensor_files import read_tensors


def last_checkpoint(folder: Path) -> Path:
    return max(p for p in (folder / "checkpoints").glob("step_*") if p.suffix != ".partial")


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by part and name: weights, moments, average."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, entry in read_index(checkpoint).state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    read_tensors(checkpoint, parts, alone=True)
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def same_end(a: Path, b: Path) -> bool:
    """Whether runs ``a`` and ``b`` ended in the same bits, in the same place."""
    ends = [last_checkpoint(folder) for folder in (a, b)]
    one, two = (tensors_of(end) for end in ends)
    assert "model" in {name.split(".")[0] for name in one}
    return (
        load_state(ends[0]) == load_state(ends[1])
        and one.keys() == two.keys()
        and all(torch.equal(one[name], two[name]) for name in one)
    )


def result(folder: Path) -> dict[str, object]:
    return json.loads((folder / "result.json").read_text())
