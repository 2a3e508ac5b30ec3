"""Events in columns, and curves of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.render.curve import BRAILLE, Curve, Plot, plot, ticks
from app.runs.metrics import RunLog
from app.runs.samples import Sample
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir

values = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=200)


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(RunDir(tmp_path / "run"))


def step(emit: EventWriter, number: int, loss: float) -> None:
    emit("step", step=number, total_steps=9, loss=loss, lr=1e-4, grad_norm=1.0)


def test_events_become_columns_as_they_come(log):
    assert log.read() == 0, "nothing is there yet"
    emit = EventWriter(log.run.events)
    emit("phase", name="load", detail="transformer")
    step(emit, 1, 0.5)
    assert log.read() == 2
    step(emit, 2, 0.25)
    emit("validation", step=2, loss=0.3)
    emit("sample", step=2, path="a.mp4")
    emit("checkpoint", step=2, path="x")
    emit("output", path="out.safetensors")
    emit("warning", message="hot")
    assert log.read(limit=2) == 2
    assert log.read() == 4
    assert list(log.steps) == [1, 2]
    assert list(log.series("loss").values) == [0.5, 0.25]
    assert not log.series("step_time_s").values
    assert log.validation == [(2, 0.3)]
    assert log.samples == [Sample(2, Path("a.mp4"))]
    assert log.checkpoints == [2]
    assert log.outputs == [Path("out.safetensors")]
    assert list(log.messages) == [("phase", "load transformer"), ("warning", "hot")]
    assert log.last_step["step"] == 2


def test_steps_that_are_done_again_replace_the_first_ones(log):
    emit = EventWriter(log.run.events)
    for number in (1, 2, 3, 4):
        step(emit, number, number)
        emit("validation", step=number, loss=number)
    for number in (3, 4, 5):
        step(emit, number, 10 * number)
        emit("validation", step=number, loss=10 * number)
    log.read()
    assert list(log.steps) == [1, 2, 3, 4, 5]
    assert list(log.series("loss").values) == [1, 2, 30, 40, 50]
    assert [loss for _, loss in log.validation] == [1, 2, 30, 40, 50]


def test_damaged_lines_and_another_file_in_its_place(log):
    emit = EventWriter(log.run.events)
    step(emit, 1, 1.0)
    with log.run.events.open("ab") as file:
        file.write(
            b"{half\n\xff\xff\n" + json.dumps({"type": "step", "step": "two"}).encode() + b"\n"
        )
        file.write(json.dumps({"type": "step", "step": 2, "loss": "x" * 100_000}).encode() + b"\n")
        file.write(b'{"type": "step", "step": 3')
    log.read()
    assert list(log.steps) == [1, 2]
    assert math.isnan(log.series("loss").values[1])
    assert log.bad_lines == 2
    log.run.events.unlink()
    log.read()
    assert list(log.steps) == [1, 2], "what was seen stays on the screen"
    step(emit, 7, 7.0)
    log.read()
    assert list(log.steps) == [7]


def curve(values, smoothing: float = 0.9, most: int = 4096) -> Curve:
    made = Curve(smoothing, most)
    made.extend(range(len(values)), values)
    return made


def means(values, smoothing: float) -> list[float]:
    return [point.mean for point in curve(values, smoothing).points]


def test_the_average_starts_at_the_first_value_and_leaves_nan_out():
    assert means([4.0, 4.0, math.nan, 4.0], 0.9) == pytest.approx([4.0] * 4)
    assert means([1.0, 0.0], 0.0) == [1.0, 0.0]
    assert math.isnan(means([math.nan, 1.0], 0.5)[0])
    assert 0 < means([0.0] * 50 + [1.0], 0.99)[-1] < 0.05


@given(values, st.integers(1, 4))
def test_few_points_have_the_range_and_the_average_of_many(numbers, power):
    whole, few = curve(numbers).points, curve(numbers, most=2**power).points
    assert len(few) <= 2**power
    finite = [value for value in numbers if math.isfinite(value)]
    if finite:
        assert min(p.low for p in few if math.isfinite(p.low)) == min(finite)
        assert max(p.high for p in few if math.isfinite(p.high)) == max(finite)
        assert few[-1].mean == whole[-1].mean
    assert few[0].step == 0
    assert [p.step for p in few] == sorted({p.step for p in few})


def rows(drawn: Plot) -> list[str]:
    return ["".join(cell.char for cell in row) for row in drawn.rows]


def test_a_falling_line_falls():
    drawn = plot(curve([100 - x for x in range(100)], 0.0).points, 10, 5)
    assert (drawn.low, drawn.high, drawn.first, drawn.last) == (1, 100, 0, 99)
    text = rows(drawn)
    assert text[0][0] != " "
    assert text[0][-1] == " "
    assert text[-1][-1] != " "
    assert text[-1][0] == " "


def test_a_spike_is_seen_among_very_many_steps():
    losses = [0.1] * 100_000
    losses[51_234] = 9.0
    drawn = plot(curve(losses, 0.99).points, 60, 10)
    assert drawn.high == 9.0
    assert [cell.part for cell in drawn.rows[0]].count("band") == 1


def test_marks_gaps_and_the_logarithm():
    points = curve([1.0, math.inf, 100.0]).points
    drawn = plot(points, 8, 4, log=True, marks=[(1, 10.0), (2, -1.0)])
    assert (drawn.low, drawn.high) == (1.0, 100.0)
    parts = [[cell.part for cell in row] for row in drawn.rows]
    assert [row.count("mark") for row in parts] in ([0, 1, 0, 0], [0, 0, 1, 0])
    assert rows(plot([], 4, 2)) == ["    ", "    "]
    assert plot(curve([2.0]).points, 4, 2).low < 2.0


@given(values, st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_any_values_fit_into_the_room(numbers, width, height, log):
    drawn = plot(curve(numbers).points, width, height, log=log)
    assert len(drawn.rows) == height
    assert all(len(row) == width for row in drawn.rows)
    chars = {cell.char for row in drawn.rows for cell in row}
    assert all(char == " " or BRAILLE <= ord(char) < BRAILLE + 256 for char in chars)
    assert drawn.low <= drawn.high


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_are_round_and_few(low, size, most):
    found = ticks(low, low + size, most)
    assert len(found) <= most
    assert all(low - 1e-3 * size <= tick <= low + size * 1.001 for tick in found)
    assert found == sorted(found)
