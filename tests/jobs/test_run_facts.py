"""What is read of a run directory about its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.contract.run_dir import RunDir
from trainer.jobs.run_facts import training_facts


def write_run(folder: Path, events: list[tuple[float, str, dict[str, Any]]]) -> RunDir:
    lines = [
        json.dumps({"v": 1, "time": time, "type": kind, **fields}) for time, kind, fields in events
    ]
    run = RunDir(folder)
    run.events.write_text("".join(line + "\n" for line in lines))
    return run


SESSIONS: list[tuple[float, str, dict[str, Any]]] = [
    (100.0, "phase", {"name": "load"}),
    (110.0, "phase", {"name": "train"}),
    (112.0, "step", {"step": 1, "rss_gib": 3.0, "peak_vram_gib": 7.0}),
    (115.0, "checkpoint", {"step": 1}),
    # Killed, and started again an hour later.
    (3700.0, "phase", {"name": "load"}),
    (3720.0, "log", {"message": "resumed"}),
    (3730.0, "phase", {"name": "train"}),
    (3740.0, "step", {"step": 2, "rss_gib": 2.0, "peak_vram_gib": 6.0}),
    (3741.0, "output", {"path": "/elsewhere/a-step2.safetensors"}),
    (3751.0, "step", {"step": 3, "rss_gib": 9.0, "peak_vram_gib": 9.0}),
    (3752.0, "output", {"path": "/elsewhere/a.safetensors"}),
    (3753.0, "end", {"reason": "done"}),
]


def test_time_is_that_of_the_sessions_and_ends_with_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path, SESSIONS)
    early = training_facts(run, tmp_path / "output/a-step2.safetensors")
    assert early.seconds == pytest.approx(5 + 11)
    assert (early.peak_vram_gib, early.peak_rss_gib) == (7.0, 3.0)
    final = training_facts(run, tmp_path / "output/a.safetensors")
    assert final.seconds == pytest.approx(5 + 22)
    unknown = training_facts(run, tmp_path / "output/renamed.safetensors")
    assert unknown.seconds == pytest.approx(5 + 23)


def test_measured_peaks_count_too(tmp_path: Path) -> None:
    run = write_run(tmp_path, SESSIONS[:4])
    run.peaks.write_text(json.dumps({"peak_rss_gib": 4.5}))
    facts = training_facts(run, tmp_path / "a.safetensors")
    assert (facts.peak_vram_gib, facts.peak_rss_gib) == (7.0, 4.5)


@pytest.mark.parametrize("peaks", [None, "not json", "[1]", '{"peak_rss_gib": "much"}'])
def test_what_is_not_there_is_not_invented(tmp_path: Path, peaks: str | None) -> None:
    run = RunDir(tmp_path)
    if peaks is not None:
        run.peaks.write_text(peaks)
    facts = training_facts(run, tmp_path / "a.safetensors")
    assert (facts.seconds, facts.peak_vram_gib, facts.peak_rss_gib) == (None, None, None)
