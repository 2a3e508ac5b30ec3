"""`menma keys`: what the keys of the app do, and the file that changes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import output
from app.cli.options import Json, command_app
from trainer.contract.errors import UserError

if TYPE_CHECKING:
    from app.tui.keymap import Action, KeyMap

app = command_app()


@app.command()
def keys(
    as_json: Json = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write app.toml with all that can be set, commented.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the app.toml that is there.")
    ] = False,
) -> None:
    """List the keys of the app, as your app.toml has them; say what of it does not hold.

    Example: menma keys --write, then edit the file that it names
    """
    from app.domain.app_settings import read_settings
    from app.tui.keymap import all_actions, key_map
    from app.tui.preferences import read_preferences

    actions = all_actions()
    settings = read_settings()
    if write:
        _write(actions, settings.path, force=force)
        return
    found = key_map(actions, settings.keys)
    problems = read_preferences(settings).problems
    if as_json:
        output.json_data(
            {
                "file": str(settings.path),
                "problems": list(problems),
                "keys": [_entry(action, found) for action in actions],
            }
        )
        return
    from app.tui.keyed import shown

    rows = [
        (action.id, " ".join(map(shown, found.keys[action.id])), _place(action), action.help)
        for action in actions
    ]
    output.data(output.table(("ACTION", "KEYS", "WHERE", "DOES"), rows))
    for problem in problems:
        output.warn(f"{settings.path}: {problem}")
    if not settings.path.exists():
        output.say(f"All keys are the default ones. `menma keys --write` makes {settings.path}.")


def _entry(action: Action, found: KeyMap) -> dict[str, object]:
    from app.tui.keyed import shown

    return {
        "action": action.id,
        "where": _place(action),
        "title": action.title,
        "help": action.help,
        "keys": [shown(key) for key in found.keys[action.id]],
        "default": [shown(key) for key in action.keys],
    }


def _place(action: Action) -> str:
    return {"app": "everywhere", "list": "all lists"}.get(action.place, action.place)


def _write(actions: list[Action], path: Path, *, force: bool) -> None:
    from app.tui.keys_file import default_text
    from trainer.contract.files import write_text

    if path.exists() and not force:
        raise UserError(f"{path} is there already", hint="edit it, or overwrite it with --force")
    write_text(path, default_text(actions))
    output.data(str(path))
