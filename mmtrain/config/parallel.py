"""How a run is spread over processes. Nothing here changes what is learnt, beyond floating-point order."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.config.models import require

#: Every strategy, with what it keeps on each rank.
STRATEGIES = {
    "none": "one process",
    "ddp": "everything on every rank, gradients averaged (DistributedDataParallel)",
    "fsdp": "parameters, gradients and optimizer state split over all ranks (FSDP2)",
    "hsdp": "split within groups of parallel.shard_size ranks, replicated between them (FSDP2 on a 2-D mesh)",
    "zero1": "optimizer state split over all ranks (DeepSpeed)",
    "zero2": "optimizer state and gradients split over all ranks (DeepSpeed)",
    "zero3": "optimizer state, gradients and parameters split over all ranks (DeepSpeed)",
}


@dataclass
class ParallelConfig:
    """``strategy``: auto (none in one process, ddp in several) or one of :data:`STRATEGIES`.

    ``shard_size``: ranks that share one copy, for hsdp (default: those of a node). ``reshard_after_forward``: fsdp and
    hsdp free the gathered parameters after the forward pass and gather them again for the backward pass. ``gather``:
    the dtype in which they are gathered; with bf16, A_log, D, the bias of Δ, norms and averages still go as fp32.
    ``offload``: optimizer state and updates on the CPU (zero1, zero2, zero3).

    ``start_timeout`` and ``step_timeout``, in seconds: how long a rank may stay away before the first step is done
    (data opens, kernels compile), and after it, before the run is ended with the names of the missing ranks.
    """

    strategy: str = "auto"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    gather: str = "fp32"
    offload: bool = False
    start_timeout: float = 1800.0
    step_timeout: float = 600.0

    def __post_init__(self) -> None:
        known = ("auto", *STRATEGIES)
        require(self.strategy in known, "parallel.strategy", self.strategy, f"choose one of {', '.join(known)}")
        require(self.gather in ("fp32", "bf16"), "parallel.gather", self.gather, "choose fp32 or bf16")
        size = self.shard_size
        require(size is None or size >= 1, "parallel.shard_size", size, "at least 1, or null for the ranks of a node")
        for key in ("start_timeout", "step_timeout"):
            require(getattr(self, key) > 0, f"parallel.{key}", getattr(self, key), "it must be positive (seconds)")
        if self.offload and not self.strategy.startswith("zero"):
            require(False, "parallel.offload", True, "only zero1, zero2 and zero3 offload; use one of them or false")
