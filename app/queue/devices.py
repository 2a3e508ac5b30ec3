"""Which GPUs a job gets, so that two jobs never share one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from app.queue.jobs import CPU, LIGHT, JobSpec

IDLE_SHARE = 0.1
"""A GPU of which more than this share is in use belongs to a program that is not ours."""


def pick(spec: JobSpec, gpus: Sequence[str], taken: Collection[str]) -> tuple[str, ...] | None:
    """Return the places of a job; None: not now.

    Args:
        spec: the job.
        gpus: indexes of this machine's GPUs; none: it computes on its CPU.
        taken: places of the jobs that run, and GPUs that something else uses.
    """
    if spec.gpus == 0:
        wanted: tuple[str, ...] = (LIGHT,)
    elif not gpus:
        wanted = (CPU,)
    elif isinstance(spec.gpus, tuple):
        wanted = spec.gpus
    else:
        free = [gpu for gpu in gpus if gpu not in taken]
        return tuple(free[: spec.gpus]) if len(free) >= spec.gpus else None
    return None if any(place in taken for place in wanted) else wanted


def obstacle(spec: JobSpec, gpus: Sequence[str]) -> str:
    """Return why a job can never start on this machine; empty when it can."""
    if not gpus:
        return ""
    if isinstance(spec.gpus, tuple):
        absent = [gpu for gpu in spec.gpus if gpu not in gpus]
        return f"there is no GPU {', '.join(absent)}" if absent else ""
    if spec.gpus > len(gpus):
        return f"it wants {spec.gpus} GPUs and there are {len(gpus)}"
    return ""


def environment(devices: Sequence[str]) -> dict[str, str]:
    """Return the variables that make a process see these places only."""
    if devices == (LIGHT,):
        return {"CUDA_VISIBLE_DEVICES": ""}
    if devices == (CPU,):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
