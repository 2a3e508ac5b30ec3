"""What the Data screen shows: tables, a filter, one clip with its caption and frames."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import ContentSwitcher, DataTable, Footer, Input, Static
from textual.worker import get_current_worker

from app.domain.data_report import ClipRow, DataReport
from app.render.data_report import summary
from app.runs.ask import Cancelled
from app.runs.frames import ClipFrames, clip_frames
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed
from app.tui.screens.data.frames import FrameView
from app.tui.screens.data.tables import CLIPS, clip_cells, details, fill, table_of
from app.tui.widgets import Rows, TextView, Titles
from trainer.contract.errors import MenmaError

VIEWS = ("clips", "buckets", "sources")
NUM_FRAMES = 16
"""Frames of a clip that can be scrubbed through."""
PICTURE = (160, 120)
"""Pixels: more than any box of characters that the screen gives them."""
REST_S = 0.3
"""The cursor rests for this long before frames of its clip are asked for."""


class DataView(Fitting, Keyed, Screen[None]):
    """A report of a dataset, to be looked through."""

    AUTO_FOCUS = "#clips"
    KEYS_IN = "data"
    DEFAULT_CSS = """
    DataView #summary { height: 1; padding: 0 1; }
    DataView Input { padding: 0 1; display: none; }
    DataView Input.-open { display: block; }
    DataView ContentSwitcher { height: 1fr; }
    DataView DataTable { height: 1fr; }
    DataView #clips { overflow-x: hidden; }
    DataView #below { height: 40%; min-height: 9; background: $surface; }
    DataView #words { width: 1fr; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("p", "problems", "Problems"),
        Binding("v", "view", "View"),
        Binding("y", "copy", "Copy path", show=False),
        Binding("exclamation_mark", "notes", "Notes", key_display="!", show=False),
        Binding("left", "frame(-1)", "Frame", show=False, priority=True),
        Binding("right", "frame(1)", "Frame", show=False, priority=True),
        Binding("escape", "all", "All", show=False),
    ]

    class Pictures(Message):
        """Frames of a clip are there, or why they are not."""

        def __init__(self, path: Path, frames: ClipFrames | None, error: str = "") -> None:
            super().__init__()
            self.path, self.frames, self.error = path, frames, error

    def __init__(self) -> None:
        super().__init__()
        self.report: DataReport | None = None
        """What is shown."""
        self._rows: list[ClipRow] = []
        self._problems_only = False
        self._shown_path: Path | None = None
        self._rest: Timer | None = None

    def compose(self) -> ComposeResult:
        """Lay out the tables, and the details of one clip below."""
        yield Titles("data")
        yield Static(id="summary")
        yield Input(placeholder="words of name, state, bucket or caption", compact=True)
        with ContentSwitcher(initial="clips"):
            for name in VIEWS:
                yield Rows(id=name)
        with Horizontal(id="below"):
            with VerticalScroll(can_focus=False):
                yield Static(id="words")
            yield FrameView()
        yield Footer()

    def on_mount(self) -> None:
        """Begin with nothing."""
        self.show_report(None)

    def show_report(self, report: DataReport | None) -> None:
        """Show another report; None: nothing, until there is one."""
        self.report, self._shown_path = report, None
        if report is not None:
            self._show_tables(report)
        self.show_rows()

    def _show_tables(self, report: DataReport) -> None:
        for name in VIEWS[1:]:
            fill(self.query_one(f"#{name}", DataTable), *table_of(report, name))

    def show_rows(self) -> None:
        """Show the clips that the filter lets through; the cursor stays on its clip."""
        before = self.row()
        words = self.query_one(Input).value
        report = self.report
        self._rows = [] if report is None else report.shown(words, self._problems_only)
        table = self.query_one("#clips", DataTable)
        fill(table, CLIPS, [clip_cells(row) for row in self._rows])
        place = next(
            (n for n, row in enumerate(self._rows) if before and row.path == before.path), 0
        )
        table.move_cursor(row=place)
        self._describe()

    def say_summary(self) -> None:
        """Say what is there, and how much of it is shown."""
        if self.report is None:
            return
        shown = f"{len(self._rows)} of {len(self.report.rows)} shown. "
        narrowed = len(self._rows) < len(self.report.rows)
        notes = len(self.report.raw["notes"])
        more = f", {notes} {'note' if notes == 1 else 'notes'} (!)" if notes else ""
        self.say((shown if narrowed else "") + summary(self.report.raw) + more)

    @on(DataTable.RowHighlighted, "#clips")
    def highlighted(self) -> None:
        """Tell about the clip that the cursor is on."""
        self._describe()

    def _describe(self) -> None:
        row = self.row()
        words, view = self.query_one("#words", Static), self.query_one(FrameView)
        if row is None:
            words.update("No clip is shown." if self.report is not None else "")
            view.say("")
            self._shown_path = None
            return
        words.update(details(row))
        if row.path == self._shown_path:
            return
        self._shown_path = row.path
        view.say("")
        if self._rest is not None:
            self._rest.stop()
        self._rest = self.set_timer(REST_S, partial(self._ask_pictures, row))

    def _ask_pictures(self, row: ClipRow) -> None:
        if row.path != self._shown_path:
            return
        if not row.used and (row.caption_file is None or not row.path.exists()):
            return  # a line of a list, or a folder
        self.query_one(FrameView).say("reading frames ...")
        self._read_pictures(row.path)

    @work(thread=True, exclusive=True, group="pictures")
    def _read_pictures(self, path: Path) -> None:
        worker = get_current_worker()
        try:
            frames = clip_frames(
                path,
                num_frames=NUM_FRAMES,
                max_width=PICTURE[0],
                max_height=PICTURE[1],
                cancelled=lambda: worker.is_cancelled,
            )
        except Cancelled:
            return
        except MenmaError as error:
            self.post_message(self.Pictures(path, None, error.message))
            return
        self.post_message(self.Pictures(path, frames))

    @on(Pictures)
    def show_pictures(self, message: Pictures) -> None:
        """Show frames, if the cursor is still on their clip."""
        if message.path != self._shown_path:
            return
        view = self.query_one(FrameView)
        if message.frames is None:
            path = str(message.path.absolute())
            view.say(f"no frames: {message.error.removeprefix(path).strip()}")
        else:
            view.show(message.frames)

    def action_frame(self, by: int) -> None:
        """Show a later or an earlier frame of the clip; in the filter, move its cursor."""
        field = self.query_one(Input)
        if self.focused is field:
            field.action_cursor_left() if by < 0 else field.action_cursor_right()
        else:
            self.query_one(FrameView).move(by)

    def action_view(self) -> None:
        """Show the next table: clips, buckets, sources."""
        switcher = self.query_one(ContentSwitcher)
        place = VIEWS.index(str(switcher.current))
        switcher.current = VIEWS[(place + 1) % len(VIEWS)]
        self._table().focus()

    def action_problems(self) -> None:
        """Show only what has a problem or a warning, or all."""
        self._problems_only = not self._problems_only
        self.show_rows()
        self.say_summary()

    def action_filter(self) -> None:
        """Type words that a clip must have."""
        field = self.query_one(Input)
        field.add_class("-open")
        field.focus()

    @on(Input.Changed)
    def narrow(self) -> None:
        """Show what fits the words."""
        self.show_rows()
        self.say_summary()

    @on(Input.Submitted)
    def to_table(self) -> None:
        """Go back to the clips."""
        self._table().focus()

    def action_all(self) -> None:
        """Take the filter away."""
        field = self.query_one(Input)
        field.value = ""
        field.remove_class("-open")
        self._problems_only = False
        self._table().focus()
        self.show_rows()
        self.say_summary()

    def action_notes(self) -> None:
        """Show what is no fault and yet worth knowing."""
        notes = [] if self.report is None else self.report.raw["notes"]
        text = "\n\n".join(notes) or "Nothing to note."
        self.app.push_screen(TextView("Notes on the dataset", text))

    def action_copy(self) -> None:
        """Copy the path of the clip."""
        if (row := self.row()) is not None:
            self.app.copy_to_clipboard(str(row.path.absolute()))
            self.notify(f"Copied, if this terminal allows it: {row.path}")

    def row(self) -> ClipRow | None:
        """Return the clip that the cursor is on."""
        place = self.query_one("#clips", DataTable).cursor_row
        return self._rows[place] if 0 <= place < len(self._rows) else None

    def _table(self) -> DataTable[Text]:
        name = self.query_one(ContentSwitcher).current
        return self.query_one(f"#{name}", DataTable)

    def say(self, words: str) -> None:
        """Write the line above the tables."""
        self.query_one("#summary", Static).update(Text(words, no_wrap=True, overflow="ellipsis"))
