"""The kinds of adapter that files hold: their keys, what belongs together, what it is made into.

One entry a kind. Reading and writing know no kind by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.dora_linear import DoRAFactors
from trainer.adapters.formats.vera import VERA_ROLES, VeraProjections
from trainer.adapters.loha_linear import LoHaFactors
from trainer.adapters.lokr_linear import lokr_factors
from trainer.contract.errors import ModelFileError


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKind:
    """How a kind lies in files.

    Attributes:
        title: its name for people.
        endings: role -> regular expression of what follows a module's name in its key.
        forms: the sets of roles that a module may have.
        build: makes the update.
        written: layout -> name in `Update.tensors` -> ending that is written.
        columns: of those, what the layouts of ComfyUI hold as a column (O, 1), and we as (O,).
        network_module: `ss_network_module` of files in kohya's layout.
    """

    title: str
    endings: Mapping[str, str]
    forms: tuple[frozenset[str], ...]
    build: Callable[[StoredModule], Update]
    written: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()
    network_module: str = ""


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
    if down.shape[0] != up.shape[1] or not down.shape[0]:
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


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


_INFIX = r"(?:\.[^.]+)?"
"""The name that PEFT gives an adapter in a running model."""
_LORA = {
    "down": rf"(?:lora_down|lora_A|lora\.down){_INFIX}\.weight",
    "up": rf"(?:lora_up|lora_B|lora\.up){_INFIX}\.weight",
}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_MATRICES = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
_LOKR = tuple(role for matrix in _MATRICES for form in matrix for role in form)
_AB = {"down": "lora_A.weight", "up": "lora_B.weight"}
_DOWN_UP = {"down": "lora_down.weight", "up": "lora_up.weight"}


def _prefixed(roles: tuple[str, ...]) -> dict[str, dict[str, str]]:
    return {
        layout: {role.partition("_")[2]: role for role in roles} for layout in ("comfy", "kohya")
    }


STORED_KINDS: dict[str, StoredKind] = {
    "lora": StoredKind(
        title="LoRA",
        endings=_LORA,
        forms=(frozenset(_LORA),),
        build=_lora,
        written={"comfy": _AB, "kohya": _DOWN_UP, "peft": _AB},
        network_module="networks.lora_wan",
    ),
    "dora": StoredKind(
        title="DoRA",
        endings={
            **_LORA,
            "magnitude": rf"(?:dora_scale|lora_magnitude_vector{_INFIX}(?:\.weight)?)",
        },
        forms=(frozenset({*_LORA, "magnitude"}),),
        build=_dora,
        written={
            "comfy": {**_AB, "magnitude": "dora_scale"},
            "kohya": {**_DOWN_UP, "magnitude": "dora_scale"},
            "peft": {**_AB, "magnitude": "lora_magnitude_vector"},
        },
        columns=frozenset({"magnitude"}),
        network_module="lycoris.kohya",
    ),
    "loha": StoredKind(
        title="LoHa",
        endings={role: role + _INFIX for role in _HADA},
        forms=(frozenset(_HADA),),
        build=_loha,
        written=_prefixed(_HADA),
        network_module="networks.loha",
    ),
    "lokr": StoredKind(
        title="LoKr",
        endings={role: role + _INFIX for role in _LOKR},
        forms=tuple(frozenset(a + b) for a, b in product(*_MATRICES)),
        build=_lokr,
        written=_prefixed(_LOKR),
        network_module="networks.lokr",
    ),
    "vera": StoredKind(
        title="VeRA",
        endings={role: role + _INFIX for role in VERA_ROLES},
        forms=(frozenset(VERA_ROLES),),
        build=_vera,
    ),
}
"""By `Update.kind`; what is read becomes an update of its own kind, VeRA becomes a LoRA."""
