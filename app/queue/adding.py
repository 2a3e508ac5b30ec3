"""From a command line to a job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from app.queue.jobs import JobSpec, kind_of
from app.runs.launch import JOB_FOLDER, JOB_TOKEN, SECRET_NAME
from trainer.contract.errors import UserError

NAME_LENGTH = 32
_NOT_KEPT = {JOB_TOKEN, JOB_FOLDER, "PYTHONPATH", "PYTHONSAFEPATH", "_", "OLDPWD", "PWD", "SHLVL"}


def make_spec(
    argv: Sequence[str],
    *,
    name: str = "",
    priority: int = 0,
    after: tuple[int, ...] = (),
    gpus: int | tuple[str, ...] | None = None,
    held: bool = False,
) -> JobSpec:
    """Return the job of a command line, to run in this folder and with this environment.

    Args:
        argv: without `menma`.
        name: what lists call it; empty: after its first argument.
        priority: larger goes first.
        after: jobs that must be done before.
        gpus: how many or which; None: what the command line says, else what its kind needs.
        held: it waits until it is resumed.

    Raises:
        UserError: such a command cannot be queued.
    """
    kind = kind_of(argv)
    if gpus is None:
        gpus = _told_gpus(argv) if kind.uses_gpu else 0
    return JobSpec(
        argv=tuple(argv),
        name=name or short_name(argv),
        cwd=Path.cwd(),
        environment={
            key: value
            for key, value in os.environ.items()
            if key not in _NOT_KEPT and not SECRET_NAME.search(key)
        },
        priority=priority,
        gpus=gpus,
        after=after,
        held=held,
    )


def parse_gpus(text: str) -> int | tuple[str, ...]:
    """Read `2` as a number and `0,1` (or `0,`) as indexes.

    Raises:
        UserError: it is neither.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--gpus {text}: a number of GPUs, or indexes such as 0,1")
    return tuple(parts) if "," in text else int(parts[0])


def short_name(argv: Sequence[str]) -> str:
    """Return what lists call a job of which nobody has said it."""
    words = [word for word in argv[1:] if not word.startswith("-")]
    return Path(words[0]).stem[:NAME_LENGTH] if words else argv[0]


def _told_gpus(argv: Sequence[str]) -> int | tuple[str, ...]:
    """Return how many GPUs `menma train --gpus N` asks for."""
    if "--gpus" not in argv[:-1]:
        return 1
    return parse_gpus(argv[argv.index("--gpus") + 1])
