"""The validation curve of a run, read from its log."""

from __future__ import annotations

from pathlib import Path

from app.runs.validation import curve_words, validation_curve
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir


def test_the_curve_holds_the_last_figure_of_each_step_and_words_name_the_best(tmp_path: Path):
    run = RunDir(tmp_path)
    assert validation_curve(run) == []
    assert curve_words([]) == ""
    emit = EventWriter(run.events)
    for step, loss in ((0, 0.5), (2, 0.3), (4, 9.0), (2, 0.2), (4, 0.4)):  # resumed from step 2
        emit("step", step=step, loss=1.0)
        emit("validation", step=step, loss=loss, by_timestep={"100": loss}, items=1)
    emit("validation", step=6, loss=float("nan"), by_timestep={}, items=1)
    curve = validation_curve(run)
    assert [(point.step, point.loss) for point in curve] == [(0, 0.5), (2, 0.2), (4, 0.4)]
    assert curve[1].to_json() == {"step": 2, "loss": 0.2, "by_timestep": {"100": 0.2}}
    assert curve_words(curve) == "0.4000 at step 4, best 0.2000 at step 2"
    assert curve_words(curve[:2]) == "0.2000 at step 2, the best so far"
