"""What every tool on LoRA files does first: open them and see that they belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trainer.adapters import load_adapter
from trainer.adapters.apply import describe
from trainer.adapters.base import AdapterFile, LoRAFactors, Update
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.experts import SHARED
from trainer.contract.layer_names import block_index
from trainer.contract.lora_keys import Expert
from trainer.contract.lora_use import LoRAUse
from trainer.contract.loraid_metadata import SLOT_EXPERTS, of_expert
from trainer.contract.parameter_names import stored_name
from trainer.io.mapped_load import open_weights

_EXPERT_KEYS = ("menma.expert", "ss_loraid_expert")
_EXPERT_WORDS = {word: expert for word, expert in SLOT_EXPERTS.items() if expert is not None}
_LOW_NOISE_PART = re.compile(r"(?:^|\.)transformer_2\.")
_ANCHOR = "patch_embedding.weight"
_FILES_IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def open_loras(uses: Sequence[LoRAUse], *, differences: bool = False) -> list[AdapterFile]:
    """Read LoRAs that are to be computed with each other, in the given order.

    Args:
        uses: the files.
        differences: as in `load_adapter`.

    Raises:
        ConfigError: one is given twice.
        ModelFileError: one cannot be read, or they are of different models or experts.
    """
    check_distinct(uses)
    adapters = [load_lora(use, differences=differences) for use in uses]
    check_same_model(adapters)
    check_same_expert(uses, adapters)
    return adapters


def load_lora(use: LoRAUse, *, differences: bool = False) -> AdapterFile:
    """Read a LoRA, or the part of it that is wanted; its header then says which expert it is for.

    Raises:
        ModelFileError: it cannot be read.
    """
    adapter = load_adapter(use.path, expert=use.expert, differences=differences)
    if use.expert is not None:
        adapter.metadata.update(of_expert(adapter.metadata, use.expert))
    return adapter


def check_distinct(uses: Sequence[LoRAUse]) -> None:
    """Refuse a file (or the same part of a file) that is given twice.

    Raises:
        ConfigError: names the file.
    """
    seen: set[tuple[Path, Expert | None]] = set()
    for use in uses:
        place = (use.path.resolve(), use.expert)
        if place in seen:
            raise ConfigError(
                f"{use.path} is given twice", hint="name each file once, with its whole strength"
            )
        seen.add(place)


def check_same_model(adapters: Sequence[AdapterFile]) -> None:
    """Refuse LoRAs whose layers have different sizes.

    LoRAs of different blocks are compared by the kind of layer: all q projections of a model have
    one shape.

    Raises:
        ModelFileError: names two files, the layer and both models.
    """
    _check_same_parameters(adapters)
    first: dict[str, tuple[AdapterFile, str]] = {}
    for adapter in adapters:
        for name, update in adapter.items():
            other, other_name = first.setdefault(inside_block(name), (adapter, name))
            if update.shape == other[other_name].shape:
                continue
            raise ModelFileError(
                f"{other.path} and {adapter.path} are for different models: {other_name} is "
                f"{other[other_name].shape} in the one, {name} is {update.shape} in the other "
                f"({_model(other)}; {_model(adapter)})",
                hint="use LoRAs of one model",
            )


def _check_same_parameters(adapters: Sequence[AdapterFile]) -> None:
    first: dict[str, tuple[AdapterFile, str]] = {}
    for adapter in adapters:
        for name, tensor in adapter.differences.items():
            other, other_name = first.setdefault(inside_block(name), (adapter, name))
            if tensor.shape != other.differences[other_name].shape:
                raise ModelFileError(
                    f"{other.path} and {adapter.path} are for different models: "
                    f"{stored_name(other_name)} is {tuple(other.differences[other_name].shape)} "
                    f"in the one, {stored_name(name)} is {tuple(tensor.shape)} in the other",
                    hint="use LoRAs of one model",
                )


def check_same_expert(uses: Sequence[LoRAUse], adapters: Sequence[AdapterFile]) -> None:
    """Refuse LoRAs of different experts of Wan 2.2; one that says nothing goes with either.

    Raises:
        ModelFileError: names two files and their experts.
    """
    told = [(use, expert_of(use, adapter)) for use, adapter in zip(uses, adapters, strict=True)]
    known = [(use, expert) for use, expert in told if expert is not None]
    for use, expert in known[1:]:
        if expert != known[0][1]:
            raise ModelFileError(
                f"{known[0][0].path} is for the {known[0][1]} expert, {use.path} for the "
                f"{expert} one",
                hint="compute with the LoRAs of each expert by themselves; where a name or the "
                f"metadata are wrong, write FILE@{known[0][1]}",
            )


def experts_of(use: LoRAUse, metadata: Mapping[str, str]) -> frozenset[Expert]:
    """Return the experts a LoRA is for: as given, else by metadata, else by words of its name.

    One that says nothing, or names both, is for both.
    """
    if use.expert is not None:
        return frozenset({use.expert})
    if metadata.get("menma.expert") == SHARED:
        return frozenset(EXPERTS)
    told = " ".join(metadata.get(key, "") for key in _EXPERT_KEYS)
    for text in (told, use.path.stem):
        words = re.split(r"[^a-z]+", text.lower())
        found = {expert for word, expert in _EXPERT_WORDS.items() if word in words}
        if len(found) == 1:
            return frozenset(found)
    return frozenset(EXPERTS)


def expert_of(use: LoRAUse, adapter: AdapterFile) -> Expert | None:
    """Return the one expert a LoRA is for, None where it does not say."""
    found = experts_of(use, adapter.metadata)
    return next(iter(found)) if len(found) == 1 else None


def parts_in(path: Path) -> tuple[Expert, ...]:
    """Return the experts of Wan 2.2 that the names in a file tell apart; () where they do not."""
    low = [bool(_LOW_NOISE_PART.search(name)) for name in open_weights(lora_file(path))]
    if not any(low):
        return ()
    return ("low_noise",) if all(low) else EXPERTS


def holds_both_experts(path: Path) -> bool:
    """Tell whether a file holds a LoRA for each expert of Wan 2.2."""
    return parts_in(path) == EXPERTS


def lora_file(path: Path) -> Path:
    """Return the file itself where PEFT's or diffusers' folder is given."""
    inside = (path / name for name in _FILES_IN_FOLDER)
    return next((file for file in inside if file.is_file()), path) if path.is_dir() else path


def is_transformer(path: Path) -> bool:
    """Tell whether a file or folder holds a base model's weights rather than a LoRA."""
    return any(name.endswith(_ANCHOR) for name in open_weights(lora_file(path)))


def low_rank(adapter: AdapterFile, tool: str) -> dict[str, LoRAFactors]:
    """Return the factors of a plain LoRA.

    Raises:
        ModelFileError: another kind, which has no such factors; names file, module and what to do.
    """
    found: dict[str, LoRAFactors] = {}
    for name, update in adapter.items():
        if not is_plain(update):
            raise ModelFileError(
                f"{adapter.path}: {name} is a {update.kind} update, and {tool} needs the two "
                "factors of a plain LoRA",
                hint="`menma lora resize FILE --rank R -o OUT` makes a plain LoRA of it",
            )
        assert isinstance(update, LoRAFactors)
        found[name] = update
    return found


def is_plain(update: Update) -> bool:
    """Tell whether an update is scale · up @ down and nothing else."""
    return isinstance(update, LoRAFactors) and update.kind == LoRAFactors.kind


def inside_block(name: str) -> str:
    """Return a module's name without its block: `self_attn.q`."""
    return name.split(".", 2)[2] if block_index(name) is not None else name


def union(tables: Iterable[Iterable[str]]) -> list[str]:
    """Return the names of all tables once, in the order in which they appear."""
    return list(dict.fromkeys(name for table in tables for name in table))


def _model(adapter: AdapterFile) -> str:
    shapes = {name: update.shape for name, update in adapter.items()}
    return f"{adapter.path.name}: {describe(shapes)}"
