"""The app's registry lines: which commands there are. Imports no implementation."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "demo": "app.cli.commands.demo",
    "new": "app.cli.commands.new",
    "import": "app.cli.commands.import_",
    "presets": "app.cli.commands.presets",
    "config": "app.cli.commands.config",
    "edit": "app.cli.commands.edit",
    "check": "app.cli.commands.check",
    "data": "app.cli.commands.data",
    "estimate": "app.cli.commands.estimate",
    "timesteps": "app.cli.commands.timesteps",
    "schedule": "app.cli.commands.schedule",
    "fetch": "app.cli.commands.fetch",
    "cache": "app.cli.commands.cache",
    "train": "app.cli.commands.train",
    "sample": "app.cli.commands.sample",
    "eval": "app.cli.commands.eval",
    "lora": "app.cli.commands.lora",
    "loraid": "app.cli.commands.loraid",
    "merge": "app.cli.commands.merge",
    "push": "app.cli.commands.push",
    "runs": "app.cli.commands.runs",
    "queue": "app.cli.commands.queue",
    "keys": "app.cli.commands.keys",
    "serve": "app.cli.commands.serve",
    "bench": "app.cli.commands.bench",
    "doctor": "app.cli.commands.doctor",
    "version": "app.cli.commands.version",
}
"""Command -> module with a Typer app named `app`, in the order of `menma --help`."""
