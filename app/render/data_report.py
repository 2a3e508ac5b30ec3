"""The report of a dataset (`trainer.data.report`) as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.runs.durations import duration

Report = Mapping[str, Any]
BUCKETS = ("BUCKET", "ITEMS", "EPOCH", "SHARE", "BATCHES", "SMALLER", "TOKENS")
SOURCES = ("SOURCE", "CLIPS", "UNUSED", "ITEMS", "REPEATS", "SHARE", "CACHE", "FOLDER")


def bucket_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield the table of buckets; `SMALLER` are batches that are not full."""
    for row in report["buckets"]:
        yield (
            row["bucket"],
            f"{row['items']:,}",
            f"{row['items_per_epoch']:,}",
            f"{row['share']:.1%}",
            f"{row['batches']:,}",
            f"{row['smaller_batches']:,}",
            f"{row['tokens']:,}",
        )


def source_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield the table of sources."""
    for row in report["sources"]:
        validation = f" +{row['validation_clips']} val" if row["validation_clips"] else ""
        yield (
            str(row["number"]),
            f"{row['clips']:,}{validation}",
            f"{row['left_out']:,}",
            f"{row['items']:,}",
            str(row["num_repeats"]),
            f"{row['share']:.1%}",
            cache_words(row["cache"]),
            row["media"],
        )


def cache_words(cache: Mapping[str, Any]) -> str:
    """Say what the cache of a source is."""
    size = f", {size_words(cache['bytes'])}" if cache["bytes"] else ""
    return f"{cache['state']}{size}"


def summary(report: Report) -> str:
    """Say on one line what there is."""
    counts = report["counts"]
    words = [
        f"{counts['clips']:,} clips, {counts['items']:,} items, "
        f"{counts['batches_per_epoch']:,} batches an epoch"
    ]
    if counts["validation_clips"]:
        words.append(f"{counts['validation_clips']:,} for validation")
    words.append(f"{counts['left_out']:,} left out")
    if counts["clips_with_warnings"]:
        words.append(f"{counts['clips_with_warnings']:,} with warnings")
    return ", ".join(words)


def stats_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield figures of the dataset: what, and how it is spread."""
    stats, captions = report["stats"], report["stats"]["captions"]
    yield "clips", summary(report)
    yield "resolutions", _ranked(stats["resolutions"])
    if stats["fps"]:
        varying = f"; {stats['varying_rate']:,} vary" if stats["varying_rate"] else ""
        yield (
            "frames a second",
            f"{_ranked(stats['fps'])}{varying} (model: {report['model_fps']:g})",
        )
    if stats["num_frames"]:
        yield "frames", _spread(stats["num_frames"])
    if length := stats["duration_s"]:
        yield "seconds", f"{_spread(length)}, {duration(length['sum'])} together"
    if captions["words"]:
        yield "caption words", f"{_spread(captions['words'])}; {captions['distinct']:,} different"
    if captions["tokens"]:
        yield (
            "caption tokens",
            f"{_spread(captions['tokens'])}; {captions['too_long']:,} above {captions['limit']}",
        )
    if stats["tokens"]:
        yield "tokens an item", f"{_spread(stats['tokens'])}; {stats['tokens']['sum']:,} an epoch"
    yield "enlarged", f"{stats['enlarged']:,} clips"
    yield "copies", f"{stats['copies']:,} clips with the content of another"
    yield "caches", size_words(stats["cache_bytes"])


def size_words(num_bytes: int) -> str:
    """Write a size as people read it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"


def _spread(values: Mapping[str, float]) -> str:
    low, middle, high = (f"{values[name]:,.6g}" for name in ("min", "median", "max"))
    return low if low == high else f"{low} to {high}, median {middle}"


def _ranked(values: list[Mapping[str, Any]], shown: int = 6) -> str:
    words = [f"{row['value']} ({row['clips']:,})" for row in values[:shown]]
    more = len(values) - shown
    return ", ".join([*words, f"{more} more"] if more > 0 else words) or "none"
