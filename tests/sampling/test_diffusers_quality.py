"""Latents and frames of whole runs against diffusers' pipelines: ten steps, guidance, LoRAs.

Each side loads the LoRAs with its own code, from files that Menma wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor

from tests.sampling.test_diffusers_parity import (
    PipelineWithClip,
    Texts,
    clip_tokens,
    images,
    ours,
    request_for,
    scheduler_for,
    transformer_pair,
    vae_pair,
)
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import WanVAE
from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import write_frames

LIMIT = 1e-4
NUM_STEPS = 10
RANK = 3
__all__ = ["images"]  # a fixture is used by being there


@dataclass
class Case:
    """One model on both sides."""

    variant: str
    theirs: dict[str, WanTransformer3DModel]
    """By expert."""
    mine: dict[str, WanTransformer]
    """By expert."""
    clip: bool = False
    boundary: float | None = None


def case_of(name: str) -> Case:
    if name == "text to video":
        theirs, mine = transformer_pair(0)
        return Case("wan2.1-t2v-1.3b", {"low_noise": theirs}, {"low_noise": mine})
    if name == "image to video":
        theirs, mine = transformer_pair(1, in_channels=36, clip=True)
        return Case("wan2.1-i2v-14b", {"low_noise": theirs}, {"low_noise": mine}, clip=True)
    pairs = {"high_noise": transformer_pair(1), "low_noise": transformer_pair(2)}
    return Case(
        "wan2.2-t2v-a14b",
        {expert: pair[0] for expert, pair in pairs.items()},
        {expert: pair[1] for expert, pair in pairs.items()},
        boundary=0.875,
    )


def write_lora(path: Path, model: WanTransformer, layout: str, seed: int) -> Path:
    """Write a LoRA on all layers of the blocks, with an alpha that is not its rank."""
    random = torch.Generator().manual_seed(seed)
    updates = {
        name: LoRAFactors(
            torch.randn(RANK, layer.in_features, generator=random) / layer.in_features**0.5,
            torch.randn(layer.out_features, RANK, generator=random) / 3,
            alpha=2.0 * RANK,
        )
        for name, layer in model.blocks.named_modules(prefix="blocks")
        if isinstance(layer, torch.nn.Linear)
    }
    save_adapter(updates, path, layout=layout, dtype=torch.float32)
    return path


def pipeline_of(case: Case, request: SampleRequest, vae: AutoencoderKLWan) -> Any:
    parts: dict[str, Any] = {"transformer": case.theirs["low_noise"]}
    if case.boundary is not None:
        parts = {
            "transformer": case.theirs["high_noise"],
            "transformer_2": case.theirs["low_noise"],
            "boundary_ratio": case.boundary,
        }
    pipe_class: Any = WanPipeline
    if case.clip:
        pipe_class = PipelineWithClip
        parts |= {"image_processor": None, "image_encoder": None}
    pipe = pipe_class(
        tokenizer=None, text_encoder=None, scheduler=scheduler_for(request), vae=vae, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_latents(pipe: Any, request: SampleRequest, **call: Any) -> Tensor:
    if request.image is not None:
        call["image"] = Image.open(request.image)
    low, high = request.guidance_scale
    call["guidance_scale"] = low
    if pipe.config.boundary_ratio is not None:
        call |= {"guidance_scale": high, "guidance_scale_2": low}
    latents: Tensor = pipe(
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        **Texts.random().padded(),
        **call,
    ).frames
    return latents


@torch.no_grad()
def reference_video(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video: Tensor = vae.decode(latents * std + mean, return_dict=False)[0]
    return video


def compare(mine: Tensor, reference: Tensor, vae: AutoencoderKLWan, my_vae: WanVAE) -> None:
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, atol=LIMIT, rtol=0)
    with torch.no_grad():
        video = my_vae.decode(mine)
    expected = reference_video(vae, reference).clamp(-1, 1)
    assert expected.std() > 0.05
    torch.testing.assert_close(video, expected, atol=LIMIT, rtol=0)


def with_loras(case: Case, pipe: Any, folder: Path, layout: str) -> None:
    """Put a LoRA on each transformer, each side with its own loader."""
    for number, (expert, model) in enumerate(case.mine.items()):
        path = write_lora(folder / f"{expert}.safetensors", model, layout, number)
        attach(model, load_adapter(path))
        second = case.boundary is not None and expert == "low_noise"
        pipe.load_lora_weights(str(path), adapter_name=expert, load_into_transformer_2=second)
        adapted = [m for m in case.theirs[expert].modules() if isinstance(m, BaseTunerLayer)]
        assert len(adapted) == (24 if case.clip else 20)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderKLWan, WanVAE]:
    """The same weights on both sides."""
    return vae_pair(tmp_path_factory.mktemp("vae"), "2.1")


@pytest.mark.parametrize(
    ("solver", "lora"),
    [("unipc", None), ("euler", None), ("unipc", "comfy"), ("unipc", "peft"), ("euler", "comfy")],
)
@pytest.mark.parametrize("name", ["text to video", "image to video", "expert pair"])
def test_latents_and_frames(
    vaes: tuple[AutoencoderKLWan, WanVAE],
    tmp_path: Path,
    images: list[Path],
    name: str,
    solver: str,
    lora: str | None,
) -> None:
    case = case_of(name)
    request = request_for(
        case.variant,
        solver=solver,
        num_steps=NUM_STEPS,
        guidance_scale=3.0,
        image=images[0] if case.clip else None,
        **({} if case.boundary is None else {"guidance_scale_high_noise": 4.5}),
    )
    vae, my_vae = vaes
    pipe = pipeline_of(case, request, vae)
    parts = {"vae": my_vae, "image_encoder": clip_tokens} if case.clip else {}
    if lora is not None:
        plain = ours(request, case.variant, case.mine.__getitem__, **parts)
        with_loras(case, pipe, tmp_path, lora)
    mine = ours(request, case.variant, case.mine.__getitem__, **parts)
    if lora is not None:
        assert (mine - plain).abs().mean() > 0.05
    compare(mine, reference_latents(pipe, request), vae, my_vae)


class ControlTransformer(WanTransformer3DModel):
    """A Fun-Control model as VideoX-Fun calls it: control and image latents behind the noise."""

    control: Tensor
    image_tokens: Tensor

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        together = torch.cat([hidden_states, self.control], dim=1)
        named["encoder_hidden_states_image"] = self.image_tokens
        return super().forward(together, *given, **named)


@torch.no_grad()
def control_channels(vae: AutoencoderKLWan, control: Tensor, image: Tensor | None) -> Tensor:
    """Encode as VideoX-Fun does: the image's latent frame, then zeros."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )

    def encode(video: Tensor) -> Tensor:
        latents: Tensor = (vae.encode(video).latent_dist.mode() - mean) / std
        return latents

    known = encode(control)
    start = torch.zeros_like(known)
    if image is not None:
        start[:, :, 0] = encode(image[:, :, None])[:, :, 0]
    return torch.cat([known, start], dim=1)


@pytest.mark.parametrize("with_image", [False, True])
def test_fun_control(
    vaes: tuple[AutoencoderKLWan, WanVAE], tmp_path: Path, images: list[Path], with_image: bool
) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (9, 32, 64, 3), dtype=np.uint8)
    write_frames(tmp_path / "control", pixels)
    name = "wan2.1-fun-control-1.3b"
    request = request_for(
        name,
        control=tmp_path / "control",
        image=images[0] if with_image else None,
        num_steps=NUM_STEPS,
    )
    theirs, mine = transformer_pair(3, in_channels=48, clip=True)
    theirs.__class__ = ControlTransformer
    assert isinstance(theirs, ControlTransformer)
    vae, my_vae = vaes
    video = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None] / 127.5 - 1
    first = None
    if with_image:
        first = torch.from_numpy(np.array(Image.open(images[0]))).permute(2, 0, 1)[None] / 127.5 - 1
    theirs.control = control_channels(vae, video, first)
    # VideoX-Fun gives zeros where there is no image.
    theirs.image_tokens = torch.zeros(1, 257, 20) if first is None else clip_tokens(first)
    case = Case(name, {"low_noise": theirs}, {"low_noise": mine})
    random = torch.Generator("cpu").manual_seed(request.seed)
    noise = torch.randn(1, 16, 3, 4, 8, generator=random)
    pipe = pipeline_of(case, request, vae)
    # The image is in the channels already.
    reference = reference_latents(pipe, replace(request, image=None), latents=noise)
    latents = ours(request, name, lambda _: mine, vae=my_vae, image_encoder=clip_tokens)
    compare(latents, reference, vae, my_vae)
