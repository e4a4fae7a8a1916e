"""From YAML files and ``key=value`` overrides to a :class:`RunConfig`, with errors that say where and what.

A configuration is a stack of layers: included files first, then the file, then the command line. An error names the
layer that gave the key or value. The sections ``model``, ``data`` and ``task`` come in kinds; a later layer may switch
the kind (``data=synthetic``), and then keys that the new kind does not have are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain.config.data import DATA
from mmtrain.config.models import MODELS
from mmtrain.config.registry import Registry
from mmtrain.config.schema import TASKS, RunConfig
from mmtrain.config.section import ConfigError, Section
from mmtrain.config.text import parse_overrides, read_mapping, refuse_secrets, typed
from mmtrain.errors import UserError, nearest

#: The sections that come in kinds.
REGISTRIES: dict[str, Registry[Any]] = {"model": MODELS, "data": DATA, "task": TASKS}
_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Layer:
    source: str
    values: dict[str, Any]


def config_folders() -> list[Path]:
    """Where named configurations are looked for: the current folder's ``configs/``, then those that mmtrain ships."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "configs"  # in a wheel; a checkout has them beside the package
    candidates = [Path("configs"), shipped if shipped.is_dir() else package.parent / "configs"]
    return [folder for folder in candidates if folder.is_dir()]


def config_names(folders: Iterable[Path] | None = None) -> list[str]:
    """The names that ``--config`` takes, of ``folders`` alone or of all :func:`config_folders`."""
    places = config_folders() if folders is None else folders
    found = {path.relative_to(folder) for folder in places for path in folder.rglob("*.yaml")}
    return sorted(str(path.with_suffix("")) for path in found if path.parts[0] != "base")


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read configuration ``name`` (a name in ``configs/`` or a YAML file) and apply ``key=value`` overrides.

    Raises:
        UserError: for an unknown name, key, kind or value; the message names the file and the nearest valid name.
    """
    path = _find(name)
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in [*_file_layers(path, ()), _override_layer(overrides)]:
        merged = _add_layer(merged, layer)
        sources |= dict.fromkeys(_flat(layer.values), layer.source)
    merged.setdefault("name", path.stem)
    if merged["name"] in ("", None):
        raise UserError(f"{sources['name']}: name is empty: give one, or leave it out for '{path.stem}'")
    for section, registry in REGISTRIES.items():
        if not merged.get(section, {}).get(registry.key):
            raise UserError(f"{path}: {section}.{registry.key} is not set: choose one of {', '.join(registry)}")
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(merged), resolve=True, throw_on_missing=True)
        values = cast(dict[str, Any], resolved)
        flat = _flat(values)
        for key, written in _flat(merged).items():
            if "${" in str(written):
                refuse_secrets(f"{sources.get(key, path)}: {key}", str(written), str(flat[key]))
        return RunConfig(**_typed_values(values))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}: an interpolation ${{...}} refers to itself") from None
    except ConfigError as error:
        raise UserError(f"{sources.get(error.key, path)}: {error}") from None


def to_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))


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
    values = read_mapping(path)
    include = values.pop("include", [])
    entries = [include] if isinstance(include, str) else include
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: include: give the name of a YAML file, or a list of names")
    for entry in entries:
        child = path.parent / entry
        if child.suffix not in (".yaml", ".yml") or not child.is_file():
            raise UserError(f"{path}: include: there is no YAML file {child}")
        yield from _file_layers(child, (*seen, path))
    if seen:  # a name is that of one configuration, not of those that build on it
        values.pop("name", None)
    yield _Layer(str(path), values)


def _override_layer(overrides: Iterable[str]) -> _Layer:
    return _Layer(_COMMAND_LINE, parse_overrides(map(_spelt_out, overrides), _COMMAND_LINE))


def _spelt_out(item: str) -> str:
    """``data=synthetic`` as ``data.kind=synthetic``, so that ``data.length=10`` can stand beside it."""
    section, _, kind = item.partition("=")
    return f"{section}.{REGISTRIES[section].key}={kind}" if section in REGISTRIES and kind.isidentifier() else item


def _add_layer(merged: dict[str, Any], layer: _Layer) -> dict[str, Any]:
    values = {str(k): v for k, v in layer.values.items()}
    for section, registry in REGISTRIES.items():
        if isinstance(values.get(section), str):
            values[section] = {registry.key: values[section]}
        kind = values[section].get(registry.key) if isinstance(values.get(section), Mapping) else None
        if kind is None:
            continue
        try:
            keep = registry.choose(kind).model_fields
        except ConfigError as error:
            raise UserError(f"{layer.source}: {error}") from None
        if section in merged and merged[section].get(registry.key) != kind:
            merged = merged | {section: {k: v for k, v in merged[section].items() if k in keep}}
    known = _known_keys(
        {**merged, **{name: {**_section(merged, name), **_section(values, name)} for name in REGISTRIES}}
    )
    _refuse_unknown(values, known, layer.source)
    sections = {name: {**_section(merged, name), **value} for name, value in values.items() if known[name]}
    return {**merged, **values, **sections}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _typed_values(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with text converted to the type of each key."""
    result = typed(RunConfig, values)
    for name, default in RunConfig():
        registry, section = REGISTRIES.get(name), values.get(name)
        if isinstance(section, Mapping) and isinstance(default, Section):
            cls = registry.choose(section[registry.key]) if registry else type(default)
            result[name] = typed(cls, section)
    return result


def _known_keys(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of each section, with the kinds that ``state`` has chosen; none for a key that is no section."""
    known: dict[str, list[str]] = {}
    for name, default in RunConfig():
        registry, chosen = REGISTRIES.get(name), state.get(name)
        kind = chosen.get(registry.key) if registry and isinstance(chosen, Mapping) else None
        section = registry.choose(kind) if registry and kind else type(default)
        known[name] = list(section.model_fields) if issubclass(section, Section) else []
    return known


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, list[str]], source: str) -> None:
    leaves = [f"{name}.{key}" for name, keys in known.items() for key in keys] + [n for n in known if not known[n]]
    for name, value in values.items():
        if known.get(name) and not isinstance(value, Mapping):
            raise UserError(f"{source}: {name} is a section: write {name}.KEY=VALUE, not {value!r}")
        wrong = [f"{name}.{key}" for key in value if key not in known[name]] if known.get(name) else []
        for dotted in wrong if name in known else [name]:
            section, _, key = dotted.rpartition(".")
            same = [leaf for leaf in leaves if leaf.split(".")[-1] == (key or dotted)]
            near = [leaf for leaf in leaves if leaf.startswith(f"{section}.")] if section else list(known)
            hint = f"; did you mean '{same[0]}'?" if same else nearest(dotted, near) or nearest(dotted, leaves)
            registry = REGISTRIES.get(section)
            if registry is not None and known[section] == list(registry.base.model_fields):
                hint = f"; set {section}.{registry.key} first (known: {', '.join(registry)})"
            raise UserError(f"{source}: unknown key '{dotted}'{hint}")


def differences(old: RunConfig, new: RunConfig, ignore: Iterable[str] = ()) -> list[str]:
    """``key: old -> new`` for each leaf that differs, except the keys and sections in ``ignore``."""
    left, right = _flat(old.model_dump()), _flat(new.model_dump())
    ignored = tuple(ignore)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}.{leaf}": item for leaf, item in value.items()} if isinstance(value, Mapping) else {key: value}
    return found
