"""The typed schema of a run. Lengths are in epochs or steps of the *global* batch, never per rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.data import DataConfig
from mmtrain.config.models import ModelConfig, require


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
    """How long and how. ``batch_size`` is global: the world size divides it, never multiplies it."""

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 64
    accumulation: int = 1
    precision: str = "fp32"
    ema_decay: float | None = None
    log_every: int = 20
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        require(self.epochs > 0, "train.epochs", self.epochs, "it must be positive")
        for key in ("batch_size", "accumulation", "log_every", "max_bad_steps"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "it must be at least 1")
        require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "at least 1, or null")
        require(self.precision in ("fp32", "bf16"), "train.precision", self.precision, "choose fp32 or bf16")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "train.ema_decay", decay, "it must be in (0, 1), or null for none")


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

    The newest ``keep`` and the best stay.
    """

    every_steps: int | None = None
    every_minutes: float = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        require(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")
        every = self.every_steps
        require(every is None or every >= 1, "checkpoint.every_steps", every, "at least 1, or null")
        require(self.every_minutes > 0, "checkpoint.every_minutes", self.every_minutes, "it must be positive")


@dataclass
class TrackingConfig:
    """JSON lines and curves always; ``wandb``: disabled, offline or online (the key comes from the environment)."""

    wandb: str = "disabled"
    project: str = "mmtrain"
    plots: bool = True

    def __post_init__(self) -> None:
        modes = ("disabled", "offline", "online")
        require(self.wandb in modes, "tracking.wandb", self.wandb, f"choose one of {', '.join(modes)}")


@dataclass
class ClusterConfig:
    """The Slurm job. Empty values are left to the site's defaults."""

    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "cluster.nodes", self.nodes, "it must be at least 1")
        require(self.gpus_per_node >= 0, "cluster.gpus_per_node", self.gpus_per_node, "0 (CPU only) or more")


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
    "tracking",
    "checkpoint",
    "data.workers",
    "data.root",
    "train.log_every",
    "train.accumulation",
    "eval.batch_size",
)
