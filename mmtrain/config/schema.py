"""The typed schema of a run. Lengths are in epochs or steps of the *global* batch, never per rank."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from mmtrain.config.data import DATA, DataConfig
from mmtrain.config.models import MODELS, ModelConfig
from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, require

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


class ParallelConfig(Section):
    """How a run is spread over processes. Nothing here changes what is learnt, beyond floating-point order."""

    prefix: ClassVar[str] = "parallel."
    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"] = Field(
        "auto", description="What is split over the ranks; auto: none in one process, ddp in several."
    )
    shard_size: int | None = Field(
        None, ge=1, description="hsdp: ranks that share one copy of the model; null: the ranks of a node."
    )
    reshard_after_forward: bool = Field(
        True, description="fsdp, hsdp: free the parameters after the forward pass and gather them again for backward."
    )
    gather: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="fsdp, hsdp: the dtype in which parameters are gathered. With bf16, A_log, D, the bias of Δ, norms"
        " and averages still go as fp32.",
    )
    offload: bool = Field(False, description="zero1, zero2, zero3: optimizer state and updates on the CPU.")
    start_timeout: float = Field(
        1800.0,
        gt=0,
        description="Seconds a rank may stay away before the first step is done, while data opens and kernels compile."
        " Then the run ends with the names of the missing ranks.",
    )
    step_timeout: float = Field(600.0, gt=0, description="The same, after the first step.")

    @model_validator(mode="after")
    def _offloads(self) -> Self:
        fits = not self.offload or self.strategy.startswith("zero")
        require(fits, "parallel.offload", True, "only zero1, zero2 and zero3 offload; use one of them or false")
        return self


class TaskConfig(Section):
    """The keys that every task has."""

    prefix: ClassVar[str] = "task."
    kind: str = Field("", description="The task, where model, loss, metrics and data meet.")


TASKS: Registry[TaskConfig] = Registry("task", "kind", TaskConfig, "mmtrain.tasks")


@TASKS.section("classification")
class ClassificationConfig(TaskConfig):
    """Cross-entropy over classes, with label smoothing and timm's Mixup and CutMix."""

    kind: str = "classification"
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="The part of a target that all classes share.")
    mixup: float = Field(0.0, ge=0, description="Alpha of Mixup; 0: off.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of CutMix; 0: off.")
    mix_prob: float = Field(1.0, ge=0, description="Probability that a batch is mixed.")


@TASKS.section("forecasting")
class ForecastingConfig(TaskConfig):
    """MSE or MAE on the standardised values; both are reported, over every window."""

    kind: str = "forecasting"
    loss: Literal["mse", "mae"] = Field("mse", description="The loss of the point forecast.")
    spread_weight: float = Field(
        1.0, gt=0, description="Weight of the pinball loss or the negative log-likelihood, where the model gives one."
    )


class OptimConfig(Section):
    """AdamW with linear warm-up, then a schedule."""

    prefix: ClassVar[str] = "optim."
    lr: float = Field(1e-3, gt=0, description="Learning rate after the warm-up.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Decay of the running mean and of the mean square."
    )
    eps: float = Field(1e-8, ge=0, description="Added to the denominator.")
    weight_decay: float = Field(0.05, ge=0, description="Decoupled weight decay.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="The learning rate after the warm-up.")
    min_lr_ratio: float = Field(0.0, ge=0, description="Cosine: the last learning rate over lr.")
    clip_norm: float | None = Field(5.0, gt=0, description="Largest norm of the gradient; null: not clipped.")


class TrainConfig(Section):
    """How long to train, and how a step is taken."""

    prefix: ClassVar[str] = "train."
    epochs: float = Field(1.0, gt=0, description="Length of the run.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, if epochs are not over before.")
    batch_size: int = Field(
        64,
        ge=1,
        le=2**24,
        description="Samples of a step over all ranks: the world size divides it, never multiplies it.",
    )
    accumulation: int = Field(
        1, ge=1, description="Micro-batches of a step, at least; more where the ranks or micro_batch ask for more."
    )
    micro_batch: int | None = Field(None, ge=1, description="The most samples that a rank takes at once.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16 and fp16 are by autocast, with parameters, state of the scans, reductions and optimizer in"
        " fp32; fp16 scales the loss.",
    )
    tf32: bool = Field(True, description="TF32 for products of fp32 matrices on GPUs.")
    deterministic: bool = Field(False, description="Deterministic algorithms only.")
    compile: bool = Field(False, description="torch.compile of every mixer.")
    checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="Activations computed again in the backward pass: none, all (full), or all except the results of"
        " matrix products, convolutions and scans (selective).",
    )
    checkpointing_every: int = Field(1, ge=1, description="full: in every n-th mixer only.")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Evaluate an average of the weights; null: none.")
    log_every: int = Field(20, ge=1, description="Steps from one line of metrics to the next.")
    gc_every: int = Field(100, ge=1, description="Steps from one garbage collection to the next.")
    max_bad_steps: int = Field(
        10, ge=1, description="Stop after so many steps in a row whose loss or gradient is not finite."
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="A loss above so many times the median of the last spike_window steps sends the run back to its"
        " last checkpoint, and the samples since then are left out; null: no rollback.",
    )
    spike_window: int = Field(50, ge=1, description="Steps of the median for spike_factor.")
    profile: str | None = Field(None, description="FIRST:LAST steps to trace, such as 10:12.")

    @field_validator("profile")
    @classmethod
    def _is_a_range(cls, profile: str | None) -> str | None:
        if profile is not None:
            first, _, last = profile.partition(":")
            fits = first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first)
            require(fits, "train.profile", profile, "give FIRST:LAST steps, such as 10:12")
        return profile

    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to trace, counted from 1."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        return int(first), int(last or first)


class EvalConfig(Section):
    """When the model is evaluated, and which checkpoint is kept as the best."""

    prefix: ClassVar[str] = "eval."
    every_epochs: float = Field(1.0, gt=0, description="Epochs from one evaluation to the next.")
    every_steps: int | None = Field(None, ge=1, description="The same in steps; wins over every_epochs.")
    batch_size: int = Field(256, ge=1, description="Samples of an evaluation batch.")
    select: Literal["best", "last"] = Field(
        "best", description="The checkpoint that is tested at the end, and that eval, predict and export use."
    )
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without a better one.")


class CheckpointConfig(Section):
    """A checkpoint at every evaluation, and between them by steps and by minutes."""

    prefix: ClassVar[str] = "checkpoint."
    every_steps: int | None = Field(None, ge=1, description="Steps from one checkpoint to the next.")
    every_minutes: float = Field(10.0, gt=0, description="Minutes from one checkpoint to the next.")
    keep: int = Field(2, ge=1, description="Keep the newest so many, beside the best.")
    keep_every: int | None = Field(None, ge=1, description="Keep those of every n-th step, too.")
    asynchronous: bool = Field(True, description="Train while a checkpoint is written.")


class TrackingConfig(Section):
    """Records beside the JSON lines of metrics, which are always written."""

    prefix: ClassVar[str] = "tracking."
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="Weights & Biases; the key comes from the environment."
    )
    project: str = Field("mmtrain", description="The project in W&B.")
    group: str | None = Field(None, description="The group of runs in W&B; null: the name of the run.")
    tensorboard: bool = Field(False, description="Event files in the run folder.")
    plots: bool = Field(True, description="Curves and pictures in the run folder.")
    samples: bool = Field(
        False, description="Write the index of every sample consumed to `samples/`, a line for each step and rank."
    )


class ClusterConfig(Section):
    """The Slurm job. Empty values are left to the site's defaults."""

    prefix: ClassVar[str] = "cluster."
    nodes: int = Field(1, ge=1, description="Nodes of the job.")
    min_nodes: int | None = Field(None, ge=1, description="Let Slurm choose from min_nodes to max_nodes.")
    max_nodes: int | None = Field(None, ge=1, description="See min_nodes; they replace nodes.")
    gpus_per_node: int = Field(8, ge=0, description="GPUs of a node; 0: CPU only.")
    tasks_per_node: int | None = Field(
        None, ge=1, description="Ranks of a node; null: one for each GPU, or one for a node without GPUs."
    )
    gpu: str = Field("h100", description="The GPU that the plan of the job assumes.")
    cpus_per_task: int = Field(8, ge=1, description="CPU cores of a rank.")
    time: str = Field("24:00:00", description="Time limit of a job, as sbatch takes it.")
    partition: str | None = Field(None, description="Partition.")
    account: str | None = Field(None, description="Account.")
    qos: str | None = Field(None, description="Quality of service.")
    mem: str | None = Field(None, description="Memory of a node, as sbatch takes it.")
    constraint: str | None = Field(None, description="Features that the nodes must have.")
    exclude: str | None = Field(None, description="Nodes to avoid.")
    reservation: str | None = Field(None, description="Reservation.")
    signal: Literal["USR2", "TERM"] = Field("USR2", description="Signal of the time limit and of a preemption.")
    margin: int = Field(
        120, ge=0, description="Seconds before the time limit at which the run saves and asks for another job."
    )
    max_timeouts: int | None = Field(
        None,
        ge=0,
        description="Times the run may come back from a time limit (not a preemption); null: no end.",
    )
    max_losses: int = Field(
        3, ge=0, description="Times in a row it may come back after a lost node or rank without a new checkpoint."
    )
    check_ranks: bool = Field(True, description="Check before the first step that the nodes can work together.")
    replace_nodes: bool = Field(False, description="Where some nodes cannot, come back without them.")

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        low, high = self.min_nodes, self.max_nodes
        fits = low is high is None or (low is not None and high is not None and low <= high)
        cure = "give min_nodes and max_nodes together, the first not above the second"
        require(fits, "cluster.min_nodes", low, cure)
        tasks, gpus = self.tasks_per_node, self.gpus_per_node
        cure = "one task a GPU; with gpus_per_node=0 any number"
        require(tasks is None or not gpus or tasks == gpus, "cluster.tasks_per_node", tasks, cure)
        return self

    @property
    def tasks(self) -> int:
        """Ranks on a node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def node_range(self) -> str:
        """The number of nodes as sbatch takes it, such as 4 or 2-4."""
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}-{self.max_nodes}"


#: Files of a run add a few characters to its name, and file systems take 255 bytes.
_MOST_NAME_BYTES = 200


class RunConfig(Section):
    """A whole run. The run folder is ``run_root``/``name`` unless the command line names another."""

    name: str = Field("", description="Name of the run; by default that of the configuration.")
    seed: int = Field(0, description="Seed of the weights, the data order and all other randomness.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one.")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of a rank; null: torch's own number.")
    run_root: str = Field("runs", description="The folder of the run folders.")
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(MODELS.validate)] = ModelConfig()
    data: Annotated[SerializeAsAny[DataConfig], BeforeValidator(DATA.validate)] = DataConfig()
    task: Annotated[SerializeAsAny[TaskConfig], BeforeValidator(TASKS.validate)] = TaskConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        """A run folder lies below run_root, whatever its name; "" is that of a configuration without a name."""
        parts = name.split("/")
        inside = not name or all(part not in ("", ".", "..") for part in parts)
        short = len(name.encode(errors="replace")) <= _MOST_NAME_BYTES
        cure = f"it names a folder below run_root: at most {_MOST_NAME_BYTES} bytes, and between / neither . nor .."
        require(inside and short, "name", name[:80], cure)
        require(
            name.isprintable() and name == name.strip(), "name", name, "leave out control characters and outer spaces"
        )
        return name


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
    "data.accept_changes",
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
