"""How long collectives wait, what torch remembers of them, and how to tell that one has failed."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

#: torch reads the first that is set, when the first process group is made. The second is the older name.
_BUFFER_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")

#: The description of a process group whose collectives may wait longer than a step: for what goes on beside it.
PATIENT = "mmtrain: patient"


def collective_timeout(seconds: float) -> float:
    """The timeout for collectives, in seconds, under which a watchdog of ``seconds`` speaks first."""
    return 1.1 * seconds + 30.0


def set_timeout(seconds: float) -> None:
    """Give every process group of this process, sub-groups of a mesh too, a new timeout on all its backends.

    A collective gets the timeout that holds when it starts. So call this on all ranks after a barrier, or a rank that
    is ahead waits with the new one for a rank that still does what the old one was for. Groups made later have theirs,
    and :data:`PATIENT` ones keep theirs.
    """
    for group in list(c10d._world.pg_map):
        if group.group_desc != PATIENT:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def from_collective(error: BaseException) -> bool:
    """True for what torch raises when a peer is gone or late. Gloo throws a plain RuntimeError that names itself."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def enable_flight_recorder(entries: int = 2000) -> None:
    """Let torch remember the last ``entries`` collectives; call it before ``init_process_group``, which reads the size.

    Gloo's recorder is on without this in torch 2.13; NCCL's size has differed between releases. What a user has set
    stays, under either of the variable's two names.
    """
    if not any(os.environ.get(name) for name in _BUFFER_SIZE):
        os.environ[_BUFFER_SIZE[0]] = str(entries)


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
