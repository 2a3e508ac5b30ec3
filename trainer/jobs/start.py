"""Where the processes of one training run are: here, beside each other, or on several machines."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.contract import slurm
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.hostfile import KEY, hosts_of, world_size_of
from trainer.contract.sequence_rules import SEQUENCE_KEY, divisors
from trainer.engine import process_group
from trainer.engine.addresses import is_this_machine
from trainer.engine.cluster import run_cluster
from trainer.engine.launch import run_workers
from trainer.jobs.build import num_processes, pick_device


def take_place() -> None:
    """Let a task of `srun` know its place as one of several; others know it already.

    Raises:
        ConfigError: SLURM's variables cannot be understood.
    """
    slurm.adopt(os.environ)


def run_elsewhere(config: RunConfig, file: Path) -> int | None:
    """Start the processes that `config` asks for, wait, and return the exit code of the run.

    `file` is where the config was read from; other machines have to see it, too.

    None: this process itself is the run, or one of its processes.

    Raises:
        ConfigError: this machine, or how this process was started, does not fit the config.
        RunError: a machine of the hostfile cannot be reached.
    """
    hosts = hosts_of(config)
    if process_group.in_group():
        started, wanted = int(os.environ["WORLD_SIZE"]), world_size_of(config, 0)
        if hosts and started != wanted:
            raise ConfigError(
                f"{KEY} names {wanted} processes, and {started} were started",
                hint="leave the hostfile out where srun or torchrun starts the processes",
            )
        return None
    command = [sys.executable, "-m", "trainer", *sys.argv[1:]]
    if len(hosts) > 1:
        return run_cluster(command, hosts, file)
    if hosts and not is_this_machine(hosts[0].name):
        raise ConfigError(
            f"{KEY}: the only machine, {hosts[0].name}, is not this one",
            hint="start the run there",
        )
    processes = hosts[0].slots if hosts else num_processes(config)
    return run_workers(command, processes) if processes > 1 else None


def machine_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield why this machine cannot run its share of the processes.

    A hostfile that is wrong by itself is told elsewhere.
    """
    try:
        hosts = hosts_of(config)
        device = pick_device(config)
    except ConfigError:
        return
    if len(hosts) > 1 and shutil.which("ssh") is None and not process_group.in_group():
        yield Problem(
            "ssh is not on the PATH, and other machines are reached with it",
            KEY,
            hint="install it (Debian, Ubuntu: openssh-client)",
        )
    together = sum(host.slots for host in hosts)
    size = config.distributed.sequence_parallel
    if together % size:
        yield Problem(
            f"the {together} processes of {len(hosts)} machines cannot be cut into groups of "
            f"{size} that share clips",
            SEQUENCE_KEY,
            hint=f"set it to one of {', '.join(map(str, divisors(together)))}",
        )
    wanted = hosts[0].slots if hosts else config.distributed.num_processes or 0
    visible = torch.cuda.device_count() if device.type == "cuda" else wanted
    if wanted > visible:
        gpus = f"{visible} GPU{'' if visible == 1 else 's'}"
        yield Problem(
            f"{wanted} processes, and this machine has {gpus}: each needs one of its own",
            KEY if hosts else "distributed.num_processes",
            hint=f"set it to {visible} or fewer; CUDA_VISIBLE_DEVICES hides GPUs",
        )
