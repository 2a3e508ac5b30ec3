"""Small stand-ins that record how they are used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class FakeTransformer(nn.Module):
    """Velocity is a bent function of everything it is given; dropout shows the mode it runs in."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))
        self.part = nn.Dropout(0.5)
        self.frozen_part = nn.Dropout(0.5).eval()
        self.calls: list[dict[str, Tensor | None]] = []

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: list[Tensor],
        *,
        extra_channels: Tensor | None = None,
        image_context: Tensor | None = None,
    ) -> Tensor:
        assert latents.dtype == torch.float32
        self.calls.append(
            {
                "latents": latents,
                "timestep": timestep,
                "context": context[0],
                "extra_channels": extra_channels,
                "image_context": image_context,
            }
        )
        velocity = torch.sin(latents * self.weight + timestep.mean() / 700) + context[0].mean()
        if extra_channels is not None:
            velocity = velocity + extra_channels.mean()
        if image_context is not None:
            velocity = velocity + image_context.mean()
        return self.frozen_part(self.part(velocity))


class FakeVae:
    """Latents are average pixels; frame 0 alone, then four by four, as in the real ones."""

    def __init__(self, stride: tuple[int, int, int] = (4, 8, 8), channels: int = 16) -> None:
        self.stride = stride
        self.channels = channels
        self.decoded = 0

    def encode(self, video: Tensor, /) -> Tensor:
        assert not torch.is_grad_enabled()
        size = (self.stride[1], self.stride[2])
        rest = video[:, :, 1:]
        parts = [video[:, :, :1], *(rest.split(4, dim=2) if rest.shape[2] else ())]
        pooled = torch.cat([part.mean(2, keepdim=True) for part in parts], dim=2)
        small = torch.nn.functional.avg_pool3d(pooled, (1, *size))
        return small.mean(1, keepdim=True).repeat(1, self.channels, 1, 1, 1) + 0.1

    def decode_chunks(self, latents: Tensor, /) -> Iterator[Tensor]:
        assert not torch.is_grad_enabled()
        for index, frame in enumerate(latents.split(1, dim=2)):
            assert not torch.is_grad_enabled()
            self.decoded += 1
            pixels = frame[:, :3].repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
            yield pixels if index == 0 else pixels.repeat(1, 1, 4, 1, 1)


class FakeImageEncoder:
    """Two tokens per image that name it by its mean."""

    def __call__(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return mean.view(-1, 1, 1).expand(-1, 2, 4) + torch.arange(4)
