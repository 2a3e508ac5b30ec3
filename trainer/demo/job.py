"""The job `demo`: clips of a new pattern, cache, look, train a LoRA, look again, merge; a summary.

Caching, training and looking are the jobs `cache`, `train` and `eval`, in processes of their own,
as for any config; so what the demo shows is what a user's own runs do.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.clipart.scenes import TRIGGER
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.files import write_json, write_text
from trainer.contract.jobs import CacheRequest, DemoRequest, EvalRequest, TrainRequest
from trainer.contract.lora_use import LoRAUse
from trainer.contract.options import Options
from trainer.demo.clips import concept_scenes, known_scenes
from trainer.demo.configs import NAME, DemoPlan, write_config
from trainer.demo.merged import largest_difference
from trainer.jobs.base import Emit
from trainer.jobs.child import run_job
from trainer.jobs.merge import merge_loras
from trainer.models.wan.loading import load_transformer
from trainer.nano.files import asset
from trainer.nano.scene_files import write_scenes
from trainer.sampling.sheet import Row, write_frames, write_sheet
from trainer.sampling.video_io import read_video

MIN_LOSS_DROP = 0.3
MIN_CONCEPT = 0.7
MAX_LEAK = 0.1
MAX_MERGE_DIFFERENCE = 1e-4
_MARKER = ".menma-demo"
_NUM_SHOWN = 3
"""Shots with the trigger on the sheet: the first ones, not the best."""

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What came out. Shares are of videos, in [0, 1], told from their pixels."""

    directory: str
    engine: str
    """Engine that trained the LoRA: deepspeed, or local where DeepSpeed is not installed."""
    validation_loss_before: float
    validation_loss_after: float
    """At fixed timesteps and noise, on clips of the new pattern that were not trained on."""
    before: Figures
    after: Figures
    """What the probe `shapes` saw; see `trainer.probes.shapes`."""
    merge_difference: float
    """Largest difference between the merged model and base + LoRA, relative."""
    files: Mapping[str, str]
    seconds: float

    @property
    def loss_drop(self) -> float:
        """Return the fraction by which the validation loss fell."""
        return 1 - self.validation_loss_after / self.validation_loss_before

    @property
    def failures(self) -> list[str]:
        """What is not as it must be."""
        concept, leak = self.after["concept_with_trigger"], self.after["concept_leak"]
        checks = {
            f"the validation loss fell by {self.loss_drop:.0%} only": (
                self.loss_drop >= MIN_LOSS_DROP
            ),
            f"only {concept:.0%} of the samples show the new pattern": concept >= MIN_CONCEPT,
            f"{leak:.0%} show it without being asked": leak <= MAX_LEAK,
            f"merged and attached LoRA differ ({self.merge_difference:.1e})": (
                self.merge_difference <= MAX_MERGE_DIFFERENCE
            ),
        }
        return [failure for failure, fine in checks.items() if not fine]


def run(request: DemoRequest, emit: Emit) -> None:
    """Job `demo`.

    Raises:
        ConfigError: the folder holds something else.
        RunError: a part failed, or a measured value is not what it must be.
    """
    report = run_demo(request.directory, emit)
    for line in _summary(report):
        emit("log", message=line)
    if report.failures:
        raise RunError(f"the demo failed: {'; '.join(report.failures)}")


def run_demo(directory: Path, emit: Emit, plan: DemoPlan | None = None) -> DemoReport:
    """Run the whole pipeline in `directory`, replacing an earlier demo there.

    Raises:
        ConfigError: the folder holds something else.
        RunError: a job failed.
    """
    started = time.monotonic()
    demo = _Demo(_prepare(directory), emit, plan or DemoPlan())
    report = demo.run(started)
    write_json(demo.root / "summary.json", asdict(report))
    return report


class _Demo:
    """The steps of the demo; each uses what the ones before it wrote."""

    def __init__(self, root: Path, emit: Emit, plan: DemoPlan) -> None:
        self.root, self.emit, self.plan = root, emit, plan

    def run(self, started: float) -> DemoReport:
        """Make, train, measure and show."""
        config = self._make_clips()
        self._job("cache", CacheRequest(config=config))
        before = self._look(config, "before")
        self.emit("phase", name=f"train a LoRA for “{TRIGGER}”")
        self._job("train", TrainRequest(config=config, resume="never"))
        after = self._look(config, "after")
        run_dir = load_config(config).run_dir
        lora = run_dir / "output" / f"{NAME}.safetensors"
        merged = self.root / "merged.safetensors"
        self.emit("phase", name="merge")
        difference = self._merge(lora, merged)
        self._show()
        return DemoReport(
            directory=str(self.root),
            engine=_engine(run_dir),
            validation_loss_before=before["validation"]["base"]["loss"],
            validation_loss_after=after["validation"]["trained"]["loss"],
            before=before["probe"]["figures"],
            after=after["probe"]["figures"],
            merge_difference=difference,
            files={
                "clips": str(self.root / "clips"),
                "config": str(config),
                "LoRA": str(lora),
                "merged model": str(merged),
                "samples": str(self.root / "samples"),
                "contact sheet": str(self.root / "contact_sheet.png"),
                "summary": str(self.root / "summary.json"),
            },
            seconds=round(time.monotonic() - started, 1),
        )

    def _make_clips(self) -> Path:
        """Draw the clips; return the config."""
        training, held_out = concept_scenes(self.plan.seed)
        self.emit("phase", name="draw clips", detail=f"{len(training)} of “{TRIGGER}”")
        folder = self.root / "clips"
        write_scenes(training, folder / "training")
        write_scenes(held_out, folder / "held_out")
        write_scenes(known_scenes(self.plan.seed), folder / "known")
        return write_config(self.root, folder, self.plan)

    def _look(self, config: Path, when: str) -> dict[str, Any]:
        self.emit("phase", name=f"sample and measure {when} training")
        return self._job("eval", EvalRequest(config=config, save=self.root / "samples" / when))

    def _job(self, name: str, request: Options) -> dict[str, Any]:
        file = self.root / "requests" / f"{name}.json"
        # Two threads are all that so small a model keeps busy; what the user has set counts.
        own = "OMP_NUM_THREADS" in os.environ
        threads = None if own else min(2, os.cpu_count() or 1)
        return run_job(name, request, file, self.emit, threads=threads)

    def _merge(self, lora: Path, merged: Path) -> float:
        """Bake the LoRA in; return how much that differs from attaching it."""
        merge_loras(asset("t2v"), [LoRAUse(path=lora)], merged, dtype=torch.float32)
        attached = load_transformer(asset("t2v"))
        attach(attached, load_adapter(lora))
        return largest_difference(attached, load_transformer(merged))

    def _show(self) -> None:
        """Write the contact sheet and say where it is, with frames for the terminal."""
        clips = sorted((self.root / "clips" / "training").glob("*.mp4"))
        rows = [_row("trained on", clips[0])]
        first_without = self.plan.num_shots
        for number in [*range(min(_NUM_SHOWN, self.plan.num_shots)), first_without]:
            for when in ("before", "after"):
                (video,) = (self.root / "samples" / when).glob(f"{number:03d}_*.mp4")
                rows.append(_row(when, video))
        sheet = self.root / "contact_sheet.png"
        write_sheet(sheet, rows)
        strips = [
            {"title": row.title, "frames": write_frames(self.root / "frames", f"{index}", row)}
            for index, row in enumerate(rows[: 1 + 2])
        ]
        self.emit("output", path=str(sheet), strips=strips)


def _row(title: str, video: Path) -> Row:
    """Return a strip of the sheet, with what the clip shows or was asked for."""
    content = read_video(video)
    text = video.with_suffix(".txt")
    shown = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    return Row(f"{title}: {content.metadata.get('prompt', shown)}", list(content.frames))


def _engine(run_dir: Path) -> str:
    """Return the name of the engine, as the checkpoint says."""
    (file,) = run_dir.glob("checkpoints/step-*/engine.json")
    return str(json.loads(file.read_text(encoding="utf-8"))["engine"])


def _prepare(directory: Path) -> Path:
    root = directory.absolute()
    marker = root / _MARKER
    if root.exists() and any(root.iterdir()):
        if not marker.is_file():
            raise ConfigError(
                f"{root} is not empty and not from an earlier demo",
                hint="give a new folder: menma demo --dir DIR",
            )
        shutil.rmtree(root)
    write_text(marker, "made by `menma demo`, which may delete this folder to start again\n")
    return root


def _summary(report: DemoReport) -> list[str]:
    before, after = report.before, report.after

    def course(figure: str) -> str:
        return f"{before[figure]:.0%} -> {after[figure]:.0%}"

    losses = f"{report.validation_loss_before:.4f} -> {report.validation_loss_after:.4f}"
    return [
        f"LoRA ({report.engine} engine): validation loss {losses} ({-report.loss_drop:+.0%})",
        f"the new pattern is there when asked for: {course('concept_with_trigger')}",
        f"the new pattern is there when not asked for: {course('concept_leak')}",
        f"known things still right: colour {course('prior_colour')}, shape "
        f"{course('prior_shape')}, direction {course('prior_direction')}",
        f"merged against attached: {report.merge_difference:.1e}",
        *(f"{name}: {path}" for name, path in report.files.items()),
        f"done in {report.seconds:.0f} s",
    ]
