"""Transformers of a real shape and random weights, for measuring time and memory without files.

Time and memory of a step do not depend on the weights, as long as they are numbers that keep
activations near unit size. So one block is drawn and the others get copies of it: a 14B model is
made in seconds on a CPU, where drawing it whole takes minutes. Tensor by tensor, at its own
precision: of an fp8 model no bf16 copy exists but that of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from trainer.contract.errors import ConfigError
from trainer.contract.variants import TransformerConfig
from trainer.models.wan.quantised import (
    Quantisation,
    is_block_linear,
    replace_layer,
    widths_problems,
)
from trainer.models.wan.transformer import FLOAT32_MODULES, WanTransformer
from trainer.quant.fp8 import Fp8Spec, QuantisedWeight, quantise

_BLOCK = re.compile(r"blocks\.\d+\.")
_SMALL_STD = 0.02
"""Of biases and modulations."""


def random_transformer(
    shape: TransformerConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    fp8: Fp8Spec | None = None,
    variant_name: str = "",
    seed: int = 0,
    held_elsewhere: Callable[[int], Collection[int]] | None = None,
) -> WanTransformer:
    """Return a transformer with random weights, held as `load_transformer` would hold a file's.

    Weights are normal with variance 1 / fan-in, norms 1, everything else small.

    Args:
        shape: of the model.
        dtype: of the weights; the time embedding is float32 always.
        device: where they are made.
        fp8: hold the linear layers of the blocks in fp8.
        variant_name: what the model says that it is.
        seed: of the weights. All blocks have the same ones.
        held_elsewhere: as in `load_transformer`.

    Raises:
        ConfigError: the sizes do not fit one another, or fp8 products.
    """
    with torch.device("meta"):
        model = WanTransformer(shape, seed=None)
    model.variant_name = variant_name
    shapes = {name: value.shape for name, value in model.named_parameters()}
    linears = {name: size for name, size in shapes.items() if is_block_linear(name, size)}
    if fp8 is not None:
        if problems := widths_problems(linears, fp8):
            raise ConfigError(problems=problems)
        model.quantisation = Quantisation(fp8, from_fp8=False)
    random = torch.Generator(device).manual_seed(seed)
    first: dict[str, Tensor | QuantisedWeight] = {}
    elsewhere = () if held_elsewhere is None else held_elsewhere(len(model.blocks))
    absent = tuple(f"blocks.{index}." for index in elsewhere)
    for name, size in shapes.items():
        like = _BLOCK.sub("", name, count=1)  # its name in every block
        value = first.get(like)
        if value is None:
            target = torch.float32 if name.startswith(FLOAT32_MODULES) else dtype
            drawn = _draw(name, torch.empty(size, dtype=target, device=device), random)
            value = quantise(drawn, fp8) if fp8 is not None and name in linears else drawn
            first[like] = value
        else:
            value = _mapped(value, torch.clone)
        if name.startswith(absent):
            value = _mapped(value, _without_memory)
        if isinstance(value, QuantisedWeight):
            assert model.quantisation is not None
            layer_name = name.removesuffix(".weight")
            model.quantisation.errors[layer_name] = value.relative_error or 0.0
            replace_layer(model, layer_name, value, model.quantisation.spec)
        else:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(value))
    return model


def _draw(name: str, empty: Tensor, random: torch.Generator) -> Tensor:
    if empty.dim() == 1 and name.endswith("weight"):
        return empty.fill_(1)  # a norm
    matrix = name.endswith("weight")
    std = float(empty[0].numel() ** -0.5) if matrix else _SMALL_STD
    return empty.normal_(std=std, generator=random)


def _mapped(
    value: Tensor | QuantisedWeight, change: Callable[[Tensor], Tensor]
) -> Tensor | QuantisedWeight:
    if isinstance(value, Tensor):
        return change(value)
    scale = None if value.scale is None else change(value.scale)
    return QuantisedWeight(change(value.values_OI), scale, value.relative_error)


def _without_memory(value: Tensor) -> Tensor:
    return value.to("meta")
