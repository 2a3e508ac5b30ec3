"""Names, writes and reads finished samples; nothing is overwritten unless it is asked for."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from trainer.contract.config import SamplingSection
from trainer.contract.errors import ConfigError, DataError, DiskError
from trainer.contract.files import disk_errors, in_bytes
from trainer.contract.free_names import move_unless_taken
from trainer.contract.sample_formats import (
    SAMPLE_FORMATS,
    FormatEntry,
    format_entry,
    formats_of_suffix,
)
from trainer.sampling.formats.base import Content, SampleFormat
from trainer.sampling.latent_files import SUFFIX, read_latents_metadata, write_latents
from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import AnyFrame, read_metadata

MAX_PROMPT = 4_000
"""Characters of a prompt that an event has; the whole one is in the file's metadata."""
_FRAME = re.compile(r"\d+\.png")
MAX_STEM = 120
"""Bytes of a part of a file's name: file systems take 255 bytes in all."""


@dataclass(frozen=True, slots=True)
class FinishedSample:
    """A sample's file, and what it shows."""

    path: Path
    prompt: str
    seed: int

    def fields(self) -> dict[str, Any]:
        """Return what an event says of it."""
        return {"path": str(self.path), "prompt": self.prompt[:MAX_PROMPT], "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """What kind of file, and what goes into it."""

    format: str = "h264"
    quality: int | None = None
    save_latents: bool = False
    """Write the latents, too, beside each file."""
    metadata: bool = True
    """Write what made it into each file."""
    force: bool = False
    """Replace a file that is there."""

    @classmethod
    def of(cls, sampling: SamplingSection, *, force: bool = False) -> FileOptions:
        """Return what `[sampling]` says."""
        return cls(
            format=sampling.format,
            quality=sampling.quality,
            save_latents=sampling.save_latents,
            metadata=sampling.metadata,
            force=force,
        )

    @property
    def decodes(self) -> bool:
        """Whether frames are needed."""
        return format_entry(self.format).decodes

    def entry(self, num_frames: int) -> FormatEntry:
        """Return the format of a sample: PNG for one frame, where the format holds videos only."""
        entry = format_entry(self.format)
        return format_entry("png") if num_frames == 1 and entry.holds == "video" else entry

    def suffix(self, num_frames: int) -> str:
        """Return how the name of a sample ends; "" for a folder."""
        entry = self.entry(num_frames)
        return "" if entry.holds == "folder" and num_frames > 1 else entry.suffix

    def writer(self, num_frames: int) -> SampleFormat:
        """Return what writes a sample.

        Raises:
            RunError: this machine cannot.
        """
        writer = cast("SampleFormat", SAMPLE_FORMATS.load(self.entry(num_frames).name))
        writer.check()
        return writer


def write_sample(
    folder: Path,
    name: str,
    request: SampleRequest,
    frames: Iterable[AnyFrame],
    *,
    metadata: Mapping[str, Any] | None = None,
    files: FileOptions | None = None,
    latents_BCFHW: Tensor | None = None,
) -> Path:
    """Write one sample as `<name>_<seed>` into `folder`; return its path.

    Args:
        folder: made if it is not there.
        name: beginning of the file's name; characters that file systems refuse are replaced.
        request: goes into the file's metadata.
        frames: (H, W, 3), of as many bits as the writer of the format asks for; consumed as they
            come.
        metadata: what else goes in, such as the variant and the LoRAs.
        files: what kind of file; None: H.264, or PNG for one frame.
        latents_BCFHW: of the sample; needed where `files` asks for them.

    Raises:
        DiskError: disk full or read-only; nothing is left of this sample.
        RunError: there is no encoder.
    """
    files = files or FileOptions()
    stem = f"{safe_name(name)}_{request.seed}"
    path = folder / f"{stem}{files.suffix(request.num_frames)}"
    return write_files(
        path,
        frames,
        num_frames=request.num_frames,
        fps=request.fps,
        metadata=describe(request) | dict(metadata or {}) if files.metadata else {},
        files=files,
        latents_BCFHW=latents_BCFHW,
    )


def write_files(
    path: Path,
    frames: Iterable[AnyFrame],
    *,
    num_frames: int,
    fps: float,
    metadata: Mapping[str, Any],
    files: FileOptions,
    latents_BCFHW: Tensor | None = None,
    on_latents: Callable[[Path], None] = lambda _path: None,
) -> Path:
    """Write one sample, and its latents beside it where they are wanted; see `write_sample`.

    The latents come first: they are there when the decoding fails, and `on_latents` is told.
    `metadata` is all that the files say.

    Returns:
        `path`, or the first free one of `<stem>_2`, `<stem>_3`, … unless `files.force` is set. The
        name is taken when the file is whole, so that of several processes each gets its own.
    """
    latents = None if latents_BCFHW is None else latents_BCFHW[0].float()
    names = _candidates(path)
    beside: Path | None = None
    if files.save_latents and files.decodes:  # else they are the sample itself
        if latents is None:
            raise ValueError("the latents are wanted, but not given")
        if files.force:
            write_latents(latents_beside(path), latents, metadata, fps=fps)
        else:
            with _finished(latents_beside(path)) as place:
                write_latents(place, latents, metadata, fps=fps)
                path = _take_for_latents(place, names)
        beside = latents_beside(path)
        on_latents(beside)
    content = Content(
        frames=frames, latents_CFHW=latents, fps=fps, metadata=metadata, quality=files.quality
    )
    if files.force:
        with _room_for(path) as place:
            files.writer(num_frames).write(place, content)
        return path
    with _finished(path) as place:
        files.writer(num_frames).write(place, content)
        return _take(place, chain([path], names), beside)


def latents_beside(path: Path) -> Path:
    """Return where the latents of a sample are written."""
    return path.with_name(_stem(path) + SUFFIX)


def describe_file(path: Path) -> dict[str, Any]:
    """Return name, size and hash of a file; of a folder the name."""
    if not path.is_file():
        return {"file": path.name}
    with path.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": path.name, "size": path.stat().st_size, "sha256": content}


def describe(
    request: SampleRequest, *, describe_file: Callable[[Path], dict[str, Any]] = describe_file
) -> dict[str, Any]:
    """Return what is needed to make the sample again, as plain JSON values.

    A file is described by its name and its content: the folders of this machine are nobody's
    business. `describe_file` may remember what it has read.
    """
    fields = {key: value for key, value in asdict(request).items() if value is not None}
    # What says nothing new is left out: it would drown the rest.
    fields |= fields.pop("denoising").model_dump(mode="json", exclude_defaults=True)
    return {key: _plain(value, describe_file) for key, value in fields.items()}


def read_sample_metadata(path: Path) -> dict[str, Any]:
    """Return what made a sample: a file of any format, or a folder of frames; {} if it says none.

    Raises:
        DataError: missing or damaged.
    """
    if path.is_dir():
        first = min(path.glob("*.png"), default=None)
        if first is None:
            raise DataError(f"there is no PNG in {path}")
        path = first
    if path.suffix.lower() == SUFFIX:
        return read_latents_metadata(path)
    return read_metadata(path)


def safe_name(text: str) -> str:
    """Return a text as part of a file's name: what file systems refuse becomes `_`."""
    return in_bytes(re.sub(r"[^\w.+-]+", "_", text), MAX_STEM)


def require_formats(files: FileOptions, requests: Iterable[SampleRequest]) -> None:
    """Refuse what cannot be written, before anything is made.

    Raises:
        RunError: an encoder is not there.
        ConfigError: an unknown format.
    """
    for num_frames in {request.num_frames for request in requests}:
        files.writer(num_frames)


def require_only_frames(path: Path) -> None:
    """Refuse a folder that `force` would remove, and that holds more than a sample's frames.

    Raises:
        ConfigError: it does.
    """
    if path.is_dir() and any(not _FRAME.fullmatch(file.name) for file in path.iterdir()):
        raise ConfigError(
            f"{path} holds more than frames, and --force would remove it",
            hint="choose another --output",
        )


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """Yield a hidden place beside `path` for what has no name yet; nothing stays there."""
    place = _hidden(path)
    try:
        yield place
    except DiskError as error:
        words = error.message.replace(str(place), str(path))
        raise DiskError(words, hint=error.hint) from error
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            with suppress(OSError):
                place.unlink()


def _take(place: Path, names: Iterator[Path], beside: Path | None) -> Path:
    """Move a sample to the first free name, and the latents `beside` the first one along."""
    while True:
        name = next(names)
        if name.exists():
            continue
        latents = latents_beside(name)
        if beside is not None and beside != latents:
            if not move_unless_taken(beside, latents):
                continue
            beside = latents
        if move_unless_taken(place, name):
            return name


def _take_for_latents(place: Path, names: Iterator[Path]) -> Path:
    """Move latents beside the first free name; return that name."""
    return next(
        name
        for name in names
        if not name.exists() and move_unless_taken(place, latents_beside(name))
    )


def _hidden(path: Path) -> Path:
    # The ending says the format. Not more than names may have, with what partial files add to it.
    suffix = path.suffix if formats_of_suffix(path.suffix) else ""
    return path.with_name(f".{in_bytes(path.name, 60)}.{secrets.token_hex(4)}{suffix}")


@contextmanager
def _room_for(path: Path) -> Iterator[Path]:
    """Yield where to write; a folder of frames takes another's place when it is whole."""
    if not path.is_dir():
        yield path
        return
    require_only_frames(path)
    place = _hidden(path)
    yield place
    with disk_errors(path):
        old = path.with_name(f"{place.name}.old")
        path.rename(old)
        place.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    stem = _stem(path)
    for number in count(2):
        yield path.with_name(f"{stem}_{number}{path.name.removeprefix(stem)}")


def _stem(path: Path) -> str:
    return path.stem if formats_of_suffix(path.suffix) else path.name


def _plain(value: Any, describe_file: Callable[[Path], dict[str, Any]]) -> Any:
    if isinstance(value, Path):
        return describe_file(value)
    if isinstance(value, Mapping):
        return {key: _plain(part, describe_file) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, describe_file) for part in value]
    return value
