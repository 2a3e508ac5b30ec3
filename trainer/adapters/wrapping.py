"""Putting adapter layers around linear layers of a model and taking them off again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.contract.layer_names import block_index
from trainer.quant.linear import Fp8Linear


def wrap(root: nn.Module, name: str, layer: AdapterLinear) -> None:
    """Put `layer` where the module `name` was; `layer.base` is that module."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)


def unwrap(root: nn.Module, name: str, layer: AdapterLinear) -> None:
    """Take `layer` off again, whatever was wrapped around it since.

    Raises:
        LookupError: `layer` is not on the module `name`.
    """
    parent, _, child = name.rpartition(".")
    holder, attribute = root.get_submodule(parent), child
    while isinstance(module := getattr(holder, attribute), AdapterLinear):
        if module is layer:
            setattr(holder, attribute, layer.base)
            return
        holder, attribute = module, "base"
    raise LookupError(f"the layer is not on {name}")


def readable(root: nn.Module, name: str) -> AbstractContextManager[None]:
    """Return the context in which the weight of layer `name` can be read, wherever it waits."""
    index = block_index(name)
    swap = getattr(getattr(root, "blocks", None), "swap", None)
    if swap is None or index is None:
        return nullcontext()
    context: AbstractContextManager[None] = swap.readable(index)
    return context


def base_weight(layer: nn.Module) -> Tensor:
    """Return the weight (O, I) under all adapters as floats, detached; fp8 becomes float32."""
    while isinstance(layer, AdapterLinear):
        layer = layer.base
    with torch.no_grad():
        weight = layer.dequantised() if isinstance(layer, Fp8Linear) else layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight tensor")
    return weight.detach()
