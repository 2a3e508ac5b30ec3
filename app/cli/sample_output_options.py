"""Options of `menma sample` about its files: which kind, what is in them, and from which one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion
from trainer.contract.errors import UserError

Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Kind of file: h264 (default), h265, prores, vp9, av1, gif, webp, png or latents. "
        "Where --output names a file, its ending says it, too.",
        autocompletion=completion.formats,
    ),
]
Quality = Annotated[
    int | None,
    typer.Option("--quality", help="1 (smallest file) to 100; left out: visually lossless."),
]
SaveLatents = Annotated[
    bool, typer.Option("--save-latents", help="Write the latents beside each file, too.")
]
NoMetadata = Annotated[
    bool, typer.Option("--no-metadata", help="Write nothing into the files of what made them.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]
Like = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="FILE",
        help="Make this sample again, from what its file says. Options change that. The config is "
        "found where the file is of a run.",
    ),
]
Decode = Annotated[
    Path | None,
    typer.Option(
        "--decode",
        metavar="FILE|FOLDER",
        help="Decode saved latents, Menma's or musubi-tuner's; only the VAE is loaded.",
    ),
]
Preview = Annotated[
    bool | None,
    typer.Option(
        "--preview/--no-preview",
        help="Draw a rough picture of what is being made. Default: on a terminal with colours.",
        show_default=False,
    ),
]


def overrides(
    format_: str | None,
    quality: int | None,
    *,
    save_latents: bool,
    no_metadata: bool,
) -> dict[str, Any]:
    """Return the keys of `[sampling]` that the options set."""
    given: dict[str, Any] = {"format": format_, "quality": quality}
    if save_latents:
        given["save_latents"] = True
    if no_metadata:
        given["metadata"] = False
    return given


def preview_setting(wanted: bool | None, settings: list[str]) -> list[str]:
    """Return what to set for previews: nothing where the config or `--set` decides.

    Args:
        wanted: `--preview` or `--no-preview`; None: drawn where the terminal can.
        settings: `section.key=value`, as given.
    """
    key = "sampling.preview_every_steps"
    if wanted is None:
        if any(text.startswith(f"{key}=") for text in settings) or not _can_draw():
            return []
        wanted = True
    return [f"{key}={int(wanted)}"]


def fields(like: Path | None, decode: Path | None, *, force: bool) -> dict[str, Any]:
    """Return what the job's request says of files."""
    paths = {"like": like, "decode": decode}
    given = {key: None if path is None else str(path) for key, path in paths.items()}
    return {**given, "force": force}


def source_of(
    source: Path | None, like: Path | None, decode: Path | None, others: dict[str, Any]
) -> Path:
    """Return the config or run that is meant: the one given, or the run that a sample is of.

    Args:
        source: the argument.
        like: a sample to be made again.
        decode: latents to be decoded.
        others: options that mean nothing to `decode`, with what was given.

    Raises:
        UserError: neither is known, a file is not there, or options contradict each other.
    """
    _check_together(like, decode, others)
    if source is not None:
        return source
    if like is None:
        raise UserError("no config", hint="menma sample CONFIG|RUN; see --help")
    from app.runs.state import is_run_dir

    # samples/x.mp4 of a run, or samples/SHEET/cells/x.mp4.
    run = next((folder for folder in like.absolute().parents[1:4] if is_run_dir(folder)), None)
    if run is not None:
        return run
    raise UserError(
        f"{like} is not in a run, so its models are not known",
        hint=f"name the config that has them: menma sample CONFIG --like {like}",
    )


def _check_together(like: Path | None, decode: Path | None, others: dict[str, Any]) -> None:
    for option, path in (("--like", like), ("--decode", decode)):
        if path is not None and not path.exists():
            raise UserError(f"{option}: there is no {path}")
    if decode is None:
        return
    if like is not None:
        raise UserError("--decode makes nothing, --like does", hint="give one of the two")
    given = [option for option, value in others.items() if value]
    if given:
        raise UserError(
            f"--decode makes nothing: {given[0]} means nothing to it", hint=f"leave out {given[0]}"
        )


def refuse_beside(*, interactive: bool, sheet: bool, request: dict[str, Any]) -> None:
    """Refuse what means nothing to a session or to a sheet.

    Raises:
        UserError: it was asked for.
    """
    if not (interactive or sheet):
        return
    what = "--interactive" if interactive else "a sheet"
    names = ("force", "like", "decode") if sheet else ("like", "decode")
    given = [f"--{name}" for name in names if request[name]]
    if given:
        raise UserError(f"{given[0]} means nothing to {what}", hint=f"leave out {given[0]}")


def _can_draw() -> bool:
    from rich.console import Console

    from app.render.half_blocks import can_draw

    return can_draw(Console(stderr=True))
