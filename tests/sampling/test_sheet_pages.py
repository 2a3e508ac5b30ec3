"""The page and the picture of a sheet: nothing of a text is run, every cell is where it belongs."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.sampling.grid import MAX_SIDE, Grid, GridCell, write_grid
from trainer.sampling.page import Page, PageCell, page_html
from trainer.sampling.sheet import load_font, wrapped


class Elements(HTMLParser):
    """The elements of a page, as a browser would make them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_with(text: str) -> Page:
    cells = [
        [PageCell((0, 0), f"cells/{text}.mp4", details=text), PageCell((0, 1), failure=text)],
        [PageCell((1, 0), "cells/b c.png"), PageCell((1, 1))],
    ]
    axes = [("prompt", (text, "b")), (text, ("1", text))]
    return Page(text, [(text, text)], axes, (0,), 1, cells)


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("<>\"'&/-!=; abc\n{}"), min_size=1))
def test_texts_are_shown_and_make_no_element(text: str) -> None:
    plain, page = (Elements(page_html(page_with(one))) for one in ("plain", text))
    assert [tag for tag, _ in page.found] == [tag for tag, _ in plain.found]
    assert [set(attributes) for _, attributes in page.found] == [
        set(attributes) for _, attributes in plain.found
    ]
    assert page.named("figure")[0]["data-details"] == text


def test_the_policy_allows_the_script_of_the_page_alone() -> None:
    html = page_html(page_with("<script>alert(1)</script>"))
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    policy = next(m["content"] for m in Elements(html).named("meta") if "http-equiv" in m)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "alert" not in script


def test_links_are_relative_and_nothing_is_fetched() -> None:
    page = Elements(page_html(page_with("a#b?c d")))
    assert page.named("video")[0]["src"] == "cells/a%23b%3Fc%20d.mp4"
    assert page.named("img")[0]["src"] == "cells/b%20c.png"
    assert not [1 for tag, _ in page.found if tag in {"link", "iframe", "object"}]
    assert "://" not in page_html(page_with("x"))


def test_cells_know_their_place() -> None:
    page = Elements(page_html(page_with("a")))
    assert [row.get("data-place") for row in page.named("tr")] == [None, "0:0", "0:1"]
    assert [cell["data-place"] for cell in page.named("td")] == ["1:0", "1:1"] * 2
    assert "not made yet" in page.text


def picture_of(grid: Grid, path: Path, **options: int) -> np.ndarray:
    write_grid(path, grid, **options)
    with Image.open(path) as picture:
        return np.asarray(picture)


def frame(colour: tuple[int, int, int], height: int = 20, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def test_every_frame_of_a_grid_is_seen_in_its_place(tmp_path: Path) -> None:
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), None]]
    rows = [
        (f"row {index}", [GridCell([frame(c)] * 2) if c else GridCell(words="none") for c in row])
        for index, row in enumerate(colours)
    ]
    grid = Grid("title", "note", "corner", ["one", "two"], rows, (30, 20))
    pixels = picture_of(grid, tmp_path / "a.png", height=40)
    centres = {}
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            if colour:
                places = np.argwhere((pixels == colour).all(axis=2))
                assert len(places) == 2 * 40 * 60  # two frames, twice as large
                centres[row, column] = places.mean(axis=0)
    assert centres[0, 0][0] == centres[0, 1][0] < centres[1, 0][0]
    assert centres[0, 0][1] == centres[1, 0][1] < centres[0, 1][1]


def test_a_large_grid_stays_within_bounds(tmp_path: Path) -> None:
    rows = [("", [GridCell([frame((9, 9, 9))])] * 300)] * 3
    pixels = picture_of(Grid("t", "", "", [""] * 300, rows), tmp_path / "a.png")
    assert pixels.shape[1] < MAX_SIDE * 1.4


def test_words_are_wrapped_and_cut() -> None:
    font = load_font(14)
    lines = wrapped("one two three\nfour " + "x" * 200, font, 60, 100)
    assert all(font.getlength(line) <= 60 for line in lines)
    assert "".join(lines).replace(" ", "") == "onetwothreefour" + "x" * 200
    short = wrapped("one two three four five", font, 40, 2)
    assert len(short) == 2
    assert short[-1].endswith("…")
    assert font.getlength(short[-1]) <= 40
