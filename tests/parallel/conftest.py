"""The runs of the matrix, and the configurations that they are variants of."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.config import load_config
from tests.parallel.cases import HALF, STEPS, Case
from tests.parallel.runs import Runs

# Everything random is on. The gradient is clipped at every step (a test asserts it). A run ends with its last weights.
#
# eps: some gradients are zero but for rounding (what only scales the input of a norm, such as the first average of a
# stack, and most of what the seldom-seen inputs reach); AdamW with its usual 1e-8 turns that noise, of 1e-9 and less,
# into steps of the size of the learning rate. With 1e-6, still far below the gradients that count, it stays noise.
_COMMON = f"""
optim: {{lr: 3.0e-3, weight_decay: 0.05, warmup_epochs: 0.1, clip_norm: CLIP, eps: 1.0e-6}}
train: {{epochs: 4, max_steps: {STEPS}, batch_size: 32, ema_decay: 0.9, log_every: 1}}
eval: {{every_steps: {HALF}, select: last}}
checkpoint: {{keep: 9}}
tracking: {{plots: false}}
threads: 1
"""
_VIM2 = """
model: {name: vim2_nano, num_classes: 10, dims: [8, 16], token_mixers: [2, 2], channel_expand: [2, 1], patch_size: 4,
        drop_path: 0.2}
task: {kind: classification, mixup: 0.2, cutmix: 0.5}
"""
_TSM2 = """
model: {name: tsm2, lookback: 48, horizon: 24, dim: 8, depth: 1, dropout: 0.2, linear_path: true}
task: {kind: forecasting}
"""


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, digits: Path, waves: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """The runs of this session; those that the selected tests ask for by a parameter ``case`` begin at once."""
    folder = tmp_path_factory.mktemp("runs")
    images = f"data: {{kind: shards, root: {digits}, image_size: 16, augment: light}}"
    texts = {
        "vim2": _VIM2 + images + _COMMON.replace("CLIP", "0.1"),
        "tsm2": _TSM2 + f"data: {{kind: series, path: {waves}, split: ratio}}" + _COMMON.replace("CLIP", "0.1"),
        # images that cost nothing to make, and a held-out split of any length
        "made_up": _VIM2 + "data: {kind: synthetic, image_size: 16, length: 64}" + _COMMON.replace("CLIP", "0.1"),
    }
    bases = {}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
        bases[name] = load_config(folder / f"{name}.yaml")
    made = Runs(folder, bases)
    for item in request.session.items:
        case = (
            item.callspec.params.get("case")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if isinstance(case, Case) and (HAS_DEEPSPEED or not needs_deepspeed(case)):
            made.begin(case.alone)
            made.begin(case)
    yield made
    made.stop()


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def needs_deepspeed(case: Case) -> bool:
    return case.strategy.startswith("zero") or (case.start is not None and needs_deepspeed(case.start))


@pytest.fixture(autouse=True)
def _deepspeed(request: pytest.FixtureRequest) -> None:
    """Skip a test whose ``case`` cannot run here."""
    if "case" in request.fixturenames and not HAS_DEEPSPEED and needs_deepspeed(request.getfixturevalue("case")):
        pytest.skip("ZeRO needs DeepSpeed, which is not installed: pip install 'mmtrain[deepspeed]'")
