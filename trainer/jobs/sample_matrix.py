"""The job `sample_matrix`: a sheet of samples, each made once, however often it is started."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.contract.config import Prompt, RunConfig
from trainer.contract.errors import ConfigError, DiskError, RunError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.jobs import SampleMatrixRequest
from trainer.contract.sample_formats import require_in_browsers
from trainer.contract.variants import Expert, Variant
from trainer.contract.vary import CHECKPOINT, PROMPT, Axis, check_axes
from trainer.io.mapped_load import open_weights
from trainer.jobs.automatic_memory import resolve_for_forwards, working_set_of
from trainer.jobs.base import Emit, explain
from trainer.jobs.build import freeze, load_base, pick_device
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import settle_variant, text_encoder_device
from trainer.jobs.config_job import read_config
from trainer.jobs.lora_files import is_transformer
from trainer.jobs.sample import Sample
from trainer.jobs.sample_failures import in_phase
from trainer.jobs.sample_lora_checks import check_loras
from trainer.jobs.sample_metadata import model_metadata, sample_metadata
from trainer.jobs.sample_run import (
    TransformerFiles,
    loaders_of,
    loras_of,
    prompts_of,
    sample_fields,
    transformer_files,
)
from trainer.jobs.sample_settings import step_cache_identity
from trainer.jobs.sample_sheet_folder import SheetFacts, SheetFolder
from trainer.jobs.sample_studio import Studio, StudioOptions
from trainer.jobs.sample_target import check_no_fields
from trainer.jobs.step_cache_values import step_cache_values
from trainer.sampling.inputs import check_inputs
from trainer.sampling.matrix import Cell, Sheet, build_sheet
from trainer.sampling.pipeline import Evaluations
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, require_formats
from trainer.sampling.schedule import walk_of
from trainer.sampling.step_cache.values import StepCacheValues

_OF_DECODING = ("settings", "vae")
"""Keys of a sample's metadata that tell how its latents became frames; the rest is of drawing."""


def run(request: SampleMatrixRequest, emit: Emit) -> None:
    """Make what is missing of a sheet; write its page and its contact sheet.

    What was drawn is kept on the disk until it is decoded: a stopped job goes on where it was. A
    sample that fails is shown as failed, and the others are made.

    Raises:
        ConfigError: the sheet, or one of its samples, is not possible; before anything is loaded.
        RunError: a sample failed; after all others were made.
        MenmaError: no sample can be made, or nothing can be written.
    """
    if request.merge_loras or request.calibrate:
        raise ConfigError("a sheet merges no LoRAs and calibrates nothing", hint="do it without")
    check_no_fields(request.output)
    config = read_config(request, "sample")
    variant = settle_variant(config)
    prompts, axes = _prompts_and_axes(request, config)
    check_axes(axes, len(prompts))
    files = transformer_files(config, variant)
    use_run = not any(axis.key == CHECKPOINT for axis in axes)
    loras = loras_of(request, config, variant, files, use_run=use_run)
    sheet = build_sheet(
        prompts, axes, loras, variant, config.sampling,
        is_transformer=is_transformer, columns=request.columns,
    )  # fmt: skip
    for note in check_loras(sheet.loras, variant, files):
        emit("warning", message=note)
    cells = [cell.request for cell in sheet.cells]
    _check_formats(FileOptions.of(config.sampling), cells)
    for note in check_inputs(cells, multiple=variant.pixel_multiple, place="samples"):
        emit("log", message=note)
    device = pick_device(config)
    forwards = list({working_set_of(cell.request, variant): None for cell in sheet.cells})
    config = resolve_for_forwards(config, variant, device, forwards, emit)
    bases = _bases(config, variant, files, sheet.cells)
    step_caches = {base: step_cache_identity(of.step_cache) for base, of in bases.items()}
    facts = SheetFacts.of(config, variant, files, step_caches)
    folder = SheetFolder(request.output, sheet, facts)
    missing = folder.missing()
    made = len(sheet.cells) - len(missing)
    emit("log", message=f"{len(sheet.cells)} samples" + (f", {made} are there" if made else ""))
    tile = config.memory.vae_tile
    options = StudioOptions(
        loras=sheet.loras,
        device=device,
        text_device=text_encoder_device(config, device),
        tile=(tile, tile) if tile else None,
        warn=lambda words: emit("warning", message=words),
    )
    studio = Studio(variant, loaders_of(config, variant, files, device), options)
    making = _Making(config, device, sheet, folder, studio, bases, emit)
    try:
        making.draw(missing)
        making.decode(missing)
    finally:
        folder.write_page(making.failures)
    folder.write_contact_sheet(making.failures)
    emit("output", path=str(folder.contact_sheet))
    emit("output", path=str(folder.page))
    making.end(len(sheet.cells))


def _prompts_and_axes(
    request: SampleMatrixRequest, config: RunConfig
) -> tuple[Sequence[Prompt], list[Axis]]:
    """Return the prompts, and the axes beside them."""
    texts = next((axis.values for axis in request.axes if axis.key == PROMPT), None)
    if texts is None:
        return prompts_of(request, config), list(request.axes)
    if request.prompts or request.prompts_file is not None:
        raise ConfigError("prompts are given and varied", hint="give one of the two")
    prompts = [Prompt(prompt=str(text)) for text in texts]
    return prompts, [axis for axis in request.axes if axis.key != PROMPT]


def _check_formats(files: FileOptions, requests: Sequence[SampleRequest]) -> None:
    """Refuse what a page cannot show, or this machine cannot write."""
    for num_frames in {request.num_frames for request in requests}:
        require_in_browsers(files.entry(num_frames))
    require_formats(files, requests)


@dataclass(frozen=True, slots=True)
class _Base:
    """The transformers of some cells, and what step caches know of them."""

    files: TransformerFiles
    step_cache: StepCacheValues
    metadata: Mapping[str, Any]
    """What a sample's file says of the models."""

    @classmethod
    def of(
        cls,
        base: tuple[Path, ...],
        config: RunConfig,
        variant: Variant,
        files: TransformerFiles,
        cells: Sequence[Cell],
    ) -> _Base:
        own = dict(files)
        for path in base:
            own[_expert_of(path) if variant.experts else "low_noise"] = path
        requests = [cell.request for cell in cells if cell.base == base]
        step_cache = step_cache_values(config, variant, lambda: own, requests)
        return cls(own, step_cache, model_metadata(config, variant, own, step_cache))


def _bases(
    config: RunConfig, variant: Variant, files: TransformerFiles, cells: Sequence[Cell]
) -> dict[tuple[Path, ...], _Base]:
    """Return the transformers that cells have, by `Cell.base`."""
    return {
        base: _Base.of(base, config, variant, files, cells)
        for base in dict.fromkeys(cell.base for cell in cells)
    }


def _expert_of(path: Path) -> Expert:
    said = open_weights(path).metadata.get("menma.expert")
    for expert in EXPERTS:
        if expert in {said, *re.findall("high_noise|low_noise", path.name)}:
            return expert
    raise ConfigError(f"{path} does not say which expert it is", hint="name it …_high_noise")


@dataclass(slots=True)
class _Making:
    """The samples of one start of the job."""

    config: RunConfig
    device: torch.device
    sheet: Sheet
    folder: SheetFolder
    studio: Studio
    bases: Mapping[tuple[Path, ...], _Base]
    emit: Emit
    failures: dict[str, str] = field(default_factory=dict)
    """Identity of a cell -> what went wrong."""

    def draw(self, cells: Sequence[Cell]) -> None:
        """Draw what is not drawn yet, one base model after the other."""
        cells = [cell for cell in cells if not self.folder.latents(cell).exists()]
        if not cells:
            return
        progress = progress_events(self.emit)
        progress("texts", 0, 1)
        self.studio.encode_texts([cell.request for cell in cells])
        for cell in cells:
            with self._failure_of(cell):
                self.studio.encode_files(cell.request)
        cells = [cell for cell in cells if self.folder.identity(cell) not in self.failures]
        total, done = sum(walk_of(cell.request).num_steps for cell in cells), 0
        base: tuple[Path, ...] = ()
        # Stable: one load for each base, and the order of the sheet within it.
        for number, cell in enumerate(sorted(cells, key=lambda cell: cell.base), start=1):
            words = f"sample {number} of {len(cells)}"

            def on_step(step: int, _steps: int, done: int = done, words: str = words) -> None:
                progress("steps", done + step, total, words)

            with self._failure_of(cell):
                if cell.base != base:
                    base = cell.base
                    self.studio.change_base(self._loader(base))
                latents = self.studio.draw(cell.request, on_step, self.bases[base].step_cache)
                self.folder.keep_latents(cell, latents, self._metadata(cell))
            done += walk_of(cell.request).num_steps
        self.studio.change_base(None)

    def decode(self, cells: Sequence[Cell]) -> None:
        """Decode what is drawn; the page shows it soon after."""
        drawn = [cell for cell in cells if self.folder.latents(cell).exists()]
        if not drawn:
            return
        progress = progress_events(self.emit)
        with self.studio.decoding() as decode:
            for number, cell in enumerate(drawn, start=1):
                with self._failure_of(cell), in_phase("decode"):
                    latents = self.folder.read_latents(cell)
                    # The VAE's settings may be others than when the latents were drawn.
                    now = self.bases[cell.base].metadata
                    changed = {key: now[key] for key in _OF_DECODING if key in now}
                    told = {**latents.metadata, **changed}
                    path, beside = self.folder.write(cell, latents, decode, told)
                    evaluations = Evaluations(**latents.metadata["evaluations"])
                    sample = Sample(path, cell.request, evaluations, latents=beside)
                    self.emit("sample", **sample_fields(sample))
                progress("decode", number, len(drawn))
                self.folder.write_page_now_and_then(self.failures)

    def end(self, num_cells: int) -> None:
        """Say how it went.

        Raises:
            RunError: a sample failed.
        """
        if self.failures:
            first = next(iter(self.failures.values()))
            raise RunError(
                f"{len(self.failures)} of {num_cells} samples failed, the first: {first}",
                hint=f"see {self.folder.page}; the same command tries these again",
            )
        self.emit("end", reason="done", num_samples=num_cells, page=str(self.folder.page))

    def _metadata(self, cell: Cell) -> dict[str, Any]:
        """Return what the file of the sample that was drawn last says."""
        return sample_metadata(
            cell.request,
            self.sheet.loras,
            self.studio.evaluations,
            self.bases[cell.base].metadata,
            describe_file=self.folder.describe_file,
        )

    def _loader(self, base: tuple[Path, ...]) -> Callable[[Expert], nn.Module]:
        files = self.bases[base].files

        def load(expert: Expert) -> nn.Module:
            path = files[expert]
            return freeze(load_base(self.config, path, expert=expert, device=self.device))

        return load

    @contextmanager
    def _failure_of(self, cell: Cell) -> Iterator[None]:
        """Note what goes wrong with one sample, and go on; a full disk would fail all others."""
        try:
            yield
        except DiskError:
            raise
        except Exception as error:
            known = explain(error)
            if known is None:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what memory ran out for
            words = ". ".join(filter(None, (known.message, known.hint)))
            self.failures[self.folder.identity(cell)] = words
            self.emit("warning", message=f"a sample failed: {words}"[:8000])
