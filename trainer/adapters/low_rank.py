"""Sums and truncations of low-rank updates.

Shape letters: R rank, K inner size of a core, I input width, O output width, S size of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.adapters.base import LoRAFactors

_SMALL = 1024
"""Matrices with a side up to this are decomposed whole."""
_FIRST_RANK = 64
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which singular values of an update are kept; of several limits the tightest counts.

    Attributes:
        max_rank: not more than this many.
        energy: the fewest that hold this share of ‖D‖², the sum of their squares.
        ratio: those of at least the largest one / ratio.
    """

    max_rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    @property
    def limits(self) -> bool:
        """Tell whether anything can be cut off."""
        return (self.max_rank, self.energy, self.ratio) != (None, None, None)

    def rank_of(self, spectrum_K: Tensor, total: float) -> int:
        """Return how many of the falling singular values are kept, at least 1.

        Args:
            spectrum_K: singular values, float64.
            total: ‖D‖²; more than the sum of squares when the spectrum is not complete.
        """
        limits = [len(spectrum_K), max(1, int((spectrum_K > 0).sum()))]
        if self.max_rank is not None:
            limits.append(self.max_rank)
        if self.energy is not None:
            limits.append(int((spectrum_K.square().cumsum(0) < self._wanted(total)).sum()) + 1)
        if self.ratio is not None and len(spectrum_K):
            limits.append(int((spectrum_K >= spectrum_K[0] / self.ratio).sum()))
        return max(1, min(limits))

    def decided_by(self, spectrum_K: Tensor, total: float) -> bool:
        """Tell whether a longer spectrum would give the same rank."""
        if self.max_rank is not None and self.max_rank <= len(spectrum_K):
            return True
        held = float(spectrum_K.square().sum())
        by_energy = self.energy is not None and held >= self._wanted(total)
        by_ratio = self.ratio is not None and bool(spectrum_K[-1] < spectrum_K[0] / self.ratio)
        return by_energy or by_ratio

    def _wanted(self, total: float) -> float:
        # The sum of squares is rounded, so that a share of 1 is met at all.
        return (self.energy or 0.0) * total * (1 - 1e-12)


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """An update after cutting.

    Attributes:
        factors: float32, the scale they were given or 1.
        energy: share of ‖D‖² that is left, in [0, 1].
        total: ‖D‖² before.
    """

    factors: LoRAFactors
    energy: float
    total: float


def weighted_sum(parts: Sequence[tuple[LoRAFactors, float]]) -> LoRAFactors:
    """Return Σ weight · delta of updates of one layer, exactly, by concatenation of factors.

    [B₁ B₂] [A₁; A₂] = B₁A₁ + B₂A₂, so the rank is the sum of the ranks. Where all parts have the
    same weight · scale it stays in alpha and no factor is changed; else it goes into the up
    factors, in float32, and the scale is 1. Parts of weight 0 are left out.

    Raises:
        ValueError: no part has a weight.
    """
    kept = [(factors, weight) for factors, weight in parts if weight]
    if not kept:
        raise ValueError("nothing to sum")
    strengths = [weight * factors.scale for factors, weight in kept]
    rank = sum(factors.rank for factors, _ in kept)
    common = strengths[0] if len(set(strengths)) == 1 else None
    downs, ups = [], []
    for (factors, _), strength in zip(kept, strengths, strict=True):
        if common is not None:
            downs.append(factors.down_RI)
            ups.append(factors.up_OR)
        else:
            downs.append(factors.down_RI.float())
            ups.append(factors.up_OR.float() * strength)
    down_RI, up_OR = (downs[0], ups[0]) if len(kept) == 1 else (_cat(downs, 0), _cat(ups, 1))
    return LoRAFactors(down_RI, up_OR, (1.0 if common is None else common) * rank)


def truncate(factors: LoRAFactors, cut: Cut) -> Truncated:
    """Cut small singular values off an update without forming its (O, I) matrix.

    With the QR decompositions up = Q₁R₁ and downᵀ = Q₂R₂ the singular values of up @ down are
    those of R₁R₂ᵀ, a matrix of the rank's size. Computed in float64. The scale stays what it was,
    and both factors get the root of the singular values.
    """
    q_OK, r_KR = torch.linalg.qr(factors.up_OR.double())
    p_IK, s_KR = torch.linalg.qr(factors.down_RI.double().T)
    left, values_K, right = torch.linalg.svd(r_KR @ s_KR.T, full_matrices=False)
    values_K = values_K * abs(factors.scale)
    total = float(values_K.square().sum())
    rank = cut.rank_of(values_K, total)
    up_OR, down_RI = q_OK @ left[:, :rank], right[:rank] @ p_IK.T
    return _balanced(up_OR, values_K[:rank], down_RI, factors.scale or 1.0, total)


def factorise(delta_OI: Tensor, cut: Cut) -> Truncated:
    """Return the update closest to a matrix in the Frobenius norm, with scale 1.

    Whole singular value decomposition in float64 where a side has at most 1024; else the leading
    part by a randomised range finder with power iterations (Halko, Martinsson and Tropp,
    arXiv:0909.4061) in float32, longer and longer until the cut is decided. The energy is measured
    against the whole matrix in either case.

    Args:
        delta_OI: on the device that shall compute.
        cut: what is kept.
    """
    smallest = min(delta_OI.shape)
    if smallest <= _SMALL:
        left, values, right = torch.linalg.svd(delta_OI.double(), full_matrices=False)
        total = float(values.square().sum())
        rank = cut.rank_of(values, total)
        return _balanced(left[:, :rank], values[:rank], right[:rank], 1.0, total)
    delta_OI = delta_OI.float()
    total = float(delta_OI.square().sum(dtype=torch.float64))
    wanted = cut.max_rank or _FIRST_RANK
    while True:
        if 2 * (wanted + _OVERSAMPLING) >= smallest:
            left, values, right = torch.linalg.svd(delta_OI, full_matrices=False)
            break
        left, values, right = _leading(delta_OI, wanted)
        if cut.decided_by(values.double(), total):
            break
        wanted *= 2
    rank = cut.rank_of(values.double(), total)
    return _balanced(left[:, :rank], values[:rank].double(), right[:rank], 1.0, total)


def _leading(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `rank` leading singular triples, nearly."""
    # A stream of its own with a fixed seed: the same input gives the same file.
    stream = torch.Generator().manual_seed(0)
    sketch_IS = torch.randn(delta_OI.shape[1], rank + _OVERSAMPLING, generator=stream)
    basis_OS = torch.linalg.qr(delta_OI @ sketch_IS.to(delta_OI)).Q
    for _ in range(_POWER_ITERATIONS):
        back_IS = torch.linalg.qr(delta_OI.T @ basis_OS).Q
        basis_OS = torch.linalg.qr(delta_OI @ back_IS).Q
    left, values, right = torch.linalg.svd(basis_OS.T @ delta_OI, full_matrices=False)
    return basis_OS @ left[:, :rank], values[:rank], right[:rank]


def _balanced(
    left_OR: Tensor, values_R: Tensor, right_RI: Tensor, scale: float, total: float
) -> Truncated:
    # Left and right are those of the product before scaling, so the sign is the scale's.
    root_R = (values_R / abs(scale)).sqrt().to(left_OR)
    up_OR = (left_OR * root_R).float().cpu().contiguous()
    down_RI = (right_RI * root_R.unsqueeze(1)).float().cpu().contiguous()
    energy = float(values_R.square().sum()) / total if total else 1.0
    factors = LoRAFactors(down_RI, up_OR, scale * len(values_R))
    return Truncated(factors, min(energy, 1.0), total)


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors], axis)
