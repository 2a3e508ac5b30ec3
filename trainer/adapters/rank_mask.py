"""How many of a LoRA's ranks act at which timestep: the mask of T-LoRA.

Soboleva et al., "T-LoRA: Single Image Diffusion Model Customization Without Overfitting",
arXiv:2507.05964. Shape letters: B batch, L tokens, N rows (B · L), R rank, I input width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.lora_linear import LoRALinear, add_low_rank
from trainer.contract.adapter_start import TLORA_KEY
from trainer.contract.errors import ModelFileError
from trainer.core.flow import NUM_TRAIN_TIMESTEPS
from trainer.core.forward_values import ForwardValue


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSchedule:
    """r(t) = ⌊((T - t) / (T - T_b))^a · (R - r_min)⌋ + r_min, and R for t ≤ T_b; T = 1000.

    The paper's formula is that of T_b = 0: much noise, few ranks. Takenoko's has a T_b, below
    which all ranks act.
    """

    rank: int
    """R."""
    min_rank: int
    """r_min, what acts on pure noise."""
    exponent: float
    """a."""
    full_rank_below: float = 0.0
    """T_b, a timestep."""

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        possible = (
            isinstance(self.rank, int)
            and isinstance(self.min_rank, int)
            and 1 <= self.min_rank <= self.rank
            and self.exponent > 0
            and 0 <= self.full_rank_below < NUM_TRAIN_TIMESTEPS
        )
        if not possible:
            raise ValueError(f"{self} is no rank schedule")

    def active(self, timestep_B: Tensor) -> Tensor:
        """Return how many ranks act at each timestep, int64."""
        span = NUM_TRAIN_TIMESTEPS - self.full_rank_below
        left_B = ((NUM_TRAIN_TIMESTEPS - timestep_B.double()) / span).clamp(0, 1)
        added_B = (left_B**self.exponent * (self.rank - self.min_rank)).floor()
        return added_B.long() + self.min_rank

    def mask(self, timestep_B: Tensor) -> Tensor:
        """Return 1 for the ranks that act and 0 for the others, (B, R) float32."""
        ranks_R = torch.arange(self.rank, device=timestep_B.device)
        return (ranks_R < self.active(timestep_B)[:, None]).float()

    def in_words(self) -> str:
        """Return the schedule as the value of `TLORA_KEY`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_file(cls, metadata: Mapping[str, str], path: object) -> RankSchedule | None:
        """Return the schedule that a file's metadata hold; None: it is no T-LoRA.

        Raises:
            ModelFileError: what is there is no schedule.
        """
        text = metadata.get(TLORA_KEY)
        if text is None:
            return None
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelFileError(
                f"{path}: the metadata {TLORA_KEY} hold no rank schedule: {error}",
                hint="the file was edited; without this key it is a plain LoRA",
            ) from error


class RankMask:
    """The masks of the forward that runs, one for all layers of an adapter.

    Each sample has its own, and the same for all its tokens. Where the tokens of a sample have
    different timesteps (a given first frame is clean), the largest counts: that of what is being
    made. So the text, which has no timestep, is masked like the video that it describes, and
    processes that share a clip's tokens agree.
    """

    def __init__(self, schedule: RankSchedule) -> None:
        self.schedule = schedule
        self.value = ForwardValue()

    def follow(self, transformer: nn.Module) -> RemovableHandle:
        """Take the timesteps of each forward of `transformer` from now on."""
        return transformer.register_forward_pre_hook(self._begin, with_kwargs=True)

    @property
    def current(self) -> Tensor:
        """The mask of the forward that runs, (B, R) float32.

        Raises:
            RuntimeError: the layer is used outside of a transformer's forward.
        """
        if self.value.tensor is None:
            raise RuntimeError("no forward of a transformer has said its timesteps")
        return self.value.tensor

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep: Tensor = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if timestep.dim() == 2:
            timestep = timestep.amax(dim=1)
        with torch.no_grad():
            self.value.tensor = self.schedule.mask(timestep)


class TLoRALinear(LoRALinear):
    """Adds s · B (m ∘ A x) to the output of `base`, m the mask of the sample that x belongs to."""

    by_sample = True

    def __init__(
        self,
        base: nn.Module,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
        dropout: float = 0.0,
        *,
        mask: RankMask,
    ) -> None:
        super().__init__(base, down_RI, up_OR, scale, dropout)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, I) or (N, I), the samples one after the other, to the same with O."""
        factor = self.scale * self.strength
        if factor == 0.0:
            result: Tensor = self.base(x)
            return result
        mask_BR = self.mask.current.to(x.dtype)
        low = F.linear(x, self.down.to(x.dtype))
        # An adapter around this one hands on the rows of all samples as one batch.
        low_BLR = low.view(mask_BR.shape[0], -1, mask_BR.shape[1]) * mask_BR[:, None]
        low_NR = F.dropout(low_BLR.flatten(0, 1), self.dropout, self.training)
        return add_low_rank(self.base, x, low_NR, self.up.to(x.dtype), factor)


def masked_beside(
    mask: RankMask, update: Update, base: nn.Module, dtype: torch.dtype, device: torch.device
) -> TLoRALinear:
    """Return a layer that acts like `base` with a file's update, masked; nothing is trained.

    Raises:
        ModelFileError: the update is not what the mask was made for.
    """
    rank = mask.schedule.rank
    if not isinstance(update, LoRAFactors) or update.rank != rank:
        raise ModelFileError(
            f"the T-LoRA's mask is for LoRA of rank {rank}, a layer is {update.kind} of rank "
            f"{update.rank}",
            hint="the file was changed by a tool that did not know what it is; remove the metadata "
            f"{TLORA_KEY} to use it with all ranks at every timestep",
        )
    down, up = (factor.to(device, dtype) for factor in (update.down_RI, update.up_OR))
    return TLoRALinear(base, down, up, update.scale, mask=mask)
