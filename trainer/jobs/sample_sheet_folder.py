"""The folder of a sheet: its samples, what is drawn and not decoded yet, its page and picture."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer.contract.config import RunConfig
from trainer.contract.errors import DataError
from trainer.contract.files import in_bytes, write_text
from trainer.contract.variants import Expert, Variant
from trainer.data.fingerprint import digest, identify, model_identity
from trainer.jobs.sample_loras import described
from trainer.jobs.sample_metadata import acting_loras
from trainer.jobs.sample_settings import decoding_settings, drawing_settings
from trainer.jobs.sample_write import Decode, write_drawn
from trainer.sampling.grid import Grid, GridCell, is_drawable, write_grid
from trainer.sampling.latent_files import SUFFIX, LatentFile, read_latents, write_latents
from trainer.sampling.matrix import Cell, Sheet, short
from trainer.sampling.page import Page, PageCell, page_html
from trainer.sampling.results import FileOptions, describe, describe_file, latents_beside
from trainer.sampling.video_io import read_frames

FRAMES_PER_CELL = 3
"""Of a video on the contact sheet: the first, the last and what is between them."""
_PAGE_EVERY_S = 10.0
_HIDDEN = frozenset({"lora_strengths", "name"})
"""What is told of a sample by other means."""


@dataclass(frozen=True, slots=True)
class SheetFacts:
    """What holds for all samples."""

    title: str
    variant: str
    drawing: Mapping[str, Any]
    """What shapes latents and is not in a request: identities of models, and settings."""
    encoding: Mapping[str, Any]
    """What shapes those that start from images and videos, in addition."""
    decoding: Mapping[str, Any]
    """What shapes the frames that latents become."""
    step_caches: Mapping[tuple[Path, ...], str]
    """`Cell.base` -> identity of what step caches know of these transformers."""
    files: FileOptions
    """What kind of file a sample is."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        variant: Variant,
        files: Mapping[Expert, Path],
        step_caches: Mapping[tuple[Path, ...], str],
    ) -> SheetFacts:
        """Return the facts of a config; a sample that is made anew takes the place of the old one.

        Raises:
            ModelFileError: a model cannot be read.
        """
        model, decoding = config.model, decoding_settings(config)

        def identities(*paths: Path | None) -> list[str | None]:
            return [None if path is None else model_identity(path) for path in paths]

        frozen = [one.path for one in config.adapter.frozen]
        vae = identities(model.vae)
        return cls(
            title=config.name,
            variant=variant.name,
            drawing={
                "variant": variant.name,
                "models": identities(*files.values(), model.text_encoder, model.tokenizer, *frozen),
                "weight_format": config.memory.weight_format,
                **drawing_settings(config, variant),
            },
            encoding={
                "models": [*vae, *identities(model.image_encoder)],
                "vae_dtype": config.memory.vae_dtype,  # of the image encoder, too
            },
            decoding={"vae": vae, **decoding},
            step_caches=step_caches,
            files=FileOptions.of(config.sampling, force=True),
        )


class SheetFolder:
    """Knows each cell by everything that shapes its sample, so that none is made twice.

    Attributes:
        page: the HTML page.
        contact_sheet: the picture of all samples.
        describe_file: tells name and content of a file; each is read once.
    """

    def __init__(self, root: Path, sheet: Sheet, facts: SheetFacts) -> None:
        """Look which samples are there.

        Raises:
            ModelFileError: a LoRA or a checkpoint cannot be read.
            DataError: a folder of images cannot be read.
        """
        self.describe_file = cache(describe_file)
        self.page = root / "index.html"
        self.contact_sheet = root / "sheet.png"
        self._root = root
        self._sheet = sheet
        self._facts = facts
        self._told = {
            cell.place: describe(cell.request, describe_file=self.describe_file)
            for cell in sheet.cells
        }
        identity_of = cache(model_identity)
        content_of = cache(lambda path: identify(path).content)
        self._drawn = {
            cell.place: self._drawn_identity(cell, identity_of, content_of) for cell in sheet.cells
        }
        self._files = {
            path.name.rpartition("-")[2].partition(".")[0]: path
            for path in sorted((root / "cells").glob("*-*"))
            if path.suffix != SUFFIX and not path.name.startswith(".")
        }
        self._page_due = 0.0

    def identity(self, cell: Cell) -> str:
        """Return what two cells have in common whose samples are the same."""
        files = self._facts.files
        entry = files.entry(cell.request.num_frames)
        kind = [entry.name, files.quality if entry.has_quality else None, files.metadata]
        return _short(self._drawn[cell.place], self._facts.decoding, kind)

    def missing(self) -> list[Cell]:
        """Return the cells that lack a file, each sample once."""
        found = {self.identity(cell): cell for cell in reversed(self._sheet.cells)}
        missing = [cell for identity, cell in found.items() if not self._is_whole(identity)]
        return sorted(missing, key=lambda cell: cell.place)

    def latents(self, cell: Cell) -> Path:
        """Return where the latents of a cell wait for being decoded."""
        return self._root / "latents" / f"{self._drawn[cell.place]}.safetensors"

    def keep_latents(self, cell: Cell, latents_BCFHW: Tensor, metadata: Mapping[str, Any]) -> None:
        """Write the latents of a cell, and what made them.

        Raises:
            DiskError: disk full or read-only.
        """
        path = self.latents(cell)
        write_latents(path, latents_BCFHW[0], metadata, fps=cell.request.fps)

    def read_latents(self, cell: Cell) -> LatentFile:
        """Return what `keep_latents` has written.

        Raises:
            DataError: it is damaged, and removed, so that the next start draws it anew.
        """
        try:
            return read_latents(self.latents(cell))
        except DataError:
            self.latents(cell).unlink(missing_ok=True)
            raise

    def write(
        self, cell: Cell, drawn: LatentFile, decode: Decode, metadata: Mapping[str, Any]
    ) -> tuple[Path, Path | None]:
        """Write the sample of a cell; the latents that have waited are not needed any more.

        Args:
            cell: the sample's.
            drawn: from `read_latents`.
            decode: makes frames of them.
            metadata: what made the sample.

        Returns:
            The file, and that of the latents beside it where they are wanted.

        Raises:
            DiskError: disk full or read-only.
        """
        request, files = cell.request, self._facts.files
        name = f"{self._slug(cell)}-{self.identity(cell)}{files.suffix(request.num_frames)}"
        path = write_drawn(
            self._files.get(self.identity(cell), self._root / "cells" / name),
            request,
            drawn.latents_CFHW[None],
            decode=decode,
            files=files,
            metadata=metadata,
        )
        self._files[self.identity(cell)] = path
        self.latents(cell).unlink(missing_ok=True)
        with suppress(OSError):  # others wait in it
            self.latents(cell).parent.rmdir()
        return path, latents_beside(path) if files.save_latents else None

    def write_page_now_and_then(self, failures: Mapping[str, str]) -> None:
        """Write the page, unless that was a moment ago."""
        if time.monotonic() >= self._page_due:
            self.write_page(failures)
            self._page_due = time.monotonic() + _PAGE_EVERY_S

    def write_page(self, failures: Mapping[str, str]) -> None:
        """Write the HTML page: samples, failures (by identity), and what is not made yet.

        Raises:
            DiskError: disk full or read-only.
        """
        sheet = self._sheet
        page = Page(
            title=self._facts.title,
            fixed=self._fixed(),
            axes=[(axis.name, axis.labels) for axis in sheet.axes],
            row_axes=sheet.row_axes,
            columns=sheet.columns,
            rows=[[self._page_cell(cell, failures) for cell in row] for _, row in sheet.rows()],
        )
        write_text(self.page, page_html(page))

    def write_contact_sheet(self, failures: Mapping[str, str]) -> None:
        """Write the picture of all samples.

        Raises:
            DiskError: disk full or read-only.
        """
        sheet = self._sheet
        rows = [
            (self._row_heading(cells[0]), [self._grid_cell(cell, failures) for cell in cells])
            for _, cells in sheet.rows()
        ]
        column = sheet.axes[sheet.columns]
        first = sheet.cells[0].request
        columns = [_heading(column.name, label) for label in column.labels]
        grid = Grid(
            title=self._facts.title,
            note=" · ".join(f"{key} {text}" for key, text in self._fixed() if is_drawable(text)),
            corner=" · ".join(sheet.axes[axis].name for axis in sheet.row_axes),
            columns=columns if len(columns) > 1 else [""],
            rows=rows,
            aspect=(first.width, first.height),
        )
        write_grid(self.contact_sheet, grid)

    def _is_whole(self, identity: str) -> bool:
        path = self._files.get(identity)
        if path is None:
            return False
        return not self._facts.files.save_latents or latents_beside(path).exists()

    def _drawn_identity(
        self,
        cell: Cell,
        identity_of: Callable[[Path], str],
        content_of: Callable[[Path], str],
    ) -> str:
        """Return what two cells have in common whose latents are the same."""
        request = {k: v for k, v in self._told[cell.place].items() if k not in _HIDDEN}
        loras = [
            [identity_of(use.path), described(use)]
            for use in acting_loras(cell.request, self._sheet.loras)
        ]
        base = [identity_of(path) for path in cell.base]
        # Files are known by their content already, folders by their name alone.
        folders = [content_of(path) for path in cell.request.files.values() if path.is_dir()]
        request = json.loads(json.dumps(request, default=str))
        facts = self._facts
        encoding = facts.encoding if cell.request.files else None
        has_step_cache = cell.request.denoising.step_cache != "none"
        step_cache = facts.step_caches[cell.base] if has_step_cache else None
        return _short(request, loras, base, folders, facts.drawing, encoding, step_cache)

    def _loras(self, cell: Cell) -> list[dict[str, Any]]:
        return [described(use) for use in acting_loras(cell.request, self._sheet.loras)]

    def _slug(self, cell: Cell) -> str:
        parts = [
            f"{self._sheet.axes[axis].name}-{self._sheet.label(cell, axis)[:24]}"
            for axis in self._sheet.varied
        ]
        slug = re.sub(r"[^\w.+-]+", "_", "_".join(parts))
        return in_bytes(slug, 100).strip("_.") or "sample"

    def _fixed(self) -> list[tuple[str, str]]:
        told = list(self._told.values())
        first = told[0]
        same = [
            (key, short(_plain(value)))
            for key, value in first.items()
            if key not in _HIDDEN and value != "" and all(one.get(key) == value for one in told)
        ]
        return [("model", self._facts.variant), *same]

    def _page_cell(self, cell: Cell, failures: Mapping[str, str]) -> PageCell:
        identity = self.identity(cell)
        path = self._files.get(identity)
        told = self._told[cell.place].items()
        lines = [f"{k}: {_plain(v)}" for k, v in told if k not in _HIDDEN and v != ""]
        lines += [f"lora: {one['file']}, strength {one['strength']:g}" for one in self._loras(cell)]
        lines += [f"base: {base.name}" for base in cell.base]
        if path and path.is_dir():  # of frames, which a page does not play
            lines.insert(0, f"the first of {cell.request.num_frames} frames in {path.name}/")
            path = min(path.glob("*.png"))
        return PageCell(
            cell.place,
            file=path.relative_to(self._root).as_posix() if path else "",
            failure="" if path else failures.get(identity, ""),
            details="\n".join(lines),
        )

    def _grid_cell(self, cell: Cell, failures: Mapping[str, str]) -> GridCell:
        path = self._files.get(self.identity(cell))
        if path is None:
            failure = failures.get(self.identity(cell))
            words = "not made yet" if failure is None else f"failed: {failure}"
            return GridCell(words=words, failed=failure is not None)
        frames = list(read_frames(path))
        num = min(FRAMES_PER_CELL, len(frames))
        chosen = np.linspace(0, len(frames) - 1, num).round().astype(int)
        return GridCell(frames=[frames[index].copy() for index in chosen])

    def _row_heading(self, cell: Cell) -> str:
        sheet = self._sheet
        return "\n".join(
            _heading(sheet.axes[axis].name, sheet.label(cell, axis)) for axis in sheet.row_axes
        )


def _short(*parts: Any) -> str:
    return digest(parts)[:12]


def _heading(key: str, label: str) -> str:
    return label if key == "prompt" else f"{key} {label}"


def _plain(value: Any) -> str:
    """Return a value in words; of equal ones, such as the guidance of both experts, one."""
    if isinstance(value, list | tuple):
        return " ".join(dict.fromkeys(map(_plain, value)))
    if isinstance(value, Mapping) and "file" in value:
        return str(value["file"])
    return f"{value:g}" if isinstance(value, float) else f"{value}"
