"""`menma sample --decode`: files of latents to videos; only the VAE is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract.config import MAX_FPS, MAX_SEED, Prompt, RunConfig
from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.files import utf8
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.variants import Variant
from trainer.jobs.base import Emit
from trainer.jobs.build import pick_device
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import lazy_vae, settle_variant
from trainer.jobs.config_job import read_config
from trainer.jobs.sample_failures import in_phase
from trainer.jobs.sample_target import Target, file_options
from trainer.sampling.latent_files import SUFFIX, LatentFile, read_latents
from trainer.sampling.pipeline import decode_frames
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, require_formats, write_files

_TEXTS = "_te"
"""How the names of musubi-tuner's cached texts end."""


def run_decode(request: SampleJobRequest, source: Path, emit: Emit) -> None:
    """Decode a file of latents, or each one of a folder; each result is a `sample` event.

    Args:
        request: config, format and output.
        source: the file or folder.
        emit: told of what is done.

    Raises:
        ConfigError: the config is wrong, or an output is there already.
        DataError: there are no latents, or they are of another VAE.
        DiskError: a result cannot be written.
    """
    config = read_config(request, "decode")
    variant = settle_variant(config)
    options = _options(request, config)
    paths = latent_files(source)
    channels = variant.latent_channels
    # A folder may hold more than memory: all are checked first, and read again one by one.
    requests = [_request(path, read_latents(path, channels), config, variant) for path in paths]
    names = [path.stem for path in paths]
    target = Target(request.output, config.name, options, pattern="{name}")
    target.check(requests, names)
    require_formats(options, requests)
    device = pick_device(config)
    vae = lazy_vae(config, variant, device).load()
    size = config.memory.vae_tile
    report = progress_events(emit)
    for index, (wanted, name) in enumerate(zip(requests, names, strict=True)):
        file = read_latents(paths[index], channels)
        with in_phase("decode", str(paths[index])):
            frames = decode_frames(
                vae,
                file.latents_CFHW[None].to(device),
                tile=(size, size) if size else None,
                bits=options.writer(wanted.num_frames).bits,
            )
            path = write_files(
                target.path(index, wanted, name),
                frames,
                num_frames=wanted.num_frames,
                fps=wanted.fps,
                metadata=file.metadata if options.metadata else {},
                files=options,
            )
        emit("sample", path=str(path), prompt=wanted.prompt[:2000], seed=wanted.seed)
        report("decode", index + 1, len(paths))
    emit("end", reason="done", num_samples=len(paths))


def latent_files(source: Path) -> list[Path]:
    """Return the file, or those of a folder, by name; texts that musubi-tuner cached are not meant.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"there is no {source}")
    found = [path for path in sorted(source.glob(f"*{SUFFIX}")) if not path.stem.endswith(_TEXTS)]
    if not found:
        raise DataError(f"there is no file of latents (*{SUFFIX}) in {source}")
    return found


def _options(request: SampleJobRequest, config: RunConfig) -> FileOptions:
    sampling = config.sampling
    options = file_options(request.output, request.set, sampling, force=request.force)
    if options.format == "latents":
        raise ConfigError(
            "latents would be decoded to latents", hint="choose another --format, or ending"
        )
    return replace(options, save_latents=False)


def _request(path: Path, file: LatentFile, config: RunConfig, variant: Variant) -> SampleRequest:
    """Return what the file shows, as far as names and the player need it.

    Raises:
        DataError: it is of a size that no sample has.
    """
    _, frames, height, width = file.latents_CFHW.shape
    stride = variant.vae_stride
    told = file.metadata
    prompt, seed = told.get("prompt"), told.get("seed")
    values: dict[str, Any] = {
        "prompt": utf8(prompt).decode() if isinstance(prompt, str) else "",
        "seed": seed if isinstance(seed, int) and 0 <= seed < MAX_SEED else None,
        "num_frames": (frames - 1) * stride[0] + 1,
        "height": height * stride[1],
        "width": width * stride[2],
    }
    # The words are what they are, whatever looks like a wildcard in them.
    sampling = config.sampling.model_copy(update={"wildcards": False})
    try:
        request = SampleRequest.of(Prompt.model_validate(values), variant, sampling)
    except ValidationError as error:
        said = "; ".join(map(str, problems_of(error, Prompt)))
        raise DataError(f"{path}: its latents are of no sample: {said}") from None
    if config.sampling.fps is None and file.fps is not None:
        request = replace(request, fps=min(max(round(file.fps), 1), MAX_FPS))
    return request
