"""`menma sample --like FILE`: the request that made a sample, read from the sample itself."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.run_dir import RunDir
from trainer.jobs.sample_metadata import NOT_OF_A_SAMPLE
from trainer.sampling.latent_files import SUFFIX
from trainer.sampling.results import describe_file, read_sample_metadata
from trainer.sampling.video_io import read_texts

_LORA_FOLDERS = ("loras", "models/loras", "models", "output")
"""Looked through beside what is at hand."""
_INPUTS = frozenset({"image", "last_image", "control", "video", "control_images"})
"""Fields of `Prompt` that are files."""
_GUIDANCE = ("guidance_scale", "guidance_scale_high_noise")
_MAX_NAME = 255
"""Bytes of a name, on any file system."""
_ABOUT_A_FILE = frozenset({"file", "size", "sha256"})


@dataclass(frozen=True, slots=True)
class Remade:
    """A request with what a file says filled in."""

    request: SampleJobRequest
    made: Mapping[str, Any] = field(default_factory=dict)
    """All that the file says; empty: no file was named."""
    warnings: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()


def remade(request: SampleJobRequest) -> Remade:
    """Return the request with what the file of `like` says filled in.

    What the request sets itself wins: its `set`, its prompts' own fields, its LoRAs.

    Raises:
        DataError: the file says nothing that Menma understands.
        ConfigError: a LoRA or an image of it cannot be found.
    """
    if request.like is None:
        return Remade(request)
    if request.prompts_file is not None:
        raise ConfigError("a prompt file and a sample to be like at once", hint="give one of them")
    made = sample_request(request.like)
    set_by_user = {text.partition("=")[0].strip() for text in request.set}
    fields = _prompt_fields(made, set_by_user, request)
    own_loras = bool(request.loras or request.loraids)
    loras, run_dir = request.loras, request.run_dir
    warnings: list[str] = []
    logs: list[str] = []
    if own_loras and made.get("loras"):
        logs.append("the LoRAs that are given take the place of those of the file")
    if not own_loras:
        loras, run_dir = _loras(made, request, warnings, logs)
    filled = request.model_copy(
        update={
            "like": None,
            "prompts": tuple(_prompts(request, fields)),
            # The words of the file are what wildcards became; they are no template any more.
            # Nor are LoRAs of the config added to those that the file names.
            "set": (
                "sampling.wildcards=false",
                "sampling.loras=[]",
                *_settings(made, set_by_user),
                *request.set,
            ),
            "loras": loras,
            "run_dir": run_dir,
        }
    )
    return Remade(filled, made, tuple(warnings), tuple(logs))


def sample_request(path: Path) -> dict[str, Any]:
    """Return what a sample's file says of how it was made.

    Raises:
        DataError: missing, damaged, or of a program whose words Menma does not know.
    """
    if not path.exists():
        raise DataError(f"there is no {path}")
    made = read_sample_metadata(path)
    if isinstance(made.get("prompt"), str) and ("seed" in made or "num_steps" in made):
        return made
    if path.suffix.lower() != SUFFIX and not path.is_dir() and _is_of_comfyui(path):
        raise DataError(
            f"{path} is of ComfyUI and holds its workflow: a graph of nodes, which Menma does not "
            "run",
            hint="open it in ComfyUI, and give its prompt and settings as options",
        )
    raise DataError(
        f"{path} does not say how it was made",
        hint="files that Menma writes do, unless made with --no-metadata; programs that convert "
        "a file or send it may drop the words",
    )


def _is_of_comfyui(path: Path) -> bool:
    texts = read_texts(path)
    exif = [texts.get("make", ""), texts.get("model", "")]
    if "workflow" in texts or any(text.startswith(("workflow:", "prompt:")) for text in exif):
        return True
    return "class_type" in texts.get("prompt", "") + texts.get("comment", "")


def _prompt_fields(
    made: Mapping[str, Any], set_by_user: set[str], request: SampleJobRequest
) -> dict[str, Any]:
    """Return the fields of `Prompt` that the file has and the user has not set."""
    fields: dict[str, Any] = {key: made[key] for key in Prompt.model_fields if key in made}
    scale = fields.get("guidance_scale")
    if isinstance(scale, list) and len(scale) == 2:
        fields |= dict(zip(_GUIDANCE, scale, strict=True))
    given = {field for prompt in request.prompts for field in prompt.model_fields_set}
    fields = {key: value for key, value in fields.items() if f"sampling.{key}" not in set_by_user}
    if "sampling.guidance_scale" in set_by_user:
        fields.pop("guidance_scale_high_noise", None)
    return {
        key: value if key in given else _with_files(value, key, request)
        for key, value in fields.items()
    }


def _with_files(value: Any, option: str, request: SampleJobRequest) -> Any:
    """Return a value with the paths of the files that it describes.

    Raises:
        DataError: it is a path itself. Menma writes none, and one from elsewhere is not followed.
        ConfigError: a file is not found.
    """
    if option not in _INPUTS:
        return value
    if isinstance(value, Mapping):
        return _found_file(value, option, request)
    if isinstance(value, list):
        return [_with_files(part, option, request) for part in value]
    raise DataError(
        f"{request.like}: {option} is not described by name and content",
        hint=f"give it by --{option.replace('_', '-').removesuffix('s')}",
    )


def _prompts(request: SampleJobRequest, fields: Mapping[str, Any]) -> Iterator[Prompt]:
    for prompt in request.prompts or (Prompt(prompt=""),):
        own = prompt.model_dump(exclude_unset=True)
        if not prompt.prompt:
            own.pop("prompt")
        try:
            yield Prompt.model_validate({**fields, **own})
        except ValidationError as error:
            problems = [str(problem) for problem in problems_of(error, Prompt)]
            raise DataError(
                f"{request.like} says something that cannot be used: {'; '.join(problems)}",
                hint="it was changed, or is of another version of Menma; give such options anew",
            ) from None


def _settings(made: Mapping[str, Any], set_by_user: set[str]) -> Iterator[str]:
    """Yield the defaults of `[sampling]` that the file has, as `section.key=value`."""
    stored = made.get("sampling")
    for key, value in stored.items() if isinstance(stored, Mapping) else ():
        field = SamplingSection.model_fields.get(key)
        # Files that a config names are the config's own business; only their names are stored.
        known = field is not None and "Path" not in str(field.annotation)
        known = known and key not in NOT_OF_A_SAMPLE
        if not known or f"sampling.{key}" in set_by_user or isinstance(value, dict):
            continue
        if key == "guidance_scale_high_noise" and "sampling.guidance_scale" in set_by_user:
            continue
        yield f"sampling.{key}={json.dumps(value, ensure_ascii=False)}"  # JSON's values are TOML's


def _loras(
    made: Mapping[str, Any], request: SampleJobRequest, warnings: list[str], logs: list[str]
) -> tuple[tuple[SampleLoRA, ...], Path | None]:
    """Return the LoRAs that the file names, and the run whose newest one is used instead.

    What is to be said of it is added to `warnings` and `logs`.
    """
    stored = made.get("loras")
    if isinstance(stored, list) and stored:
        return tuple(_lora(entry, request) for entry in stored if isinstance(entry, dict)), None
    if "step" not in made:
        return (), None
    step, file = made["step"], request.like
    of_step: list[Path] = []
    if file is not None and isinstance(step, int):
        of_step = sorted(file.parent.parent.glob(f"output/*step{step:08d}*{SUFFIX}"))
    if of_step:
        logs.append(f"made at step {step} of a training: {of_step[0].name} is used")
        return tuple(SampleLoRA(path=path) for path in of_step), None
    what = "the run's newest output" if request.run_dir else "no LoRA"
    warnings.append(
        f"{file}: made at step {step} of a training whose weights of then are not in output/: "
        f"{what} is used, and the sample will differ; --lora names them"
    )
    return (), request.run_dir


def _lora(entry: Mapping[str, Any], request: SampleJobRequest) -> SampleLoRA:
    path = _found_file(entry, "lora", request)
    use = {key: value for key, value in entry.items() if key not in _ABOUT_A_FILE}
    known = {key: value for key, value in use.items() if key in SampleLoRA.model_fields}
    try:
        return SampleLoRA.model_validate({**known, "path": path})
    except ValidationError:
        raise DataError(
            f"{request.like}: what it says of the LoRA {path.name} cannot be used",
            hint="give the LoRAs by --lora",
        ) from None


def _found_file(entry: Mapping[str, Any], option: str, request: SampleJobRequest) -> Path:
    """Return the file that is meant: by its name where the content is the same, else by content.

    Raises:
        ConfigError: it is not found.
    """
    name, size, content = (entry.get(key) for key in ("file", "size", "sha256"))
    folders = _folders(request)
    if not isinstance(name, str) or not _is_plain(name):
        raise DataError(f"{request.like}: {name!r} is no file name")
    named = [folder / name for folder in folders if (folder / name).exists()]
    if content is None and named:
        return named[0]
    pattern = f"*{glob.escape(Path(name).suffix)}"
    others = (file for folder in folders for file in sorted(folder.glob(pattern)))
    for file in (*named, *others):
        same_size = content and file.is_file() and file.stat().st_size == size
        if same_size and describe_file(file)["sha256"] == content:
            return file
    reason = "is not found"
    if named:
        reason = f"is not the file that was used: {named[0]} has another content"
    flag = option.replace("_", "-")
    looked = ", ".join(map(str, folders))
    raise ConfigError(
        f"{request.like} was made with {name}, which {reason}",
        hint=f"give it, or another one, by --{flag} FILE; looked in {looked}",
    )


def _is_plain(name: str) -> bool:
    """Tell whether it is the name of a file, and no way out of a folder."""
    is_one = Path(name).name == name and name not in {"", ".", ".."}
    return is_one and "\0" not in name and len(name.encode(errors="replace")) <= _MAX_NAME


def _folders(request: SampleJobRequest) -> Sequence[Path]:
    """Return where files that a sample names may lie: beside it, in its run, where one works."""
    bases = [request.config.parent, Path()]
    if request.like is not None:
        bases = [request.like.parent, request.like.parent.parent, *bases]
    if request.run_dir is not None:
        bases.append(RunDir(request.run_dir).root)
    folders = [base / part for base in bases for part in ("", *_LORA_FOLDERS)]
    folders += [place for base in bases for place in sorted(base.glob("runs/*/output"))]
    unique = {folder.resolve(): folder for folder in reversed(folders) if folder.is_dir()}
    return list(reversed(unique.values()))
