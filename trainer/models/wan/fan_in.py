"""Seeded initialisation of small models that are trained from scratch or stand in for real ones."""

from __future__ import annotations

import torch
from torch import nn

from trainer.core.rng import generator


@torch.no_grad()
def init_fan_in(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place, each from a stream of its own name.

    Weights are normal with variance 1 / fan-in, which keeps activations near unit size; biases are
    normal with standard deviation 0.1, so that a test notices a lost one; one-dimensional weights
    (norms) are normal around 1.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(seed, "init", name))
        if name.endswith("bias"):
            value = 0.1 * noise
        elif parameter.numel() == parameter.shape[0]:
            value = 1 + 0.1 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.copy_(value)
