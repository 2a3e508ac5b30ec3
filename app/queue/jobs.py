"""What a queued job is: a `menma` command line, what it waits for, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.runs.state import State
from trainer.contract.errors import UserError
from trainer.contract.registry import nearest

CPU = "cpu"
"""What a job that wants a GPU takes on a machine without one: one such job at a time."""
LIGHT = "light"
"""What a job that needs no GPU takes: one such job at a time, beside the others."""


@dataclass(frozen=True, slots=True)
class JobKind:
    """A command that can be queued."""

    name: str
    uses_gpu: bool
    help: str
    starts_run: bool = False
    """The command starts a run that goes on without it; the job lasts as long as the run."""


KINDS = {
    kind.name: kind
    for kind in (
        JobKind("cache", True, "encode clips and captions"),
        JobKind("train", True, "train", starts_run=True),
        JobKind("sample", True, "generate videos"),
        JobKind("eval", True, "measure runs"),
        JobKind("merge", False, "bake LoRAs into a base model"),
        JobKind("lora", False, "any tool on LoRA files"),
    )
}
"""First word of the command line -> its kind."""


def kind_of(argv: Sequence[str]) -> JobKind:
    """Return the kind of a command line.

    Raises:
        UserError: there is none, or it cannot be queued.
    """
    if not argv:
        raise UserError(
            "no command to queue", hint="for example: menma queue add train configs/my.toml"
        )
    kind = KINDS.get(argv[0])
    if kind is None:
        known = ", ".join(KINDS)
        raise UserError(
            f"{argv[0]!r} cannot be queued; one of: {known}", hint=nearest(argv[0], KINDS)
        )
    return kind


class JobState(StrEnum):
    """What a job is doing; computed on every read."""

    QUEUED = "queued"
    HELD = "held"
    BLOCKED = "blocked"
    """Something it waits for did not end well."""
    CANCELLED = "cancelled"
    STARTING = "starting"
    RUNNING = "running"
    STALLED = "stalled"
    STOPPING = "stopping"
    ORPHANED = "orphaned"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"

    @property
    def is_live(self) -> bool:
        """Whether a process works for it, or will in a moment."""
        return self.value in _RUN_STATES and State(self.value).is_live

    @property
    def has_ended(self) -> bool:
        """Whether it will never run again."""
        return self is JobState.CANCELLED or (self.value in _RUN_STATES and not self.is_live)

    @property
    def sign(self) -> str:
        """One character, so that nothing depends on colour."""
        own = {"queued": ".", "held": "=", "blocked": "x", "cancelled": "-"}
        return own[self.value] if self.value in own else State(self.value).sign


_RUN_STATES = frozenset(state.value for state in State)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What somebody wants done."""

    argv: tuple[str, ...]
    """Command line without `menma`."""
    name: str
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    """Larger goes first."""
    gpus: int | tuple[str, ...] = 1
    """How many GPUs it takes, or which ones; 0: none."""
    after: tuple[int, ...] = ()
    """Jobs that must be done before."""
    held: bool = False
    """It waits until it is resumed."""

    @property
    def kind(self) -> JobKind:
        """The kind of the command line."""
        return kind_of(self.argv)


@dataclass(frozen=True, slots=True)
class Claim:
    """One start of a job, handed to a worker."""

    token: str
    """Names this start; the supervisors that it starts write it down."""
    folder: Path
    time: float
    devices: tuple[str, ...]
    """GPUs by index, or `CPU`, or `LIGHT`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    state: JobState
    why: str = ""
    time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the database holds it."""

    id: int
    spec: JobSpec
    position: float
    created: float
    cancelled: float | None = None
    """When somebody cancelled it; one that runs is then asked to stop."""
    claim: Claim | None = None
    outcome: Outcome | None = None

    @property
    def waits(self) -> bool:
        """Whether it was never started and may be."""
        return self.claim is None and self.cancelled is None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        spec, claim = self.spec, self.claim
        return {
            "id": self.id,
            "kind": spec.kind.name,
            "name": spec.name,
            "command": ["menma", *spec.argv],
            "cwd": str(spec.cwd),
            "priority": spec.priority,
            "gpus": spec.gpus if isinstance(spec.gpus, int) else list(spec.gpus),
            "after": list(spec.after),
            "created": self.created,
            "devices": list(claim.devices) if claim else [],
            "claimed": claim.time if claim else None,
            "folder": str(claim.folder) if claim else None,
        }
