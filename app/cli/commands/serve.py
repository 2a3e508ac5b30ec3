"""`menma serve`: the app in a browser on this machine."""

from __future__ import annotations

import getpass
import importlib.util
import socket
from pathlib import Path
from typing import Annotated

import typer

from app.cli import output
from app.cli.commands.runs import RUNS
from app.cli.options import RunsDir, command_app
from trainer.contract.errors import UserError

app = command_app()


@app.command()
def serve(
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port of 127.0.0.1.", show_default="8642"),
    ] = None,
    view: Annotated[
        bool, typer.Option("--view", help="To look only: whoever has the address changes nothing.")
    ] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show the app in a browser: on this machine only, for whoever has the address that it prints.

    From another machine go through ssh, with the line that it prints. Ctrl-C ends it; runs go on.
    """
    if importlib.util.find_spec("textual_serve") is None:
        raise UserError(
            "a package for this command is missing", hint="pip install textual-serve==1.1.3"
        )
    from app.web.guard import new_token
    from app.web.server import serve as serve_pages
    from app.web.server import session_command

    token = new_token()

    def ready(number: int) -> None:
        output.data(f"http://127.0.0.1:{number}/?token={token}")
        if view:
            output.say("To look only: nothing can be changed there.")
        else:
            output.say("Whoever has this address can do all that you can: keep it to yourself.")
        output.say("From another machine, type there, and open the same address there:")
        output.say(f"  ssh -L {number}:127.0.0.1:{number} {_login()}", whole=True)
        output.say("Ctrl-C ends it; runs and jobs go on.")

    serve_pages(session_command(Path(runs_dir), view=view), token, port, ready)


def _login() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # an id without a name, as in containers
        user = "USER"
    return f"{user}@{socket.gethostname()}"
