"""The job `lora_blend`: LoRAs take over a share of each other's updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.adapters.base import AdapterFile, LoRAFactors, Update
from trainer.adapters.low_rank import Cut
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import LoRABlendRequest
from trainer.contract.lora_use import LoRAUse
from trainer.jobs.base import Emit
from trainer.jobs.lora_files import check_distinct, inside_block, low_rank, open_loras, union
from trainer.jobs.lora_metadata import lost_notes, tool_metadata
from trainer.jobs.lora_output import (
    DTYPES,
    Target,
    Written,
    check_output,
    write_lora,
    write_together,
)
from trainer.jobs.lora_sum import Energies, Part, rank_counts, sum_module

GROUPS = ("cross", "self", "ffn", "other")
SHARED_KEY = "ss_loraid_shared"
Table = Mapping[str, LoRAFactors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """How much LoRAs share.

    Attributes:
        share: a in [0, 1].
        votes: κ ≥ 0; 0: every LoRA has the same say in the mean.
        groups: factor on the share in a group of layers, 1 where nothing is said.
    """

    share: float
    votes: float = 0.0
    groups: Mapping[str, float]

    def weights(self, group: str, norms: Sequence[float]) -> list[list[float]]:
        """Return p, n x n: LoRA i becomes Σⱼ pᵢⱼ · Dⱼ in this group.

        pᵢⱼ = (1 − a) · δᵢⱼ + a · vⱼ with votes vⱼ = ‖Dⱼ‖^κ / Σₖ‖Dₖ‖^κ. At κ = 0 each vote is 1/n,
        and the columns sum to 1 as the rows do: the sum of all LoRAs is kept. With other votes
        only the rows do.

        Args:
            group: one of `GROUPS`.
            norms: ‖Dⱼ‖, Frobenius, over the group's layers.
        """
        share = self.share * self.groups.get(group, 1.0)
        count = len(norms)
        largest = max(norms)
        # Relative to the largest, so that no power is too large or too small for a float.
        raw = [(norm / largest) ** self.votes if largest else 1.0 for norm in norms]
        votes = [vote / sum(raw) for vote in raw]
        return [
            [share * votes[j] + (1 - share if i == j else 0.0) for j in range(count)]
            for i in range(count)
        ]

    def mark(self, names: Sequence[str]) -> str:
        """Return the header entry that says that these LoRAs stand in each other's layers."""
        rules = [f"a={self.share:g}"]
        if self.votes:
            rules.append(f"votes={self.votes:g}")
        rules += [f"{group}={factor:g}" for group, factor in self.groups.items() if factor != 1]
        return ",".join(names) + ";" + ";".join(rules)


def run(request: LoRABlendRequest, emit: Emit) -> None:
    """Job `lora_blend`; an `output` event a file, with its ranks and the energy that a cut left."""
    wrong = [group for group, factor in request.groups.items() if not 0 <= factor <= 1]
    if wrong:
        raise ConfigError(
            f"the factor of {wrong[0]} is {request.groups[wrong[0]]:g}", hint="give one in [0, 1]"
        )
    emit("phase", name="blend", detail=f"{len(request.files)} LoRAs")
    target = Target(
        path=request.output,
        layout=request.layout,
        dtype=DTYPES[request.dtype] if request.dtype else None,
        force=request.force,
    )
    blend = Blend(share=request.share, votes=request.votes, groups=dict(request.groups.items()))

    def on_module(done: int, total: int, module: str) -> None:
        emit("phase", name="blend", done=done, total=total, detail=module)

    results = blend_loras(request.files, blend, target, Cut(max_rank=request.rank), on_module)
    for written, updates, energies in results:
        for note in written.notes:
            emit("log", message=f"{written.path.name}: {note}")
        emit("output", **written.fields(), ranks=rank_counts(updates), **energies.fields())


def blend_loras(
    uses: Sequence[LoRAUse],
    blend: Blend,
    folder: Target,
    cut: Cut | None = None,
    on_module: Callable[[int, int, str], None] | None = None,
) -> list[tuple[Written, dict[str, Update], Energies]]:
    """Write each LoRA again, with a share of all of them in it; all files appear, or none.

    Works on the updates D = scale · up @ down of each module, not on the factors, so that a share
    is applied once. A module that one LoRA alone has is only scaled, through alpha; modules of
    several are joined exactly, and then cut if a cut is given.

    Args:
        uses: the LoRAs; a strength multiplies the whole LoRA first.
        blend: the shares.
        folder: `path` is the folder; results keep the names of their files.
        cut: limit of the ranks.
        on_module: told of (done, total, module).

    Raises:
        ConfigError: a file is given twice, two have one name, or a result is there already.
        ModelFileError: a file cannot be read, is no plain LoRA, or of another model or expert.
        DiskError: the disk is full, read-only or faulty; what was there is as it was.
    """
    check_distinct(uses)
    outputs = _outputs(uses, folder)
    adapters = open_loras(uses)
    tables = [low_rank(adapter, "a blend") for adapter in adapters]
    # Joined in the order of the names, so that the order of the arguments does not matter.
    made, energies = _blended(uses, tables, blend, cut or Cut(), on_module)
    mark = blend.mark(sorted(_slot(adapter) for adapter in adapters)) if blend.share else ""
    results: dict[int, Written] = {}

    def writer(index: int) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            facts = {"share": blend.share, "votes": blend.votes, "groups": dict(blend.groups)}
            metadata = tool_metadata(adapters[index], "blend", **facts)
            if mark and "ss_loraid" in metadata:
                metadata.pop("ss_network_args", None)  # its patterns choose the slot's layers only
            results[index] = write_lora(
                made[index],
                replace(folder, path=path, force=True),
                [adapters[index]],
                metadata | ({SHARED_KEY: mark} if mark else {}),
                exact=not energies[index].kept,
            )
            lost = lost_notes([adapters[index]])
            results[index] = replace(results[index], notes=(*lost, *results[index].notes))

        return write

    write_together({outputs[index]: writer(index) for index in range(len(uses))})
    return [
        (replace(results[index], path=outputs[index]), made[index], energies[index])
        for index in range(len(uses))
    ]


def _blended(
    uses: Sequence[LoRAUse],
    tables: Sequence[Table],
    blend: Blend,
    cut: Cut,
    on_module: Callable[[int, int, str], None] | None,
) -> tuple[list[dict[str, Update]], list[Energies]]:
    # Joined in the order of the names, so that the order of the arguments does not matter.
    order = sorted(range(len(uses)), key=lambda index: uses[index].path.name)
    strengths = [use.strength for use in uses]
    names = sorted(union(tables))
    weights = _weights(blend, tables, strengths, names)
    made: list[dict[str, Update]] = [{} for _ in uses]
    energies = [Energies() for _ in uses]
    for number, name in enumerate(names, start=1):
        for index, row in enumerate(weights[group_of(name)]):
            parts = [
                Part(uses[j].path, tables[j][name], row[j] * strengths[j])
                for j in order
                if name in tables[j]
            ]
            update = sum_module(name, parts, cut, energies[index])
            if update is not None:
                made[index][name] = update
        if on_module is not None:
            on_module(number, len(names), name)
    for use, updates in zip(uses, made, strict=True):
        if not updates:
            raise ConfigError(
                f"nothing would be left of {use.path}", hint="its strength must differ from 0"
            )
    return made, energies


def group_of(name: str) -> str:
    """Return the group of a module: cross or self attention, feed-forward, or other."""
    inner = inside_block(name)
    starts = {"cross_attn.": "cross", "self_attn.": "self", "ffn.": "ffn"}
    return next((group for start, group in starts.items() if inner.startswith(start)), "other")


def _weights(
    blend: Blend, tables: Sequence[Table], strengths: Sequence[float], names: Sequence[str]
) -> dict[str, list[list[float]]]:
    squares = {group: [0.0] * len(tables) for group in GROUPS}
    for name in names:
        for index, table in enumerate(tables):
            if name in table:
                norm = table[name].norm() * abs(strengths[index])
                squares[group_of(name)][index] += norm * norm
    return {
        group: blend.weights(group, [square**0.5 for square in row])
        for group, row in squares.items()
    }


def _outputs(uses: Sequence[LoRAUse], folder: Target) -> list[Path]:
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"{folder.path} is a file", hint="give a folder for the results")
    outputs = [folder.path / f"{use.path.stem}.safetensors" for use in uses]
    for output in outputs:
        if outputs.count(output) > 1:
            raise ConfigError(
                f"two LoRAs are named {output.stem}", hint="results keep their names: rename one"
            )
        check_output(output, [use.path for use in uses], force=folder.force)
    return outputs


def _slot(adapter: AdapterFile) -> str:
    return adapter.metadata.get("ss_loraid", adapter.path.stem)
