"""The kinds of adapter that files hold: their keys, what belongs together, how they are written.

One entry a kind. Reading, writing and `check` know no kind by name; `adapters.formats.builders`
makes the updates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from trainer.contract.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKind:
    """How a kind lies in files.

    Attributes:
        name: as in `Update.kind`.
        title: its name for people.
        endings: role -> regular expression of what follows a module's name in its key.
        forms: the sets of roles that a module may have.
        written: layout -> name in `Update.tensors` -> ending that is written.
        columns: of those, what the layouts of ComfyUI hold as a column (O, 1), and we as (O,).
        vectors: roles that may have one dimension.
        network_module: `ss_network_module` of files in kohya's layout.
    """

    name: str
    title: str
    endings: Mapping[str, str]
    forms: tuple[frozenset[str], ...]
    written: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()
    vectors: frozenset[str] = frozenset()
    network_module: str = ""


VERA_ROLES = ("vera_lambda_b", "vera_lambda_d")
"""A VeRA module's own vectors: (O,) and (R,)."""
VERA_SHARED = re.compile(r"(?:.+\.)?(?P<role>vera_[AB])(?:\.[^.]+)?")
"""Keys of the two matrices that all modules of a VeRA file share."""
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
        name="lora",
        title="LoRA",
        endings=_LORA,
        forms=(frozenset(_LORA),),
        written={"comfy": _AB, "kohya": _DOWN_UP, "peft": _AB},
        network_module="networks.lora_wan",
    ),
    "dora": StoredKind(
        name="dora",
        title="DoRA",
        endings={
            **_LORA,
            "magnitude": rf"(?:dora_scale|lora_magnitude_vector{_INFIX}(?:\.weight)?)",
        },
        forms=(frozenset({*_LORA, "magnitude"}),),
        written={
            "comfy": {**_AB, "magnitude": "dora_scale"},
            "kohya": {**_DOWN_UP, "magnitude": "dora_scale"},
            "peft": {**_AB, "magnitude": "lora_magnitude_vector"},
        },
        columns=frozenset({"magnitude"}),
        vectors=frozenset({"magnitude"}),
        network_module="lycoris.kohya",
    ),
    "loha": StoredKind(
        name="loha",
        title="LoHa",
        endings={role: role + _INFIX for role in _HADA},
        forms=(frozenset(_HADA),),
        written=_prefixed(_HADA),
        network_module="networks.loha",
    ),
    "lokr": StoredKind(
        name="lokr",
        title="LoKr",
        endings={role: role + _INFIX for role in _LOKR},
        forms=tuple(frozenset(a + b) for a, b in product(*_MATRICES)),
        written=_prefixed(_LOKR),
        network_module="networks.lokr",
    ),
    "difference": StoredKind(
        name="difference",
        title="whole difference",
        endings={"diff": "diff"},
        forms=(frozenset({"diff"}),),
        written={layout: {"diff": "diff"} for layout in ("comfy", "kohya")},
        network_module="lycoris.kohya",
    ),
    "vera": StoredKind(
        name="vera",
        title="VeRA",
        endings={role: role + _INFIX for role in VERA_ROLES},
        forms=(frozenset(VERA_ROLES),),
        vectors=frozenset(VERA_ROLES),
    ),
}
"""By `Update.kind`; what is read becomes an update of its own kind, VeRA becomes a LoRA."""


def layout_problem(kind: str, layout: str, key: str = "") -> Problem | None:
    """Return why a kind has no such layout, and what to use instead; None where it has.

    Args:
        kind: of `adapter.kind` or `Update.kind`; one that is not stored as itself writes a LoRA.
        layout: `comfy`, `kohya` or `peft`.
        key: of the config, where one asks for it.
    """
    stored = STORED_KINDS.get(kind, STORED_KINDS["lora"])
    if layout in stored.written or not stored.written:
        return None
    return Problem(
        f"diffusers loads no {stored.title}, so there is no layout {layout!r} for it",
        key,
        hint='use "comfy" or "kohya", which ComfyUI loads, or merge it into the model '
        "(menma merge), which diffusers loads",
    )
