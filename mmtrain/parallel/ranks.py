"""Who we are among the processes of a run, and the few collectives that the trainer needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``; ``device`` is where it computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, on every rank."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on at least one."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: str = "auto", timeout_minutes: float = 30) -> Iterator[Ranks]:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK (torchrun's variables); alone without them.

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.

    Raises:
        UserError: when CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no CUDA device: use device=cpu, or see `mmtrain doctor`")
    cuda = device != "cpu" and torch.cuda.is_available()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    where = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, where)
        return
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Ranks(rank, world, where)
    finally:
        dist.destroy_process_group()
