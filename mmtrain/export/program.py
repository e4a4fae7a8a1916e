"""A model as a torch.export program: loaded by torch alone, with ``torch.export.load(path).module()``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mmtrain.export.artifact import Example, Exported, as_inputs, check, dynamic_shapes, new_file, tracing


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
