"""Names and writes finished samples; nothing is ever overwritten."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import Frame, write_frames, write_png, write_video

MAX_PROMPT = 4_000
"""Characters of a prompt that an event has; the whole one is in the file's metadata."""


@dataclass(frozen=True, slots=True)
class FinishedSample:
    """A sample's file, and what it shows."""

    path: Path
    prompt: str
    seed: int

    def fields(self) -> dict[str, Any]:
        """Return what an event says of it."""
        return {"path": str(self.path), "prompt": self.prompt[:MAX_PROMPT], "seed": self.seed}


OutputKind = Literal["video", "frames"]
"""`video`: mp4, or PNG for one frame. `frames`: a folder of PNGs."""


def write_sample(
    folder: Path,
    name: str,
    request: SampleRequest,
    frames: Iterable[Frame],
    *,
    metadata: Mapping[str, Any] | None = None,
    kind: OutputKind = "video",
) -> Path:
    """Write one sample as `<name>_<seed>` into `folder`; return its path.

    Args:
        folder: made if it is not there.
        name: beginning of the file's name; characters that file systems refuse are replaced.
        request: goes into the file's metadata.
        frames: uint8 (H, W, 3), consumed as they come.
        metadata: what else goes in, such as the variant and the LoRAs.
        kind: what to write.

    Raises:
        DiskError: disk full or read-only; nothing is left of this sample.
    """
    described = describe(request) | dict(metadata or {})
    safe_name = re.sub(r"[^\w.+-]+", "_", name)
    stem = f"{safe_name}_{request.seed}"
    if kind == "frames":
        path = free_path(folder / stem)
        write_frames(path, frames, described)
    elif request.num_frames == 1:
        path = free_path(folder / f"{stem}.png")
        write_png(path, next(iter(frames)), described)
    else:
        path = free_path(folder / f"{stem}.mp4")
        write_video(path, frames, request.fps, described)
    return path


def describe(request: SampleRequest) -> dict[str, Any]:
    """Return what is needed to make the sample again, as plain JSON values."""
    fields = {key: value for key, value in asdict(request).items() if value is not None}
    fields["guidance_scale"] = list(request.guidance_scale)
    # What says nothing new is left out: it would drown the rest.
    fields |= fields.pop("denoising").model_dump(mode="json", exclude_defaults=True)
    return {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}


def free_path(path: Path) -> Path:
    """Return `path`, or the first of `<stem>_2`, `<stem>_3`, … that does not exist."""
    if not path.exists():
        return path
    candidates = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(2))
    return next(candidate for candidate in candidates if not candidate.exists())
