"""Export of models for use without mmtrain: as an ONNX graph or a torch.export program.

:func:`export_trained` writes a trained model to a folder, in one of these formats or as weights for mmtrain, together
with its configuration and assets. Every exported file is loaded again and compared with the model in eager mode, with
several batch sizes, before it gets its final name. So an existing file is correct.
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

from mmtrain.config import ForecasterConfig, ImageModelConfig, RunConfig
from mmtrain.errors import UserError, nearest
from mmtrain.files import new_path
from mmtrain.inference import TrainedModel, export
from mmtrain.inference.folder import ASSETS, CONFIG
from mmtrain.models import example_inputs
from mmtrain.ops import scan_backend

#: An example input: one tensor, or the positional arguments of forward. Dimension 0 of every tensor is the batch.
Example = Tensor | Sequence[Tensor | None]
Inputs = tuple[Tensor | None, ...]

FORMATS = ("safetensors", "onnx", "torch")
#: Largest allowed difference from eager mode, relative to the largest output (at least 1). The order of float32 sums
#: differs.
TOLERANCE = 1e-4
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LIMIT = 2**31  # largest size of a protobuf message in bytes


def export_trained(trained: TrainedModel, out: str | Path, format: str = "safetensors") -> Path:
    """Write the model file, ``config.yaml`` and ``assets.json`` to the new folder ``out``.

    The formats ``torch`` and ``onnx`` take any batch size, but only the image size, lookback and number of variates of
    the run, and no mask unless the model was trained with one. They return the logits or the point forecast. Their
    inputs must be standardised with the values in ``assets.json``: images with mean and std, series with the scaler in
    float64.

    Args:
        trained: The trained model, on the CPU in float32.
        out: The folder to create.
        format: ``safetensors`` (model.safetensors, for mmtrain), ``torch`` (model.pt2, for torch without mmtrain) or
            ``onnx`` (model.onnx).

    Raises:
        UserError: If the format is unknown, packages are missing, or ``out`` exists or cannot be written.
        RuntimeError: If the exported file computes other results than the model. Nothing is written then.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if format == "safetensors":
        return export(trained, out)
    if format == "onnx":
        require_packages()
    out = Path(out)
    with new_path(out) as partial:
        partial.mkdir()
        if format == "onnx":
            export_onnx(trained.model, example_input(trained), partial / "model.onnx")
        else:
            export_torch(trained.model, example_input(trained), partial / "model.pt2")
        for name in (CONFIG, ASSETS):
            shutil.copyfile(trained.folder / name, partial / name)
    return out


def example_input(trained: TrainedModel) -> Inputs:
    """Return two random samples of the shape of the training data, as arguments of the model's forward."""
    config, assets = trained.config.model, trained.assets
    if isinstance(config, ImageModelConfig):
        inputs = example_inputs(config, batch=2, image_size=(assets["image_size"],) * 2)
    else:
        inputs = example_inputs(config, batch=2, variates=len(assets["columns"]))
        if takes_mask(trained.config) and inputs[1] is None:
            inputs = (inputs[0], torch.ones_like(cast(Tensor, inputs[0]), dtype=torch.bool), *inputs[2:])
    noise = torch.Generator().manual_seed(0)
    given = [None if x is None else _random(x, noise) for x in inputs]
    while given[-1] is None:
        given.pop()
    return tuple(given)


def takes_mask(config: RunConfig) -> bool:
    """Return whether forecasts may take a mask of observed values: its architecture or its training data has one."""
    model = config.model
    masked = isinstance(model, ForecasterConfig) and model.auxiliary.mask
    return masked or getattr(config.data, "missing", None) == "mask"


def _random(like: Tensor, noise: torch.Generator) -> Tensor:
    """Return standard normal numbers of the shape of ``like``, or a mask that is True at 80 % of the positions."""
    if like.dtype == torch.bool:
        return torch.rand(like.shape, generator=noise) < 0.8
    return torch.randn(like.shape, generator=noise)


@dataclass(frozen=True)
class Exported:
    """An exported file. ``error`` is the largest difference from the model in eager mode."""

    path: Path
    error: float


def require_packages() -> None:
    """Raise UserError unless the packages for ONNX are installed."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"--format onnx needs {', '.join(lacking)}, which is not installed. Run `pip install 'mmtrain[export]'`"
        )


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> Exported:
    """Trace ``model`` in evaluation mode and write it with its weights to an ONNX file.

    The inputs have the names of the arguments of forward, the output is called ``output``. Only the batch size is
    dynamic: image size, lookback and number of variates are those of the example. The file is run by onnxruntime on the
    CPU and compared with the model, with several batch sizes, before it gets its final name. torch's optimisation of
    the graph is disabled, since its time grows much faster than the graph; onnxruntime optimises it while loading.

    Args:
        model: The model.
        example: An input (B, ...), or the positional arguments of forward (None for an omitted one).
        path: The file to write, with the suffix .onnx.

    Raises:
        UserError: If packages are missing, ``path`` exists, has another suffix or cannot be written, the tensors of the
            example have different batch sizes, or the weights take 2 GiB or more, the limit of an ONNX file.
        RuntimeError: If tracing fails, or the results of the file differ from those of the model (nothing is written).
    """
    path = _checked(path, ".onnx")
    require_packages()
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if size >= _LIMIT:
        raise UserError(
            f"{path}: the weights take {size / 2**30:.1f} GiB, but an ONNX file is limited to 2 GiB. Use --format torch"
        )
    inputs = as_inputs(example)
    arguments = inspect.signature(model.forward).parameters
    names = [name for name, x in zip(arguments, inputs, strict=False) if x is not None]
    with new_path(path) as partial:
        with evaluating(model), scan_backend("parallel"), _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                dynamic_shapes=dynamic_shapes(inputs),
                input_names=names,
                output_names=["output"],
                optimize=False,
                verbose=False,
            )
        assert program is not None
        _remove_source_paths(program.model)
        program.save(partial, external_data=False)
        session = _session(partial)

        def run(batch: Inputs) -> Tensor:
            given = [x.numpy() for x in batch if x is not None]
            return torch.from_numpy(session.run(None, dict(zip(names, given, strict=True)))[0])

        error = check(model, run, inputs)
    return Exported(path, error)


def _remove_source_paths(model: Any) -> None:
    """Remove source lines and file paths of this machine from every node."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()


def _session(path: Path) -> Any:
    """Load the file in onnxruntime, on the CPU with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the exporter's warnings about torch internals, which a user cannot change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")  # two inputs share the batch
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def export_torch(model: nn.Module, example: Example, path: str | Path) -> Exported:
    """Trace ``model`` in evaluation mode and write it as a torch.export program for inference.

    Only the batch size is dynamic: image size, lookback and number of variates are those of the example. The file is
    loaded again and compared with the model, with several batch sizes, before it gets its final name. It does not
    contain the example. The time of the export grows with the number of scans, and with the L/128 chunks of each.

    Args:
        model: The model.
        example: An input (B, ...), or the positional arguments of forward (None for an omitted one).
        path: The file to write, with the suffix .pt2.

    Raises:
        UserError: If ``path`` exists, has another suffix or cannot be written, or the tensors of the example have
            different batch sizes.
        RuntimeError: If the file computes other results than the model (nothing is written), or tracing fails.
    """
    path = _checked(path, ".pt2")
    inputs = as_inputs(example)
    with new_path(path) as partial:
        with evaluating(model), scan_backend("parallel"):  # uses standard operators only
            program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes(inputs), strict=False)
        graph = program.graph_module.graph
        # torch.export.load fails on an unused unbind of an empty tensor
        graph.eliminate_dead_code()
        program.graph_module.recompile()
        custom = sorted({str(n.target) for n in graph.nodes if str(n.target).startswith("mmtrain")})
        if custom:
            raise RuntimeError(f"{', '.join(custom)}: these operators cannot be loaded without mmtrain")
        for node in graph.nodes:  # remove source lines and file paths of this machine
            node.meta.pop("stack_trace", None)
        program.example_inputs = None
        with partial.open("wb") as stream:  # with a path, torch would store its name in the archive
            torch.export.save(program, stream)
        loaded = torch.export.load(partial).module()
        error = check(model, lambda batch: loaded(*batch), inputs)
    return Exported(path, error)


def _checked(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"{path}: the file name must end in {suffix}")
    return path


def as_inputs(example: Example) -> Inputs:
    """Return the example as positional arguments. A batch of one is doubled, because tracing makes a 1 a constant.

    Raises:
        UserError: If there is no tensor, or the tensors have different batch sizes.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    sizes = {x.shape[0] if x.ndim else 0 for x in inputs if x is not None}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(
            f"example: its tensors have the shapes {[tuple(x.shape) for x in inputs if x is not None]}. Dimension 0,"
            " the batch, must be the same in all of them and at least 1"
        )
    if sizes == {1}:
        return tuple(None if x is None else torch.cat([x, x]) for x in inputs)
    return inputs


def dynamic_shapes(inputs: Inputs) -> tuple[dict[int, object] | None, ...]:
    """Return the argument of torch.export that makes the batch of all inputs one dynamic dimension."""
    batch = torch.export.Dim("batch", min=1)
    return tuple(None if x is None else {0: batch} for x in inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in evaluation mode and no gradients are recorded. Restores the model's mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check(model: nn.Module, run: Callable[[Inputs], Tensor], inputs: Inputs) -> float:
    """Compare an exported model with the original, on the example and with two other batch sizes.

    Args:
        model: The original model.
        run: A function that runs the exported model.
        inputs: The example.

    Returns:
        The largest difference of the outputs.

    Raises:
        RuntimeError: If the difference exceeds :data:`TOLERANCE`.
    """
    one = tuple(None if x is None else x[:1] for x in inputs)
    more = tuple(None if x is None else torch.cat([x.flip(0), x[:1]]) for x in inputs)
    worst = 0.0
    with evaluating(model):
        for batch in (inputs, one, more):
            expected, found = model(*batch), run(batch)
            # "not <=" is also true for NaN, which is an error too
            error = (found - expected).abs().max().item()
            if not error <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise RuntimeError(f"the exported model differs from the original by {error:.3g} and was not written")
            worst = max(worst, error)
    return worst
