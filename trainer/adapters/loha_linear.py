"""LoHa: an update that is the elementwise product of two low-rank ones.

ΔW = (alpha / rank) · (W1a W1b) ⊙ (W2a W2b), whose rank may reach rank². FedPara, Hyeon-Woo et al.,
arXiv:2108.06098; as an adapter in LyCORIS, Yeh et al., arXiv:2309.14859.

Shape letters: N rows (tokens of all samples), R rank, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.branch import BranchLinear, Tensors

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")
"""Of the tensors: (O, R), (R, I), (O, R), (R, I)."""


class HadamardProduct:
    """x · ΔWᵀ with ΔW = (W1a W1b) ⊙ (W2a W2b), formed in the dtype of x for each use.

    At most 2 matrices of the weight's size exist at a time.
    """

    def add_(self, out_NO: Tensor, x_NI: Tensor, tensors: Tensors, factor: float) -> Tensor:
        """Add factor · x ΔWᵀ to `out_NO` in place, and return it."""
        return out_NO.addmm_(x_NI, _formed(tensors).t(), alpha=factor)

    def gradients(
        self, grad_NO: Tensor, x_NI: Tensor, tensors: Tensors, factor: float
    ) -> tuple[Tensor, Tensors]:
        """Return the gradients of x and of the four factors."""
        w1_a, w1_b, w2_a, w2_b = tensors
        grad_x_NI = (grad_NO @ _formed(tensors)).mul_(factor)
        grad_OI = (grad_NO.t() @ x_NI).mul_(factor)
        first_OI = (w2_a @ w2_b).mul_(grad_OI)
        grad_w1_a, grad_w1_b = first_OI @ w1_b.t(), w1_a.t() @ first_OI
        del first_OI
        second_OI = grad_OI.mul_(w1_a @ w1_b)
        return grad_x_NI, (grad_w1_a, grad_w1_b, second_OI @ w2_b.t(), w2_a.t() @ second_OI)


def _formed(tensors: Tensors) -> Tensor:
    w1_a, w1_b, w2_a, w2_b = tensors
    return (w1_a @ w1_b).mul_(w2_a @ w2_b)


@dataclass(frozen=True, slots=True, eq=False)
class LoHaFactors(Update):
    """One linear layer's LoHa."""

    kind = "loha"

    w1_a_OR: Tensor
    w1_b_RI: Tensor
    w2_a_OR: Tensor
    w2_b_RI: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner size of both products."""
        return self.w1_b_RI.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I): shape of the weight that is adapted."""
        return self.w1_a_OR.shape[0], self.w1_b_RI.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the four factors by `NAMES`."""
        parts = (self.w1_a_OR, self.w1_b_RI, self.w2_a_OR, self.w2_b_RI)
        return dict(zip(NAMES, parts, strict=True))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LoHaFactors:
        """Return the same update of these factors."""
        return loha_factors(tensors, self.alpha)

    def folded(self) -> LoHaFactors:
        """Return the same update with alpha = rank; the scale goes into W1a, in float32."""
        if self.scale == 1.0:
            return self
        return replace(self, w1_a_OR=self.w1_a_OR.float() * self.scale, alpha=float(self.rank))

    def delta(self, strength: float = 1.0) -> Tensor:
        """Return strength · scale · (W1a W1b) ⊙ (W2a W2b)."""
        parts = tuple(part.float() for part in self.tensors().values())
        return _formed(parts).mul_(strength * self.scale)

    def beside(self, base: nn.Module, dtype: torch.dtype, device: torch.device) -> BranchLinear:
        """Return the product beside `base`."""
        parts = {name: part.to(device, dtype) for name, part in self.tensors().items()}
        return BranchLinear(base, parts, HadamardProduct(), self.scale)


def loha_factors(tensors: Mapping[str, Tensor], alpha: float) -> LoHaFactors:
    """Return the update of tensors by their `NAMES`."""
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in NAMES)
    return LoHaFactors(w1_a, w1_b, w2_a, w2_b, alpha)
