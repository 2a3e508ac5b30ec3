"""`menma new`: write a commented config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import completion, output
from app.cli.options import RunsDir, command_app
from trainer.contract.errors import UserError
from trainer.contract.files import write_text

if TYPE_CHECKING:
    from app.domain.wizard import Answers

app = command_app()
_File = Path | None


@app.command()
def new(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            help="Preset to start from; see `menma presets list`. With --goal: left out, the best "
            "one for model, goal and GPU; `none`: Menma's defaults.",
            autocompletion=completion.presets,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, `-` for stdout. Default: configs/<name>.toml; without --goal "
            "configs/<preset>.toml, or configs/my-lora.toml without a preset.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    goal: Annotated[
        str | None,
        typer.Option(
            "--goal",
            help="What is learned: character, style, motion, images, full.",
            autocompletion=completion.goals,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of clips or images with captions.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Train the tiny model that comes with Menma.")
    ] = False,
    variant: Annotated[
        str,
        typer.Option(
            "--variant",
            help="Which model it is; left out: told from the file.",
            autocompletion=completion.variants,
        ),
    ] = "",
    transformer: Annotated[
        _File, typer.Option("--transformer", help="Weights. Wan 2.2: the low-noise expert.")
    ] = None,
    transformer_high_noise: Annotated[
        _File, typer.Option("--transformer-high-noise", help="Wan 2.2: the high-noise expert.")
    ] = None,
    vae: Annotated[
        _File, typer.Option("--vae", help="VAE; left out, as all below: looked for.")
    ] = None,
    text_encoder: Annotated[_File, typer.Option("--text-encoder", help="umT5-XXL.")] = None,
    image_encoder: Annotated[
        _File, typer.Option("--image-encoder", help="CLIP ViT-H, for Wan 2.1 image to video.")
    ] = None,
    tokenizer: Annotated[_File, typer.Option("--tokenizer", help="umT5's tokenizer.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="GPU to choose a preset for, e.g. 4090.")
    ] = None,
    vram: Annotated[
        float | None, typer.Option("--vram", metavar="GIB", min=1, help="Or its memory.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many of them.")] = 1,
    name: Annotated[str, typer.Option("--name", help="Name of the run.")] = "",
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Training steps; left out: for as much data as it is."),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="Of the sample at the end.")] = "",
    image: Annotated[
        _File, typer.Option("--image", help="First frame of the sample, for image to video.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a config with every option explained.

    With --goal it is filled in as the wizard of the app does: model, data, preset, steps, sample.

    Example: menma new --preset wan2.1-t2v-1.3b-lora -o configs/my-lora.toml

    Example: menma new --demo --goal motion --data clips --name fish
    """
    if goal is None:
        given = {"--data": data, "--demo": demo, "--variant": variant, "--transformer": transformer,
                 "--transformer-high-noise": transformer_high_noise, "--vae": vae,
                 "--text-encoder": text_encoder, "--image-encoder": image_encoder,
                 "--tokenizer": tokenizer, "--gpu": gpu, "--vram": vram, "--name": name,
                 "--steps": steps, "--prompt": prompt, "--image": image}  # fmt: skip
        if lost := [option for option, value in given.items() if value]:
            raise UserError(f"{lost[0]} needs --goal", hint="such as --goal character")
        _from_preset(preset, target, force=force)
        return
    from app.domain.new_config import Wanted, answers_of
    from app.domain.weight_search import ModelFiles

    answers = answers_of(
        Wanted(
            goal=goal, data=data, demo=demo, preset=preset, name=name, max_steps=steps,
            prompt=prompt, image=image, gpu=gpu, vram_gib=vram, num_gpus=gpus, runs_dir=runs_dir,
            model=ModelFiles(
                variant=variant, transformer=transformer,
                transformer_high_noise=transformer_high_noise, vae=vae, text_encoder=text_encoder,
                tokenizer=tokenizer, image_encoder=image_encoder,
            ),
        ),
        target, force=force,
    )  # fmt: skip
    _write(answers, target, force=force)


def _from_preset(preset: str | None, target: Path | None, *, force: bool) -> None:
    """Write a config whose files and data are to be put in by hand."""
    from app.domain.presets import usable_preset
    from app.domain.template import render_config

    chosen = usable_preset(preset) if preset else None
    if target is None:
        target = Path("configs") / f"{chosen.name if chosen else 'my-lora'}.toml"
    text = render_config(_run_name(target), chosen)
    if str(target) == "-":
        output.data(text.rstrip("\n"))
        return
    if target.exists() and not force:
        raise UserError(
            f"{target} exists already", hint="choose another file with -o, or add --force"
        )
    write_text(target, text)
    output.data(str(target))
    output.say("Put in the paths of your model files and clips, then:")
    output.say(f"  menma check {target}")


def _write(answers: Answers, target: Path | None, *, force: bool) -> None:
    """Write a config that is filled in, and say how it is started."""
    from app.domain.wizard import config_path, config_text, save

    path = config_path(answers.name) if target is None else target
    if str(path) == "-":
        output.data(config_text(answers).rstrip("\n"))
        return
    save(answers, path, force=force)
    output.data(str(path))
    if answers.preset is not None:
        output.say(f"From preset {answers.preset.name}: {answers.preset.title}.")
    output.say("Look at it, then start:")
    output.say(f"  menma check {path}")
    output.say(f"  menma queue chain {path} --steps {','.join(answers.steps)}")


def _run_name(target: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", target.stem).strip("._-")
    return name[:100] or "my-lora"
