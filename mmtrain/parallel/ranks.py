"""The process group of a run: joining it, small collectives, timeouts, and errors of collectives."""

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


#: Description of process groups that run in parallel with training. Their collectives may take longer than a step.
PATIENT = "mmtrain: patient"


@dataclass(frozen=True)
class Ranks:
    """This process and the ranks of its run.

    Attributes:
        rank: rank of this process, from 0.
        world: number of ranks.
        device: device on which this rank computes.
        local_world: number of ranks on this node.
    """

    rank: int
    world: int
    device: torch.device
    local_world: int = 1

    @property
    def main(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all ranks, in place, and return it. CPU tensors are reduced on the CPU."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return the ``value`` of every rank, on every rank.

        Args:
            value: a small JSON-like object.
            group: a process group of all ranks. Default: the default group.
        """
        if self.world == 1:
            return [value]
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value, group=group)
        return found  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on at least one rank, on every rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def on_main(self, action: Callable[[], None]) -> None:
        """Call ``action`` on rank 0 while the other ranks wait.

        Raises:
            SharedError: on every rank, if ``action`` raised a UserError.
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
        """Wait for all ranks."""
        if self.world > 1:
            self.sum(torch.zeros(1))


def world_size() -> int:
    """Return the number of ranks, from the environment variable WORLD_SIZE (default 1).

    Raises:
        UserError: if it is not a positive integer.
    """
    return environment_number("WORLD_SIZE", 1, least=1)


@contextmanager
def init_distributed(device: str = "auto", timeout: float = 1800.0, group: bool = False) -> Iterator[Ranks]:
    """Join the process group that torchrun's variables describe (RANK, WORLD_SIZE, LOCAL_RANK, …). Leave it at the end.

    Without these variables the process is the only rank.

    Args:
        device: ``auto`` (CUDA if available), ``cpu`` or ``cuda``.
        timeout: seconds after which a collective fails.
        group: create a process group even for a single rank.

    Raises:
        UserError: if ``cuda`` is requested but not available, or a variable is missing or invalid.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device. Use device=cpu, or see `mmtrain doctor`")
    cuda = device != "cpu" and torch.cuda.is_available()
    world, rank = world_size(), environment_number("RANK", 0)
    local_rank, local_world = environment_number("LOCAL_RANK", 0), environment_number("LOCAL_WORLD_SIZE", 1)
    if world > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing or rank >= world:
            fault = f"{', '.join(missing)} is not set" if missing else f"RANK is {rank}"
            raise UserError(
                f"WORLD_SIZE is {world}, but {fault}. Start the ranks with torchrun, srun or `mmtrain submit --local"
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
    # CPU tensors always use gloo, even if the model is on a GPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    limit = timedelta(seconds=timeout)
    if world == 1:
        dist.init_process_group(backend, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=limit)
    try:
        yield Ranks(rank, world, here, max(local_world, 1))
    except Exception as error:
        # Log the error before the process ends. The other ranks then lose their connection and fail as a consequence.
        if not isinstance(error, UserError) and not is_collective_error(error):
            logger.error("rank %d failed: %s: %s", rank, type(error).__name__, error)
        raise
    finally:
        if "deepspeed.comm" in sys.modules:  # it caches the group and would use it in the next run
            import deepspeed.comm.comm as deepspeed_comm

            if deepspeed_comm.cdb is not None:
                deepspeed_comm.destroy_process_group()
                deepspeed_comm.cdb = None
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, since every step allocates the same activations and gradients again.

    By default, glibc returns free memory at the end of the heap to the system if it exceeds 64 MB, and new pages cost
    time. Does nothing for other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Setting one threshold disables the automatic adaptation of the other, so set both.
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD of <malloc.h>: the largest value allowed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def is_collective_error(error: BaseException) -> bool:
    """Return whether ``error`` means that another rank is gone or late. Gloo raises a RuntimeError that names gloo."""
    return isinstance(error, dist.DistError | LostConnection) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def collective_timeout(seconds: float) -> float:
    """Return a timeout for collectives, in seconds, that is long enough for a watchdog of ``seconds`` to act first."""
    return 1.1 * seconds + 30.0


def set_collective_timeout(seconds: float) -> None:
    """Set the timeout of all existing process groups, those of meshes included. :data:`PATIENT` groups are excluded.

    The timeout applies to collectives that start afterwards. Call it on all ranks after a barrier. Otherwise a rank
    waits with the new timeout for a rank whose work needs the old one.
    """
    for group in list(c10d._world.pg_map):
        if group.group_desc != PATIENT:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def enable_flight_recorder(entries: int = 2000) -> None:
    """Let torch record the last ``entries`` collectives. Call it before ``init_process_group``, which reads the size.

    In torch 2.13 Gloo's recorder is always on. The default size of NCCL's recorder differs between releases. A size set
    by the user, under either name of the variable, is kept.
    """
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # torch reads the first that is set
    if not any(os.environ.get(name) for name in names):
        os.environ[names[0]] = str(entries)


def dump_flight_recorder(folder: Path, rank: int) -> None:
    """Write ``flight_gloo_rank_N.json`` and, in CUDA builds, ``flight_nccl_rank_N`` (a pickle for ``torchfrtrace``).

    Gloo's record is written as JSON because torchfrtrace does not accept it (torch 2.13 omits the name of the group),
    and because a pickle takes seconds to look up source lines. Its ``pg_status`` contains the numbers of the last
    enqueued and the last completed collective. The state of single Gloo entries is always "scheduled".
    """
    c10d_module: Any = torch._C._distributed_c10d
    (folder / f"flight_gloo_rank_{rank}.json").write_bytes(c10d_module._dump_fr_trace_json())
    if hasattr(c10d_module, "_dump_nccl_trace"):
        (folder / f"flight_nccl_rank_{rank}").write_bytes(c10d_module._dump_nccl_trace())
