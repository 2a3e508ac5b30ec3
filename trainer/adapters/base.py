"""What an adapter file holds, whatever layout it is written in.

Shape letters: R rank, I input width, O output width of the linear layer that is adapted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.lora_linear import LoRALinear, update_norm


class Update(ABC):
    """What an adapter changes in one linear layer, in the form that its kind stores.

    The dtype of the tensors is that of the file.
    """

    kind: ClassVar[str]
    """Name of the kind that it is a form of, for people and metadata."""
    precise: ClassVar[frozenset[str]] = frozenset()
    """Roles that files hold in float32, whatever the others are rounded to."""

    keeps_dtype: ClassVar[bool] = False
    """Whether files hold it in the precision that it has, whatever the others are rounded to."""

    alpha: float
    """Strength as the kind counts it; usually `scale` is alpha / rank."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Inner size of the products that it is made of."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """What the stored product is multiplied with."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, I): shape of the weight that is adapted."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by the role that it has; without alpha."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the same update with other tensors, keyed and shaped as those of `tensors`."""

    @abstractmethod
    def folded(self) -> Self:
        """Return the same update with scale 1, for readers that know no alpha.

        The scale goes into one tensor, in float32; unchanged tensors when it is 1 already.
        """

    @abstractmethod
    def delta(self, strength: float = 1.0) -> Tensor:
        """Return what is added to the weight, (O, I), float32 on the tensors' device.

        Raises:
            ModelFileError: the kind's change depends on the weight that it is added to.
        """

    @abstractmethod
    def beside(self, base: nn.Module, dtype: torch.dtype, device: torch.device) -> AdapterLinear:
        """Return a layer that acts like `base` with this update; nothing in it is trained.

        Args:
            base: the linear layer; its weight may be quantised.
            dtype: what the update computes in.
            device: where.
        """

    def added_to(self, weight_OI: Tensor, strength: float = 1.0) -> Tensor:
        """Return the updated weight in float32 on the weight's device; the weight is unchanged."""
        return self.delta(strength).to(weight_OI.device).add_(weight_OI.float())

    def norm(self) -> float:
        """Return the Frobenius norm of the delta."""
        return float(self.delta().double().norm())

    @property
    def num_parameters(self) -> int:
        """Numbers that are stored."""
        return sum(tensor.numel() for tensor in self.tensors().values())


@dataclass(frozen=True, slots=True, eq=False)
class LoRAFactors(Update):
    """One linear layer's low-rank update: scale · up @ down, scale = alpha / rank.

    LoRA, Hu et al., arXiv:2106.09685.
    """

    kind = "lora"

    down_RI: Tensor
    up_OR: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.down_RI.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I): shape of the weight that is adapted."""
        return self.up_OR.shape[0], self.down_RI.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return `down` (R, I) and `up` (O, R)."""
        return {"down": self.down_RI, "up": self.up_OR}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LoRAFactors:
        """Return the same update of these factors."""
        return replace(self, down_RI=tensors["down"], up_OR=tensors["up"])

    def delta(self, strength: float = 1.0) -> Tensor:
        """Return strength · scale · up @ down."""
        return (self.up_OR.float() @ self.down_RI.float()).mul_(strength * self.scale)

    def beside(self, base: nn.Module, dtype: torch.dtype, device: torch.device) -> LoRALinear:
        """Return a low-rank branch beside `base`."""
        down, up = (factor.to(device, dtype) for factor in (self.down_RI, self.up_OR))
        return LoRALinear(base, down, up, self.scale)

    def norm(self) -> float:
        """Return the norm of the delta without making it."""
        return float(update_norm(self.down_RI, self.up_OR, self.scale))

    def folded(self) -> LoRAFactors:
        """Return the same update with alpha = rank, so that a reader without alpha scales by 1.

        The scale goes into the up factor, in float32; unchanged tensors when it is 1 already.
        """
        if self.scale == 1.0:
            return self
        up = self.up_OR.float() * self.scale
        return LoRAFactors(self.down_RI.to(torch.float32), up, float(self.rank))


class AdapterFile(Mapping[str, Update]):
    """The updates of an adapter file by canonical module name, in the order of the file.

    Attributes:
        path: where it was read from.
        layout: `comfy`, `kohya`, `peft` or `bare` (original names without a prefix); joined by
            `+` when a file mixes them.
        metadata: the string table of the file's header.
        notes: what had to be assumed while reading, for people.
        differences: what is added to parameters that are no weights of linear layers, by their
            canonical names (`blocks.0.norm3.bias`); the dtype is that of the file.
    """

    def __init__(
        self,
        modules: Mapping[str, Update],
        *,
        path: Path,
        layout: str,
        metadata: Mapping[str, str],
        notes: tuple[str, ...] = (),
        differences: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._modules = dict(modules)
        self.differences = dict(differences or {})
        self.path = path
        self.layout = layout
        self.metadata = dict(metadata)
        self.notes = notes

    def __getitem__(self, name: str) -> Update:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def num_parameters(self) -> int:
        """Numbers that are stored, without alphas."""
        whole = sum(tensor.numel() for tensor in self.differences.values())
        return whole + sum(update.num_parameters for update in self.values())
