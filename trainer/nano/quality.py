"""How good the nano models are: figures from pixels, on scenes that were never trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trainer.contract.variants import get_variant
from trainer.models.wan.text_encoder import TextEncoder
from trainer.models.wan.vae import WanVAE
from trainer.nano.judge import Seen, look
from trainer.nano.scenes import UNCAPTIONED, Frames, Scene, draw
from trainer.nano.split import held_out_scene
from trainer.nano.vae_training import as_video, psnr
from trainer.sampling.pipeline import Expert, SamplingModels, decode_frames, generate
from trainer.sampling.requests import SampleRequest

NUM_STEPS = 20
GUIDANCE_SCALE = 4.0
FLOW_SHIFT = 2.0
SIZE, NUM_FRAMES, FPS = 64, 17, 16
_FIRST_SEED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How many of the videos show what was asked for, in [0, 1]."""

    colour: float
    shape: float
    direction: float

    @classmethod
    def of(cls, scenes: Sequence[Scene], seen: Sequence[Seen]) -> Shares:
        """Compare what was asked for with what is to be seen."""

        def share(field: str) -> float:
            hits = [
                getattr(s, field) == getattr(scene, field)
                for scene, s in zip(scenes, seen, strict=True)
            ]
            return float(np.mean(hits))

        return cls(colour=share("colour"), shape=share("shape"), direction=share("direction"))


def held_out_scenes(num: int, seed: int = 7) -> list[Scene]:
    """Return scenes of combinations that no stage of the recipe has seen."""
    rng = np.random.default_rng((seed, 20))
    return [held_out_scene(rng) for _ in range(num)]


def vae_psnr(vae: WanVAE, scenes: Sequence[Scene]) -> float:
    """Return the peak signal-to-noise ratio of encoding and decoding the scenes, in dB."""
    videos = [as_video(draw(scene)) for scene in scenes]
    return psnr(videos, lambda video: vae.decode(vae.encode(video)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    """Samples nano videos."""

    variant: str
    transformers: Mapping[Expert, nn.Module]
    text_encoder: TextEncoder
    vae: WanVAE

    def shoot(
        self,
        prompts: Sequence[str],
        *,
        first_seed: int = _FIRST_SEED,
        guidance_scale: float = GUIDANCE_SCALE,
        on_video: Callable[[int], None] | None = None,
    ) -> list[Frames]:
        """Return one video (F, H, W, 3) per prompt, seeds counting up from `first_seed`."""
        variant = get_variant(self.variant)
        texts = sorted({*prompts, UNCAPTIONED})
        contexts = dict(zip(texts, self.text_encoder(texts), strict=True))
        models = SamplingModels(
            variant=variant,
            transformer=lambda expert: self.transformers[expert],
            contexts={text: context.float() for text, context in contexts.items()},
        )
        videos = []
        for index, prompt in enumerate(prompts):
            request = _request(prompt, first_seed + index, guidance_scale)
            latents = generate(models, request)
            with torch.no_grad():
                videos.append(np.stack(list(decode_frames(self.vae, latents))))
            if on_video is not None:
                on_video(index + 1)
        return videos

    def measure(self, scenes: Sequence[Scene]) -> Shares:
        """Sample from the captions of the scenes and look at the result."""
        videos = self.shoot([scene.caption for scene in scenes])
        return Shares.of(scenes, [look(video) for video in videos])


def _request(prompt: str, seed: int, guidance_scale: float) -> SampleRequest:
    return SampleRequest(
        prompt=prompt,
        negative_prompt=UNCAPTIONED,
        width=SIZE,
        height=SIZE,
        num_frames=NUM_FRAMES,
        num_steps=NUM_STEPS,
        guidance_scale=(guidance_scale, guidance_scale),
        flow_shift=FLOW_SHIFT,
        seed=seed,
        solver="unipc",
        fps=FPS,
    )
