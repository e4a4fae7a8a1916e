"""Memory of the C library that training steps free and ask for again.

Who we are among the processes of a run, and the few collectives that the trainer needs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.errors import SharedError, UserError
from mmtrain.parallel.collective import enable_flight_recorder

# of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = -1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: activations and gradients come again at every step, and fresh pages cost time.

    Without it, what lies at the end of the heap goes back to the system whenever it exceeds 64 MB. Does nothing where
    the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # setting one of the two ends the adaptation of the other, so that both are set, to the largest allowed
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


T = TypeVar("T")

logger = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``; ``device`` is where it computes, ``local_world`` how many share its node."""

    rank: int
    world: int
    device: torch.device
    local_world: int = 1

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, on every rank; small tensors of the CPU stay there."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, on every rank. Small JSON-like objects only."""
        if self.world == 1:
            return [value]
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on at least one."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def on_main(self, action: Callable[[], None]) -> None:
        """Do ``action`` on rank 0 while the others wait.

        Raises:
            SharedError: on every rank, where ``action`` raised a UserError.
        """
        words: str | None = None
        if self.main:
            try:
                action()
            except UserError as error:
                words = str(error)
        words = self.gather(words)[0]
        if words is not None:
            raise SharedError(words)

    def barrier(self) -> None:
        if self.world > 1:
            self.sum(torch.zeros(1))


@contextmanager
def init_distributed(device: str = "auto", timeout: float = 1800.0, group: bool = False) -> Iterator[Ranks]:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK (torchrun's variables); alone without them.

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        timeout: seconds after which a collective operation fails.
        group: make a process group even for one process.

    Raises:
        UserError: when CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no CUDA device: use device=cpu, or see `mmtrain doctor`")
    cuda = device != "cpu" and torch.cuda.is_available()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank, local_world = (int(os.environ.get(f"LOCAL_{name}", d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    where = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if not cuda:
        keep_freed_memory()
    if world == 1 and not group:
        yield Ranks(0, 1, where)
        return
    # a tensor of the CPU goes over gloo, whatever the model's device
    enable_flight_recorder()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    limit = timedelta(seconds=timeout)
    if world == 1:
        dist.init_process_group(backend, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=limit)
    try:
        yield Ranks(rank, world, where, max(local_world, 1))
    except Exception as error:
        # said before the others lose their connection to us: their errors follow from this one
        if not isinstance(error, UserError) and not _lost_peer(error):
            logger.error("rank %d failed: %s: %s", rank, type(error).__name__, error)
        raise
    finally:
        _leave()


def _lost_peer(error: Exception) -> bool:
    """True for what torch raises when another rank is gone. Gloo throws a plain RuntimeError that names itself."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _leave() -> None:
    """Take the process group down, and what DeepSpeed remembers of it."""
    if "deepspeed.comm" in sys.modules:
        import deepspeed.comm.comm as its_comm

        if its_comm.cdb is not None:
            its_comm.destroy_process_group()
            its_comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()
