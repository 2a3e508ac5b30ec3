"""Where samples go: a folder, or files by a name that may have fields."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter

from trainer.contract.config import SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.registry import nearest
from trainer.contract.sample_formats import format_entry, formats_of_suffix
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, latents_beside, require_only_frames, safe_name

FIELDS = ("name", "index", "seed", "prompt", "width", "height", "num_frames", "num_steps")
"""What may stand in braces in the name of an output file."""
_MAX_WORDS = 60
_MAX_NAME = 240
"""Bytes of a file's name; file systems take 255, and a number may follow where it is taken."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where each sample goes."""

    output: Path
    name: str
    """Of the config."""
    files: FileOptions
    pattern: str = "{name}_{index}_{seed}"
    """Names in a folder, without their ending."""

    @property
    def is_file(self) -> bool:
        """Whether a name is given, not a folder."""
        return is_file(self.output)

    def path(self, index: int, request: SampleRequest, name: str = "") -> Path:
        """Return where one sample goes, if nothing is there; `name` takes the config's place."""
        values = {field: str(getattr(request, field, "")) for field in FIELDS}
        values |= {"name": safe_name(name or self.name), "index": f"{index:02d}"}
        values["name"] = (
            str(values["name"]).lstrip(".-") or "sample"
        )  # hidden, or taken for an option
        values["prompt"] = safe_name(request.prompt)[:_MAX_WORDS].strip("_.-") or "prompt"
        if self.is_file:
            return self.output.with_name(self.output.name.format_map(values))
        suffix = self.files.suffix(request.num_frames)
        return self.output / f"{self.pattern.format_map(values)}{suffix}"

    def check(
        self, requests: Sequence[SampleRequest], names: Sequence[str] = (), *, first_index: int = 0
    ) -> None:
        """Refuse names that would not hold the samples, before any is made.

        Args:
            requests: the samples.
            names: of their prompts, where they have some.
            first_index: of the first of them among all samples.

        Raises:
            ConfigError: an unknown field, one name for several samples, a file that is there, an
                ending that is not of such a sample, or a folder that nothing can be written to.
        """
        _check_folder(self.output.parent if self.is_file else self.output)
        check_no_fields(self.output.parent if self.is_file else self.output)
        every = names or [self.name] * len(requests)
        paths: list[Path] = []
        pairs = zip(requests, every, strict=True)
        if not self.is_file:
            if self.files.force:
                for index, (request, name) in enumerate(pairs, first_index):
                    require_only_frames(self.path(index, request, name))
            return
        self._check_fields()
        for index, (request, name) in enumerate(pairs, first_index):
            path = self.path(index, request, name)
            self._check_ending(path, request)
            if self.files.force:
                require_only_frames(path)
            if len(os.fsencode(path.name)) > _MAX_NAME:
                raise ConfigError(
                    f"--output: {path.name} takes more than {_MAX_NAME} bytes",
                    hint="use fewer fields in its name",
                )
            if path in paths:
                raise ConfigError(
                    f"several samples would be named {path}",
                    hint="put {index} or {seed} into the name, or give a folder",
                )
            taken = [path, *([latents_beside(path)] if self.files.save_latents else [])]
            there = next((file for file in taken if file.exists()), None)
            if there is not None and not self.files.force:
                raise ConfigError(
                    f"{there} is there already", hint="--force replaces it; or choose another name"
                )
            paths.append(path)

    def _check_fields(self) -> None:
        name = self.output.name
        try:
            parts = list(Formatter().parse(name))
        except ValueError as error:
            raise ConfigError(f"--output {name}: {error}", hint=_hint()) from None
        for _, field, spec, conversion in parts:
            if field is not None and (field not in FIELDS or spec or conversion):
                raise ConfigError(
                    f"--output {name}: there is no field {{{field}}}",
                    hint=nearest(field, FIELDS) or _hint(),
                )

    def _check_ending(self, path: Path, request: SampleRequest) -> None:
        wanted = self.files.suffix(request.num_frames)
        if path.suffix.lower() == wanted:
            return
        if wanted == "":
            hint = "give a folder as --output, or the ending of a video"
            raise ConfigError(
                f"{path.name} would be one image, and there are more frames", hint=hint
            )
        what = "one frame" if request.num_frames == 1 else self.files.format
        raise ConfigError(f"{path.name}: {what} is written as {wanted}", hint="change the ending")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is none, or takes no files: better now than when they are made."""
    places = (folder, *folder.absolute().parents)
    there = next(place for place in places if os.path.lexists(place))  # a link to nowhere, too
    if not there.is_dir():
        raise ConfigError(f"--output: {there} is a file, no folder", hint="give another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output: {there} is not writable", hint="choose another folder")


def check_no_fields(folder: Path) -> None:
    """Refuse fields where they would be the letters of a folder's name.

    Raises:
        ConfigError: there are some.
    """
    written = next((name for name in FIELDS if f"{{{name}}}" in str(folder)), None)
    if written is not None:
        raise ConfigError(
            f"--output: {{{written}}} is in the name of a folder, where it means nothing",
            hint="fields are for the name of a file, which has an ending: out/{prompt}_{seed}.mp4",
        )


def is_file(output: Path) -> bool:
    """Tell whether `--output` names files: it ends as a format's files do, and is no folder."""
    return bool(formats_of_suffix(output.suffix)) and not output.is_dir()


def file_options(
    output: Path, settings: Sequence[str], sampling: SamplingSection, *, force: bool
) -> FileOptions:
    """Return what kind of files is written: `[sampling]`'s, or what the name of the output says.

    The ending of a file decides, unless a format is among `settings` (`section.key=value`). A
    quality is left out where the ending asks for a format that has none.

    Raises:
        ConfigError: latents are asked for beside a file of latents.
    """
    files = FileOptions.of(sampling, force=force)
    explicit = any(text.partition("=")[0].strip() == "sampling.format" for text in settings)
    of_ending = formats_of_suffix(output.suffix) if is_file(output) else ()
    if explicit or not of_ending or files.format in of_ending:
        return files
    name = of_ending[0]
    if files.save_latents and not format_entry(name).decodes:
        raise ConfigError(
            f"--output {output.name}: the latents are the sample already",
            hint="leave --save-latents (sampling.save_latents) out, or give the ending of a video",
        )
    quality = files.quality if format_entry(name).has_quality else None
    return replace(files, format=name, quality=quality)


def _hint() -> str:
    return f"fields: {', '.join(FIELDS)}"
