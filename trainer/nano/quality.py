"""How good the nano models are: figures from pixels, on scenes that were never trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.clipart.judge import Seen, look
from trainer.clipart.scenes import UNCAPTIONED, Frames, Scene, draw
from trainer.clipart.split import held_out_scene
from trainer.contract.variants import Expert, get_variant
from trainer.models import load_image_encoder, load_text_encoder, load_transformer, load_vae
from trainer.models.wan.text_encoder import TextEncoder
from trainer.models.wan.vae import WanVAE
from trainer.nano.files import EXPERT_VARIANT, FILES, I2V_VARIANT, T2V_VARIANT
from trainer.nano.vae_training import as_video, psnr
from trainer.sampling.pipeline import SamplingModels, decode_frames, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import write_png

NUM_STEPS = 20
GUIDANCE_SCALE = 3.0
IMAGE_GUIDANCE_SCALE = 1.5
"""Of image to video: guidance by the text pulls the first frame away from the picture."""
FLOW_SHIFT = 8.0
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


def first_frame_psnr(videos: Sequence[Frames], images: Sequence[NDArray[np.uint8]]) -> list[float]:
    """Return, for each video, how close its first frame is to the image it started from, in dB."""
    pairs = zip(videos, images, strict=True)
    errors = [np.square(video[0].astype(float) - image).mean() for video, image in pairs]
    return [float(10 * np.log10(255**2 / max(error, 1e-9))) for error in errors]


@dataclass(frozen=True, slots=True)
class Studio:
    """Samples nano videos."""

    variant: str
    transformers: Mapping[Expert, nn.Module]
    text_encoder: TextEncoder
    vae: WanVAE
    image_encoder: Callable[[Tensor], Tensor] | None = None
    """Needed by variants that start from a picture."""

    def shoot(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[NDArray[np.uint8]] | None = None,
        first_seed: int = _FIRST_SEED,
        guidance_scale: float = GUIDANCE_SCALE,
        on_video: Callable[[int], None] | None = None,
    ) -> list[Frames]:
        """Return one video (F, H, W, 3) per prompt, seeds counting up from `first_seed`.

        Args:
            prompts: what the videos shall show.
            images: the first frame (H, W, 3) of each, for variants that start from a picture.
            first_seed: seed of the first video.
            guidance_scale: how strongly the prompt acts.
            on_video: called with the number of finished videos.
        """
        variant = get_variant(self.variant)
        texts = sorted({*prompts, UNCAPTIONED})
        contexts = dict(zip(texts, self.text_encoder(texts), strict=True))
        models = SamplingModels(
            variant=variant,
            transformer=lambda expert: self.transformers[expert],
            contexts={text: context.float() for text, context in contexts.items()},
            vae=self.vae,
            image_encoder=self.image_encoder,
        )
        videos = []
        for index, prompt in enumerate(prompts):
            request = _request(prompt, first_seed + index, guidance_scale)
            latents = _generate(models, request, None if images is None else images[index])
            with torch.no_grad():
                videos.append(np.stack(list(decode_frames(self.vae, latents))))
            if on_video is not None:
                on_video(index + 1)
        return videos

    def measure(self, scenes: Sequence[Scene]) -> Shares:
        """Sample from the captions of the scenes and look at the result."""
        videos = self.shoot([scene.caption for scene in scenes])
        return Shares.of(scenes, [look(video) for video in videos])

    def measure_from_images(self, scenes: Sequence[Scene]) -> tuple[Shares, list[float]]:
        """Sample from captions and first frames; return what is seen, and how close they stay.

        The second is the peak signal-to-noise ratio of first frame and image of each video, in dB.
        """
        images = [draw(scene)[0] for scene in scenes]
        captions = [scene.caption for scene in scenes]
        videos = self.shoot(captions, images=images, guidance_scale=IMAGE_GUIDANCE_SCALE)
        shares = Shares.of(scenes, [look(video) for video in videos])
        return shares, first_frame_psnr(videos, images)


def _generate(
    models: SamplingModels, request: SampleRequest, image: NDArray[np.uint8] | None
) -> Tensor:
    if image is None:
        return generate(models, request)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "first.png"
        write_png(path, image)
        return generate(models, replace(request, image=path))


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


def measure(folder: Path, num_samples: int) -> dict[str, float]:
    """Measure the shipped files in `folder`; shares in [0, 1], ratios in dB."""
    vae = load_vae(folder / FILES["vae"])
    text_encoder = load_text_encoder(folder / FILES["text_encoder"], dtype=torch.float32)
    scenes = held_out_scenes(num_samples)
    figures = {"vae_psnr_db": round(vae_psnr(vae, scenes), 2)}

    def transformer(name: str) -> nn.Module:
        return load_transformer(folder / FILES[name])

    t2v = transformer("t2v")
    studios = {
        "t2v": Studio(T2V_VARIANT, {"low_noise": t2v}, text_encoder, vae),
        "t2v_experts": Studio(
            EXPERT_VARIANT,
            {"low_noise": transformer("low_noise"), "high_noise": transformer("high_noise")},
            text_encoder,
            vae,
        ),
    }
    for name, studio in studios.items():
        for attribute, share in asdict(studio.measure(scenes)).items():
            figures[f"{name}_{attribute}"] = share
    image_encoder = load_image_encoder(folder / FILES["image_encoder"])
    i2v: dict[Expert, nn.Module] = {"low_noise": transformer("i2v")}
    shares, ratios_db = Studio(
        I2V_VARIANT, i2v, text_encoder, vae, image_encoder
    ).measure_from_images(scenes)
    for attribute, share in asdict(shares).items():
        figures[f"i2v_{attribute}"] = share
    return figures | {
        "i2v_first_frame_psnr_db": round(float(np.mean(ratios_db)), 2),
        "i2v_first_frame_psnr_least_db": round(min(ratios_db), 2),
    }
