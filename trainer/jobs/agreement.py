"""Whether the processes of one run stand on the same ground, above all those of several machines.

Different versions or data do not fail: they train something that nobody asked for.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from trainer.contract.errors import ConfigError, DataError
from trainer.contract.files import disk_errors
from trainer.engine.process_group import World

_SEEN_WITHIN_S = 90.0
"""Network file systems remember for up to a minute that a file was not there."""


def require_same(world: World, facts: Mapping[str, str]) -> list[str]:
    """Compare facts over all ranks; return the machine of each rank. A collective call.

    Args:
        world: this process's place.
        facts: name -> value, in the same order everywhere; short (all of them 4 KiB at most).

    Raises:
        ConfigError: on every rank, some fact differs; names the machines on either side.
    """
    if world.world_size == 1:
        return [socket.gethostname()]
    own = {"host": socket.gethostname(), **facts}
    told = [json.loads(text) for text in world.gather_texts(json.dumps(own))]
    hosts = [str(each["host"]) for each in told]
    differing = []
    for name in facts:
        values: dict[str, list[str]] = {}
        for rank, each in enumerate(told):
            values.setdefault(str(each.get(name)), []).append(f"rank {rank} on {hosts[rank]}")
        if len(values) > 1:
            sides = "; ".join(
                f"{value or 'unknown'}: {_some(who)}" for value, who in values.items()
            )
            differing.append(f"{name} ({sides})")
    if differing:
        raise ConfigError(
            "the processes of this run do not agree on " + ", ".join(differing),
            hint="each machine needs the same installation, config, weights and caches; a shared "
            "folder is the simplest way to it",
        )
    return hosts


def require_shared_folder(world: World, hosts: list[str], folder: Path, timeout_s: float) -> None:
    """Make sure that every machine sees the folder of the run. A collective call.

    Checkpoints are written by all ranks into one folder, and read by all of them.

    Args:
        world: this process's place.
        hosts: the machine of each rank.
        folder: of the run.
        timeout_s: how long a rank waits for the others.

    Raises:
        DataError: on every rank, some machine does not see what rank 0 wrote; names it.
        DiskError: rank 0 cannot write there.
    """
    if world.world_size == 1:
        return
    mark = folder / f".seen-by-all-{world.text_of_rank_0(secrets.token_hex(8))}"
    if world.rank == 0:
        with disk_errors(mark):
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    world.barrier()
    sees = _appears(mark, min(_SEEN_WITHIN_S, timeout_s / 2))  # the others wait for the answer
    missing = sorted(
        {
            hosts[rank]
            for rank, answer in enumerate(world.gather_texts("yes" if sees else "no"))
            if answer != "yes"
        }
    )
    if world.rank == 0:
        with suppress(OSError):
            mark.unlink()
    if missing:
        raise DataError(
            f"{', '.join(missing)} does not see the run directory that {hosts[0]} writes: {folder}",
            hint="set output.runs_dir to a folder that all machines share; see docs/clusters.md",
        )


def _appears(file: Path, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while True:
        with suppress(OSError):
            if file.name in {entry.name for entry in file.parent.iterdir()}:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
