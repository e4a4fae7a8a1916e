"""Every variant of the blocks, the sizes, the tools for fine-tuning, and timm's registry."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmtrain.config import MODELS, config_names, load_config
from mmtrain.data.core.order import mix64
from mmtrain.errors import UserError
from mmtrain.models import build_model, create_model
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer
from mmtrain.models.s6 import S6
from mmtrain.models.stochastic import sample_keys
from mmtrain.models.vim2 import BLOCKS
from tests.conftest import ROOT

TINY = {"dims": [8, 16], "token_mixers": [2, 2], "channel_expand": [2, 1], "window": 4, "num_classes": 3}


@pytest.mark.parametrize("channel_mixer", ["scan", "mlp", "none"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_vision_variant_has_its_scans_and_trains_all_of_them(block: str, channel_mixer: str) -> None:
    model = create_model("vim2_nano", block=block, channel_mixer=channel_mixer, **TINY)
    scans = {"bidirectional": 2, "unidirectional": 1, "multi_scan": 4, "shared_conv": 4}[block]
    for mixer in model.modules():
        if isinstance(mixer, ImageTokenMixer):
            assert sum(isinstance(m, S6) for m in mixer.modules()) == scans
            assert len(mixer.conv) == (1 if block == "shared_conv" else scans)
        if isinstance(mixer, ImageChannelMixer):
            assert sum(isinstance(m, S6) for m in mixer.modules()) == (4 if block == "multi_scan" else 2)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_average_at_its_start_is_the_variant_without_averaging() -> None:
    """No channel mixer, four scans, a shared convolution, all weights 1: a VMamba-like residual stack."""
    torch.manual_seed(0)
    averaged = create_model("vim2_nano", channel_mixer="none", **TINY).eval()
    plain = create_model("vim2_nano", channel_mixer="none", averaging=False, **TINY).eval()
    kept = {k: v for k, v in averaged.state_dict().items() if "averages" not in k}
    plain.load_state_dict(kept)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(averaged(x), plain(x))


@pytest.mark.parametrize("name", [n for n in config_names() if n.startswith("ablations/")])
def test_ablation_configurations_build(name: str) -> None:
    config = load_config(name)
    with torch.device("meta"):
        model = build_model(config.model)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("vim2_large", {}, 190.5),
        ("vim2_huge", {}, 607.0),
        # the paper's ViM2-MLP has 40 M: an MLP of ratio 2 in the place of S's channel mixers comes to this
        ("vim2_small", {"channel_mixer": "mlp", "averaging": False}, 41.5),
    ],
)
def test_sizes(name: str, options: dict[str, object], millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_recomputed_activations_change_nothing_but_memory() -> None:
    """With drop path on: the masks of the recomputation must be those of the forward pass."""
    torch.manual_seed(0)
    model = create_model("vim2_nano", drop_path=0.5, **TINY)
    x = torch.randn(6, 3, 16, 16)
    keys = torch.from_numpy(mix64(3, np.arange(6)).view(np.int64))
    found = []
    for every in (0, 1, 2):
        model.set_grad_checkpointing(every > 0, every or 1)
        model.zero_grad()
        kept = 0

        def count(t: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), sample_keys(keys):
            loss = model(x).square().sum()
        loss.backward()  # outside of the keys' context, as in the train loop
        found.append((kept, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    for _, gradients in found[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name])
    assert found[1][0] < found[2][0] < found[0][0]


def test_the_pyramid_has_timms_shapes() -> None:
    model = create_model("vim2_nano", features_only=True, dims=[8, 16, 24], window=4)
    maps = model(torch.randn(2, 3, 36, 50))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 18, 25), (2, 16, 9, 13), (2, 24, 5, 7)]
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == [(8, 2), (16, 4), (24, 8)]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())
    tiny = create_model("vim2_tiny", features_only=True, out_indices=(1, 3))
    assert [i["reduction"] for i in tiny.feature_info] == [8, 32]
    with pytest.raises(ValueError, match="out_indices"):
        create_model("vim2_nano", features_only=True, out_indices=(7,))
    with pytest.raises(UserError, match="pyramid"):
        create_model("tsm2", features_only=True)


def test_the_head_can_be_replaced() -> None:
    model = create_model("vim2_nano", **TINY)
    x = torch.randn(2, 3, 16, 16)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    torch.testing.assert_close(model(x), pooled)


def test_layer_decay_groups_run_from_the_stem_to_the_head() -> None:
    from mmtrain.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from timm.optim import param_groups_layer_decay

    model = create_model("vim2_nano", **TINY)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=list(model.no_weight_decay()), layer_decay=0.5
    )
    scale, decay = {}, {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            scale[names[id(p)]], decay[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert scale.keys() == set(names.values())
    depth = [
        "stem.weight",
        "stages.0.mixers.0.in_proj.weight",
        "stages.0.mixers.2.in_proj.weight",
        "downs.0.proj.weight",
        "stages.1.mixers.0.in_proj.weight",
        "head.weight",
    ]
    scales = [scale[name] for name in depth]
    assert scales == sorted(scales)
    assert len(set(scales)) == len(scales)
    assert scale["head.weight"] == 1.0
    assert all(decay[n] == 0 for n in decay if n.endswith(("A_log", ".D")))


@pytest.mark.parametrize(
    "order",
    [
        "import mmtrain.timm; import timm",
        "import mmtrain.torchvision_compat as c; c.ensure_torchvision(); import timm, mmtrain.timm",
    ],
)
@pytest.mark.slow
def test_timm_knows_the_models_once_mmtrain_is_imported(order: str) -> None:
    code = f"""{order}
model = timm.create_model('vim2_tiny', num_classes=5, drop_path_rate=0.1)
assert model.head.out_features == 5 and model.config.drop_path == 0.1
assert 'vim2_base' in timm.list_models('vim2*')
print('known')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "known", done.stderr


def test_every_preset_builds_on_the_meta_device() -> None:
    for name in MODELS:
        with torch.device("meta"):
            create_model(name)


def test_wrong_choices_are_refused() -> None:
    for key, value in (("block", "figure 8"), ("channel_mixer", "attention")):
        with pytest.raises(UserError, match=f"model.{key}"):
            create_model("vim2_nano", **{key: value})
    for key, value in (("variate_mixer", "both"), ("output", "gaussian"), ("quantiles", [0.9, 0.1])):
        with pytest.raises(UserError, match=f"model.{key}"):
            create_model("tsm2", **{key: value})
