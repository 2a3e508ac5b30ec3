"""What an optimizer keeps for a group of parameters rather than for each: counts, step sizes.

Prodigy keeps its estimate of the distance there, schedule-free methods the sum of their weights.
Whatever an optimizer has changed or added in its groups since it was made is state; the rest are
options, which a resumed run may have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NO_STATE = {"params", "lr", "lr_scale"}
"""Set by the engine in every step, or what the group is."""
_MOST_NUMBERS = 64
"""Of a tensor; more are state of parameters in the wrong place."""


class Counters:
    """The state in the groups of one optimizer.

    Args:
        groups: `optimizer.param_groups`, as the optimizer was made.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._start = [_plain(group) for group in groups]

    def values(self) -> list[dict[str, Any]]:
        """Return the state of each group, as JSON values."""
        return [
            {key: value for key, value in _plain(group).items() if start.get(key, _ABSENT) != value}
            for group, start in zip(self._groups, self._start, strict=True)
        ]

    def restore(self, values: Sequence[dict[str, Any]], device: torch.device | None) -> None:
        """Put back what `values` returned; what it does not name is as the optimizer was made.

        Args:
            values: of each group; of none: all as made.
            device: of the tensors among them.
        """
        for index, (group, start) in enumerate(zip(self._groups, self._start, strict=True)):
            saved = values[index] if index < len(values) else {}
            for key in _plain(group).keys() - start.keys() - saved.keys():
                del group[key]
            for key, value in {**start, **saved}.items():
                if key in saved or group.get(key, _ABSENT) is not _ABSENT:
                    group[key] = _from_plain(value, device)


_ABSENT = object()


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers and short tensors of a group."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if key in _NO_STATE:
            continue
        if isinstance(value, bool | int | float | str) or value is None:
            found[key] = value
        elif isinstance(value, Tensor) and value.numel() <= _MOST_NUMBERS:
            dtype = str(value.dtype).removeprefix("torch.")
            found[key] = {"tensor": value.detach().tolist(), "dtype": dtype}
    return found


def _from_plain(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device)
    return value


def clip_values(optimizer: torch.optim.Optimizer, largest: float) -> None:
    """Let an optimizer cut each element of its gradients to [-largest, largest] before a step.

    Elements are cut one by one, so that it does not matter how ZeRO has laid them out.
    """

    @torch.no_grad()
    def cut(*_: Any) -> None:
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if gradients:
            torch._foreach_clamp_min_(gradients, -largest)
            torch._foreach_clamp_max_(gradients, largest)

    optimizer.register_step_pre_hook(cut)
