"""What `menma check` says about a dataset: everything that is wrong, and what it will become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.contract.dataset_config import DatasetConfig, SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.contract.variants import Variant
from trainer.data.buckets import Bucket, num_tokens
from trainer.data.cache_index import known_identities
from trainer.data.fingerprint import identify
from trainer.data.holdout import Holdout
from trainer.data.masks import no_alpha
from trainer.data.media import Clip, ClipInfo, index_clip, probe
from trainer.data.order import Group
from trainer.data.paired import common_frames
from trainer.data.plan import in_threads, length_notes, plan_windows
from trainer.data.sources import MediaItem, scan_source
from trainer.data.windows import takes_turns


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


@dataclass(frozen=True, slots=True)
class _Looked:
    """One source after all its clips were looked at."""

    clips: list[_Clip]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Clip:
    """One clip that can be used."""

    buckets: list[Bucket]
    file_fps: float | None
    content: str
    """Hash of it; empty where nobody asks."""
    has_mask: bool = False


def check_dataset(
    dataset: DatasetConfig,
    variant: Variant,
    *,
    holdout: Holdout | None = None,
    num_threads: int = 4,
) -> DatasetCheck:
    """Look at every clip, several at once, without decoding more than their first frames.

    A clip that is damaged further on is found when it is cached. With a `holdout` those that are
    not cached yet are read whole, since it goes by their content.
    """
    looked = [
        _look(source, variant, num_threads, by_content=holdout is not None)
        for source in dataset.sources
    ]
    training, validation = _parted(looked, holdout)
    windows = [Counter(bucket for clip in clips for bucket in clip.buckets) for clips in training]
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
        for options, clips in zip(dataset.sources, training, strict=True)
        for count in _slots(options, clips).values()
    )
    return DatasetCheck(
        clips=sum(len(clips) for clips in training),
        buckets=tuple(sorted(rows, key=lambda row: (-row.tokens, row.bucket))),
        batches_per_epoch=sum(group.num_batches() for group in groups),
        groups=groups,
        problems=tuple(problem for source in looked for problem in source.problems),
        notes=tuple(note for source in looked for note in source.notes),
        masked_clips=sum(clip.has_mask for clips in training for clip in clips),
        validation_clips=len(validation),
        validation_items=sum(len(clip.buckets) for clip in validation),
        shared_clips=len(
            {clip.content for clip in validation}
            & {clip.content for clips in training for clip in clips}
        ),
    )


def _slots(source: SourceOptions, clips: Sequence[_Clip]) -> Counter[Bucket]:
    """Count what an epoch shows of each bucket: windows that take turns count as one."""
    once = takes_turns(source)
    return Counter(
        bucket for clip in clips for bucket in (set(clip.buckets) if once else clip.buckets)
    )


def _parted(
    looked: Sequence[_Looked], holdout: Holdout | None
) -> tuple[list[list[_Clip]], list[_Clip]]:
    """Return the clips of each source to train on, and those of all sources to validate on."""
    if holdout is None:
        return [source.clips for source in looked], []
    own = [clip for source in looked[holdout.first_source :] for clip in source.clips]
    shared = [source.clips for source in looked[: holdout.first_source]]
    held = holdout.clips(clip.content for clips in shared for clip in clips)
    training = [[clip for clip in clips if clip.content not in held] for clips in shared]
    validation = [clip for clips in shared for clip in clips if clip.content in held]
    return training + [[] for _ in looked[holdout.first_source :]], validation + own


def _look(
    source: SourceOptions, variant: Variant, num_threads: int, *, by_content: bool
) -> _Looked:
    """Look at a source and, if told to, at the content of its clips."""
    scan = scan_source(source)
    known = known_identities(source) if by_content else {}

    def look(item: MediaItem) -> _Clip | Problem:
        try:
            clip = _look_at(item, source, variant)
            if not by_content:
                return clip
            identity = identify(item.path, known.get(item.name))
            return replace(clip, content=identity.content)
        except DataError as error:
            return Problem(error.message, file=item.path, hint=error.hint)

    found = [result for _, result in in_threads(look, scan.items, num_threads)]
    good = [clip for clip in found if not isinstance(clip, Problem)]
    lengths = [{bucket.num_frames for bucket in clip.buckets} for clip in good]
    return _Looked(
        clips=good,
        problems=(*scan.problems, *(p for p in found if isinstance(p, Problem))),
        notes=(
            *_size_notes(source, variant),
            *_rate_notes(source, good),
            *length_notes(source, lengths),
        ),
    )


def _look_at(item: MediaItem, source: SourceOptions, variant: Variant) -> _Clip:
    fps, file_fps = source.source_fps, None
    seen: ClipInfo | Clip
    if fps is None:
        seen = probe(item.path, item.kind)
    else:  # the number of frames depends on every time stamp
        seen = index_clip(item.path, item.kind, target_fps=variant.fps, source_fps=fps)
        file_fps = seen.file_fps
    if source.alpha_mask and item.kind == "video" and item.path.is_file():
        raise no_alpha()
    num_frames = common_frames(
        item, seen, source, conditioning=variant.conditioning, target_fps=variant.fps
    )
    size, windows = plan_windows(
        num_frames, seen.width, seen.height, source, variant.pixel_multiple
    )
    buckets = [Bucket(*size, window.num_frames) for window in windows]
    return _Clip(buckets, file_fps, content="", has_mask=item.mask is not None or source.alpha_mask)


def _rate_notes(source: SourceOptions, clips: Sequence[_Clip]) -> list[str]:
    fps = source.source_fps
    if fps is None:
        return []
    other = [c.file_fps for c in clips if c.file_fps and abs(c.file_fps / fps - 1) > 0.05]
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
