"""Rotary position embedding over frames, height and width, and the norm in front of it.

Shape letters: B batch, L tokens, D width, N heads, K head size.
Source: RoFormer (arXiv:2104.09864); the split over three axes is Wan's (arXiv:2503.20314).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_POSITIONS = 1024
"""Positions per axis that Wan was built with; more were never seen by any release."""


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Return how many of a head's channels turn with frame, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    theta: float,
    device: torch.device,
    frames: tuple[int, ...] | None = None,
) -> Tensor:
    """Return cos and sin of every token's angles, pairwise: (L, K) float32.

    Channel pair i of a head turns by position / theta^(2i / size of its axis). Angles are computed
    in float64: at position 1000 a float32 angle is off by 6e-5.

    Args:
        grid: tokens along frames, height and width; L is their product, width runs fastest.
        head_dim: K, even.
        theta: base of the frequencies.
        device: where the table shall be.
        frames: position of each frame; None: 0, 1, 2, …
    """
    # A sampler may ask first, in inference mode; the table must serve training as well.
    with torch.inference_mode(False):
        return _rope_table(grid, head_dim, theta, frames).to(device)


def _rope_table(
    grid: tuple[int, int, int], head_dim: int, theta: float, frames: tuple[int, ...] | None
) -> Tensor:
    angles = []
    for axis, (positions, size) in enumerate(zip(grid, axis_sizes(head_dim), strict=True)):
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / max(size, 1)
        places = torch.arange(positions, dtype=torch.float64)
        if axis == 0 and frames is not None:
            places = torch.tensor(frames, dtype=torch.float64)
        angle = torch.outer(places, theta**-exponents)
        shape = [1, 1, 1, angle.shape[1]]
        shape[axis] = positions
        angles.append(angle.view(shape).expand(*grid, -1))
    turn = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack((turn.cos(), turn.sin()), dim=-1).flatten(1).float()


class HeadNorm(nn.Module):
    """Root-mean-square norm over the full width, then a cut into heads, then rotation.

    One autograd node for the three: it keeps the input and one number a token, where separate
    operations would keep three float32 copies of queries and keys.
    """

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.num_heads = num_heads
        self.eps = eps

    def forward(self, tokens_BLD: Tensor, rope_LK: Tensor | None = None) -> Tensor:
        """Return (B, L, N, K) in the dtype of the input; float32 inside.

        Without gradients a float32 input is used up: the result is in its memory.
        """
        if torch.is_grad_enabled():
            return _norm_rotate(tokens_BLD, self.weight, rope_LK, self.num_heads, self.eps)
        x = tokens_BLD.float()
        scale_BL1 = _scale(x, self.eps)
        out = x.mul_(self.weight.float()).view(*x.shape[:-1], self.num_heads, -1)
        _turn(out, rope_LK, scale_BL1, back=False, out=out)
        return out.to(tokens_BLD.dtype)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens_BLD: Tensor,
        weight_D: Tensor,
        rope_LK: Tensor | None,
        num_heads: int,
        eps: float,
    ) -> Tensor:
        x = tokens_BLD.float()
        scale_BL1 = _scale(x, eps)
        out = (x * weight_D.float()).view(*x.shape[:-1], num_heads, -1)
        _turn(out, rope_LK, scale_BL1, back=False, out=out)
        ctx.save_for_backward(tokens_BLD, weight_D, rope_LK, scale_BL1)
        return out.to(tokens_BLD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLNK: Tensor) -> tuple[Tensor | None, ...]:
        tokens_BLD, weight_D, rope_LK, scale_BL1 = ctx.saved_tensors
        x = tokens_BLD.float()
        grad = torch.empty(grad_BLNK.shape, dtype=torch.float32, device=grad_BLNK.device)
        _turn(grad_BLNK.float().contiguous(), rope_LK, scale_BL1, back=True, out=grad)
        grad_BLD = grad.flatten(-2)
        grad_weight = grad_tokens = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_BLD * x).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            grad_BLD.mul_(weight_D.float())
            along = (grad_BLD * x).sum(-1, keepdim=True)
            along.mul_(scale_BL1.square()).div_(-x.shape[-1])
            grad_tokens = grad_BLD.addcmul_(x, along).to(tokens_BLD.dtype)
        return grad_tokens, grad_weight, None, None, None


_norm_rotate = cast("Callable[..., Tensor]", _NormRotate.apply)


def _scale(x_BLD: Tensor, eps: float) -> Tensor:
    """Return 1 / root mean square of every token, (B, L, 1)."""
    square_sum = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True).square()
    return torch.rsqrt(square_sum / x_BLD.shape[-1] + eps)


def _turn(
    values_BLNK: Tensor, rope_LK: Tensor | None, scale_BL1: Tensor, *, back: bool, out: Tensor
) -> None:
    """Write the values, turned (back) by their angles and scaled, into `out`."""
    if rope_LK is None:
        torch.mul(values_BLNK, scale_BL1.unsqueeze(-1), out=out)
        return
    turn = _as_complex(rope_LK)
    # Scaling the small table is cheaper than one more pass over all heads.
    turn = (turn.conj() if back else turn) * scale_BL1
    torch.mul(_as_complex(values_BLNK), turn.unsqueeze(-2), out=_as_complex(out))


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2))
