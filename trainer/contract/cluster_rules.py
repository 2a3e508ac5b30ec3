"""What the settings for several machines need of each other and of the hostfile."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.hostfile import KEY, hosts_of


def cluster_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what contradicts a hostfile; the file itself is not looked at."""
    distributed = config.distributed
    if distributed.hostfile is None:
        return
    if distributed.engine == "local":
        yield Problem(
            "the local engine is one process on one machine",
            KEY,
            hint='leave hostfile out, or set distributed.engine = "deepspeed"',
        )
    if distributed.num_processes is not None:
        yield Problem(
            "the hostfile says how many processes each machine runs, and num_processes says it "
            "once more",
            "distributed.num_processes",
            hint="leave num_processes (--gpus) out, or hostfile",
        )


def hostfile_problems(config: RunConfig) -> list[Problem]:
    """Return what is wrong with the hostfile, as far as the file tells."""
    try:
        hosts = hosts_of(config)
    except ConfigError as error:
        return list(error.problems)
    if len({host.slots for host in hosts}) < 2:
        return []
    least = min(host.slots for host in hosts)
    listed = ", ".join(f"{host.name} has {host.slots}" for host in hosts[:8])
    return [
        Problem(
            f"the machines run unequal numbers of processes: {listed}. Menma trains on machines "
            "that run the same number each",
            KEY,
            hint=f"write slots={least} on every line of {config.distributed.hostfile}",
        )
    ]
