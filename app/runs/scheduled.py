"""`menma train` that srun or torchrun started many times: who owns the run, and what the rest do.

The copy of rank 0 does what `menma train` always does: it holds the run's lock, and its supervisor
starts the trainer, which finds its rank in the environment. The other copies become trainers at
once. They meet rank 0 at MASTER_ADDR and never write the run's own files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from app.runs.child import child_environment, trainer_command
from trainer.contract import slurm
from trainer.contract.errors import UserError


@dataclass(frozen=True, slots=True)
class Place:
    """This copy's place among all of them."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this copy owns the run."""
        return self.rank == 0

    def refuse(self, *, gpus: int | None, hostfile: Path | None, detach: bool) -> None:
        """Raise UserError for options that contradict being one of several."""
        given = {"--gpus": gpus is not None, "--hostfile": hostfile is not None, "--detach": detach}
        for option, is_given in given.items():
            if is_given:
                raise UserError(
                    f"{option}: this is process {self.rank} of {self.world_size} that srun or "
                    "torchrun started",
                    hint="leave it out: they say how many processes there are, and end with the "
                    "command",
                )

    def work(self, config: Path, settings: Sequence[str], resume: str) -> NoReturn:
        """Become the trainer of this rank; does not return.

        It reads the config anew and compares it with that of rank 0.
        """
        request = {"config": str(config.absolute()), "set": list(settings), "resume": resume}
        reading, writing = os.pipe()
        os.write(writing, json.dumps(request).encode())
        os.close(writing)
        os.dup2(reading, 0)
        os.close(reading)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not a child: whoever started us signals and watches this process.
        os.execve(sys.executable, trainer_command("train", Path("-")), child_environment())


def take_place(environ: MutableMapping[str, str]) -> Place | None:
    """Return this copy's place; None for a `menma train` like any other.

    A SIGTERM then acts as Ctrl-C does: srun and torchrun send it, and the run shall be saved.

    Raises:
        ConfigError: SLURM's variables cannot be understood.
        UserError: RANK or WORLD_SIZE is no number.
    """
    slurm.adopt(environ)
    rank, world_size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "1")
    if not world_size.isdecimal() or (int(world_size) > 1 and not rank.isdecimal()):
        raise UserError(
            f"RANK is {rank!r} and WORLD_SIZE {world_size!r} in the environment",
            hint="they are numbers where srun or torchrun starts several processes; else unset "
            "them",
        )
    if int(world_size) < 2:
        return None
    signal.signal(signal.SIGTERM, _as_interrupt)
    return Place(int(rank), int(world_size))


def _as_interrupt(number: int, frame: object) -> None:
    signal.raise_signal(signal.SIGINT)
