"""What the formats share: the example as inputs, the file that is whole or not there, and the check against eager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmtrain.errors import UserError
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
