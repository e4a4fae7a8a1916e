"""Read what a run left, and compare two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtrain.train.checkpoint.metadata import read_index
from mmtrain.train.checkpoint.tensor_files import read_tensors
from tests.parallel.cases import STEPS

#: fp32 sums in another order: 1e-7 a step, and twenty steps that build on each other.
LOSS = 1e-5
#: What twenty AdamW steps may make of that, absolutely; the weights are of the order of 0.1 to 1.
WEIGHT = 1e-4
#: The moments of the whole model, relative to their norm.
MOMENT = 1e-4

Parts = dict[str, dict[str, Tensor]]


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of one ``kind``, by step."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted((line for line in found if line["kind"] == kind), key=lambda line: line["step"])


def losses(folder: Path, since: int = 0) -> list[float]:
    """The loss of each step after ``since``."""
    return [line["loss"] for line in lines(folder, "train") if line["step"] > since]


def tensors(checkpoint: Path) -> Parts:
    """All that is in a checkpoint: {part: {name of a parameter: tensor}}."""
    parts: Parts = {}
    for key, entry in read_index(checkpoint).state_dict_metadata.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    read_tensors(checkpoint, parts, alone=True)
    return parts


def at(folder: Path, step: int = STEPS) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def same_losses(folder: Path, reference: Path, since: int = 0, rel: float = LOSS) -> None:
    """Losses of every step, and of every evaluation (with the averaged weights)."""
    assert losses(folder, since) == pytest.approx(losses(reference, since), rel=rel)
    assert len(losses(folder, since)) > 0
    found, expected = ([line for line in lines(f, "eval") if line["step"] > since] for f in (folder, reference))
    assert [line["samples"] for line in found] == [line["samples"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=rel)


def same_weights(folder: Path, reference: Path, step: int = STEPS) -> None:
    """The weights and their average after ``step`` steps."""
    found, expected = tensors(at(folder, step)), tensors(at(reference, step))
    assert found.keys() == expected.keys() == {"model", "exp_avg", "exp_avg_sq", "average"}
    for part in ("model", "average"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in found[part].items():
            torch.testing.assert_close(
                tensor, expected[part][name], rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}"
            )


def same_moments(folder: Path, reference: Path, step: int = STEPS) -> None:
    """AdamW's moments after ``step`` steps, all parameters together: single ones may be rounding noise altogether."""
    found, expected = tensors(at(folder, step)), tensors(at(reference, step))
    for part in ("exp_avg", "exp_avg_sq"):
        a, b = (torch.cat([tensors[part][name].flatten() for name in expected[part]]) for tensors in (found, expected))
        assert (a - b).norm() <= MOMENT * b.norm()
        assert b.norm() > 0


def same_bits(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        different = [name for name, tensor in expected[part].items() if not torch.equal(found[part][name], tensor)]
        assert not different, f"{part} of {different}"
