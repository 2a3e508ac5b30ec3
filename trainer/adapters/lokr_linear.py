"""LoKr: an update that is the Kronecker product of two small matrices.

ΔW = scale · W1 ⊗ W2, each of them whole or a product of two factors of rank R; scale = alpha / R,
or 1 where both are whole. LyCORIS, Yeh et al., arXiv:2309.14859; after KronA, Edalati et al.,
arXiv:2212.10650.

Shape letters: N rows (tokens of all samples), I = C·D input width, O = A·B output width: W1 is
(A, C) and W2 is (B, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.branch import BranchLinear, Tensors

NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
"""Names that tensors may have, in the order in which they are held."""


class KroneckerProduct:
    """x · (W1 ⊗ W2)ᵀ, computed as W1 X W2ᵀ for each row of x taken as a matrix X (C, D).

    ΔW is never formed: this takes C·B·D + A·C·B operations a row in place of A·B·C·D.

    Args:
        whole: whether W1, and W2, is one tensor; else it is two factors.
    """

    def __init__(self, whole: tuple[bool, bool]) -> None:
        self.whole = whole

    def add_(self, out_NO: Tensor, x_NI: Tensor, tensors: Tensors, factor: float) -> Tensor:
        """Add factor · x ΔWᵀ to `out_NO` in place, and return it."""
        w1_AC, w2_BD = (_formed(part) for part in self._parts(tensors))
        product_NAB = w1_AC @ _through_w2(x_NI, w1_AC, w2_BD)
        return out_NO.add_(product_NAB.view(out_NO.shape), alpha=factor)

    def gradients(
        self, grad_NO: Tensor, x_NI: Tensor, tensors: Tensors, factor: float
    ) -> tuple[Tensor, Tensors]:
        """Return the gradients of x and of the tensors."""
        first, second = self._parts(tensors)
        w1_AC, w2_BD = _formed(first), _formed(second)
        grad_NAB = grad_NO.reshape(len(grad_NO), len(w1_AC), len(w2_BD))
        low_NCB = _through_w2(x_NI, w1_AC, w2_BD)
        # Token by token: in one product both would first be copied in another order.
        grad_w1_AC = (grad_NAB @ low_NCB.transpose(1, 2)).sum(0).mul_(factor)
        del low_NCB
        grad_MB = (w1_AC.t() @ grad_NAB).mul_(factor).view(-1, len(w2_BD))  # M = N·C
        grad_w2_BD = grad_MB.t() @ x_NI.reshape(-1, w2_BD.shape[1])
        grad_x_NI = (grad_MB @ w2_BD).view(x_NI.shape)
        return grad_x_NI, (*_pulled_back(grad_w1_AC, first), *_pulled_back(grad_w2_BD, second))

    def _parts(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        cut = 1 if self.whole[0] else 2
        return tensors[:cut], tensors[cut:]


def _through_w2(x_NI: Tensor, w1_AC: Tensor, w2_BD: Tensor) -> Tensor:
    rows_MD = x_NI.reshape(-1, w2_BD.shape[1])
    return (rows_MD @ w2_BD.t()).view(len(x_NI), w1_AC.shape[1], len(w2_BD))


def _formed(parts: Tensors) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def _pulled_back(grad: Tensor, parts: Tensors) -> Tensors:
    return (grad,) if len(parts) == 1 else (grad @ parts[1].t(), parts[0].t() @ grad)


@dataclass(frozen=True, slots=True, eq=False)
class LoKrFactors(Update):
    """One linear layer's LoKr.

    Attributes:
        first: W1 (A, C), or its factors (A, R) and (R, C).
        second: W2 (B, D), or its factors (B, R) and (R, D).
        alpha: has no effect where both are whole.
    """

    kind = "lokr"

    first: Tensors
    second: Tensors
    alpha: float

    @property
    def rank(self) -> int:
        """Inner size of W2's factors, else of W1's; of a whole W2 its smaller side."""
        for parts in (self.second, self.first):
            if len(parts) == 2:
                return parts[1].shape[0]
        return min(self.second[0].shape)

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank, or 1 where both are whole."""
        return 1.0 if len(self.first) == len(self.second) == 1 else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I): shape of the weight that is adapted."""
        sides = [(parts[0].shape[0], parts[-1].shape[1]) for parts in (self.first, self.second)]
        return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]

    def tensors(self) -> dict[str, Tensor]:
        """Return `w1` (A, C) or `w1_a` and `w1_b`, and `w2` (B, D) or `w2_a` and `w2_b`."""
        return {**_named("w1", self.first), **_named("w2", self.second)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LoKrFactors:
        """Return the same update of these tensors."""
        return lokr_factors(tensors, self.alpha)

    def folded(self) -> LoKrFactors:
        """Return the same update with alpha = rank; the scale goes into W1, in float32."""
        if self.scale == 1.0:
            return self
        scaled, *rest = self.first
        first = (scaled.float() * self.scale, *rest)
        return LoKrFactors(first, self.second, float(self.rank))

    def delta(self, strength: float = 1.0) -> Tensor:
        """Return strength · scale · W1 ⊗ W2."""
        w1_AC, w2_BD = self._matrices(torch.float32)
        return torch.kron(w1_AC, w2_BD).mul_(strength * self.scale)

    def norm(self) -> float:
        """Return the norm of the delta: ‖W1 ⊗ W2‖ = ‖W1‖ · ‖W2‖."""
        first, second = (float(matrix.norm()) for matrix in self._matrices(torch.float64))
        return abs(self.scale) * first * second

    def beside(self, base: nn.Module, dtype: torch.dtype, device: torch.device) -> BranchLinear:
        """Return the product beside `base`."""
        parts = {name: part.to(device, dtype) for name, part in self.tensors().items()}
        return kronecker_layer(base, parts, self.scale)

    def _matrices(self, dtype: torch.dtype) -> Tensors:
        parts = (tuple(t.to(dtype) for t in part) for part in (self.first, self.second))
        return tuple(_formed(part) for part in parts)


def lokr_factors(tensors: Mapping[str, Tensor], alpha: float) -> LoKrFactors:
    """Return the update of tensors by their names; each matrix is given whole or as two factors."""
    parts = [
        (tensors[name],) if name in tensors else (tensors[f"{name}_a"], tensors[f"{name}_b"])
        for name in ("w1", "w2")
    ]
    return LoKrFactors(parts[0], parts[1], alpha)


def kronecker_layer(base: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> BranchLinear:
    """Return a layer that acts like `base` with the product; parameters are trained."""
    held = {name: tensors[name] for name in NAMES if name in tensors}
    return BranchLinear(base, held, KroneckerProduct(("w1" in held, "w2" in held)), scale)


def _named(name: str, parts: Tensors) -> dict[str, Tensor]:
    return {name: parts[0]} if len(parts) == 1 else {f"{name}_a": parts[0], f"{name}_b": parts[1]}
