"""What a dataset is, as plain values: `menma data check`, `menma data stats`, the Data screen.

Made of what `checks.check_dataset` has seen. The keys are a seam: others may come, none is renamed.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import Problem
from trainer.contract.variants import Variant
from trainer.data.buckets import Bucket, num_tokens
from trainer.data.captions import caption_path
from trainer.data.checks import DatasetCheck, LookedClip, LookedSource
from trainer.data.order import Group
from trainer.data.windows import round_down_frames

ENLARGED = 1.5
"""Clips that are enlarged by more than this, on a side, are worth a look."""
OTHER_RATE = 1.05
"""Rates that differ by more than this factor are different."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContext:
    """What the dataset itself does not say."""

    variant: Variant
    token_counts: Mapping[str, int] | None
    """Caption -> tokens of the text encoder, the end mark included; None: there is no tokenizer."""
    caches: Sequence[Mapping[str, Any]]
    """For each source: `folder`, `state`, `detail`, `entries` and `bytes` of its folder."""


def report_of(checked: DatasetCheck, context: ReportContext) -> dict[str, Any]:
    """Return the whole report.

    `sources`, `buckets` (of what is trained on, by most tokens), `clips` (each that was found,
    used or not), `problems`, `notes`, and sums of them in `stats`. Sizes are in pixels, `width`
    before `height`; lengths in frames and seconds; `share` is of one epoch, repeats counted.
    """
    clips = list(_clips(checked, context))
    sources = list(_sources(checked, context))
    buckets = _buckets(checked, context.variant)
    return {
        "variant": context.variant.name,
        "model_fps": context.variant.fps,
        "caption_limit": context.variant.transformer.text_len,
        "counts": {
            "clips": checked.clips,
            "validation_clips": checked.validation_clips,
            "items": sum(row["items"] for row in buckets),
            "validation_items": checked.validation_items,
            "left_out": len(checked.problems),
            "batches_per_epoch": checked.batches_per_epoch,
            "clips_with_warnings": sum(bool(clip["warnings"]) for clip in clips),
        },
        "sources": sources,
        "buckets": buckets,
        "clips": clips,
        "problems": [_problem(problem) for problem in checked.problems],
        "notes": [*checked.notes, *_rate_notes(checked, context.variant)],
        "stats": _stats(clips, buckets, context),
    }


def _clips(checked: DatasetCheck, context: ReportContext) -> Iterator[dict[str, Any]]:
    firsts: dict[str, Path] = {}
    for number, looked in enumerate(checked.sources):
        held = {clip.item.name for clip in looked.validation}
        both = (*looked.training, *looked.validation)
        for clip in sorted(both, key=lambda clip: clip.item.name):
            row = _clip(number, looked.source, clip, context)
            first = firsts.setdefault(clip.content, clip.item.path) if clip.content else None
            if first not in (None, clip.item.path):
                row["copy_of"] = str(first)
                row["warnings"].append(f"has the same content as {first}")
            yield row | {"validation": clip.item.name in held}
        for problem in looked.problems:
            yield _unused(number, looked.source, problem)


def _clip(
    number: int, source: SourceOptions, clip: LookedClip, context: ReportContext
) -> dict[str, Any]:
    info, item = clip.info, clip.item
    scale = max(clip.size[0] / info.width, clip.size[1] / info.height)
    tokens = (context.token_counts or {}).get(item.caption)
    return {
        "source": number,
        "name": item.name,
        "path": str(item.path),
        "used": True,
        "validation": False,
        "width": info.width,
        "height": info.height,
        "num_frames": info.num_frames,
        "fps": _rounded(info.fps),
        "duration_s": _rounded(info.duration_s),
        "constant_rate": info.constant_rate,
        "scale": _rounded(scale),
        "windows": [list(window) for window in clip.windows],
        "buckets": [str(bucket) for bucket in dict.fromkeys(clip.buckets)],
        "caption": item.caption,
        "caption_file": _caption_file(source, item.path),
        "caption_words": len(item.caption.split()),
        "caption_tokens": tokens,
        "copy_of": None,
        "problem": "",
        "hint": "",
        "line": None,
        "warnings": list(_warnings(source, clip, scale, tokens, context.variant)),
    }


def _unused(number: int, source: SourceOptions, problem: Problem) -> dict[str, Any]:
    """Return the row of something that cannot be used; of it nothing else is known."""
    path = problem.file or source.media_path
    is_media = problem.line is None and path != source.media_path
    return {
        "source": number,
        "name": path.name if problem.line is None else f"{path.name}:{problem.line}",
        "path": str(path),
        "used": False,
        "validation": False,
        **dict.fromkeys(("width", "height", "num_frames", "fps", "duration_s", "constant_rate")),
        "scale": None,
        "windows": [],
        "buckets": [],
        "caption": None,
        "caption_file": _caption_file(source, path) if is_media else None,
        "caption_words": None,
        "caption_tokens": None,
        "copy_of": None,
        "problem": problem.message,
        "hint": problem.hint,
        "line": problem.line,
        "warnings": [],
    }


def _warnings(
    source: SourceOptions, clip: LookedClip, scale: float, tokens: int | None, variant: Variant
) -> Iterator[str]:
    yield from clip.damaged
    if tokens is not None and tokens > variant.transformer.text_len:
        yield (
            f"its caption has {tokens} tokens, the model reads {variant.transformer.text_len}: "
            "the end is cut off"
        )
    if clip.info.constant_rate is False:
        how = "its own time stamps count" if source.source_fps else "its frames are taken as even"
        yield f"its frame rate varies; {how}"
    if source.kind == "video" and source.frame_extraction != "full":
        given = {window.num_frames for window in clip.windows}
        for target in sorted({round_down_frames(frames) for frames in source.target_frames}):
            if target not in given and target > clip.info.num_frames:
                yield f"has {clip.info.num_frames} frames: too short for target_frames {target}"
    if scale > ENLARGED:
        yield f"is enlarged {scale:.1f} times, from {clip.info.width}x{clip.info.height}"


def _sources(checked: DatasetCheck, context: ReportContext) -> Iterator[dict[str, Any]]:
    appearances = [
        sum(len(clip.windows) for clip in looked.training) * looked.source.num_repeats
        for looked in checked.sources
    ]
    total = sum(appearances) or 1
    for number, looked in enumerate(checked.sources):
        source, clips = looked.source, (*looked.training, *looked.validation)
        yield {
            "number": number,
            "media": str(source.media_path),
            "kind": source.kind,
            "clips": len(looked.training),
            "validation_clips": len(looked.validation),
            "left_out": len(looked.problems),
            "items": sum(len(clip.windows) for clip in looked.training),
            "num_repeats": source.num_repeats,
            "batch_size": source.batch_size,
            "items_per_epoch": appearances[number],
            "share": _rounded(appearances[number] / total, 6),
            "duration_s": _rounded(sum(clip.info.duration_s or 0 for clip in clips)),
            "cache": dict(context.caches[number]),
        }


def _buckets(checked: DatasetCheck, variant: Variant) -> list[dict[str, Any]]:
    items: Counter[Bucket] = Counter()
    groups: defaultdict[Bucket, list[Group]] = defaultdict(list)
    for looked in checked.sources:
        own = Counter(bucket for clip in looked.training for bucket in clip.buckets)
        items += own
        for bucket, count in own.items():
            repeats = looked.source.num_repeats
            groups[bucket].append(Group(count * repeats, repeats, looked.source.batch_size))
    total = sum(group.appearances for of in groups.values() for group in of) or 1
    rows = [
        _bucket(bucket, count, groups[bucket], total, variant) for bucket, count in items.items()
    ]
    return sorted(rows, key=lambda row: (-row["tokens"], row["width"], row["height"]))


def _bucket(
    bucket: Bucket, items: int, groups: Sequence[Group], total: int, variant: Variant
) -> dict[str, Any]:
    appearances = sum(group.appearances for group in groups)
    return {
        "bucket": str(bucket),
        **bucket._asdict(),
        "items": items,
        "items_per_epoch": appearances,
        "share": _rounded(appearances / total, 6),
        "batches": sum(group.num_batches() for group in groups),
        "smaller_batches": sum(group.appearances % group.batch_size > 0 for group in groups),
        "tokens": num_tokens(bucket, variant.vae_stride, variant.transformer.patch_size),
    }


def _rate_notes(checked: DatasetCheck, variant: Variant) -> Iterator[str]:
    for looked in checked.sources:
        rates = [rate for clip in _all(looked) if (rate := clip.info.fps)]
        other = [rate for rate in rates if max(rate / variant.fps, variant.fps / rate) > OTHER_RATE]
        if looked.source.source_fps is None and other:
            yield (
                f"{looked.source.media_path}: {len(other)} of {len(rates)} clips run at "
                f"{_range(other)} frames a second, {variant.name} at {variant.fps:g}; without "
                "source_fps they are not resampled, and motion comes out at another speed"
            )


def _stats(
    clips: Sequence[Mapping[str, Any]], buckets: Sequence[Mapping[str, Any]], context: ReportContext
) -> dict[str, Any]:
    used = [clip for clip in clips if clip["used"]]
    captions = Counter(clip["caption"] for clip in used)
    tokens = [clip["caption_tokens"] for clip in used if clip["caption_tokens"] is not None]
    limit = context.variant.transformer.text_len
    rates = Counter(f"{clip['fps']:.5g}" for clip in used if clip["fps"])
    sizes = Counter(f"{clip['width']}x{clip['height']}" for clip in used)
    per_item = [row["tokens"] for row in buckets for _ in range(row["items_per_epoch"])]
    return {
        "num_frames": _spread([clip["num_frames"] for clip in used]),
        "duration_s": _spread([clip["duration_s"] for clip in used if clip["duration_s"]]),
        "resolutions": _ranked(sizes),
        "fps": _ranked(rates),
        "varying_rate": sum(clip["constant_rate"] is False for clip in used),
        "enlarged": sum(clip["scale"] > 1 for clip in used),
        "copies": sum(clip["copy_of"] is not None for clip in used),
        "captions": {
            "distinct": len(captions),
            "words": _spread([clip["caption_words"] for clip in used]),
            "tokens": _spread(tokens),
            "limit": limit,
            "too_long": sum(count > limit for count in tokens),
        },
        "tokens": _spread(per_item),
        "cache_bytes": sum({cache["folder"]: cache["bytes"] for cache in context.caches}.values()),
    }


def _all(looked: LookedSource) -> tuple[LookedClip, ...]:
    return (*looked.training, *looked.validation)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return least, median, most and sum; None of nothing."""
    if not values:
        return None
    median = statistics.median(values)
    found = {"min": min(values), "median": median, "max": max(values), "sum": sum(values)}
    return {name: round(value, 3) for name, value in found.items()}


def _ranked(counts: Counter[str]) -> list[dict[str, Any]]:
    return [{"value": value, "clips": count} for value, count in counts.most_common()]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def _caption_file(source: SourceOptions, path: Path) -> str | None:
    """Return where a clip's caption is, or is looked for; None: in the line of a list."""
    return (
        None if source.jsonl_file is not None else str(caption_path(path, source.caption_extension))
    )


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "message": problem.message,
        "file": None if problem.file is None else str(problem.file),
        "line": problem.line,
        "hint": problem.hint,
    }
