"""Names, writes and reads finished samples; nothing is overwritten unless it is asked for."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from trainer.contract.config import SamplingSection
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.files import disk_errors, in_bytes
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
) -> Path:
    """Write one sample, and its latents beside it where they are wanted; see `write_sample`.

    The latents come first: they are there when the decoding fails. `metadata` is all that the
    files say.

    Returns:
        `path`, or the first free one beside it unless `files.force` is set.
    """
    latents = None if latents_BCFHW is None else latents_BCFHW[0].float()
    path = path if files.force else free_path(path, with_latents=files.save_latents)
    if files.save_latents:
        if latents is None:
            raise ValueError("the latents are wanted, but not given")
        write_latents(latents_beside(path), latents, metadata, fps=fps)
    content = Content(
        frames=frames, latents_CFHW=latents, fps=fps, metadata=metadata, quality=files.quality
    )
    with _room_for(path, force=files.force) as place:
        files.writer(num_frames).write(place, content)
    return path


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


def free_path(path: Path, *, with_latents: bool = False) -> Path:
    """Return `path`, or the first of `<stem>_2`, `<stem>_3`, … that does not exist.

    With `with_latents`, the file of the latents beside it does not exist either.
    """
    return next(
        candidate
        for candidate in _candidates(path)
        if not candidate.exists() and not (with_latents and latents_beside(candidate).exists())
    )


def require_formats(files: FileOptions, requests: Iterable[SampleRequest]) -> None:
    """Refuse what cannot be written, before anything is made.

    Raises:
        RunError: an encoder is not there.
        ConfigError: an unknown format.
    """
    for num_frames in {request.num_frames for request in requests}:
        files.writer(num_frames)


@contextmanager
def _room_for(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield where to write; a folder of frames takes another's place when it is whole."""
    if not (force and path.is_dir()):
        yield path
        return
    if any(not _FRAME.fullmatch(file.name) for file in path.iterdir()):
        raise ConfigError(
            f"{path} holds more than frames, and --force would remove it",
            hint="choose another --output",
        )
    place = path.with_name(f".{in_bytes(path.name, 80)}.{secrets.token_hex(4)}")
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
