"""Draws the events of a job: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from app.cli import output
from app.runs.durations import duration
from app.runs.printable import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import Segment

Event = dict[str, Any]
PLAIN_EVERY_S = 5.0
PREVIEW_BORDER = 6
"""Lines of the screen that a preview leaves to the bar and to words."""
MIN_PREVIEW_COLUMNS, MIN_PREVIEW_ROWS, MAX_PREVIEW_ROWS = 40, 4, 20


class Progress(Protocol):
    """Takes events and words; a context manager."""

    def __enter__(self) -> Self:
        """Begin to draw."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the screen in order."""
        ...

    def event(self, event: Event) -> None:
        """Show one event."""
        ...

    def say(self, text: str) -> None:
        """Show a line of words."""
        ...


def open_progress(*, show_errors: bool, plain: bool = False) -> Progress:
    """Return the progress for where stderr goes.

    Args:
        show_errors: also show `error` events; a job whose stderr is shown has said them already.
        plain: lines, whatever stderr is.
    """
    draws = output.is_terminal() and not plain
    return (LiveProgress if draws else PlainProgress)(show_errors=show_errors)


class PlainProgress:
    """A line for each thing that happens; steps at most every few seconds."""

    def __init__(self, *, show_errors: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._show_errors = show_errors
        self._clock = clock
        self._last = -PLAIN_EVERY_S
        self._phase = ""

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def event(self, event: Event) -> None:
        """Show one event, unless it is one of many like it."""
        done, total = counted(event)
        if total:
            name = str(event.get("name", event["type"]))
            due = self._clock() - self._last >= PLAIN_EVERY_S
            if not due and done != total and name == self._phase:
                return
            self._last, self._phase = self._clock(), name
            self.say(count_line(event))
            return
        text = words(event, show_errors=self._show_errors)
        if text:
            self.say(text)

    def say(self, text: str) -> None:
        """Write a line to stderr, without the control characters that a program may have sent."""
        output.say(printable(text), whole=True)


class LiveProgress:
    """A bar with figures below it at the bottom; everything else scrolls above."""

    def __init__(self, *, show_errors: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        self._show_errors = show_errors
        self._picture = _Picture()
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(
            self._picture, console=self._console, refresh_per_second=4, redirect_stdout=False
        )

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._picture.preview = []
        self._live.stop()

    def event(self, event: Event) -> None:
        """Move the bar, or show the event above it."""
        _, total = counted(event)
        if total:
            self._picture.count(event)
            return
        if event["type"] == "preview":
            self._picture.preview = _preview_lines(event, self._console)
            return
        text = words(event, show_errors=self._show_errors)
        if text:
            self.say(text)
        if event["type"] == "output" and "strips" in event:
            self._draw_strips(event)

    def _draw_strips(self, event: Event) -> None:
        from app.render.half_blocks import can_draw, print_strips, strips_of

        if can_draw(self._console):  # else the words above have told the picture's path
            print_strips(self._console, strips_of(event))

    def say(self, text: str) -> None:
        """Show a line above the bar, without what would steer the terminal."""
        # A pipe gets lines as they are; on a terminal words stay whole.
        soft_wrap = not self._console.is_terminal
        self._console.print(printable(text), markup=False, soft_wrap=soft_wrap)


class _Picture:
    """The bar of the latest counted event, and below it what is being made."""

    def __init__(self) -> None:
        self.event: Event | None = None
        self.preview: list[list[Segment]] = []

    def count(self, event: Event) -> None:
        """Move the bar; a preview is over when what it was of is."""
        if self.event is not None and self.event.get("name") != event.get("name"):
            self.preview = []
        self.event = event

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.segment import Segment
        from rich.text import Text

        if self.event is None:
            return
        done, total = counted(self.event)
        yield ProgressBar(total=total, completed=done, width=min(options.max_width, 100))
        yield Segment.line()
        yield Text(count_line(self.event), no_wrap=True, overflow="ellipsis")
        for line in self.preview:
            yield from line
            yield Segment.line()


def _preview_lines(event: Event, console: Console) -> list[list[Segment]]:
    """Draw the picture of a `preview` event for the room that there is; [] where it cannot be."""
    from app.render.half_blocks import can_draw, frame_lines

    rows = min(console.height - PREVIEW_BORDER, MAX_PREVIEW_ROWS)
    columns = console.width - 1
    if not can_draw(console) or rows < MIN_PREVIEW_ROWS or columns < MIN_PREVIEW_COLUMNS:
        return []
    try:
        return frame_lines(Path(str(event.get("path"))), columns, rows)
    except (OSError, ValueError):  # it is replaced or gone: the next one comes
        return []


def counted(event: Event) -> tuple[int, int]:
    """Return how much is done and how much there is, (0, 0) for what has no count."""
    names = {"step": ("step", "total_steps"), "phase": ("done", "total")}
    if event["type"] not in names:
        return 0, 0
    done, total = (event.get(name) for name in names[event["type"]])
    if not isinstance(done, int) or not isinstance(total, int) or total <= 0:
        return 0, 0
    return done, total


def count_line(event: Event) -> str:
    """Return the figures of a step or of a counted phase; usual ones fit 80 characters."""
    done, total = counted(event)
    if event["type"] == "phase":
        parts = [str(event.get("name", "")), f"{done}/{total}", f"{100 * done // total}%"]
        if (left := event.get("eta_s")) is not None:
            parts.append(f"ETA {duration(left)}")
        return "  ".join([*parts, str(event.get("detail") or "")]).rstrip()
    parts = [f"step {done}/{total}", f"{100 * done // total}%"]
    if isinstance(loss := event.get("loss"), float | int):
        parts.append(f"loss {loss:.4f}")
    if isinstance(lr := event.get("lr"), float | int):
        parts.append(f"lr {lr:.1e}")
    if step_time := event.get("step_time_s"):
        parts.append(f"{step_time:.2f} s/step")
    if memory := event.get("peak_vram_gib"):
        parts.append(f"{memory:.1f} GiB")
    elif memory := event.get("rss_gib"):
        parts.append(f"RAM {memory:.1f} GiB")
    if (left := event.get("eta_s")) is not None and done < total:
        parts.append(f"ETA {duration(left)}")
    return "  ".join(parts)


def words(event: Event, *, show_errors: bool) -> str:
    """Return what to say about an event that is not counted; empty for what needs no words."""
    kind = event["type"]
    if kind in {"log", "warning", "error"}:
        if kind == "error" and not show_errors:
            return ""
        mark = "" if kind == "log" else f"{kind}: "
        return _with_hint(f"{mark}{event.get('message', '')}", event)
    if kind == "phase":
        return ": ".join(str(part) for part in (event.get("name"), event.get("detail")) if part)
    at = f" at step {event['step']}" if event.get("step") is not None else ""
    if kind == "validation":
        return _validation_words(event, at)
    if kind in {"sample", "checkpoint", "output"} and "path" in event:
        return f"{kind}{at}: {event['path']}"
    return ""


def _validation_words(event: Event, at: str) -> str:
    loss = event.get("loss")
    if not isinstance(loss, float | int):
        return ""
    by_timestep = event.get("by_timestep") or {}
    parts = ", ".join(f"{timestep}: {value:.4f}" for timestep, value in by_timestep.items())
    return f"validation loss{at}: {loss:.4f}" + (f" ({parts})" if parts else "")


def _with_hint(text: str, event: Event) -> str:
    hint = event.get("hint")
    return f"{text}\n  {hint}" if hint else text
