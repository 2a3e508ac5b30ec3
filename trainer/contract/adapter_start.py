"""What training may start from: a file with the whole trained state of the kind that is trained.

One implementation for the check, the estimate, the list of targets and the training. No torch: the
file's header and the options tell everything here; `adapters.start` reads the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.kronecker import lokr_shapes
from trainer.contract.lora_header import FileLayer, lora_layers
from trainer.contract.stored_kinds import STORED_KINDS
from trainer.contract.targets import FROM_WEIGHTS

TLORA_KEY = "menma.tlora"
"""Of an output file: the rank schedule as a JSON object, without which it acts at full rank."""
VERA_KEY = "menma.vera"
"""What its random matrices were made from, as a JSON object."""
SINGLORA_KEY = "menma.singlora"
"""How far its update was faded in, as a JSON object."""
STATE_KEYS = {"tlora": TLORA_KEY, "vera": VERA_KEY, "singlora": SINGLORA_KEY}
"""Kind of adapter -> the key by which its file, a LoRA, says that it is whole."""
_PATH_KEY = "adapter.init_from"
_TOLD = {
    "tlora": {
        "min_rank": "min_rank",
        "exponent": "rank_exponent",
        "full_rank_below": "full_rank_below",
    },
    "vera": {"projection_seed": "projection_seed"},
}
"""Name in the JSON object -> option that has to be the same."""
_ONE_RANK = ("tlora", "vera")
_HINT = "use weights that were trained for this model"

Sizes = Mapping[str, tuple[int, int]]
"""Inputs and outputs of linear layers by name."""


def stored_kind(kind: str) -> str:
    """Return what files of an adapter kind hold, a key of `STORED_KINDS`."""
    stored = STORED_KINDS.get(kind)
    return kind if stored is not None and stored.written else "lora"


def start_layers(path: Path, kind: str) -> dict[str, FileLayer]:
    """Return the layers of a file that an adapter of this kind starts from.

    ReLoRA freezes what is in the file and LoKr's matrices tell no one rank, so that `rank` need not
    be the file's there.

    Raises:
        ModelFileError: it cannot be read, or holds another kind of adapter; names the key.
    """
    layers = lora_layers(path, stored_kind(kind))
    if kind not in {"relora", "lokr"}:
        return layers
    return {name: replace(layer, any_rank=True) for name, layer in layers.items()}


def require_fitting(
    kind: str,
    options: Mapping[str, Any],
    sizes: Sizes,
    in_file: Mapping[str, FileLayer],
    ranks: Mapping[str, int | None],
) -> None:
    """Refuse a file whose layers have other sizes than the model's, or cannot be trained so.

    Args:
        kind: of the adapter.
        options: of the adapter, with defaults.
        sizes: of all linear layers of the model.
        in_file: what `start_layers` returned.
        ranks: of the layers that are trained.

    Raises:
        ConfigError: every problem; each names the file and a key of it.
    """
    path = options["init_from"]
    problems = list(_size_problems(path, sizes, in_file))
    if not problems and kind == "lokr" and options["rank"] != FROM_WEIGHTS:
        problems += _shape_problems(path, options, sizes, in_file, ranks)
    found = {layer.rank: layer.key for layer in in_file.values()}
    if len(found) > 1 and kind in _ONE_RANK:
        told = ", ".join(f"{rank} ({key})" for rank, key in list(found.items())[:3])
        problems.append(
            Problem(
                f"{path} has layers of different ranks: {told}",
                _PATH_KEY,
                hint=f'{kind} has one; name another file, or set adapter.kind = "lora"',
            )
        )
    if problems:
        raise ConfigError(problems=problems)


def start_problems(
    kind: str,
    options: Mapping[str, Any],
    metadata: Mapping[str, Any],
    in_file: Mapping[str, FileLayer],
) -> Iterator[Problem]:
    """Yield why what a file says of itself forbids that an adapter of this kind starts from it.

    Args:
        kind: of the adapter.
        options: of the adapter, with defaults.
        metadata: of the file's header.
        in_file: its layers.
    """
    path = options["init_from"]
    if TLORA_KEY in metadata and kind != "tlora":
        yield Problem(
            f"{path} is a T-LoRA: with all ranks at every timestep it is not what was trained",
            _PATH_KEY,
            hint='set adapter.kind = "tlora" to train it on, or name another file; without the '
            f"metadata {TLORA_KEY} it is a plain LoRA",
        )
    key = STATE_KEYS.get(kind)
    if key is None:
        return
    if key not in metadata:
        yield Problem(
            f"{path}: its metadata lack {key}: {_LOST[kind]}",
            _PATH_KEY,
            hint=f'name a file that Menma wrote while it trained kind = "{kind}", or set '
            'adapter.kind = "lora" to train its LoRA on',
        )
        return
    try:
        told = json.loads(metadata[key])
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        yield Problem(
            f"{path}: its metadata {key} are damaged: {metadata[key][:80]!r}",
            _PATH_KEY,
            hint="the file was edited; name another one",
        )
        return
    yield from _told_problems(kind, options, told)
    layer = next((one for one in in_file.values() if one.rank != told.get("rank", one.rank)), None)
    if layer is not None:
        yield Problem(
            f"{path}: its metadata {key} are for rank {told['rank']}, and {layer.key} has rank "
            f"{layer.rank}",
            _PATH_KEY,
            hint="a tool that did not know what it is has changed the file; name another one",
        )


_LOST = {
    "tlora": "all its ranks act at every timestep, and under a mask it would be another update",
    "vera": "its factors are products, and what they are products of is not known",
    "singlora": "a LoRA has two matrices, and the one that both are made of is not known",
}


def _told_problems(
    kind: str, options: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[Problem]:
    path = options["init_from"]
    for name, option in _TOLD.get(kind, {}).items():
        if told.get(name) != options[option]:
            yield Problem(
                f"{path} was trained with {told.get(name)}; with {options[option]} it would be "
                "another update",
                f"adapter.{option}",
                hint=f"set it to {told.get(name)}",
            )
    if kind == "singlora" and told.get("share") == 0:
        yield Problem(
            f"{path} was written before its update had begun to fade in: what was trained is not "
            "in it",
            _PATH_KEY,
            hint="name a later file, or start anew",
        )


def _size_problems(
    path: object, sizes: Sizes, in_file: Mapping[str, FileLayer]
) -> Iterator[Problem]:
    wrong = [n for n, layer in in_file.items() if (layer.inputs, layer.outputs) != sizes[n]]
    if wrong:
        layer, (inputs, outputs) = in_file[wrong[0]], sizes[wrong[0]]
        yield Problem(
            f"{path} is for another model: {layer.key} is of a layer with {layer.inputs} inputs "
            f"and {layer.outputs} outputs, the model's has {inputs} and {outputs} ({len(wrong)} of "
            f"{len(in_file)} layers differ)",
            _PATH_KEY,
            hint=_HINT,
        )


def _shape_problems(
    path: object,
    options: Mapping[str, Any],
    sizes: Sizes,
    in_file: Mapping[str, FileLayer],
    ranks: Mapping[str, int | None],
) -> Iterator[Problem]:
    """Yield where LoKr's matrices would be cut in another way than those of the file."""
    for name, rank in ranks.items():
        cut = {key: options.get(key) for key in ("factor", "decompose_both")}
        wanted = lokr_shapes(*sizes[name], rank or 1, **cut)  # type: ignore[arg-type]
        layer = in_file[name]
        if wanted != layer.shapes:
            yield Problem(
                f"{path}: {layer.key} is of a layer of {_listed(layer.shapes)}; with this rank, "
                f"factor and decompose_both {_listed(wanted)} is trained",
                "adapter.rank",
                hint='set adapter.rank = "from_weights", and leave out factor and decompose_both',
            )
            return


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
