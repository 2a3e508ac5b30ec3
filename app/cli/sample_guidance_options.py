"""Guidance methods and step caches on the command line of `menma sample`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion
from trainer.contract.errors import UserError

CFGSkip = Annotated[
    str | None,
    typer.Option(
        "--cfg-skip",
        metavar="MODE",
        help="Steps without guidance: early, late, middle, early_late or alternate.",
        autocompletion=completion.cfg_skip_modes,
    ),
]
CFGApplyRatio = Annotated[
    float | None,
    typer.Option("--cfg-apply-ratio", help="With --cfg-skip: share of the steps with guidance."),
]
CFGZeroStar = Annotated[
    bool | None,
    typer.Option("--cfg-zero-star/--no-cfg-zero-star", help="Guidance by CFG-Zero*."),
]
CFGZeroInitSteps = Annotated[
    int | None,
    typer.Option("--cfg-zero-init-steps", help="With --cfg-zero-star: steps without movement."),
]
GuidanceRescale = Annotated[
    float | None,
    typer.Option("--guidance-rescale", help="Take back guidance's gain in contrast, 0 to 1."),
]
SLGLayers = Annotated[
    str | None,
    typer.Option(
        "--slg-layers", metavar="N,N", help="Skip-layer guidance: blocks to leave out, e.g. 9,10."
    ),
]
SLGMode = Annotated[
    str | None,
    typer.Option(
        "--slg-mode",
        metavar="MODE",
        help="original (a pass of its own; the default with --slg-layers) or uncond.",
        autocompletion=completion.slg_modes,
    ),
]
SLGScale = Annotated[
    float | None, typer.Option("--slg-scale", help="Strength of skip-layer guidance.")
]
SLGStart = Annotated[
    float | None, typer.Option("--slg-start", help="Share of the steps before it begins.")
]
SLGEnd = Annotated[
    float | None, typer.Option("--slg-end", help="Share of the steps after which it ends.")
]
CFGBatch = Annotated[
    bool | None,
    typer.Option(
        "--cfg-batch/--no-cfg-batch",
        help="Compute prompt and negative prompt as one batch; takes more memory.",
    ),
]
StepCacheName = Annotated[
    str | None,
    typer.Option(
        "--step-cache",
        metavar="METHOD",
        help="Reuse the blocks' work where little changes: teacache, magcache or none.",
        autocompletion=completion.step_caches,
    ),
]
StepCacheThreshold = Annotated[
    float | None,
    typer.Option("--step-cache-threshold", help="Higher: faster, and further from the full run."),
]
StepCacheStart = Annotated[
    float | None,
    typer.Option("--step-cache-start", help="Share of the first steps always computed."),
]
StepCacheMaxSkips = Annotated[
    int | None, typer.Option("--step-cache-max-skips", help="Steps in a row that may be reused.")
]
StepCacheRetention = Annotated[
    bool | None,
    typer.Option(
        "--step-cache-retention/--no-step-cache-retention", help="TeaCache's closer, slower form."
    ),
]
StepCacheFile = Annotated[
    Path | None,
    typer.Option("--step-cache-file", help="What --calibrate measured; with it: where to write."),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Sample without a cache and measure what the step caches need to know of the model.",
    ),
]


def denoising_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's values that are keys of `[sampling]`; None: not given.

    Args:
        given: of all parameters, by name; those of this module are named as the keys.

    Raises:
        UserError: something in `--slg-layers` is no number.
    """
    from trainer.contract.denoising_options import SectionDenoising

    found = {name: given[name] for name in SectionDenoising.model_fields if name in given}
    if (file := found.get("step_cache_file")) is not None:
        found["step_cache_file"] = str(file)
    if (layers := found.get("slg_layers")) is not None:
        found["slg_layers"] = _numbers(layers)
        found["slg_mode"] = found["slg_mode"] or "original"
    return found


def _numbers(layers: str) -> list[int]:
    try:
        return [int(part) for part in layers.split(",")]
    except ValueError:
        raise UserError(
            f"--slg-layers: {layers!r} is no list of numbers", hint="e.g. --slg-layers 9,10"
        ) from None


def refuse_calibration(calibrate: bool, *, is_sheet: bool, interactive: bool) -> None:
    """Refuse `--calibrate` where samples differ in what is measured, or come one by one.

    Raises:
        UserError: it is given there.
    """
    if calibrate and (is_sheet or interactive):
        other = "--interactive" if interactive else "--vary and --matrix"
        raise UserError(
            f"--calibrate does not go with {other}",
            hint="calibrate with a few prompts first; what it finds is used afterwards",
        )
