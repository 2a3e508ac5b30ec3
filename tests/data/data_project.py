"""A folder of clips with everything that can be wrong with them, and a config of it."""

from __future__ import annotations

from pathlib import Path

from data_clips import write_caption, write_images, write_video

CONFIG = """\
name = "tiny"

[model]
variant = "wan2.1-t2v-1.3b"

[dataset.general]
resolution = [128, 64]
enable_bucket = true

[[dataset.sources]]
video_directory = "clips"
target_frames = [5, 25]
num_repeats = 2
batch_size = 4

[memory]
cache_dtype = "fp32"
"""
VARYING_MS = [0, 10, 50, 60, 90, *range(100, 600, 33)]
MANY_KEYS = {"preset": "ultrafast", "crf": "18", "g": "5"}


def write_project(folder: Path) -> Path:
    """Write the clips and the config; return the config.

    Usable are `long` (40 frames), `copy` (the same), `varying` and `walk`; `bad`, `none` (no
    caption) and `short` are not.
    """
    clips = folder / "clips"
    write_video(clips / "long.mp4", 40, options=MANY_KEYS)
    (clips / "copy.mp4").write_bytes((clips / "long.mp4").read_bytes())
    write_video(clips / "varying.mp4", len(VARYING_MS), times_ms=VARYING_MS)
    write_images(clips / "walk", 9)
    write_video(clips / "none.mp4", 9)
    (clips / "bad.mp4").write_bytes(b"no video" * 99)
    write_video(clips / "short.mp4", 3)
    captions = {"long.mp4": "a red fish " * 300, "copy.mp4": "a fish", "varying.mp4": "it varies"}
    captions |= {"walk": "a walk", "bad.mp4": "bad", "short.mp4": "short"}
    for name, caption in captions.items():
        write_caption(clips / name, caption)
    config = folder / "tiny.toml"
    config.write_text(CONFIG)
    return config
