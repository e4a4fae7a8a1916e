"""The typed schema of a run. Durations are epochs or steps of the *global* batch, independent of the world size."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from mmtrain.config.data import DATA, DataConfig
from mmtrain.config.models import MODELS, ModelConfig
from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, require

#: Every strategy and a short description of it.
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
    """Distribution of a run over processes. Results change only by the order of floating-point operations."""

    prefix: ClassVar[str] = "parallel."
    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"] = Field(
        "auto", description="Distribution of the model over the ranks. auto: none for one process, ddp for several."
    )
    shard_size: int | None = Field(
        None, ge=1, description="hsdp: number of ranks that share one copy of the model; null: the ranks of one node."
    )
    reshard_after_forward: bool = Field(
        True, description="fsdp, hsdp: free the parameters after the forward pass and gather them again for backward."
    )
    gather: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="fsdp, hsdp: dtype in which parameters are gathered. With bf16, A_log, D, the bias of Δ, norms and"
        " averaging weights are still gathered as fp32.",
    )
    offload: bool = Field(
        False, description="zero1, zero2, zero3: keep the optimizer state on the CPU and update there."
    )
    start_timeout: float = Field(
        1800.0,
        gt=0,
        description="Seconds to wait for an unresponsive rank until the end of the first step, while data opens and"
        " kernels compile. After that the run stops and lists the missing ranks.",
    )
    step_timeout: float = Field(
        600.0, gt=0, description="Seconds to wait for an unresponsive rank after the first step."
    )

    @model_validator(mode="after")
    def _offloads(self) -> Self:
        fits = not self.offload or self.strategy.startswith("zero")
        cure = "only supported with parallel.strategy=zero1, zero2 or zero3; use one of them, or false"
        require(fits, "parallel.offload", True, cure)
        return self


class TaskConfig(Section):
    """Keys of every task."""

    prefix: ClassVar[str] = "task."
    kind: str = Field("", description="The task. It defines the loss and the metrics.")


TASKS: Registry[TaskConfig] = Registry("task", "kind", TaskConfig, "mmtrain.tasks")


@TASKS.section("classification")
class ClassificationConfig(TaskConfig):
    """Cross-entropy over classes, with label smoothing and timm's Mixup and CutMix."""

    kind: str = "classification"
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="Fraction of the target probability that is spread evenly over all classes."
    )
    mixup: float = Field(0.0, ge=0, description="Alpha of Mixup; 0: off.")
    cutmix: float = Field(0.0, ge=0, description="Alpha of CutMix; 0: off.")
    mix_prob: float = Field(1.0, ge=0, description="Probability that a batch is mixed.")


@TASKS.section("forecasting")
class ForecastingConfig(TaskConfig):
    """MSE or MAE loss on standardised values. Evaluation reports both metrics, over all windows."""

    kind: str = "forecasting"
    loss: Literal["mse", "mae"] = Field("mse", description="The loss of the point forecast.")
    spread_weight: float = Field(
        1.0,
        gt=0,
        description="Weight of the pinball loss (model.output=quantiles) or negative log-likelihood (student_t).",
    )


class OptimConfig(Section):
    """AdamW with a linear warm-up, followed by a learning-rate schedule."""

    prefix: ClassVar[str] = "optim."
    lr: float = Field(1e-3, gt=0, description="Learning rate after the warm-up.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999],
        min_length=2,
        max_length=2,
        description="Decay rates of the averages of the gradient and its square.",
    )
    eps: float = Field(1e-8, ge=0, description="Added to the denominator of AdamW.")
    weight_decay: float = Field(0.05, ge=0, description="Decoupled weight decay.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Schedule of the learning rate after warm-up."
    )
    min_lr_ratio: float = Field(0.0, ge=0, description="Cosine: final learning rate as a fraction of lr.")
    clip_norm: float | None = Field(5.0, gt=0, description="Maximum norm of the gradient; null: no clipping.")


class TrainConfig(Section):
    """Length of the training, and settings of the training step."""

    prefix: ClassVar[str] = "train."
    epochs: float = Field(1.0, gt=0, description="Length of the run in epochs, which may be fractional.")
    max_steps: int | None = Field(
        None, ge=1, description="Maximum number of steps; the run ends at this or at epochs, whichever comes first."
    )
    batch_size: int = Field(
        64,
        ge=1,
        le=2**24,
        description="Global batch size: samples of a step over all ranks. It does not grow with the world size.",
    )
    accumulation: int = Field(
        1,
        ge=1,
        description="Minimum number of micro-batches per step; raised if the world size or micro_batch requires more.",
    )
    micro_batch: int | None = Field(None, ge=1, description="Maximum number of samples in a micro-batch.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Precision of the computation. bf16 and fp16 use autocast; parameters, states of the scans,"
        " reductions and the optimizer stay in fp32. fp16 also scales the loss.",
    )
    tf32: bool = Field(True, description="Use TF32 for fp32 matrix products on GPUs.")
    deterministic: bool = Field(False, description="Use deterministic algorithms only.")
    compile: bool = Field(False, description="Compile every mixer with torch.compile.")
    checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="Activations recomputed in the backward pass: none, all (full), or all except the results of"
        " matrix products, convolutions and scans (selective).",
    )
    checkpointing_every: int = Field(1, ge=1, description="full: recompute only every n-th mixer.")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the exponential average of the weights used to evaluate; null: no average.",
    )
    log_every: int = Field(20, ge=1, description="Steps between two lines of metrics.")
    gc_every: int = Field(100, ge=1, description="Steps between two garbage collections.")
    max_bad_steps: int = Field(
        10, ge=1, description="Stop after this many consecutive steps with a loss or gradient that is not finite."
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="Roll back to the newest checkpoint when the loss exceeds this multiple of the median of the last"
        " spike_window steps; the samples since that checkpoint are skipped. null: no rollback.",
    )
    spike_window: int = Field(50, ge=1, description="Number of steps in the median of spike_factor.")
    profile: str | None = Field(None, description="Steps to trace with the profiler: FIRST:LAST, such as 10:12.")

    @field_validator("profile")
    @classmethod
    def _is_a_range(cls, profile: str | None) -> str | None:
        if profile is not None:
            first, _, last = profile.partition(":")
            fits = first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first)
            require(fits, "train.profile", profile, "give FIRST:LAST steps, such as 10:12")
        return profile

    def profiled(self) -> tuple[int, int] | None:
        """Return the first and the last step to trace, counted from 1, or None."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        return int(first), int(last or first)


class EvalConfig(Section):
    """Interval between evaluations, and choice of the selected checkpoint."""

    prefix: ClassVar[str] = "eval."
    every_epochs: float = Field(1.0, gt=0, description="Epochs between two evaluations.")
    every_steps: int | None = Field(None, ge=1, description="Steps between two evaluations; overrides every_epochs.")
    batch_size: int = Field(256, ge=1, description="Samples in an evaluation batch.")
    select: Literal["best", "last"] = Field(
        "best",
        description="The selected checkpoint: tested at the end of the run, and used by eval, predict and export.",
    )
    patience: int | None = Field(
        None, ge=1, description="Stop early after this many consecutive evaluations without improvement."
    )


class CheckpointConfig(Section):
    """Saving of checkpoints: at every evaluation, and also at the intervals set here."""

    prefix: ClassVar[str] = "checkpoint."
    every_steps: int | None = Field(None, ge=1, description="Steps between two checkpoints.")
    every_minutes: float = Field(10.0, gt=0, description="Minutes between two checkpoints.")
    keep: int = Field(2, ge=1, description="Number of newest checkpoints to keep, in addition to the best.")
    keep_every: int | None = Field(None, ge=1, description="Also keep the checkpoints at multiples of this step.")
    asynchronous: bool = Field(True, description="Write checkpoints in the background while training continues.")


class TrackingConfig(Section):
    """Records of a run in addition to ``metrics.jsonl``, which is always written."""

    prefix: ClassVar[str] = "tracking."
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="Weights & Biases mode; the API key is read from the environment (WANDB_API_KEY)."
    )
    project: str = Field("mmtrain", description="W&B project.")
    group: str | None = Field(None, description="W&B group; null: the name of the run.")
    tensorboard: bool = Field(False, description="Write TensorBoard event files to the run folder.")
    plots: bool = Field(True, description="Write plots to the run folder.")
    samples: bool = Field(
        False,
        description="Write the index of every sample consumed to the folder `samples/`, one line per step and rank.",
    )


class ClusterConfig(Section):
    """Resources of the Slurm job. Options that are null are left to the defaults of the cluster."""

    prefix: ClassVar[str] = "cluster."
    nodes: int = Field(1, ge=1, description="Number of nodes of the job.")
    min_nodes: int | None = Field(
        None, ge=1, description="Minimum number of nodes. Slurm chooses a number from min_nodes to max_nodes."
    )
    max_nodes: int | None = Field(None, ge=1, description="Maximum number of nodes. Both together replace nodes.")
    gpus_per_node: int = Field(8, ge=0, description="GPUs per node; 0: CPU only.")
    tasks_per_node: int | None = Field(
        None, ge=1, description="Ranks per node; null: one per GPU, or one on a node without GPUs."
    )
    gpu: str = Field("h100", description="GPU model for which the plan is computed.")
    cpus_per_task: int = Field(8, ge=1, description="CPU cores per rank.")
    time: str = Field("24:00:00", description="Time limit of a job, in the format of sbatch --time.")
    partition: str | None = Field(None, description="Slurm partition.")
    account: str | None = Field(None, description="Slurm account that is charged.")
    qos: str | None = Field(None, description="Slurm quality of service.")
    mem: str | None = Field(None, description="Memory per node, in the format of sbatch --mem.")
    constraint: str | None = Field(None, description="Features that the nodes must have.")
    exclude: str | None = Field(None, description="Nodes to exclude from the job.")
    reservation: str | None = Field(None, description="Slurm reservation.")
    signal: Literal["USR2", "TERM"] = Field("USR2", description="Signal that announces the time limit or a preemption.")
    margin: int = Field(
        120, ge=0, description="Seconds before the time limit at which the run saves a checkpoint and is requeued."
    )
    max_timeouts: int | None = Field(
        None,
        ge=0,
        description="Maximum number of requeues after a time limit (preemptions do not count); null: unlimited.",
    )
    max_losses: int = Field(
        3,
        ge=0,
        description="Maximum number of consecutive requeues after a lost node or rank without a new checkpoint.",
    )
    check_ranks: bool = Field(
        True, description="Check the GPUs, shared storage, clocks and communication of all nodes before the first step."
    )
    replace_nodes: bool = Field(False, description="Requeue without the nodes that fail this check (check_ranks).")

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        low, high = self.min_nodes, self.max_nodes
        fits = low is high is None or (low is not None and high is not None and low <= high)
        cure = "set both min_nodes and max_nodes, with min_nodes <= max_nodes"
        require(fits, "cluster.min_nodes", low, cure)
        tasks, gpus = self.tasks_per_node, self.gpus_per_node
        cure = f"must equal cluster.gpus_per_node ({gpus}), one rank per GPU, unless gpus_per_node is 0"
        require(tasks is None or not gpus or tasks == gpus, "cluster.tasks_per_node", tasks, cure)
        return self

    @property
    def tasks(self) -> int:
        """Number of ranks per node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def node_range(self) -> str:
        """Number of nodes in the format of sbatch, such as "4" or "2-4"."""
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}-{self.max_nodes}"


#: File systems allow names of 255 bytes, and some file names are the name of the run with a suffix.
_MOST_NAME_BYTES = 200


class RunConfig(Section):
    """Configuration of a run. The run folder is ``run_root``/``name`` unless the command line gives another."""

    name: str = Field("", description="Name of the run; default: the name of the configuration.")
    seed: int = Field(0, description="Seed of the initial weights, the data order and all other randomness.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device. auto: cuda if available, else cpu.")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads per rank; null: torch's default.")
    run_root: str = Field("runs", description="Folder that contains the run folders.")
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
        """Refuse a name that leads out of run_root or is too long. "" is allowed: no name was given."""
        parts = name.split("/")
        inside = not name or all(part not in ("", ".", "..") for part in parts)
        short = len(name.encode(errors="replace")) <= _MOST_NAME_BYTES
        cure = f"must name a folder below run_root: at most {_MOST_NAME_BYTES} bytes, without empty, . or .. components"
        require(inside and short, "name", name[:80], cure)
        cure = "remove control characters and leading or trailing spaces"
        require(name.isprintable() and name == name.strip(), "name", name, cure)
        return name


#: Keys that may change when a run is resumed: they do not affect the result of the training.
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
