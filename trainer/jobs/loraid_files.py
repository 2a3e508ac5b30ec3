"""LoRA files of slots: what they say and hold, where they meet, and which are meant by a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from trainer.adapters import load_adapter
from trainer.adapters.apply import describe
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.jobs import LoraidUse, MergeRequest
from trainer.contract.lora_keys import Expert
from trainer.contract.lora_use import LoRAUse
from trainer.contract.loraid import in_words
from trainer.contract.loraid_metadata import (
    SLOT_EXPERTS,
    Loraid,
    SlotExpert,
    of_expert,
    read_loraid,
    slot_expert,
)
from trainer.contract.run_dir import RunDir
from trainer.io.mapped_load import open_weights
from trainer.jobs.lora_files import holds_both_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFile:
    """A LoRA file, its layers by canonical name, and what its header says of slots."""

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    """(O, I) of the weight each layer is for."""
    loraid: Loraid | None
    variant: str
    """Model it says it was trained on; "" where it says none."""
    expert: SlotExpert = "none"
    """Expert of Wan 2.2 that its header says it is for; `none` where it says none."""
    notes: tuple[str, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether parts of several slots were blended into it."""
        return self.loraid is not None and bool(self.loraid.shared)

    @property
    def outside(self) -> tuple[str, ...]:
        """Layers that are not of the slots it says it is; unknown for older files."""
        if self.loraid is None or self.is_shared:
            return ()
        if self.loraid.slots is None:
            return ()
        # Whether the model has an image branch is told by no key, and a slot need not have a part
        # of it.
        owned = [_owned(self.loraid, image=image) for image in (False, True)]
        return min((tuple(n for n in self.shapes if n not in own) for own in owned), key=len)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Two files that write to the same matrices."""

    first: Path
    second: Path
    modules: tuple[str, ...]
    shared: bool
    """One of them is marked as blended of several slots, so that this is meant."""

    def in_words(self) -> str:
        """Return which files and where."""
        places = in_words(self.modules) or ", ".join(self.modules[:4])
        return (
            f"{self.first} and {self.second} both change {len(self.modules)} layers: {places}"
            + (" (one is marked as shared)" if self.shared else "")
        )


def read_slot_file(path: Path, *, expert: Expert | None = None) -> SlotFile:
    """Read a LoRA of any known layout; its tensors are checked and let go.

    Args:
        path: file.
        expert: which LoRA to take from a file that holds two.

    Raises:
        ModelFileError: it cannot be read as a LoRA, or its header is damaged.
    """
    adapter = load_adapter(path, expert=expert)
    metadata = adapter.metadata
    if expert is not None and holds_both_experts(path):
        metadata = of_expert(metadata, expert)
    loraid = read_loraid(metadata, path)
    notes = [*adapter.notes]
    if loraid is not None and loraid.note:
        notes.append(loraid.note)
    own = "none" if loraid is None else loraid.expert
    if own == "none":
        own = slot_expert(metadata.get("menma.expert"))
    return SlotFile(
        path=path,
        shapes={name: update.shape for name, update in adapter.items()},
        loraid=loraid,
        variant=metadata.get("menma.variant", ""),
        expert=own,
        notes=tuple(notes),
    )


def read_slot_files(path: Path, *, expert: Expert | None = None) -> list[SlotFile]:
    """Read a file as `read_slot_file` does; of a file with both experts' LoRAs each part."""
    if expert is None and holds_both_experts(path):
        return [read_slot_file(path, expert=part) for part in EXPERTS]
    return [read_slot_file(path, expert=expert)]


def find_overlaps(files: Sequence[SlotFile]) -> Iterator[Overlap]:
    """Yield each two files that change the same layer, by the names of the layers.

    Files of different experts change different models.
    """
    for first, second in combinations(files, 2):
        experts = {first.expert, second.expert}
        if len(experts) == 2 and "none" not in experts:
            continue
        both = tuple(name for name in first.shapes if name in second.shapes)
        if both:
            shared = first.is_shared or second.is_shared
            yield Overlap(first=first.path, second=second.path, modules=both, shared=shared)


def find_disagreements(files: Sequence[SlotFile]) -> dict[str, dict[str, list[str]]]:
    """Return in what the files differ that shall be used together: subject -> value -> files."""
    told = {**_scheme(files), "model_sizes": _shape_clash(files)}
    return {subject: values for subject, values in told.items() if len(values) > 1}


def resolve_loraids(
    wanted: Sequence[LoraidUse],
    sources: Sequence[Path],
    *,
    expert: Expert | None = None,
    both_experts: bool = False,
) -> tuple[LoRAUse, ...]:
    """Find the files of slots and see that they can be used together.

    Args:
        wanted: slots with their strengths; strength 0 leaves a slot out.
        sources: files, or folders: of LoRAs, of a run, or of runs (then the newest output of each).
        expert: the one that the base is, where it is one.
        both_experts: both are used (Wan 2.2), so that a slot may have a file for each.

    Raises:
        ConfigError: a slot is asked for twice, has no file, or has several.
        ModelFileError: a file cannot be read, files change the same layer, or they are of another
            number of slots, allocation or model.
    """
    _check_distinct(wanted)
    used = [use for use in wanted if use.strength != 0]
    if not used:
        return ()
    known = list(_candidates(sources))
    chosen = [
        (path, use, own) for use in used for path, own in _files_of(use, known, sources, expert)
    ]
    for use in used if not both_experts else ():
        paths = [str(path) for path, other, _ in chosen if other is use]
        if len(paths) > 1:
            raise ConfigError(
                f"slot {use.slot} is there for both experts ({', '.join(paths)}), and the base is "
                "one model",
                hint=f"say which one is meant: {use.slot}@high_noise or {use.slot}@low_noise",
            )
    files = [read_slot_file(path, expert=SLOT_EXPERTS[own.expert]) for path, _, own in chosen]
    if not both_experts:
        _check_one_expert(files)
    _check_together(files)
    return tuple(
        LoRAUse(path=path, strength=use.strength, expert=SLOT_EXPERTS[own.expert] or use.expert)
        for path, use, own in chosen
    )


def loras_to_merge(request: MergeRequest) -> tuple[LoRAUse, ...]:
    """Return the LoRAs of a request, those of its slots among them.

    Raises:
        ConfigError: there are none; or see `resolve_loraids`.
        ModelFileError: see `resolve_loraids`.
    """
    expert: Expert | None = None
    both = request.base_high_noise is not None
    if request.loraids and not both:
        told = open_weights(request.base).metadata.get("menma.expert")
        expert = next((known for known in EXPERTS if known == told), None)
    slots = resolve_loraids(request.loraids, request.loraid_from, expert=expert, both_experts=both)
    if not request.loras and not slots:
        raise ConfigError(
            "there is nothing to merge", hint="name a LoRA, or a slot of strength other than 0"
        )
    return (*request.loras, *slots)


def is_of_slots(path: Path, slots: Sequence[LoraidUse]) -> bool:
    """Tell whether a file is the LoRA of one of these slots."""
    loraid = read_loraid(open_weights(path).metadata, path) if slots else None
    return loraid is not None and set(loraid.ids) <= {slot.slot for slot in slots}


def _check_distinct(wanted: Sequence[LoraidUse]) -> None:
    for first, second in combinations(wanted, 2):
        same = first.expert == second.expert or None in {first.expert, second.expert}
        if first.slot == second.slot and same:
            raise ConfigError(f"slot {first.slot} is given twice", hint="give each slot once")


def _candidates(sources: Sequence[Path]) -> Iterator[tuple[Path, Loraid]]:
    """Yield the LoRAs of slots among files and in folders; a named file must be one."""
    seen: set[Path] = set()
    for source in sources:
        for path in _safetensors(source):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            loraid = read_loraid(open_weights(path).metadata, path)
            if loraid is not None and holds_both_experts(path):
                yield path, replace(loraid, expert="high")
                yield path, replace(loraid, expert="low")
            elif loraid is not None:
                yield path, loraid
            elif not source.is_dir():
                raise ModelFileError(
                    f"{path} does not say which slot it is (no ss_loraid in its header)",
                    hint="use it with --lora, or train with [adapter.loraid]",
                )


def _safetensors(source: Path) -> Iterable[Path]:
    if not source.is_dir():
        return [source]
    newest = (
        RunDir(source).output.glob("*.safetensors"),
        *(folder.glob("*.safetensors") for folder in sorted(source.glob("*/output"))),
    )
    outputs = (max(files, key=lambda p: p.stat().st_mtime_ns, default=None) for files in newest)
    return [*sorted(source.glob("*.safetensors")), *(path for path in outputs if path is not None)]


def _files_of(
    use: LoraidUse,
    known: Sequence[tuple[Path, Loraid]],
    sources: Sequence[Path],
    expert: Expert | None,
) -> list[tuple[Path, Loraid]]:
    """Return the files of a slot: one, or one for each expert.

    Raises:
        ConfigError: there is none, or there are several.
    """
    wanted = use.expert or expert
    fitting = [(path, own) for path, own in known if use.slot in own.ids]
    fitting = [f for f in fitting if wanted is None or SLOT_EXPERTS[f[1].expert] in {wanted, None}]
    for path, own in fitting:
        if own.ids != (use.slot,):
            raise ConfigError(
                f"{path} holds slots {', '.join(map(str, own.ids))} in one, not slot {use.slot} "
                "alone",
                hint="use it with --lora, or give the files of the single slots",
            )
    if not fitting:
        there = sorted({number for _, own in known for number in own.ids})
        where = ", ".join(map(str, sources))
        told = f"slots {', '.join(map(str, there))} are there" if there else "no slot is there"
        which = f"slot {use.slot}" + (f" of the {wanted} expert" if wanted else "")
        raise ConfigError(f"there is no file of {which} in {where}", hint=told)
    by_expert: dict[SlotExpert, Path] = {}
    for path, own in fitting:
        if (other := by_expert.setdefault(own.expert, path)) != path:
            raise ConfigError(
                f"{other} and {path} are both slot {use.slot}",
                hint="name the files instead of a folder, each slot once",
            )
    return fitting


def _check_one_expert(files: Sequence[SlotFile]) -> None:
    told = [file for file in files if file.expert != "none"]
    for file in told[1:]:
        if file.expert != told[0].expert:
            raise ModelFileError(
                f"{told[0].path} is for the {told[0].expert}-noise expert, {file.path} for the "
                f"{file.expert}-noise one, and the base is one model",
                hint="use slots of one expert",
            )


def _check_together(files: Sequence[SlotFile]) -> None:
    disagreements = find_disagreements(files)
    disagreements.pop("expert", None)  # each goes to its own model
    for subject, values in disagreements.items():
        listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
        raise ModelFileError(
            f"the files are of different {_SUBJECTS[subject]}: {listed}",
            hint="use files that were trained with equal [adapter.loraid] on one model",
        )
    for overlap in find_overlaps(files):
        if not overlap.shared:
            raise ModelFileError(
                overlap.in_words(), hint="`menma lora verify` compares the files in full"
            )
    for file in files:
        if file.outside:
            raise ModelFileError(
                f"{file.path}: {len(file.outside)} layers are not of the slot that ss_loraid says, "
                f"such as {file.outside[0]}",
                hint="the header is wrong; use the file with --lora",
            )


_SUBJECTS = {
    "model": "models",
    "model_sizes": "models",
    "slots": "numbers of slots",
    "granularity": "granularity",
    "allocation": "allocation",
    "num_blocks": "numbers of blocks",
    "expert": "experts",
}


def _scheme(files: Sequence[SlotFile]) -> dict[str, dict[str, list[str]]]:
    """Return subject -> value -> files that say so."""
    table: dict[str, dict[str, list[str]]] = {}

    def note(subject: str, value: object, file: SlotFile) -> None:
        paths = table.setdefault(subject, {}).setdefault(str(value), [])
        if str(file.path) not in paths:
            paths.append(str(file.path))

    whole = [file.path for file in files]
    for file in files:
        if file.variant:
            note("model", file.variant, file)
        if file.expert != "none" or file.loraid is not None:
            both = whole.count(file.path) > 1  # the two parts of a file
            note("expert", "both" if both else file.expert, file)
        if file.loraid is None:
            continue
        own = file.loraid
        note("slots", "not told" if own.slots is None else own.slots, file)
        note("granularity", own.granularity, file)
        note("allocation", own.allocation, file)
        if own.num_blocks is not None:
            note("num_blocks", own.num_blocks, file)
    return table


def _shape_clash(files: Sequence[SlotFile]) -> dict[str, list[str]]:
    """Return model in words -> files, where a kind of layer has another shape in another file."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for file in files:
        for name, shape in file.shapes.items():
            shapes.setdefault(name.split(".", 2)[-1], set()).add(shape)
    if all(len(found) == 1 for found in shapes.values()):
        return {}
    models: dict[str, list[str]] = {}
    for file in files:
        models.setdefault(describe(file.shapes), []).append(str(file.path))
    return models


def _owned(loraid: Loraid, *, image: bool) -> frozenset[str]:
    try:
        partition = loraid.partition(image=image)
    except ConfigError:  # numbers that are those of the other branch, or of no model at all
        return frozenset()
    if partition is None:
        return frozenset()
    return frozenset(name for slot in loraid.ids for name in partition.modules(slot))
