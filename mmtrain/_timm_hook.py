"""Register our models in timm as soon as both are imported, in either order, without importing timm for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def install() -> None:
    """Now if timm is there already, else when it is imported."""
    if "timm" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from mmtrain.models.timm_registry import register

    register()


class _Finder(MetaPathFinder):
    """Finds timm where it is, prepares torchvision for it, and registers after it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader)
        return spec


class _After(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from mmtrain.compat import ensure_torchvision

        ensure_torchvision()
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)
