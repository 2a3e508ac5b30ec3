"""A linear layer with an adapter on it: what every kind of adapter layer has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

_BASE = "base."


class AdapterLinear(nn.Module, ABC):
    """Acts like `base` with an update of its weight.

    Trained tensors are parameters of this very module, so that whatever gathers or streams the
    parameters of a module around its forward (ZeRO-3) finds them. Tensors that are not trained
    are buffers outside the state dict. In the state dict the base's tensors keep the names they
    had before it was wrapped.

    Attributes:
        base: the layer, or another adapter on it.
        strength: multiplies the update; 0 gives the base's own output, exactly.
        by_sample: its update is another one for each sample, so it acts like no one weight.
    """

    by_sample: ClassVar[bool] = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.strength = 1.0
        self.register_state_dict_post_hook(_hide_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_show_base)  # type: ignore[no-untyped-call]

    def hold(self, name: str, tensor: Tensor) -> None:
        """Register a tensor: trained if it is a parameter, else a buffer that is not saved."""
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor, persistent=False)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the update computes in the dtype of x."""

    @property
    def weight(self) -> Tensor:
        """The base's weight, so that it can be addressed by the name it had."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """I."""
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """O."""
        return self.base.out_features  # type: ignore[return-value]


def _hide_base(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    _rename(state, prefix + _BASE, prefix)


def _show_base(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    own = {prefix + name for name in module._parameters}
    for name in [n for n in state if n.startswith(prefix) and n not in own]:
        state[prefix + _BASE + name.removeprefix(prefix)] = state.pop(name)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [n for n in state if n.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
