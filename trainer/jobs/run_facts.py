"""What a run directory tells about its training: how long, how much memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.events import EventReader
from trainer.contract.run_dir import RunDir

Event = Mapping[str, Any]
_WORK = frozenset({"step", "checkpoint", "sample", "output", "validation", "end"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """Figures of a training as far as its run directory has them."""

    seconds: float | None
    """Wall time of the steps of all sessions, samples and checkpoints between them included;
    loading is not."""
    peak_vram_gib: float | None
    peak_rss_gib: float | None


def training_facts(run: RunDir, output: Path) -> TrainingFacts:
    """Return what `run` says about the training that ended in the file `output`.

    Steps that were made after that file was written do not count.
    """
    events = _until_output(EventReader(run.events).read(), output)
    measured = _read_peaks(run.peaks)
    return TrainingFacts(
        seconds=_seconds(events),
        peak_vram_gib=_largest(events, "peak_vram_gib", measured.get("peak_vram_gib")),
        peak_rss_gib=_largest(events, "rss_gib", measured.get("peak_rss_gib")),
    )


def _until_output(events: Iterable[Event], output: Path) -> list[Event]:
    """Return the events up to the last one that announces `output`; all, when none does."""
    kept = list(events)
    # By name: a run directory may have been moved since.
    ends = [
        place
        for place, event in enumerate(kept)
        if event["type"] == "output" and Path(str(event.get("path", ""))).name == output.name
    ]
    return kept[: ends[-1] + 1] if ends else kept


def _seconds(events: Sequence[Event]) -> float | None:
    """Add up the sessions: each goes from the beginning of its steps to its last sign of work."""
    total, started, last = 0.0, None, 0.0
    for event in events:
        moment = event.get("time")
        if not isinstance(moment, int | float):
            continue
        if event["type"] == "phase" and event.get("name") == "train":
            total += 0.0 if started is None else last - started
            started = last = moment
        elif event["type"] in _WORK:
            last = moment
    return None if started is None else round(total + last - started, 3)


def _largest(events: Sequence[Event], key: str, measured: object) -> float | None:
    found = [event.get(key) for event in events if event["type"] == "step"]
    return max((v for v in (*found, measured) if isinstance(v, int | float)), default=None)


def _read_peaks(path: Path) -> Mapping[str, object]:
    """Return the measured peaks; none where the file is missing or is not what a run writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
