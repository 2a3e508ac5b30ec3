"""What every way to compute attention has, and what it needs of the machine.

Shape letters: B batch, L queries, S keys, N heads, K head size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeeds:
    """What must be there before attention can be computed this way.

    Attributes:
        module: what is imported; "" for what torch itself has.
        install: how to get it.
        dtypes: of queries, keys and values; () for any float.
        capability: compute capability that the GPU must have; None: a CPU does as well.
        trains: there is a backward.
        trains_on_cpu: there is one on the CPU.
    """

    module: str = ""
    install: str = ""
    dtypes: tuple[torch.dtype, ...] = ()
    capability: tuple[int, int] | None = None
    trains: bool = True
    trains_on_cpu: bool = True


class AttentionBackend(Protocol):
    """Computes softmax(q·kᵀ / √K + bias)·v."""

    takes_bias: bool
    """Whether `bias_BS` may be given; without, the model pads text to its full length."""

    def __call__(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_BS: Tensor | None = None
    ) -> Tensor:
        """Return (B, L, N, K)."""
        ...


class AttentionChoice(AttentionBackend, Protocol):
    """A backend that a config can name."""

    needs: ClassVar[AttentionNeeds]

    def __init__(self) -> None:
        """Import what it needs."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why attention cannot be computed some way, and what to do about it."""

    message: str
    hint: str


def find_obstacle(
    needs: AttentionNeeds, device: torch.device, dtype: torch.dtype, *, trains: bool
) -> Obstacle | None:
    """Return what is missing here; None where nothing is. Imports nothing, takes no memory."""
    if trains and not needs.trains:
        return Obstacle(
            "it has no backward: it is for sampling only",
            'set attention = "sdpa", and give `menma sample` --set memory.attention=…',
        )
    if needs.module and importlib.util.find_spec(needs.module) is None:
        return Obstacle(f"the package {needs.module!r} is not installed", needs.install)
    if needs.dtypes and dtype not in needs.dtypes:
        kind = str(dtype).removeprefix("torch.")
        return Obstacle(f"it cannot compute in {kind}", 'set weight_format = "bf16"')
    return _device_obstacle(needs, device, trains=trains)


def _device_obstacle(
    needs: AttentionNeeds, device: torch.device, *, trains: bool
) -> Obstacle | None:
    other = 'set attention = "sdpa"'
    if device.type != "cuda":
        if needs.capability is not None:
            return Obstacle(f"it needs an NVIDIA GPU, and this runs on {device.type}", other)
        if trains and not needs.trains_on_cpu:
            return Obstacle("it has no backward on a CPU", other)
        return None
    found = torch.cuda.get_device_capability(device)
    if needs.capability is not None and found < needs.capability:
        has, wants = (".".join(map(str, version)) for version in (found, needs.capability))
        return Obstacle(f"it needs compute capability {wants}, this GPU has {has}", other)
    return None
