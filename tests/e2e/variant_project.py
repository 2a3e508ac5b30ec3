"""Projects with a tiny random model of any variant, in the layouts of the releases, and the jobs.

Jobs run in this process by the same entry that `python -m trainer` calls; what a test wants to see
of the inside (microbatches, latents of samples) is recorded on the way.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from trainer.contract.diffusers_names import to_diffusers_name
from trainer.contract.events import EventReader
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.contract.run_dir import RunDir
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.core.types import Batch, NoisyInput
from trainer.engine import process_group
from trainer.engine.process_group import World
from trainer.jobs import sample_write, train_samples
from trainer.jobs.base import run_guarded
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.tiny import (
    write_tiny_image_encoder,
    write_tiny_text_encoder,
    write_tiny_vae,
)
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.video_io import write_video
from trainer.training.step import TrainStep

CAPTIONS = ("a red field", "a green field at night", "waves of blue")
HEADS = 2
Tables = dict[str, Any]


def tiny_config(variant: str) -> TransformerConfig:
    """Return the shape of `variant` with small widths; channels and branches are kept."""
    full = VARIANTS[variant].transformer
    widths = {"dim": 24, "ffn_dim": 48, "num_heads": HEADS, "num_layers": 2, "text_dim": 32}
    image = {"image_dim": 80} if full.image_dim is not None else {}
    return replace(full, **widths, **image, freq_dim=16)


def random_transformer(variant: str, seed: int) -> WanTransformer:
    """Return a model in which no parameter is zero."""
    model = WanTransformer(tiny_config(variant), seed=None)
    init_fan_in(model, seed)
    random = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if name.endswith("modulation"):
            torch.nn.init.normal_(value, std=0.3, generator=random)
    return model


def write_official(model: WanTransformer, path: Path) -> Path:
    """Two shards, an index and a config.json, as in the repositories of Wan-AI."""
    path.mkdir(parents=True)
    state = _state(model)
    names, weight_map = sorted(state), {}
    for index in range(2):
        file = f"diffusion_pytorch_model-0000{index + 1}-of-00002.safetensors"
        part = {name: state[name] for name in names[index::2]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index_file = path / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = model.config
    told = {"dim": config.dim, "num_layers": config.num_layers, "num_heads": HEADS, "eps": 1e-6}
    (path / "config.json").write_text(json.dumps({"_class_name": "WanModel", **told}))
    return path


def write_comfy(model: WanTransformer, path: Path) -> Path:
    """One file with ComfyUI's prefix; it does not tell the number of heads."""
    path = path.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"model.diffusion_model.{n}": v for n, v in _state(model).items()}, path)
    return path


def write_diffusers(model: WanTransformer, path: Path) -> Path:
    """A folder with diffusers' names and config."""
    path.mkdir(parents=True)
    state = {to_diffusers_name(name): value for name, value in _state(model).items()}
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": HEADS,
        "attention_head_dim": model.config.head_dim,
        "num_layers": model.config.num_layers,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_torch(model: WanTransformer, path: Path) -> Path:
    """A .pth, which does not tell the number of heads either."""
    path = path.with_suffix(".pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_state(model), path)
    return path


WRITERS = {
    "official": write_official,
    "comfy": write_comfy,
    "diffusers": write_diffusers,
    "pth": write_torch,
}


def _state(model: WanTransformer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def write_models(folder: Path, variant: str, layout: str) -> Tables:
    """Write everything the variant needs; return the `[model]` section."""
    known = VARIANTS[variant]
    section: Tables = {
        "variant": variant,
        "vae": "models/vae.safetensors",
        "text_encoder": "models/t5.safetensors",
    }
    for index, field_name in enumerate(("transformer", "transformer_high_noise")):
        if index and not known.experts:
            continue
        model = random_transformer(variant, seed=index + 1)
        path = WRITERS[layout](model, folder / "models" / field_name)
        section[field_name] = path.relative_to(folder).as_posix()
    if layout in {"comfy", "pth"}:
        section["shape"] = {"num_heads": HEADS}
    write_tiny_vae(folder / "models/vae.safetensors", known.vae, base_dim=2)
    write_tiny_text_encoder(folder / "models/t5.safetensors", CAPTIONS, text_dim=32)
    if known.transformer.image_dim is not None:
        write_tiny_image_encoder(folder / "models/clip.pth", layout="official", image_dim=80)
        section["image_encoder"] = "models/clip.pth"
    return section


def draw_frames(seed: int, num_frames: int, width: int, height: int) -> np.ndarray:
    """Return smooth moving colours, uint8 (F, H, W, 3)."""
    random = np.random.default_rng(seed)
    phase, speed = random.uniform(0, 6, 3), random.uniform(0.2, 1, 3)
    rows = np.linspace(0, 3, height)[None, :, None, None]
    columns = np.linspace(0, 3, width)[None, None, :, None]
    times = np.arange(num_frames)[:, None, None, None]
    waves = np.sin(rows + (seed + 1) * columns + phase + speed * times)
    return ((waves + 1) * 127.5).round().astype(np.uint8)


def write_frame_folder(folder: Path, frames: np.ndarray) -> None:
    """Write a video as a folder of PNGs, which lose nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index:04d}.png")


def write_clips(folder: Path, count: int, num_frames: int, width: int, height: int) -> None:
    """Write captioned videos as folders of PNGs."""
    for index in range(count):
        write_frame_folder(folder / str(index), draw_frames(index, num_frames, width, height))
        (folder / f"{index}.txt").write_text(CAPTIONS[index])


def write_mixed_dataset(folder: Path) -> Tables:
    """Write images in a folder and videos in a JSONL list; return `[dataset]`."""
    images = folder / "images"
    images.mkdir()
    for index in range(2):
        Image.fromarray(draw_frames(10 + index, 1, 32, 32)[0]).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(CAPTIONS[index])
    (folder / "videos").mkdir()
    lines = []
    for index in range(2):
        frames = list(draw_frames(20 + index, 5, 32, 32))
        write_video(folder / f"videos/{index}.mp4", frames, 16)
        lines.append({"video_path": f"videos/{index}.mp4", "caption": CAPTIONS[index]})
    (folder / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    videos = {
        "video_jsonl_file": "videos.jsonl",
        "cache_directory": "videos_cache",
        "target_frames": [5],
    }
    return {
        "general": {"resolution": [32, 32]},
        "sources": [{"image_directory": "images"}, videos],
    }


def base_config(model: Tables, dataset: Tables) -> Tables:
    """Return a config that trains a LoRA in fp32 with DeepSpeed, stage 0."""
    return {
        "name": "deepspeed",
        "model": model,
        "dataset": dataset,
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
        "optimizer": {"learning_rate": 0.02},
        "training": {"max_steps": 6},
        "memory": {
            "weight_format": "fp32",
            "vae_dtype": "fp32",
            "text_encoder_dtype": "fp32",
            "cache_dtype": "fp32",
        },
        "distributed": {"engine": "deepspeed", "device": "cpu"},
        "output": {"dtype": "fp32"},
        "sampling": {"width": 32, "height": 32, "num_frames": 5, "num_steps": 4},
    }


@dataclass
class Done:
    """How a job ended."""

    code: int
    events: list[Tables]
    latents: list[Tensor] = field(default_factory=list)
    """Of every sample, before decoding."""
    steps: list[tuple[NoisyInput, Batch]] = field(default_factory=list)
    """What every training forward was given."""

    def of(self, kind: str) -> list[Tables]:
        """Return the events of one type, but for the advice on rates: tests exaggerate theirs."""
        advice = "optimizer.learning_rate = "
        found = [event for event in self.events if event["type"] == kind]
        return [event for event in found if advice not in event.get("message", "")]

    @property
    def words(self) -> str:
        """The error, with its hint."""
        return "\n".join(f"{event['message']}\n{event['hint']}" for event in self.of("error"))


@dataclass
class VariantProject:
    """A folder with models, clips and a config."""

    folder: Path
    config: Tables

    def job(self, name: str, *, may_fail: bool = False, **request: Any) -> Done:
        """Run a job in the folder, in this process."""
        done = Done(0, [])
        checked = REQUESTS[name].model_validate(json.loads(json.dumps(request)))
        run: Any = JOBS.load(name)

        def emit(kind: str, /, **fields: Any) -> None:
            done.events.append({"type": kind, **fields})

        with _in_folder(self.folder), _recording(done), _several_jobs_in_a_process():
            done.code = run_guarded(lambda: run(checked, emit), emit)
        assert may_fail or done.code == 0, done.words
        return done

    def write(self, file: str = "config.toml", /, **changes: Any) -> str:
        """Write the config with `section__key=value` changes; return its file name."""
        tables = json.loads(json.dumps(self.config))
        for key, value in changes.items():
            *sections, last = key.split("__")
            table = tables
            for section in sections:
                table = table.setdefault(section, {})
            table[last] = value
        (self.folder / file).write_text(tomlkit.dumps(tables))
        return file

    def cache(self, **changes: Any) -> Done:
        """Encode the dataset."""
        return self.job("cache", config=self.write(**changes))

    def train(self, name: str, *, may_fail: bool = False, resume: str = "auto", **changes: Any):
        """Train the run `name`; its events are those of its log."""
        config = self.write(f"{name}.toml", name=name, **changes)
        done = self.job("train", config=config, resume=resume, may_fail=may_fail)
        log = self.run(name).events
        done.events += list(EventReader(log).read()) if log.is_file() else []
        return done

    def sample(self, **request: Any) -> Done:
        """Sample; without `config` the one written last."""
        return self.job("sample", **({"config": "config.toml"} | request))

    def run(self, name: str) -> RunDir:
        """Return the directory of a run."""
        return RunDir(self.folder / "runs" / name)

    def output(self, name: str) -> Path:
        """Return the final file of a run."""
        return self.run(name).output / f"{name}.safetensors"

    def checkpoint(self, name: str, step: int) -> dict[str, Tensor]:
        """Return the trained weights in a checkpoint, by canonical name, flat."""
        from safetensors.torch import load_file

        folder = self.run(name).checkpoints / f"step-{step:08d}"
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("rank-*.safetensors")):
            for key, tensor in load_file(file).items():
                kind, start, parameter = key.split("|", 2)
                if kind == "weight":
                    assert start == "0", "one process holds every parameter whole"
                    weights[parameter] = tensor
        return weights


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _recording(done: Done) -> Iterator[None]:
    """Note what the training forwards see, and the latents that are decoded."""
    predict, decode = TrainStep.predict, sample_write.decode_frames

    def seen_predict(self: TrainStep, noisy: NoisyInput, batch: Batch) -> Tensor:
        done.steps.append((noisy, batch))
        return predict(self, noisy, batch)

    def seen_decode(vae: Any, latents: Tensor, **options: Any) -> Any:
        done.latents.append(latents.clone())
        return decode(vae, latents, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "predict", seen_predict)
        patch.setattr(sample_write, "decode_frames", seen_decode)
        patch.setattr(train_samples, "decode_frames", seen_decode)
        yield


@contextmanager
def _several_jobs_in_a_process() -> Iterator[None]:
    """Allow for what a user's process, which runs one job, does not meet.

    DeepSpeed keeps the first process group of a process, so all jobs stay in one; and a collection
    of garbage should not look at what hundreds of tests have left.
    """

    @contextmanager
    def joined(device: str, timeout_s: float) -> Iterator[World]:
        if not torch.distributed.is_initialized():
            atexit.register(process_group.leave)
            if "deepspeed" in sys.modules:
                from deepspeed.utils import groups

                groups._WORLD_GROUP = None  # of a group that an earlier test has left
        yield process_group.join(device, timeout_s)

    gc.freeze()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process_group, "joined", joined)
            yield
    finally:
        gc.unfreeze()
