"""The job `demo`: clips, models, cache, full fine-tune, LoRA, samples, merge; then a summary.

Everything but the clips and the models is done by the same code as for real ones: caching and
training run as jobs in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.files import write_json, write_text
from trainer.contract.jobs import CacheRequest, DemoRequest, LoRAUse, TrainRequest
from trainer.contract.options import Options
from trainer.contract.variants import get_variant
from trainer.data.cache_settings import CacheSettings
from trainer.data.entries import read_entry
from trainer.data.items import load_cached_dataset
from trainer.demo.clips import DISC, FPS, SCENES, SQUARE, Scene, draw, write_scene
from trainer.demo.configs import DemoConfig, write_config
from trainer.demo.measure import (
    Example,
    fixed_loss,
    largest_difference,
    likeness,
    sample_latents,
)
from trainer.demo.models import VARIANT, DemoModels, write_models
from trainer.demo.sheet import Row, write_sheet
from trainer.jobs.base import Emit
from trainer.jobs.merge import merge_loras
from trainer.models.wan.loading import load_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import WanVAE, load_vae
from trainer.sampling.pipeline import decode_frames
from trainer.sampling.video_io import Frame, write_video

MIN_LIKENESS = 0.9
MAX_MERGE_DIFFERENCE = 1e-4
_MARKER = ".menma-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """How much is trained."""

    vae_steps: int = 120
    base_steps: int = 500
    lora_steps: int = 300
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What came out. Losses are at fixed sigmas and noise; a likeness is a cosine of latents."""

    directory: str
    engine: str
    """Engine that trained the LoRA: deepspeed, or local where DeepSpeed is not installed."""
    base_loss_before: float
    base_loss_after: float
    base_likeness_before: float
    base_likeness: float
    """Sampled from the caption of the clip the base was fitted to, against that clip."""
    likeness_of_the_clips: float
    """The two clips against each other: what is no likeness at all."""
    lora_loss_before: float
    lora_loss_after: float
    lora_likeness_before: float
    lora_likeness: float
    merge_difference: float
    """Largest difference between the merged model and base + LoRA, relative."""
    files: dict[str, str]
    seconds: float

    @property
    def failures(self) -> list[str]:
        """What is not as it must be."""
        checks = {
            f"the base's samples are not like its clip ({self.base_likeness:.3f})": (
                self.base_likeness >= MIN_LIKENESS
            ),
            "the base's loss did not fall": self.base_loss_after < self.base_loss_before,
            "the LoRA's loss did not fall": self.lora_loss_after < self.lora_loss_before,
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
    torch.set_num_threads(1)  # for models of this size a second thread costs more than it brings
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
    clips = demo.make_clips()
    models = demo.make_models()
    fitted = demo.fit_base(models, clips)
    trained = demo.train_lora(models, clips, fitted)
    report = demo.compare(models, fitted, trained, started)
    write_json(demo.root / "summary.json", asdict(report))
    emit("output", path=str(demo.root / "contact_sheet.png"))
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """A finished run: its clip, and what it wrote."""

    example: Example
    run_dir: Path
    output: Path

    @property
    def engine(self) -> str:
        """Name of the engine, as the checkpoint says."""
        (file,) = self.run_dir.glob("checkpoints/step-*/engine.json")
        return str(json.loads(file.read_text(encoding="utf-8"))["engine"])


class _Demo:
    """The steps of the demo; each uses what the ones before it wrote."""

    def __init__(self, root: Path, emit: Emit, plan: DemoPlan) -> None:
        self.root, self.emit, self.plan = root, emit, plan

    def make_clips(self) -> dict[str, Path]:
        """Draw the clips; return scene -> folder."""
        self.emit("phase", name="clips", detail=", ".join(scene.caption for scene in SCENES))
        folders = {scene.name: self.root / "clips" / scene.name for scene in SCENES}
        for scene in SCENES:
            write_scene(scene, folders[scene.name])
        return folders

    def make_models(self) -> DemoModels:
        """Write the tiny models."""
        videos = [_as_video(draw(scene)) for scene in SCENES]

        def on_step(done: int, total: int) -> None:
            if done % 10 == 0 or done == total:
                self.emit("phase", name="fit the tiny VAE", done=done, total=total)

        return write_models(
            self.root / "models",
            videos,
            vae_steps=self.plan.vae_steps,
            seed=self.plan.seed,
            on_step=on_step,
        )

    def fit_base(self, models: DemoModels, clips: Mapping[str, Path]) -> _Trained:
        """Fully fine-tune the random transformer on the first clip."""
        return self._train(
            models,
            DemoConfig(
                name="base",
                transformer=models.transformer,
                scene=DISC,
                clips=clips[DISC.name],
                steps=self.plan.base_steps,
                full=True,
            ),
        )

    def train_lora(self, models: DemoModels, clips: Mapping[str, Path], base: _Trained) -> _Trained:
        """Train a LoRA for the second clip on the fitted base."""
        return self._train(
            models,
            DemoConfig(
                name="lora",
                transformer=base.output,
                scene=SQUARE,
                clips=clips[SQUARE.name],
                steps=self.plan.lora_steps,
                full=False,
            ),
        )

    def compare(
        self, models: DemoModels, base: _Trained, lora: _Trained, started: float
    ) -> DemoReport:
        """Measure, sample with and without, merge; write videos and the contact sheet."""
        self.emit("phase", name="sample and merge")
        merged_file = self.root / "merged.safetensors"
        merge_loras(base.output, [LoRAUse(path=lora.output)], merged_file)
        untrained, fitted = load_transformer(models.transformer), load_transformer(base.output)
        with_lora, merged = load_transformer(base.output), load_transformer(merged_file)
        attach(with_lora, load_adapter(lora.output))

        untrained_sample = self._sample(untrained, base.example)
        base_sample = self._sample(fitted, base.example)
        without = self._sample(fitted, lora.example)
        lora_sample = self._sample(with_lora, lora.example)
        merged_sample = self._sample(merged, lora.example)
        vae = load_vae(models.vae)
        rows = [
            Row(f"clip: {DISC.caption}", draw(DISC)),
            self._row(vae, "untrained", "untrained base, this caption", untrained_sample),
            self._row(vae, "base", "fitted base, this caption", base_sample),
            Row(f"clip: {SQUARE.caption}", draw(SQUARE)),
            self._row(vae, "without_lora", "fitted base, this caption", without),
            self._row(vae, "with_lora", "fitted base + LoRA, this caption", lora_sample),
            self._row(vae, "merged", "base with the LoRA merged in", merged_sample),
        ]
        write_sheet(self.root / "contact_sheet.png", rows)
        examples = (base.example, lora.example)
        return DemoReport(
            directory=str(self.root),
            engine=lora.engine,
            base_loss_before=fixed_loss(untrained, base.example),
            base_loss_after=fixed_loss(fitted, base.example),
            base_likeness_before=likeness(untrained_sample, base.example.latents_BCFHW),
            base_likeness=likeness(base_sample, base.example.latents_BCFHW),
            likeness_of_the_clips=likeness(*(example.latents_BCFHW for example in examples)),
            lora_loss_before=fixed_loss(fitted, lora.example),
            lora_loss_after=fixed_loss(with_lora, lora.example),
            lora_likeness_before=likeness(without, lora.example.latents_BCFHW),
            lora_likeness=likeness(lora_sample, lora.example.latents_BCFHW),
            merge_difference=largest_difference(with_lora, merged, examples),
            files=self._files(models, base, lora, merged_file),
            seconds=round(time.monotonic() - started, 1),
        )

    def _train(self, models: DemoModels, wanted: DemoConfig) -> _Trained:
        config = write_config(self.root, models, wanted, self.plan.seed)
        what = "all weights" if wanted.full else "a LoRA"
        self.emit("phase", name=wanted.name, detail=f"{what} on: {wanted.scene.caption}")
        self._job("cache", CacheRequest(config=config))
        self._job("train", TrainRequest(config=config, resume="never"))
        run_dir = load_config(config).run_dir
        return _Trained(
            example=_read_example(config, wanted.scene),
            run_dir=run_dir,
            output=run_dir / "output" / f"{wanted.name}.safetensors",
        )

    def _job(self, name: str, request: Options) -> None:
        """Run a job in a process of its own, as the app does, and pass its events on."""
        request_file = self.root / "requests" / f"{name}.json"
        write_json(request_file, request.model_dump(mode="json"))
        command = [sys.executable, "-m", "trainer", name, str(request_file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as job:
            assert job.stdout is not None
            with _ended(job):
                for line in job.stdout:
                    event = json.loads(line)
                    self.emit(
                        event.pop("type"), **{k: v for k, v in event.items() if k not in _OWN}
                    )
        if job.returncode:
            raise RunError(
                f"the job {name} of the demo failed (exit code {job.returncode})",
                hint=f"try it alone: {' '.join(command)}",
            )

    def _sample(self, transformer: WanTransformer, example: Example) -> Tensor:
        return sample_latents(transformer, example, seed=self.plan.seed)

    def _row(self, vae: WanVAE, name: str, title: str, latents: Tensor) -> Row:
        """Decode a sample into a video and a row of the sheet."""
        frames = list(decode_frames(vae, latents))
        write_video(self.root / "samples" / f"{name}.mp4", frames, FPS)
        return Row(title, frames)

    def _files(
        self, models: DemoModels, base: _Trained, lora: _Trained, merged: Path
    ) -> dict[str, str]:
        return {
            "clips": str(self.root / "clips"),
            "configs": str(self.root / "configs"),
            "models": str(models.transformer.parent),
            "fitted base": str(base.output),
            "LoRA": str(lora.output),
            "merged model": str(merged),
            "samples": str(self.root / "samples"),
            "contact sheet": str(self.root / "contact_sheet.png"),
            "summary": str(self.root / "summary.json"),
        }


_OWN = frozenset({"v", "time", "type"})
"""Fields that the event codec adds itself."""


@contextmanager
def _ended(job: subprocess.Popen[str]) -> Iterator[None]:
    """End the job when this process is interrupted."""
    try:
        yield
    except BaseException:
        job.terminate()
        raise


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


def _read_example(config_file: Path, scene: Scene) -> Example:
    """Read the clip from the cache, as training does."""
    config = load_config(config_file)
    settings = CacheSettings.of(get_variant(VARIANT), vae=None, text_encoder=None, dtype="fp32")
    (item,) = load_cached_dataset(config.dataset.load(), settings).items
    return Example(
        caption=scene.caption,
        latents_BCFHW=read_entry(item.latents, item.latents_key)["latents"].unsqueeze(0),
        context_TD=read_entry(item.context, item.context_key)["context"],
    )


def _as_video(frames: list[Frame]) -> Tensor:
    """Return (3, F, H, W) in [-1, 1]."""
    pixels_FHW3 = torch.from_numpy(np.stack(frames)).float()
    return (pixels_FHW3 / 127.5 - 1).permute(3, 0, 1, 2)


def _summary(report: DemoReport) -> list[str]:
    def course(before: float, after: float) -> str:
        return f"{before:.3f} -> {after:.3f}"

    base_loss = course(report.base_loss_before, report.base_loss_after)
    base_likeness = course(report.base_likeness_before, report.base_likeness)
    lora_loss = course(report.lora_loss_before, report.lora_loss_after)
    lora_likeness = course(report.lora_likeness_before, report.lora_likeness)
    return [
        f"full fine-tune: loss {base_loss}; likeness of samples and clip {base_likeness}",
        f"LoRA ({report.engine} engine): loss {lora_loss}; likeness {lora_likeness}",
        "(likeness: cosine of the latents, 1 is equal; the two clips have "
        f"{report.likeness_of_the_clips:.3f})",
        f"merged model and base + LoRA: relative difference {report.merge_difference:.1e}",
        *(f"{name}: {path}" for name, path in report.files.items()),
        f"done in {report.seconds:.0f} s",
    ]
