"""What an estimate says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer.contract.expert_turns import Turns
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.costs import JobCost
from trainer.contract.memory_model.gpus import GIB, Gpu

Verdict = Literal["fits", "tight", "does not fit", "unknown"]

PHASES = ("captions", "latents", "training", "sampling")
"""What a config goes through: `menma cache` (two phases), `menma train`, samples."""
MARGIN_SHARE = 0.05
"""Of the peak: the error that is to be expected where nothing has been measured yet."""
MEASURED_MARGIN_SHARE = 0.03
"""The same where runs on this machine correct the estimate."""
MARGIN_LEAST = 256 * 2**20
HOST_MARGIN_SHARE = 0.1
"""Of the RAM: what the system, the file cache and fragmentation add is not modelled."""
HOST_MARGIN_LEAST = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The peak of one phase and what it is made of."""

    name: str
    parts: Mapping[str, int]
    """What takes memory at the peak -> bytes; they sum to the peak."""

    @property
    def peak_bytes(self) -> int:
        """Memory of the GPU, context included: what `nvidia-smi` would show."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Memory, disk and time of a config on one GPU, for each process."""

    variant: str
    clip: Clip
    """The largest batch."""
    tokens: int
    """Of one of its items."""
    world_size: int
    gpu: Gpu | None
    phases: tuple[Phase, ...]
    host_parts: Mapping[str, int]
    """Host memory of all processes of this machine at the peak."""
    disk_parts: Mapping[str, int]
    """Files of the run; caches an item."""
    step_seconds: float | None
    """Of one weight update; None where the GPU's arithmetic is not known."""
    step_parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by what takes them."""
    correction: float = 1.0
    """Measured / estimated peaks of earlier runs, by which phases were multiplied; 1: none."""
    measured_runs: int = 0
    """Runs behind `correction`."""
    num_blocks: int = 0
    """Of the transformer."""
    automatic: Mapping[str, bool | int] = field(default_factory=dict)
    """What `auto` became: fields of `[memory]` -> values that were chosen for this GPU."""
    jobs: Mapping[str, JobCost] = field(default_factory=dict)
    """`caching`, `sampling` (`menma sample`) and, where the run makes some, `samples`; {} where
    only training was asked for."""
    machine_bytes: int | None = None
    """RAM of the machine; None: not known."""

    turns: Turns | None = None
    """How two experts share the steps; None: one is trained, or only draws of the timestep sampler
    would tell (`menma check` makes them)."""

    @property
    def deciding(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all phases."""
        return self.deciding.peak_bytes

    @property
    def parts(self) -> Mapping[str, int]:
        """What the highest peak is made of."""
        return self.deciding.parts

    @property
    def margin_bytes(self) -> int:
        """By how much the peak may be wrong."""
        share = MEASURED_MARGIN_SHARE if self.measured_runs else MARGIN_SHARE
        return max(round(self.peak_bytes * share), MARGIN_LEAST)

    @property
    def verdict(self) -> Verdict:
        """Whether it fits the GPU: with the margin, only without it, or not at all."""
        if self.gpu is None:
            return "unknown"
        return _verdict(self.peak_bytes, self.margin_bytes, self.gpu.memory_bytes)

    @property
    def host_bytes(self) -> int:
        """Host memory of all processes of this machine while training."""
        return sum(self.host_parts.values())

    @property
    def host_peaks(self) -> Mapping[str, int]:
        """Host memory of each job; the samples of a run are part of training."""
        own = {name: job.host_bytes for name, job in self.jobs.items() if job.host_phases}
        return {"training": self.host_bytes, **own}

    @property
    def host_margin_bytes(self) -> int:
        """By how much the highest of these may be wrong."""
        return max(round(max(self.host_peaks.values()) * HOST_MARGIN_SHARE), HOST_MARGIN_LEAST)

    @property
    def host_verdict(self) -> Verdict:
        """Whether the job that takes most RAM fits: with the margin, only without it, or not."""
        if self.machine_bytes is None:
            return "unknown"
        return _verdict(max(self.host_peaks.values()), self.host_margin_bytes, self.machine_bytes)

    def phase(self, name: str) -> Phase:
        """Return a phase.

        Raises:
            KeyError: there is none of that name.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def only(self, *names: str) -> Estimate:
        """Return the same for some of the phases; peak, margin and verdict are then theirs."""
        return replace(self, phases=tuple(self.phase(name) for name in names))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; memory in GiB."""
        return {
            "variant": self.variant,
            "clip": str(self.clip),
            "batch": self.clip.batch,
            "tokens": self.tokens,
            "world_size": self.world_size,
            "gpu": None if self.gpu is None else self.gpu.name,
            "gpu_gib": None if self.gpu is None else self.gpu.memory_gib,
            "verdict": self.verdict,
            "peak_gib": _gib(self.peak_bytes),
            "margin_gib": _gib(self.margin_bytes),
            "deciding": self.deciding.name,
            "phases": {
                phase.name: {
                    "peak_gib": _gib(phase.peak_bytes),
                    "parts_gib": {name: _gib(size) for name, size in phase.parts.items()},
                }
                for phase in self.phases
            },
            "host_gib": _gib(self.host_bytes),
            "host_parts_gib": {name: _gib(size) for name, size in self.host_parts.items()},
            "disk_gib": {name: _gib(size) for name, size in self.disk_parts.items()},
            "step_seconds": None if self.step_seconds is None else round(self.step_seconds, 3),
            "step_parts_s": {name: round(value, 3) for name, value in self.step_parts.items()},
            "correction": round(self.correction, 4),
            "measured_runs": self.measured_runs,
            "automatic": dict(self.automatic),
            "jobs": {name: job.to_json() for name, job in self.jobs.items()},
            "host": {
                "peaks_gib": {name: _gib(size) for name, size in self.host_peaks.items()},
                "margin_gib": _gib(self.host_margin_bytes),
                "machine_gib": None if self.machine_bytes is None else _gib(self.machine_bytes),
                "verdict": self.host_verdict,
            },
            "experts": None
            if self.turns is None
            else {
                "high_noise_share": round(self.turns.high_noise_share, 6),
                "steps_per_turn": self.turns.steps_per_turn,
            },
        }


def memory_verdict(peak_bytes: int, gpu: Gpu) -> Verdict:
    """Return whether an estimated peak fits a GPU, with the margin of what is not measured."""
    margin = max(round(peak_bytes * MARGIN_SHARE), MARGIN_LEAST)
    return _verdict(peak_bytes, margin, gpu.memory_bytes)


def _verdict(peak: int, margin: int, has: int) -> Verdict:
    if peak > has:
        return "does not fit"
    return "fits" if peak + margin <= has else "tight"


def _gib(size: float) -> float:
    return round(size / GIB, 3)
