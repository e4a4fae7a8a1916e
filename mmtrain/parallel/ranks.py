"""This process among the ranks of a run: the process group, small collectives, their timeouts and their failures."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from mmtrain.errors import LostConnection, SharedError, UserError, environment_number
from mmtrain.log import logger

T = TypeVar("T")


#: The description of a process group whose collectives may wait longer than a step, because they run beside it.
PATIENT = "mmtrain: patient"


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

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """``value`` of every rank, on every rank. Small JSON-like objects only. ``group``: another one of all ranks."""
        if self.world == 1:
            return [value]
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value, group=group)
        return found  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on at least one."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def on_main(self, action: Callable[[], None]) -> None:
        """Do ``action`` on rank 0 while the others wait.

        Raises:
            SharedError: on every rank, where ``action`` raised a UserError.
        """
        message: str | None = None
        if self.main:
            try:
                action()
            except UserError as error:
                message = str(error)
        message = self.gather(message)[0]
        if message is not None:
            raise SharedError(message)

    def barrier(self) -> None:
        if self.world > 1:
            self.sum(torch.zeros(1))


def world_size() -> int:
    """The number of ranks, from the environment variable WORLD_SIZE; 1 without it.

    Raises:
        UserError: where it holds no whole number, or 0.
    """
    return environment_number("WORLD_SIZE", 1, least=1)


@contextmanager
def init_distributed(device: str = "auto", timeout: float = 1800.0, group: bool = False) -> Iterator[Ranks]:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK (torchrun's variables); alone without them.

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        timeout: seconds after which a collective operation fails.
        group: make a process group even for one process.

    Raises:
        UserError: when CUDA is asked for and there is none, or a variable makes no sense.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no CUDA device: use device=cpu, or see `mmtrain doctor`")
    cuda = device != "cpu" and torch.cuda.is_available()
    world, rank = world_size(), environment_number("RANK", 0)
    local_rank, local_world = environment_number("LOCAL_RANK", 0), environment_number("LOCAL_WORLD_SIZE", 1)
    if world > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing or rank >= world:
            fault = f"{', '.join(missing)} is not set" if missing else f"RANK is {rank}"
            raise UserError(
                f"WORLD_SIZE is {world}, but {fault}: start the ranks with torchrun, srun or `mmtrain submit --local"
                " N`, or unset WORLD_SIZE to train in one process"
            )
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        here = torch.device("cuda", torch.cuda.current_device())
    else:
        here = torch.device("cpu")
        keep_freed_memory()
    if world == 1 and not group:
        yield Ranks(0, 1, here)
        return
    enable_flight_recorder()
    # a tensor of the CPU goes over gloo, whatever the model's device
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    limit = timedelta(seconds=timeout)
    if world == 1:
        dist.init_process_group(backend, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=limit)
    try:
        yield Ranks(rank, world, here, max(local_world, 1))
    except Exception as error:
        # said before the others lose their connection to us: their errors follow from this one
        if not isinstance(error, UserError) and not is_collective_error(error):
            logger.error("rank %d failed: %s: %s", rank, type(error).__name__, error)
        raise
    finally:
        if "deepspeed.comm" in sys.modules:  # it remembers the group, and would use it in the next run
            import deepspeed.comm.comm as deepspeed_comm

            if deepspeed_comm.cdb is not None:
                deepspeed_comm.destroy_process_group()
                deepspeed_comm.cdb = None
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: activations and gradients come again at every step, and fresh pages cost time.

    Without it, what lies at the end of the heap goes back to the system whenever it exceeds 64 MB. Does nothing where
    the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # setting one of the two ends the adaptation of the other, so both are set
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD of <malloc.h>, to the largest that is allowed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def is_collective_error(error: BaseException) -> bool:
    """True for what torch raises when a peer is gone or late. Gloo throws a plain RuntimeError that names itself."""
    return isinstance(error, dist.DistError | LostConnection) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def collective_timeout(seconds: float) -> float:
    """The timeout for collectives, in seconds, under which a watchdog of ``seconds`` speaks first."""
    return 1.1 * seconds + 30.0


def set_collective_timeout(seconds: float) -> None:
    """Give every process group of this process, sub-groups of a mesh too, a new timeout on all its backends.

    A collective gets the timeout that holds when it starts. So call this on all ranks after a barrier, or a rank that
    is ahead waits with the new one for a rank that still does what the old one was for. Groups made later have theirs,
    and :data:`PATIENT` ones keep theirs.
    """
    for group in list(c10d._world.pg_map):
        if group.group_desc != PATIENT:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def enable_flight_recorder(entries: int = 2000) -> None:
    """Let torch remember the last ``entries`` collectives; call it before ``init_process_group``, which reads the size.

    Gloo's recorder is on without this in torch 2.13; NCCL's size has differed between releases. What a user has set
    stays, under either of the variable's two names.
    """
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # torch reads the first that is set
    if not any(os.environ.get(name) for name in names):
        os.environ[names[0]] = str(entries)


def dump_flight_recorder(folder: Path, rank: int) -> None:
    """Write ``flight_gloo_rank_N.json`` and, in CUDA builds, ``flight_nccl_rank_N`` (a pickle for ``torchfrtrace``).

    Gloo's in JSON: torchfrtrace does not accept them (2.13 stores them without the group's name), the pickle takes
    seconds to look up source lines, and ``pg_status`` holds the point: the number of the last collective that was
    enqueued and of the last that was completed. The state of gloo's single entries is always "scheduled".
    """
    c10d_module: Any = torch._C._distributed_c10d
    (folder / f"flight_gloo_rank_{rank}.json").write_bytes(c10d_module._dump_fr_trace_json())
    if hasattr(c10d_module, "_dump_nccl_trace"):
        (folder / f"flight_nccl_rank_{rank}").write_bytes(c10d_module._dump_nccl_trace())
