"""From answers to a config: what the wizard of the app and `menma new` ask, check and write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.domain.config_file import CONFIGS
from app.domain.data_folder import DataFolder
from app.domain.demo_model import demo_preset, is_demo
from app.domain.goals import GOALS, GoalChoice, kind_for, source_values
from app.domain.presets import Preset
from app.domain.template import render_config
from app.domain.weight_files import WeightKind, has_tokenizer, recognise
from app.domain.weight_search import ModelFiles
from trainer.contract.errors import UserError
from trainer.contract.files import write_text
from trainer.contract.registry import nearest
from trainer.contract.variants import VARIANTS, Variant

NAME_LENGTH = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KINDS: dict[str, WeightKind] = {
    "transformer": "transformer",
    "transformer_high_noise": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "image_encoder": "image_encoder",
}
FIELDS = (*_KINDS, "tokenizer")
"""Files of `[model]`, in the order in which they are asked for."""
TITLES = {
    "transformer": "transformer",
    "transformer_high_noise": "high-noise expert",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "tokenizer": "tokenizer",
}
_EXAMPLES = {
    "transformer": "wan2.1_t2v_1.3B_bf16.safetensors",
    "vae": "wan_2.1_vae.safetensors, Wan2.1_VAE.pth or a vae folder",
    "text_encoder": "umt5_xxl_fp16.safetensors or models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "clip_vision_h.safetensors",
}
_KIND_WORDS = {"transformer": "a Wan transformer", "vae": "a Wan VAE",
               "text_encoder": "an umT5 text encoder",
               "image_encoder": "a CLIP image encoder"}  # fmt: skip
_WARMUP_SHARE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Everything that a config is made of."""

    model: ModelFiles
    goal: GoalChoice
    data: DataFolder
    preset: Preset | None = None
    """None: Menma's defaults."""
    name: str
    max_steps: int | None = None
    """None: the preset's."""
    prompt: str = ""
    """What the sample at the end shows; empty: none is made."""
    image: Path | None = None
    """First frame of the sample, for image-to-video models."""

    @property
    def num_gpus(self) -> int:
        """GPUs that the training takes."""
        return self.preset.head.num_gpus if self.preset is not None else 1

    @property
    def samples(self) -> bool:
        """Whether a sample is made at the end."""
        known = VARIANTS.get(self.model.variant)
        if not self.prompt or known is None:
            return False
        return can_sample(known) and (not needs_image(known) or self.image is not None)

    @property
    def steps(self) -> tuple[str, ...]:
        """The jobs of the queue, as `menma queue chain` calls them."""
        return ("cache", "train", "sample") if self.samples else ("cache", "train")


def needs_image(variant: Variant) -> bool:
    """Tell whether a sample needs a first frame."""
    return variant.conditioning == "first_frame"


def can_sample(variant: Variant) -> bool:
    """Tell whether a prompt, perhaps with a first frame, is enough for a sample."""
    return variant.conditioning in ("none", "first_frame")


def fields_of(variant: str) -> tuple[str, ...]:
    """Return the files that a model has, by their keys in `[model]`; the tokenizer is the last."""
    known = VARIANTS.get(variant)
    has = {
        "transformer_high_noise": known is not None and known.experts,
        "image_encoder": known is not None and known.transformer.image_dim is not None,
    }
    return tuple(field for field in FIELDS if has.get(field, True))


def model_problems(model: ModelFiles) -> dict[str, str]:
    """Return what is wrong with the files of a model: key of `[model]` -> words."""
    return dict(_model_problems(model))


def _model_problems(model: ModelFiles) -> Iterator[tuple[str, str]]:
    known = VARIANTS.get(model.variant)
    if known is None and model.variant:
        yield "variant", f"unknown model {model.variant!r}: {nearest(model.variant, VARIANTS)}"
    wrong = set()
    for field in fields_of(model.variant):
        path: Path | None = getattr(model, field)
        if path is not None:
            problem = _file_problem(field, path, known)
        else:
            problem = _missing(field, model, known)
        if problem and not (field == "tokenizer" and "text_encoder" in wrong):
            wrong.add(field)
            yield field, problem
    if not model.variant and not model.main:
        return
    if known is None and not model.variant:
        yield "variant", f"which model is it? One of {', '.join(VARIANTS)}"


def _missing(field: str, model: ModelFiles, known: Variant | None) -> str:
    if field in ("transformer", "transformer_high_noise"):
        of_two = known is not None and known.experts
        if of_two and model.main is not None:
            return ""  # one expert can be trained alone
        return "" if field != "transformer" else f"give its file, such as {_EXAMPLES[field]}"
    if field == "tokenizer":
        encoder = model.text_encoder
        if encoder is None or not encoder.exists() or has_tokenizer(encoder):
            return ""
        return "the text encoder comes without one: give umT5's spiece.model or its folder"
    return f"none was found: give its file, such as {_EXAMPLES[field]}"


def _file_problem(field: str, path: Path, known: Variant | None) -> str:
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        return f"no such file or folder: {path}"
    if field == "tokenizer" or path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return ""  # `menma check` opens it
    found = recognise(path)
    if found is None or found.kind != _KINDS[field]:
        what = _KIND_WORDS[found.kind] if found else "no known part of a Wan model"
        return f"{path.name} is {what}; {_KIND_WORDS[_KINDS[field]]} is needed here"
    if known is None:
        return ""
    if field == "vae" and found.vae != known.vae:
        return f"{path.name} is the VAE of Wan {found.vae}; {known.title} needs that of {known.vae}"
    if found.kind == "transformer" and known.name not in found.variants:
        return f"{path.name} is {VARIANTS[found.variant].title}, not {known.title}"
    return ""


def with_variant(model: ModelFiles) -> ModelFiles:
    """Return a model that knows what it is, if its file tells; a variant that is given stays."""
    if model.variant or model.main is None:
        return model
    found = recognise(model.main)
    if found is None or found.kind != "transformer":
        return model
    if found.expert == "high_noise" and model.transformer_high_noise is None:
        return replace(
            model, variant=found.variant, transformer=None, transformer_high_noise=model.main
        )
    return replace(model, variant=found.variant)


def name_problem(name: str, runs_dir: Path, path: Path | None = None) -> str:
    """Return why a run cannot be called so; "": it can.

    Args:
        name: of the run, its folder and its files.
        runs_dir: folder of the runs.
        path: file of the config; None: that of this name in `configs/`.
    """
    if not _NAME.fullmatch(name) or len(name) > NAME_LENGTH:
        return "a name has letters, digits, points, dashes and underscores, and begins with " + (
            "one of the first two"
        )
    path = config_path(name) if path is None else path
    if path.exists():
        return f"there is {path} already: take another name"
    if (runs_dir / name).exists():
        return f"there is a run {runs_dir / name} already: take another name"
    return ""


def config_path(name: str) -> Path:
    """Return the file that the config of a run is written to."""
    return CONFIGS / f"{name}.toml"


def suggested_name(goal: GoalChoice, data: Path, runs_dir: Path) -> str:
    """Return a name that is free, after the folder of the data."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", data.absolute().name).strip("-").lower()
    base = words if words and words not in ("clips", "images", "data", "videos") else ""
    base = base or (goal.name if goal.name != "images" else "look")
    name, number = base[:40], 2
    while name_problem(name, runs_dir):
        name, number = f"{base[:40]}-{number}", number + 1
        if number > 10_000:
            break
    return name


def suggested_steps(preset: Preset | None, num_items: int) -> int | None:
    """Return the steps that show each item as often as the preset means; None: the preset's own.

    Between a quarter and twice the preset's: fewer teach nothing, more items need less of each.
    """
    if preset is None or preset.head.data is None or num_items < 1:
        return None
    share = min(max(num_items / preset.head.data.num_items, 0.25), 2.0)
    steps = round(preset.max_steps * share / 50) * 50
    return None if steps == preset.max_steps else max(steps, 1)


def steps_words(preset: Preset | None, steps: int, num_items: int) -> str:
    """Say how often so many steps show each item."""
    if preset is None or num_items < 1:
        return ""
    per_step = min(int(preset.source.get("batch_size", 1)), num_items) * preset.head.num_gpus
    training = preset.values.get("training", {})
    per_step *= int(training.get("gradient_accumulation_steps", 1))
    views = steps * per_step / num_items
    words = f"{steps:,} steps show each of your {num_items} about {views:,.0f} times"
    if preset.head.data is not None:
        head = preset.head.data
        words += f"; {preset.max_steps:,} are meant for {head.num_items}, {head.views} times"
    return f"{words}."


def config_text(answers: Answers) -> str:
    """Return the config: every option explained, the preset's values and the answers set."""
    preset = demo_preset() if is_demo(answers.model) else answers.preset
    given: dict[str, dict[str, Any]] = {"model": _model_values(answers, preset)}
    kind = kind_for(answers.goal, answers.data)
    if kind is not None:
        given["dataset"] = source_values(preset, kind, written_path(answers.data.path))
    if answers.max_steps is not None:
        given["training"] = {"max_steps": answers.max_steps}
        own = preset.values if preset is not None else {}
        warmup = int(own.get("lr_schedule", {}).get("warmup_steps", 0))
        if warmup * 2 > answers.max_steps:
            given["lr_schedule"] = {"warmup_steps": answers.max_steps // _WARMUP_SHARE}
    if answers.goal.name == "full" and (preset is None or is_demo(answers.model)):
        given["adapter"] = {"kind": "none"}
        if preset is None:
            given["distributed"] = {"zero_stage": 2}
    if answers.samples:
        prompt: dict[str, Any] = {"prompt": answers.prompt}
        if answers.image is not None:
            prompt["image"] = written_path(answers.image)
        given["sampling"] = {"prompts": [prompt]}
    return render_config(answers.name, preset, given)


def _model_values(answers: Answers, preset: Preset | None) -> dict[str, Any]:
    model = answers.model
    values: dict[str, Any] = {"variant": model.variant} if model.variant else {}
    for field in FIELDS:
        path = getattr(model, field)
        if path is not None and (field in fields_of(model.variant)):
            values[field] = written_path(path)
    known = VARIANTS.get(model.variant)
    if preset is None and known is not None and known.experts:
        both = model.transformer is not None and model.transformer_high_noise is not None
        alone = "low_noise" if model.transformer is not None else "high_noise"
        # All weights of both cannot be trained at once.
        values["expert"] = "both" if both and answers.goal.name != "full" else alone
    return values


def written_path(path: Path) -> str:
    """Return a path as a config holds it: below the working folder it counts from there.

    That is the folder in which the commands are given, from which paths of a config count.
    """
    absolute = path.expanduser().absolute()
    try:
        return absolute.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return absolute.as_posix()


def save(answers: Answers, path: Path, *, force: bool = False) -> None:
    """Write the config.

    Raises:
        UserError: the file is there already.
        DiskError: it cannot be written.
    """
    if path.exists() and not force:
        raise UserError(f"{path} exists already", hint="take another name, or add --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, config_text(answers))


def new_command(answers: Answers, path: Path) -> list[str]:
    """Return the command line, without `menma`, that writes the same config."""
    model, argv = answers.model, ["new"]
    if is_demo(model):
        argv.append("--demo")
    else:
        for field in fields_of(model.variant):
            file = getattr(model, field)
            if file is not None:
                argv += [f"--{field.replace('_', '-')}", written_path(file)]
        argv += ["--variant", model.variant]
    argv += ["--goal", answers.goal.name, "--data", written_path(answers.data.path)]
    if not is_demo(model):
        argv += ["--preset", answers.preset.name if answers.preset is not None else "none"]
    if answers.max_steps is not None:
        argv += ["--steps", str(answers.max_steps)]
    if answers.prompt:
        argv += ["--prompt", answers.prompt]
    if answers.image is not None:
        argv += ["--image", written_path(answers.image)]
    argv += ["--name", answers.name]
    if path != config_path(answers.name):
        argv += ["-o", str(path)]
    return argv


def set_lines(text: str) -> list[str]:
    """Return the lines of a config that set something, without comments."""
    lines: list[str] = []
    header = ""
    for line in text.splitlines():
        if line.startswith("["):
            header = line
        elif line and not line.startswith("#"):
            if header:  # of a table that holds something
                lines += ["", header]
                header = ""
            lines.append(line)
    return lines


def goal_names() -> Sequence[str]:
    """Return the goals by name."""
    return tuple(GOALS)
