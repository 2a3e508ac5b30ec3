"""Layers and ranks of an adapter file, from its safetensors header, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.contract.errors import ModelFileError
from trainer.contract.lora_keys import ALPHA, Key, parse_key
from trainer.contract.safetensors_header import tensor_shapes
from trainer.contract.stored_kinds import STORED_KINDS, StoredKind

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayer:
    """One layer of an adapter file."""

    key: str
    """Of its first tensor, as the file spells it."""
    rank: int
    inputs: int
    outputs: int
    shapes: Shapes = field(default_factory=dict)
    """Of its tensors, by the name that a trained layer gives them (`down`, `w2_a`)."""
    any_rank: bool = False
    """A layer of another rank may start from it."""

    @property
    def parameters(self) -> int:
        """Numbers of a LoRA's two factors."""
        return self.rank * (self.inputs + self.outputs)


def lora_layers(
    path: Path, kind: str = "lora", *, expert: str | None = None
) -> dict[str, FileLayer]:
    """Return the layers of an adapter by canonical name, in the order of the file's header.

    Args:
        path: safetensors file of any known layout, or a folder with one.
        kind: in `STORED_KINDS`: what the file has to be.
        expert: `high_noise` or `low_noise`: which of two adapters in one file is meant.

    Raises:
        ModelFileError: no such file, no safetensors, another kind, a tensor without its others, or
            adapters of both experts and none is chosen; names the key.
    """
    if not path.exists():
        raise ModelFileError(f"{path} does not exist", hint="check the path")
    shapes = tensor_shapes(path)
    if not shapes:
        raise ModelFileError(
            f"{path} has no safetensors header to read ranks from",
            hint="give a LoRA as a safetensors file; `menma lora convert` writes one",
        )
    stored = STORED_KINDS[kind]
    keys = _of_expert(path, _parsed(path, shapes, stored), expert)
    tensors: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        if key.role != ALPHA:
            tensors.setdefault(key.module, {})[key.role] = name
    return {module: _layer(path, stored, found, shapes) for module, found in tensors.items()}


def _parsed(path: Path, shapes: Shapes, stored: StoredKind) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for name in shapes:
        key = parse_key(name)
        if key is None or key.role not in {*stored.endings, ALPHA}:
            what = "plain LoRA" if stored.name == "lora" else stored.title
            foreign = key is not None and key.role.startswith("vera_")
            raise ModelFileError(
                f"{path}: {name} is no part of a {what} of a Wan model",
                hint="PEFT draws VeRA's random matrices in another way than Menma does, so that "
                "such a file can be used and not trained on"
                if foreign
                else "`menma lora inspect` says what the file is",
            )
        keys[name] = key
    return keys


def _of_expert(path: Path, keys: dict[str, Key], expert: str | None) -> dict[str, Key]:
    if len({key.part for key in keys.values()}) < 2:
        return keys
    if expert is None:
        raise ModelFileError(
            f"{path} holds LoRAs of both experts of Wan 2.2",
            hint="take one out of it: `menma lora convert IN OUT --expert high_noise`",
        )
    low = expert == "low_noise"
    return {name: key for name, key in keys.items() if (key.part == "transformer_2") == low}


def _layer(path: Path, stored: StoredKind, found: Mapping[str, str], shapes: Shapes) -> FileLayer:
    key = found[min(found, key=list(stored.endings).index)]
    if frozenset(found) not in stored.forms:
        form = min(stored.forms, key=lambda form: len(form ^ found.keys()))
        lost = sorted(form - found.keys())
        raise ModelFileError(
            f"{path}: {key} lacks the other factor of its layer ({', '.join(lost)})"
            if lost
            else f"{path}: {found[min(found.keys() - form)]} is one tensor too many for its layer",
            hint=f"the file is no whole {stored.title}; `menma lora inspect` says what it is",
        )
    for role, name in found.items():
        if len(shapes[name]) != 2 and not (role in stored.vectors and len(shapes[name]) == 1):
            raise ModelFileError(
                f"{path}: {name} has {len(shapes[name])} dimensions, and is of no linear layer",
                hint="only adapters of linear layers can be used",
            )
    own = {_own_name(role): shapes[name] for role, name in found.items()}
    matrices = _matrices(stored, own)
    unequal = any(len(two) == 2 and two[0][1] != two[1][0] for two in matrices)
    unequal |= stored.name == "loha" and matrices[0] != matrices[1]
    if unequal or any(0 in shape for shape in own.values()):
        raise ModelFileError(
            f"{path}: the ranks of {' and '.join(found.values())} differ or are 0: "
            + " and ".join(str(shapes[name]) for name in found.values()),
            hint="the file is damaged; download or export it again",
        )
    inputs, outputs = 1, 1
    for factors in matrices[: 1 if stored.name == "loha" else None]:
        outputs, inputs = outputs * factors[0][0], inputs * factors[-1][-1]
    cut = [factors for factors in reversed(matrices) if len(factors) == 2]
    rank = cut[0][0][1] if cut else min(matrices[-1][0])
    return FileLayer(key=key, rank=rank, inputs=inputs, outputs=outputs, shapes=own)


def _matrices(stored: StoredKind, own: Shapes) -> list[list[tuple[int, ...]]]:
    """Return the matrices that a layer is made of, each whole or as its two factors."""
    if stored.name in {"lora", "dora"}:
        return [[own["up"], own["down"]]]
    return [
        [own[name]] if name in own else [own[f"{name}_a"], own[f"{name}_b"]]
        for name in ("w1", "w2")
    ]


def _own_name(role: str) -> str:
    return role.removeprefix("hada_").removeprefix("lokr_")
