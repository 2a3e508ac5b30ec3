"""What an argument `CONFIG|RUN` means."""

from __future__ import annotations

from pathlib import Path


def config_and_run(subject: Path) -> tuple[Path, Path | None]:
    """Return the config, and the run's folder when a run is meant.

    Raises:
        UserError: it is neither.
    """
    from app.cli.commands.runs import RUNS, find_run

    if subject.suffix == ".toml" or subject.is_file():
        return subject, None
    run = find_run(str(subject), RUNS)
    return run.config, run.root
