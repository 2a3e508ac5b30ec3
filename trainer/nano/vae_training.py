"""Fitting the nano VAE: a variational autoencoder of Wan's architecture on generated clips.

The loss is the reconstruction error plus a small Kullback-Leibler term (Kingma & Welling, arXiv
1312.6114), which keeps the latents smooth enough for a transformer to generate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.clipart.scenes import WIDE, Frames, draw
from trainer.clipart.split import training_scene
from trainer.models.wan.tiny import tiny_vae_config
from trainer.models.wan.vae import WanVAE

_BASE_DIM = 8
_LEARNING_RATE = 3e-3
_KL_WEIGHT = 1e-4
"""Of the term at the end; it grows in a straight line from nothing."""
_FIRST_LOG_VARIANCE = -4.0
"""Little noise on the latents at first, so that the decoder has something to learn from."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the fit with crops of one size."""

    until: float
    """Fraction of the steps at which it ends."""
    num_frames: int
    size: int
    batch_size: int


PHASES = (
    Phase(0.5, 1, 32, 16),
    Phase(0.9, 5, 32, 4),
    Phase(1.0, 9, 64, 2),
)
"""Pictures first, then short videos, as Wan's own VAE was trained (arXiv 2503.20314, section 4.1);
crops, as the network is almost local, and whole pictures at last for its attention."""


def as_video(frames: Frames) -> Tensor:
    """Return (3, F, H, W) in [-1, 1], float32."""
    return (torch.from_numpy(frames).float() / 127.5 - 1).permute(3, 0, 1, 2)


class VAEFit:
    """The fit as steps that can be interrupted: `state` and `load` hold everything."""

    def __init__(self, num_steps: int, seed: int) -> None:
        self.num_steps, self.seed, self.step = num_steps, seed, 0
        self.vae = _untrained(seed)
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)
        )

    def advance(self) -> float:
        """Make one step; return the reconstruction error (mean square, in [-1, 1])."""
        phase = next(p for p in PHASES if self.step < p.until * self.num_steps)
        video = self._batch(phase)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        mean, log_variance = self.vae.encode_moments(video)
        log_variance = log_variance.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=random)
        raw = mean + (0.5 * log_variance).exp() * noise
        decoded = self.vae.decode(self.vae.normalise(raw), clamp=False)
        error = (decoded - video).square().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        sharpness = (decoded - video).abs().mean()
        weight = _KL_WEIGHT * self.step / self.num_steps
        self.optimizer.zero_grad()
        (error + 0.1 * sharpness + weight * divergence).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * _course(self.step, self.num_steps)
        self.optimizer.step()
        self.step += 1
        return float(error.detach())

    def state(self) -> dict[str, object]:
        """Return everything `load` needs to go on."""
        return {
            "step": self.step,
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, object]) -> None:
        """Go on where `state` was taken."""
        self.step = int(state["step"])  # type: ignore[call-overload]
        self.vae.load_state_dict(state["vae"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]

    def finished(self, num_clips: int = 64) -> WanVAE:
        """Return the VAE with the statistics of its latents measured over clips.

        As in the released VAEs, each normalised channel then has mean 0 and standard deviation 1.
        The decoder was fitted behind other statistics; it gets the same raw latents as before.
        """
        rng = np.random.default_rng((self.seed, 3))
        rows = []
        with torch.no_grad():
            for _ in range(num_clips):
                video = as_video(draw(training_scene(rng, WIDE))).unsqueeze(0)
                rows.append(self.vae.encode_moments(video)[0].transpose(0, 1).flatten(1))
        all_rows = torch.cat(rows, dim=1)
        self.vae.config = replace(
            self.vae.config,
            latents_mean=tuple(all_rows.mean(dim=1).tolist()),
            latents_std=tuple(all_rows.std(dim=1).tolist()),
        )
        return self.vae.eval()

    def _batch(self, phase: Phase) -> Tensor:
        rng = np.random.default_rng((self.seed, 2, self.step))
        return torch.stack([_crop(rng, phase) for _ in range(phase.batch_size)])


@torch.no_grad()
def _untrained(seed: int) -> WanVAE:
    """Return a VAE that treats every frame alone and whose residual branches are small.

    So the pictures of the first phase train what the videos of the others start from.
    """
    vae = WanVAE.random(tiny_vae_config("2.1", _BASE_DIM), seed)
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("gamma"):
            parameter.fill_(1)
        elif "time_conv" in name:
            identity = torch.eye(parameter.shape[1])
            parameter.zero_()
            parameter[:, :, -1, 0, 0] = identity.repeat(len(parameter) // len(identity), 1)
        elif parameter.dim() == 5 and parameter.shape[2] == 3:
            parameter[:, :, :-1] = 0
            parameter[:, :, -1] *= 3**0.5
        if name.endswith(("residual.6.weight", "proj.weight")):
            parameter.mul_(0.1)
    assert vae.conv1.bias is not None
    vae.conv1.bias[vae.latent_channels :] = _FIRST_LOG_VARIANCE
    return vae


def _crop(rng: np.random.Generator, phase: Phase) -> Tensor:
    # Seventeen frames tell a clip's speed; a crop shows some of them, in random order of time.
    frames = draw(training_scene(rng, WIDE))
    start = rng.integers(0, frames.shape[0] - phase.num_frames + 1)
    top, left = rng.integers(0, 64 - phase.size + 1, size=2)
    part = frames[
        start : start + phase.num_frames, top : top + phase.size, left : left + phase.size
    ]
    return as_video(np.ascontiguousarray(part))


def psnr(videos: list[Tensor], decode: Callable[[Tensor], Tensor]) -> float:
    """Return 10 log10(4 / mean squared error) over videos (3, F, H, W) in [-1, 1], in dB."""
    with torch.no_grad():
        errors = [(decode(v.unsqueeze(0)) - v).square().mean() for v in videos]
    return -10 * math.log10(float(torch.stack(errors).mean()) / 4)


def _course(step: int, num_steps: int) -> float:
    """Warm-up of 50 steps, then half a cosine."""
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
