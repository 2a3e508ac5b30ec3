"""The job `sample`: from a config, prompts and LoRAs to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.contract.config import Prompt, RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.experts import SHARED, trained_experts
from trainer.contract.jobs import LoraidUse, SampleJobRequest
from trainer.contract.lora_use import LoRAUse
from trainer.contract.prompts import read_prompts
from trainer.contract.run_dir import RunDir
from trainer.contract.variants import Expert, Variant
from trainer.io.mapped_load import open_weights
from trainer.jobs.automatic_memory import clip_of, resolve_for_forwards
from trainer.jobs.base import Emit
from trainer.jobs.build import freeze, load_base, pick_device
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import (
    lazy_image_encoder,
    lazy_text_encoder,
    lazy_vae,
    settle_variant,
)
from trainer.jobs.config_job import read_config
from trainer.jobs.loraid_files import is_of_slots, resolve_loraids
from trainer.jobs.merge_weights import Rounding
from trainer.jobs.sample import Sample, SampleLoaders, SampleOptions, run_sample
from trainer.jobs.sample_lora_checks import check_loras, check_merge
from trainer.jobs.sample_loras import OnMerge
from trainer.sampling.requests import requests_of

TransformerFiles = dict[Expert, Path]


def run(request: SampleJobRequest, emit: Emit) -> None:
    """Sample; each finished file is a `sample` event.

    Raises:
        MenmaError: see `sample.run_sample`.
    """
    config = read_config(request, "sample")
    variant = settle_variant(config)
    prompts = prompts_of(request, config)
    device = pick_device(config)
    requests = requests_of(prompts, variant, config.sampling)
    clips = [clip_of(request) for request in requests]
    config = resolve_for_forwards(config, variant, device, clips, emit)
    files = transformer_files(config, variant)
    loras = loras_of(request, config, variant, files)
    for note in check_loras(loras, variant, files):
        emit("warning", message=note)
    if request.merge_loras:
        check_merge(loras, requests, config)
    tile = config.memory.vae_tile

    def on_sample(sample: Sample) -> None:
        emit(
            "sample",
            path=str(sample.path),
            prompt=sample.request.prompt[:2000],
            seed=sample.request.seed,
        )

    samples = run_sample(
        requests,
        variant,
        loaders_of(config, variant, files, device),
        request.output,
        SampleOptions(
            name=config.name,
            loras=tuple(loras),
            merge_loras=request.merge_loras,
            on_merge=merge_events(emit),
            device=device,
            tile=(tile, tile) if tile else None,
            progress=progress_events(emit),
            on_sample=on_sample,
            on_failure=lambda words: emit("warning", message=words),
        ),
    )
    emit("end", reason="done", num_samples=len(samples))


def loras_of(
    request: SampleJobRequest,
    config: RunConfig,
    variant: Variant,
    files: TransformerFiles,
    *,
    use_run: bool = True,
) -> list[LoRAUse]:
    """Return the LoRAs of a request: named, by their slots, and the newest of its run.

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
    loras: list[LoRAUse] = [*request.loras, *slots]
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
    config: RunConfig, variant: Variant, files: TransformerFiles, device: torch.device
) -> SampleLoaders:
    """Return how to load the models of a config; what is no such model is refused now.

    Raises:
        ConfigError: one is not given.
        ModelFileError: one cannot be read, or is another model.
    """
    image_encoder = lazy_image_encoder(config, device)

    def transformer(expert: Expert) -> torch.nn.Module:
        return freeze(load_base(config, files[expert], expert=expert, device=device))

    return SampleLoaders(
        text_encoder=lazy_text_encoder(config, device).load,
        transformer=transformer,
        vae=lazy_vae(config, variant, device).load,
        image_encoder=None if image_encoder is None else image_encoder.load,
    )
