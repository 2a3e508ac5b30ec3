"""A folder as a user has it, with tiny models, three clips and a config, and the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.warm import start as warm
from trainer.contract.events import EventReader
from trainer.contract.run_dir import RunDir
from trainer.contract.variants import TransformerConfig
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import write_tiny_text_encoder, write_tiny_vae
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.video_io import write_video

ROOT = Path(__file__).parents[2]
VARIANT = "wan2.1-t2v-1.3b"
CAPTIONS = ("a red field", "a green field at night", "waves of blue")
CONFIG = """\
name = "tiny"

[model]
variant = "wan2.1-t2v-1.3b"
transformer = "models/transformer.safetensors"
vae = "models/vae.safetensors"
text_encoder = "models/text_encoder.safetensors"

[dataset.general]
resolution = [32, 32]

[[dataset.sources]]
video_directory = "clips"
target_frames = [5]

[adapter]
kind = "lora"
rank = 4
dropout = 0.1

[optimizer]
learning_rate = 1e-2

[training]
max_steps = 3

[memory]
weight_format = "fp32"
vae_dtype = "fp32"
text_encoder_dtype = "fp32"
cache_dtype = "fp32"

[distributed]
engine = "local"
num_processes = 1

[output]
dtype = "fp32"

[sampling]
width = 32
height = 32
num_frames = 5
num_steps = 2
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    words: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.words}"


@dataclass(frozen=True)
class Project:
    """The folder; commands run in it."""

    folder: Path
    fresh: bool = False
    """Each command is a new interpreter, as a user's; else one that has imported everything."""

    @property
    def config(self) -> Path:
        """The config file."""
        return self.folder / "tiny.toml"

    @property
    def run(self) -> RunDir:
        """The run directory of the config."""
        return RunDir(self.folder / "runs" / "tiny")

    @property
    def output(self) -> Path:
        """The LoRA that the run writes."""
        return self.run.output / "tiny.safetensors"

    def set(self, **replacements: str) -> None:
        """Replace lines of the config: the value of the first `key = ...` of that name."""
        lines = self.config.read_text().splitlines()
        for key, value in replacements.items():
            index = next(i for i, line in enumerate(lines) if line.startswith(f"{key} ="))
            lines[index] = f"{key} = {value}"
        self.config.write_text("\n".join(lines) + "\n")

    def menma(self, *arguments: str | Path, timeout_s: float = 240) -> Outcome:
        """Run the command to its end."""
        run = subprocess.run if self.fresh else warm.run
        done = run(
            command(arguments),
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def done(self, *arguments: str | Path) -> Outcome:
        """Run the command, which must succeed."""
        outcome = self.menma(*arguments)
        assert outcome.code == 0, f"menma {' '.join(map(str, arguments))}\n{outcome}"
        return outcome

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start the command and return at once."""
        popen = subprocess.Popen if self.fresh else warm.Popen
        return popen(
            command(arguments),
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the run's events of one type."""
        return [event for event in EventReader(self.run.events).read() if event["type"] == kind]

    def checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints that are there."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._checkpoint_folders())

    def trainer_pid(self) -> int:
        """Return the process id of the trainer, as the supervisor wrote it down."""
        trainer = json.loads(self.run.status.read_text())["trainer"]
        return int(trainer["pid"])

    def _checkpoint_folders(self) -> Iterator[Path]:
        return self.run.checkpoints.glob("step-*")


def command(arguments: Sequence[str | Path]) -> list[str]:
    """Return the command line of `menma` in this interpreter."""
    return [sys.executable, "-m", "app", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return an environment in which the checkout is found from any folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def write_project(folder: Path) -> Project:
    """Make the models, the clips and the config."""
    models = folder / "models"
    transformer = tiny_transformer()
    save_transformer(transformer, models / "transformer.safetensors")
    write_tiny_vae(models / "vae.safetensors", base_dim=2)
    write_tiny_text_encoder(models / "text_encoder.safetensors", CAPTIONS, text_dim=32)
    random = np.random.default_rng(0)
    for index, caption in enumerate(CAPTIONS):
        clip = folder / "clips" / f"{index}.mp4"
        frames = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]
        write_video(clip, frames, 16)
        clip.with_suffix(".txt").write_text(caption)
    project = Project(folder)
    project.config.write_text(CONFIG)
    return project


def tiny_transformer(seed: int = 0, **changes: Any) -> WanTransformer:
    """Return a random transformer whose output is not zero."""
    shape: dict[str, Any] = {
        "dim": 24,
        "ffn_dim": 48,
        "num_heads": 2,
        "num_layers": 2,
        "text_dim": 32,
        "freq_dim": 16,
    }
    transformer = WanTransformer(TransformerConfig(**(shape | changes)), seed=seed)
    transformer.variant_name = VARIANT
    transformer.head.head.weight.data.normal_(std=0.1)
    return transformer


def copy_project(project: Project, folder: Path) -> Project:
    """Copy the folder, caches and time stamps included."""
    shutil.copytree(project.folder, folder, dirs_exist_ok=True)
    return Project(folder)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    """Look again and again until `condition` holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.005)


def content(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
