"""A tiny stand-in for the training step: mixed dtypes, two loss terms, block checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.core.types import Batch

WIDTH = 16
TOKENS = 6


class LowRank(nn.Module):
    """A frozen linear with a trained fp32 low-rank branch, as LoRA has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, WIDTH) / 4)
        self.up = nn.Parameter(torch.randn(WIDTH, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        low = x.float() @ self.down.T @ self.up.T
        return self.base(x) + low.to(x.dtype)


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = LowRank(dtype), LowRank(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class LoraStep(nn.Module):
    """Batch -> {"loss", "extra"}; frozen weights in `dtype`, trained ones in fp32."""

    def __init__(self, dtype: torch.dtype = torch.float32, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(blocks))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clean = batch.latents_BCFHW.flatten(1).view(-1, TOKENS, WIDTH)
        x = (clean * 0.5).to(self.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        error = x.float() - clean.roll(1, -1)
        return {"loss": error.square().mean(), "extra": 0.1 * x.float().abs().mean()}

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


class FullStep(nn.Module):
    """Every weight is trained, in `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to(dtype)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clean = batch.latents_BCFHW.flatten(1).view(-1, TOKENS, WIDTH)
        x = (clean * 0.5).to(self.dtype)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return {"loss": (x.float() - clean.roll(1, -1)).square().mean()}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


class WideStep(nn.Module):
    """Every weight is trained, in `dtype`; layers are large enough for DeepSpeed to use files."""

    def __init__(self, dtype: torch.dtype, layers: int = 7, width: int = 768) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype, self.width = dtype, width
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.to(dtype)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clean = batch.latents_BCFHW.flatten(1)
        wide = clean.repeat(1, self.width // clean.shape[1])
        x = (wide * 0.5).to(self.dtype)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return {"loss": (x.float() - wide.roll(1, -1)).square().mean()}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


class AdamWFactory:
    """The state is one value an element."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    keeps_low_precision: ClassVar[bool] = False

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([dict(g) for g in parameters], lr=lr, weight_decay=0.1)


class RawAdamWFactory(AdamWFactory):
    """Pretends that its state cannot be cut, as 8-bit states cannot."""

    state_names: ClassVar[tuple[str, ...]] = ()


class ShapedFactory(AdamWFactory):
    """Pretends to look at whole tensors, as Adafactor does."""

    elementwise: ClassVar[bool] = False


def make_batch(number: int) -> Batch:
    """Return a microbatch that depends on its number only; NaN in it for negative numbers."""
    random = torch.Generator().manual_seed(abs(number))
    latents = torch.randn(2, 1, 1, TOKENS, WIDTH, generator=random)
    if number < 0:
        latents[0] = torch.nan
    return Batch(latents_BCFHW=latents, context=(), names=(f"clip{number}.mp4",))


def batches_of_step(step: int, rank: int, world_size: int, accumulation: int) -> Iterator[Batch]:
    """Yield this rank's share of a step's microbatches."""
    for micro in range(accumulation):
        yield make_batch(1 + (step * accumulation + micro) * world_size + rank)
