"""What `menma check` says about a dataset: everything that is wrong, and what it will become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from trainer.contract.dataset_config import DatasetConfig, SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.contract.variants import Variant
from trainer.data.buckets import Bucket, num_tokens
from trainer.data.cache_index import known_identities
from trainer.data.fingerprint import FileIdentity, identify
from trainer.data.holdout import Holdout
from trainer.data.masks import no_alpha
from trainer.data.media import Clip, ClipInfo, index_clip, probe, try_frames
from trainer.data.order import Group
from trainer.data.paired import common_frames
from trainer.data.plan import in_threads, length_notes, plan_windows
from trainer.data.sources import MediaItem, scan_source
from trainer.data.windows import Window, takes_turns

Depth = Literal["headers", "packets", "frames"]
"""How closely clips are looked at: as little as their container allows, every packet (which tells
whether the rate is constant), or every frame of their windows decoded as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedClip:
    """One clip that can be used."""

    item: MediaItem
    info: ClipInfo
    size: tuple[int, int]
    """(width, height) that it is brought to."""
    windows: tuple[Window, ...]
    damaged: tuple[str, ...] = ()
    """Windows that cannot be decoded, and why."""
    content: str = ""
    """Hash of it; empty where nobody asks."""
    has_mask: bool = False

    @property
    def buckets(self) -> list[Bucket]:
        """Return the bucket of each window."""
        return [Bucket(*self.size, window.num_frames) for window in self.windows]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedSource:
    """One source after all its clips were looked at."""

    source: SourceOptions
    training: tuple[LookedClip, ...] = ()
    """In the order of the source."""
    validation: tuple[LookedClip, ...] = ()
    """Those that are held out, or all of a source that is for validation."""
    problems: tuple[Problem, ...] = ()
    """What cannot be used."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSummary:
    """One row of the bucket table."""

    bucket: Bucket
    items: int
    """Windows, without repeats."""
    tokens: int
    """Tokens of one item in the transformer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetCheck:
    """The outcome of a check."""

    clips: int
    """Clips that can be trained on."""
    buckets: tuple[BucketSummary, ...]
    """Largest number of tokens first."""
    batches_per_epoch: int
    """Microbatches of one epoch over all ranks, repeats counted."""
    problems: tuple[Problem, ...]
    """Clips and captions that cannot be used, and folders that are not there."""
    notes: tuple[str, ...]
    """What is no fault and yet worth knowing."""
    validation_clips: int = 0
    """Clips to validate on, ..."""
    validation_items: int = 0
    """... and their windows."""
    groups: tuple[Group, ...] = ()
    """What microbatches are made of: the training items of each source and bucket."""
    shared_clips: int = 0
    """Clips of the validation sources that are training clips, too."""
    masked_clips: int = 0
    """Training clips with a mask."""
    sources: tuple[LookedSource, ...] = ()
    """What was found in each."""


def check_dataset(
    dataset: DatasetConfig,
    variant: Variant,
    *,
    holdout: Holdout | None = None,
    num_threads: int = 4,
    depth: Depth = "headers",
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> DatasetCheck:
    """Look at every clip, several at once, without decoding more than their first frames.

    A clip that is damaged further on is found when it is cached, or at depth `frames`. With a
    `holdout`, or deeper than `headers`, those that are not cached yet are read whole to know their
    content.

    Args:
        dataset: the sources.
        variant: the model that shall be trained.
        holdout: which clips are for validation; None: none.
        num_threads: clips that are looked at at once.
        depth: how closely.
        report: told of each clip: how many are done, of how many in this source, its name.
    """
    by_content = holdout is not None or depth != "headers"
    look = partial(_look_at, variant=variant, depth=depth, by_content=by_content)
    looked = [_look(source, variant, look, num_threads, report) for source in dataset.sources]
    looked = _parted(looked, holdout)
    training = [clip for source in looked for clip in source.training]
    validation = [clip for source in looked for clip in source.validation]
    windows = [
        Counter(bucket for clip in source.training for bucket in clip.buckets) for source in looked
    ]
    rows = [
        BucketSummary(
            bucket=bucket,
            items=count,
            tokens=num_tokens(bucket, variant.vae_stride, variant.transformer.patch_size),
        )
        for bucket, count in sum(windows, Counter[Bucket]()).items()
    ]
    groups = tuple(
        Group(count * options.num_repeats, options.num_repeats, options.batch_size)
        for options, source in zip(dataset.sources, looked, strict=True)
        for count in _slots(source).values()
    )
    return DatasetCheck(
        clips=len(training),
        buckets=tuple(sorted(rows, key=lambda row: (-row.tokens, row.bucket))),
        batches_per_epoch=sum(group.num_batches() for group in groups),
        groups=groups,
        problems=tuple(problem for source in looked for problem in source.problems),
        notes=tuple(note for source in looked for note in source.notes),
        masked_clips=sum(clip.has_mask for clip in training),
        validation_clips=len(validation),
        validation_items=sum(len(clip.buckets) for clip in validation),
        shared_clips=len(
            {clip.content for clip in validation if clip.content}
            & {clip.content for clip in training}
        ),
        sources=tuple(looked),
    )


def _slots(source: LookedSource) -> Counter[Bucket]:
    """Count what an epoch shows of each bucket: windows that take turns count as one."""
    once = takes_turns(source.source)
    return Counter(
        bucket
        for clip in source.training
        for bucket in (set(clip.buckets) if once else clip.buckets)
    )


def _parted(looked: Sequence[LookedSource], holdout: Holdout | None) -> list[LookedSource]:
    """Move the clips that are for validation to where they belong."""
    if holdout is None:
        return list(looked)
    shared = looked[: holdout.first_source]
    held = holdout.clips(clip.content for source in shared for clip in source.training)

    def part(number: int, source: LookedSource) -> LookedSource:
        own = number >= holdout.first_source
        clips = source.training
        return replace(
            source,
            training=tuple(clip for clip in clips if not own and clip.content not in held),
            validation=tuple(clip for clip in clips if own or clip.content in held),
        )

    return [part(number, source) for number, source in enumerate(looked)]


class _Look(Protocol):
    """Looks at one clip: `_look_at` with what is the same for all."""

    def __call__(
        self, item: MediaItem, source: SourceOptions, known: FileIdentity | None
    ) -> LookedClip: ...


def _look(
    source: SourceOptions,
    variant: Variant,
    look_at: _Look,
    num_threads: int,
    report: Callable[[int, int, str], None],
) -> LookedSource:
    """Look at a source; all clips count as training clips so far."""
    scan = scan_source(source)
    known = known_identities(source)

    def look(item: MediaItem) -> LookedClip | Problem:
        try:
            return look_at(item, source, known.get(item.name))
        except DataError as error:
            return Problem(error.message, file=item.path, hint=error.hint)

    found: list[LookedClip | Problem] = []
    for item, result in in_threads(look, scan.items, num_threads):
        found.append(result)
        report(len(found), len(scan.items), item.name)
    good = tuple(clip for clip in found if isinstance(clip, LookedClip))
    lengths = [{bucket.num_frames for bucket in clip.buckets} for clip in good]
    return LookedSource(
        source=source,
        training=good,
        problems=(*scan.problems, *(p for p in found if isinstance(p, Problem))),
        notes=(
            *_size_notes(source, variant),
            *_rate_notes(source, good),
            *length_notes(source, lengths),
        ),
    )


def _look_at(
    item: MediaItem,
    source: SourceOptions,
    known: FileIdentity | None,
    *,
    variant: Variant,
    depth: Depth,
    by_content: bool,
) -> LookedClip:
    fps, clip = source.source_fps, None
    if fps is None and depth == "headers":
        info = probe(item.path, item.kind)
    else:  # the number of frames after resampling depends on every time stamp
        clip = index_clip(item.path, item.kind, target_fps=variant.fps, source_fps=fps)
        info = clip.info
    if source.alpha_mask and item.kind == "video" and item.path.is_file():
        raise no_alpha()
    num_frames = common_frames(
        item, clip or info, source, conditioning=variant.conditioning, target_fps=variant.fps
    )
    size, windows = plan_windows(
        num_frames, info.width, info.height, source, variant.pixel_multiple
    )
    damaged: dict[Window, str] = {}
    if clip is not None and depth == "frames":
        damaged = {w: why for w in windows if (why := _damage(clip, w))}
        if len(damaged) == len(windows):
            raise DataError(next(iter(damaged.values())))
    return LookedClip(
        item=item,
        info=info,
        size=size,
        windows=tuple(window for window in windows if window not in damaged),
        damaged=tuple(damaged.values()),
        content=identify(item.path, known).content if by_content else "",
        has_mask=item.mask is not None or source.alpha_mask,
    )


def _damage(clip: Clip, window: Window) -> str:
    try:
        try_frames(clip, window.frames)
    except DataError as error:
        return f"its frames {window.start} to {window.frames[-1]} cannot be read: {error.message}"
    return ""


def _rate_notes(source: SourceOptions, clips: Sequence[LookedClip]) -> list[str]:
    fps = source.source_fps
    if fps is None or fps == "auto":
        return []
    rates = [clip.info.fps for clip in clips if clip.info.constant_rate]
    other = [rate for rate in rates if rate and abs(rate / fps - 1) > 0.05]
    if not other:
        return []
    return [
        f"{source.media_path}: source_fps is {fps:g}, but {len(other)} of {len(clips)} clips say "
        f"{min(other):g} to {max(other):g}; they are taken to run at source_fps"
    ]


def _size_notes(source: SourceOptions, variant: Variant) -> list[str]:
    step = variant.pixel_multiple
    width, height = (side // step * step for side in source.resolution)
    if source.enable_bucket or (width, height) == source.resolution:
        return []
    return [
        f"{source.media_path}: resolution {source.resolution[0]}x{source.resolution[1]} becomes "
        f"{width}x{height}: sides are multiples of {step} for {variant.name}"
    ]
