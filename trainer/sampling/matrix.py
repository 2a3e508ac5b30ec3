"""A sheet of samples: prompts x seeds x LoRA strengths x checkpoints x any key of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.contract.prompt_keys import written_value
from trainer.contract.registry import nearest
from trainer.contract.variants import Variant
from trainer.contract.vary import CHECKPOINT, LORA, NO_CHECKPOINT, PROMPT, Axis, lora_of, pairs
from trainer.sampling.requests import SampleRequest

MAX_LABEL = 60
"""Characters of a heading; the whole text is in the cell."""


@dataclass(frozen=True, slots=True)
class LabelledAxis:
    """An axis as people read it."""

    key: str
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its headings say: of `lora:FILE` not the whole path."""
        if self.key.startswith(f"{LORA}:"):
            path, expert = lora_of(self.key)
            return " ".join(filter(None, (LORA, path.stem, expert)))
        return self.key


@dataclass(frozen=True, slots=True)
class Cell:
    """One sample of the sheet."""

    place: tuple[int, ...]
    """Index on each axis."""
    request: SampleRequest
    base: tuple[Path, ...] = ()
    """Transformers in the place of the config's, where full checkpoints are compared."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """All cells, in the order of the axes."""

    axes: tuple[LabelledAxis, ...]
    cells: tuple[Cell, ...]
    loras: tuple[LoRAUse, ...]
    """What `SampleRequest.lora_strengths` counts by."""
    columns: int
    """Axis from left to right; all others make rows."""

    @property
    def varied(self) -> tuple[int, ...]:
        """Indexes of the axes with more than one value."""
        return tuple(index for index, axis in enumerate(self.axes) if len(axis.labels) > 1)

    @property
    def row_axes(self) -> tuple[int, ...]:
        """Indexes of the axes that make the rows."""
        return tuple(index for index in self.varied if index != self.columns)

    def rows(self) -> Iterator[tuple[tuple[int, ...], list[Cell]]]:
        """Yield the place on `row_axes` of each row, and its cells from left to right."""
        found: dict[tuple[int, ...], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(tuple(cell.place[axis] for axis in self.row_axes), []).append(cell)
        for place, cells in found.items():
            yield place, sorted(cells, key=lambda cell: cell.place[self.columns])

    def label(self, cell: Cell, axis: int) -> str:
        """Return the heading that a cell has on an axis."""
        return self.axes[axis].labels[cell.place[axis]]


def build_sheet(
    prompts: Sequence[Prompt],
    axes: Sequence[Axis],
    loras: Sequence[LoRAUse],
    variant: Variant,
    section: SamplingSection,
    *,
    is_transformer: Callable[[Path], bool],
    columns: str | None = None,
) -> Sheet:
    """Return the sheet, every sample of it checked.

    Args:
        prompts: what to show; several are an axis of their own, the first.
        axes: what else differs.
        loras: in use in every cell.
        variant: the model.
        section: the config's `[sampling]`.
        is_transformer: whether a checkpoint is a whole transformer and no LoRA.
        columns: key of the axis from left to right; None: the last that has several values.

    Raises:
        ConfigError: everything that is wrong with any sample, at once.
    """
    wearing = _Wearing.of(axes, loras, is_transformer)
    values = [list(axis.values) for axis in axes]
    for index, axis in enumerate(axes):
        if axis.key == CHECKPOINT:
            values[index] = list(range(len(wearing.checkpoints)))
    cells: list[Cell] = []
    problems: dict[str, Problem] = {}
    sizes = [len(prompts), *map(len, values)]
    for place in product(*map(range, sizes)):
        chosen = {axis.key: values[i][place[i + 1]] for i, axis in enumerate(axes)}
        try:
            request = _request(prompts[place[0]], place[0], chosen, wearing, variant, section)
        except ConfigError as error:
            problems |= {str(problem): problem for problem in error.problems}
            continue
        cells.append(Cell(place, request, wearing.base(chosen)))
    if problems:
        raise ConfigError(problems=problems.values())
    labelled = (
        LabelledAxis(PROMPT, tuple(_unique([_prompt_label(prompt) for prompt in prompts]))),
        *(LabelledAxis(axis.key, tuple(_labels(axis, wearing))) for axis in axes),
    )
    return Sheet(labelled, tuple(cells), wearing.loras, _column_axis(labelled, columns))


@dataclass(frozen=True, slots=True)
class _Wearing:
    """Which LoRAs there are, and how the axes set their strengths."""

    loras: tuple[LoRAUse, ...]
    strengths: tuple[float, ...]
    """As the command gives them; of a checkpoint 0."""
    set_by: Mapping[str, int] = field(default_factory=dict)
    """Axis `lora:FILE` -> its place among the LoRAs."""
    checkpoints: tuple[tuple[Path, ...], ...] = ()
    worn: Mapping[Path, int] = field(default_factory=dict)
    """Checkpoint that is a LoRA -> its place among the LoRAs."""
    is_varied: bool = False

    @classmethod
    def of(
        cls,
        axes: Sequence[Axis],
        loras: Sequence[LoRAUse],
        is_transformer: Callable[[Path], bool],
    ) -> _Wearing:
        varied = any(axis.key == CHECKPOINT or axis.key.startswith(LORA) for axis in axes)
        _refuse_two_strengths(loras if varied else ())
        all_loras = list(loras)
        set_by: dict[str, int] = {}
        for axis in axes:
            if axis.key == LORA and not loras and not any(a.key == CHECKPOINT for a in axes):
                raise ConfigError("lora: there is no LoRA to vary", hint="add --lora FILE")
            if axis.key.startswith(f"{LORA}:"):
                set_by[axis.key] = _place_of(lora_of(axis.key), all_loras)
        strengths = [use.strength for use in all_loras]
        files = next((axis.values for axis in axes if axis.key == CHECKPOINT), ())
        checkpoints = pairs([Path(str(file)) for file in files])
        worn: dict[Path, int] = {}
        for path in (path for pair in checkpoints for path in pair):
            if str(path) != NO_CHECKPOINT and not is_transformer(path):
                worn[path] = len(all_loras)
                all_loras.append(SampleLoRA(path=path))
                strengths.append(0.0)
        return cls(tuple(all_loras), tuple(strengths), set_by, tuple(checkpoints), worn, varied)

    def strengths_in(self, chosen: Mapping[str, Any]) -> tuple[float, ...] | None:
        """Return the strength of each LoRA in a cell; None: as the LoRAs say themselves."""
        if not self.is_varied or not self.loras:
            return None
        strengths = list(self.strengths)
        if CHECKPOINT in chosen:
            for path in self.checkpoints[chosen[CHECKPOINT]]:
                if path in self.worn:
                    strengths[self.worn[path]] = 1.0
        factor = float(chosen.get(LORA, 1.0))
        strengths = [strength * factor for strength in strengths]
        for key, index in self.set_by.items():
            strengths[index] = float(chosen[key])
        return tuple(strengths)

    def base(self, chosen: Mapping[str, Any]) -> tuple[Path, ...]:
        """Return the transformers of a cell that are not the config's."""
        if CHECKPOINT not in chosen:
            return ()
        pair = self.checkpoints[chosen[CHECKPOINT]]
        return tuple(path for path in pair if path not in self.worn and str(path) != NO_CHECKPOINT)


def _refuse_two_strengths(loras: Sequence[LoRAUse]) -> None:
    for use in loras:
        if getattr(use, "strength_high_noise", None) is not None:
            raise ConfigError(
                f"{use.path} has a strength for each expert, which a sheet over LoRAs would undo",
                hint="give the file twice, with @high_noise and with @low_noise",
            )


def _place_of(wanted: tuple[Path, Any], loras: list[LoRAUse]) -> int:
    path, expert = wanted
    for index, use in enumerate(loras):
        if use.path.resolve() == path.resolve() and use.expert == expert:
            return index
    loras.append(SampleLoRA(path=path, expert=expert))
    return len(loras) - 1


def _request(
    prompt: Prompt,
    index: int,
    chosen: Mapping[str, Any],
    wearing: _Wearing,
    variant: Variant,
    section: SamplingSection,
) -> SampleRequest:
    fields = prompt.model_dump(exclude_none=True)
    for key, value in chosen.items():
        if key in Prompt.model_fields:
            fields[key] = written_value(key, value) if isinstance(value, str) else value
    try:
        varied = Prompt.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(problems=problems_of(error, Prompt)) from None
    request = SampleRequest.of(varied, variant, section, index=index)
    request.check(variant)
    strengths = wearing.strengths_in(chosen)
    return request if strengths is None else replace(request, lora_strengths=strengths)


def _prompt_label(prompt: Prompt) -> str:
    return short(prompt.name or prompt.prompt)


def _labels(axis: Axis, wearing: _Wearing) -> list[str]:
    if axis.key == CHECKPOINT:
        return _unique([short(_name(pair)) for pair in wearing.checkpoints])
    return _unique([short(_text(value)) for value in axis.values])


def _name(pair: Sequence[Path]) -> str:
    return " + ".join(path.stem for path in pair)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def short(text: str) -> str:
    """Return a text on one line, of `MAX_LABEL` characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}…"


def _unique(labels: list[str]) -> list[str]:
    """Number the labels that are there more than once."""
    return [
        f"{label} ({labels[: index + 1].count(label)})" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _column_axis(axes: Sequence[LabelledAxis], columns: str | None) -> int:
    if columns is None:
        varied = [index for index, axis in enumerate(axes) if len(axis.labels) > 1]
        return varied[-1] if varied else 0
    keys = [axis.key for axis in axes]
    if columns not in keys:
        raise ConfigError(f"columns: nothing varies {columns!r}", hint=nearest(columns, keys))
    return keys.index(columns)
