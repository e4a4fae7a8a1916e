"""What ``mmtrain eval`` does."""

from __future__ import annotations

from mmtrain.errors import UserError


def evaluate_run(run: str, split: str, checkpoint: str, overrides: list[str]) -> dict[str, float]:
    """The metrics of a trained run on ``split``, with the run's configuration and ``overrides`` of its data."""
    import torch

    from mmtrain.config import load_config
    from mmtrain.inference import load_trained
    from mmtrain.parallel.ranks import Ranks
    from mmtrain.tasks import build_task
    from mmtrain.train.evaluate import evaluate

    trained = load_trained(run, checkpoint)
    changed = [item for item in overrides if not item.startswith(("data.", "eval.", "device", "threads"))]
    if changed:
        raise UserError(f"eval takes overrides of data, eval, device and threads only, not {', '.join(changed)}")
    config = load_config(trained.folder / "config.yaml", overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = build_task(config)
    sources = {"train": task.train, "val": task.val, "test": task.test}
    source = sources.get(split)
    if source is None:
        there = ", ".join(name for name, found in sources.items() if found is not None)
        raise UserError(f"--split {split}: this run has no such split (it has {there})")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if split == "train":
        raise UserError("--split train: training samples are augmented; give val or test")
    found = evaluate(task, trained.model.to(device), source, config, Ranks(0, 1, device))
    assert found is not None  # nobody asks it to stop
    return found
