"""The samples of a run: by prompt and step, an earlier step beside a later one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Footer, Static
from textual.worker import get_current_worker

from app.runs.samples import Sample, by_subject
from app.tui.live import LiveScreen
from app.tui.screens.monitor.pictures import Film, Picture, read_film
from app.tui.widgets import Titles

PLAY_S = 0.25
SMALL = (32, 12)
"""Characters of a picture while it is played: four a second of these are little for a slow line."""
AROUND = 5
"""Lines of the screen that are no picture."""


class GalleryScreen(LiveScreen, ModalScreen[None]):
    """Samples beside one another.

    Args:
        samples: returns those that there are so far.
        look: looks for new ones.
    """

    DEFAULT_CSS = """
    GalleryScreen #prompt, GalleryScreen #place { height: 1; padding: 0 1; }
    GalleryScreen Horizontal > Vertical { width: 1fr; padding: 0 1; }
    GalleryScreen .head { height: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,v", "close", "Back"),
        Binding("left", "frame(-1)", "Frame back", show=False),
        Binding("right", "frame(1)", "Frame on", show=False),
        Binding("up,k", "step(-1)", "Step back", show=False),
        Binding("down,j", "step(1)", "Step on", show=False),
        Binding("n", "prompt(1)", "Prompt"),
        Binding("N", "prompt(-1)", "Prompt back", show=False),
        Binding("b", "before", "Left one"),
        Binding("a", "play", "Play"),
        Binding("y", "copy", "Copy path"),
    ]

    class Read(Message):
        """Both samples were read."""

        def __init__(self, wanted: object, films: Sequence[Film]) -> None:
            super().__init__()
            self.wanted, self.films = wanted, films

    def __init__(self, samples: Callable[[], Sequence[Sample]], look: Callable[[], object]) -> None:
        super().__init__()
        self._samples, self._look = samples, look
        self._subjects: dict[str, list[Sample]] = {}
        self._subject = ""
        self._after = self._before = 0
        """Places among the samples of the prompt."""
        self._frame = 0
        self._films: Sequence[Film] = ()
        self._wanted: object = None
        """What is shown or being read: samples and room."""
        self._files: object = None
        """Their files, and the room."""
        self._playing = False

    def compose(self) -> ComposeResult:
        """Lay out the prompt, two samples, and where we are."""
        yield Titles("monitor", "samples")
        yield Static("no samples yet: they come with sampling.every_steps, or `s`", id="prompt")
        with Horizontal():
            for side in ("before", "after"):
                with Vertical():
                    yield Static(id=f"{side}-head", classes="head")
                    yield Picture(id=side)
        yield Static(id="place")
        yield Footer()

    def on_mount(self) -> None:
        """Begin with the newest sample beside the first one; play when asked."""
        self._take_new()
        self.set_interval(PLAY_S, self._play)

    def look(self) -> None:
        """Take in the samples that were made since, and look for newer ones."""
        self._take_new()
        self._look()

    def on_resize(self) -> None:
        """Draw for the room that there is now."""
        self._show()

    def action_frame(self, by: int) -> None:
        """Go through the frames of both."""
        most = max((len(film.frames) for film in self._films), default=1)
        self._frame = min(max(self._frame + by, 0), most - 1)
        self._draw()

    def action_step(self, by: int) -> None:
        """Show the sample of an earlier or a later step on the right."""
        self._after = min(max(self._after + by, 0), max(len(self._steps()) - 1, 0))
        self._show()

    def action_prompt(self, by: int) -> None:
        """Show the samples of another prompt."""
        names = list(self._subjects)
        if names:
            place = (names.index(self._subject) + by) % len(names)
            self._choose(names[place])

    def action_before(self) -> None:
        """Keep the sample on the right as the one to compare with."""
        self._before = self._after
        self._show()

    def action_play(self) -> None:
        """Show one frame after another, small; or stop."""
        self._playing = not self._playing
        self._show()

    def action_copy(self) -> None:
        """Copy the path of the sample on the right."""
        steps = self._steps()
        if steps:
            path = steps[self._after].path.absolute()
            self.app.copy_to_clipboard(str(path))
            self.notify(f"Copied, if this terminal allows it: {path}", markup=False)

    def action_close(self) -> None:
        """Go back to the curves."""
        self.dismiss()

    @work(thread=True, exclusive=True, group="films")
    def _read(self, samples: Sequence[Sample], room: tuple[int, int], wanted: object) -> None:
        worker = get_current_worker()
        films = []
        for sample in samples:
            film = read_film(sample, *room, lambda: worker.is_cancelled)
            if film is None or worker.is_cancelled:
                return
            films.append(film)
        self.post_message(self.Read(wanted, films))

    @on(Read)
    def show_films(self, message: Read) -> None:
        """Show the samples that were read, if they are still the ones."""
        if message.wanted == self._wanted:
            self._films = message.films
            self._draw()

    def _steps(self) -> list[Sample]:
        return self._subjects.get(self._subject, [])

    def _take_new(self) -> None:
        """Take in what there is; whoever looked at the newest one sees the new one."""
        at_end, shown = self._after >= len(self._steps()) - 1, self._pair()
        self._subjects = by_subject(self._samples())
        if not self._subjects:
            return
        if self._subject not in self._subjects:
            self._choose(next(iter(self._subjects)))
            return
        if at_end:
            self._after = len(self._steps()) - 1
        if self._pair() != shown:
            self._show()

    def _pair(self) -> tuple[Sample, ...]:
        """Return the samples on the left and on the right; () where there is none."""
        steps = self._steps()
        places = (self._before, self._after) if steps else ()
        return tuple(steps[min(place, len(steps) - 1)] for place in places)

    def _choose(self, subject: str) -> None:
        self._subject = subject
        self._before, self._after = 0, len(self._steps()) - 1
        self._show()

    def _show(self) -> None:
        """Say which samples these are, and read them."""
        steps = self._steps()
        if not steps or not self.size:
            return
        names = list(self._subjects)
        number = f"{names.index(self._subject) + 1}/{len(names)}"
        whole = Text(f"{number}  {self._subject}", no_wrap=True, overflow="ellipsis")
        self.query_one("#prompt", Static).update(whole)
        self._before = min(self._before, len(steps) - 1)
        self._after = min(self._after, len(steps) - 1)
        pair = self._pair()
        for side, sample in zip(("before", "after"), pair, strict=True):
            head = Text(f"step {sample.step}", style="bold")
            head.append(f"  {sample.work or sample.path.name}", style="not bold")
            head.no_wrap, head.overflow = True, "ellipsis"
            self.query_one(f"#{side}-head", Static).update(head)
        room = (self.size.width // 2 - 2, self.size.height - AROUND)
        if self._playing:
            room = (min(room[0], SMALL[0]), min(room[1], SMALL[1]))
        wanted = (pair, room)
        if wanted == self._wanted:
            self._draw()
            return
        self._wanted = wanted
        files = ([sample.path for sample in pair], room)
        if files != self._files:  # else the picture grows clearer where it is
            self._files, self._films = files, ()
            for picture in self.query(Picture):
                picture.tell("reading ...")
        self._read(pair, room, wanted)

    def _draw(self) -> None:
        """Draw the frame of both samples, and say where we are."""
        films = dict(zip(("before", "after"), self._films, strict=False))
        frame = ""
        for side, film in films.items():
            picture = self.query_one(f"#{side}", Picture)
            if film.problem:
                picture.tell(film.problem)
                continue
            place = min(self._frame, len(film.frames) - 1)
            picture.show(film.frames[place])
            frame = f"frame {film.numbers[place] + 1}/{film.num_frames}   "
        play = "playing, a stops   " if self._playing else ""
        steps = f"step {self._after + 1} of {len(self._steps())}   "
        keys = "left right frames  up down steps  n N prompts"
        line = Text(f"{frame}{steps}{play}", no_wrap=True, overflow="ellipsis")
        self.query_one("#place", Static).update(line.append(keys, style="dim"))

    def _play(self) -> None:
        if not self._playing or not self.is_current or not self._films:
            return
        most = max(len(film.frames) for film in self._films)
        self._frame = (self._frame + 1) % max(most, 1)
        self._draw()
