"""Sections that come in kinds: which class each name chooses, and what implements it.

A new model, task or data source is one module of its package. The module defines the section and the implementation,
and registers both::

    @MODELS.section("mlp")
    class MLPConfig(ModelConfig): ...

    @MODELS.implements(MLPConfig)
    class MLP(nn.Module): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from mmtrain.config.section import ConfigError, S, Section
from mmtrain.errors import nearest

T = TypeVar("T")


class Registry(Mapping[str, type[S]], Generic[S]):
    """The kinds of the section ``section``, chosen by its key ``key``.

    Args:
        base: the class of a section that has not chosen a kind.
        package: its modules register kinds. They are imported once a name or an implementation is not found.
    """

    def __init__(self, section: str, key: str, base: type[S], package: str) -> None:
        self.name, self.key, self.base, self.package = section, key, base, package
        self._sections: dict[str, type[S]] = {}
        self._presets: dict[str, dict[str, Any]] = {}
        self._implementations: dict[type[Section], Any] = {}
        self._complete = False

    def section(self, *names: str, **presets: dict[str, Any]) -> Callable[[type[S]], type[S]]:
        """Register a section class under ``names``, and under those of ``presets`` with other defaults."""

        def register(cls: type[S]) -> type[S]:
            for name in (*names, *presets):
                self._sections[name], self._presets[name] = cls, presets.get(name, {})
            return cls

        return register

    def implements(self, section: type[Section]) -> Callable[[T], T]:
        """Register what a section of this class configures."""

        def register(implementation: T) -> T:
            self._implementations[section] = implementation
            return implementation

        return register

    def implementation(self, config: Section) -> Any:
        """What is registered for the class of ``config``, or for the nearest class above it."""
        for attempt in range(2):
            for cls in type(config).__mro__:
                if cls in self._implementations:
                    return self._implementations[cls]
            if attempt == 0:
                self.discover()
        raise TypeError(f"no {self.name} is registered for {type(config).__name__}")

    def choose(self, name: str) -> type[S]:
        """The section class called ``name``.

        Raises:
            UserError: for an unknown name, with the nearest one.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        key, known = f"{self.name}.{self.key}", ", ".join(self)
        raise ConfigError(key, f"{key}: unknown '{name}'{nearest(str(name), self)} (known: {known})")

    def make(self, name: str, **values: Any) -> S:
        """The section called ``name``, with ``values`` over those of its preset.

        Raises:
            UserError: for an unknown name, key or value.
        """
        return self.choose(name)(**{self.key: name, **self._presets[name], **values})

    def validate(self, value: object) -> object:
        """A mapping as the section that it chooses; anything else as it is."""
        if not isinstance(value, Mapping):
            return value
        values = dict(value)
        name = values.pop(self.key, "")
        return self.make(name, **values) if name else self.base(**values)

    def discover(self) -> None:
        """Import the modules of the package, which register what they hold."""
        if not self._complete:
            self._complete = True
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__, f"{self.package}."):
                if not module.ispkg:
                    importlib.import_module(module.name)

    def __getitem__(self, name: str) -> type[S]:
        return self._sections[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._sections:
            self.discover()
        return name in self._sections

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)
