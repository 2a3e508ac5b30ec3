"""What a job besides the training step takes: host memory by phase, disk, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.gpus import GIB, Gpu
from trainer.contract.memory_model.traffic import NVME_GB_S
from trainer.contract.memory_model.weights import num_parameters
from trainer.contract.memory_model.workload import Workload

PAGEABLE = 0.5
"""Share of the bandwidth from pinned memory that is left where memory is not pinned: a guess."""
FILE_ELEMENT = 2
"""Bytes of an element in a weight file that is not there to be looked at."""

Seconds = Mapping[str, float]
"""What takes time -> seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCost:
    """Caching, sampling, or the samples of a run."""

    clip: Clip
    """The largest one."""
    host_phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Phase of the job -> what takes RAM at its peak -> bytes; {}: that is told with training."""
    disk_parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes that are written for one item of that size."""
    once_s: Seconds = field(default_factory=dict)
    """Seconds before the first item; {} where the GPU's arithmetic is not known, as below."""
    item_s: Seconds = field(default_factory=dict)
    """Seconds of one item of that size."""
    items: int | None = None
    """How many there are; None: not known from the config."""
    total_s: float | None = None
    """Seconds of all items, with what is done once."""
    num_forwards: int = 0
    """Passes of a transformer for one item of that size, those that a step cache may spare
    included."""
    at_most: bool = False
    """A step cache may spare passes, so that it takes less time."""
    rounds: int = 0
    """How often a run does it; 0: it is a job of its own."""

    @property
    def host_phase(self) -> str:
        """The phase that takes most RAM; "" where training's is told."""
        sums = {name: sum(parts.values()) for name, parts in self.host_phases.items()}
        return max(sums, key=lambda name: sums[name], default="")

    @property
    def host_parts(self) -> Mapping[str, int]:
        """What takes RAM in that phase."""
        return self.host_phases.get(self.host_phase, {})

    @property
    def host_bytes(self) -> int:
        """RAM at the peak."""
        return sum(self.host_parts.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values; memory in GiB, disk in MiB."""
        return {
            "clip": str(self.clip),
            "items": self.items,
            "num_forwards": self.num_forwards,
            "at_most": self.at_most,
            "rounds": self.rounds,
            "host_gib": round(self.host_bytes / GIB, 3),
            "host_phase": self.host_phase,
            "host_phases_gib": {
                phase: {name: round(size / GIB, 3) for name, size in parts.items()}
                for phase, parts in self.host_phases.items()
            },
            "disk_mib": {name: round(size / 2**20, 3) for name, size in self.disk_parts.items()},
            "once_s": _rounded(self.once_s),
            "item_s": _rounded(self.item_s),
            "item_seconds": round(sum(self.item_s.values()), 4) if self.item_s else None,
            "total_seconds": None if self.total_s is None else round(self.total_s, 2),
        }


def whole_bytes(parts: Mapping[str, float]) -> dict[str, int]:
    """Return the parts that are there, in whole bytes."""
    return {name: round(size) for name, size in parts.items() if size}


def loading_seconds(size: float, gpu: Gpu) -> float:
    """Return the seconds to bring so many bytes from a weight file on a local SSD to the GPU."""
    return size / (NVME_GB_S * 1e9) + moving_seconds(size, gpu)


def moving_seconds(size: float, gpu: Gpu) -> float:
    """Return the seconds to move weights between RAM that is not pinned and the GPU."""
    return size / (gpu.host_gb_s * PAGEABLE * 1e9)


def file_bytes(path: Path | None, num_parameters: float) -> float:
    """Return the bytes of a weight file, or of a folder's shards; of bf16 where it is not there."""
    try:
        if path is not None and path.is_dir():
            return float(sum(shard.stat().st_size for shard in path.glob("*.safetensors")))
        if path is not None:
            return float(path.stat().st_size)
    except OSError:
        pass
    return FILE_ELEMENT * num_parameters


def transformer_file_bytes(work: Workload) -> float:
    """Return the bytes that are read for one transformer."""
    model = work.config.model
    path = model.transformer or model.transformer_high_noise
    return file_bytes(path, num_parameters(work.shape))


def _rounded(parts: Seconds) -> dict[str, float]:
    return {name: round(value, 4) for name, value in parts.items()}
