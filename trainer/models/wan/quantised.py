"""The linear layers of a transformer's blocks in fp8: taken from a file, or rounded on the way.

Embeddings, norms, modulations, biases, the time embedding and the head keep their precision.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from trainer.contract.errors import ConfigError, Problem
from trainer.io.formats.stored_tensors import FP8_DTYPES, StoredTensor, read_fp8
from trainer.io.mapped_load import WeightFiles
from trainer.quant.fp8 import Fp8Spec, QuantisedWeight, quantise
from trainer.quant.linear import Fp8Linear
from trainer.quant.products import MULTIPLE, Fp8Products

FP8_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_BLOCK_WEIGHT = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn|ffn)\.\w+\.weight")
_FORMAT_KEY = "memory.weight_format"


@dataclass(slots=True)
class Quantisation:
    """What became of a transformer's layers.

    Attributes:
        spec: what was asked for.
        from_fp8: the file is fp8; what it holds in more precision stays so.
        errors: relative error of each layer that was rounded while loading, by name.
        as_stored: names of the layers whose fp8 numbers are those of the file.
        kept: names of block layers that a file in fp8 holds in more precision.
    """

    spec: Fp8Spec
    from_fp8: bool
    errors: dict[str, float] = field(default_factory=dict)
    as_stored: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def in_words(self) -> str:
        """Say how many layers are fp8, and how far rounding took them from the file's weights."""
        kind = str(self.spec.dtype).removeprefix("torch.float8_").removesuffix("fn")
        parts = []
        if self.as_stored:
            parts.append(f"{len(self.as_stored)} layers are fp8 as in the file")
        if self.errors:
            mean = sum(self.errors.values()) / len(self.errors)
            worst = max(self.errors, key=lambda name: self.errors[name])
            parts.append(
                f"{len(self.errors)} layers were rounded to {kind}: relative error of the weights "
                f"{100 * mean:.2f} % on average, at most {100 * self.errors[worst]:.2f} % ({worst})"
            )
        if self.kept:
            parts.append(f"{len(self.kept)} layers keep the file's higher precision")
        return "; ".join(parts)


def is_block_linear(name: str, shape: Collection[int]) -> bool:
    """Tell whether the tensor `name` is what fp8 is for: the weight of a block's linear layer."""
    return len(shape) == 2 and _BLOCK_WEIGHT.fullmatch(name) is not None


def plan_quantisation(
    weights: WeightFiles, tensors: Mapping[str, StoredTensor], spec: Fp8Spec
) -> Quantisation:
    """Check that the file's layers can be held as asked for; nothing is read but its header.

    A file that is quantised in another way is refused: it would be rounded twice.

    Raises:
        ConfigError: with the key to change.
    """
    linears = {n: s for n, s in tensors.items() if is_block_linear(n, weights[s.name].shape)}
    coarse = {n: s for n, s in linears.items() if weights[s.name].dtype in FP8_DTYPES}
    problems = []
    if coarse:
        scaled = any(stored.scale is not None for stored in coarse.values())
        if scaled != spec.scaled:
            problems.append(_other_format(weights, is_scaled=scaled))
        found = {weights[stored.name].dtype for stored in coarse.values()}
        if found != {spec.dtype}:
            problems.append(_other_kind(weights, found))
    problems += widths_problems({n: weights[s.name].shape for n, s in linears.items()}, spec)
    if problems:
        raise ConfigError(problems=problems)
    return Quantisation(spec, from_fp8=bool(coarse))


def widths_problems(shapes: Mapping[str, Sequence[int]], spec: Fp8Spec) -> list[Problem]:
    """Return what is wrong with layers of these (O, I) shapes for how `spec` multiplies."""
    odd = [name for name, shape in shapes.items() if any(width % MULTIPLE for width in shape)]
    if not spec.matmul or not odd:
        return []
    return [
        Problem(
            f"fp8 products need widths that are multiples of {MULTIPLE}; {odd[0]} is "
            f"{tuple(shapes[odd[0]])}",
            "memory.fp8_matmul",
            hint="set fp8_matmul = false",
        )
    ]


def put_fp8_layer(
    model: nn.Module,
    name: str,
    weights: WeightFiles,
    stored: StoredTensor,
    device: torch.device | str,
    quantisation: Quantisation,
) -> bool:
    """Put an fp8 layer with the file's weight `name` in the place of a block's linear layer.

    Returns:
        False, with nothing done, for what is not fp8: other tensors, and what `take_fp8_layer`
        leaves.
    """
    if not is_block_linear(name, weights[stored.name].shape):
        return False
    return take_fp8_layer(model, name, weights, stored, device, quantisation)


def take_fp8_layer(
    model: nn.Module,
    name: str,
    weights: WeightFiles,
    stored: StoredTensor,
    device: torch.device | str,
    quantisation: Quantisation,
) -> bool:
    """Put an fp8 layer with the file's weight `stored` in the place of a linear layer.

    Numbers that are fp8 in the file are used as they are. The bias stays what it is by now.

    Args:
        model: any; changed in place.
        name: of the layer's weight in it.
        weights: the file.
        stored: the weight in the file, (O, I).
        device: of the layer.
        quantisation: how; what became of the layer is noted there.

    Returns:
        False, with nothing done, for a layer that a file in fp8 holds in more precision.
    """
    info = weights[stored.name]
    layer_name = name.removesuffix(".weight")
    spec = quantisation.spec
    if info.dtype in FP8_DTYPES:
        values_OI, scale = read_fp8(weights, stored, device)
        quantised = QuantisedWeight(values_OI, scale)
        quantisation.as_stored.append(layer_name)
    elif quantisation.from_fp8:
        quantisation.kept.append(layer_name)
        return False
    else:
        quantised = quantise(weights.read(stored.name), spec, device)
        weights.release(stored.name)
        if quantised.relative_error is not None:
            quantisation.errors[layer_name] = quantised.relative_error
    replace_layer(model, layer_name, quantised, spec)
    return True


def replace_layer(
    model: nn.Module, layer_name: str, quantised: QuantisedWeight, spec: Fp8Spec
) -> None:
    """Put an fp8 layer in the place of a linear layer, whose bias it takes over."""
    parent_name, _, child = layer_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    bias = getattr(parent, child).bias
    products = Fp8Products() if spec.matmul else None
    setattr(parent, child, Fp8Linear(quantised, bias, products))


def hold_bytes(model: nn.Module) -> None:
    """Let all fp8 layers hold their numbers as bytes (`Fp8Linear.hold_bytes`)."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.hold_bytes()


def _other_format(weights: WeightFiles, *, is_scaled: bool) -> Problem:
    if is_scaled:
        return Problem(
            f"{weights.path} is scaled fp8 already; as plain fp8 its scales would be lost",
            _FORMAT_KEY,
            hint='set weight_format = "fp8_scaled": the file is then used as it is',
        )
    return Problem(
        f"{weights.path} is plain fp8 already; scales cannot bring back what was rounded away",
        _FORMAT_KEY,
        hint='set weight_format = "fp8": the file is then used as it is; or use the bf16 file',
    )


def _other_kind(weights: WeightFiles, found: set[torch.dtype]) -> Problem:
    names = [name for name, dtype in FP8_FORMATS.items() if dtype in found]
    hint = f'set fp8_format = "{names[0]}"' if len(names) == 1 else "use a file in one fp8 format"
    return Problem(
        f"{weights.path} holds {' and '.join(names)} numbers; turning one fp8 format into the "
        "other rounds twice",
        "memory.fp8_format",
        hint=hint,
    )
