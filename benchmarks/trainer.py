"""Measure the trainer and compare it with its targets: overhead, asynchronous saves, FSDP2 against DDP, restart.

    python benchmarks/trainer.py [--only overhead,async,fsdp,restart] [--json FILE] [--smoke]

Run it on an idle machine: the figures are medians of ratios of successive measurements, but a changing load still
increases their spread (the quartiles are printed). A missed target is reported but does not change the exit status,
which is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from trainer_parts import overhead, restart, saving, sharding
from trainer_parts.figure import Figure, measure_parts


def parts(given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Iterator[Figure]]]:
    """Return the measurements by name. Each one starts when it is called."""
    smoke = given.smoke
    model = "vim2_nano" if smoke else "vim2_base"
    small = ["data.image_size=32"] + (["model.name=vim2_nano", "train.precision=fp32"] if smoke else [])
    size, batches = (32, [2]) if smoke else (given.fsdp_image_size, given.fsdp_batch)
    return {
        "overhead": lambda: overhead.measure(folder / "overhead", pairs=2 if smoke else given.pairs, tiny=smoke),
        "async": lambda: saving.measure(
            folder / "async", model=model, repeats=2 if smoke else given.saves, image_size=32 if smoke else 64
        ),
        "fsdp": lambda: sharding.measure(
            model=model,
            image_size=size,
            batches=batches,
            pairs=2 if smoke else given.fsdp_pairs,
            steps=2 if smoke else 4,
        ),
        "restart": lambda: restart.measure(
            folder / "restart",
            config="vim2_small_in1k",
            overrides=small,
            repeats=1 if smoke else given.restarts,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="parts to measure, separated by commas: overhead, async, fsdp, restart")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as JSON")
    parser.add_argument(
        "--smoke", action="store_true", help="use tiny sizes to check that it runs; the figures have no meaning"
    )
    parser.add_argument("--threads", type=int, help="threads of the parts in one process (default: torch's default)")
    parser.add_argument("--pairs", type=int, default=20, help="overhead: pairs of blocks of 20 steps")
    parser.add_argument("--saves", type=int, default=5, help="async: pairs of saves")
    parser.add_argument("--fsdp-pairs", type=int, default=6, help="fsdp: pairs of steps")
    parser.add_argument("--fsdp-image-size", type=int, default=224)
    parser.add_argument("--fsdp-batch", type=int, nargs="+", default=[8, 4], help="fsdp: global batches, for two ranks")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for runs and checkpoints (default: a temporary one)")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    measure_parts(parser, given, lambda folder: parts(given, folder), "Trainer and its targets", given.folder)


if __name__ == "__main__":
    main()
