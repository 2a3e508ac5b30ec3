"""Samples during training, by the model that is being trained."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from trainer.contract.config import RunConfig
from trainer.contract.errors import NonFiniteError
from trainer.contract.prompts import read_prompts
from trainer.contract.variants import Expert, Variant
from trainer.engine.process_group import World
from trainer.jobs.build import freeze, load_base
from trainer.jobs.components import lazy_image_encoder, lazy_vae
from trainer.jobs.sample_metadata import model_metadata
from trainer.jobs.sample_preview import Previews
from trainer.jobs.sample_run import transformer_files
from trainer.jobs.step_cache_values import step_cache_values
from trainer.jobs.text_recall import prompt_encoder
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import WanVAE
from trainer.sampling.conditions import Conditions, encode_files, encode_texts
from trainer.sampling.inputs import check_inputs
from trainer.sampling.pipeline import SamplingModels, decode_frames, generate
from trainer.sampling.requests import SampleRequest, requests_of
from trainer.sampling.results import FileOptions, FinishedSample, require_formats, write_sample


class TrainingSamples:
    """Makes the samples of a run.

    Prompts and images are encoded once, before the transformer is loaded, and their encoders are
    let go; the VAE waits in RAM between samples. With weights sharded by ZeRO-3 every rank takes
    part in every forward; else the prompts are dealt out to the ranks. Ranks that share clips make
    a sample together, too, and the first of them decodes it.
    """

    def __init__(
        self,
        config: RunConfig,
        variant: Variant,
        world: World,
        folder: Path,
        warn: Callable[[str], None],
        previews: Previews | None = None,
    ) -> None:
        """Read and encode the prompts.

        Args:
            config: with prompts in `[sampling]`.
            variant: the model.
            world: this process's place.
            folder: of the results.
            warn: told of what goes wrong with a sample.
            previews: draws what is in work; one rank needs to.

        Raises:
            ConfigError: a prompt does not fit the model, or an encoder is missing.
        """
        sampling = config.sampling
        prompts = sampling.prompts
        if sampling.prompts_file is not None:
            prompts = read_prompts(sampling.prompts_file)
        self._config = config
        self._variant = variant
        self._world = world
        self._folder = folder
        self._warn = warn
        self._previews = previews
        self._requests = requests_of(prompts, variant, sampling)
        self._step_cache = step_cache_values(
            config, variant, lambda: transformer_files(config, variant), self._requests
        )
        notes = check_inputs(self._requests, multiple=variant.pixel_multiple)
        for note in notes if world.rank == 0 else ():
            warn(f"samples: {note}")
        self._together = config.distributed.zero_stage == 3
        self._trained: Callable[[Expert], WanTransformer | None] | None = None
        self._other: nn.Module | None = None
        self._metadata = model_metadata(config, variant, _transformers(config), self._step_cache)
        require_formats(FileOptions.of(sampling), self._requests)
        self._encode()

    def use(self, trained: Callable[[Expert], WanTransformer | None]) -> None:
        """Sample with what `trained` returns; of an expert that it has not, with the base."""
        self._trained = trained

    def __call__(self, step: int) -> Sequence[FinishedSample]:
        """Make the samples of `step`; return those of all ranks. A collective call."""
        world = self._world
        mine = [
            (index, request)
            for index, request in enumerate(self._requests)
            if self._together or index % world.data_size == world.data_rank
        ]
        collective = self._together or world.sequence is not None
        latents: list[tuple[int, SampleRequest, torch.Tensor]] = []
        failed: list[str] = []
        for index, request in mine:
            with self._preview(index, failed, collective=collective):
                latents.append((index, request, self._generate(step, index, request)))
        if self._other is not None:
            self._other.to("cpu")
        written: list[tuple[int, Path]] = []
        if world.rank == 0 or (world.counts and not self._together):
            written = self._write(step, latents, failed)
        # Ranks that sample together have met the same failures.
        for line in dict.fromkeys(self._lines_of_all_ranks(failed)):
            self._warn(f"step {step}, {line}")
        named = self._lines_of_all_ranks([f"{index:06d} {path.name}" for index, path in written])
        return [self._finished(*line.split(" ", 1)) for line in sorted(named)]

    def _finished(self, index: str, name: str) -> FinishedSample:
        request = self._requests[int(index)]
        return FinishedSample(self._folder / name, request.prompt, request.seed)

    def _lines_of_all_ranks(self, lines: Sequence[str]) -> list[str]:
        texts = self._world.gather_texts("\n".join(lines))
        return [line for text in texts for line in text.splitlines()]

    @contextmanager
    def _preview(self, index: int, failed: list[str], *, collective: bool) -> Iterator[None]:
        """Note what goes wrong with one sample: a preview must not end the training."""
        try:
            yield
        except NonFiniteError as error:
            failed.append(f"sample {index} was not made: {' '.join(error.message.split())}")
        except torch.OutOfMemoryError:
            if collective:  # the other ranks already wait in the next layer
                raise
            failed.append(
                f"sample {index} was not made: out of memory. To use less: smaller width, height "
                "or num_frames in [sampling], or memory.vae_tile"
            )
        if failed and self._world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _write(
        self,
        step: int,
        latents: Sequence[tuple[int, SampleRequest, torch.Tensor]],
        failed: list[str],
    ) -> list[tuple[int, Path]]:
        vae = self._vae.to(self._world.device)
        tile = self._config.memory.vae_tile
        files = FileOptions.of(self._config.sampling)
        written: list[tuple[int, Path]] = []
        for index, request, result in latents:
            with self._preview(index, failed, collective=False):
                path = write_sample(
                    self._folder,
                    f"step{step:08d}_{index:02d}",
                    request,
                    decode_frames(
                        vae,
                        result,
                        tile=(tile, tile) if tile else None,
                        bits=files.writer(request.num_frames).bits,
                    ),
                    metadata=self._metadata | {"step": step},
                    files=files,
                    latents_BCFHW=result,
                )
                written.append((index, path))
        self._vae.to("cpu")
        return written

    def _generate(self, step: int, index: int, request: SampleRequest) -> torch.Tensor:
        models = SamplingModels(
            variant=self._variant,
            transformer=self._expert,
            contexts=self._contexts,
            device=self._world.device,
            step_cache=self._step_cache,
        )
        conditions = self._conditions[index].to(self._world.device)
        if self._previews is None:
            return generate(models, request, conditions=conditions)
        on_estimate = self._previews(index, request, step=step)
        return generate(models, request, conditions=conditions, on_estimate=on_estimate)

    def _expert(self, expert: Expert) -> nn.Module:
        if self._trained is None:
            raise RuntimeError("call use() first")
        trained = self._trained(expert)
        if trained is not None:
            return trained
        if self._other is None:
            self._other = freeze(self._load_other(expert))
        return self._other.to(self._world.device)

    def _load_other(self, expert: Expert) -> nn.Module:
        model = self._config.model
        path = model.transformer_high_noise if expert == "high_noise" else model.transformer
        if path is None:
            raise RuntimeError("checked with the config")
        other = load_base(self._config, path, expert=expert, device=self._world.device)
        if self._world.sequence is not None:
            other.share_tokens(self._world.sequence)
        return other

    def _encode(self) -> None:
        device = self._world.device
        text_encoder = prompt_encoder(self._config, device)
        self._contexts = encode_texts(text_encoder, self._requests)
        del text_encoder
        self._vae: WanVAE = lazy_vae(self._config, self._variant, device).load()
        lazy = lazy_image_encoder(self._config, device)
        sees_pictures = any(
            request.image or request.control or request.control_images for request in self._requests
        )
        image_encoder = lazy.load() if lazy is not None and sees_pictures else None
        self._conditions: list[Conditions] = [
            encode_files(request, self._variant, self._vae, image_encoder, device).to("cpu")
            for request in self._requests
        ]
        self._vae.to("cpu")
        del image_encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _transformers(config: RunConfig) -> dict[Expert, Path]:
    model = config.model
    given: dict[Expert, Path | None] = {
        "low_noise": model.transformer,
        "high_noise": model.transformer_high_noise,
    }
    return {expert: path for expert, path in given.items() if path is not None}
