"""What each stage of a model costs: parameters and forward FLOPs, found on the meta device without any memory.

:func:`resolve` finds the model from what a user calls it, :func:`stage_table` counts.
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

#: What the FLOPs leave out, as torch's counter does: about one operation an element each.
NOT_COUNTED = "activations, gates, normalisation, sums of the weighted averaging, pooling"


@dataclass(frozen=True)
class StageRow:
    """One line of the table. ``output``: the shape, batch first; FLOPs of one forward pass, 2 to a multiply-add.

    ``scan_flops`` is the selective scans' share of ``flops``, each counted 9·B·L·D·N + B·L·D.
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
    """Modules by their names in the model, and which of them gives the part's output ("" for the model itself)."""

    name: str
    modules: list[str]
    output: str


def stage_table(
    config: ModelConfig, *, batch: int = 1, image_size: tuple[int, int] = (224, 224), variates: int = 7
) -> list[StageRow]:
    """One row a stage: ViM2's stem, stages with their down-sampling, and head; TSM2's embedding, mixers and head.

    Args:
        batch: samples in the input.
        image_size: height and width in pixels, for ViM2.
        variates: number of series M, for TSM2.

    The rows add up to the whole model: what belongs to none of them gets a row ``other``.

    Raises:
        UserError: for an input that the model cannot take.
    """
    if min(batch, variates, *image_size) < 1:
        raise UserError(f"batch {batch}, image {image_size[0]}x{image_size[1]}, variates {variates}: give 1 or more")
    with torch.device("meta"):
        model = build_model(config).eval()
        inputs = example_inputs(config, batch=batch, image_size=image_size, variates=variates)
    parts = _parts(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: shapes.__setitem__(name, tuple(output.shape))

    hooks = [model.get_submodule(part.output).register_forward_hook(keep(part.output)) for part in parts]
    try:
        # the kernel's own rule for the FLOPs, whatever backend the environment asks for
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
    """The parts that the model names, or else all of it as one."""
    stage_parts = getattr(model, "stage_parts", None)
    if stage_parts is None:
        return [_Part("model", [name for name, _ in model.named_children()], "")]
    return [_Part(*part) for part in stage_parts()]


def _rows(
    model: nn.Module, parts: list[_Part], shapes: dict[str, tuple[int, ...]], counts: dict[str, dict[Any, int]]
) -> list[StageRow]:
    there = dict(model.named_modules())
    root = type(model).__name__
    rows = []
    for part in parts:
        names = [name for name in part.modules if name in there]
        modules = [there[name] for name in names]
        spent = [counts.get(f"{root}.{name}", {}) for name in names]
        mixers = _mixers(modules, part.output, there)
        channel = sum(getattr(mixer, "mixes", "") == "channels" for mixer in mixers)
        rows.append(
            StageRow(
                part.name,
                shapes[part.output],
                len(mixers) - channel,
                channel,
                sum(p.numel() for module in modules for p in module.parameters()),
                sum(sum(ops.values()) for ops in spent),
                sum(_scan(ops) for ops in spent),
            )
        )
    whole = counts.get(root, {})
    parameters = sum(p.numel() for p in model.parameters()) - sum(row.parameters for row in rows)
    flops = sum(whole.values()) - sum(row.flops for row in rows)
    scan = _scan(whole) - sum(row.scan_flops for row in rows)
    if parameters or flops:
        rows.append(StageRow("other", (), 0, 0, parameters, flops, scan))
    return rows


def _mixers(modules: Iterable[nn.Module], output: str, there: dict[str, nn.Module]) -> list[nn.Module]:
    """The mixers of a part: those of its stack, or the one mixer that it is."""
    stacks = [module for module in modules if isinstance(module, MixerStack)]
    if stacks:
        return [mixer for stack in stacks for mixer in stack.mixers]
    return [there[output]] if ".mixers." in output else []


def _scan(operations: dict[Any, int]) -> int:
    return sum(flops for op, flops in operations.items() if "selective_scan" in str(op))


def total(rows: Iterable[StageRow]) -> StageRow:
    """The sum of ``rows``, with the output of the last one that has any."""
    kept = list(rows)
    output = [row.output for row in kept if row.output][-1]
    sums = ("token_mixers", "channel_mixers", "parameters", "flops", "scan_flops")
    return StageRow("total", output, **{key: sum(getattr(row, key) for row in kept) for key in sums})


@dataclass(frozen=True)
class Subject:
    """What is looked at. ``run`` is None for a bare model name, ``folder`` for anything but a run or export folder."""

    model: ModelConfig
    run: RunConfig | None = None
    folder: Path | None = None


def resolve(name: str, overrides: Sequence[str] = ()) -> Subject:
    """Find the model called ``name``.

    Args:
        name: a name of the registry, a configuration's name or YAML file, or a run or export folder.
        overrides: ``key=value``. Keys of the model may stand without their ``model.``; a folder, whose model is made,
            takes keys of its data only.

    Raises:
        UserError: for an unknown name, key or value, with the nearest one.
    """
    if name in MODELS:
        return Subject(_overridden(name, overrides))
    folder = Path(name)
    if (folder / "config.yaml").is_file():
        fixed = [item for item in overrides if not item.startswith("data")]
        if fixed:
            raise UserError(f"{name} holds a trained model: it takes overrides of data only, not {', '.join(fixed)}")
        run = load_config(folder / "config.yaml", overrides)
        return Subject(run.model, run, folder)
    if folder.is_dir() and name not in config_names():
        raise UserError(f"{name} is no run or export folder: it has no config.yaml (list runs with `mmtrain runs`)")
    if folder.suffix not in (".yaml", ".yml") and name not in config_names():
        configurations = ", ".join(config_names()) or "(no configs/ folder here)"
        raise UserError(
            f"'{name}' is no model, configuration or run folder{nearest(name, [*MODELS, *config_names()])}\n"
            f"  models: {', '.join(MODELS)}\n  configurations: {configurations}"
        )
    known = _keys(load_config(name).model)
    run = load_config(name, [f"model.{item}" if item.split("=")[0] in known else item for item in overrides])
    return Subject(run.model, run)


def _keys(model: ModelConfig) -> list[str]:
    """The model's own keys: not ``name``, which a run configuration has too."""
    return [key for key in type(model).model_fields if key != "name"]


def _overridden(name: str, overrides: Sequence[str]) -> ModelConfig:
    """The named model with ``overrides``, typed and checked as in a configuration."""
    known = _keys(preset(name))
    items = [item.removeprefix("model.") for item in overrides]
    for item in items:
        key, equals, _ = item.partition("=")
        if not equals:
            raise UserError(f"'{item}' is not an override: write key=value, such as {known[0]}=10")
        if key not in known:
            raise UserError(f"model '{name}' has no key '{key}'{nearest(key, known)} (keys: {', '.join(known)})")
    config = preset(name)
    values = config.model_dump() | typed(type(config), parse_overrides(items, f"model '{name}'"))
    return MODELS.make(**values)
