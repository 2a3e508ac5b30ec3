"""Scenes as clips with captions, as a user's folder has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.clipart.scenes import Scene, draw
from trainer.contract.files import write_text
from trainer.nano.quality import FPS
from trainer.sampling.video_io import write_video


def write_scenes(scenes: Sequence[Scene], folder: Path) -> list[Path]:
    """Write each scene as `<number>.mp4` with its caption beside it; return the clips."""
    clips = []
    for index, scene in enumerate(scenes):
        clip = folder / f"{index:02}.mp4"
        write_video(clip, list(draw(scene)), FPS, crf=8)
        write_text(clip.with_suffix(".txt"), scene.caption + "\n")
        clips.append(clip)
    return clips
