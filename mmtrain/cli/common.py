"""Arguments that several commands share, and groups of commands that are imported on demand."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

Config = Annotated[
    str, typer.Option("--config", "-c", help="Name of a configuration (see mmtrain configs), or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the configuration, such as optim.lr=2e-4."),
]
RunDir = Annotated[str | None, typer.Option(help="Run folder (default: run_root/name).")]
Run = Annotated[str, typer.Argument(help="Run folder, such as runs/vim2_digits.")]
Out = Annotated[Path, typer.Option(help="Folder to create. It appears only once it is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing --out folder.")]
Workers = Annotated[int | None, typer.Option(help="Number of processes (default: one per core, at most 8).")]
Separator = Annotated[
    str | None,
    typer.Option(help="CSV field separator: a character, or comma, semicolon, tab, pipe (default: detected)."),
]
Decimal = Annotated[str | None, typer.Option(help="CSV decimal mark: point or comma (default: detected).")]
TimeFormat = Annotated[
    str | None,
    typer.Option(
        help="Format of dates: dmy, mdy, ymd, codes such as %d/%m/%Y, or an epoch unit s, ms, us, ns "
        "(default: detected)."
    ),
]
Checkpoint = Annotated[
    str, typer.Option(help="Checkpoint to load: selected (according to eval.select), best, last, or a step.")
]

#: Settings of every typer application: no shell completion, no typer tracebacks, no rich markup.
SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

#: Maps a command to the location of its function or typer application (``module:name``) and to its one-line help.
Table = dict[str, tuple[str, str]]


def lazy_app(name: str, help: str, table: Table, callback: Callable[..., None] = lambda: None) -> typer.Typer:
    """Return a group whose command modules are imported when they are called.

    The group's own ``--help`` prints the one-line texts of ``table`` and imports no command.
    """
    group = type("LazyGroup", (_LazyGroup,), {"table": table})
    return typer.Typer(name=name, help=help, cls=group, callback=callback, no_args_is_help=True, **SETTINGS)


class _LazyGroup(TyperGroup):
    table: ClassVar[Table]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _LazyCommands(self.table)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])


class _LazyCommands(UserDict[str, Any]):
    """Mapping of names to commands that creates each command on access."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.data[name][0].partition(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        single = typer.Typer(**SETTINGS)
        single.command(name)(command)
        return typer.main.get_command(single)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.data else default
