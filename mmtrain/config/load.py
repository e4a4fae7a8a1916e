"""From YAML files and ``key=value`` overrides to a typed :class:`RunConfig`, with errors that say where and what.

A configuration is a stack of layers: included files first, then the file, then the command line. Each layer is
checked against the schema on its own, so that an error names the layer that is wrong. The sections ``model``,
``data`` and ``task`` come in kinds; a later layer may switch the kind (``data=synthetic``), and then keys that the
new kind does not have are dropped.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain.config.data import DATA, DataConfig
from mmtrain.config.models import MODELS, ModelConfig, preset
from mmtrain.config.schema import TASKS, RunConfig, TaskConfig
from mmtrain.errors import UserError, nearest

#: For each section that comes in kinds: the key that names the kind, and the known ones.
_KINDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "model": ("name", MODELS),
    "data": ("kind", DATA),
    "task": ("kind", TASKS),
}
_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Layer:
    source: str
    values: dict[str, Any]


def config_folders() -> list[Path]:
    """Where named configurations are looked for: the current folder's ``configs/``, then the project's."""
    package = Path(__file__).resolve().parents[1]
    candidates = [Path("configs"), package.parent / "configs", package / "configs"]
    return [folder for folder in candidates if folder.is_dir()]


def config_names() -> list[str]:
    """The names that ``--config`` takes."""
    found = {path.relative_to(folder) for folder in config_folders() for path in folder.rglob("*.yaml")}
    return sorted(str(path.with_suffix("")) for path in found if path.parts[0] != "base")


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read configuration ``name`` (a name in ``configs/`` or a YAML file) and apply ``key=value`` overrides.

    Raises:
        UserError: for an unknown name, key, kind or value; the message names the file and the nearest valid name.
    """
    path = _find(name)
    layers = [*_file_layers(path, ()), _override_layer(overrides)]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _add_layer(merged, layer)
    merged.setdefault("name", path.stem)
    for section, (key, known) in _KINDS.items():
        if not merged.get(section, {}).get(key):
            raise UserError(f"{path}: {section}.{key} is not set: choose one of {', '.join(known)}")
    return _typed(merged, str(path))


def from_yaml(path: Path) -> RunConfig:
    """Read the resolved configuration of a run folder."""
    return load_config(path)


def to_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"--config {name}: there is no such file")
    for folder in config_folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = config_names()
    known = "\n  ".join(names) if names else "(none: no configs/ folder here; give the path of a YAML file)"
    raise UserError(f"--config {name}: there is no such configuration{nearest(str(name), names)}\n  {known}")


def _file_layers(path: Path, seen: tuple[Path, ...]) -> Iterator[_Layer]:
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: include goes round in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML and OmegaConf errors share no base class
        raise UserError(f"{path}: not a YAML file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: the file must hold key: value pairs")
    include = values.pop("include", [])
    for entry in [include] if isinstance(include, str) else include:
        child = path.parent / entry
        if not child.is_file():
            raise UserError(f"{path}: include: there is no file {child}")
        yield from _file_layers(child, (*seen, path))
    refuse_bare_time(values.get("cluster"), str(path))
    if seen:  # a name is that of one configuration, not of those that build on it
        values.pop("name", None)
    yield _Layer(str(path), cast(dict[str, Any], values))


def refuse_bare_time(cluster: object, source: str) -> None:
    """Refuse a ``time`` that YAML has read as a number: it takes 24:00:00 for 86400, and Slurm that for minutes."""
    if isinstance(cluster, Mapping) and isinstance(cluster.get("time"), int | float):
        raise UserError(f'{source}: cluster.time: write it in quotes, such as time: "24:00:00"')


def _override_layer(overrides: Iterable[str]) -> _Layer:
    items = list(overrides)
    for item in items:
        if "=" not in item or item.startswith(("-", "=")):
            raise UserError(f"'{item}' is not an override: write key=value, such as optim.lr=2e-4")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([_spelt_out(item) for item in items]))
    except Exception as error:
        raise UserError(f"{_COMMAND_LINE}: {error}") from None
    return _Layer(_COMMAND_LINE, cast(dict[str, Any], values))


#: What YAML takes for a number in base 60.
_TIME = re.compile(r"[0-9]+(:[0-9]{1,2})+")


def _spelt_out(item: str) -> str:
    """``data=synthetic`` as ``data.kind=synthetic``, so that ``data.length=10`` can stand beside it; times as text."""
    section, _, kind = item.partition("=")
    if _TIME.fullmatch(kind):
        return f'{section}="{kind}"'
    return f"{section}.{_KINDS[section][0]}={kind}" if section in _KINDS and kind.isidentifier() else item


def _add_layer(merged: dict[str, Any], layer: _Layer) -> dict[str, Any]:
    values = {str(k): v for k, v in layer.values.items()}
    for section, (key, known) in _KINDS.items():
        if isinstance(values.get(section), str):
            values[section] = {key: values[section]}
        kind = (values.get(section) or {}).get(key) if isinstance(values.get(section), dict) else None
        if kind is None:
            continue
        if kind not in known:
            raise UserError(
                f"{layer.source}: {section}.{key}: unknown '{kind}'{nearest(str(kind), known)}"
                f" (known: {', '.join(known)})"
            )
        if section in merged and merged[section].get(key) != kind:
            keep = set(_schema({section: {key: kind}})[section])
            merged = merged | {section: {k: v for k, v in merged[section].items() if k in keep}}
    state = cast(
        dict[str, Any], OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(merged), OmegaConf.create(values)))
    )
    schema = _schema(state)
    _refuse_unknown(values, schema, layer.source)
    try:
        OmegaConf.merge(schema, OmegaConf.create(values))
    except OmegaConfBaseException as error:
        raise _type_error(layer.source, error) from None
    return state


def _schema(state: Mapping[str, Any]) -> DictConfig:
    """The schema with the sections that ``state`` has chosen a kind for."""

    def chosen(section: str) -> str | None:
        value = state.get(section)
        return value.get(_KINDS[section][0]) if isinstance(value, Mapping) else None

    model, data, task = chosen("model"), chosen("data"), chosen("task")
    return OmegaConf.structured(
        RunConfig(
            model=preset(model) if model else ModelConfig(),
            data=DATA[data]() if data else DataConfig(),
            task=TASKS[task]() if task else TaskConfig(),
        )
    )


def _refuse_unknown(values: Mapping[str, Any], schema: DictConfig, source: str, prefix: str = "") -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in schema:
            known = [f"{prefix}{k!s}" for k in schema]
            leaves = _leaves(_root(schema))
            hint = nearest(dotted, known) or nearest(dotted, leaves)
            same = [leaf for leaf in leaves if leaf.split(".")[-1] == key]
            hint = f"; did you mean '{same[0]}'?" if same else hint
            section = prefix[:-1]
            if section in _KINDS and not schema.get(_KINDS[section][0]):
                hint = f"; set {section}.{_KINDS[section][0]} first (known: {', '.join(_KINDS[section][1])})"
            raise UserError(f"{source}: unknown key '{dotted}'{hint}")
        if isinstance(schema[key], DictConfig):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {dotted} is a section: write {dotted}.KEY=VALUE, not {value!r}")
            _refuse_unknown(value, schema[key], source, f"{dotted}.")


def _root(schema: DictConfig) -> DictConfig:
    return cast(DictConfig, schema._get_root())


def _leaves(schema: DictConfig, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in schema:
        value = schema[key]
        dotted = f"{prefix}{key!s}"
        found += _leaves(value, f"{dotted}.") if isinstance(value, DictConfig) else [dotted]
    return found


def _type_error(source: str, error: OmegaConfBaseException) -> UserError:
    what = str(error).splitlines()[0]
    key = error.full_key or "value"
    return UserError(f"{source}: {key}: {what}{_expected(str(key))}")


def _expected(dotted: str) -> str:
    """`` (expected: int)`` where the schema of all kinds agrees on the type of a key."""
    section, _, leaf = dotted.partition(".")
    owners: list[Any] = [RunConfig] if not leaf else []
    if section in _KINDS:
        owners = [v[0] if isinstance(v, tuple) else v for v in _KINDS[section][1].values()]
    elif leaf:
        hint = typing.get_type_hints(RunConfig).get(section)
        owners = [hint] if is_dataclass(hint) else []
    name = (leaf or section).split("[")[0]
    for owner in owners:
        hints = typing.get_type_hints(owner)
        if name in hints:
            return f" (expected: {getattr(hints[name], '__name__', None) or hints[name]})".replace("typing.", "")
    return ""


def _typed(merged: Mapping[str, Any], source: str) -> RunConfig:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_schema(merged), OmegaConf.create(dict(merged))))
    except OmegaConfBaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__
        raise _type_error(source, error) from None
    return cast(RunConfig, config)


def differences(old: RunConfig, new: RunConfig, ignore: Iterable[str] = ()) -> list[str]:
    """``key: old -> new`` for each leaf that differs, but for the keys and sections in ``ignore``."""
    left, right = _flat(old), _flat(new)
    ignored = tuple(ignore)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(value):
        child = getattr(value, item.name)
        key = f"{prefix}{item.name}"
        found.update(_flat(child, f"{key}.") if is_dataclass(child) else {key: child})
    return found
