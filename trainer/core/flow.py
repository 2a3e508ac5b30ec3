"""Rectified flow: one formula per function.

Conventions (Liu et al., arXiv:2209.03003; Wan technical report, arXiv:2503.20314): sigma is in
[0, 1], 0 is clean data and 1 is noise; the model sees timestep = 1000·sigma and predicts
velocity = noise - latents.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
Number = TypeVar("Number", float, Tensor)


def add_noise(latents_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Mix data and noise: (1 - σ)·latents + σ·noise."""
    sigma = _expand(sigma_B, latents_BCFHW)
    return (1 - sigma) * latents_BCFHW + sigma * noise_BCFHW


def velocity_target(latents_BCFHW: Tensor, noise_BCFHW: Tensor) -> Tensor:
    """Return what the transformer shall predict: noise - latents."""
    return noise_BCFHW - latents_BCFHW


def clean_estimate(noisy_BCFHW: Tensor, velocity_BCFHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Return the data that `velocity` points to: noisy - σ·velocity."""
    return noisy_BCFHW - _expand(sigma_B, noisy_BCFHW) * velocity_BCFHW


def noise_estimate(noisy_BCFHW: Tensor, velocity_BCFHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Return the noise that `velocity` points away from: noisy + (1 - σ)·velocity."""
    return noisy_BCFHW + (1 - _expand(sigma_B, noisy_BCFHW)) * velocity_BCFHW


def apply_flow_shift(sigma: Number, flow_shift: float) -> Number:
    """Move sigmas towards noise: s·σ / (1 + (s - 1)·σ). Identity at s = 1; keeps 0 and 1."""
    return flow_shift * sigma / (1 + (flow_shift - 1) * sigma)


def undo_flow_shift(sigma: Number, flow_shift: float) -> Number:
    """Inverse of `apply_flow_shift`: σ / (s - (s - 1)·σ)."""
    return sigma / (flow_shift - (flow_shift - 1) * sigma)


def to_timestep(sigma: Number) -> Number:
    """Return the number the transformer is given: 1000·σ."""
    return NUM_TRAIN_TIMESTEPS * sigma


def _expand(sigma_B: Tensor, like_BCFHW: Tensor) -> Tensor:
    return sigma_B.to(like_BCFHW.dtype).view(-1, *([1] * (like_BCFHW.dim() - 1)))
