"""Frames as half blocks: what is drawn, that it fits, and what happens where it cannot be drawn."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from app.cli import progress
from app.render.half_blocks import Strip, can_draw, frame_text, print_strips, strips_of

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def terminal(width: int = 80, height: int = 24, colours: str = "truecolor", **options) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system=colours,
        width=width,
        height=height,
        _environ={"TERM": "xterm-256color"},
        **options,
    )


def drawn(console: Console) -> list[str]:
    """Return the lines that were written, escapes included."""
    return console.file.getvalue().splitlines()


def plain(console: Console) -> list[str]:
    return [ESCAPES.sub("", line) for line in drawn(console)]


def picture(height: int, width: int, colour=RED) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def test_two_pixels_are_one_character_with_their_own_colours():
    console = terminal()
    pixels = np.array([[RED, GREEN], [BLUE, WHITE], [GREEN, GREEN]], dtype=np.uint8)
    print_strips(console, [Strip("corner", [pixels])])
    assert drawn(console) == [
        "corner",
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\x1b[38;2;0;255;0;48;2;255;255;255m▀\x1b[0m",
        "\x1b[38;2;0;255;0m▀▀\x1b[0m",  # of an odd height: the lower half is the terminal's own
    ]


@pytest.mark.parametrize(
    ("colours", "line"),
    [("256", "\x1b[38;5;160;48;5;20m▀\x1b[0m"), ("standard", "\x1b[31;44m▀\x1b[0m")],
)
def test_terminals_with_fewer_colours_get_their_nearest(colours, line):
    console = terminal(colours=colours)
    print_strips(console, [Strip("", [np.array([[[204, 0, 0]], [[0, 0, 204]]], np.uint8)])])
    assert drawn(console)[1] == line


GOLDEN_80 = """\
before
▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀ ▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀ ▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀"""
GOLDEN_120 = """\
before
▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀ ▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀ ▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀"""  # noqa: E501 - as wide as the terminal


@pytest.mark.parametrize(("width", "golden", "rows"), [(80, GOLDEN_80, 13), (120, GOLDEN_120, 20)])
def test_frames_share_the_width_of_the_terminal(width, golden, rows):
    console = terminal(width, 50)
    print_strips(console, [Strip("before", [picture(64, 64)] * 3)])
    title, row = golden.splitlines()
    assert plain(console) == [title, *[row] * rows]


def test_strips_stand_below_one_another_each_with_its_title():
    console = terminal()
    wide, long_title = picture(2, 4), "a [bold]title[/] of \x1b[31mmany words " * 8
    print_strips(console, [Strip("before", [wide] * 2), Strip(long_title, [wide])])
    before, _, title, after = plain(console)
    assert (before, after) == ("before", "▀▀▀▀")
    assert title.startswith("a [bold]title[/] of  [31mmany")
    assert title.endswith("…")
    assert len(title) == 80


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(20, 200),
    height=st.integers(8, 60),
    frames=st.integers(1, 40),
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_whatever_the_sizes_it_fits_and_keeps_the_aspect(width, height, frames, size):
    console = terminal(width, height)
    frame_width, frame_height = size
    print_strips(console, [Strip("t", [picture(frame_height, frame_width)] * frames)])
    rows = plain(console)[1:]
    assert 1 <= len(rows) <= height - 3
    assert max(cell_len(row) for row in rows) <= width
    shown = rows[0].split(" ")
    assert 1 <= len(shown) <= frames
    columns = len(shown[0])
    assert {len(part) for part in shown} == {columns}
    assert columns <= frame_width, "frames are never enlarged"
    # One of both sides is as exact as a whole number of pixels can be.
    ideal_height = frame_height * columns / frame_width
    ideal_columns = frame_width * 2 * len(rows) / frame_height
    close_height = abs(2 * len(rows) - ideal_height) <= 1 + frame_height / frame_width
    close_width = abs(columns - ideal_columns) <= 1 + 2 * frame_width / frame_height
    assert close_height or close_width or min(columns, len(rows)) == 1


def test_too_many_frames_are_thinned_out_evenly_first_and_last_kept():
    shades = [picture(2, 16, (value, 0, 0)) for value in (10, 20, 30, 40, 50)]
    for width, expected in [(20, ["10"]), (33, ["10", "50"]), (50, ["10", "30", "50"])]:
        console = terminal(width, 24)
        print_strips(console, [Strip("", shades)])
        assert re.findall(r"38;2;(\d+);0;0", drawn(console)[1]) == expected


def test_scaling_down_averages():
    console = terminal(20, 24)
    checkered = np.zeros((40, 40, 3), np.uint8)
    checkered[::2, ::2] = checkered[1::2, 1::2] = 255
    print_strips(console, [Strip("", [checkered])])
    assert set(re.findall(r"38;2;(\d+;\d+;\d+)", drawn(console)[1])) <= {"128;128;128"}


@pytest.mark.parametrize(
    "console",
    [
        terminal(no_color=True),
        terminal(colours=None),
        Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}),
        Console(
            file=io.StringIO(),
            force_terminal=True,
            _environ={"TERM": "xterm-256color", "NO_COLOR": "1"},
        ),
        Console(file=io.StringIO(), width=80, _environ={"TERM": "xterm-256color"}),
        Console(
            file=io.TextIOWrapper(io.BytesIO(), "ascii"),
            force_terminal=True,
            color_system="truecolor",
        ),
    ],
    ids=["no_color", "colourless", "dumb", "NO_COLOR", "pipe", "ascii"],
)
def test_where_nothing_can_be_drawn_the_path_is_printed(console):
    assert not can_draw(console)
    print_strips(console, [Strip("before", [picture(4, 4)])], picture="demo/sheet é.png")
    console.file.flush()
    raw = getattr(console.file, "buffer", console.file).getvalue()
    text = raw.decode("ascii") if isinstance(raw, bytes) else raw
    assert text == f"demo/sheet {'?' if isinstance(raw, bytes) else 'é'}.png\n"


def test_without_a_picture_of_all_the_frames_are_named(tmp_path):
    console = Console(file=io.StringIO(), width=10)
    print_strips(console, [Strip("before", [tmp_path / "0.png", tmp_path / "1.png"])])
    assert drawn(console) == ["before", f"  {tmp_path / '0.png'}", f"  {tmp_path / '1.png'}"]


def test_files_are_read_and_a_damaged_one_is_named(tmp_path):
    good, bad = tmp_path / "0.png", tmp_path / "1.png"
    Image.new("RGBA", (3, 2), (0, 0, 255, 255)).save(good)
    bad.write_bytes(b"no picture")
    console = terminal(400)
    print_strips(console, [Strip("before", [good]), Strip("after", [good, bad])])
    lines = plain(console)
    assert lines[:3] == ["before", "▀▀▀", "after"]
    assert lines[3] == "cannot be shown:"
    assert str(bad) in "".join(lines[4:])


def test_an_output_event_describes_strips():
    event = {
        "type": "output",
        "path": "sheet.png",
        "strips": [
            {"title": "before", "frames": ["a.png", "b.png"]},
            {"title": "no frames", "frames": []},
            {"title": "not paths", "frames": [1]},
            "not a strip",
        ],
    }
    (strip,) = strips_of(event)
    assert strip.title == "before"
    assert [path.name for path in strip.frames] == ["a.png", "b.png"]
    assert strips_of(event | {"type": "sample"}) == ()
    assert strips_of({"type": "output", "path": "x", "strips": 3}) == ()


def test_strips_appear_above_the_bar_when_they_arrive(tmp_path, monkeypatch):
    frame = tmp_path / "0.png"
    Image.new("RGB", (4, 4), BLUE).save(frame)
    event = {
        "type": "output",
        "path": "sheet.png",
        "strips": [{"title": "before", "frames": [str(frame)] * 2}],
    }
    for colourless, expected in [
        (False, ["output: sheet.png", "before", "▀▀▀▀ ▀▀▀▀", "▀▀▀▀ ▀▀▀▀"]),
        (True, ["output: sheet.png"]),
    ]:
        shown = progress.LiveProgress(show_errors=True)
        monkeypatch.setattr(shown, "_console", terminal(no_color=colourless))
        shown.event(event)
        assert plain(shown._console) == expected


def test_plain_progress_tells_the_path_only(capsys):
    progress.PlainProgress(show_errors=True).event(
        {"type": "output", "path": "sheet.png", "strips": [{"title": "t", "frames": ["0.png"]}]}
    )
    assert capsys.readouterr().err == "output: sheet.png\n"


def test_a_frame_is_text_that_fits_a_box():
    text = frame_text(picture(20, 40), 20, 8)
    lines = text.plain.split("\n")
    assert (len(lines), {len(line) for line in lines}) == (5, {20})
    assert text.plain.strip("▀\n") == ""
    assert [len(line) for line in frame_text(picture(3, 4), 20, 8).plain.split("\n")] == [4, 4]
