"""Filling a model that was built on the meta device from a weight file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.contract.errors import ModelFileError
from trainer.io.mapped_load import WeightFiles

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_SCALED_MARK = "scaled_fp8"
_MARKERS = (*_SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: a tensor of the file and what is done to it."""

    name: str
    change: Callable[[Tensor], Tensor] | None = None

    def value(self, tensor: Tensor) -> Tensor:
        """Return the parameter's value."""
        return tensor if self.change is None else self.change(tensor)


@dataclass(frozen=True, slots=True)
class Placement:
    """How tensors are kept: dtype, device, and whether they may stay mapped to the file."""

    dtype: torch.dtype
    device: torch.device | str
    mapped: bool = False


def is_quantisation_marker(name: str) -> bool:
    """Tell whether a tensor describes how another one is stored."""
    return name.endswith(_MARKERS) or name.rpartition(".")[2] == _SCALED_MARK


def fill(
    model: nn.Module, files: WeightFiles, sources: Mapping[str, Source], place: Placement, what: str
) -> None:
    """Replace the meta parameters of `model` by the file's tensors; one is in flight at a time.

    Args:
        sources: for every parameter of `model`, where it comes from.
        what: what the file should be, for messages ("Wan VAE").

    Raises:
        ModelFileError: a tensor is missing or of another shape.
    """
    parameters = dict(model.named_parameters())
    missing = sorted({sources[name].name for name in parameters} - set(files))
    if missing:
        raise ModelFileError(
            f"{files.path} lacks {len(missing)} tensors of a {what}: {_some(missing)}",
            hint="the file is incomplete or of another model; download it again",
        )
    for name, parameter in parameters.items():
        source = sources[name]
        # A part of a tensor is copied, or it would keep the whole alive.
        mapped = place.mapped and source.change is None
        stored = files.read(source.name)
        value = source.value(_dequantised(files, source.name, stored, place.dtype))
        if value.shape != parameter.shape:
            raise ModelFileError(
                f"{source.name} in {files.path} gives a tensor of shape {tuple(value.shape)}, a "
                f"{what} of this size has {tuple(parameter.shape)}",
                hint="the file is of another model, or its metadata does not belong to it",
            )
        kept = value.to(device=place.device, dtype=place.dtype, copy=not mapped)
        _set(model, name, kept.contiguous())
        if kept.data_ptr() != stored.data_ptr():
            files.release(source.name)


def refuse_unknown(files: WeightFiles, known: Iterable[str], what: str) -> None:
    """Raise if the file has tensors that nobody asked for: they would be lost in silence.

    Raises:
        ModelFileError: there are some.
    """
    unknown = sorted(name for name in set(files) - set(known) if not is_quantisation_marker(name))
    if unknown:
        raise ModelFileError(
            f"{files.path} has {len(unknown)} tensors that a {what} has not: {_some(unknown)}",
            hint="is it a file of another model, or of another layout?",
        )


def _dequantised(files: WeightFiles, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the file as numbers; fp8 is multiplied by its scale, in float32.

    Raises:
        ModelFileError: fp8 whose scale is missing though the file announces one, or a storage
            format without a reader.
    """
    if tensor.dtype not in _FP8:
        if not tensor.is_floating_point():
            raise ModelFileError(
                f"{name} in {files.path} is stored as {tensor.dtype}, which Menma cannot read",
                hint="use the bf16, fp16 or fp8 release of the file",
            )
        return tensor
    stem = name.removesuffix(".weight")
    scales = [stem + suffix for suffix in _SCALE_SUFFIXES if stem + suffix in files]
    if not scales:
        if _announces_scales(files):
            raise ModelFileError(
                f"{files.path} is a scaled fp8 file, but {name} has no scale",
                hint="the file is incomplete; download it again",
            )
        return tensor.to(dtype)
    scale = files.read(scales[0]).float()
    # One scale per output row, or one for the whole tensor.
    return tensor.float() * (
        scale.view(-1, *(1,) * (tensor.ndim - 1)) if scale.numel() > 1 else scale
    )


def _announces_scales(files: WeightFiles) -> bool:
    return any(name.endswith((*_SCALE_SUFFIXES, _SCALED_MARK)) for name in files)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
