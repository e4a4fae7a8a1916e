"""How a run is spread over processes. Nothing here changes what is learnt, beyond floating-point order.

The typed schema of a run. Lengths are in epochs or steps of the *global* batch, never per rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.data import DataConfig
from mmtrain.config.models import ModelConfig, require

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


@dataclass
class TaskConfig:
    """Which task: model, loss, metrics and data meet there."""

    kind: str = ""


@dataclass
class ClassificationConfig(TaskConfig):
    """Cross-entropy over classes, with label smoothing and timm's Mixup and CutMix (0 turns one off)."""

    kind: str = "classification"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "task.label_smoothing", smoothing, "it must be in [0, 1)")
        for key in ("mixup", "cutmix", "mix_prob"):
            require(getattr(self, key) >= 0, f"task.{key}", getattr(self, key), "it must be 0 or more")


@dataclass
class ForecastingConfig(TaskConfig):
    """MSE or MAE on the standardised values; both are reported, over every window.

    ``spread_weight`` times the pinball loss or the negative log-likelihood is added for a model with quantiles or a
    Student-t.
    """

    kind: str = "forecasting"
    loss: str = "mse"
    spread_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.loss in ("mse", "mae"), "task.loss", self.loss, "choose mse or mae")
        require(self.spread_weight > 0, "task.spread_weight", self.spread_weight, "it must be positive")


TASKS: dict[str, type[TaskConfig]] = {"classification": ClassificationConfig, "forecasting": ForecastingConfig}


@dataclass
class OptimConfig:
    """AdamW with linear warm-up, then ``schedule`` (cosine or constant) down to ``min_lr_ratio``·lr."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_epochs: float = 0.0
    schedule: str = "cosine"
    min_lr_ratio: float = 0.0
    clip_norm: float | None = 5.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "it must be positive")
        require(len(self.betas) == 2, "optim.betas", self.betas, "give two numbers")
        require(self.schedule in ("cosine", "constant"), "optim.schedule", self.schedule, "choose cosine or constant")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "it must be 0 or more")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            self.clip_norm,
            "positive, or null for none",
        )


@dataclass
class TrainConfig:
    """How long and how. ``batch_size`` is global: the world size divides it, never multiplies it.

    A step takes at least ``accumulation`` micro-batches: more where the ranks, or ``micro_batch`` (the most samples a
    rank takes at once), ask for more. ``precision``: fp32, or bf16 or fp16 by autocast, with parameters, state of the
    scans, reductions and optimizer in fp32; fp16 scales the loss. ``checkpointing``: which activations are computed
    again in the backward pass: none, full (all of every ``checkpointing_every``-th mixer) or selective (all but the
    results of matrix products, convolutions and scans). ``compile``: torch.compile of every mixer.

    After ``max_bad_steps`` steps in a row whose loss or gradient is not finite the run stops. ``spike_factor``: a loss
    above so many times the median of the last ``spike_window`` steps sends the run back to its last checkpoint, and the
    samples since then are left out. ``profile``: FIRST:LAST steps to trace.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 64
    accumulation: int = 1
    micro_batch: int | None = None
    precision: str = "fp32"
    tf32: bool = True
    deterministic: bool = False
    compile: bool = False
    checkpointing: str = "none"
    checkpointing_every: int = 1
    ema_decay: float | None = None
    log_every: int = 20
    gc_every: int = 100
    max_bad_steps: int = 10
    spike_factor: float | None = None
    spike_window: int = 50
    profile: str | None = None

    def __post_init__(self) -> None:
        require(self.epochs > 0, "train.epochs", self.epochs, "it must be positive")
        counts = ("batch_size", "accumulation", "checkpointing_every", "log_every", "gc_every", "max_bad_steps")
        for key in (*counts, "spike_window"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "it must be at least 1")
        for key in ("max_steps", "micro_batch"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"train.{key}", value, "at least 1, or null")
        for key, known in (("precision", ("fp32", "bf16", "fp16")), ("checkpointing", ("none", "full", "selective"))):
            value = getattr(self, key)
            require(value in known, f"train.{key}", value, f"choose one of {', '.join(known)}")
        decay, factor = self.ema_decay, self.spike_factor
        require(decay is None or 0 < decay < 1, "train.ema_decay", decay, "it must be in (0, 1), or null for none")
        require(
            factor is None or factor > 1, "train.spike_factor", factor, "it must be above 1, or null for no rollback"
        )
        if self.profile is not None:
            self.profiled()

    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to trace, counted from 1."""
        if self.profile is None:
            return None
        first, _, last = str(self.profile).partition(":")
        fits = first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first)
        require(fits, "train.profile", self.profile, "give FIRST:LAST steps, such as 10:12")
        return int(first), int(last or first)


@dataclass
class EvalConfig:
    """``every_steps`` wins over ``every_epochs``. ``select``: which checkpoint is tested at the end, best or last."""

    every_epochs: float = 1.0
    every_steps: int | None = None
    batch_size: int = 256
    select: str = "best"
    patience: int | None = None

    def __post_init__(self) -> None:
        require(self.every_epochs > 0, "eval.every_epochs", self.every_epochs, "it must be positive")
        require(self.every_steps is None or self.every_steps >= 1, "eval.every_steps", self.every_steps, "at least 1")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "it must be at least 1")
        require(self.select in ("best", "last"), "eval.select", self.select, "choose best or last")
        require(self.patience is None or self.patience >= 1, "eval.patience", self.patience, "at least 1, or null")


@dataclass
class CheckpointConfig:
    """A checkpoint at every evaluation, and between them each ``every_steps`` and ``every_minutes``.

    The newest ``keep``, the best, and those of every ``keep_every``-th step stay. ``asynchronous``: training goes on
    while a checkpoint is written.
    """

    every_steps: int | None = None
    every_minutes: float = 10.0
    keep: int = 2
    keep_every: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        require(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")
        for key in ("every_steps", "keep_every"):
            every = getattr(self, key)
            require(every is None or every >= 1, f"checkpoint.{key}", every, "at least 1, or null")
        require(self.every_minutes > 0, "checkpoint.every_minutes", self.every_minutes, "it must be positive")


@dataclass
class TrackingConfig:
    """JSON lines and curves always; ``wandb``: disabled, offline or online (the key comes from the environment).

    ``group``: of the runs in W&B (default: the name of the run). ``tensorboard``: event files in the run folder.

    ``samples`` writes the index of every sample consumed, a line a step and rank, to ``samples/`` in the run folder.
    """

    wandb: str = "disabled"
    project: str = "mmtrain"
    group: str | None = None
    tensorboard: bool = False
    plots: bool = True
    samples: bool = False

    def __post_init__(self) -> None:
        modes = ("disabled", "offline", "online")
        require(self.wandb in modes, "tracking.wandb", self.wandb, f"choose one of {', '.join(modes)}")


@dataclass
class ClusterConfig:
    """The Slurm job. Empty values are left to the site's defaults. ``gpu``: what the plan of the job reckons with.

    ``min_nodes``, ``max_nodes``: let Slurm choose, in place of ``nodes``. ``tasks_per_node``: one a GPU, or one a node
    without GPUs. ``margin``: so many seconds before the time limit the run saves and asks for another job; the signal
    that announces it, and a preemption, is ``signal``. ``max_timeouts``: so often it may come back from a time limit
    (null: without end; a preemption does not count). ``max_losses``: so often in a row it may come back after a lost
    node or rank without a new checkpoint. ``check_ranks``: see before the first step that the nodes can work together;
    ``replace_nodes``: where some cannot, come back without them.
    """

    nodes: int = 1
    min_nodes: int | None = None
    max_nodes: int | None = None
    gpus_per_node: int = 8
    tasks_per_node: int | None = None
    gpu: str = "h100"
    cpus_per_task: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    signal: str = "USR2"
    margin: int = 120
    max_timeouts: int | None = None
    max_losses: int = 3
    check_ranks: bool = True
    replace_nodes: bool = False

    def __post_init__(self) -> None:
        require(self.signal in ("USR2", "TERM"), "cluster.signal", self.signal, "USR2 or TERM")
        require(self.margin >= 0, "cluster.margin", self.margin, "seconds before the time limit, 0 or more")
        require(self.max_losses >= 0, "cluster.max_losses", self.max_losses, "0 or more")
        pair = (self.min_nodes, self.max_nodes)
        require(
            pair == (None, None) or (None not in pair and 1 <= self.min_nodes <= self.max_nodes),  # type: ignore[operator]
            "cluster.min_nodes",
            self.min_nodes,
            "give min_nodes and max_nodes together, the first not above the second",
        )
        tasks = self.tasks_per_node
        fits = tasks is None or (tasks == self.gpus_per_node if self.gpus_per_node else tasks >= 1)
        require(fits, "cluster.tasks_per_node", tasks, "one task a GPU; with gpus_per_node=0 any number")
        require(self.nodes >= 1, "cluster.nodes", self.nodes, "it must be at least 1")
        require(self.gpus_per_node >= 0, "cluster.gpus_per_node", self.gpus_per_node, "0 (CPU only) or more")

    @property
    def tasks(self) -> int:
        """Ranks on a node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def node_range(self) -> str:
        """The number of nodes as sbatch takes it, such as 4 or 2-4."""
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}-{self.max_nodes}"


@dataclass
class RunConfig:
    """A whole run. The run folder is ``run_root``/``name`` unless the command line names another."""

    name: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    run_root: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        devices = ("auto", "cpu", "cuda")
        require(self.device in devices, "device", self.device, f"choose one of {', '.join(devices)}")
        require(
            self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null for torch's own"
        )


#: Keys that may differ when a run is continued in its folder: they do not change what is learnt.
FREE_ON_RESUME = (
    "device",
    "threads",
    "run_root",
    "cluster",
    "parallel",
    "tracking",
    "checkpoint",
    "data.workers",
    "data.os_cache",
    "data.root",
    "train.log_every",
    "train.accumulation",
    "train.micro_batch",
    "train.compile",
    "train.checkpointing",
    "train.checkpointing_every",
    "train.gc_every",
    "train.profile",
    "eval.batch_size",
)
