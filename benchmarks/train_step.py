"""Print the samples per second of forward and backward passes of a configuration's model on random input.

python benchmarks/train_step.py --config tsm2_etth1 --threads 2
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

from mmtrain.config import TSM2Config, ViM2Config, load_config
from mmtrain.config.data import ImageDataConfig
from mmtrain.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=15, help="timed steps, after three warm-up steps")
    parser.add_argument("--variates", type=int, default=7, help="variates of a forecaster's input")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = load_config(given.config, given.overrides)
    model, batch = build_model(config.model).train(), config.train.batch_size
    if isinstance(config.model, ViM2Config):
        assert isinstance(config.data, ImageDataConfig)
        x = torch.randn(batch, config.model.in_channels, config.data.image_size, config.data.image_size)
    else:
        assert isinstance(config.model, TSM2Config)
        x = torch.randn(batch, config.model.lookback, given.variates)
    times = []
    for _ in range(3 + given.steps):
        begin = time.perf_counter()
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
    times = sorted(times[3:])
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{platform.processor() or platform.machine()}, {given.threads} threads, torch {torch.__version__}")
    print(f"{config.name}: {config.model.name}, {parameters:.2f} M parameters, input {tuple(x.shape)}")
    print(
        f"forward + backward: median {batch / statistics.median(times):.0f} samples/s"
        f" (slowest {batch / times[-1]:.0f}, fastest {batch / times[0]:.0f}; {statistics.median(times):.3f} s per step)"
    )


if __name__ == "__main__":
    main()
