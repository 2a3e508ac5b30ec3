"""A dataset as the job `data_check` reports it, for screens: asked for, sorted, filtered."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.runs.ask import ask
from app.runs.child import Event
from trainer.contract.errors import RunError
from trainer.contract.files import write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRow:
    """One clip, image or line of a list."""

    source: int
    name: str
    path: Path
    used: bool
    validation: bool
    width: int | None
    height: int | None
    num_frames: int | None
    fps: float | None
    duration_s: float | None
    buckets: tuple[str, ...]
    caption: str | None
    caption_file: Path | None
    """Where the caption is or is looked for; None: in the line of a list."""
    caption_tokens: int | None
    problem: str
    """Why it cannot be used; empty: it can."""
    hint: str
    warnings: tuple[str, ...]
    edited: bool = False
    """Its caption was changed here after the dataset was looked at."""

    @property
    def state(self) -> str:
        """Say in a word how it is."""
        if self.edited:
            return "edited"
        if not self.used:
            return "left out"
        if self.warnings:
            return "warning"
        return "validation" if self.validation else "ok"

    @property
    def words(self) -> str:
        """What is wrong with it, on one line."""
        return self.problem or "; ".join(self.warnings)

    @property
    def order(self) -> tuple[int, int, str]:
        """Sort key: what is left out first, then what has warnings."""
        return (0 if not self.used else 1 if self.warnings else 2), self.source, self.name

    def with_caption(self, caption: str) -> ClipRow:
        """Return it with another caption, of which nobody knows the tokens."""
        return replace(self, caption=caption, caption_tokens=None, edited=True)


@dataclass(frozen=True, slots=True)
class DataReport:
    """The report of one config's dataset."""

    raw: Mapping[str, Any]
    """As the job wrote it: see `trainer.data.report`."""
    rows: tuple[ClipRow, ...]
    """Problems first."""

    def shown(self, words: str, problems_only: bool) -> list[ClipRow]:
        """Return the rows that have all of these words in name, state, bucket or caption."""
        wanted = words.casefold().split()
        return [
            row
            for row in self.rows
            if (not problems_only or row.words) and all(w in _text(row) for w in wanted)
        ]

    def replaced(self, row: ClipRow) -> DataReport:
        """Return the report with another row for the same clip, in its place."""
        rows = (row if (r.path, r.name) == (row.path, row.name) else r for r in self.rows)
        return DataReport(self.raw, tuple(rows))


def read_report(
    config: Path,
    *,
    decode: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> DataReport:
    """Let the trainer look at a config's dataset. Call it from a worker thread.

    Args:
        config: the config's file, as it is saved.
        decode: decode every frame that is trained on, too.
        on_progress: told of each clip that was looked at: how many, of how many, its name.
        cancelled: asked several times a second; ends the job.

    Raises:
        MenmaError: the config is wrong, or the job failed.
        Cancelled: `cancelled` said so.
    """

    def take(event: Event) -> None:
        if event["type"] == "phase" and isinstance(event.get("total"), int):
            on_progress(int(event["done"]), event["total"], str(event.get("detail") or ""))

    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        file = Path(folder) / "report.json"
        request = {"config": str(config), "output": str(file), "decode": decode}
        ask("data_check", request, take, cancelled)
        try:
            return parse_report(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"the report of {config} cannot be read: {error}") from error


def parse_report(raw: Mapping[str, Any]) -> DataReport:
    """Return a report with its clips as rows.

    Raises:
        KeyError: it lacks something.
    """
    return DataReport(raw, tuple(sorted(_rows(raw["clips"]), key=lambda row: row.order)))


def write_caption(row: ClipRow, caption: str) -> ClipRow:
    """Write a clip's caption file, in one step; return the row with it.

    Raises:
        DiskError: it cannot be written.
        ValueError: its caption is in a list.
    """
    if row.caption_file is None:
        raise ValueError(f"the caption of {row.name} is in a list")
    write_text(row.caption_file, caption.strip() + "\n")
    return row.with_caption(caption.strip())


def caption_text(row: ClipRow) -> str:
    """Return the caption as it is in its file now; empty: there is none.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    if row.caption_file is None or not row.caption_file.exists():
        return ""
    return row.caption_file.read_text(encoding="utf-8-sig")


def _rows(clips: Sequence[Mapping[str, Any]]) -> Iterable[ClipRow]:
    plain = (
        "source", "name", "used", "validation", "width", "height", "num_frames", "fps",
        "duration_s", "caption", "caption_tokens", "problem", "hint",
    )  # fmt: skip
    for clip in clips:
        file = clip["caption_file"]
        yield ClipRow(
            path=Path(clip["path"]),
            caption_file=None if file is None else Path(file),
            buckets=tuple(clip["buckets"]),
            warnings=tuple(clip["warnings"]),
            **{key: clip[key] for key in plain},
        )


def _text(row: ClipRow) -> str:
    parts = (str(row.path), row.name, row.state, *row.buckets, row.caption or "", row.words)
    return " ".join(parts).casefold()
