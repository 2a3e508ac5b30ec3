"""What a sample starts from, on the command line, and the schedule that it walks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion

Solver = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="unipc, euler, dpm++, heun (2 evaluations a step) or lcm.",
        autocompletion=completion.solvers,
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="Where the steps are: training_grid, full_range, full_range_cut or beta. Default: the "
        "solver's own.",
        autocompletion=completion.schedules,
    ),
]
Video = Annotated[
    Path | None,
    typer.Option(
        "--video", help="Start from this video, folder of frames or image instead of noise alone."
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help="With --video: share of the steps to walk, above 0; 1 keeps nothing of it. "
        "Default: 0.8.",
    ),
]
OneFrame = Annotated[
    str | None,
    typer.Option(
        "--one-frame",
        metavar="INDICES",
        help="One picture at a moment of a clip: target_index=1,control_index=0;2, in latent "
        "frames. For I2V and first-last-frame models.",
    ),
]
ControlImages = Annotated[
    list[Path] | None,
    typer.Option(
        "--control-image",
        metavar="FILE",
        help="With --one-frame: the picture of a control_index. Repeatable, in that order.",
    ),
]


def start_settings(
    strength: float | None, one_frame: str | None, control_images: list[Path] | None
) -> dict[str, Any]:
    """Return the keys of every prompt that are no single file; None where one is not given."""
    return {
        "strength": strength,
        "one_frame": one_frame,
        "control_images": [str(path) for path in control_images or ()] or None,
    }
