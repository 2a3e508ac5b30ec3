"""The machines of one run: a file with a line `HOST slots=N` for each, as for DeepSpeed and MPI.

# the machine that starts the run comes first
node1 slots=8
node2 slots=8
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem

KEY = "distributed.hostfile"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_EXAMPLE = "a line is HOST slots=N, e.g. node1 slots=8"


@dataclass(frozen=True, slots=True)
class Host:
    """One machine."""

    name: str
    """Name or address by which the other machines and ssh know it."""
    slots: int
    """Training processes there: one a GPU."""
    line: int
    """Where the file names it, from 1."""


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the machines in the order of the file.

    Raises:
        ConfigError: it cannot be read, or lines of it are wrong: all of them, with their numbers.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        hint = f"looked in {path.absolute().parent}"
        raise ConfigError(problems=[Problem(f"no such file: {path}", KEY, hint=hint)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(problems=[Problem(f"cannot read {path}: {error}", KEY)]) from error
    return parse_hostfile(text, path)


def parse_hostfile(text: str, path: Path) -> tuple[Host, ...]:
    """Return the machines that `text`, the content of `path`, names.

    A `#` begins a comment; empty lines say nothing.

    Raises:
        ConfigError: lines are wrong, a machine comes twice, or there is none.
    """
    hosts: dict[str, Host] = {}
    problems: list[Problem] = []
    # Not splitlines(): that also cuts at form feeds, and editors then count other lines.
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found = _host(words, number)
        if isinstance(found, Host):
            earlier = hosts.setdefault(found.name, found)
            if earlier is found:
                continue
            found = (f"{found.name} is in line {earlier.line} already", "name each machine once")
        message, hint = found
        problems.append(Problem(message, file=path, line=number, hint=hint))
    if not hosts and not problems:
        problems.append(Problem(f"{path} names no machine", KEY, hint=_EXAMPLE))
    if problems:
        raise ConfigError(problems=problems)
    return tuple(hosts.values())


def hosts_of(config: RunConfig) -> tuple[Host, ...]:
    """Return the machines of a run; none where it has no hostfile.

    Raises:
        ConfigError: the hostfile cannot be used.
    """
    path = config.distributed.hostfile
    return () if path is None else read_hostfile(path)


def world_size_of(config: RunConfig, num_gpus: int) -> int:
    """Return how many processes train together, on all machines.

    Args:
        config: the run's config.
        num_gpus: processes where neither a hostfile nor `distributed.num_processes` says it.

    Raises:
        ConfigError: the hostfile cannot be used.
    """
    hosts = hosts_of(config)
    if hosts:
        return sum(host.slots for host in hosts)
    return config.distributed.num_processes or num_gpus


def processes_here_of(config: RunConfig, num_gpus: int) -> int:
    """Return how many of these processes run on the machine that starts the run.

    Arguments and errors are those of `world_size_of`.
    """
    hosts = hosts_of(config)
    return hosts[0].slots if hosts else world_size_of(config, num_gpus)


def _host(words: list[str], line: int) -> Host | tuple[str, str]:
    """Return the machine of a line, or what is wrong with it and what to do."""
    name, *rest = words
    if not _NAME.fullmatch(name):
        return f"{name!r} is no name or address of a machine", _EXAMPLE
    if not rest:
        return f"{name} lacks its number of processes", _EXAMPLE
    if len(rest) > 1 or not rest[0].startswith("slots="):
        unknown = next((word for word in rest if not word.startswith("slots=")), rest[-1])
        hint = f"{_EXAMPLE}; user names, ports and keys belong into ~/.ssh/config"
        return f"cannot use {unknown!r}", hint
    number = rest[0].removeprefix("slots=")
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number[:9]) <= 1024:
        return f"slots is {number!r}, not a number from 1 to 1024", _EXAMPLE
    return Host(name, int(number), line)
