"""A model as an ONNX graph, for onnxruntime and whatever else reads ONNX."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.errors import UserError
from mmtrain.export.artifact import (
    Example,
    Exported,
    as_inputs,
    check,
    dynamic_shapes,
    input_names,
    new_file,
    refuse_existing,
    tracing,
)

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
