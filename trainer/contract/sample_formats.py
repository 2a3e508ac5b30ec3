"""The kinds of files that samples are written as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.registry import Entry, Registry, nearest

if TYPE_CHECKING:  # the shell asks for the names at each press of Tab
    from trainer.contract.config import SamplingSection


@dataclass(frozen=True, slots=True)
class FormatEntry(Entry):
    """A registry line of a format, with what is asked before its code is loaded."""

    suffix: str
    """Ending of its files."""
    has_quality: bool = True
    """Whether `sampling.quality` means something to it."""
    decodes: bool = True
    """Whether it holds frames, which a VAE has to decode."""
    holds: str = "video"
    """`video`: more than one frame. `any`: images and videos alike. `folder`: one frame a file."""
    in_browsers: bool = True
    """Whether browsers show its files."""


_FORMATS = "trainer.sampling.formats"
SAMPLE_FORMATS: Registry[Any] = Registry(
    "sample format",
    FormatEntry("h264", f"{_FORMATS}.h264:H264", "mp4 that plays everywhere", ".mp4"),
    FormatEntry(
        "h265",
        f"{_FORMATS}.h265:H265",
        "mp4, smaller; newer players",
        ".mp4",
        in_browsers=False,
    ),
    FormatEntry(
        "prores",
        f"{_FORMATS}.prores:ProRes",
        "mov of 10 bits, for editing",
        ".mov",
        in_browsers=False,
    ),
    FormatEntry("vp9", f"{_FORMATS}.vp9:VP9", "webm for web pages", ".webm"),
    FormatEntry("av1", f"{_FORMATS}.av1:AV1", "webm, the smallest; slow to write", ".webm"),
    FormatEntry("gif", f"{_FORMATS}.gif:GIF", "a palette for each frame", ".gif", holds="any"),
    FormatEntry("webp", f"{_FORMATS}.webp:WebP", "moving image", ".webp", holds="any"),
    FormatEntry(
        "png",
        f"{_FORMATS}.png:PNG",
        "every pixel as it is; a folder of them for a video",
        ".png",
        has_quality=False,
        holds="folder",
    ),
    FormatEntry(
        "latents",
        f"{_FORMATS}.latents:Latents",
        "what the transformer made, to be decoded later",
        ".safetensors",
        has_quality=False,
        decodes=False,
        holds="any",
        in_browsers=False,
    ),
)


def format_entry(name: str) -> FormatEntry:
    """Return the line of a format.

    Raises:
        ConfigError: no such format.
    """
    return cast("FormatEntry", SAMPLE_FORMATS[name])


def formats_of_suffix(suffix: str) -> tuple[str, ...]:
    """Return the formats whose files end so, the usual one first."""
    return tuple(
        entry.name
        for entry in SAMPLE_FORMATS
        if cast("FormatEntry", entry).suffix == suffix.lower()
    )


def require_in_browsers(entry: FormatEntry) -> None:
    """Refuse a format for a page.

    Raises:
        ConfigError: browsers do not show its files.
    """
    if entry.in_browsers:
        return
    others = (cast("FormatEntry", other) for other in SAMPLE_FORMATS)
    shown = ", ".join(other.name for other in others if other.in_browsers)
    raise ConfigError(
        f"a sheet is a page for browsers, which do not show {entry.name}",
        hint=f"--format one of {shown}; `menma sample` without --vary writes {entry.name}",
    )


def format_rule(sampling: SamplingSection) -> Iterator[Problem]:
    """Yield what is wrong with `sampling.format` and its quality."""
    name = sampling.format
    if name not in SAMPLE_FORMATS:
        of_ending = formats_of_suffix(f".{name.lower().removeprefix('.')}")
        hint = f"{name} is {' or '.join(of_ending)}" if of_ending else ""
        yield Problem(
            f"unknown format {name!r}",
            "sampling.format",
            hint=hint or nearest(name, SAMPLE_FORMATS.names),
        )
    elif sampling.quality is not None and not format_entry(name).has_quality:
        yield Problem(
            f"{name} keeps everything: it has no quality to choose",
            "sampling.quality",
            hint="leave it out, or choose another sampling.format",
        )
    elif sampling.save_latents and name == "latents":
        yield Problem(
            "the latents are the sample already",
            "sampling.save_latents",
            hint="leave it out, or choose a sampling.format to see",
        )
