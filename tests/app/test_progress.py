"""What is drawn of events, and that it fits."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from app.cli import output
from app.cli.progress import (
    LiveProgress,
    PlainProgress,
    _Picture,
    _preview_lines,
    count_line,
    open_progress,
    words,
)
from app.render.half_blocks import UPPER_HALF
from app.runs.durations import duration
from trainer.contract.errors import ConfigError, Problem, RunError

STEP = {
    "type": "step",
    "step": 412,
    "total_steps": 6000,
    "loss": 0.11234,
    "lr": 1e-4,
    "step_time_s": 1.923,
    "eta_s": 7890.0,
    "peak_vram_gib": 22.14,
}


def test_the_figures_of_a_step_fit_80_columns():
    line = count_line(STEP)
    assert line == ("step 412/6000  6%  loss 0.1123  lr 1.0e-04  1.92 s/step  22.1 GiB  ETA 2h11m")
    assert len(line) <= 80


def test_missing_figures_are_left_out():
    assert count_line(
        {"type": "step", "step": 6, "total_steps": 6, "loss": None, "eta_s": 0.0}
    ) == ("step 6/6  100%")


def test_without_a_terminal_steps_come_every_few_seconds_and_the_last_always(capsys):
    moment = 100.0
    progress = PlainProgress(show_errors=True, clock=lambda: moment)
    for step in range(1, 101):
        moment += 1
        progress.event(STEP | {"step": step, "total_steps": 99 + 1})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/100", *[f"step {step}/100" for step in range(6, 100, 5)], "step 100/100"
    ]  # fmt: skip


def test_counted_phases_are_progress_and_other_events_are_words(capsys):
    progress = PlainProgress(show_errors=False, clock=lambda: 0.0)
    progress.event({"type": "phase", "name": "latents", "done": 1, "total": 9, "detail": "a.mp4"})
    progress.event({"type": "phase", "name": "latents", "done": 2, "total": 9, "detail": "b.mp4"})
    progress.event({"type": "phase", "name": "captions", "done": 1, "total": 3, "detail": ""})
    progress.event({"type": "phase", "name": "load", "detail": "transformer"})
    progress.event({"type": "warning", "message": "c.mp4: too short", "hint": "cut it"})
    progress.event({"type": "error", "message": "said by the job itself"})
    progress.event({"type": "unheard of"})
    assert capsys.readouterr().err.splitlines() == [
        "latents  1/9  11%  a.mp4",
        "captions  1/3  33%",
        "load: transformer",
        "warning: c.mp4: too short",
        "  cut it",
    ]


def test_a_validation_is_told_with_its_timesteps():
    event = {
        "type": "validation",
        "step": 20,
        "loss": 0.25,
        "by_timestep": {"100": 0.2, "900": 0.3},
    }
    told = words(event, show_errors=True)
    assert told == "validation loss at step 20: 0.2500 (100: 0.2000, 900: 0.3000)"


def test_errors_are_shown_where_nobody_else_shows_them():
    event = {"type": "error", "message": "full", "hint": "free some space"}
    assert words(event, show_errors=True) == "error: full\n  free some space"


def test_the_picture_is_two_lines_of_80_columns():
    picture = _Picture()
    picture.event = STEP | {"step": 1234567, "total_steps": 9999999, "eta_s": 9e9}
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(picture)
    lines = capture.get().splitlines()
    assert [len(line) <= 80 for line in lines] == [True, True]
    assert lines[1].startswith("step 1234567/9999999")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_a_preview_is_drawn_below_the_bar_while_it_is_of_what_is_counted(tmp_path, width, height):
    Image.new("RGB", (422, 60), (200, 30, 30)).save(tmp_path / "p.png")
    console = Console(
        width=width, height=height, file=io.StringIO(), force_terminal=True,
        color_system="truecolor", legacy_windows=False,
    )  # fmt: skip
    picture = _Picture()
    picture.count({"type": "phase", "name": "steps", "done": 2, "total": 9})
    picture.preview = _preview_lines({"type": "preview", "path": tmp_path / "p.png"}, console)

    def drawn():
        with console.capture() as capture:
            console.print(picture)
        return [line for line in capture.get().splitlines() if UPPER_HALF in line]

    assert 4 <= len(drawn()) <= height - 6
    assert "200;30;30" in drawn()[0]
    picture.count({"type": "phase", "name": "steps", "done": 3, "total": 9})
    assert drawn()
    picture.count({"type": "phase", "name": "decode", "done": 0, "total": 1})
    assert not drawn()


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("none.png", {}),
        ("p.png", {"color_system": None}),
        ("p.png", {"width": 30}),
        ("p.png", {"height": 8}),
    ],
)
def test_where_a_preview_cannot_be_drawn_there_is_none(tmp_path, path, options):
    Image.new("RGB", (40, 20)).save(tmp_path / "p.png")
    usual = {"width": 80, "height": 24, "color_system": "truecolor", "force_terminal": True}
    console = Console(file=io.StringIO(), **(usual | options))
    assert _preview_lines({"type": "preview", "path": str(tmp_path / path)}, console) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (59.6, "1m00s"), (750, "12m30s"), (7890, "2h11m"), (277200, "3d5h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_table_gives_way_in_its_last_column_on_a_terminal_only(monkeypatch):
    rows = [("a", "x" * 200), ("bcd", "short")]
    assert "x" * 200 in output.table(("NAME", "WHY"), rows)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    lines = output.table(("NAME", "WHY"), rows).splitlines()
    assert max(map(len, lines)) == 40
    assert lines[1].endswith("…")
    assert lines[2] == "bcd   short"


def test_errors_say_what_where_and_what_to_do(capsys, tmp_path):
    output.show_error(RunError("it failed", hint="try again"))
    assert capsys.readouterr().err == "error: it failed\n  try again\n"
    file = tmp_path / "x.toml"
    one = Problem("unknown key", "adapter.rnak", file, 3, "did you mean 'rank'?")
    output.show_error(ConfigError(problems=[one]))
    expected = f"error: {file}:3: adapter.rnak: unknown key\n  did you mean 'rank'?\n"
    assert capsys.readouterr().err == expected
    output.show_error(ConfigError(problems=[one, Problem("no dataset", "dataset")]))
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems",
        f"  {file}:3: adapter.rnak: unknown key",
        "    did you mean 'rank'?",
        "  dataset: no dataset",
    ]


def test_words_that_the_terminal_cannot_spell_do_not_end_the_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", stream)
    output.say("a fish – 魚")
    stream.seek(0)
    assert stream.read() == "a fish ? ?\n"


def test_plain_lines_have_no_control_characters_on_a_terminal_too(capsys, monkeypatch):
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    with open_progress(show_errors=True, plain=True) as progress:
        progress.event(STEP)
        progress.event(
            {"type": "log", "message": "\x1b[31mred\x1b[0m \x07bell \x1b]0;title\x07end"}
        )
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "red bell end"
    assert all(line.isprintable() for line in lines)


HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc"
"""What a file that is quoted may hold."""


def test_lines_above_the_bar_have_no_control_characters(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, highlight=False, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    progress = LiveProgress(show_errors=True)
    progress.say(HOSTILE)
    progress.event({"type": "warning", "message": HOSTILE})
    assert written.getvalue() == "abc\nwarning: abc\n"


def test_errors_that_quote_a_file_do_not_steer_the_terminal(capsys):
    output.show_error(RunError(HOSTILE, hint=HOSTILE))
    output.show_error(ConfigError(problems=[Problem(HOSTILE, HOSTILE, hint=HOSTILE)]))
    output.warn(HOSTILE)
    assert capsys.readouterr().err == ("error: abc\n  abc\nerror: abc: abc\n  abc\nwarning: abc\n")


def test_a_counted_phase_says_how_long_the_rest_takes():
    event = {"type": "phase", "name": "steps", "done": 3, "total": 9, "detail": "sample 1 of 3"}
    assert count_line(event) == "steps  3/9  33%  sample 1 of 3"
    assert count_line(event | {"eta_s": 754.0}) == "steps  3/9  33%  ETA 12m34s  sample 1 of 3"
