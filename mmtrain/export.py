"""A model as a file for other programs: an ONNX graph, or a torch.export program.

:func:`export_trained` writes a trained run as a folder, in one of these formats or as weights for mmtrain, with the
configuration and the assets beside the model. Every file is loaded again and compared with the model in eager mode,
with several batch sizes, before it gets its name: it is right, or not there.
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

#: One tensor, or the positional arguments of the model's forward; dimension 0 of every tensor is the batch.
Example = Tensor | Sequence[Tensor | None]
Inputs = tuple[Tensor | None, ...]

FORMATS = ("safetensors", "onnx", "torch")
#: Largest difference from eager, relative to the largest output (or 1): float32 sums in another order.
TOLERANCE = 1e-4
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LIMIT = 2**31  # bytes of one protobuf message


def export_trained(trained: TrainedModel, out: str | Path, format: str = "safetensors") -> Path:
    """Write the new folder ``out``: the model file, ``config.yaml`` and ``assets.json``.

    ``safetensors``: model.safetensors, for mmtrain. ``torch``: model.pt2, for torch alone. ``onnx``: model.onnx. The
    last two take any batch of inputs of the shape trained on (one image size, look-back and number of variates, no mask
    of missing values) and give the logits or the point forecast. Inputs are prepared as ``assets.json`` says: images
    scaled by mean and std, series by the scaler in float64. The model must be on the CPU in float32.

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
    with new_path(out) as partial:
        partial.mkdir()
        if format == "onnx":
            export_onnx(trained.model, example_input(trained), partial / "model.onnx")
        else:
            export_torch(trained.model, example_input(trained), partial / "model.pt2")
        for beside in (CONFIG, ASSETS):
            shutil.copyfile(trained.folder / beside, partial / beside)
    return out


def example_input(trained: TrainedModel) -> Inputs:
    """Two random samples of the shape that the run was trained on, as the arguments of the model's forward."""
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
    """Whether a forecast of the model may be given a mask of what was observed: it was made for one, or saw holes."""
    model = config.model
    masked = isinstance(model, ForecasterConfig) and model.auxiliary.mask
    return masked or getattr(config.data, "missing", None) == "mask"


def _random(like: Tensor, noise: torch.Generator) -> Tensor:
    """Standard normal numbers, or for a mask True in four of five places."""
    if like.dtype == torch.bool:
        return torch.rand(like.shape, generator=noise) < 0.8
    return torch.randn(like.shape, generator=noise)


@dataclass(frozen=True)
class Exported:
    """A written file. ``error``: the largest difference from the model in eager mode, over the batches compared."""

    path: Path
    error: float


def require_packages() -> None:
    """Raise UserError unless what ONNX needs is installed."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"--format onnx needs {', '.join(lacking)}, not installed here: run `pip install 'mmtrain[export]'`"
        )


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> Exported:
    """Trace ``model`` in evaluation mode on ``example`` and write it to ``path`` (.onnx), weights included.

    The inputs are named as the arguments of forward and the output ``output``. Only the batch is free: image sizes, the
    look-back and the number of variates are those of the example. The file is run by onnxruntime on the CPU and
    compared with the model, with other batch sizes too, before it gets its name. torch's graph rewriting is left out,
    since its time grows much faster than the graph; onnxruntime optimises the graph when it loads it.

    Args:
        example: an input (B, ...), or the positional arguments of forward (None for one left out).

    Raises:
        UserError: packages are lacking; ``path`` exists, does not end in .onnx or cannot be written; an example without
            a common batch; weights of 2 GiB and more, which one ONNX file cannot hold.
        RuntimeError: the file computes something else than the model (nothing is written), or tracing failed.
    """
    path = _checked(path, ".onnx")
    require_packages()
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if size >= _LIMIT:
        raise UserError(f"{path}: the weights take {size / 2**30:.1f} GiB, one ONNX file 2: use --format torch")
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
        _forget_sources(program.model)
        program.save(partial, external_data=False)
        session = _session(partial)

        def run(batch: Inputs) -> Tensor:
            given = [x.numpy() for x in batch if x is not None]
            return torch.from_numpy(session.run(None, dict(zip(names, given, strict=True)))[0])

        error = check(model, run, inputs)
    return Exported(path, error)


def _forget_sources(model: Any) -> None:
    """Take the source lines and paths of this machine from every node."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()


def _session(path: Path) -> Any:
    """onnxruntime on the CPU with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torch's own internals, about which a user can do nothing."""
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
    """Trace ``model`` in evaluation mode on ``example`` and write it to ``path`` (.pt2), for inference.

    Only the batch is free: image sizes, the look-back and the number of variates are those of the example. The file is
    loaded again and compared with the model, with other batch sizes too, before it gets its name. It does not hold the
    example. Time grows with the number of scans and with L/128, the chunks of each.

    Args:
        example: an input (B, ...), or the positional arguments of forward (None for one left out).

    Raises:
        UserError: ``path`` exists, does not end in .pt2 or cannot be written; an example without a common batch.
        RuntimeError: the file computes something else than the model (nothing is written), or tracing failed.
    """
    path = _checked(path, ".pt2")
    inputs = as_inputs(example)
    with new_path(path) as partial:
        with evaluating(model), scan_backend("parallel"):  # in standard operators
            program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes(inputs), strict=False)
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
        with partial.open("wb") as stream:  # given a path, torch names the archive after it
            torch.export.save(program, stream)
        loaded = torch.export.load(partial).module()
        error = check(model, lambda batch: loaded(*batch), inputs)
    return Exported(path, error)


def _checked(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"{path}: the name of the file must end in {suffix}")
    return path


def as_inputs(example: Example) -> Inputs:
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
    if sizes == {1}:
        return tuple(None if x is None else torch.cat([x, x]) for x in inputs)
    return inputs


def dynamic_shapes(inputs: Inputs) -> tuple[dict[int, object] | None, ...]:
    """The batch of every input as one named dimension, in the form that torch.export takes; the rest is fixed."""
    batch = torch.export.Dim("batch", min=1)
    return tuple(None if x is None else {0: batch} for x in inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check(model: nn.Module, run: Callable[[Inputs], Tensor], inputs: Inputs) -> float:
    """The largest difference between ``run`` and the model, on the example and with a batch of 1 and of one more.

    Raises:
        RuntimeError: when it is more than :data:`TOLERANCE`.
    """
    one = tuple(None if x is None else x[:1] for x in inputs)
    more = tuple(None if x is None else torch.cat([x.flip(0), x[:1]]) for x in inputs)
    worst = 0.0
    with evaluating(model):
        for batch in (inputs, one, more):
            expected, found = model(*batch), run(batch)
            # not finite is a fault too, so the comparison must be false for NaN
            error = (found - expected).abs().max().item()
            if not error <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise RuntimeError(f"the exported model differs from the model by {error:.3g}: it was not written")
            worst = max(worst, error)
    return worst
