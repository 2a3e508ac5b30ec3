"""What a sample starts from, on the command line, and the schedule that it walks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Solver = Annotated[
    str | None,
    typer.Option("--solver", help="unipc, euler, dpm++, heun (2 evaluations a step) or lcm."),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="Where the steps are: training_grid, full_range, full_range_cut or beta. Default: the "
        "solver's own.",
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
