"""From nothing to the shipped files: the stages of `python -m trainer.nano`.

Every stage leaves a note when it is done and is skipped next time; the long ones go on from their
last checkpoint. The transformers are trained by the job `train`, as a user would train them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.clipart.scenes import UNCAPTIONED, draw
from trainer.clipart.split import training_scene
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError
from trainer.contract.files import atomic_path, write_bytes, write_json, write_text
from trainer.contract.jobs import CacheRequest, TrainRequest
from trainer.contract.options import Options
from trainer.contract.variants import TransformerConfig
from trainer.jobs.base import Emit
from trainer.jobs.child import run_job
from trainer.models import load_transformer
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import write_tiny_image_encoder
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import save_vae
from trainer.nano.configs import CLIP_KINDS, Training, write_config
from trainer.nano.files import (
    EXPERT_VARIANT,
    FILES,
    I2V_VARIANT,
    QUALITY,
    T2V_VARIANT,
    save_bf16,
    save_fp8_scaled,
)
from trainer.nano.quality import FPS, measure
from trainer.nano.text_training import TEXT_DIM, fit_text_encoder
from trainer.nano.vae_training import VAEFit
from trainer.sampling.video_io import write_video

_IMAGE_DIM = 80
_UNCAPTIONED_SHARE = 0.1
_SAVE_EVERY = 100

_SHAPE = TransformerConfig(
    dim=160,
    ffn_dim=512,
    num_heads=5,
    num_layers=4,
    text_dim=TEXT_DIM,
    freq_dim=64,
    text_len=64,
)
"""1.7 million parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is made and trained. Where the shipped files differ, their quality.json says so."""

    seed: int = 0
    num_clips: int = 3000
    text_steps: int = 1200
    vae_steps: int = 4000
    t2v_first_steps: int = 4000
    t2v_second_steps: int = 3200
    t2v_steps: int = 2000
    low_noise_steps: int = 300
    high_noise_steps: int = 200
    i2v_steps: int = 1600
    num_samples: int = 50
    """Of each model, when its quality is measured."""


class Recipe:
    """The stages, in the order in which they need one another."""

    def __init__(self, work: Path, plan: Plan, emit: Emit, threads: int | None = None) -> None:
        self.work, self.plan, self.emit = work.absolute(), plan, emit
        self.threads = threads
        self.models = self.work / "models"

    def run(self) -> None:
        """Run what is not done yet.

        Raises:
            ConfigError: the folder holds the work of another plan.
            RunError: a job failed.
        """
        self._claim()
        stages: Mapping[str, Callable[[], dict[str, float] | None]] = {
            "text_encoder": self.text_encoder,
            "vae": self.vae,
            "clips": self.clips,
            "t2v_first": self.t2v_first,
            "t2v_second": self.t2v_second,
            "t2v": self.t2v,
            "low_noise": self.low_noise,
            "high_noise": self.high_noise,
            "i2v": self.i2v,
            "export": self.export,
        }
        for name, stage in stages.items():
            note = self.work / "done" / f"{name}.json"
            if note.is_file():
                self.emit("phase", name=name, detail="done before")
                continue
            self.emit("phase", name=name)
            started = time.monotonic()
            figures = stage() or {}
            write_json(note, {"seconds": round(time.monotonic() - started, 1), **figures})

    def text_encoder(self) -> dict[str, float]:
        """Fit umT5 and its tokenizer."""
        path = self.models / "text_encoder.safetensors"
        return fit_text_encoder(path, self.plan.text_steps, self.plan.seed)

    def vae(self) -> dict[str, float]:
        """Fit the VAE; written as float16, which rounds less than bfloat16."""
        fit = VAEFit(self.plan.vae_steps, self.plan.seed)
        state = self.work / "vae_state.pt"
        if state.is_file():
            fit.load(torch.load(state, weights_only=True))
        error = 0.0
        while fit.step < self.plan.vae_steps:
            error = fit.advance()
            if fit.step % _SAVE_EVERY == 0 or fit.step == self.plan.vae_steps:
                with atomic_path(state) as temporary:
                    torch.save(fit.state(), temporary)
                self.emit("phase", name="vae", done=fit.step, total=self.plan.vae_steps)
        save_vae(fit.finished().half(), self.models / "vae.safetensors")
        return {"last_error": error}

    def clips(self) -> None:
        """Draw the training clips and write their captions beside them."""
        rng = np.random.default_rng((self.plan.seed, 10))
        for kind in CLIP_KINDS:
            folder = self.work / "clips" / kind.name
            for index in range(round(self.plan.num_clips * kind.share)):
                scene = training_scene(rng)
                silent = rng.uniform() < _UNCAPTIONED_SHARE
                frames = draw(scene, kind.num_frames, kind.width, kind.height)
                write_video(folder / f"{index:05}.mp4", list(frames), FPS, crf=8)
                caption = UNCAPTIONED if silent else scene.caption
                write_text(folder / f"{index:05}.txt", caption + "\n")

    def t2v_first(self) -> None:
        """Train the text-to-video transformer from fresh weights."""
        start = self.models / "untrained.safetensors"
        transformer = WanTransformer(_SHAPE, seed=self.plan.seed)
        transformer.variant_name = T2V_VARIANT
        save_transformer(transformer, start)
        steps = self.plan.t2v_first_steps
        self._t2v("t2v_first", start, steps, learning_rate=1.2e-3, logit_mean=1.0, logit_std=1.4)

    def t2v_second(self) -> None:
        """Train it on from a high rate again (a warm restart, arXiv 1608.03983), on much noise.

        By now it follows what it is shown, and has to learn what the words for shape and direction
        mean. They matter where the noise hides everything else.
        """
        start, steps = self.models / "t2v_first.safetensors", self.plan.t2v_second_steps
        self._t2v("t2v_second", start, steps, learning_rate=1e-3, logit_mean=2.0, logit_std=1.2)

    def t2v(self) -> None:
        """Once more, on the medium noise at which outlines are drawn."""
        start, steps = self.models / "t2v_second.safetensors", self.plan.t2v_steps
        self._t2v("t2v", start, steps, learning_rate=7e-4, logit_mean=1.2, logit_std=1.2)

    def low_noise(self) -> None:
        """Fine-tune the model below the boundary of Wan 2.2."""
        self._expert("low_noise", self.plan.low_noise_steps)

    def high_noise(self) -> None:
        """Fine-tune the model at the boundary of Wan 2.2 and above."""
        self._expert("high_noise", self.plan.high_noise_steps)

    def i2v(self) -> None:
        """Widen the model by first-frame and image channels and fine-tune it."""
        image_encoder = self.models / "image_encoder.safetensors"
        write_tiny_image_encoder(
            image_encoder, image_dim=_IMAGE_DIM, seed=self.plan.seed, dtype=torch.bfloat16
        )
        start = self.models / "i2v_start.safetensors"
        base = load_transformer(self.models / "t2v.safetensors")
        save_transformer(widened_for_images(base, self.plan.seed), start)
        model = {"variant": I2V_VARIANT, "transformer": str(start), **self._encoders()}
        training = Training(
            name="i2v",
            model={**model, "image_encoder": str(image_encoder)},
            steps=self.plan.i2v_steps,
            learning_rate=7e-4,
        )
        self._train(training, self.models / "i2v.safetensors")

    def export(self) -> dict[str, float]:
        """Write the files as they are shipped, and measure those."""
        folder = self.work / "assets"
        save_bf16(load_transformer(self.models / "t2v.safetensors"), folder / FILES["t2v"])
        for name in ("low_noise", "high_noise", "i2v"):
            model = load_transformer(self.models / f"{name}.safetensors")
            save_fp8_scaled(model, folder / FILES[name])
        for name in ("vae", "text_encoder", "image_encoder"):
            content = (self.models / f"{name}.safetensors").read_bytes()
            write_bytes(folder / FILES[name], content)
        quality = measure(folder, self.plan.num_samples)
        notes = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in (self.work / "done").glob("*.json")
        }
        seconds = {name: note["seconds"] for name, note in sorted(notes.items())}
        write_json(folder / QUALITY, {"figures": quality, "seconds": seconds, **self._origin()})
        return quality

    def _origin(self) -> dict[str, Any]:
        return {
            "made_by": "python -m trainer.nano",
            "plan": asdict(self.plan),
            "torch": torch.__version__,
            "licence": "Apache-2.0; trained from generated clips alone",
        }

    def _t2v(
        self,
        name: str,
        start: Path,
        steps: int,
        *,
        learning_rate: float,
        logit_mean: float,
        logit_std: float,
    ) -> None:
        training = Training(
            name=name,
            model={"variant": T2V_VARIANT, "transformer": str(start), **self._encoders()},
            steps=steps,
            learning_rate=learning_rate,
            logit_mean=logit_mean,
            logit_std=logit_std,
        )
        self._train(training, self.models / f"{name}.safetensors")

    def _expert(self, expert: str, steps: int) -> None:
        start = self.models / "expert_start.safetensors"
        base = load_transformer(self.models / "t2v.safetensors")
        base.variant_name = EXPERT_VARIANT
        save_transformer(base, start)
        key = "transformer" if expert == "low_noise" else "transformer_high_noise"
        training = Training(
            name=expert,
            model={
                "variant": EXPERT_VARIANT,
                key: str(start),
                "expert": expert,
                **self._encoders(),
            },
            steps=steps,
            learning_rate=3e-4,
        )
        self._train(training, self.models / f"{expert}.safetensors")

    def _encoders(self) -> dict[str, str]:
        return {
            "vae": str(self.models / "vae.safetensors"),
            "text_encoder": str(self.models / "text_encoder.safetensors"),
        }

    def _train(self, training: Training, output: Path) -> None:
        clips = self.work / "clips"
        path = write_config(self.work, clips, CLIP_KINDS, training, self.plan.seed)
        self._job("cache", CacheRequest(config=path))
        self._job("train", TrainRequest(config=path, resume="auto"))
        run_dir = load_config(path).run_dir
        trained = load_transformer(run_dir / "output" / f"{training.name}.safetensors")
        save_transformer(trained, output)

    def _job(self, name: str, request: Options) -> None:
        file = self.work / "requests" / f"{name}.json"
        run_job(name, request, file, self.emit, threads=self.threads)

    def _claim(self) -> None:
        """Write the plan down, or see that the folder holds the work of the same one."""
        path = self.work / "plan.json"
        if not path.is_file():
            write_json(path, asdict(self.plan))
        elif json.loads(path.read_text(encoding="utf-8")) != asdict(self.plan):
            raise ConfigError(
                f"{self.work} was begun with other numbers of steps or another seed",
                hint="give another --work folder, or delete this one",
            )


@torch.no_grad()
def widened_for_images(base: WanTransformer, seed: int) -> WanTransformer:
    """Return an image-to-video model that starts out predicting what `base` predicts.

    It has 20 more input channels (mask and encoded first frame) and a branch for image features;
    both have no effect yet.
    """
    config = TransformerConfig(
        **{**asdict(base.config), "in_channels": 36, "image_dim": _IMAGE_DIM}
    )
    model = WanTransformer(config, seed=seed)
    model.variant_name = I2V_VARIANT
    given = base.state_dict()
    for name, parameter in model.state_dict().items():
        if name == "patch_embedding.weight":
            parameter.zero_()
            parameter[:, : base.config.in_channels] = given[name]
        elif name in given:
            parameter.copy_(given[name])
        elif ".v_img." in name:
            parameter.zero_()
    return model
