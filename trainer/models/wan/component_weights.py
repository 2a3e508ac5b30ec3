"""Filling a model that was built on the meta device from a weight file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.contract.errors import ModelFileError
from trainer.io.formats.stored_tensors import StoredTensor, find_tensors, read_tensor
from trainer.io.mapped_load import WeightFiles


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: a tensor of the file and what is done to it."""

    name: str
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """How tensors are kept: dtype, device, and whether they may stay mapped to the file."""

    dtype: torch.dtype
    device: torch.device | str
    mapped: bool = False


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
    for name, parameter in parameters.items():
        source = sources[name]
        value = _read(files, stored[source.name], source, place)
        if value.shape != parameter.shape:
            raise ModelFileError(
                f"{source.name} in {files.path} gives a tensor of shape {tuple(value.shape)}, a "
                f"{what} of this size has {tuple(parameter.shape)}",
                hint="the file is of another model, or its metadata does not belong to it",
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


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
