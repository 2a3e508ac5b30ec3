"""Time of sampling one video against diffusers' `WanPipeline`, both in this process.

Same weights, text embeddings, noise and sigmas; latents and frames of both are compared, too.
Processor time of one thread: the same as the clock's on an idle machine, and still meaningful on a
busy one.

The transformer and its clip are those of `step`: attention among the video tokens is 46 % of the
forward's arithmetic, as it is in the 14B model at 832x480x81 (53 %). Prompt and negative prompt
have as many tokens as those of people have, and guidance is on. The VAE is a twelfth as wide as
the released one.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.bench.result import Measurement, Timed, timed_in_turns
from trainer.bench.step import CONFIG, GRID
from trainer.contract.config import Prompt
from trainer.contract.diffusers_names import to_diffusers_name
from trainer.contract.variants import get_variant
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import VAEConfig, WanVAE
from trainer.models.wan.vae_keys import to_diffusers
from trainer.sampling.pipeline import SamplingModels, decode_frames, generate
from trainer.sampling.requests import SampleRequest

LIMIT: Final = 0.8
NUM_STEPS: Final = 6
VAE_WIDTH: Final = 8
"""Channels at full resolution; the released VAE has 96."""
PROMPT_TOKENS: Final = 80
NEGATIVE_TOKENS: Final = 126
"""Of the negative prompt that the Wan repositories recommend."""
VARIANT: Final = get_variant("wan2.1-t2v-1.3b")


@dataclass(frozen=True, slots=True)
class Work:
    """The video to make, with what both sides need for it."""

    request: SampleRequest
    transformer: WanTransformer
    vae: WanVAE
    prompt_TD: Tensor
    negative_TD: Tensor


def measure(*, pairs: int = 5, num_steps: int = NUM_STEPS) -> Measurement:
    """Return the median over pairs of (Menma / diffusers), from embeddings to latents.

    Args:
        pairs: videos of each side.
        num_steps: of the solver, each with two evaluations of the transformer.

    Raises:
        ImportError: diffusers is not installed.
    """
    torch.set_num_threads(1)
    work = make_work(num_steps)
    pipeline = make_reference(work)
    ours, theirs = sampled(work), reference_latents(work, pipeline)
    difference = float((ours - theirs).abs().max())
    frames = int(np.abs(decoded(work, ours).astype(int) - reference_frames(pipeline, ours)).max())
    sampling = timed_in_turns(
        lambda: sampled(work), lambda: reference_latents(work, pipeline), pairs
    )
    decoding = timed_in_turns(
        lambda: decoded(work, ours), lambda: reference_frames(pipeline, ours), pairs
    )
    return Measurement(
        name="sample",
        what="sampling / diffusers' WanPipeline",
        value=_ratio(sampling),
        unit="ratio",
        limit=LIMIT,
        figures={
            "menma_s": _median(sampling, 0),
            "reference_s": _median(sampling, 1),
            "decode_ratio": round(_ratio(decoding), 4),
            "menma_decode_s": _median(decoding, 0),
            "reference_decode_s": _median(decoding, 1),
            "with_decode_ratio": round(_ratio(_added(sampling, decoding)), 4),
            "steps": num_steps,
            "solver": work.request.solver,
            "tokens": GRID[0] * GRID[1] * GRID[2] // 4,
            "text_tokens": [PROMPT_TOKENS, NEGATIVE_TOKENS],
            "latents_difference": difference,
            "frames_difference": frames,
        },
    )


def make_work(num_steps: int) -> Work:
    """Return random models, embeddings and the request."""
    transformer = WanTransformer(CONFIG)
    init_fan_in(transformer, 3)
    vae = WanVAE.random(VAEConfig(base_dim=VAE_WIDTH, decoder_base_dim=VAE_WIDTH)).eval()
    random = torch.Generator().manual_seed(7)
    prompt_TD, negative_TD = (
        torch.randn(tokens, CONFIG.text_dim, generator=random)
        for tokens in (PROMPT_TOKENS, NEGATIVE_TOKENS)
    )
    frames, height, width = GRID
    prompt = Prompt.model_validate(
        {
            "prompt": "prompt",
            "negative_prompt": "negative",
            "num_frames": 4 * (frames - 1) + 1,
            "height": 8 * height,
            "width": 8 * width,
            "num_steps": num_steps,
            "seed": 1,
        }
    )
    return Work(SampleRequest.of(prompt, VARIANT), transformer, vae, prompt_TD, negative_TD)


def sampled(work: Work) -> Tensor:
    """Return the latents that Menma makes."""
    models = SamplingModels(
        variant=VARIANT,
        transformer=lambda _: work.transformer,
        contexts={
            work.request.prompt: work.prompt_TD,
            work.request.negative_prompt: work.negative_TD,
        },
    )
    return generate(models, work.request)


def decoded(work: Work, latents_BCFHW: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the frames that Menma makes of latents, (F, H, W, 3)."""
    return np.stack(list(decode_frames(work.vae, latents_BCFHW)))


def make_reference(work: Work) -> Any:
    """Return diffusers' pipeline with the same weights, and the sigmas of the Wan repositories."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    transformer = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    )
    state = work.transformer.state_dict()
    transformer.load_state_dict({to_diffusers_name(name): state[name] for name in state})
    vae = AutoencoderKLWan(base_dim=VAE_WIDTH)
    state = work.vae.state_dict()
    vae.load_state_dict({to_diffusers(name, "2.1"): state[name] for name in state})
    scheduler = _with_sigmas_of_the_repositories(UniPCMultistepScheduler)(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=work.request.flow_shift,
    )
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_latents(work: Work, pipeline: Any) -> Tensor:
    """Return the latents that diffusers makes."""
    request = work.request
    latents: Tensor = pipeline(
        prompt_embeds=_padded(work.prompt_TD),
        negative_prompt_embeds=_padded(work.negative_TD),
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_steps,
        guidance_scale=request.guidance_scale[0],
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).frames
    return latents


@torch.no_grad()
def reference_frames(pipeline: Any, latents_BCFHW: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the frames that diffusers makes of latents, as its pipeline does after the last step.

    (F, H, W, 3), rounded as files are.
    """
    config = pipeline.vae.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    video = pipeline.vae.decode(latents_BCFHW * std + mean, return_dict=False)[0]
    (frames,) = pipeline.video_processor.postprocess_video(video, output_type="np")
    return np.asarray((frames * 255).round(), dtype=np.uint8)


def _with_sigmas_of_the_repositories(scheduler: Any) -> Any:
    """Return a class of the scheduler that starts where the Wan repositories do.

    diffusers takes other sigmas only from the caller, and its pipeline does not ask for them.
    """

    class Scheduler(scheduler):  # type: ignore[misc]  # diffusers has no types
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            first = float(np.float32(0.999))
            sigmas = np.linspace(first, 0, num_inference_steps + 1)[:-1]
            super().set_timesteps(sigmas=sigmas, device=device)

    return Scheduler


def _padded(text_TD: Tensor) -> Tensor:
    return F.pad(text_TD, (0, 0, 0, CONFIG.text_len - len(text_TD))).unsqueeze(0)


Pairs = list[tuple[Timed, Timed]]


def _ratio(times: Pairs) -> float:
    return statistics.median(ours[0] / theirs[0] for ours, theirs in times)


def _median(times: Pairs, side: int) -> float:
    return round(statistics.median(pair[side][0] for pair in times), 4)


def _added(first: Pairs, second: Pairs) -> Pairs:
    """Return the pairs of doing both, one after the other."""

    def both(a: Timed, b: Timed) -> Timed:
        return a[0] + b[0], a[1] + b[1]

    return [(both(a[0], b[0]), both(a[1], b[1])) for a, b in zip(first, second, strict=True)]
