"""Takes what musubi-tuner has encoded already into the caches of a job, if it can be trusted.

A file is taken when its name and content fit the window (`trainer.data.musubi_cache`) and it is not
older than its clip. It does not say which VAE made it. So of each source the first file that fits
is compared with what our own encoder makes of the same frames: another VAE, latents that are not
normalised or a clip of the same name are far off, another resizing filter is not. Where the first
one is off, nothing of the source is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from trainer.contract.errors import DataError
from trainer.contract.variants import Variant
from trainer.data.latent_cache import EncodedWindow, LatentEntry
from trainer.data.media import probe
from trainer.data.musubi_cache import (
    ClipShape,
    cache_folders,
    difference,
    has_caches,
    latents_name,
    read_context,
    read_latents,
    text_name,
)
from trainer.data.plan import PlannedItem
from trainer.jobs.cache_sections import Work

MAX_DIFFERENCE = 0.5
"""Relative: resizing filters and bf16 make up to 0.2, latents without normalisation 1 and more."""
_CLOCK_S = 2.0
_MAX_LISTED = 20


@dataclass(slots=True)
class Adoption:
    """What was taken, and why something was not."""

    variant: Variant
    wanted: bool
    """Whether its files are looked at."""
    latents: int = 0
    """Windows taken."""
    captions: int = 0
    """Captions taken."""
    reasons: dict[Path, str] = field(default_factory=dict)
    """File that was not taken -> why."""
    missing: int = 0
    """Windows that have no file."""
    _trusted: dict[tuple[int, str], bool] = field(default_factory=dict)
    _shapes: dict[Path, ClipShape] = field(default_factory=dict)

    def window(
        self,
        work: Work,
        planned: PlannedItem,
        entry: LatentEntry,
        encode: Callable[[], EncodedWindow],
        mask: Callable[[], Tensor | None],
    ) -> EncodedWindow | None:
        """Return a window's latents from a file of musubi-tuner; None: it has to be encoded.

        Args:
            work: the source.
            planned: the clip.
            entry: the window.
            encode: makes them; asked once a source.
            mask: reads the window's mask, which musubi-tuner does not keep.
        """
        if self._trusted.get((id(work), "latents")) is False:
            return None
        path = self._file(work, latents_name(self._shape(planned), entry.window))
        if path is None:
            self.missing += 1
            return None
        try:
            _require_newer(path, planned.item.path)
            if planned.item.control is not None:
                _require_newer(path, planned.item.control)
            found = read_latents(
                path,
                entry.bucket,
                self.variant,
                work.settings.dtype,
                control_first_frame=work.plan.source.control_first_frame,
            )
            if (id(work), "latents") not in self._trusted:
                self._compare_window(work, found, encode())
            found = replace(found, mask_1FHW=mask())
        except DataError as error:
            self.reasons[path] = error.message
            return None
        self.latents += 1
        return found

    def context(self, work: Work, caption: str, encode: Callable[[], Tensor]) -> Tensor | None:
        """Return a caption's context from a file of musubi-tuner; None: it has to be encoded."""
        if self._trusted.get((id(work), "text")) is False:
            return None
        for planned in work.plan.items:
            if caption not in planned.item.captions:
                continue
            path = self._file(work, text_name(planned.item.path.stem))
            if path is None:
                continue
            try:
                found = read_context(path, caption, self.variant, work.settings.dtype)
                if (id(work), "text") not in self._trusted:
                    self._compare(work, "text", found, encode())
            except DataError as error:
                self.reasons[path] = error.message
                continue
            self.captions += 1
            return found
        return None

    def notes(self) -> list[str]:
        """Say what was not taken, and why."""
        listed = [f"{path} is not taken: {why}" for path, why in self.reasons.items()]
        more = len(listed) - _MAX_LISTED
        if more > 0:
            common = Counter(self.reasons.values()).most_common(3)
            words = "; ".join(f"{count} because {why}" for why, count in common)
            listed = [
                *listed[:_MAX_LISTED],
                f"and {more} more files are not taken; of all: {words}",
            ]
        if self.missing:
            listed.append(f"{self.missing} windows have no latents of musubi-tuner")
        return listed

    def _compare_window(self, work: Work, theirs: EncodedWindow, ours: EncodedWindow) -> None:
        self._compare(work, "latents", theirs.latents_CFHW, ours.latents_CFHW)
        if self.variant.conditioning == "control":
            assert theirs.extra_channels_CFHW is not None
            assert ours.extra_channels_CFHW is not None
            self._compare(work, "latents", theirs.extra_channels_CFHW, ours.extra_channels_CFHW)

    def _compare(self, work: Work, kind: str, theirs: Tensor, ours: Tensor) -> None:
        same = theirs.shape == ours.shape
        off = difference(theirs.cpu(), ours.cpu()) if same else float("inf")
        self._trusted[id(work), kind] = off <= MAX_DIFFERENCE
        if off > MAX_DIFFERENCE:
            what = f"it differs by {off:.0%}" if same else "it has another length"
            raise DataError(
                f"{what} from what this config's encoder makes of the same input, so nothing of "
                f"{work.plan.source.media_path} is taken: another model made it, or the clip has "
                "changed"
            )

    def _shape(self, planned: PlannedItem) -> ClipShape:
        item = planned.item
        if item.path not in self._shapes:
            info = probe(item.path, item.kind)
            self._shapes[item.path] = ClipShape(item.path.stem, item.kind, info.width, info.height)
        return self._shapes[item.path]

    @staticmethod
    def _file(work: Work, name: str) -> Path | None:
        folders = cache_folders(work.plan.source)
        return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _require_newer(path: Path, clip: Path) -> None:
    try:
        newest = max(
            (file.stat().st_mtime for file in (clip.iterdir() if clip.is_dir() else [clip])),
            default=0.0,
        )
        made = path.stat().st_mtime
    except OSError as error:
        raise DataError(f"it cannot be looked at: {error.strerror or error}") from None
    if newest > made + _CLOCK_S:
        raise DataError(f"{clip.name} has changed since it was made")


def unused_caches(works: list[Work]) -> list[str]:
    """Return a note for each source that has caches of musubi-tuner beside it."""
    return [
        f"{folder} holds caches of musubi-tuner: --from-musubi takes what fits of them"
        for work in works
        for folder in cache_folders(work.plan.source)
        if has_caches(folder)
    ]
