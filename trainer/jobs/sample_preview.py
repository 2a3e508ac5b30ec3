"""Previews of a sample in work: a small picture in a file, and an event that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from trainer.contract.config import RunConfig
from trainer.contract.errors import DiskError
from trainer.contract.variants import Variant
from trainer.io.mapped_load import open_weights
from trainer.jobs.base import Emit
from trainer.jobs.components import component, lazy_vae
from trainer.models.wan.vae_config import VAE_21, VAE_22
from trainer.models.wan.vae_keys import recognise_vae
from trainer.sampling.preview import PUBLISHED, Projection, fit_projection, write_strip
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import walk_of


@dataclass(frozen=True, slots=True)
class Previews:
    """Writes a picture every few steps, from the first on; the last step is the sample itself."""

    projection: Projection
    folder: Path
    every_steps: int
    emit: Emit

    def __call__(
        self, index: int, request: SampleRequest, **fields: Any
    ) -> Callable[[int, Tensor], None]:
        """Return what one sample's clean estimates are given to.

        Args:
            index: place of the sample; its picture is replaced by the next one of its own.
            request: what is made.
            fields: what else the events say.
        """

        total = walk_of(request).num_steps
        fields = {"prompt": request.prompt[:2000], "seed": request.seed, **fields}
        fails = False

        def on_estimate(done: int, estimate_BCFHW: Tensor) -> None:
            nonlocal fails
            if fails or (done - 1) % self.every_steps or done == total:
                return
            path = self.folder / f"preview_{index:02d}.png"
            try:
                write_strip(path, self.projection, estimate_BCFHW[0])
            except DiskError as error:  # it is no reason to lose the sample
                fails = True
                self.emit("warning", message=f"no more previews of sample {index}: {error.message}")
                return
            self.emit("preview", path=str(path), index=index, done=done, total=total, **fields)

        return on_estimate


def previews(
    config: RunConfig, variant: Variant, device: torch.device, folder: Path, emit: Emit
) -> Previews | None:
    """Return what makes the previews that `sampling.preview_every_steps` asks for; None: none.

    Raises:
        ConfigError: no VAE is given, or that of other variants.
        ModelFileError: it cannot be read.
    """
    every_steps = config.sampling.preview_every_steps
    if not every_steps:
        return None
    return Previews(projection_for(config, variant, device), folder, every_steps, emit)


@contextmanager
def passing_previews(
    config: RunConfig, variant: Variant, device: torch.device, emit: Emit, *, wanted: bool = True
) -> Iterator[Previews | None]:
    """Make previews in a folder that goes at the end: pictures of work are nobody's results.

    Raises:
        ConfigError: no VAE is given, or that of other variants.
        ModelFileError: it cannot be read.
    """
    with TemporaryDirectory(prefix="menma-preview-") as folder:
        yield previews(config, variant, device, Path(folder), emit) if wanted else None


def projection_for(config: RunConfig, variant: Variant, device: torch.device) -> Projection:
    """Return the published projection of a released VAE; of another one a fitted one."""
    shape = recognise_vae(open_weights(component(config, "vae"))).config
    if shape in {VAE_21, VAE_22}:
        return PUBLISHED[shape.version]
    vae = lazy_vae(config, variant, device).load()  # of another size: small, or trained for itself
    return fit_projection(vae, shape.stride, device)
