"""`menma sample`: generate videos and images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import completion, jobs, output
from app.cli import sample_output_options as files
from app.cli.loraid_options import (
    LoraidFrom,
    Loraids,
    LoraidStrengths,
    loraid_fields,
)
from app.cli.options import Json, Overrides, command_app
from app.cli.sample_guidance_options import (
    Calibrate,
    CFGApplyRatio,
    CFGBatch,
    CFGSkip,
    CFGZeroInitSteps,
    CFGZeroStar,
    GuidanceRescale,
    SLGEnd,
    SLGLayers,
    SLGMode,
    SLGScale,
    SLGStart,
    StepCacheFile,
    StepCacheMaxSkips,
    StepCacheName,
    StepCacheRetention,
    StepCacheStart,
    StepCacheThreshold,
    denoising_settings,
    refuse_calibration,
)
from app.cli.sample_help import SampleCommand
from app.cli.sample_lora_options import MergeLoras, SampleLoras, sample_lora
from app.cli.sample_sheet_options import (
    Columns,
    Interactive,
    MatrixFile,
    UseWildcards,
    Vary,
    WildcardsFolder,
    refuse_with_session,
    sheet_fields,
    sheet_folder,
    varies_prompts,
    wildcard_settings,
)
from app.cli.sample_start_options import (
    ControlImages,
    OneFrame,
    Schedule,
    Solver,
    Strength,
    Video,
    start_settings,
)
from trainer.contract.errors import ConfigError, Problem, UserError

if TYPE_CHECKING:
    from trainer.contract.config import RunConfig

app = command_app()


@app.command(cls=SampleCommand)
def sample(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="A config, or a run (its folder, or its name in runs/): then its newest LoRA is "
            "used.",
            show_default=False,
            autocompletion=completion.configs_or_runs,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What to show. Repeatable."),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file", help="Prompts in a .txt (musubi-tuner's flags), .toml or .json file."
        ),
    ] = None,
    loras: SampleLoras = None,
    merge_loras: MergeLoras = False,
    loraids: Loraids = None,
    loraid_strengths: LoraidStrengths = None,
    loraid_from: LoraidFrom = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="What not to show.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="Frames, 4n + 1; 1 makes an image.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Solver steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Classifier-free guidance; 1: off.")
    ] = None,
    guidance_high_noise: Annotated[
        float | None,
        typer.Option("--guidance-high-noise", help="Guidance of Wan 2.2's high-noise expert."),
    ] = None,
    cfg_skip_mode: CFGSkip = None,
    cfg_apply_ratio: CFGApplyRatio = None,
    cfg_zero_star: CFGZeroStar = None,
    cfg_zero_init_steps: CFGZeroInitSteps = None,
    guidance_rescale: GuidanceRescale = None,
    slg_layers: SLGLayers = None,
    slg_mode: SLGMode = None,
    slg_scale: SLGScale = None,
    slg_start: SLGStart = None,
    slg_end: SLGEnd = None,
    cfg_batch: CFGBatch = None,
    step_cache: StepCacheName = None,
    step_cache_threshold: StepCacheThreshold = None,
    step_cache_start: StepCacheStart = None,
    step_cache_max_skips: StepCacheMaxSkips = None,
    step_cache_retention: StepCacheRetention = None,
    step_cache_file: StepCacheFile = None,
    calibrate: Calibrate = False,
    shift: Annotated[
        float | None, typer.Option("--shift", help="Shift of the sigmas towards noise.")
    ] = None,
    solver: Solver = None,
    schedule: Schedule = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the first prompt; the next ones count on.")
    ] = None,
    fps: Annotated[int | None, typer.Option("--fps", help="Frames a second of the file.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="First frame, for image-to-video models.")
    ] = None,
    last_image: Annotated[
        Path | None, typer.Option("--last-image", help="Last frame, for first-last-frame models.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option("--control", help="Control video, for Fun-Control models.")
    ] = None,
    video: Video = None,
    strength: Strength = None,
    one_frame: OneFrame = None,
    control_images: ControlImages = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the results, or a file such as out/{prompt}_{seed}.mp4. "
            "Default: samples/, or the run's samples folder.",
        ),
    ] = None,
    format_: files.Format = None,
    quality: files.Quality = None,
    save_latents: files.SaveLatents = False,
    no_metadata: files.NoMetadata = False,
    force: files.Force = False,
    like: files.Like = None,
    decode: files.Decode = None,
    preview: files.Preview = None,
    vary: Vary = None,
    matrix: MatrixFile = None,
    columns: Columns = None,
    wildcards: UseWildcards = None,
    wildcards_folder: WildcardsFolder = None,
    interactive: Interactive = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Generate videos or images.

    The paths of the files come on stdout.
    Without --prompt and --prompts-file the prompts of the config are drawn.

    Example: menma sample runs/my-lora --prompt "a fish in the rain" --frames 33
    """
    from app.cli.subjects import config_and_run

    others = {"--prompt": prompts, "--prompts-file": prompts_file, "--lora": loras}
    config, run_dir = config_and_run(files.source_of(source, like, decode, others))
    settings = {
        "negative_prompt": negative_prompt, "width": width, "height": height,
        "num_frames": frames, "num_steps": steps, "guidance_scale": guidance,
        "guidance_scale_high_noise": guidance_high_noise,
        **denoising_settings(context.params),
        "flow_shift": shift, "solver": solver, "schedule": schedule, "seed": seed, "fps": fps,
        **files.overrides(format_, quality, save_latents=save_latents, no_metadata=no_metadata),
        **wildcard_settings(wildcards, wildcards_folder),
    }  # fmt: skip
    inputs = {"image": image, "last_image": last_image, "control": control, "video": video}
    of_prompts = start_settings(strength, one_frame, control_images)
    given = [*(overrides or ()), *_overrides(settings)]
    request: dict[str, Any] = {
        "config": str(config),
        "set": [*given, *files.preview_setting(preview, given)],
        "loras": [sample_lora(text) for text in loras or ()],
        "merge_loras": merge_loras,
        **loraid_fields(loraids, loraid_strengths, loraid_from),
        "prompts": _prompts(prompts or [], inputs, prompts_file, of_prompts, like),
        "prompts_file": _text(prompts_file),
        **files.fields(like, decode, force=force),
        "output": str(target or (run_dir / "samples" if run_dir else "samples")),
        "run_dir": _text(run_dir),
        "calibrate": calibrate,
    }
    sheet = sheet_fields(request, vary, matrix, columns)
    refuse_calibration(calibrate, is_sheet=bool(sheet), interactive=interactive)
    files.refuse_beside(interactive=interactive, sheet=bool(sheet), request=request)
    if interactive:
        refuse_with_session(request, sheet)
        _talk(config, request, as_json=as_json)
    elif sheet:
        request |= sheet | {"output": str(sheet_folder(request | sheet, target))}
        _check(config, request, needs_prompts=not varies_prompts(sheet))
        _make("sample_matrix", request, {"output"}, as_json=as_json)
    else:
        _say_duration(_check(config, request), request)
        _make("sample", request, {"output", "sample"}, as_json=as_json)


def _talk(config: Path, request: dict[str, Any], *, as_json: bool) -> None:
    from app.cli.sample_session import run_session

    _check(config, request, needs_prompts=False)
    run_session(request, as_json=as_json)


def _make(job: str, request: dict[str, Any], kinds: set[str], *, as_json: bool) -> None:
    """Run the job; write what it made to stdout: events of samples, or paths of some kinds."""
    result = jobs.run_or_leave(job, request)
    if as_json:
        output.json_data(result.all("sample"))
        return
    for event in (event for event in result.events if event["type"] in kinds):
        for key in ("path", "latents"):
            if key in event:
                output.data(str(event[key]))


def _overrides(settings: dict[str, Any]) -> list[str]:
    from app.domain.toml_text import toml_value

    return [
        f"sampling.{key}={toml_value(value)}"
        for key, value in settings.items()
        if value is not None
    ]


def _prompts(
    texts: list[str],
    inputs: dict[str, Path | None],
    prompts_file: Path | None,
    settings: dict[str, Any],
    like: Path | None,
) -> list[dict[str, Any]]:
    given: dict[str, Any] = {key: str(path) for key, path in inputs.items() if path is not None}
    given |= {key: value for key, value in settings.items() if value is not None}
    if given and like is not None:
        texts = texts or [""]  # those of the file
    if texts and prompts_file is not None:
        raise UserError("--prompt and --prompts-file at once", hint="give one of the two")
    if given and not texts:
        option = next(iter(given)).replace("_", "-")
        raise UserError(
            f"--{option} needs a --prompt", hint="in a prompts file, each prompt names its own"
        )
    found = [{"prompt": text, **given} for text in texts]
    for values in found:
        _refuse_wrong_values(values)
    return found


def _refuse_wrong_values(prompt: dict[str, Any]) -> None:
    """Refuse what no prompt may have, by the option that says it.

    Raises:
        ConfigError: a value is wrong.
    """
    from pydantic import ValidationError

    from trainer.contract.config import Prompt
    from trainer.contract.config_io import problems_of

    try:
        Prompt.model_validate(prompt)
    except ValidationError as error:
        raise ConfigError(
            problems=[
                Problem(found.message, f"--{found.key.replace('_', '-')}", hint=found.hint)
                for found in problems_of(error, Prompt)
            ]
        ) from None


def _check(config: Path, request: dict[str, Any], *, needs_prompts: bool = True) -> RunConfig:
    """Find what is wrong before torch is loaded; return the config."""
    from app.domain.complete import complete_config

    if request["decode"]:
        return complete_config(config, request["set"], "decode")
    loaded = complete_config(config, request["set"], "sample")
    has_prompts = request["like"] or loaded.sampling.prompts or loaded.sampling.prompts_file
    if needs_prompts and not (request["prompts"] or request["prompts_file"] or has_prompts):
        raise UserError("there is no prompt", hint='add --prompt "..." or --prompts-file FILE')
    return loaded


def _say_duration(config: RunConfig, request: dict[str, Any]) -> None:
    """Say how long it takes on this machine's GPU, where there is one and prompts are known."""
    if request["like"] or request["decode"]:
        return
    from app.domain.cards import sampling_here
    from app.render.estimates import sampling_line
    from trainer.contract.config import Prompt

    prompts = [Prompt.model_validate(values) for values in request["prompts"]]
    if not prompts and not (request["prompts_file"] or config.sampling.prompts_file):
        prompts = list(config.sampling.prompts)
    found = sampling_here(config, prompts)
    if found is not None:
        output.say(sampling_line(found.seconds, found.gpu, at_most=found.at_most))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
