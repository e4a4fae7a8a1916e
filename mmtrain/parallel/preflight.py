"""What must hold on every rank before a job of several nodes begins: devices, shared storage, clocks, a reduction."""

from __future__ import annotations

import secrets
import socket
import statistics
import time
from pathlib import Path

import torch

from mmtrain.errors import SharedError, os_errors
from mmtrain.parallel.ranks import Ranks

#: Clocks may differ by so many seconds: the journal and the ages of files are compared between nodes.
_MOST_SKEW = 5.0


class NodesAtFault(SharedError):
    """Nodes that keep the ranks from working together. ``nodes``: those that a job could do without."""

    def __init__(self, message: str, nodes: list[str]) -> None:
        super().__init__(message)
        self.nodes = nodes


def check_ranks(ranks: Ranks, folder: Path, device: str) -> str:
    """See that all ranks can work together in ``folder``; returns a line that says what was seen.

    Args:
        device: as configured: auto, cpu or cuda.

    Raises:
        NodesAtFault: on every rank, with the cure.
    """
    host = socket.gethostname()
    seen = ranks.gather({"host": host, "cuda": device != "cpu" and torch.cuda.is_available()})
    hosts = [str(one["host"]) for one in seen]
    faults: dict[str, set[str]] = {}

    def blame(ranks_at_fault: list[int], what: str) -> None:
        if ranks_at_fault:
            faults.setdefault(what, set()).update(hosts[r] for r in ranks_at_fault)

    blind = [r for r, one in enumerate(seen) if not one["cuda"]]
    if blind and (len(blind) < ranks.world or device == "cuda"):
        blame(blind, "sees no GPU, though others do: look at nvidia-smi there")
    readers = ranks.gather(_reads_what_rank_0_wrote(ranks, folder))
    blame(
        [r for r, good in enumerate(readers) if not good],
        f"does not see what rank 0 ({hosts[0]}) wrote in {folder}: put the run folder on storage that all nodes share"
        " (--run-dir, run_root)",
    )
    ranks.barrier()
    clocks = ranks.gather(time.time())
    middle = statistics.median(clocks)
    blame(
        [r for r, clock in enumerate(clocks) if abs(clock - middle) > _MOST_SKEW],
        f"has a clock that is more than {_MOST_SKEW:.0f} s off: start its time service (chrony)",
    )
    total = ranks.sum(torch.ones((), device=ranks.device)).item()
    blame([0] if total != ranks.world else [], f"added {ranks.world} ones up to {total:g}")
    if faults:
        raise NodesAtFault(
            "; ".join(f"{', '.join(sorted(names))} {what}" for what, names in faults.items())
            + ". To leave a node out: --exclude NODE",
            # without the node of rank 0 the others would be judged by another one
            sorted(set().union(*faults.values()) - {hosts[0]}),
        )
    kinds = "GPU" if not blind else "CPU"
    return f"{ranks.world} ranks ({kinds}) on {len(set(hosts))} nodes: {', '.join(sorted(set(hosts)))}"


def _reads_what_rank_0_wrote(ranks: Ranks, folder: Path) -> bool:
    nonce = ranks.gather(secrets.token_hex(8))[0]
    path = folder / f".shared_{nonce}"

    def write() -> None:
        with os_errors(f"{folder} cannot be written on {socket.gethostname()}", "choose another run folder"):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(nonce)

    ranks.on_main(write)
    try:
        good = path.read_text() == nonce
    except OSError:
        good = False
    ranks.barrier()
    if ranks.main:
        path.unlink(missing_ok=True)
    return good
