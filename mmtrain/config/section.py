"""The base class of all sections: a pydantic model whose errors are one line with the key, the value and the cure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from mmtrain.errors import UserError, nearest

S = TypeVar("S", bound="Section")
_TYPES = {"integer": "an int", "number": "a finite float", "boolean": "a bool", "string": "a str", "null": "null"}
_BOUNDS = {"less_than", "less_than_equal", "greater_than", "greater_than_equal"}


class ConfigError(UserError):
    """An invalid key or value. ``key`` is the dotted name, such as ``train.epochs``."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key

    def __str__(self) -> str:
        return str(self.args[1])


def require(condition: bool, key: str, value: object, cure: str) -> None:
    """Raise :class:`ConfigError` with ``key``, ``value`` and ``cure`` unless ``condition`` is true."""
    if not condition:
        raise ConfigError(key, f"{key}={value!r}: {cure}")


class Section(BaseModel):
    """A section of the configuration. Infinite numbers, NaN and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )
    #: The name of the section with a dot, such as "train."; the prefix of its keys.
    prefix: ClassVar[str] = ""

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic declares

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _explained(type(self), error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_and_float(cls, value: object, info: Any) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("not_bool", "a boolean is not a valid value")
        if isinstance(value, float) and cls.model_fields[info.field_name].annotation in (int, int | None):
            raise PydanticCustomError("not_float", "a float is not an integer")
        return value


def replace(section: S, **changes: Any) -> S:
    """Return a copy of ``section`` with ``changes``, and validate it.

    Raises:
        ConfigError: for an unknown key or an invalid value.
    """
    return type(section)(**{**dict(section), **changes})


def _explained(cls: type[Section], error: ValidationError) -> ConfigError:
    """Convert the first error of pydantic to a ConfigError with a one-line message."""
    first = error.errors(include_url=False)[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # from a nested section or from a check of several keys
        return inner
    name, *index = first["loc"]
    key = f"{cls.prefix}{name}"
    if first["type"] == "extra_forbidden":
        return ConfigError(
            key, f"unknown key '{key}'{nearest(key, [cls.prefix + known for known in cls.model_fields])}"
        )
    schema = key_schemas(cls)[str(name)]
    schema = schema["items"] if index and "items" in schema else schema
    if first["type"] == "literal_error":
        cure = f"choose {allowed(schema)}"
    else:
        cure = f"must be {allowed(schema, typed=first['type'] not in _BOUNDS)}"
    position = "".join(f"[{i}]" for i in index)
    return ConfigError(key, f"{key}{position}={first['input']!r}: {cure}")


@lru_cache
def key_schemas(cls: type[Section]) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each key of a section."""
    found: dict[str, dict[str, Any]] = cls.model_json_schema()["properties"]
    return found


def allowed(schema: Mapping[str, Any], *, typed: bool = True) -> str:
    """Describe the values that the JSON schema of a key allows, such as ``a finite float in [0, 1)``.

    Args:
        typed: include the type in the description.
    """
    if "anyOf" in schema:
        return ", or ".join(allowed(option, typed=typed or option.get("type") == "null") for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        items, count = allowed(schema["items"], typed=typed), schema.get("minItems")
        exact = f" of {count}" if count is not None and count == schema.get("maxItems") else ""
        return f"a list{exact}, each {items}" if typed else items
    words = [_TYPES[schema["type"]]] if typed else []
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if (low, above) != (None, None) and (high, below) != (None, None):
        left, right = f"[{low}" if above is None else f"({above}", f"{high}]" if below is None else f"{below})"
        words.append(f"in {left}, {right}")
    else:
        bounds = {"at least": low, "above": above, "at most": high, "below": below}
        words += [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return " ".join(words)
