"""The root command. A command's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from app.catalog import COMMANDS
from app.cli import output
from app.cli.exit_codes import ExitCode
from app.cli.options import Fps
from trainer.contract.errors import MenmaError, UserError


class _Commands(MutableMapping[str, Any]):
    """Command name -> command, built when it is looked up."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            module = importlib.import_module(COMMANDS[name])
            self._built[name] = typer.main.get_command(module.app)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Root(TyperGroup):
    """Finds its commands in the catalog."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names without importing anything."""
        return list(COMMANDS)


app = typer.Typer(
    cls=_Root,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
    fps: Fps = None,
) -> None:
    """From a folder of clips to a LoRA (or a full fine-tune) of a Wan 2.1 / 2.2 video model.

    Alone on a terminal it opens the app: runs, queue, curves. First time here: `menma demo` shows
    the whole way on a tiny model, `menma new` writes a config.
    """
    if version:
        from app.cli.commands.version import show_version

        show_version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        if output.has_screen():
            from app.tui.app import run_app

            if words := run_app(fps=fps):
                output.say(words)
            return
        output.data(context.get_help())
    elif fps is not None:
        hint = "`menma --fps N` opens it"
        raise UserError("--fps is for the app, not for a command", hint=hint)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        app(args=list(arguments), prog_name="menma")
    except MenmaError as error:
        output.show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else ExitCode.DONE
    return ExitCode.DONE
