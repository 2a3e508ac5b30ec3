"""PiSSA: factors begin with the principal part of the base's weight, which then is trained.

Meng et al., arXiv:2404.02948: of W = U S Vᵀ take the R largest; A0 = √(S_R / s) V_Rᵀ and
B0 = U_R √(S_R / s), so that s · B0 A0 is that part, and train A, B beside the residual
W - s · B0 A0. Here W is never touched (it may be fp8, shared, or elsewhere): the layer computes
W x + s · (B A - B0 A0) x, which is the same. Shape letters: R rank, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.adapters.lora_linear import LoRALinear
from trainer.contract.errors import ConfigError
from trainer.core.seams import Technique


def principal_factors(
    weight_OI: Tensor,
    rank: int,
    scale: float,
    iterations: int | None,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return A0 (R, I) and B0 (O, R), float32 on the weight's device.

    Signs are fixed (of each column of U the largest entry is positive), so that all processes have
    the same.

    Args:
        weight_OI: float32.
        rank: R, at most the smaller of O and I.
        scale: s.
        iterations: of the randomised SVD; None: the exact one.
        random: of the randomised SVD, on the CPU.

    Raises:
        ConfigError: the weight has not that many singular values.
    """
    if rank > min(weight_OI.shape):
        raise ConfigError(
            f"a weight of {tuple(weight_OI.shape)} has no {rank} principal parts",
            hint="set a smaller adapter.rank, or rank_pattern for such layers",
        )
    if iterations is None:
        u, s, vt = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        u, s, vt = randomised_svd(weight_OI, rank, iterations, random)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    largest = u.abs().argmax(dim=0, keepdim=True)
    signs = u.gather(0, largest).sign()
    root = (s / scale).sqrt()
    return (signs.T * root[:, None] * vt).contiguous(), (signs * u * root).contiguous()


def randomised_svd(
    matrix_MN: Tensor, rank: int, iterations: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (M, q), S (q,), Vᵀ (q, N) of the largest singular values, by subspace iteration.

    Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4 and 5.1, with 8 columns more than
    `rank` where the matrix has them.
    """
    columns = min(rank + 8, *matrix_MN.shape)
    start = torch.randn(matrix_MN.shape[1], columns, generator=random).to(matrix_MN)
    basis, _ = torch.linalg.qr(matrix_MN @ start)
    for _ in range(iterations):
        back, _ = torch.linalg.qr(matrix_MN.T @ basis)
        basis, _ = torch.linalg.qr(matrix_MN @ back)
    u, s, vt = torch.linalg.svd(basis.T @ matrix_MN, full_matrices=False)
    return basis @ u, s, vt


class KeptStart(Technique):
    """Keeps A0 and B0 with checkpoints: computed again elsewhere they might be others."""

    def __init__(self, layers: Mapping[str, LoRALinear]) -> None:
        self._layers = layers

    def state_dict(self) -> dict[str, Tensor]:
        """Return A0 and B0 of each layer."""
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self._layers.items()
            for part in ("start_down", "start_up")
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        with torch.no_grad():
            for name, layer in self._layers.items():
                for part in ("start_down", "start_up"):
                    getattr(layer, part).copy_(state[f"{name}.{part}"])
