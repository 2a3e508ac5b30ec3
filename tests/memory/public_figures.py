"""Peaks that others have published, and the estimate for the same settings.

    python tests/memory/public_figures.py       prints the table of docs/estimate.md

The figures are of other programs, whose blocks keep more or less than Menma's: a difference says
something about the programs as well as about the estimate. No figure of Menma itself on a GPU is
among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from memory_configs import make_config

from trainer.contract.memory_model.gpus import GIB
from trainer.contract.memory_model.phases import phases
from trainer.contract.memory_model.workload import workload_of

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published peak of training, with enough told to estimate the same."""

    source: str
    setting: dict[str, Any]
    """Arguments of `make_config`; what the source does not say is Menma's default."""
    swapped: int = 0
    measured_gib: float
    claimed: bool = False
    """Told without a measurement."""
    unit: str = "GiB"
    remark: str = ""

    @property
    def estimated_gib(self) -> float:
        """The estimate, CUDA's context included."""
        work = workload_of(make_config(**self.setting))
        (training,) = (
            phase
            for phase in phases(replace(work, swapped=self.swapped))
            if phase.name == "training"
        )
        return training.peak_bytes / GIB

    @property
    def error(self) -> float:
        """Estimated / measured - 1."""
        return self.estimated_gib / self.measured_gib - 1

    @property
    def words(self) -> str:
        """The setting, in short."""
        given = {"batch": 1, "rank": 32, **self.setting}
        width, height = given["resolution"]
        parts = [
            given["variant"].removeprefix("wan"),
            f"{width}x{height}x{given['frames']}",
            f"rank {given['rank']}",
        ]
        memory = given.get("memory", {})
        if given["batch"] > 1:
            parts.append(f"batch {given['batch']}")
        if "weight_format" in memory:
            parts.append(memory["weight_format"])
        if not memory.get("gradient_checkpointing", True):
            parts.append("no checkpointing")
        if memory.get("offload_checkpoints"):
            parts.append("checkpoints in RAM")
        if self.swapped:
            parts.append(f"{self.swapped} blocks swapped")
        return ", ".join(parts)


SIMPLETUNER: dict[str, Any] = {
    "variant": "wan2.1-t2v-1.3b",
    "resolution": (480, 480),
    "frames": 81,
    "rank": 16,
}
FP8 = {"weight_format": "fp8_scaled"}
FIGURES = (
    Figure(
        source="SimpleTuner, H100, RamTorch, checkpointing of every block",
        setting=SIMPLETUNER,
        swapped=30,
        measured_gib=4.73,
        remark="streams single layers, not whole blocks",
    ),
    Figure(
        source="SimpleTuner, H100, RamTorch, no checkpointing",
        setting={**SIMPLETUNER, "memory": {"gradient_checkpointing": False}},
        swapped=30,
        measured_gib=71.9,
        remark="its blocks keep more: diffusers' layout, float32 copies",
    ),
    Figure(
        source="SimpleTuner, H100, RamTorch, fp8 (torchao), checkpointing of every block",
        setting={**SIMPLETUNER, "memory": {"weight_format": "fp8"}},
        swapped=30,
        measured_gib=5.98,
        remark="its fp8 takes more than its bf16 does, above",
    ),
    Figure(
        source="SimpleTuner, H100, RamTorch, fp8 (torchao), no checkpointing",
        setting={
            **SIMPLETUNER,
            "memory": {"weight_format": "fp8", "gradient_checkpointing": False},
        },
        swapped=30,
        measured_gib=73.57,
        remark="its blocks keep more, and its fp8 takes more than its bf16 does",
    ),
    Figure(
        source="DiffSynth-Studio, README",
        setting={
            "variant": "wan2.1-t2v-1.3b",
            "resolution": (832, 480),
            "frames": 81,
            "rank": 16,
        },
        measured_gib=16 * GB / GIB,
        claimed=True,
        unit="GB",
        remark="a card's size rather than a peak",
    ),
    Figure(
        source="diffusion-pipe issue 297, RTX 3090",
        setting={
            "variant": "wan2.1-t2v-14b",
            "resolution": (384, 384),
            "frames": 49,
            "batch": 2,
            "memory": FP8,
        },
        swapped=32,
        measured_gib=15 * GB / GIB,
        unit="GB",
        remark="plain fp8; its largest bucket may not have been reached",
    ),
    Figure(
        source="diffusion-pipe issue 153",
        setting={"variant": "wan2.1-i2v-14b", "resolution": (1280, 720), "frames": 81},
        measured_gib=80 * GB / GIB,
        claimed=True,
        unit="GB",
        remark='"borderline" on 80 GB; rank not told',
    ),
    Figure(
        source="musubi-tuner pull request 537",
        setting={
            "variant": "wan2.2-t2v-a14b",
            "resolution": (1280, 720),
            "frames": 25,
            "memory": FP8,
        },
        measured_gib=46.4 * GB / GIB,
        unit="GB",
        remark="rank and attention kernel not told",
    ),
    Figure(
        source="musubi-tuner pull request 537, checkpoints in RAM",
        setting={
            "variant": "wan2.2-t2v-a14b",
            "resolution": (1280, 720),
            "frames": 25,
            "memory": {**FP8, "offload_checkpoints": True},
        },
        measured_gib=34.4 * GB / GIB,
        unit="GB",
        remark="rank and attention kernel not told",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A setting that is known to run on a card."""

    source: str
    setting: dict[str, Any] = field(default_factory=dict)
    card_gib: float

    @property
    def estimated_gib(self) -> float:
        """The estimate, CUDA's context included."""
        row = Figure(source=self.source, setting=self.setting, measured_gib=self.card_gib)
        return row.estimated_gib


BOUNDS = (
    Bound(
        source="diffusion-pipe issue 340: 5B, 512x512x81, RTX 4090",
        setting={"variant": "wan2.2-ti2v-5b", "resolution": (512, 512), "frames": 81},
        card_gib=23.6,
    ),
    Bound(
        source="diffusion-pipe issue 340: 5B, 1280x704x81, RTX 4090",
        setting={"variant": "wan2.2-ti2v-5b", "resolution": (1280, 704), "frames": 81},
        card_gib=23.6,
    ),
    Bound(
        source="musubi-tuner docs: 14B, fp8, 720x1280 images, 24 GB",
        setting={
            "variant": "wan2.1-t2v-14b",
            "resolution": (1280, 720),
            "frames": 1,
            "memory": {"weight_format": "fp8"},
        },
        card_gib=23.6,
    ),
)


def slope_gib(frames: tuple[int, int] = (21, 41)) -> float:
    """Return what 5 latent frames more take on 14B at 512x512 (diffusion-pipe issue 153)."""
    few, many = (
        Figure(
            source="",
            setting={"variant": "wan2.1-t2v-14b", "resolution": (512, 512), "frames": number},
            measured_gib=1,
        ).estimated_gib
        for number in frames
    )
    return many - few


MEASURED_SLOPE_GIB = 3.5 * GB / GIB


def table() -> str:
    """Return the rows for docs/estimate.md."""
    lines = [
        "| source | setting | published, GiB | estimate, GiB | error | remark |",
        "|---|---|---|---|---|---|",
    ]
    for row in FIGURES:
        kind = " (claimed)" if row.claimed else ""
        lines.append(
            f"| {row.source} | {row.words} | {row.measured_gib:.1f}{kind} | "
            f"{row.estimated_gib:.1f} | {100 * row.error:+.0f} % | {row.remark} |"
        )
    slope = slope_gib()
    error = slope / MEASURED_SLOPE_GIB - 1
    lines.append(
        f"| diffusion-pipe issue 153 | 2.1-t2v-14b, 512x512, 41 frames less 21 | "
        f"{MEASURED_SLOPE_GIB:.1f} | {slope:.1f} | {100 * error:+.0f} % | a difference: neither "
        "weights nor rank matter |"
    )
    return "\n".join(lines)


def bounds_table() -> str:
    """Return the rows of what is known to run."""
    lines = ["| known to run | card, GiB | estimate, GiB |", "|---|---|---|"]
    lines += [f"| {row.source} | {row.card_gib:.1f} | {row.estimated_gib:.1f} |" for row in BOUNDS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print()
    print(bounds_table())
