"""A command line of this process as a job: where it works, with which environment and GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from app.queue.jobs import JobSpec, kind_of
from app.runs.launch import JOB_FOLDER, JOB_TOKEN, SECRET_NAME
from trainer.contract.errors import UserError

NAME_LENGTH = 32
_OURS = (JOB_TOKEN, JOB_FOLDER, "PYTHONPATH", "PYTHONSAFEPATH", "_", "OLDPWD", "PWD", "SHLVL")


def job_spec(
    argv: Sequence[str],
    *,
    name: str = "",
    priority: int = 0,
    after: Sequence[int] = (),
    gpus: str | None = None,
    held: bool = False,
) -> JobSpec:
    """Return the job of a command line that is to work in this folder.

    Args:
        argv: without `menma`.
        name: what the list calls it; empty: after the first file.
        priority: larger goes first.
        after: jobs that must be done before.
        gpus: `2`, or indexes such as `0,1`; None: one, or what the command line says.
        held: it waits until it is resumed.

    Raises:
        UserError: the command cannot be queued, or `gpus` is neither.
    """
    kind = kind_of(argv)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _OURS and not SECRET_NAME.search(key)
    }
    return JobSpec(
        argv=tuple(argv),
        name=name or job_name(argv),
        cwd=Path.cwd(),
        environment=environment,
        priority=priority,
        gpus=_gpus(gpus, argv) if gpus or kind.uses_gpu else 0,
        after=tuple(after),
        held=held,
    )


def job_name(argv: Sequence[str]) -> str:
    """Return what the list calls a command line: its first file, else the command."""
    words = [word for word in argv[1:] if not word.startswith("-")]
    return Path(words[0]).stem[:NAME_LENGTH] if words else argv[0]


def _gpus(text: str | None, argv: Sequence[str]) -> int | tuple[str, ...]:
    """Read `2` as a number and `0,1` (or `0,`) as indexes; `menma train --gpus N` says it, too."""
    if text is None and "--gpus" in argv[:-1]:
        text = argv[argv.index("--gpus") + 1]
    if text is None:
        return 1
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--gpus {text}: a number of GPUs, or indexes such as 0,1")
    return tuple(parts) if "," in text else int(parts[0])
