"""Export a trained run: the model in one of the formats, with the configuration and the assets beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mmtrain.config import TSM2Config, ViM2Config
from mmtrain.errors import UserError, nearest
from mmtrain.export.artifact import Exported, refuse_existing
from mmtrain.export.onnx_graph import export_onnx, require_packages
from mmtrain.export.program import export_torch
from mmtrain.inference import TrainedModel, export

_WRITERS: dict[str, tuple[str, Callable[..., Exported]]] = {
    "onnx": ("model.onnx", export_onnx),
    "torch": ("model.pt2", export_torch),
}
FORMATS = ("safetensors", *_WRITERS)


def example_input(trained: TrainedModel) -> tuple[Tensor | None, ...]:
    """Two random samples of the shape that the run was trained on, as the arguments of the model's forward."""
    noise = torch.Generator().manual_seed(0)
    config = trained.config.model
    if isinstance(config, ViM2Config):
        size = trained.assets["image_size"]
        return (torch.randn(2, config.in_channels, size, size, generator=noise),)
    config = cast(TSM2Config, config)
    variates = len(trained.assets["columns"])
    inputs: list[Tensor | None] = [torch.randn(2, config.lookback, variates, generator=noise), None, None, None]
    if config.static_features:
        inputs[2] = torch.randn(2, variates, config.static_features, generator=noise)
    if config.future_features:
        length = config.future_length or config.lookback + config.horizon
        inputs[3] = torch.randn(2, length, variates, config.future_features, generator=noise)
    while inputs[-1] is None:
        inputs.pop()
    return tuple(inputs)


def export_trained(trained: TrainedModel, out: str | Path, format: str = "safetensors") -> Path:
    """Write the new folder ``out``: the model file, ``config.yaml`` and ``assets.json``.

    ``safetensors``: model.safetensors, for mmtrain. ``torch``: model.pt2, for torch alone. ``onnx``: model.onnx. The
    last two take any batch of inputs of the shape trained on (one image size, look-back and number of variates, no mask
    of missing values) and give the logits or the point forecast. Inputs are prepared as ``assets.json`` says: images
    scaled by mean and std, series by the scaler. The model must be on the CPU in float32.

    Raises:
        UserError: for an unknown format, packages that are lacking, or an ``out`` that exists or cannot be written.
        RuntimeError: when the file does not compute what the model does; nothing is written.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if format == "safetensors":
        return export(trained, out)
    if format == "onnx":
        require_packages()
    out = Path(out)
    refuse_existing(out)
    name, write = _WRITERS[format]
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(trained.model, example_input(trained), partial / name)
        for beside in ("config.yaml", "assets.json"):
            shutil.copyfile(trained.folder / beside, partial / beside)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
