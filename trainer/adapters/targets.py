"""The linear layers of a model that an adapter may be put on."""

from __future__ import annotations

from torch import nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.contract.layer_names import canonical_name


def linear_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer that LoRA files have a name for, by canonical name.

    A wrapped layer counts as its outermost wrapper; a quantised one is linear when it has
    `in_features` and `out_features`.
    """
    found: dict[str, nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in transformer.named_modules():
        if name.startswith(wrapped) and wrapped:
            continue
        if isinstance(module, AdapterLinear):
            wrapped = (*wrapped, f"{name}.")
        if canonical_name(name) == name and _is_linear(module):
            found[name] = module
    return found


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)
