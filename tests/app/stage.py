"""A project with something on every screen, the same on every machine: for goldens and pictures.

It has a run that is live (this process holds its lock), one that is done, one that failed, jobs
that wait, clips, a config and a machine that is described, not looked at.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from data_reports import report
from PIL import Image
from weight_headers import TEXT_SHAPES, VAE_SHAPES, write_header, write_transformer

from app.domain import cards, environment
from app.domain.cards import Card
from app.domain.load import GpuLoad, Load
from app.queue.jobs import JobSpec
from app.queue.store import QueueStore
from app.runs import processes
from app.runs.frames import ClipFrames
from app.runs.lock import RunLock
from app.runs.processes import ProcessId
from app.runs.status import Status
from app.tui import meters, outputs
from app.tui.screens import jobs, library
from app.tui.screens.config import card_choice
from app.tui.screens.config import screen as config
from app.tui.screens.data import screen as data_screen
from app.tui.screens.data import view as data_view
from app.tui.screens.wizard import model_step
from app.tui.screens.wizard import screen as wizard
from app.tui.sources import Sources
from trainer.contract.events import EventWriter
from trainer.contract.memory_model import gpu_of_memory
from trainer.contract.run_dir import RunDir

HOUR_S = 3600.0
NOW = time.time()
"""The moment at which ages of files are told, however long a test takes."""
CONFIG = """\
# A character from a dozen clips.
name = "fish"
preset = "wan2.1-t2v-1.3b-lora"

[model]
variant = "wan2.1-t2v-1.3b"
transformer = "models/wan2.1-t2v-1.3b.safetensors"
vae = "models/wan2.1-vae.safetensors"
text_encoder = "models/umt5-xxl.safetensors"

[[dataset.sources]]
video_directory = "clips"
target_frames = [33]

[adapter]
rank = 16  # enough for one character

[training]
max_steps = 600
seed = 42

[memory]
blocks_to_swap = 4
"""
MACHINE: dict[str, Any] = {
    "menma": "0.1.0",
    "python": "3.11.7",
    "executable": "/home/ada/menma/bin/python",
    "system": "Linux 6.1 x86_64",
    "cpus": 16,
    "ram_gib": 63.9,
    "ram_free_gib": 41.2,
    "disk_free_gib": 812.5,
    "disk_folder": "/home/ada/wan",
    "gpus": [
        {
            "index": 0,
            "name": "NVIDIA GeForce RTX 4090",
            "vram_gib": 24.0,
            "vram_free_gib": 23.1,
            "driver": "580.65",
            "compute_capability": "8.9",
        }
    ],
    "packages": {"torch": "2.13.0", "deepspeed": "0.18.2", "flash-attn": None},
    "problems": [],
    "warnings": ["flash-attn is not installed: attention uses torch's own kernels"],
}


LOAD = Load(
    gpus=(GpuLoad("0", 14.3, 24.0, 97.0, 68.0, 412.0),),
    no_gpu="",
    ram_used_gib=22.7,
    ram_total_gib=63.9,
    run_gib=6.3,
)
CARD = Card(gpu=gpu_of_memory(24))


@contextmanager
def staged(folder: Path) -> Iterator[Sources]:
    """Fill an empty folder, be in it, and yield where the app reads from."""
    before = Path.cwd()
    os.chdir(folder)
    described = [
        patch.object(environment, "report", lambda folder: MACHINE),
        *(
            patch.object(each, "ensure_worker", lambda folder: None)
            for each in (config, jobs, library, wizard)
        ),
        patch.object(outputs, "time", SimpleNamespace(time=lambda: NOW)),
        patch.object(meters, "read_load", lambda run=None: LOAD),
        patch.object(card_choice, "choose_card", lambda name, size: CARD),
        patch.object(cards, "choose_card", lambda name, size: CARD),
        patch.object(model_step, "usual_places", lambda runs: [Path("models")]),
        patch.object(data_screen, "read_report", lambda config, **options: report()),
        patch.object(data_view, "clip_frames", _frames),
    ]
    for each in described:
        each.start()
    lock = None
    try:
        _files()
        _run("portrait", 38, 400, HOUR_S * 30, error="CUDA out of memory")
        _run("harbour", 400, 400, HOUR_S * 5)
        lock = _live_run("fish", 412, 600)
        _queue(Path("queue"))
        yield Sources(Path("runs"), Path("queue").absolute())
    finally:
        if lock is not None:
            lock.release()
        for each in described:
            each.stop()
        os.chdir(before)


def _frames(path: Path, **options: Any) -> ClipFrames:
    """Draw one frame, a ramp from dark to light."""
    picture = Path("frame.png")
    Image.linear_gradient("L").resize((64, 36)).convert("RGB").save(picture)
    return ClipFrames(
        paths=(picture,), numbers=(0,), num_frames=81, width=832, height=480, fps=24.0
    )


def _no_worker(folder: Path) -> None:
    """Start nothing: what waits goes on waiting."""


def _files() -> None:
    for variant in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b"):
        write_transformer(Path(f"models/{variant}.safetensors"), variant)
    write_header(Path("models/wan2.1-vae.safetensors"), VAE_SHAPES["2.1"])
    write_header(Path("models/umt5-xxl.safetensors"), TEXT_SHAPES)
    for number in range(12):
        _touch(Path(f"clips/fish-{number:02}.mp4"))
        Path(f"clips/fish-{number:02}.txt").write_text("mnm fish swims to the left")
    Path("configs").mkdir()
    Path("configs/fish.toml").write_text(CONFIG)


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def _run(name: str, steps: int, total: int, age_s: float, error: str = "") -> RunDir:
    run = RunDir(Path("runs") / name)
    drawn = random.Random(name)
    emit = EventWriter(run.events)
    emit("phase", name="training", detail="")
    for step in range(1, steps + 1):
        emit(
            "step", step=step, total_steps=total, loss=_loss(step, drawn),
            lr=1e-4 * min(1, step / 50), grad_norm=0.4 + 0.1 * drawn.random(),
            step_time_s=2.5, eta_s=2.5 * (total - step),
            epoch=step / 12, rss_gib=6.25, peak_vram_gib=14.25, items_per_s=0.4,
        )  # fmt: skip
        if step % 100 == 0:
            emit("validation", step=step, loss=0.07 + 0.1 * math.exp(-step / 150), items=4)
            emit("checkpoint", step=step, path=f"checkpoints/step-{step:08}")
            _sample(run, step, emit)
    if error:
        emit("error", message=error, hint="`menma estimate --fit` finds settings that fit")
        emit("end", reason="failed", step=steps)
        run.console.write_text(f"Loading the transformer\nstep {steps}\nerror: {error}\n")
    elif steps == total:
        emit("end", reason="done", step=steps)
        _touch(run.output / f"{name}.safetensors")
        written = NOW - age_s
        os.utime(run.output / f"{name}.safetensors", (written, written))
    run.config.write_text(CONFIG.replace('"fish"', f'"{name}"'))
    argv = ["menma", "train", f"configs/{name}.toml"]
    run.command.write_text(json.dumps({"argv": argv, "cwd": "/home/ada/wan"}))
    for path in (run.events, run.root):
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    return run


def _sample(run: RunDir, step: int, emit: EventWriter) -> None:
    """Draw a picture that gets clearer with the steps, as a sample does."""
    path = run.samples / f"step{step:08d}_00_42.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (64, 64), (18, 60, 90))
    picture.paste((255, 140, 60), (16, 24, 16 + step // 12, 40))
    picture.save(path)
    emit("sample", step=step, path=str(path), prompt="mnm fish swims to the left", seed=42)


def _loss(step: int, drawn: random.Random) -> float:
    return 0.08 + 0.12 * math.exp(-step / 120) + 0.02 * drawn.random()


def _live_run(name: str, steps: int, total: int) -> RunLock:
    run = _run(name, steps, total, 0.0)
    lock = RunLock.acquire(run.lock)
    me = ProcessId.of(os.getpid())
    status = Status(
        supervisor=me,
        trainer=me,
        boot_id=processes.boot_id(),
        host="here",
        started=time.time() - 2.5 * steps,
    )
    status.write(run)
    return lock


def _queue(folder: Path) -> None:
    store = QueueStore(folder)
    here = Path("/home/ada/wan")
    sample = store.add(JobSpec(argv=("sample", "runs/fish"), name="fish", cwd=here))
    merge = ("merge", "configs/fish.toml", "--lora", "runs/fish/output/fish.safetensors")
    store.add(JobSpec(argv=merge, name="fish-merged", cwd=here, after=(sample,)))
    store.close()
