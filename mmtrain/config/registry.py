"""Registries of models, tasks and data sources: from a name to its section class and to its implementation.

A new model, task or data source is one module of its package. The module defines and registers the section and the
implementation::

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
    """A mapping from the names of the kinds of a section to their section classes.

    Args:
        section: name of the section, such as "model".
        key: the key of the section that selects the kind, such as "name".
        base: section class that is used until a kind is selected.
        package: package whose modules register kinds. They are imported when a name or an implementation is not found.
    """

    def __init__(self, section: str, key: str, base: type[S], package: str) -> None:
        self.name, self.key, self.base, self.package = section, key, base, package
        self._sections: dict[str, type[S]] = {}
        self._presets: dict[str, dict[str, Any]] = {}
        self._implementations: dict[type[Section], Any] = {}
        self._complete = False

    def section(self, *names: str, **presets: dict[str, Any]) -> Callable[[type[S]], type[S]]:
        """Return a decorator that registers a section class.

        Args:
            names: names that select the class with its own defaults.
            presets: names that select the class with the given defaults.
        """

        def register(cls: type[S]) -> type[S]:
            for name in (*names, *presets):
                self._sections[name], self._presets[name] = cls, presets.get(name, {})
            return cls

        return register

    def implements(self, section: type[Section]) -> Callable[[T], T]:
        """Return a decorator that registers a class or function as the implementation of a section class."""

        def register(implementation: T) -> T:
            self._implementations[section] = implementation
            return implementation

        return register

    def implementation(self, config: Section) -> Any:
        """Return the implementation registered for the class of ``config`` or for its nearest base class.

        Raises:
            TypeError: if no implementation is registered.
        """
        for attempt in range(2):
            for cls in type(config).__mro__:
                if cls in self._implementations:
                    return self._implementations[cls]
            if attempt == 0:
                self.discover()
        raise TypeError(f"no implementation of a {self.name} is registered for {type(config).__name__}")

    def choose(self, name: str) -> type[S]:
        """Return the section class of the kind ``name``.

        Raises:
            UserError: for an unknown name, with the nearest one.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        key, known = f"{self.name}.{self.key}", ", ".join(self)
        raise ConfigError(key, f"{key}: unknown '{name}'{nearest(str(name), self)} (known: {known})")

    def make(self, name: str, **values: Any) -> S:
        """Return a section of the kind ``name``. ``values`` override the values of its preset.

        Raises:
            UserError: for an unknown name, key or value.
        """
        return self.choose(name)(**{self.key: name, **self._presets[name], **values})

    def validate(self, value: object) -> object:
        """Convert a mapping to a section of the kind that it selects. Return any other value unchanged."""
        if not isinstance(value, Mapping):
            return value
        values = dict(value)
        name = values.pop(self.key, "")
        return self.make(name, **values) if name else self.base(**values)

    def discover(self) -> None:
        """Import all modules of the package, so that they register their kinds."""
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
