"""The dataset's TOML: musubi-tuner's schema, checked.

    [general]                 # keys that hold for every source that does not set them itself
    [[datasets]]              # one source: a folder or a JSONL file of images or of videos

The same keys may stand in Menma's config as `[dataset.general]` and `[[dataset.sources]]`. A value
is looked up in the source, then in `general`, then here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trainer.contract.caption_options import CaptionOptions
from trainer.contract.dataset_problems import (
    explain_key,
    problems_of,
    sentence,
    with_explanations,
)
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.options import Options
from trainer.contract.toml_lines import key_lines, locate

FrameExtraction = Literal[
    "head",
    "chunk",
    "slide",
    "uniform",
    "full",
    "middle",
    "overlapping",
    "adaptive",
    "random",
]
SourceFps = float | Literal["auto"]
MediaKind = Literal["image", "video"]

CACHE_FOLDER = "menma_cache"
"""Name of the cache folder that is made inside a media folder when none is given."""

MEDIA_KEYS = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")
VIDEO_KEYS = (
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "frame_overlap",
    "max_frames",
    "source_fps",
)


def _both_sides(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Side = Annotated[int, Field(ge=16, le=16384)]
Frames = Annotated[int, Field(ge=1, le=100_000)]


class SharedOptions(CaptionOptions):
    """Keys that may stand in `general` and in a source."""

    resolution: Annotated[tuple[Side, Side], BeforeValidator(_both_sides)] = (960, 544)
    """Width and height in pixels; one number is a square. With buckets: the area to keep."""
    batch_size: int = Field(default=1, ge=1)
    """Items of one microbatch."""
    num_repeats: int = Field(default=1, ge=1)
    """How often each item is seen in one epoch."""
    enable_bucket: bool = False
    """Keep the items' aspect ratios: buckets of about the area of `resolution`."""
    bucket_no_upscale: bool = False
    """With buckets: never enlarge; an item of no more than the area keeps its own size."""


class GeneralOptions(SharedOptions):
    """`[general]`: values for all sources, and how strict to be."""

    strict: bool = False
    """Stop before anything is encoded when any clip or caption cannot be used."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain_keys(
        cls, values: Any, handler: ModelWrapValidatorHandler[GeneralOptions]
    ) -> GeneralOptions:
        def explain(key: str) -> str | None:
            if key in SourceOptions.model_fields and key not in SharedOptions.model_fields:
                return f"{key} belongs to a source, not to general"
            return explain_key(key)

        return with_explanations(cls, values, handler, explain)


class SourceOptions(SharedOptions):
    """`[[datasets]]`: one folder or list of images or videos."""

    image_directory: Path | None = None
    """Folder of images."""
    image_jsonl_file: Path | None = None
    """One JSON object a line: `image_path`, `caption`."""
    video_directory: Path | None = None
    """Folder of videos; a sub-folder of images is a video, too."""
    video_jsonl_file: Path | None = None
    """One JSON object a line: `video_path`, `caption`."""
    cache_directory: Path | None = None
    """Where encoded items go; empty: `menma_cache` in the media folder. JSONL sources need it."""
    target_frames: tuple[Frames, ...] = Field(default=(1,), min_length=1)
    """Lengths of the windows cut from a video, each rounded down to 4n + 1."""
    frame_extraction: FrameExtraction = "head"
    """Which windows: `head` the first; `middle` the one in the middle; `chunk` one after another;
    `slide` every `frame_stride` frames; `overlapping` as few as cover the clip; `uniform`
    `frame_sample` evenly spread; `random` the same, of which every epoch takes one; `adaptive` the
    longest up to the largest of `target_frames`; `full` the whole clip up to `max_frames`."""
    frame_stride: int = Field(default=1, ge=1)
    """Frames from one window of `slide` to the next."""
    frame_sample: int = Field(default=1, ge=1)
    """Number of windows of `uniform` (1 takes the first window) and `random`."""
    frame_overlap: int = Field(default=1, ge=0)
    """Frames that neighbours of `overlapping` share at least."""
    max_frames: int = Field(default=129, ge=1)
    """Longest window of `full`."""
    source_fps: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames a second of the videos. Given, they are resampled to the model's rate; `auto`: each by
    its own time stamps, also where its rate varies. Empty: frames are taken as they come."""
    control_directory: Path | None = None
    """Control videos (of images: control images) for Fun-Control models: for each clip the file, or
    folder of frames, of its name. Cut and resized as the clip."""
    control_first_frame: bool = False
    """Give a Fun-Control model the clip's first frame, too."""
    mask_directory: Path | None = None
    """Masks for the technique `masked_loss`: for each clip the image, video or folder of frames of
    its name, white where it shall be learned. Cut and resized as the clip."""
    alpha_mask: bool = False
    """Take the transparency of images (or of a clip's frames, if they are images) as their mask."""
    loss_weight: float = Field(default=1.0, gt=0)
    """Weight of the source's items in the loss, e.g. below 1 for a regularisation set."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain_keys(
        cls, values: Any, handler: ModelWrapValidatorHandler[SourceOptions]
    ) -> SourceOptions:
        return with_explanations(cls, values, handler, explain_key)

    @field_validator("source_fps", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:  # it has a message for each kind of value that would do
            message = 'should be a number above 0, at most 1000, or "auto"'
            raise PydanticCustomError("choice", message) from None

    @model_validator(mode="after")
    def _one_medium(self) -> SourceOptions:
        check_source(self)
        return self

    @property
    def kind(self) -> MediaKind:
        """What the source holds."""
        return "video" if self.video_directory or self.video_jsonl_file else "image"

    @property
    def jsonl_file(self) -> Path | None:
        """The list of items, if the source is one."""
        return self.image_jsonl_file or self.video_jsonl_file

    @property
    def media_path(self) -> Path:
        """The folder or the JSONL file, whichever the source is."""
        path = self.image_directory or self.video_directory or self.jsonl_file
        assert path is not None, "validated in _one_medium"
        return path

    @property
    def cache_path(self) -> Path:
        """Folder of the cache."""
        return self.cache_directory or self.media_path / CACHE_FOLDER


class DatasetConfig(Options):
    """All sources; every value a source does not set itself is `general`'s."""

    general: GeneralOptions = Field(default_factory=GeneralOptions)
    """Values for all sources."""
    sources: tuple[SourceOptions, ...]
    """Folders and lists of clips."""

    @field_validator("sources", mode="after")
    @classmethod
    def _inherit(
        cls, sources: tuple[SourceOptions, ...], info: ValidationInfo
    ) -> tuple[SourceOptions, ...]:
        if not sources:
            raise PydanticCustomError("no_sources", "the dataset has no sources")
        general = info.data.get("general", GeneralOptions())  # absent when it has errors itself
        shared = general.model_fields_set & set(SharedOptions.model_fields)
        return tuple(
            source.model_copy(
                update={key: getattr(general, key) for key in shared - source.model_fields_set}
            )
            for source in sources
        )

    @classmethod
    def from_mapping(
        cls,
        values: Mapping[str, Any],
        *,
        folder: Path | None = None,
        file: Path | None = None,
        prefix: str = "",
    ) -> DatasetConfig:
        """Check `general` and `datasets` (or `sources`) and return them as a config.

        Args:
            values: parsed TOML.
            folder: relative paths are looked up here, then in the working directory.
            file: named in the problems.
            prefix: put before the problems' keys, e.g. `dataset.`.

        Raises:
            ConfigError: with all problems; keys like `datasets[0].frame_stride`, counted from 0.
        """
        name = "sources" if "sources" in values else "datasets"
        rest = {key: value for key, value in values.items() if key != name}
        try:
            config = cls.model_validate({**rest, "sources": values.get(name, ())})
        except ValidationError as error:
            known = {
                "sources": tuple(SourceOptions.model_fields),
                "general": tuple(GeneralOptions.model_fields),
            }
            raise ConfigError(
                problems=problems_of(error, file=file, prefix=prefix, sources=name, known=known)
            ) from None
        return config if folder is None else config.with_absolute_paths(folder)

    def with_absolute_paths(self, folder: Path) -> DatasetConfig:
        """Return the config with every relative path made absolute.

        A path is looked up in `folder`, then in the working directory as musubi-tuner does; one
        that is in neither is taken to mean `folder`. A cache folder goes where the media are.
        """
        return self.model_copy(
            update={"sources": tuple(_absolute(source, folder) for source in self.sources)}
        )


def check_source(source: SourceOptions) -> None:
    """Refuse keys of a source that exclude each other or do nothing.

    Raises:
        PydanticCustomError: with the first of them.
    """
    given = [key for key in MEDIA_KEYS if getattr(source, key) is not None]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        raise sentence(f"a source needs exactly one of {', '.join(MEDIA_KEYS)}; {found}")
    if given[0].endswith("_jsonl_file") and source.cache_directory is None:
        raise sentence(f"{given[0]} needs a cache_directory")
    fields = type(source).model_fields
    wrong = [key for key in VIDEO_KEYS if getattr(source, key) != fields[key].default]
    if source.kind == "image" and wrong:
        raise sentence(f"{', '.join(wrong)}: only for sources of videos")
    listed = [key for key in ("control_directory", "mask_directory") if getattr(source, key)]
    if source.jsonl_file is not None and listed:
        keys = " and ".join(f"{key.removesuffix('directory')}path" for key in listed)
        raise sentence(f"{', '.join(listed)}: a list has {keys} in its lines instead")
    if source.mask_directory is not None and source.alpha_mask:
        raise sentence("mask_directory and alpha_mask exclude each other")
    _check_windows(source)


def _check_windows(source: SourceOptions) -> None:
    shortest = min((frames - 1) // 4 * 4 + 1 for frames in source.target_frames)
    if source.frame_extraction == "chunk" and shortest < 5:
        raise sentence(
            "frame_extraction 'chunk' with target_frames below 5 would make an item of every "
            "frame; take 'head' or 'uniform' for single frames"
        )
    if source.frame_extraction == "overlapping" and shortest <= source.frame_overlap:
        raise sentence(
            f"frame_overlap {source.frame_overlap} is not below the shortest of target_frames "
            f"({shortest} as 4n + 1)"
        )
    if source.frame_extraction == "random" and source.frame_sample < 2:
        raise sentence(
            "frame_extraction 'random' draws one of frame_sample windows: set frame_sample to 2 "
            "or more"
        )


def parse_dataset(
    values: Mapping[str, Any], *, folder: Path | None = None, prefix: str = ""
) -> DatasetConfig:
    """Return the dataset of `general` and `datasets` (or `sources`) tables given inline.

    Raises:
        ConfigError: with all problems.
    """
    return DatasetConfig.from_mapping(values, folder=folder, prefix=prefix)


def load_dataset_file(path: Path) -> DatasetConfig:
    """Read a dataset TOML; its relative paths become absolute (see `with_absolute_paths`).

    Raises:
        ConfigError: the file cannot be read, is no TOML, or has problems (all of them are in it).
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
        values = tomllib.loads(text)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no TOML
        reason = error.strerror if isinstance(error, OSError) else str(error)
        message = f"the dataset file cannot be read: {reason}"
        raise ConfigError(problems=[Problem(message, file=path)]) from None
    try:
        return DatasetConfig.from_mapping(values, folder=path.absolute().parent, file=path)
    except ConfigError as error:
        lines = key_lines(text)
        placed = (replace(p, line=locate(p.key, lines)) for p in error.problems)
        raise ConfigError(problems=placed) from None


def _absolute(source: SourceOptions, folder: Path) -> SourceOptions:
    media = source.media_path.expanduser()
    in_folder = media.is_absolute() or (folder / media).exists() or not media.absolute().exists()
    base = folder.absolute() if in_folder else Path.cwd()
    update = {
        key: base / getattr(source, key).expanduser()
        for key in (*MEDIA_KEYS, "cache_directory")
        if getattr(source, key) is not None
    }
    for key in ("control_directory", "mask_directory"):
        path: Path | None = getattr(source, key)
        if path is not None:
            given = path.expanduser()
            update[key] = (folder.absolute() if (folder / given).exists() else base) / given
    return source.model_copy(update=update)
