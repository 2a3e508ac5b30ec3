"""What an adapter file holds, whatever layout it is written in.

Shape letters: R rank, I input width, O output width of the linear layer that is adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoRAFactors:
    """One linear layer's low-rank update: scale · up @ down, scale = alpha / rank.

    LoRA, Hu et al., arXiv:2106.09685. The dtype of both factors is that of the file.
    """

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


class AdapterFile(Mapping[str, LoRAFactors]):
    """The factors of a LoRA file by canonical module name, in the order of the file.

    Attributes:
        path: where it was read from.
        layout: `comfy`, `kohya`, `peft` or `bare` (original names without a prefix); joined by
            `+` when a file mixes them.
        metadata: the string table of the file's header.
        notes: what had to be assumed while reading, for people.
    """

    def __init__(
        self,
        modules: Mapping[str, LoRAFactors],
        *,
        path: Path,
        layout: str,
        metadata: Mapping[str, str],
        notes: tuple[str, ...] = (),
    ) -> None:
        self._modules = dict(modules)
        self.path = path
        self.layout = layout
        self.metadata = dict(metadata)
        self.notes = notes

    def __getitem__(self, name: str) -> LoRAFactors:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
