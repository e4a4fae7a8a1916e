"""Register all ViM2 models with timm. Importing this module is enough.

Example::

    import mmtrain.timm
    import timm

    model = timm.create_model("vim2_tiny", num_classes=10, drop_path_rate=0.1)

timm's argument names ``in_chans`` and ``drop_path_rate`` are accepted. There are no pretrained weights yet.
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

#: From timm's argument names to those of mmtrain.
_RENAMED = {"in_chans": "in_channels", "drop_path_rate": "drop_path"}
#: Arguments that timm passes to every model, and that ViM2 does not use.
_IGNORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "img_size")


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise UserError(f"{name}: pretrained=True: there are no pretrained weights yet. Use pretrained=False")
        arguments = {_RENAMED.get(key, key): value for key, value in kwargs.items() if key not in _IGNORED}
        return create_model(name, **arguments)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    return build


for _name in list_models("vim2*"):
    globals()[_name] = register_model(_entry_point(_name))
