"""A config's dataset: looked at in a thread, mended in the user's editor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.worker import get_current_worker

from app.domain.config_file import find_configs
from app.domain.data_report import (
    ClipRow,
    DataReport,
    caption_text,
    read_report,
    write_caption,
)
from app.domain.external_editor import edited
from app.runs.ask import Cancelled
from app.tui.screens.config.choose import Choose
from app.tui.screens.data.view import DataView
from app.tui.sources import Sources
from app.tui.widgets import TextView, Titles
from trainer.contract.errors import MenmaError


class DataScreen(DataView):
    """What `menma data check` finds, to be looked through and mended.

    Args:
        sources: where the runs are, whose configs can be chosen.
        current_config: returns the config that is open elsewhere in the app, if one is.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "edit", "Caption"),
        Binding("r", "look", "Look again"),
        Binding("d", "decode", "Decode", show=False),
        Binding("o", "choose", "Open"),
    ]

    class Progress(Message):
        """A clip was looked at."""

        def __init__(self, config: Path, words: str) -> None:
            super().__init__()
            self.config, self.words = config, words

    class Read(Message):
        """The dataset was looked at, or why it could not be."""

        def __init__(self, config: Path, report: DataReport | None, error: str = "") -> None:
            super().__init__()
            self.config, self.report, self.error = config, report, error

    def __init__(
        self, sources: Sources, current_config: Callable[[], Path | None] = lambda: None
    ) -> None:
        super().__init__()
        self._sources, self._current = sources, current_config
        self._config: Path | None = None
        self._followed: Path | None = None
        self._asked = False

    def on_screen_resume(self) -> None:
        """Follow the config that is open elsewhere; without one, ask."""
        current = self._current()
        if current is not None and current != self._followed:
            self._followed = current
            self.open(current)
        elif self._config is None and not self._asked:
            self._asked = True  # once: closing the question resumes the screen, too
            self.action_choose()

    def open(self, config: Path) -> None:
        """Look at another config's dataset."""
        self._config = config
        self.query_one(Titles).tell(config.name)
        self.show_report(None)
        self.action_look()

    def action_choose(self) -> None:
        """Choose a config: of `configs/` or of a run."""
        files = find_configs(self._sources.runs_dir)
        if not files:
            self.say("No config yet: `menma new -o configs/NAME.toml` writes one.")
            return

        def chosen(place: int | None) -> None:
            if place is not None:
                self.open(files[place])
            elif self._config is None:
                self.say("No config is chosen: o lists them.")

        names = [str(path) for path in files]
        self.app.push_screen(Choose("The dataset of which config?", names), chosen)

    def action_look(self) -> None:
        """Look at the dataset again."""
        self._look(decode=False)

    def action_decode(self) -> None:
        """Look again, and decode every frame that is trained on."""
        self._look(decode=True)

    def _look(self, *, decode: bool) -> None:
        if self._config is None:
            self.action_choose()
            return
        self.say("Looking at the clips ...")
        self._read(self._config, decode)

    @work(thread=True, exclusive=True, group="report")
    def _read(self, config: Path, decode: bool) -> None:
        worker = get_current_worker()

        def on_progress(done: int, total: int, name: str) -> None:
            what = "Decoding" if decode else "Looking at"
            self.post_message(self.Progress(config, f"{what} {done} of {total}: {name}"))

        try:
            report = read_report(
                config,
                decode=decode,
                on_progress=on_progress,
                cancelled=lambda: worker.is_cancelled,
            )
        except Cancelled:
            return
        except MenmaError as error:
            self.post_message(self.Read(config, None, str(error)))
            return
        if not worker.is_cancelled:
            self.post_message(self.Read(config, report))

    @on(Progress)
    def tell_progress(self, message: Progress) -> None:
        """Say how far it is."""
        if message.config == self._config:
            self.say(message.words)

    @on(Read)
    def show(self, message: Read) -> None:
        """Show what was found."""
        if message.config != self._config:
            return
        if message.report is None:
            first = message.error.splitlines()[0]
            self.say(f"error: {first}")
            self.app.push_screen(TextView(f"The dataset of {message.config}", message.error))
            return
        self.show_report(message.report)
        self.say_summary()

    def action_edit(self) -> None:
        """Edit the clip's caption in the user's editor."""
        row = self.row()
        if row is None or self.report is None:
            return
        if row.caption_file is None:
            media = self.report.raw["sources"][row.source]["media"]
            self.notify(f"Captions of this source are in {media}: edit them there.")
            return
        try:
            with self.app.suspend():
                text = edited(caption_text(row), row.caption_file.name)
            self._take_caption(row, text)
        except SuspendNotSupported:
            self.notify("This terminal cannot be lent to an editor.", severity="warning")
        except (MenmaError, OSError, UnicodeDecodeError) as error:
            self.notify(str(error), severity="error", timeout=10)

    def _take_caption(self, row: ClipRow, text: str | None) -> None:
        if text is None:
            self.notify("The editor ended with an error: nothing is taken.", severity="warning")
        elif not text.strip():
            self.notify("An empty caption is none: nothing is written.", severity="warning")
        elif text.strip() == (row.caption or "") or self.report is None:
            self.notify("The caption is as it was.", timeout=2)
        else:
            self.report = self.report.replaced(write_caption(row, text))
            self.show_rows()
            self.notify(f"Wrote {row.caption_file}. `menma cache` encodes it anew.")
