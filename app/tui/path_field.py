"""A field for a path: completed as in a shell, or chosen from a tree."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.suggester import Suggester
from textual.widgets import DirectoryTree, Input, Label

from app.tui.fitting import Fitting
from app.tui.keyed import LISTS, Keyed, key_of

_KEYS = {"folder-above": "h", "cancel": "esc"}
MOST = 500
"""Names that are looked at to complete one."""


def completions(text: str, *, folders: bool, suffixes: Iterable[str] = ()) -> list[str]:
    """Return the paths that a typed text can become, as they would be typed; folders end in `/`.

    Args:
        text: may begin with `~`; counts from the working folder.
        folders: only folders.
        suffixes: of files that are offered; empty: all.
    """
    head, _, start = text.rpartition("/")
    folder = Path(f"{head}/" if "/" in text else ".").expanduser()
    endings = tuple(suffixes)
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith(start) or (name.startswith(".") and not start):
                    continue
                is_folder = entry.is_dir()
                if not is_folder and (folders or (endings and not name.endswith(endings))):
                    continue
                prefix = f"{head}/" if "/" in text else ""
                found.append(f"{prefix}{name}{'/' if is_folder else ''}")
                if len(found) == MOST:
                    break
    except (OSError, ValueError):
        return []
    return sorted(found)


def completed(text: str, found: Iterable[str]) -> str:
    """Return what all completions of a text begin with; the text itself where there are none."""
    names = sorted(found)
    if not names:
        return text
    first, last = names[0], names[-1]  # what these two share, all between them do
    same = (
        place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]
    )
    return first[: next(same, min(len(first), len(last)))]


def path_keys(app: App[Any]) -> str:
    """Say what the keys of a field for a path do."""
    complete = key_of(app, "pathfield.complete", "tab")
    return f"{complete} completes a path, {key_of(app, 'pathfield.tree', 'ctrl+o')} shows a tree"


class _PathSuggester(Suggester):
    def __init__(self, field: PathField) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._field = field

    async def get_suggestion(self, value: str) -> str | None:
        if not value:
            return None
        found = await asyncio.to_thread(self._field.completions, value)
        return found[0] if found and found[0] != value else None


class PathField(Keyed, Input):
    """A path. `tab` completes it, `up down` go through what it can be, `ctrl+o` shows a tree."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "complete", "Complete", show=False),
        Binding("up", "choice(-1)", "Choice", show=False),
        Binding("down", "choice(1)", "Choice", show=False),
        Binding("ctrl+o", "tree", "Tree", show=False),
    ]

    def __init__(
        self, *, folders: bool = False, suffixes: tuple[str, ...] = (), **attributes: Any
    ) -> None:
        super().__init__(compact=True, **attributes)
        self._folders, self._suffixes = folders, suffixes
        self._typed = False
        self._offered: list[str] = []
        self._place = -1
        self.suggester = _PathSuggester(self)

    @property
    def path(self) -> Path | None:
        """The path that was typed; None: nothing."""
        words = self.value.strip()
        return Path(words).expanduser() if words else None

    def completions(self, text: str) -> list[str]:
        """Return what a text can become."""
        return completions(text, folders=self._folders, suffixes=self._suffixes)

    def show(self, path: Path | str | None) -> None:
        """Put a path in, as if nothing had been typed."""
        self.value = "" if path is None else str(path)
        self.cursor_position = len(self.value)
        self._typed, self._place = False, -1

    def on_key(self, event: events.Key) -> None:
        """Remember that something was typed: only then `tab` completes instead of going on."""
        if event.is_printable or event.key in ("backspace", "delete"):
            self._typed, self._place = True, -1

    def action_complete(self) -> None:
        """Complete what was typed as far as that is clear, or go to the next field."""
        longer = completed(self.value, self.completions(self.value)) if self._typed else self.value
        if longer == self.value:
            self._typed = False
            self.screen.focus_next()
            return
        self.value = longer
        self.cursor_position = len(longer)

    def action_choice(self, by: int) -> None:
        """Take the next of the paths that what was typed can become."""
        if self._place < 0:
            self._offered = self.completions(self.value)
        if not self._offered:
            return
        start = 0 if by > 0 else -1
        self._place = (self._place + by) % len(self._offered) if self._place >= 0 else start
        self._place %= len(self._offered)
        self.value = self._offered[self._place]
        self.cursor_position = len(self.value)
        self._typed = True

    def action_tree(self) -> None:
        """Choose from a tree that begins at what was typed."""

        def chosen(path: Path | None) -> None:
            if path is not None:
                self.show(path)

        self.app.push_screen(PathTree(_existing(self.path), folders=self._folders), chosen)


class _Folders(Keyed, DirectoryTree):
    """A tree without hidden files."""

    KEYS_IN = LISTS

    ICON_NODE, ICON_NODE_EXPANDED, ICON_FILE = "+ ", "- ", "  "
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False),
        Binding("k", "cursor_up", "Up", show=False),
    ]

    def __init__(self, path: Path, *, folders: bool) -> None:
        super().__init__(path, id="path-tree")
        self._only_folders = folders

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        """Return what is shown."""
        for path in paths:
            if not path.name.startswith(".") and (not self._only_folders or path.is_dir()):
                yield path


class PathTree(Fitting, Keyed, ModalScreen[Path | None]):
    """A tree to choose a file or a folder from; the answer is its path, or None."""

    DEFAULT_CSS = """
    PathTree { align: center middle; }
    PathTree > Vertical { width: 96%; height: 90%; padding: 0 1; background: $panel; }
    PathTree DirectoryTree { height: 1fr; background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "close", "Cancel"),
        Binding("h,backspace", "parent", "Folder above"),
        Binding("s", "take", "Take"),
    ]

    def __init__(self, start: Path, *, folders: bool) -> None:
        super().__init__()
        self._start, self._only_folders = start, folders

    def compose(self) -> ComposeResult:
        """Lay out folder, tree and keys."""
        with Vertical():
            yield Label(Text(str(self._start), style="bold"), id="path-root")
            yield _Folders(self._start, folders=self._only_folders)
            take = key_of(self.app, "pathtree.take", "s")
            up, cancel = (key_of(self.app, f"pathtree.{n}", k) for n, k in _KEYS.items())
            yield Label(Text(f"enter open   {take} take   {up} folder above   {cancel} cancel"))

    def on_mount(self) -> None:
        """Begin in the tree."""
        self.query_one(_Folders).focus()

    def on_directory_tree_file_selected(self, event: DirectoryTree.FileSelected) -> None:
        """Answer with a file."""
        if not self._only_folders:
            self.dismiss(event.path)

    def action_take(self) -> None:
        """Answer with what the cursor is on."""
        node = self.query_one(_Folders).cursor_node
        if node is not None and node.data is not None:
            self.dismiss(node.data.path)

    def action_parent(self) -> None:
        """Begin one folder further up."""
        self._start = self._start.parent
        self.query_one("#path-root", Label).update(Text(str(self._start), style="bold"))
        self.query_one(_Folders).path = self._start

    def action_close(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)


def _existing(path: Path | None) -> Path:
    """Return the folder to begin with: the nearest one that is there."""
    found = (path or Path()).absolute()
    while not found.is_dir() and found != found.parent:
        found = found.parent
    return found
