"""Weights as 8-bit floats with scales: rounding, its error, and back.

fp8 formats: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433). With a scale
for each block of 64 inputs an outlier keeps its coarse grid to itself.

Shape letters: I input width, O output width, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Neighbouring inputs that share a scale."""
_CHUNK_ELEMENTS = 1 << 16
_GPU_CHUNK_ELEMENTS = 1 << 24
"""Rounded at a time. On the CPU the float32 copies must be small: large ones come and go on the
heap between the weights that stay, and leave holes worth several times the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Spec:
    """How the linear layers of a transformer's blocks are held.

    Attributes:
        scaled: with scales, as `fp8_scaled` files are; without, values are rounded as they are.
        dtype: `torch.float8_e4m3fn` (3 bits of mantissa) or `torch.float8_e5m2` (2 bits).
        matmul: multiply in fp8; scales are then one a row, which the products can apply.
    """

    scaled: bool
    dtype: torch.dtype = torch.float8_e4m3fn
    matmul: bool = False

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, int] | None:
        """Return the shape of the scales of an (O, I) weight; None for no scales.

        One a block of 64 inputs; one a row where the width cannot be cut into blocks, or the
        products need it; one a tensor where a row is shorter than a block, because scales would
        then take more than blocks' do.
        """
        if not self.scaled:
            return None
        if inputs < BLOCK:
            return 1, 1
        if self.matmul or inputs % BLOCK:
            return outputs, 1
        return outputs, inputs // BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """An (O, I) weight in fp8 and what it is multiplied with.

    Attributes:
        values_OI: the numbers, fp8.
        scale: (1, 1), (O, 1) or (O, I / 64); None: the numbers are the weight.
        relative_error: ‖rounded − original‖ / ‖original‖; None where there was no original.
    """

    values_OI: Tensor
    scale: Tensor | None
    relative_error: float | None = None


def quantise(
    weight_OI: Tensor, spec: Fp8Spec, device: torch.device | str | None = None
) -> QuantisedWeight:
    """Round a float weight to fp8, a few rows at a time.

    Block scales are bfloat16, which are exact multipliers and take 2 bytes per 64; the others
    float32. Values beyond the format (448 or 57344 times the scale) become its largest one.

    Args:
        weight_OI: float32, bfloat16, float16 or float64, on any device; may be mapped.
        spec: format and scales.
        device: of the result; None: that of the weight; meta: nothing is read or rounded.
    """
    device = torch.device(device) if device is not None else weight_OI.device
    outputs, inputs = weight_OI.shape
    values_OI = torch.empty(outputs, inputs, dtype=spec.dtype, device=device)
    shape = spec.scale_shape(outputs, inputs)
    scale = None if shape is None else _empty_scale(shape, device)
    if device.type == "meta":
        return QuantisedWeight(values_OI, scale)
    if shape == (1, 1) and scale is not None:
        largest = torch.stack([rows.abs().amax() for _, rows in _chunks(weight_OI, device)]).amax()
        scale.copy_(_scale_for(largest, spec.dtype))
    squared_error = torch.zeros((), dtype=torch.float64, device=device)
    squared = torch.zeros((), dtype=torch.float64, device=device)
    for place, rows in _chunks(weight_OI, device):
        own = None
        if scale is not None:
            if shape != (1, 1):
                grouped = rows.view(len(rows), scale.shape[1], -1)
                scale[place] = _scale_for(grouped.abs().amax(-1), spec.dtype).to(scale.dtype)
            own = scale if shape == (1, 1) else scale[place]
        values_OI[place] = _round(rows, own, spec.dtype)
        difference = dequantise(values_OI[place], own, torch.float32).sub_(rows)
        squared_error += difference.square_().sum(dtype=torch.float64)
        squared += rows.square_().sum(dtype=torch.float64)
    error = float((squared_error / squared.clamp(min=1e-300)).sqrt())
    return QuantisedWeight(values_OI, scale, error)


def dequantise(values_OI: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return values · scale, (O, I) in `dtype`, computed in float32 and rounded once."""
    result_OI = values_OI.to(dtype)
    if scale is not None:
        grouped = result_OI.view(len(result_OI), scale.shape[1], -1)
        grouped.mul_(scale.float().unsqueeze(-1))
    return result_OI


def _empty_scale(shape: tuple[int, int], device: torch.device) -> Tensor:
    dtype = torch.bfloat16 if shape[1] > 1 else torch.float32
    return torch.empty(shape, dtype=dtype, device=device)


def _scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale that puts the largest value on the format's largest; 1 where all values are 0."""
    scale = largest / torch.finfo(dtype).max
    # Scales of subnormal weights would themselves be rounded away.
    return torch.where(scale > torch.finfo(torch.bfloat16).tiny, scale, 1.0)


def _round(rows_OI: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    bound = torch.finfo(dtype).max
    if scale is None:
        return rows_OI.clamp(-bound, bound).to(dtype)
    grouped = rows_OI.view(len(rows_OI), scale.shape[1], -1)
    scaled = grouped / scale.float().unsqueeze(-1)
    return scaled.clamp_(-bound, bound).view_as(rows_OI).to(dtype)


def _chunks(weight_OI: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time as float32 copies on `device`, with their place."""
    elements = _CHUNK_ELEMENTS if device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    step = max(1, elements // max(1, weight_OI.shape[1]))
    for start in range(0, len(weight_OI), step):
        place = slice(start, start + step)
        yield place, weight_OI[place].detach().to(device, torch.float32, copy=True)
