"""The job `sample`: from a config, prompts and LoRAs to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.attention.sequence import SequenceGroup
from trainer.contract.config import Prompt, RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.experts import SHARED, trained_experts
from trainer.contract.jobs import LoraidUse, SampleJobRequest
from trainer.contract.lora_use import LoRAUse
from trainer.contract.prompts import read_prompts
from trainer.contract.run_dir import RunDir
from trainer.contract.variants import Expert, Variant
from trainer.engine import process_group
from trainer.engine.failures import failing_together
from trainer.engine.process_group import World
from trainer.engine.sequence import sharing_clips
from trainer.io.mapped_load import open_weights
from trainer.jobs.automatic_memory import resolve_for_forwards, working_set_of
from trainer.jobs.base import Emit, explain
from trainer.jobs.build import freeze, load_base, pick_device
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import (
    lazy_image_encoder,
    lazy_vae,
    settle_variant,
)
from trainer.jobs.config_job import read_config
from trainer.jobs.loraid_files import is_of_slots, resolve_loraids
from trainer.jobs.merge_weights import Rounding
from trainer.jobs.sample import Sample, SampleLoaders, SampleOptions, run_sample
from trainer.jobs.sample_decode import run_decode
from trainer.jobs.sample_like import remade
from trainer.jobs.sample_lora_checks import check_compiled, check_loras, check_merge
from trainer.jobs.sample_loras import OnMerge
from trainer.jobs.sample_metadata import differences, model_metadata
from trainer.jobs.sample_preview import passing_previews
from trainer.jobs.sample_ranks import (
    SampleRanks,
    in_words,
    num_sampling_processes,
    run_in_processes,
)
from trainer.jobs.sample_target import Target, file_options
from trainer.jobs.step_cache_values import (
    requests_to_calibrate,
    step_cache_values,
    write_measured,
)
from trainer.jobs.text_recall import prompt_encoder
from trainer.sampling.inputs import check_inputs
from trainer.sampling.requests import SampleRequest, requests_of
from trainer.sampling.results import FileOptions, require_formats
from trainer.sampling.step_cache.recorder import Recorder
from trainer.sampling.step_cache.values import StepCacheValues

TransformerFiles = dict[Expert, Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be made, all checked; nothing is loaded."""

    config: RunConfig
    variant: Variant
    requests: tuple[SampleRequest, ...]
    files: TransformerFiles
    loras: tuple[LoRAUse, ...]
    notes: tuple[str, ...]
    input_notes: tuple[str, ...]
    file_options: FileOptions
    metadata: Mapping[str, Any]
    """What each file says of the models."""
    step_cache: StepCacheValues


def run(request: SampleJobRequest, emit: Emit) -> None:
    """Sample; each finished file is a `sample` event.

    Raises:
        MenmaError: see `sample.run_sample`.
    """
    if request.decode is not None:
        run_decode(request, request.decode, emit)
        return
    plan = _plan(request)
    distributed = plan.config.distributed
    if not process_group.in_group():
        processes = 1  # a calibration is of all steps of all prompts, seen by one process
        if not request.calibrate:
            processes = num_sampling_processes(plan.config, len(plan.requests))
        if processes > 1:
            run_in_processes(processes)
            return
        _make(request, plan, World.alone(pick_device(plan.config)), emit)
        return
    device = pick_device(plan.config)
    with (
        process_group.joined(device.type, distributed.timeout_s) as place,
        failing_together(place, explain),
    ):
        world = sharing_clips(place, distributed.sequence_parallel, distributed.timeout_s)
        _make(request, plan, world, emit)


def _plan(request: SampleJobRequest) -> _Plan:
    again = remade(request)
    request = again.request
    config = read_config(request, "sample")
    variant = settle_variant(config)
    requests = requests_of(prompts_of(request, config), variant, config.sampling)
    input_notes = check_inputs(requests, multiple=variant.pixel_multiple)
    files = transformer_files(config, variant)
    loras = loras_of(request, config, variant, files)
    notes = check_loras(loras, variant, files)
    if request.merge_loras:
        check_merge(loras, requests, config)
    else:
        check_compiled(loras, requests, variant, config)
    options = file_options(request.output, request.set, config.sampling, force=request.force)
    names = [one.name or config.name for one in requests]
    Target(request.output, config.name, options).check(requests, names)
    require_formats(options, requests)
    step_cache = StepCacheValues()
    if not request.calibrate:  # which measures without one
        step_cache = step_cache_values(config, variant, lambda: files, requests)
    metadata = model_metadata(config, variant, files, step_cache)
    return _Plan(
        config=config,
        variant=variant,
        requests=requests,
        files=files,
        loras=tuple(loras),
        notes=(*again.warnings, *differences(again.made, metadata), *notes),
        input_notes=(*again.logs, *input_notes),
        file_options=options,
        metadata=metadata,
        step_cache=step_cache,
    )


def _make(request: SampleJobRequest, plan: _Plan, world: World, emit: Emit) -> None:
    """Make this process's samples, and wait for those of the others."""
    ranks = SampleRanks(world, emit, progress_events(emit))
    for note in plan.notes:
        ranks.emit_first("warning", message=note)
    for note in plan.input_notes:
        ranks.emit_first("log", message=note)
    config = _resolved(plan, world, ranks.emit_first)
    tile = config.memory.vae_tile
    requests, recorder = plan.requests, None
    if request.calibrate:
        requests, recorder = requests_to_calibrate(requests), Recorder()

    samples: list[Sample] = []
    try:
        with passing_previews(
            config, plan.variant, world.device, ranks.emit, wanted=ranks.part.writes
        ) as drawn:
            samples = run_sample(
                requests,
                plan.variant,
                loaders_of(config, plan.variant, plan.files, world.device, world.sequence),
                request.output,
                SampleOptions(
                    name=config.name,
                    files=plan.file_options,
                    metadata=plan.metadata,
                    loras=plan.loras,
                    merge_loras=request.merge_loras,
                    on_merge=merge_events(ranks.emit_first),
                    part=ranks.part,
                    device=world.device,
                    tile=(tile, tile) if tile else None,
                    progress=ranks.progress,
                    on_sample=lambda sample: ranks.emit("sample", **sample_fields(sample)),
                    step_cache=plan.step_cache,
                    observer=recorder,
                    preview=drawn,
                    on_failure=lambda words: ranks.emit("warning", message=words),
                    on_kept=lambda kept: ranks.emit("warning", message=kept.words()[:8000]),
                ),
            )
    except BaseException as error:
        if world.sequence is None:  # else others may wait for this one in the middle of a layer
            ranks.end(samples, requests, in_words(error, explain))
        raise
    samples = ranks.end(samples, requests)
    if recorder is not None:
        path = write_measured(recorder, requests, config, plan.variant, plan.files)
        emit("output", path=str(path), what="calibration of step caches")
    _end(samples, ranks)


def _end(samples: Sequence[Sample], ranks: SampleRanks) -> None:
    """Say what was made, and what a step cache has spared."""
    passes = _evaluations(samples)
    if spared := passes["reused_evaluations"]:
        whole = spared + passes["evaluations"]
        ranks.emit_first("log", message=f"the step cache spared {spared} of {whole} evaluations")
    ranks.emit_first("end", reason="done", num_samples=len(samples), **passes)


def _resolved(plan: _Plan, world: World, emit: Emit) -> RunConfig:
    """Return the config with values in the place of `auto`."""
    shared = 1 if world.sequence is None else world.sequence.size
    return resolve_for_forwards(
        plan.config,
        plan.variant,
        world.device,
        [working_set_of(one, plan.variant, ranks=shared) for one in plan.requests],
        emit,
        processes=world.world_size,
    )


def sample_fields(sample: Sample) -> dict[str, Any]:
    """Return what an event says of a written sample."""
    request = sample.request
    fields = {"path": str(sample.path), "prompt": request.prompt[:2000], "seed": request.seed}
    beside = {} if sample.latents is None else {"latents": str(sample.latents)}
    return {**fields, "evaluations": asdict(sample.evaluations), **beside}


def _evaluations(samples: Sequence[Sample]) -> dict[str, int]:
    """Return how many passes through the blocks there were, and how many a cache spared."""
    return {
        "evaluations": sum(sample.evaluations.computed for sample in samples),
        "reused_evaluations": sum(sample.evaluations.reused for sample in samples),
    }


def loras_of(
    request: SampleJobRequest,
    config: RunConfig,
    variant: Variant,
    files: TransformerFiles,
    *,
    use_run: bool = True,
) -> list[LoRAUse]:
    """Return the LoRAs of the config, of a request, of its slots, and the newest of its run.

    Args:
        request: names them.
        config: of the run, too.
        variant: the model.
        files: gets the newest transformers of a run that is a full fine-tune.
        use_run: False: leave the run's newest output out.

    Raises:
        ConfigError: a slot has no file, or the run has no output yet.
    """
    slots = resolve_loraids(request.loraids, request.loraid_from, both_experts=variant.experts)
    loras: list[LoRAUse] = [*config.sampling.loras, *request.loras, *slots]
    if use_run and request.run_dir is not None:
        _use_run(request.run_dir, config, files, loras, request.loraids)
    return loras


def transformer_files(config: RunConfig, variant: Variant) -> TransformerFiles:
    """Return the weight files that sampling needs; one-transformer models have `low_noise`.

    Raises:
        ConfigError: one is not given.
    """
    model = config.model
    given = {"low_noise": model.transformer, "high_noise": model.transformer_high_noise}
    wanted: tuple[Expert, ...] = ("low_noise", "high_noise") if variant.experts else ("low_noise",)
    files: TransformerFiles = {}
    for expert in wanted:
        path = given[expert]
        if path is None:
            field = "transformer" if expert == "low_noise" else "transformer_high_noise"
            raise ConfigError(
                f"sampling {variant.name} needs model.{field}", hint="set it in the config"
            )
        files[expert] = path
    return files


def newest_output(run: RunDir, expert: Expert | None = None) -> Path | None:
    """Return the output file that a run wrote last; None: it has none yet.

    Args:
        run: the run.
        expert: of a run that trains both: the one it is for, by what the files say of themselves.
    """
    outputs = run.output.glob("*.safetensors")
    newest_first = sorted(outputs, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if expert is None:
        return next(iter(newest_first), None)
    fitting = {None, expert, SHARED}
    return next(
        (
            path
            for path in newest_first
            if open_weights(path).metadata.get("menma.expert") in fitting
        ),
        None,
    )


def newest_outputs(run: RunDir, config: RunConfig) -> dict[Expert | None, Path]:
    """Return the output files to use of a run, the newest for each transformer that it trains.

    Args:
        run: the run.
        config: tells what it trains.

    Returns:
        One file under the expert it is for; under None where it is for all that the model has.
        Empty where there is none yet.
    """
    experts: tuple[Expert | None, ...] = (None,)
    if config.model.expert != SHARED:
        experts = trained_experts(config) or experts
    found = {expert: newest_output(run, expert) for expert in experts}
    return {expert: path for expert, path in found.items() if path is not None}


def merge_events(emit: Emit) -> OnMerge:
    """Return a callback that says what merging into the weights' precision has cost."""

    def on_merge(expert: Expert, rounding: Rounding) -> None:
        emit(
            "log",
            message=f"LoRAs merged into the {expert.replace('_', '-')} transformer: rounding moves "
            f"its weights by {100 * rounding.of_update:.2g} % of what was added",
            expert=expert,
            rounding=rounding.fields(),
        )
        if rounding.warning():
            emit("warning", message=rounding.warning() + "; without --merge nothing is rounded")

    return on_merge


def prompts_of(request: SampleJobRequest, config: RunConfig) -> tuple[Prompt, ...]:
    """Return the prompts of a request, else those of the config.

    Raises:
        ConfigError: there is none, or there are two lists of them.
    """
    if request.prompts and request.prompts_file is not None:
        raise ConfigError("prompts and a prompt file at once", hint="give one of the two")
    if request.prompts:
        return request.prompts
    if file := request.prompts_file or config.sampling.prompts_file:
        return read_prompts(file)
    if not config.sampling.prompts:
        raise ConfigError("there is no prompt", hint="add [[sampling.prompts]] to the config")
    return config.sampling.prompts


def _use_run(
    folder: Path,
    config: RunConfig,
    files: TransformerFiles,
    loras: list[LoRAUse],
    slots: Sequence[LoraidUse],
) -> None:
    """Put the newest output of a run to use: as a LoRA, or in the place of what it fine-tuned.

    A LoRA of one of `slots` is in use already, or switched off, as was asked for.
    """
    newest = newest_outputs(RunDir(folder), config)
    if not newest:
        raise ConfigError(
            f"{folder} has no output file yet", hint="wait for its first one, or sample the config"
        )
    for expert, path in newest.items():
        if config.adapter.kind == "none":
            files[expert or "low_noise"] = path
        elif not is_of_slots(path, slots):
            loras.append(LoRAUse(path=path, expert=expert))


def loaders_of(
    config: RunConfig,
    variant: Variant,
    files: TransformerFiles,
    device: torch.device,
    shared: SequenceGroup | None = None,
) -> SampleLoaders:
    """Return how to load the models of a config; what is no such model is refused now.

    Args:
        config: says how.
        variant: the model.
        files: the transformers' weights.
        device: where they work.
        shared: processes that make each video together.

    Raises:
        ConfigError: one is not given.
        ModelFileError: one cannot be read, or is another model.
    """
    image_encoder = lazy_image_encoder(config, device)

    def transformer(expert: Expert) -> torch.nn.Module:
        loaded = load_base(config, files[expert], expert=expert, device=device)
        if shared is not None:
            loaded.share_tokens(shared)
        return freeze(loaded)

    return SampleLoaders(
        text_encoder=lambda: prompt_encoder(config, device),
        transformer=transformer,
        vae=lazy_vae(config, variant, device).load,
        image_encoder=None if image_encoder is None else image_encoder.load,
    )
