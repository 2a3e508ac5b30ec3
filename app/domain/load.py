"""What GPUs and RAM do at this moment, of the machine and of a run's own processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from app.domain.environment import nvidia_smi
from app.runs.processes import boot_id, host_name, same_boot
from app.runs.status import Status, read_status
from trainer.contract.run_dir import RunDir

GIB = 2**30
FIELDS = (
    "index", "uuid", "memory.used", "memory.total", "utilization.gpu", "temperature.gpu",
    "power.draw",
)  # fmt: skip
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """One GPU; None is what its driver does not tell."""

    index: str
    used_gib: float | None
    total_gib: float | None
    busy_percent: float | None
    celsius: float | None
    watts: float | None


@dataclass(frozen=True, slots=True)
class Load:
    """A machine at this moment."""

    gpus: tuple[GpuLoad, ...]
    no_gpu: str
    """Why there is none to show; empty where there is one."""
    ram_used_gib: float
    ram_total_gib: float
    run_gib: float | None = None
    """Resident memory of the run's processes; what they share counts in each. None: none lives."""
    elsewhere: str = ""
    """The machine that the run is on, where it is another one."""


def read_load(run: RunDir | None = None) -> Load:
    """Look at this machine.

    Args:
        run: whose processes and GPUs are looked at; None: all GPUs, no processes.
    """
    import psutil

    memory = psutil.virtual_memory()
    status = read_status(run) if run is not None else None
    here = status is None or same_boot(status.boot_id, boot_id()) or status.host == host_name()
    visible = _visible(run) if run is not None and here else None
    gpus, no_gpu = _gpus(visible)
    return Load(
        gpus=gpus,
        no_gpu=no_gpu,
        ram_used_gib=(memory.total - memory.available) / GIB,
        ram_total_gib=memory.total / GIB,
        run_gib=_tree_gib(status) if status is not None and here else None,
        elsewhere="" if here or status is None else status.host,
    )


def _gpus(visible: Sequence[str] | None) -> tuple[tuple[GpuLoad, ...], str]:
    if visible is not None and not visible:
        return (), "the run was started without one"
    rows, problem = nvidia_smi(FIELDS)
    if problem:
        return (), problem
    known = [row for row in rows if visible is None or row[0] in visible or _named(row[1], visible)]
    # A container may number its GPUs anew, so that the run's numbers are not this machine's.
    return tuple(_gpu(row) for row in known or rows), "" if rows else "the driver lists none"


def _named(uuid: str, visible: Sequence[str]) -> bool:
    return any(uuid.startswith(name) for name in visible if name.startswith("GPU-"))


def _gpu(row: Sequence[str]) -> GpuLoad:
    used, total, busy, celsius, watts = (_number(cell) for cell in row[2:])
    return GpuLoad(
        index=row[0],
        used_gib=None if used is None else used / 1024,
        total_gib=total / 1024 if total else None,
        busy_percent=busy,
        celsius=celsius,
        watts=watts,
    )


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # "[N/A]", "[Not Supported]"
        return None


def _visible(run: RunDir) -> list[str] | None:
    """Return the GPUs that the run was allowed to see; None: all."""
    try:
        content = json.loads(run.command.read_text(encoding="utf-8"))
        told = content["env"].get(VISIBLE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(told, str):
        return None
    return [name for part in told.split(",") if (name := part.strip()) and name != "-1"]


def _tree_gib(status: Status) -> float | None:
    import psutil

    if status.trainer is None or not status.trainer.is_alive():
        return None
    total = 0
    with suppress(psutil.Error):
        trainer = psutil.Process(status.trainer.pid)
        for process in (trainer, *trainer.children(recursive=True)):
            with suppress(psutil.Error):  # it has ended meanwhile
                total += process.memory_info().rss
    return total / GIB if total else None
