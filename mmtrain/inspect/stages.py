"""Parameters and forward FLOPs of each stage of a model, computed on the meta device.

:func:`resolve` finds the model that a user names, and :func:`stage_table` computes the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import MODELS, ModelConfig, RunConfig, config_names, load_config
from mmtrain.config.models import preset
from mmtrain.config.text import parse_overrides, typed
from mmtrain.errors import UserError, nearest
from mmtrain.models import build_model, example_inputs
from mmtrain.models.averaging import MixerStack
from mmtrain.ops.backend import scan_backend

#: Operations that the FLOPs do not include, as in torch's counter: about one operation per element each.
NOT_COUNTED = "activations, gates, normalisation, sums of the weighted averaging, pooling"


@dataclass(frozen=True)
class StageRow:
    """One row of the table.

    Attributes:
        name: Name of the stage.
        output: Shape of its output, batch first.
        token_mixers: Number of token mixers.
        channel_mixers: Number of channel mixers.
        parameters: Number of parameters.
        flops: FLOPs of one forward pass; a multiply-add counts as 2.
        scan_flops: Part of ``flops`` in selective scans, 9·B·L·D·N + B·L·D for each.
    """

    name: str
    output: tuple[int, ...]
    token_mixers: int
    channel_mixers: int
    parameters: int
    flops: int
    scan_flops: int


@dataclass(frozen=True)
class _Part:
    """A stage: the names of its modules, and of the module that returns its output ("" for the model itself)."""

    name: str
    modules: list[str]
    output: str


def stage_table(
    config: ModelConfig, *, batch: int = 1, image_size: tuple[int, int] = (224, 224), variates: int = 7
) -> list[StageRow]:
    """Return one row per stage.

    The rows are ViM2's stem, stages (with their down-sampling) and head, or TSM2's embedding, mixers and head. They add
    up to the whole model: modules outside of these stages get the row ``other``.

    Args:
        config: Configuration of the model.
        batch: Batch size of the input.
        image_size: Height and width in pixels, for ViM2.
        variates: Number of variates M, for TSM2.

    Raises:
        UserError: If the model cannot take the input.
    """
    if min(batch, variates, *image_size) < 1:
        raise UserError(
            f"batch {batch}, image {image_size[0]}x{image_size[1]}, variates {variates}: each must be at least 1"
        )
    with torch.device("meta"):
        model = build_model(config).eval()
        inputs = example_inputs(config, batch=batch, image_size=image_size, variates=variates)
    parts = _parts(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: shapes.__setitem__(name, tuple(output.shape))

    hooks = [model.get_submodule(part.output).register_forward_hook(keep(part.output)) for part in parts]
    try:
        # "auto" uses the kernel's rule for FLOPs, whatever backend the environment sets
        with FlopCounterMode(display=False) as counter, scan_backend("auto"), torch.no_grad():
            model(*inputs)
    except ValueError as error:
        raise UserError(f"model '{config.name}': {error}") from None
    finally:
        for hook in hooks:
            hook.remove()
    counts = {name: dict(ops) for name, ops in counter.get_flop_counts().items()}
    return _rows(model, parts, shapes, counts)


def _parts(model: nn.Module) -> list[_Part]:
    """Return the stages that the model defines, or the whole model as one stage."""
    stage_parts = getattr(model, "stage_parts", None)
    if stage_parts is None:
        return [_Part("model", [name for name, _ in model.named_children()], "")]
    return [_Part(*part) for part in stage_parts()]


def _rows(
    model: nn.Module, parts: list[_Part], shapes: dict[str, tuple[int, ...]], counts: dict[str, dict[Any, int]]
) -> list[StageRow]:
    modules_of_model = dict(model.named_modules())
    root = type(model).__name__
    rows = []
    for part in parts:
        names = [name for name in part.modules if name in modules_of_model]
        modules = [modules_of_model[name] for name in names]
        flops_of_modules = [counts.get(f"{root}.{name}", {}) for name in names]
        mixers = _mixers(modules, part.output, modules_of_model)
        channel = sum(getattr(mixer, "mixes", "") == "channels" for mixer in mixers)
        rows.append(
            StageRow(
                part.name,
                shapes[part.output],
                len(mixers) - channel,
                channel,
                sum(p.numel() for module in modules for p in module.parameters()),
                sum(sum(ops.values()) for ops in flops_of_modules),
                sum(_scan(ops) for ops in flops_of_modules),
            )
        )
    whole = counts.get(root, {})
    parameters = sum(p.numel() for p in model.parameters()) - sum(row.parameters for row in rows)
    flops = sum(whole.values()) - sum(row.flops for row in rows)
    scan = _scan(whole) - sum(row.scan_flops for row in rows)
    if parameters or flops:
        rows.append(StageRow("other", (), 0, 0, parameters, flops, scan))
    return rows


def _mixers(modules: Iterable[nn.Module], output: str, modules_of_model: dict[str, nn.Module]) -> list[nn.Module]:
    """Return the mixers of a stage: those of its stacks, or the stage itself if it is a mixer."""
    stacks = [module for module in modules if isinstance(module, MixerStack)]
    if stacks:
        return [mixer for stack in stacks for mixer in stack.mixers]
    return [modules_of_model[output]] if ".mixers." in output else []


def _scan(operations: dict[Any, int]) -> int:
    return sum(flops for op, flops in operations.items() if "selective_scan" in str(op))


def total(rows: Iterable[StageRow]) -> StageRow:
    """Return the sum of ``rows``, with the output of the last row that has one."""
    kept = list(rows)
    output = [row.output for row in kept if row.output][-1]
    sums = ("token_mixers", "channel_mixers", "parameters", "flops", "scan_flops")
    return StageRow("total", output, **{key: sum(getattr(row, key) for row in kept) for key in sums})


@dataclass(frozen=True)
class Subject:
    """The model to analyse.

    Attributes:
        model: Configuration of the model.
        run: The whole configuration, or None if only a model was named.
        folder: The run folder or export, or None if none was named.
    """

    model: ModelConfig
    run: RunConfig | None = None
    folder: Path | None = None


def resolve(name: str, overrides: Sequence[str] = ()) -> Subject:
    """Return the model called ``name``.

    Args:
        name: Name of a model or configuration, YAML file, run folder or export.
        overrides: Overrides ``key=value``. Keys of the section ``model`` may be written without ``model.``. With a run
            folder or export, whose model already exists, only keys of the section ``data`` are allowed.

    Raises:
        UserError: If a name, key or value is unknown. The message suggests the nearest one.
    """
    if name in MODELS:
        return Subject(_overridden(name, overrides))
    folder = Path(name)
    if (folder / "config.yaml").is_file():
        fixed = [item for item in overrides if not item.startswith("data")]
        if fixed:
            raise UserError(
                f"{', '.join(fixed)}: {name} contains a trained model, which only takes overrides of data. Leave it out"
            )
        run = load_config(folder / "config.yaml", overrides)
        return Subject(run.model, run, folder)
    if folder.is_dir() and name not in config_names():
        raise UserError(
            f"{name}: not a run folder or export, because it has no config.yaml. `mmtrain runs` lists the runs"
        )
    if folder.suffix not in (".yaml", ".yml") and name not in config_names():
        configurations = ", ".join(config_names()) or "(no configs/ folder here)"
        raise UserError(
            f"'{name}' is not a model, configuration or run folder{nearest(name, [*MODELS, *config_names()])}\n"
            f"  models: {', '.join(MODELS)}\n  configurations: {configurations}"
        )
    known = _keys(load_config(name).model)
    run = load_config(name, [f"model.{item}" if item.split("=")[0] in known else item for item in overrides])
    return Subject(run.model, run)


def _keys(model: ModelConfig) -> list[str]:
    """Return the keys of the section ``model`` except ``name``, which also exists at the top level."""
    return [key for key in type(model).model_fields if key != "name"]


def _overridden(name: str, overrides: Sequence[str]) -> ModelConfig:
    """Return the configuration of the named model with ``overrides``, validated as in a configuration file."""
    known = _keys(preset(name))
    items = [item.removeprefix("model.") for item in overrides]
    for item in items:
        key, equals, _ = item.partition("=")
        if not equals:
            raise UserError(f"'{item}': not an override. Write key=value, such as {known[0]}=10")
        if key not in known:
            raise UserError(f"model '{name}' has no key '{key}'{nearest(key, known)} (keys: {', '.join(known)})")
    config = preset(name)
    values = config.model_dump() | typed(type(config), parse_overrides(items, f"model '{name}'"))
    return MODELS.make(**values)
