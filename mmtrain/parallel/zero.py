"""ZeRO-1/2/3 with the DeepSpeed engine, in float32.

The bf16 and fp16 modes of DeepSpeed cast all parameters, including A_log, D and the bias of Δ. Selective scans need
these in float32. The engine therefore runs in float32, and lower precision comes from autocast, as for all strategies.
DeepSpeed's checkpoints load only on the same number of ranks, so they are not used. Complete tensors are gathered one
by one, each is kept by one rank, and they are saved as with any other strategy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmtrain.errors import UserError
from mmtrain.parallel.strategy import (
    AVERAGE,
    MODEL,
    MOMENTS,
    LoadInto,
    StateDict,
    Strategy,
    StrategyOptions,
    sum_of_squares,
)

#: Number of elements in buffers for reducing gradients and gathering weights. DeepSpeed's default is ten times larger:
#: its buffers would take more memory than most mmtrain models.
BUCKET = 50_000_000
#: Number of elements loaded at a time. Every rank reads complete tensors and keeps its shards.
_LOADED_AT_ONCE = 2**26


def require_deepspeed() -> None:
    """Raise UserError unless DeepSpeed is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.strategy: zero1, zero2 and zero3 need DeepSpeed, which is not installed."
            " Run pip install 'mmtrain[deepspeed]', or use parallel.strategy=fsdp"
        )


class ZeroStrategy(Strategy):
    """ZeRO. Stage 1 shards the optimizer state, stage 2 also the gradients, stage 3 also the parameters."""

    saved_in_place = False

    def __init__(self, model: nn.Module, options: StrategyOptions, stage: int) -> None:
        self.model, self.ranks, self.options, self.stage = model, options.ranks, options, stage
        self.collective_forward, self.readable = stage == 3, stage < 3
        model.to_empty(device=options.ranks.device)
        for p in model.parameters():  # the engine copies the values before they are set, so avoid random NaNs
            p.detach().zero_()
        self.engine = _engine(model, options, stage)
        self.runner = self.engine
        self.zero: Any = self.engine.optimizer
        self.optimizer = self.zero.optimizer
        # Set AdamW's state to its initial values. The engine may have taken a step with zero gradients.
        for flat in self._partitions():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        if stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        self._reduction = contextlib.ExitStack()

    def _partitions(self) -> list[Tensor]:
        """Return this rank's flat float32 partition of each parameter group, which the optimizer updates."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    # ------------------------------------------------------------------ a step

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.options.micro_batches > 1 and not self.engine.inside_no_sync_ctxt:
            self._reduction.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if last:
            self._reduction.close()  # reduces, but resets the boundary flag, without which a step does nothing
            self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        if self.options.config.offload:
            return [flat.grad for flat in self._partitions() if flat.grad is not None]
        return [g for group in self.zero.averaged_gradients.values() if group is not None for g in group]

    def gradient_norm(self) -> Tensor:
        total = sum_of_squares(self.gradients(), self.ranks.device).to(self.ranks.device)
        dist.all_reduce(total)
        return total.sqrt()

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()

    def drop_gradients(self) -> None:
        # The engine skips a step whose gradient norm is not finite, and then clears all its buffers.
        gradients = self.gradients()
        for gradient in gradients:
            gradient.fill_(torch.nan)
        self.engine.step()
        for gradient in gradients:  # stage 3 never writes to the padding of its buffers, so NaN would remain there
            gradient.zero_()

    # ------------------------------------------------------------------ state

    @torch.no_grad()
    def set_parameter(self, name: str, value: Tensor) -> None:
        self._set(self.model.get_parameter(name), value, None)

    def local_parameters(self) -> dict[str, Tensor]:
        if self.stage == 3:  # after an evaluation, parameters are still gathered and would ignore changes of shards
            self.zero._partition_all_parameters()
        return {name: _partition(p) for name, p in self.model.named_parameters()}

    def state_dict(self, average: dict[str, Tensor] | None) -> StateDict:
        sections: StateDict = {key: {} for key in _keys(average)}
        for i, (name, p) in enumerate(self.model.named_parameters()):
            for key in sections:
                whole = self._gather(p, key, None if average is None else average[name])
                if i % self.ranks.world == self.ranks.rank:
                    sections[key][name] = whole
        return sections

    @torch.no_grad()
    def load(self, load_into: LoadInto, updates: int, average: dict[str, Tensor] | None) -> None:
        for some in _chunks(self.model):
            shapes = {name: _shape(p) for name, p in some.items()}
            sections: StateDict = {
                key: {name: torch.empty(shape) for name, shape in shapes.items()} for key in _keys(average)
            }
            load_into(sections)
            for name, p in some.items():
                self._set(p, sections[MODEL][name], None)
                for key in MOMENTS:
                    self._set(p, sections[key][name], key)
                if average is not None:
                    self._fill_partition(average[name], sections[AVERAGE][name])
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)

    def _set(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set a parameter (``key`` None), or the moment ``key`` of it, from the complete tensor ``value``."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            shard = self._fill_partition(torch.empty_like(_partition(p)), value)
            self.zero.set_local_hp_param(shard, p, key)
            if key is None:
                _partition(p).copy_(shard)
            return
        value = value.to(p.device)
        if key is None:
            p.copy_(value)
            safe_set_full_fp32_param(p, value)
        else:
            safe_set_full_optimizer_state(p, value, key)

    def _fill_partition(self, shard: Tensor, value: Tensor) -> Tensor:
        """Copy this rank's elements of the complete tensor ``value`` into ``shard``. Stage 3 pads with zeros."""
        if self.stage < 3:
            return shard.copy_(value.view(shard.shape))
        begin = self.ranks.rank * shard.numel()
        elements = value.flatten()[begin : begin + shard.numel()]
        shard.zero_()[: elements.numel()].copy_(elements)
        return shard

    def _gather(self, p: nn.Parameter, key: str, average: Tensor | None) -> Tensor:
        """Gather the section ``key`` of parameter ``p`` (weight, moment or average) from all ranks, on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage < 3:
            if key in MOMENTS:
                return safe_get_full_optimizer_state(p, key).cpu()
            return (p.detach() if key == MODEL else average).cpu()  # type: ignore[union-attr]
        shard = {MODEL: _partition(p), AVERAGE: average}.get(key)
        if shard is None:
            shard = self.zero.get_local_fp32_param(p, key)
        shard = shard.detach().contiguous()
        gathered = shard.new_empty(self.ranks.world * shard.numel())
        dist.all_gather_single(gathered, shard)
        return gathered[: p.ds_numel].view(p.ds_shape).cpu()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.engine.destroy()


def _keys(average: dict[str, Tensor] | None) -> tuple[str, ...]:
    """Return the sections of the state dict."""
    return (MODEL, *MOMENTS, *([AVERAGE] if average is not None else []))


def _partition(p: nn.Parameter) -> Tensor:
    """Return this rank's data of a parameter: a flat shard under stage 3, otherwise the complete tensor."""
    return p.ds_tensor if hasattr(p, "ds_tensor") else p.detach()


def _shape(p: nn.Parameter) -> torch.Size:
    """Return the shape of the complete parameter."""
    return p.ds_shape if hasattr(p, "ds_shape") else p.shape


def _chunks(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters in groups of about ``_LOADED_AT_ONCE`` elements."""
    some: dict[str, nn.Parameter] = {}
    size = 0
    for name, p in model.named_parameters():
        some[name] = p
        size += _shape(p).numel()
        if size > _LOADED_AT_ONCE:
            yield some
            some, size = {}, 0
    if some:
        yield some


def _engine(model: nn.Module, options: StrategyOptions, stage: int) -> Any:
    """Build the DeepSpeed engine for ``stage``."""
    if options.ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    # Disable DeepSpeed's operators: compiling its shared-memory collectives takes a minute, and they are not used.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": options.ranks.device.type == "cuda",
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if stage == 3:
        # Shard all parameters, even small ones, so that averaged weights are sharded in the same way.
        zero["stage3_param_persistence_threshold"] = 0
        if options.config.reshard_after_forward:
            zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    if options.config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": options.ranks.device.type == "cuda"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # the trainer clips; DeepSpeed's default is 1
        "steps_per_print": 10**9,
    }
    if options.autocast is not None:
        # With an empty list, all parameters are gathered and reduced in float32.
        name = str(options.autocast).removeprefix("torch.")
        settings["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    engine, *_ = deepspeed.initialize(model=model, optimizer=options.make_optimizer(model), config=settings)
    return engine
