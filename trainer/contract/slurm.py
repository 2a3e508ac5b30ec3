"""What SLURM tells the tasks of `srun`, in the words that the trainer reads.

Variables as `man srun`, "OUTPUT ENVIRONMENT VARIABLES", has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from trainer.contract.errors import ConfigError

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below what Linux gives out by itself (32768 and up)
_MAX_HOSTS = 100_000
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def is_task(environ: Mapping[str, str]) -> bool:
    """Tell whether `srun` started this process as one of several, and nobody in between."""
    tasks = environ.get(_tasks(environ), "")
    return (
        "RANK" not in environ
        and "SLURM_STEP_ID" in environ
        and "SLURM_PROCID" in environ
        and tasks.isdecimal()
        and int(tasks) > 1
    )


def adopt(environ: MutableMapping[str, str]) -> None:
    """Give a task of `srun` the variables that torchrun would have set; others stay as they are.

    MASTER_ADDR and MASTER_PORT that are set already are kept.

    Raises:
        ConfigError: SLURM's variables cannot be understood.
    """
    if not is_task(environ):
        return
    place = {
        "RANK": _number(environ, "SLURM_PROCID"),
        "WORLD_SIZE": _number(environ, _tasks(environ)),
        "LOCAL_RANK": _number(environ, "SLURM_LOCALID"),
    }
    environ.setdefault("MASTER_ADDR", _first_host(environ))
    environ.setdefault("MASTER_PORT", str(_port(environ)))
    environ.update({name: str(value) for name, value in place.items()})


def expand_nodelist(text: str) -> list[str]:
    """Return the names in a list of SLURM's: `node[01-03,07],x1` are five.

    Raises:
        ConfigError: brackets do not match, or a range runs backwards.
    """
    names: list[str] = []
    for part in _split(text):
        names += _expand(part, text)
        if len(names) > _MAX_HOSTS:
            raise _not_a_list(text)
    return names


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth not in {0, 1}:
            raise _not_a_list(text)
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    parts.append(current)
    if depth or not all(parts):
        raise _not_a_list(text)
    return parts


def _expand(part: str, text: str) -> list[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, after = rest.partition("]")
    names: list[str] = []
    for piece in inside.split(","):
        found = _RANGE.fullmatch(piece)
        if found is None:
            raise _not_a_list(text)
        first, last = found[1], found[2] or found[1]
        if not int(first) <= int(last) < int(first) + _MAX_HOSTS:
            raise _not_a_list(text)
        width = len(first)  # leading zeros are part of the name
        names += [f"{before}{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    # More brackets may follow: rack[1-2]node[01-04].
    return [name + end for name in names for end in (_expand(after, text) if after else [""])]


def _tasks(environ: Mapping[str, str]) -> str:
    """Return the variable with the number of tasks of this step.

    In the shell of an interactive job, a step of one task, SLURM_NTASKS is the whole job's.
    """
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _first_host(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return expand_nodelist(environ[name])[0]
    raise ConfigError(
        "SLURM does not say which machines the job has (SLURM_JOB_NODELIST is empty)",
        hint="set MASTER_ADDR to the machine of the first task",
    )


def _port(environ: Mapping[str, str]) -> int:
    """Return a port that all tasks agree on; jobs and steps that share a machine rarely meet."""
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    return _FIRST_PORT + (job + 1009 * step) % _NUM_PORTS


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"SLURM's variable {name} is {text!r}, not a number",
            hint="start the processes with srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
            "and MASTER_PORT yourself",
        )
    return int(text)


def _not_a_list(text: str) -> ConfigError:
    return ConfigError(
        f"cannot understand SLURM's list of machines {text!r}",
        hint="set MASTER_ADDR to the machine of the first task",
    )
