"""Where samples go: a folder, or files by a name that may have fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from trainer.contract.errors import ConfigError
from trainer.contract.registry import nearest
from trainer.contract.sample_formats import formats_of_suffix
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, latents_beside, safe_name

FIELDS = ("name", "index", "seed", "prompt", "width", "height", "num_frames", "num_steps")
"""What may stand in braces in the name of an output file."""
_MAX_WORDS = 60


@dataclass(frozen=True, slots=True)
class Target:
    """Where each sample goes."""

    output: Path
    name: str
    """Of the config."""
    files: FileOptions

    @property
    def is_file(self) -> bool:
        """Whether a name is given, not a folder."""
        return is_file(self.output)

    def path(self, index: int, request: SampleRequest) -> Path:
        """Return where one sample goes, if nothing is there."""
        if not self.is_file:
            suffix = self.files.suffix(request.num_frames)
            return self.output / f"{safe_name(self.name)}_{index:02d}_{request.seed}{suffix}"
        values = {field: str(getattr(request, field, "")) for field in FIELDS}
        values |= {"name": safe_name(self.name), "index": f"{index:02d}"}
        values["prompt"] = safe_name(request.prompt)[:_MAX_WORDS].strip("_.") or "prompt"
        return self.output.with_name(self.output.name.format_map(values))

    def check(self, requests: Sequence[SampleRequest]) -> None:
        """Refuse names that would not hold the samples, before any is made.

        Raises:
            ConfigError: an unknown field, one name for several samples, a file that is there, or
                an ending that is not of such a sample.
        """
        if not self.is_file:
            return
        self._check_fields()
        paths = [self.path(index, request) for index, request in enumerate(requests)]
        for number, (path, request) in enumerate(zip(paths, requests, strict=True)):
            self._check_ending(path, request)
            if path in paths[:number]:
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


def is_file(output: Path) -> bool:
    """Tell whether `--output` names files: it ends as a format's files do, and is no folder."""
    return bool(formats_of_suffix(output.suffix)) and not output.is_dir()


def format_of(output: Path, wanted: str, *, explicit: bool) -> str:
    """Return the format that is written: the ending of a file decides, unless one was asked for.

    Args:
        output: file or folder.
        wanted: `sampling.format`.
        explicit: whether it was asked for on the command line; then it stays.
    """
    of_ending = formats_of_suffix(output.suffix) if is_file(output) else ()
    return wanted if explicit or not of_ending or wanted in of_ending else of_ending[0]


def _hint() -> str:
    return f"fields: {', '.join(FIELDS)}"
