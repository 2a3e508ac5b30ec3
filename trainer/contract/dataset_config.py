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
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.options import Options
from trainer.contract.registry import nearest
from trainer.contract.toml_lines import key_lines, locate

M = TypeVar("M", bound=Options)
FrameExtraction = Literal["head", "chunk", "slide", "uniform", "full"]
MediaKind = Literal["image", "video"]

CACHE_FOLDER = "menma_cache"
"""Name of the cache folder that is made inside a media folder when none is given."""

MEDIA_KEYS = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")
VIDEO_KEYS = (
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
)
UNSUPPORTED_KEYS = {
    "control_directory": "control videos",
    "no_resize_control": "control images",
    "control_resolution": "control images",
    "multiple_target": "several target images per item",
    "fp_latent_window_size": "FramePack",
    "fp_1f_clean_indices": "one-frame training",
    "fp_1f_target_index": "one-frame training",
    "fp_1f_no_post": "one-frame training",
    "num_timestep_buckets": "timestep buckets per dataset",
}
"""Keys of musubi-tuner that Menma knows and does not support, with what they are for."""


_OWN_ERRORS = {
    "unsupported_key",
    "no_sources",
    "one_medium",
    "cache_directory",
    "video_key",
    "chunk_of_one",
}
"""Errors raised here, whose sentence needs no value after it."""


def _both_sides(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _leading_dot(value: Any) -> Any:
    return f".{value}" if isinstance(value, str) and value and value[0] != "." else value


Side = Annotated[int, Field(ge=16, le=16384)]
Frames = Annotated[int, Field(ge=1, le=100_000)]


class SharedOptions(Options):
    """Keys that may stand in `general` and in a source."""

    resolution: Annotated[tuple[Side, Side], BeforeValidator(_both_sides)] = (960, 544)
    """Width and height in pixels; one number is a square. With buckets: the area to keep."""
    caption_extension: Annotated[str, BeforeValidator(_leading_dot), Field(min_length=2)] = ".txt"
    """A folder's captions are files of the clip's name with this extension."""
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
            if key in (*MEDIA_KEYS, *VIDEO_KEYS, "cache_directory"):
                return f"{key} belongs to a source, not to general"
            return _unsupported(key)

        return _with_explanations(cls, values, handler, explain)


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
    """Which windows: the first; one after another; sliding; evenly spread; the whole clip."""
    frame_stride: int = Field(default=1, ge=1)
    """Frames from one window of `slide` to the next."""
    frame_sample: int = Field(default=1, ge=1)
    """Number of windows of `uniform`; 1 takes the first window."""
    max_frames: int = Field(default=129, ge=1)
    """Longest window of `full`."""
    source_fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames a second of the videos. Given, they are resampled to the model's rate."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain_keys(
        cls, values: Any, handler: ModelWrapValidatorHandler[SourceOptions]
    ) -> SourceOptions:
        return _with_explanations(cls, values, handler, _unsupported)

    @model_validator(mode="after")
    def _one_medium(self) -> SourceOptions:
        given = [key for key in MEDIA_KEYS if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise PydanticCustomError(
                "one_medium",
                "a source needs exactly one of {keys}; {found}",
                {"keys": ", ".join(MEDIA_KEYS), "found": found},
            )
        if given[0].endswith("_jsonl_file") and self.cache_directory is None:
            raise PydanticCustomError(
                "cache_directory", "{key} needs a cache_directory", {"key": given[0]}
            )
        fields = type(self).model_fields
        wrong = [key for key in VIDEO_KEYS if getattr(self, key) != fields[key].default]
        if self.kind == "image" and wrong:
            raise PydanticCustomError(
                "video_key", "{keys}: only for sources of videos", {"keys": ", ".join(wrong)}
            )
        if self.frame_extraction == "chunk" and any(frames < 5 for frames in self.target_frames):
            raise PydanticCustomError(
                "chunk_of_one",
                "frame_extraction 'chunk' with target_frames below 5 would make an item of every "
                "frame; take 'head' or 'uniform' for single frames",
            )
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
            raise ConfigError(
                problems=_problems(error, file=file, prefix=prefix, sources=name)
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
    return source.model_copy(update=update)


def _unsupported(key: str) -> str | None:
    if key in UNSUPPORTED_KEYS:
        return f"{key} ({UNSUPPORTED_KEYS[key]}) is a key of musubi-tuner that Menma lacks so far"
    return None


def _with_explanations(
    model: type[M],
    values: Any,
    handler: Callable[[Any], M],
    explain: Callable[[str], str | None],
) -> M:
    """Validate; keys that `explain` has a sentence for get it instead of "unknown key"."""
    if not isinstance(values, Mapping):
        return handler(values)
    explained = {key: text for key in values if (text := explain(str(key)))}
    if not explained:
        return handler(values)
    lines = [
        InitErrorDetails(
            type=PydanticCustomError("unsupported_key", "{text}", {"text": text}),
            loc=(key,),
            input=values[key],
        )
        for key, text in explained.items()
    ]
    try:
        handler({key: value for key, value in values.items() if key not in explained})
    except ValidationError as error:
        lines += [
            InitErrorDetails(
                type=PydanticCustomError(item["type"], "{text}", {"text": item["msg"]}),
                loc=tuple(item["loc"]),
                input=item["input"],
            )
            for item in error.errors(include_url=False)
        ]
    raise ValidationError.from_exception_data(model.__name__, lines)


def _problems(
    error: ValidationError, *, file: Path | None, prefix: str, sources: str
) -> list[Problem]:
    problems = []
    for item in error.errors(include_url=False):
        loc = [part for part in item["loc"] if not str(part).startswith("function-")]
        hint = ""
        if item["type"] == "extra_forbidden":
            hint = nearest(str(loc[-1]), _known_keys(loc))
        elif item["type"] == "no_sources":
            hint = f"add a [[{prefix}{sources}]]"
        problems.append(
            Problem(_message(item), key=prefix + _key(loc, sources), file=file, hint=hint)
        )
    return problems


def _known_keys(loc: list[int | str]) -> list[str]:
    if loc[0] == "sources":
        return list(SourceOptions.model_fields)
    if loc[0] == "general":
        return list(GeneralOptions.model_fields)
    return ["general", "datasets"]


def _key(loc: list[int | str], sources: str) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else (sources if part == "sources" else part)
    return text


def _message(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key"
    if item["type"] in _OWN_ERRORS:
        return str(item["msg"])
    value = repr(item["input"])
    if len(value) > 80:
        value = value[:77] + "..."
    return f"{item['msg']}, not {value}"
