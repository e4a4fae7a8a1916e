"""What the command modules share: groups that import a command's module when it is called, and common arguments."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

Config = Annotated[str, typer.Option("--config", "-c", help="A name in configs/, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.lr=2e-4 train.epochs=3.")
]
RunDir = Annotated[str | None, typer.Option(help="The run folder (default: run_root/name).")]
Run = Annotated[str, typer.Argument(help="A run folder, such as runs/vim2_digits.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it appears only when it is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Workers = Annotated[int | None, typer.Option(help="Processes (default: one per core, at most 8).")]
Separator = Annotated[
    str | None,
    typer.Option(help="Between the fields of a CSV: a character, or comma, semicolon, tab, pipe (default: found out)."),
]
Decimal = Annotated[str | None, typer.Option(help="The decimal mark of a CSV: point or comma (default: found out).")]
TimeFormat = Annotated[
    str | None,
    typer.Option(
        help="How dates are written: dmy, mdy, ymd, codes such as %d/%m/%Y, or s, ms, us, ns (default: found out)."
    ),
]
Checkpoint = Annotated[str, typer.Option(help="selected (as eval.select says), best, last or a step.")]

#: Of every typer application: no completion, no rich markup, no tracebacks of typer's own.
SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

#: By command: where its function or its typer application is (``module:name``), and its help in one line.
Table = dict[str, tuple[str, str]]


def lazy_app(name: str, help: str, table: Table, callback: Callable[..., None] = lambda: None) -> typer.Typer:
    """A group of commands whose modules are imported when they are called; its help is that of the table."""
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
    """Commands by name, made when they are taken."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.data[name][0].partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            command, found = found, typer.Typer(**SETTINGS)
            found.command(name)(command)
        return typer.main.get_command(found)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.data else default
