"""A linear layer with a low-rank branch beside it.

LoRA, Hu et al., arXiv:2106.09685: y = W x + b + s · B (A x), with A (R, I), B (O, R).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_BASE = "base."


class LoRALinear(nn.Module):
    """Adds s · B (A x) to the output of `base`.

    `down` and `up` are parameters of this very module, so that whatever gathers or streams the
    parameters of a module around its forward (ZeRO-3) finds them. Given as plain tensors they
    become buffers: not trained, not in the state dict. In the state dict the base's tensors keep
    the names they had before it was wrapped.

    Memory: autograd keeps the input, the rank-wide activations and both factors in the compute
    dtype. The product is added to the base's output in place, so no second tensor of its size
    exists, but where that output is a view (ZeRO-3 makes it one) it is added out of place.
    """

    down: Tensor
    up: Tensor

    def __init__(
        self, base: nn.Module, down_RI: Tensor, up_OR: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base = base
        for name, factor in (("down", down_RI), ("up", up_OR)):
            if isinstance(factor, nn.Parameter):
                self.register_parameter(name, factor)
            else:
                self.register_buffer(name, factor, persistent=False)
        self.scale = scale
        self.strength = 1.0
        self.dropout = dropout
        self.register_state_dict_post_hook(_hide_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_show_base)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the branch computes in the dtype of the base's output."""
        x_NI = x.reshape(-1, x.shape[-1])
        out_NO: Tensor = self.base(x_NI)
        factor = self.scale * self.strength
        if factor != 0.0:
            dtype = out_NO.dtype
            low_NR = F.linear(x_NI.to(dtype), self.down.to(dtype))
            low_NR = F.dropout(low_NR, self.dropout, self.training)
            up_RO = self.up.to(dtype).t()
            # Adding in place to a view would make autograd clone the gradient, or refuse.
            add = out_NO.addmm if out_NO._is_view() else out_NO.addmm_
            out_NO = add(low_NR, up_RO, alpha=factor)
        return out_NO.view(*x.shape[:-1], -1) if x.dim() != 2 else out_NO

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

    def extra_repr(self) -> str:
        """Name the rank and scale where the module is printed."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}, strength={self.strength:g}"


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
