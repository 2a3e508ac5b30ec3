"""From the tensors of one module of a file to its update, for each kind that files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.difference import WeightDifference
from trainer.adapters.dora_linear import DoRAFactors
from trainer.adapters.formats.vera import VeraProjections
from trainer.adapters.loha_linear import LoHaFactors
from trainer.adapters.lokr_linear import lokr_factors
from trainer.contract.errors import ModelFileError
from trainer.contract.stored_kinds import VERA_ROLES

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class StoredModule(Protocol):
    """What a file holds for one module, once every tensor is read and checked by itself."""

    name: str
    tensors: Mapping[str, Tensor]
    """By role, without alpha."""
    projections: VeraProjections
    """What all modules of a VeRA file share."""

    def alpha(self, rank: int) -> float:
        """Return the alpha that the file gives this module, `rank` where it gives none."""
        ...

    def outer_scale(self) -> float:
        """Return alpha / rank of settings outside the tensors; 1 without."""
        ...

    def wrong(self, reason: str) -> ModelFileError:
        """Return an error that names file and module."""
        ...


def _lora(module: StoredModule) -> LoRAFactors:
    down, up = _low_rank(module)
    return LoRAFactors(down, up, module.alpha(len(down)))


def _dora(module: StoredModule) -> DoRAFactors:
    down, up = _low_rank(module)
    magnitude = module.tensors["magnitude"]
    if magnitude.dim() == 2 and len(magnitude) == 1 != len(up):
        raise module.wrong(
            "it is a DoRA with a length for each input column (LyCORIS with wd_on_output = false), "
            f"{tuple(magnitude.shape)}; only one for each output row is supported"
        )
    if magnitude.numel() != len(up):
        raise module.wrong(f"there are {magnitude.numel()} magnitudes for {len(up)} outputs")
    return DoRAFactors(down, up, magnitude.flatten(), module.alpha(len(down)))


def _low_rank(module: StoredModule) -> tuple[Tensor, Tensor]:
    down, up = module.tensors["down"], module.tensors["up"]
    if not down.shape[0] and not up.shape[1]:
        raise module.wrong("its rank is 0")
    if down.shape[0] != up.shape[1]:
        raise module.wrong(f"the ranks differ: down is {_size(down)}, up is {_size(up)}")
    return down, up


def _loha(module: StoredModule) -> LoHaFactors:
    parts = module.tensors
    one_a, one_b, two_a, two_b = (parts[role] for role in _HADA)
    rank = one_b.shape[0]
    fits = one_a.shape == two_a.shape and one_b.shape == two_b.shape and one_a.shape[1] == rank
    if not fits or not rank:
        listed = ", ".join(f"{role} is {_size(parts[role])}" for role in _HADA)
        raise module.wrong(f"the factors do not fit one another: {listed}")
    return LoHaFactors(one_a, one_b, two_a, two_b, module.alpha(rank))


def _lokr(module: StoredModule) -> Update:
    for name in ("lokr_w1", "lokr_w2"):
        _check_matrix(module, name)
    tensors = {role.removeprefix("lokr_"): tensor for role, tensor in module.tensors.items()}
    rank = lokr_factors(tensors, 1.0).rank
    if {"w1", "w2"} <= tensors.keys():
        # Whole matrices: LyCORIS and ComfyUI do not scale them, whatever alpha says; PEFT does.
        module.alpha(rank)
        scale = module.outer_scale()
        if scale != 1.0:
            tensors["w1"] = tensors["w1"].to(torch.float32) * scale
        return lokr_factors(tensors, float(rank))
    return lokr_factors(tensors, module.alpha(rank))


def _check_matrix(module: StoredModule, name: str) -> None:
    parts = [t for role, t in module.tensors.items() if role.startswith(name)]
    if any(not tensor.numel() for tensor in parts):
        raise module.wrong(f"{name} is empty: its rank is 0")
    if len(parts) == 2:
        left, right = module.tensors[f"{name}_a"], module.tensors[f"{name}_b"]
        if left.shape[1] != right.shape[0]:
            raise module.wrong(
                f"the ranks differ: {name}_a is {_size(left)}, {name}_b is {_size(right)}"
            )


def _vera(module: StoredModule) -> LoRAFactors:
    lambda_b, lambda_d = (module.tensors[role].flatten() for role in VERA_ROLES)
    found = module.projections.slices(module.name, len(lambda_b))
    if isinstance(found, str):
        raise module.wrong(found)
    a_RI, b_OR = found
    if len(a_RI) != len(lambda_d):
        raise module.wrong(f"the ranks differ: {len(lambda_d)} and {len(a_RI)} of vera_A")
    down = lambda_d.to(torch.float32).unsqueeze(1) * a_RI.to(torch.float32)
    up = lambda_b.to(torch.float32).unsqueeze(1) * b_OR.to(torch.float32)
    return LoRAFactors(down, up, float(len(down)))


def _difference(module: StoredModule) -> WeightDifference:
    return WeightDifference(module.tensors["diff"])


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


BUILDERS: dict[str, Callable[[StoredModule], Update]] = {
    "lora": _lora,
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "difference": _difference,
    "vera": _vera,
}
"""By `StoredKind.name`. What is read becomes an update of its own kind, VeRA becomes a LoRA."""
