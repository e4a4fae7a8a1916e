"""What the formats share: the example as inputs, the file that is whole or not there, and the check against eager.

A model as an ONNX graph, for onnxruntime and whatever else reads ONNX.

A model as a torch.export program: loaded by torch alone, with ``torch.export.load(path).module()``.

Export a trained run: the model in one of the formats, with the configuration and the assets beside it.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmtrain.config import TSM2Config, ViM2Config
from mmtrain.errors import UserError, nearest
from mmtrain.inference.trained import TrainedModel, export
from mmtrain.ops import scan_backend

#: One tensor, or the positional arguments of the model's forward; dimension 0 of every tensor is the batch.
Example = Tensor | Sequence[Tensor | None]
Run = Callable[[tuple[Tensor | None, ...]], Tensor]

#: Largest difference from eager, relative to the largest output (or 1): float32 sums in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A written file. ``error``: the largest difference from the model in eager mode, over the batches compared."""

    path: Path
    bytes: int
    nodes: int
    error: float


def as_inputs(example: Example, dynamic_batch: bool) -> tuple[Tensor | None, ...]:
    """The example as positional arguments; a batch of one is doubled, since a traced 1 would become a constant.

    Raises:
        UserError: for tensors of different batch sizes, or none at all.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    sizes = {x.shape[0] if x.ndim else 0 for x in inputs if x is not None}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(
            f"example: its tensors have the shapes {[tuple(x.shape) for x in inputs if x is not None]}: "
            "dimension 0 of each must be the same batch of at least one sample"
        )
    if dynamic_batch and sizes == {1}:
        return tuple(None if x is None else torch.cat([x, x]) for x in inputs)
    return inputs


def input_names(model: nn.Module, inputs: tuple[Tensor | None, ...]) -> list[str]:
    """The names of the arguments of ``model.forward`` that the example gives."""
    names = list(inspect.signature(model.forward).parameters)
    return [name for name, x in zip(names, inputs, strict=False) if x is not None]


def dynamic_shapes(inputs: tuple[Tensor | None, ...], dynamic_batch: bool) -> tuple[dict[int, object] | None, ...]:
    """The batch of every input as one named dimension, in the form that torch.export takes; the rest is fixed."""
    batch = torch.export.Dim("batch", min=1)
    return tuple(({0: batch} if dynamic_batch else {}) if x is not None else None for x in inputs)


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and the scan in standard operators; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), scan_backend("parallel"):
            yield
    finally:
        model.train(training)


@contextmanager
def new_file(path: str | Path, suffix: str) -> Iterator[Path]:
    """Where to write: beside ``path``, renamed to it at the end, removed after a failure.

    Raises:
        UserError: when ``path`` exists, has another suffix or cannot be written.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"{path}: the name of the file must end in {suffix}")
    refuse_existing(path)
    partial = path.with_name(f".{path.stem}.partial{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield partial
        refuse_existing(path)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another name, or remove it first")


@torch.no_grad()
def check(model: nn.Module, run: Run, inputs: tuple[Tensor | None, ...], dynamic_batch: bool) -> float:
    """The largest difference between ``run`` and the model, on the example and with a batch of 1 and of one more.

    Raises:
        RuntimeError: when it is more than :data:`TOLERANCE`.
    """
    batches = [inputs]
    if dynamic_batch:
        batches.append(tuple(None if x is None else x[:1] for x in inputs))
        batches.append(tuple(None if x is None else torch.cat([x.flip(0), x[:1]]) for x in inputs))
    worst = 0.0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            expected, found = model(*batch), run(batch)
            # not finite is a fault too, so the comparison must be false for NaN
            error = (found - expected).abs().max().item()
            if not error <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise RuntimeError(f"the exported model differs from the model by {error:.3g}: it was not written")
            worst = max(worst, error)
    finally:
        model.train(training)
    return worst


_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LIMIT = 2**31  # bytes of one protobuf message


def require_packages() -> None:
    """Raise UserError unless what ONNX needs is installed."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"--format onnx needs {', '.join(lacking)}, not installed here: run `pip install 'mmtrain[export]'`"
        )


def export_onnx(model: nn.Module, example: Example, path: str | Path, *, dynamic_batch: bool = True) -> Exported:
    """Trace ``model`` in evaluation mode on ``example`` and write it to ``path`` (.onnx), weights included.

    The inputs are named as the arguments of forward and the output ``output``. Only the batch is free: image sizes, the
    look-back and the number of variates are those of the example. The file is run by onnxruntime on the CPU and
    compared with the model, with other batch sizes too, before it gets its name. torch's graph rewriting is left out,
    since its time grows much faster than the graph; onnxruntime optimises the graph when it loads it.

    Args:
        example: an input (B, ...), or the positional arguments of forward (None for one left out).
        dynamic_batch: take any batch; otherwise only that of the example.

    Raises:
        UserError: packages are lacking; ``path`` exists, does not end in .onnx or cannot be written; an example without
            a common batch; weights of 2 GiB and more, which one ONNX file cannot hold.
        RuntimeError: the file computes something else than the model (nothing is written), or tracing failed.
    """
    refuse_existing(Path(path))
    require_packages()
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if size >= _LIMIT:
        raise UserError(f"{path}: the weights take {size / 2**30:.1f} GiB, one ONNX file 2: use --format torch")
    inputs = as_inputs(example, dynamic_batch)
    names = input_names(model, inputs)
    with new_file(path, ".onnx") as partial:
        with tracing(model), _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                dynamic_shapes=dynamic_shapes(inputs, dynamic_batch),
                input_names=names,
                output_names=["output"],
                optimize=False,
                verbose=False,
            )
        assert program is not None
        program.save(partial, external_data=False)
        session = _session(partial)

        def run(batch: tuple[Tensor | None, ...]) -> Tensor:
            given = [x.numpy() for x in batch if x is not None]
            return torch.from_numpy(session.run(None, dict(zip(names, given, strict=True)))[0])

        error = check(model, run, inputs, dynamic_batch)
        written, nodes = partial.stat().st_size, program.model.graph.num_nodes()
    return Exported(Path(path), written, nodes, error)


def _session(path: Path) -> Any:
    """onnxruntime on the CPU with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _quiet(warnings.catch_warnings):
    """Without the exporter's remarks on torch's own internals, which a user can do nothing about."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        self._level = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    def __exit__(self, *exc_info: Any) -> None:
        logging.getLogger("torch.onnx").setLevel(self._level)
        super().__exit__(*exc_info)


def export_torch(model: nn.Module, example: Example, path: str | Path, *, dynamic_batch: bool = True) -> Exported:
    """Trace ``model`` in evaluation mode on ``example`` and write it to ``path`` (.pt2), for inference.

    Only the batch is free: image sizes, the look-back and the number of variates are those of the example. The file is
    loaded again and compared with the model, with other batch sizes too, before it gets its name. It does not hold the
    example. Time grows with the number of scans and with L/128, the chunks of each.

    Args:
        example: an input (B, ...), or the positional arguments of forward (None for one left out).
        dynamic_batch: take any batch; otherwise only that of the example.

    Raises:
        UserError: ``path`` exists, does not end in .pt2 or cannot be written; an example without a common batch.
        RuntimeError: the file computes something else than the model (nothing is written), or tracing failed.
    """
    inputs = as_inputs(example, dynamic_batch)
    with new_file(path, ".pt2") as partial:
        with tracing(model):
            program = torch.export.export(
                model, inputs, dynamic_shapes=dynamic_shapes(inputs, dynamic_batch), strict=False
            )
        graph = program.graph_module.graph
        # an unused unbind of an empty tensor cannot be read back
        graph.eliminate_dead_code()
        program.graph_module.recompile()
        ours = sorted({str(n.target) for n in graph.nodes if str(n.target).startswith("mmtrain")})
        if ours:
            raise RuntimeError(f"{', '.join(ours)}: these operators cannot be loaded without mmtrain")
        for node in graph.nodes:  # source lines and paths of this machine
            node.meta.pop("stack_trace", None)
        program.example_inputs = None
        torch.export.save(program, partial)
        loaded = torch.export.load(partial).module()
        error = check(model, lambda batch: loaded(*batch), inputs, dynamic_batch)
        size = partial.stat().st_size
    return Exported(Path(path), size, len(graph.nodes), error)


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
