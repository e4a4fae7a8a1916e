"""Checks before a job on several nodes begins: devices, shared storage, clocks, and a reduction."""

from __future__ import annotations

import secrets
import socket
import statistics
import time
from pathlib import Path

import torch

from mmtrain.errors import SharedError, os_errors
from mmtrain.parallel.ranks import Ranks

#: Maximum difference between clocks in seconds. Times in the journal and of files are compared between nodes.
_MOST_SKEW = 5.0


class NodesAtFault(SharedError):
    """Some nodes failed a check. ``nodes`` are the failed nodes that the job can exclude."""

    def __init__(self, message: str, nodes: list[str]) -> None:
        super().__init__(message)
        self.nodes = nodes


def check_ranks(ranks: Ranks, folder: Path, device: str) -> str:
    """Check that all ranks can work together in ``folder``. A collective: all ranks call it together.

    The checks: all ranks or none have a GPU, all see the same files, the clocks agree, and a reduction is correct.

    Args:
        folder: the run folder.
        device: ``device`` of the configuration: auto, cpu or cuda.

    Returns:
        A summary of ranks and nodes, for the log.

    Raises:
        NodesAtFault: on every rank, with the nodes and the cure.
    """
    host = socket.gethostname()
    found = ranks.gather({"host": host, "cuda": device != "cpu" and torch.cuda.is_available()})
    hosts = [str(one["host"]) for one in found]
    faults: dict[str, set[str]] = {}

    def report(ranks_at_fault: list[int], fault: str) -> None:
        if ranks_at_fault:
            faults.setdefault(fault, set()).update(hosts[r] for r in ranks_at_fault)

    without_gpu = [r for r, one in enumerate(found) if not one["cuda"]]
    if without_gpu and (len(without_gpu) < ranks.world or device == "cuda"):
        report(without_gpu, "has no visible GPU: check nvidia-smi there")
    readers = ranks.gather(_sees_file_of_rank_0(ranks, folder))
    report(
        [r for r, good in enumerate(readers) if not good],
        f"does not see a file that rank 0 ({hosts[0]}) wrote in {folder}: put the run folder on storage that all nodes"
        " share (--run-dir, run_root)",
    )
    ranks.barrier()
    clocks = ranks.gather(time.time())
    middle = statistics.median(clocks)
    report(
        [r for r, clock in enumerate(clocks) if abs(clock - middle) > _MOST_SKEW],
        f"has a clock that differs by more than {_MOST_SKEW:.0f} s from the others: start its time service (chrony)",
    )
    total = ranks.sum(torch.ones((), device=ranks.device)).item()
    report([0] if total != ranks.world else [], f"computed {total:g} as the sum of {ranks.world} ones")
    if faults:
        raise NodesAtFault(
            "; ".join(f"{', '.join(sorted(names))} {fault}" for fault, names in faults.items())
            + ". To start without a node, add --exclude NODE",
            # The node of rank 0 is the reference of the checks, so it is not excluded.
            sorted(set().union(*faults.values()) - {hosts[0]}),
        )
    kinds = "GPU" if not without_gpu else "CPU"
    return f"{ranks.world} ranks ({kinds}) on {len(set(hosts))} nodes: {', '.join(sorted(set(hosts)))}"


def _sees_file_of_rank_0(ranks: Ranks, folder: Path) -> bool:
    """Let rank 0 write a file in ``folder``, and return whether this rank can read it."""
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
