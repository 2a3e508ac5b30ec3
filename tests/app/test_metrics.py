"""Events in columns, and curves of them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.render.curve import BRAILLE, Curve, Plot, overlay, plot, ticks
from app.runs.metrics import RunLog, overview
from app.runs.samples import Sample, by_subject
from app.runs.state import read_state
from trainer.contract.events import MAX_READ_BYTES, EventWriter
from trainer.contract.figures import figures_of
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


def test_every_number_of_an_event_is_a_series_named_as_other_figures_are(log):
    emit = EventWriter(log.run.events)
    step = {"loss": 0.5, "terms": {"flow": 0.25}, "lr": None, "note": "x", "ok": True, "eta_s": 3.0}
    emit("step", step=1, total_steps=9, **step)
    emit("step", step=2, total_steps=9, **(step | {"lr": 1e-4, "later": 7}))
    measured = {"loss": 0.3, "by_timestep": {"100": 0.1, "900": 0.5}}
    emit("validation", step=2, **measured)
    log.read()
    known = {f"train/{name}" for name in log.names if not name.startswith("validation/")}
    ours = known | {name for name in log.names if name.startswith("validation/")}
    events = [{"type": "step", "step": 2, **step, "lr": 1.0, "later": 7}]
    events += [{"type": "validation", "step": 2, **measured}]
    assert ours == {name for event in events for name in figures_of(event)}
    assert list(log.series("later").values)[1] == 7
    assert math.isnan(log.series("later").values[0])
    assert math.isnan(log.series("lr").values[0])
    assert log.series("terms/flow").at(5) == (2, 0.25)
    assert log.series("validation/timestep_900").at(1) == (2, 0.5)
    assert log.series("none").at(1) is None


def test_lines_that_are_too_long_too_deep_or_too_large_are_passed_over(log):
    emit = EventWriter(log.run.events)
    step(emit, 1, 1.0)
    with log.run.events.open("ab") as file:
        file.write(b'{"type": "log", "message": "' + b"x" * 3 * MAX_READ_BYTES)
    assert log.read() == 1
    assert log.read() == 0, "the line is not whole yet"
    with log.run.events.open("ab") as file:
        file.write(b'"}\n' + b"[" * 100_000 + b"\n")
        file.write(b'{"type": "step", "step": ' + b"9" * 400 + b"}\n")
        file.write(b'{"type": "step", "step": 2, "loss": ' + b"9" * 400 + b"}\n")
        file.write(b'{"type": "step", "step": 3, "loss": 1e999}\n{"type": 3}\n')
    step(emit, 4, 4.0)
    log.read()
    assert log.bad_lines == 3
    assert list(log.steps) == [1, 2, 3, 4]
    assert [math.isfinite(value) for value in log.series("loss").values] == [
        True,
        False,
        False,
        True,
    ]


@given(st.lists(st.binary(max_size=60), max_size=30), st.integers(1, 64))
def test_no_bytes_stop_the_reading(tmp_path_factory, lines, size):
    run = RunDir(tmp_path_factory.mktemp("run"))
    log = RunLog(run)
    content = b"\n".join(b'{"type": "step", "step": 1, "loss": ' + line + b"}" for line in lines)
    for start in range(0, len(content), size * 8):
        with run.events.open("ab") as file:
            file.write(content[start : start + size * 8])
        log.read(3)
    log.read()
    EventWriter(run.events)("step", step=5, loss=2.0)
    log.read()
    assert log.series("loss").at(5) == (5, 2.0)
    assert read_state(run).loss == 2.0


def test_a_log_that_was_cut_off_is_read_anew(log):
    emit = EventWriter(log.run.events)
    for number in range(1, 6):
        step(emit, number, 1.0)
    emit("log", message="one")
    log.read()
    before = log.restarts
    log.run.events.write_bytes(b"")
    step(emit, 3, 3.0)
    log.read()
    assert list(log.steps) == [3]
    assert log.restarts > before


def test_a_long_log_has_its_shape_in_a_moment(tmp_path):
    run = RunDir(tmp_path)
    assert overview(run) == ([], [])
    line = json.dumps(
        {"v": 1, "time": 1.0, "type": "step", "step": 0, "loss": 0.5, "pad": "x" * 150}
    )
    with run.events.open("w") as file:
        for number in range(1, 30_001):
            file.write(line.replace('"step": 0', f'"step": {number}') + "\n")
    steps, losses = overview(run)
    assert (steps[0], steps[-1]) == (2, 30_000)
    assert 1000 < len(steps) < 30_000
    assert steps == sorted(steps)
    assert set(losses) == {0.5}
    assert max(b - a for a, b in itertools.pairwise(steps)) < 30_000 / 100


def test_samples_are_found_by_prompt_and_step_wherever_the_run_is_now(log):
    emit = EventWriter(log.run.events)
    log.run.samples.mkdir(parents=True)
    names = [(0, 1), (0, 0), (500, 0), (500, 1)]
    for at, index in names:
        path = f"/elsewhere/step{at:08d}_{index:02d}_{40 + index}.png"
        prompt = {"prompt": f"a\x1b[31m fish\n{index}", "seed": 40 + index} if index else {}
        emit("sample", step=at, path=path, **prompt)
    (log.run.samples / "step00000500_01_41.png").write_bytes(b"x")
    emit("sample", step=7)
    log.read()
    found = by_subject(log.samples)
    assert list(found) == ["prompt 1, seed 40", "a fish 1  (seed 41)"]
    assert [sample.step for sample in found["a fish 1  (seed 41)"]] == [0, 500]
    assert found["a fish 1  (seed 41)"][1].path == log.run.samples / "step00000500_01_41.png"


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


@given(st.integers(1, 3000), st.integers(2, 40))
def test_while_steps_are_added_only_the_last_column_changes(num, width):
    numbers = [math.sin(step) for step in range(num + 1)]
    before, after = (plot(curve(numbers[:end]).points, width, 3) for end in (num, num + 1))
    if (before.per_column, before.low, before.high) != (after.per_column, after.low, after.high):
        return  # laid out anew
    last = after.column_of(num)
    for old, new in zip(rows(before), rows(after), strict=True):
        assert old[: last - 1] == new[: last - 1]
    assert after.column_of(num) < width
    assert after.last >= num


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(2, 60))
def test_columns_and_their_steps_agree(first, num, width):
    drawn = plot((), width, 2, span=(first, first + num))
    for step in (first, first + num // 2, first + num):
        start, end = drawn.steps_in(drawn.column_of(step))
        assert start <= end
        assert start - drawn.per_column <= step <= end + drawn.per_column
    assert width * 0.75 <= drawn.column_of(first + num) + 1 + drawn.per_column**-1 + 1
    assert drawn.column_of(first + num) < width


def test_curves_over_one_another_keep_their_characters():
    falling, flat = curve([9.0 - x / 10 for x in range(80)], 0.0), curve([5.0] * 40, 0.0)
    drawn = overlay([("*", falling.points), ("+", flat.points)], 20, 9, marks=[("A", 79, 9.0)])
    text = rows(drawn)
    assert text[0][0] == "*"
    assert text[0].rstrip()[-1] == "A"
    assert text[4].count("+") >= 8
    assert (drawn.low, drawn.high, drawn.first) == (pytest.approx(1.1), 9.0, 0)
    assert rows(overlay([("*", ())], 4, 2)) == ["    ", "    "]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_are_round_and_few(low, size, most):
    found = ticks(low, low + size, most)
    assert len(found) <= most
    assert all(low - 1e-3 * size <= tick <= low + size * 1.001 for tick in found)
    assert found == sorted(found)
