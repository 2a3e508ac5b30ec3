"""Putting adapter layers around linear layers of a model and taking them off again."""

from __future__ import annotations

from torch import nn

from trainer.adapters.adapter_linear import AdapterLinear


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
