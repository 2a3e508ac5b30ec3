"""A report of a dataset as the trainer writes it, for screens that show one."""

from __future__ import annotations

from pathlib import Path

from app.domain.data_report import DataReport, parse_report

NOTE = "clips: 2 of 3 clips run at 24 frames a second"


def clip(name: str, **fields) -> dict:
    """Return one clip of a report, without a fault."""
    return {
        "source": 0, "name": name, "path": f"clips/{name}", "used": True, "validation": False,
        "width": 832, "height": 480, "num_frames": 81, "fps": 24.0, "duration_s": 3.375,
        "buckets": ["832x480x33"], "caption": f"a fish called {name}",
        "caption_file": f"clips/{Path(name).stem}.txt", "caption_tokens": 9, "problem": "",
        "hint": "", "warnings": [],
    } | fields  # fmt: skip


def report(*clips: dict) -> DataReport:
    """Return a report of these clips."""
    unknown = dict.fromkeys(("width", "height", "num_frames", "fps", "duration_s", "caption"))
    unknown |= {"used": False, "buckets": [], "caption_tokens": None}
    clips = clips or (
        clip("good.mp4"),
        clip("long.mp4", warnings=["its caption has 600 tokens, the model reads 512"]),
        clip("none.mp4", problem="has no caption: there is no none.txt", **unknown),
        clip("held.mp4", validation=True, buckets=["832x480x33", "832x480x17"]),
    )
    cache = {"folder": "clips/menma_cache", "state": "out of date", "detail": "", "bytes": 2**30}
    source = {
        "number": 0, "media": "clips", "clips": 2, "validation_clips": 1, "left_out": 1,
        "items": 3, "num_repeats": 2, "share": 1.0, "cache": cache,
    }  # fmt: skip
    bucket = {
        "bucket": "832x480x33", "items": 3, "items_per_epoch": 6, "share": 1.0, "batches": 6,
        "smaller_batches": 0, "tokens": 14040,
    }  # fmt: skip
    counts = {
        "clips": 2, "validation_clips": 1, "items": 3, "batches_per_epoch": 6, "left_out": 1,
        "clips_with_warnings": 1,
    }  # fmt: skip
    return parse_report(
        {
            "clips": clips,
            "sources": [source],
            "buckets": [bucket],
            "counts": counts,
            "notes": [NOTE],
        }
    )
