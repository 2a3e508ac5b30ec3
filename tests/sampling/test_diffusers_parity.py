"""Whole sampling runs against diffusers' Wan pipelines: same weights, embeddings and seed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor

from trainer.contract.config import Prompt
from trainer.contract.variants import TransformerConfig, get_variant
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import WanVAE, load_vae
from trainer.models.wan.vae_config import MEAN_22, STD_22
from trainer.sampling.pipeline import SamplingModels, decode_frames, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import write_frames

LIMIT = 2e-5
TEXT_DIM, TEXT_TOKENS = 32, 5

# models.md 2.3, diffusers -> original
_NAMES = [
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.norm2\.", ".norm3."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"norm_added_k", "norm_k_img"),
    (r"add_k_proj", "k_img"),
    (r"add_v_proj", "v_img"),
    (r"to_out\.0", "o"),
    (r"to_([qkv])", r"\1"),
]


def original_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        if "image_embedder" in name and "condition" not in pattern:
            continue
        name = re.sub(pattern, replacement, name)
    return name


def transformer_pair(
    seed: int,
    *,
    in_channels: int = 16,
    out_channels: int = 16,
    clip: bool = False,
    pair: bool = False,
) -> tuple[WanTransformer3DModel, WanTransformer]:
    """The same random weights in diffusers' class and in ours."""
    torch.manual_seed(seed)
    image_dim = 20 if clip else None
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        image_dim=image_dim,
        added_kv_proj_dim=24 if clip else None,
        pos_embed_seq_len=514 if pair else None,
    ).eval()
    if pair:  # zeros at birth, which would hide an exchange of the two images
        torch.nn.init.normal_(theirs.condition_embedder.image_embedder.pos_embed)
    config = TransformerConfig(
        dim=24,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=16,
        image_dim=image_dim,
        image_position_embedding=pair,
    )
    ours = WanTransformer(config)
    ours.load_state_dict({original_name(k): v for k, v in theirs.state_dict().items()})
    return theirs, ours.train()


def vae_pair(folder: Path, version: str) -> tuple[AutoencoderKLWan, WanVAE]:
    if version == "2.1":
        theirs = AutoencoderKLWan(base_dim=4)
    else:
        theirs = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=list(MEAN_22),
            latents_std=list(STD_22),
        )
    init_fan_in(theirs, 5)
    theirs.save_pretrained(folder / "vae")
    return theirs.eval(), load_vae(folder / "vae")


class RepositoryUniPC(UniPCMultistepScheduler):
    """With the sigmas of the Wan repositories, which diffusers only takes from the caller."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        first = float(np.float32(0.999))
        sigmas = np.linspace(first, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=sigmas, device=device)


class SingleShiftEuler(FlowMatchEulerDiscreteScheduler):
    """With explicit sigmas; left alone it shifts the low end twice."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=sigmas, device=device)


def scheduler_for(request: SampleRequest) -> Any:
    if request.solver == "euler":
        return SingleShiftEuler(shift=request.flow_shift)
    return RepositoryUniPC(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.flow_shift
    )


@dataclass
class Texts:
    prompt: Tensor
    negative: Tensor

    @classmethod
    def random(cls) -> Texts:
        generator = torch.Generator().manual_seed(11)
        return cls(*torch.randn(2, TEXT_TOKENS, TEXT_DIM, generator=generator))

    def padded(self) -> dict[str, Tensor]:
        """As the repositories give them to the transformer: zero rows up to 512."""

        def pad(rows: Tensor) -> Tensor:
            return torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows))).unsqueeze(0)

        return {"prompt_embeds": pad(self.prompt), "negative_prompt_embeds": pad(self.negative)}


def request_for(name: str, **changes: Any) -> SampleRequest:
    fields = {"prompt": "p", "width": 64, "height": 32, "num_frames": 9, "num_steps": 5, "seed": 3}
    return SampleRequest.of(Prompt.model_validate(fields | changes), get_variant(name))


def ours(
    request: SampleRequest, name: str, transformer: Callable[[str], Any], **more: Any
) -> Tensor:
    texts = Texts.random()
    contexts = {request.prompt: texts.prompt, request.negative_prompt: texts.negative}
    models = SamplingModels(
        variant=get_variant(name), transformer=transformer, contexts=contexts, **more
    )
    return generate(models, request)


def theirs(pipe_class: Any, request: SampleRequest, parts: dict[str, Any], **call: Any) -> Tensor:
    pipe = pipe_class(tokenizer=None, text_encoder=None, scheduler=scheduler_for(request), **parts)
    pipe.set_progress_bar_config(disable=True)
    low, high = request.guidance_scale
    if parts.get("boundary_ratio") is not None:
        call |= {"guidance_scale": high, "guidance_scale_2": low}
    else:
        call |= {"guidance_scale": low}
    if "video" not in call:
        call["num_frames"] = request.num_frames
    return pipe(
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        **Texts.random().padded(),
        **call,
    ).frames


def compare(mine: Tensor, reference: Tensor) -> None:
    assert mine.shape == reference.shape
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, atol=LIMIT, rtol=0)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two pictures of the sampled size: nothing is resampled on either side."""
    paths = []
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def clip_tokens(images_B3HW: Tensor) -> Tensor:
    """Stand-in for CLIP: 257 x 20 numbers that depend on the picture."""
    generator = torch.Generator().manual_seed(int(images_B3HW.double().sum().abs() * 1000) % 10007)
    return torch.randn(len(images_B3HW), 257, 20, generator=generator)


class PipelineWithClip(WanImageToVideoPipeline):
    """Calls the stand-in where diffusers would call CLIP."""

    def encode_image(self, image: Any, device: Any = None) -> Tensor:
        pictures = image if isinstance(image, list) else [image]
        arrays = [torch.from_numpy(np.array(picture)) for picture in pictures]
        return torch.cat([clip_tokens(a.permute(2, 0, 1)[None] / 127.5 - 1) for a in arrays])


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("num_frames", [9, 1])
def test_text_to_video(tmp_path: Path, solver: str, num_frames: int) -> None:
    name = "wan2.1-t2v-1.3b"
    request = request_for(name, solver=solver, num_frames=num_frames)
    transformer, mine = transformer_pair(0)
    vae, my_vae = vae_pair(tmp_path, "2.1")
    reference = theirs(WanPipeline, request, {"transformer": transformer, "vae": vae})
    latents = ours(request, name, lambda _: mine)
    compare(latents, reference)
    frames = np.stack(list(decode_frames(my_vae, latents)))
    assert frames.shape == (num_frames, 32, 64, 3)


def test_wan_2_2_experts(tmp_path: Path) -> None:
    name = "wan2.2-t2v-a14b"
    request = request_for(name, num_steps=8, guidance_scale=3.0, guidance_scale_high_noise=4.5)
    high, my_high = transformer_pair(1)
    low, my_low = transformer_pair(2)
    parts = {
        "transformer": high,
        "transformer_2": low,
        "vae": vae_pair(tmp_path, "2.1")[0],
        "boundary_ratio": 0.875,
    }
    experts = {"high_noise": my_high, "low_noise": my_low}
    compare(ours(request, name, experts.__getitem__), theirs(WanPipeline, request, parts))


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.2-i2v-a14b"])
def test_image_to_video(tmp_path: Path, images: list[Path], name: str) -> None:
    request = request_for(name, image=images[0], num_steps=8)
    clip = name.startswith("wan2.1")
    first, my_first = transformer_pair(1, in_channels=36, clip=clip)
    second, my_second = transformer_pair(2, in_channels=36, clip=clip)
    vae, my_vae = vae_pair(tmp_path, "2.1")
    parts = {"transformer": first, "vae": vae, "image_processor": None, "image_encoder": None}
    if clip:
        experts = {"low_noise": my_first}
    else:
        parts |= {"transformer_2": second, "boundary_ratio": 0.9}
        experts = {"high_noise": my_first, "low_noise": my_second}
    reference = theirs(PipelineWithClip, request, parts, image=Image.open(images[0]))
    encoder = clip_tokens if clip else None
    compare(ours(request, name, experts.__getitem__, vae=my_vae, image_encoder=encoder), reference)


def test_first_and_last_frame(tmp_path: Path, images: list[Path]) -> None:
    name = "wan2.1-flf2v-14b"
    request = request_for(name, image=images[0], last_image=images[1])
    transformer, mine = transformer_pair(1, in_channels=36, clip=True, pair=True)
    vae, my_vae = vae_pair(tmp_path, "2.1")
    parts = {"transformer": transformer, "vae": vae, "image_processor": None, "image_encoder": None}
    reference = theirs(
        PipelineWithClip,
        request,
        parts,
        image=Image.open(images[0]),
        last_image=Image.open(images[1]),
    )
    mine_latents = ours(request, name, lambda _: mine, vae=my_vae, image_encoder=clip_tokens)
    compare(mine_latents, reference)


@pytest.mark.parametrize(
    ("solver", "strength"), [("unipc", 0.8), ("unipc", 1.0), ("euler", 0.5), ("euler", 0.29)]
)
def test_video_to_video(tmp_path: Path, solver: str, strength: float) -> None:
    name = "wan2.1-t2v-1.3b"
    clip = tmp_path / "clip"
    pixels = np.random.default_rng(5).integers(0, 256, (9, 32, 64, 3), dtype=np.uint8)
    write_frames(clip, pixels)
    request = request_for(name, solver=solver, num_steps=8, video=clip, strength=strength)
    transformer, mine = transformer_pair(0)
    vae, my_vae = vae_pair(tmp_path, "2.1")
    reference = theirs(
        WanVideoToVideoPipeline,
        request,
        {"transformer": transformer, "vae": vae},
        video=[Image.fromarray(frame) for frame in pixels],
        strength=strength,
    )
    compare(ours(request, name, lambda _: mine, vae=my_vae), reference)


@pytest.mark.parametrize("with_image", [False, True])
def test_ti2v_5b(tmp_path: Path, images: list[Path], with_image: bool) -> None:
    name = "wan2.2-ti2v-5b"
    request = request_for(name, image=images[0] if with_image else None)
    transformer, mine = transformer_pair(4, in_channels=48, out_channels=48)
    vae, my_vae = vae_pair(tmp_path, "2.2")
    parts = {"transformer": transformer, "vae": vae, "expand_timesteps": True}
    if with_image:
        parts |= {"image_processor": None, "image_encoder": None}
        reference = theirs(WanImageToVideoPipeline, request, parts, image=Image.open(images[0]))
    else:
        reference = theirs(WanPipeline, request, parts)
    compare(ours(request, name, lambda _: mine, vae=my_vae), reference)
