"""`menma edit`: a config in the full-screen app."""

from __future__ import annotations

from app.cli import output
from app.cli.commands.runs import RUNS
from app.cli.options import Config, Fps, RunsDir, command_app
from trainer.contract.errors import UserError

app = command_app()


@app.command()
def edit(config: Config, runs_dir: RunsDir = RUNS, fps: Fps = None) -> None:
    """Edit a config on a terminal: all options with help, the text, problems, the memory it takes.

    `menma config set` and `menma config unset` change single values without a screen.
    """
    from app.domain.config_file import open_config

    open_config(config)  # what is wrong with the file is said here, not on the screen
    if not output.has_screen():
        raise UserError(
            "the editor needs a terminal",
            hint=f"without one: menma config set {config} KEY=VALUE, or any text editor",
        )
    from app.tui.app import run_app

    if words := run_app(runs_dir, config, fps=fps):
        output.say(words)
