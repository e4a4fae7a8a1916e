"""Register every ViM2 with timm.

Example::

    import mmtrain.timm
    import timm

    model = timm.create_model("vim2_tiny", num_classes=10, drop_path_rate=0.1)

timm's own names for arguments are understood (``in_chans``, ``drop_path_rate``). There are no pretrained weights yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mmtrain.errors import UserError
from mmtrain.models import create_model, list_models
from mmtrain.torchvision_compat import ensure_torchvision

ensure_torchvision()  # before timm imports torchvision

from timm.models import register_model  # noqa: E402

_OURS = {"in_chans": "in_channels", "drop_path_rate": "drop_path"}
# timm passes these to every model; they have no meaning for ours
_IGNORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "img_size")


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise UserError(f"{name}: there are no pretrained weights yet; leave out pretrained=True")
        given = {_OURS.get(key, key): value for key, value in kwargs.items() if key not in _IGNORED}
        return create_model(name, **given)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    return build


for _name in list_models("vim2*"):
    globals()[_name] = register_model(_entry_point(_name))
