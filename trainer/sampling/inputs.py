"""A look at the files of requests before any model is loaded: what is wrong, what is cut off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.contract.errors import ConfigError, DataError, Problem
from trainer.sampling.media import look_at
from trainer.sampling.requests import SampleRequest

_CLIPS = {"control", "video"}


def check_inputs(
    requests: Sequence[SampleRequest], *, multiple: int, place: str = "prompts"
) -> list[str]:
    """Return notes on files that have another size than the sample, which are scaled and cropped.

    Args:
        requests: checked ones.
        multiple: what width and height must be multiples of.
        place: what the list of requests is called in errors.

    Raises:
        ConfigError: files that are unreadable or too short, all of them at once.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    seen: set[tuple[Path, int, tuple[int, int]]] = set()
    for index, request in enumerate(requests):
        for key, path in request.files.items():
            frames, wanted = request.num_frames if key in _CLIPS else 1, request.size
            if (path, frames, wanted) in seen:
                continue
            seen.add((path, frames, wanted))
            try:
                found = look_at(path, frames)
            except DataError as error:
                where = f"{place}[{index}].{key}"
                problems.append(Problem(error.message, key=where, hint=error.hint))
                continue
            if found != wanted:
                notes.append(_note(path, found, wanted, multiple))
    if problems:
        raise ConfigError(problems=problems)
    return notes


def _note(path: Path, found: tuple[int, int], wanted: tuple[int, int], multiple: int) -> str:
    scale = max(wanted[0] / found[0], wanted[1] / found[1])
    lost = 1 - wanted[0] * wanted[1] / (found[0] * found[1] * scale**2)
    text = f"{path.name} is {found[0]}x{found[1]} and is scaled to {wanted[0]}x{wanted[1]}"
    if lost < 0.01:
        return text
    text += f"; {lost:.0%} of the picture is cut off at its edges"
    aspect, area = found[0] / found[1], wanted[0] * wanted[1]
    ideal = math.sqrt(area * aspect), math.sqrt(area / aspect)
    near = tuple(max(multiple, round(side / multiple) * multiple) for side in ideal)
    if near != wanted:
        text += f"; {near[0]}x{near[1]} would keep its shape"
    return text
