"""Causal building blocks of both Wan VAEs, named like the official ones.

A video runs through in chunks: one frame first, then any multiple of the temporal stride. Each
layer that looks back keeps its last input frames in a `FrameCache`, so that the chunks together
give what one pass over the whole video would, and memory does not grow with its length.

Shape letters: B batch, C channels, F frames, H/W height and width; all activations are BCFHW.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class FrameCache:
    """The frames that causal layers still need of earlier chunks; one per video and direction."""

    def __init__(self) -> None:
        self.first_chunk = True
        """True while the chunk in work is the first, which holds a single frame."""
        self._frames: dict[nn.Module, Tensor] = {}

    def swap(self, layer: nn.Module, x: Tensor, count: int) -> Tensor | None:
        """Return the frames kept for `layer` and keep the last `count` of them and `x` instead."""
        earlier = self._frames.get(layer)
        last = x[:, :, -count:]
        if earlier is not None and last.shape[2] < count:
            last = torch.cat([earlier[:, :, last.shape[2] - count :], last], dim=2)
        else:
            # A view would keep the whole chunk alive until the next one.
            last = last.clone()
        self._frames[layer] = last
        return earlier


class CausalConv3d(nn.Conv3d):
    """Convolution over (F, H, W) that sees earlier frames only; zeros stand before the first.

    `kernel` is odd; height and width keep their size.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int, int], time_stride: int = 1
    ) -> None:
        if isinstance(kernel, int):
            kernel = (kernel, kernel, kernel)
        super().__init__(
            inputs,
            outputs,
            kernel,
            stride=(time_stride, 1, 1),
            padding=(0, kernel[1] // 2, kernel[2] // 2),
        )
        self.history = kernel[0] - 1

    # A convolution that continues a stream needs the stream's cache: it cannot stand in for a
    # plain nn.Conv3d, from which it only takes parameters and their names.
    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:  # type: ignore[override]
        """Convolve one chunk (B, C, F, H, W)."""
        if self.history == 0:
            return self.convolve(x)
        earlier = cache.swap(self, x, self.history)
        if earlier is None and x.shape[2] == 1:
            return self._convolve_still(x)
        return self.convolve(self._with_history(earlier, x))

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve frames that already have their history in front."""
        stride = cast("tuple[int, int, int]", self.stride)
        padding = cast("tuple[int, int, int]", self.padding)
        return _conv(x, self.weight, self.bias, stride, padding[1:])

    def _with_history(self, earlier: Tensor | None, x: Tensor) -> Tensor:
        known = 0 if earlier is None else earlier.shape[2]
        pieces = [] if earlier is None else [earlier]
        if known < self.history:
            batch, channels, _, height, width = x.shape
            pieces.insert(0, x.new_zeros(batch, channels, self.history - known, height, width))
        return torch.cat([*pieces, x], dim=2)

    def _convolve_still(self, x: Tensor) -> Tensor:
        # Only the last tap in time meets the only frame, the others would multiply zeros.
        weight = self.weight[:, :, -1]
        padding = cast("tuple[int, int, int]", self.padding)[1:]
        return F.conv2d(x.squeeze(2), weight, self.bias, padding=padding).unsqueeze(2)


class RMSNorm(nn.Module):
    """Scale every pixel's channel vector to length sqrt(C), then by `gamma`.

    `ones` is the number of trailing axes of length one `gamma` has in files: 3, in attention 2.
    """

    def __init__(self, channels: int, ones: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * ones))
        self._scale = channels**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, F, H, W); lengths are computed in float32 or better."""
        factor: Tensor = self._scale / _channel_lengths(x).clamp_min(1e-12)
        gamma: Tensor = self.gamma.view(-1, 1, 1, 1)
        if torch.is_grad_enabled():
            return (x * factor).to(x.dtype) * gamma
        # Writing through `out` rounds once and needs no float32 copy of the activation.
        scaled = torch.empty_like(x)
        torch.mul(x, factor, out=scaled)
        return scaled.mul_(gamma)


def _channel_lengths(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":
        # 1/30 of the time of vector_norm along a strided axis; the limit keeps the gradient finite.
        squares: Tensor = x.to(wide).square().sum(dim=1, keepdim=True)
        return squares.clamp_min(1e-24).sqrt()
    # Needs no copy of the activation in float32.
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    return lengths


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise, then SiLU; in place where nothing has to be kept for a backward pass."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def add(x: Tensor, residual: Tensor) -> Tensor:
    """Return the sum; reuses the memory of `x` where nothing is kept for a backward pass."""
    return x + residual if torch.is_grad_enabled() else x.add_(residual)


class ResidualBlock(nn.Module):
    """Two causal convolutions, each behind a norm and SiLU, around a (projected) identity."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # Indices are part of the official tensor names; 5 was a dropout of rate 0.
        self.residual = nn.Sequential(
            RMSNorm(inputs),
            nn.SiLU(),
            CausalConv3d(inputs, outputs, 3),
            RMSNorm(outputs),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(outputs, outputs, 3),
        )
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Run one chunk (B, C, F, H, W)."""
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        hidden = conv1(norm_silu(norm1, x), cache)
        hidden = conv2(norm_silu(norm2, hidden), cache)
        shortcut = self.shortcut
        return add(hidden, shortcut(x, cache) if isinstance(shortcut, CausalConv3d) else x)


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, ones=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, _cache: FrameCache) -> Tensor:
        """Run one chunk (B, C, F, H, W); frames do not see each other."""
        batch, channels, frames, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(-1, 1, height * width, channels)
        # 1x1 convolutions as linear maps: the fused attention kernels want channels innermost.
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        query, key, value = qkv.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = F.linear(mixed, self.proj.weight.flatten(1), self.proj.bias)
        mixed = mixed.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        return x + mixed


class Downsample(nn.Module):
    """Halve height and width, with `in_time` also the frames (all but the very first)."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.time_conv = (
            CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if in_time else None
        )

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Run one chunk (B, C, F, H, W); F is 1 in the first chunk, even in the others."""
        x = _conv_frames(cast("nn.Conv2d", self.resample[1]), F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        earlier = cache.swap(self.time_conv, x, 1)
        if earlier is None:
            return x
        return self.time_conv.convolve(torch.cat([earlier, x], dim=2))


class Upsample(nn.Module):
    """Double height and width, with `in_time` also the frames (all but the very first)."""

    def __init__(self, channels: int, outputs: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, outputs, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Run one chunk (B, C, F, H, W)."""
        if self.time_conv is not None and not cache.first_chunk:
            x = rearrange(self.time_conv(x, cache), "b (t c) f h w -> b c (f t) h w", t=2)
        x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        return _conv_frames(cast("nn.Conv2d", self.resample[1]), x)


def _conv_frames(conv: nn.Conv2d, x: Tensor) -> Tensor:
    # As a 3-D convolution one frame deep it needs no transposed copy of the activation.
    stride = cast("tuple[int, int]", conv.stride)
    padding = cast("tuple[int, int]", conv.padding)
    return _conv(x, conv.weight.unsqueeze(2), conv.bias, (1, *stride), padding)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Convolve (B, C, F, H, W), padding height and width only."""
    if x.device.type != "cpu":
        return F.conv3d(x, weight, bias, stride=stride, padding=(0, *padding))
    # torch has no fast 3-D kernel for the CPU; 2-D convolutions, one per tap in time, took 1/15
    # of the time (16 channels, 6 frames of 128 x 128).
    taps, step = weight.shape[2], stride[0]
    frames = (x.shape[2] - taps) // step + 1
    planes = x.transpose(1, 2).contiguous()
    total: Tensor | None = None
    for tap in range(taps):
        seen = planes[:, tap : tap + step * (frames - 1) + 1 : step].flatten(0, 1)
        part = F.conv2d(seen, weight[:, :, tap], None if tap else bias, stride[1:], padding)
        total = part if total is None else add(total, part)
    assert total is not None
    return total.view(x.shape[0], frames, *total.shape[1:]).transpose(1, 2)
