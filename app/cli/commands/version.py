"""`menma version`."""

from __future__ import annotations

from app.cli import output
from app.cli.options import command_app

app = command_app()


@app.command()
def version() -> None:
    """Show the version."""
    show_version()


def show_version() -> None:
    """Write name and version to stdout."""
    from app.domain.environment import menma_version

    output.data(f"menma {menma_version()}")
