"""Encoder and decoder of both Wan VAEs, built from a `VAEConfig`; official module names.

2.1 is a flat list of blocks. 2.2 groups them by resolution and adds a parameter-free skip path
to each group: channel averages on the way down, repeated channels on the way up.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainer.models.wan.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    FrameCache,
    ResidualBlock,
    RMSNorm,
    Upsample,
    add,
    norm_silu,
)
from trainer.models.wan.vae_config import RESIDUAL_BLOCKS, WIDTH_FACTORS, VAEConfig

_LAST = len(WIDTH_FACTORS) - 1
# The encoder halves frames at its second and third resolution, the decoder doubles them at its
# first and second.
_DOWN_IN_TIME = (False, True, True)
_UP_IN_TIME = (True, True, False)


class Encoder(nn.Module):
    """Pixels (B, 3 or 12, F, H, W) to mean and log-variance (B, 2 z, f, H/8, W/8), chunk by chunk.

    F is 1 in the first chunk and a multiple of 4 in the others; f is 1 and F / 4.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *WIDTH_FACTORS)]
        self.conv1 = CausalConv3d(3 * config.pixel_patch**2, widths[0], 3)
        grouped = config.version == "2.2"
        self.downsamples = nn.Sequential(
            *(_down_groups(widths) if grouped else _flat(_down_layers(widths)))
        )
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], config.z_dim * 2)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Encode one chunk."""
        return _run(self.head, self.conv1(x, cache), cache, self.downsamples, self.middle)


class Decoder(nn.Module):
    """Latents (B, z, f, h, w) to pixels (B, 3 or 12, F, 8 h, 8 w), chunk by chunk.

    f is 1 in the first chunk, where F is 1; in the others F is 4 f.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [
            config.decoder_base_dim * factor for factor in (WIDTH_FACTORS[-1], *WIDTH_FACTORS[::-1])
        ]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3)
        self.middle = _middle(widths[0])
        grouped = config.version == "2.2"
        self.upsamples = nn.Sequential(
            *(_up_groups(widths) if grouped else _flat(_up_layers(widths)))
        )
        self.head = _head(widths[-1], 3 * config.pixel_patch**2)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Decode one chunk."""
        return _run(self.head, self.conv1(x, cache), cache, self.middle, self.upsamples)


class DownGroup(nn.Module):
    """The blocks of one resolution of the 2.2 encoder and the average that skips them."""

    def __init__(self, layers: list[nn.Module], outputs: int, *, down: bool, in_time: bool) -> None:
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self._outputs = outputs
        self._space = 2 if down else 1
        self._time = 2 if in_time else 1

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Run one chunk (B, C, F, H, W)."""
        hidden = x
        for layer in self.downsamples:
            hidden = layer(hidden, cache)
        return add(hidden, self._skip(x))

    def _skip(self, x: Tensor) -> Tensor:
        # The lone first frame is paired with zeros, as in the release.
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self._time, 0))
        x = rearrange(
            x,
            "b c (f t) (h p) (w q) -> b (c t p q) f h w",
            t=self._time,
            p=self._space,
            q=self._space,
        )
        batch, _, *size = x.shape
        return x.reshape(batch, self._outputs, -1, *size).mean(dim=2)


class UpGroup(nn.Module):
    """The blocks of one resolution of the 2.2 decoder and the repetition that skips them."""

    def __init__(self, layers: list[nn.Module], outputs: int, *, up: bool, in_time: bool) -> None:
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self._outputs = outputs
        self._up = up
        self._time = 2 if in_time else 1

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Run one chunk (B, C, F, H, W)."""
        hidden = x
        for layer in self.upsamples:
            hidden = layer(hidden, cache)
        return add(hidden, self._skip(x, cache)) if self._up else hidden

    def _skip(self, x: Tensor, cache: FrameCache) -> Tensor:
        copies = self._outputs * self._time * 4 // x.shape[1]
        x = rearrange(
            x.repeat_interleave(copies, dim=1),
            "b (c t p q) f h w -> b c (f t) (h p) (w q)",
            t=self._time,
            p=2,
            q=2,
        )
        return x[:, :, self._time - 1 :] if cache.first_chunk else x


def _run(head: nn.Sequential, x: Tensor, cache: FrameCache, *paths: nn.Sequential) -> Tensor:
    for path in paths:
        for layer in path:
            x = layer(x, cache)
    output: Tensor = head[2](norm_silu(head[0], x), cache)
    return output


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)
    )


def _head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(width), nn.SiLU(), CausalConv3d(width, outputs, 3))


def _flat(groups: Iterator[list[nn.Module]]) -> list[nn.Module]:
    return [layer for group in groups for layer in group]


def _residuals(inputs: int, outputs: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(outputs if i else inputs, outputs) for i in range(count)]


def _down_layers(widths: list[int]) -> Iterator[list[nn.Module]]:
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers = _residuals(inputs, outputs, RESIDUAL_BLOCKS)
        if i < _LAST:
            layers.append(Downsample(outputs, in_time=_DOWN_IN_TIME[i]))
        yield layers


def _down_groups(widths: list[int]) -> Iterator[nn.Module]:
    for i, layers in enumerate(_down_layers(widths)):
        down = i < _LAST
        yield DownGroup(layers, widths[i + 1], down=down, in_time=down and _DOWN_IN_TIME[i])


def _up_layers(widths: list[int]) -> Iterator[list[nn.Module]]:
    # In 2.1 an upsampler halves the channels.
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers = _residuals(inputs // 2 if i else inputs, outputs, RESIDUAL_BLOCKS + 1)
        if i < _LAST:
            layers.append(Upsample(outputs, outputs // 2, in_time=_UP_IN_TIME[i]))
        yield layers


def _up_groups(widths: list[int]) -> Iterator[nn.Module]:
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        up = i < _LAST
        in_time = up and _UP_IN_TIME[i]
        layers = _residuals(inputs, outputs, RESIDUAL_BLOCKS + 1)
        if up:
            layers.append(Upsample(outputs, outputs, in_time=in_time))
        yield UpGroup(layers, outputs, up=up, in_time=in_time)
