"""Filling a model that was built on the meta device from a weight file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.contract.errors import ModelFileError
from trainer.io.formats.stored_tensors import FP8_DTYPES, StoredTensor, find_tensors, read_tensor
from trainer.io.mapped_load import WeightFiles
from trainer.models.wan.quantised import Quantisation, take_fp8_layer
from trainer.quant.fp8 import Fp8Spec


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: a tensor of the file and what is done to it."""

    name: str
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """How tensors are kept: dtype, device, and whether they may stay mapped to the file.

    With `fp8` the weights of linear layers are held so; `dtype` is that of all others.
    """

    dtype: torch.dtype
    device: torch.device | str
    mapped: bool = False
    fp8: Fp8Spec | None = None


def fill(
    model: nn.Module,
    files: WeightFiles,
    sources: Mapping[str, Source],
    place: Placement,
    *,
    what: str,
    ignore: Collection[str] = (),
) -> None:
    """Replace the meta parameters of `model` by the file's tensors; one is in flight at a time.

    Args:
        sources: for every parameter of `model`, where it comes from.
        what: what the file should be, for messages ("Wan VAE").
        ignore: tensors of the file that the model is known to have no use for.

    Raises:
        ModelFileError: a tensor is missing, unknown, of another shape, or cannot be read.
    """
    parameters = dict(model.named_parameters())
    stored = find_tensors(files, ignore=ignore)
    wanted = {sources[name].name for name in parameters}
    if missing := wanted - set(stored):
        raise ModelFileError(
            f"{files.path} lacks {len(missing)} tensors of a {what}: {_some(missing)}",
            hint="the file is incomplete or of another model; download it again",
        )
    if unknown := set(stored) - wanted:
        raise ModelFileError(
            f"{files.path} has {len(unknown)} tensors that a {what} has not: {_some(unknown)}",
            hint="is it a file of another model, or of another layout?",
        )
    linears = [] if place.fp8 is None else _linear_weights(model)
    coarse = any(files[stored[sources[name].name].name].dtype in FP8_DTYPES for name in linears)
    quantisation = None if place.fp8 is None else Quantisation(place.fp8, from_fp8=coarse)
    for name, parameter in parameters.items():
        source = sources[name]
        if quantisation is not None and name in linears:
            weight = stored[source.name]
            _require_shape(files[weight.name].shape, parameter, source, files, what)
            if take_fp8_layer(model, name, files, weight, place.device, quantisation):
                continue
        value = _read(files, stored[source.name], source, place)
        _require_shape(value.shape, parameter, source, files, what)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _linear_weights(model: nn.Module) -> list[str]:
    layers = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return [f"{name}.weight" for name in layers]


def _require_shape(
    shape: Sequence[int], parameter: Tensor, source: Source, files: WeightFiles, what: str
) -> None:
    if tuple(shape) != tuple(parameter.shape):
        raise ModelFileError(
            f"{source.name} in {files.path} gives a tensor of shape {tuple(shape)}, a "
            f"{what} of this size has {tuple(parameter.shape)}",
            hint="the file is of another model, or its metadata does not belong to it",
        )


def _read(files: WeightFiles, stored: StoredTensor, source: Source, place: Placement) -> Tensor:
    on_cpu = torch.device(place.device).type == "cpu"
    as_stored = stored.scale is None and files[stored.name].dtype == place.dtype
    if place.mapped and on_cpu and as_stored and source.change is None:
        return files.read(stored.name)
    value = read_tensor(files, stored, place.dtype, place.device)
    # A part of a tensor is copied, or it would keep the whole alive.
    return value if source.change is None else source.change(value).clone()


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")
