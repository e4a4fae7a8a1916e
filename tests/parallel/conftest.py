"""The runs of the matrix, and the configurations that they are variants of."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.config import RunConfig, load_config

pytest.register_assert_rewrite("tests.parallel.results")

from tests.parallel.cases import HALF, STEPS, Case  # noqa: E402
from tests.parallel.runs import Runs  # noqa: E402

# Everything random is on. The gradient is clipped at every step (a test asserts it). A run ends with its last weights.
#
# eps: some gradients are zero but for rounding (what only scales the input of a norm, such as the first average of a
# stack, and most of what the seldom-seen inputs reach); AdamW with its usual 1e-8 turns that noise, of 1e-9 and less,
# into steps of the size of the learning rate. With 1e-6, still far below the gradients that count, it stays noise.
_COMMON = f"""
optim: {{lr: 3.0e-3, weight_decay: 0.05, warmup_epochs: 0.1, clip_norm: 0.1, eps: 1.0e-6}}
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


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="session")
def bases(digits: Path, waves: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """What the cases are variants of."""
    texts = {
        "vim2": f"{_VIM2}data: {{kind: shards, root: {digits}, image_size: 16, augment: light}}",
        "tsm2": f"{_TSM2}data: {{kind: series, path: {waves}, split: ratio}}",
        # images that cost nothing to make, and a held-out split of any length
        "made_up": f"{_VIM2}data: {{kind: synthetic, image_size: 16, length: 64}}",
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text + _COMMON)
    return {name: load_config(folder / f"{name}.yaml") for name in texts}


@pytest.fixture(scope="package")
def runs(
    request: pytest.FixtureRequest, bases: dict[str, RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """The runs of these tests; those that the selected tests ask for by a parameter ``case`` begin at once."""
    made = Runs(tmp_path_factory.mktemp("runs"), bases)
    for item in request.session.items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and can_run(case):
            made.begin(case.alone)
            made.begin(case)
    yield made
    made.stop()


def can_run(case: Case) -> bool:
    if case.start is not None and not can_run(case.start):
        return False
    return HAS_DEEPSPEED or not case.strategy.startswith("zero")


@pytest.fixture(autouse=True)
def _deepspeed(request: pytest.FixtureRequest) -> None:
    """Skip a test whose ``case`` cannot run here."""
    if "case" in request.fixturenames and not can_run(request.getfixturevalue("case")):
        pytest.skip("ZeRO needs DeepSpeed, which is not installed: pip install 'mmtrain[deepspeed]'")
