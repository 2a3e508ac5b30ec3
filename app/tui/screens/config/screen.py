"""What is done with a config: open, save, compare, edit elsewhere, queue, train."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import SuspendNotSupported
from textual.binding import Binding, BindingType

from app.domain.config_check import problem_line, problem_words
from app.domain.config_file import ConfigFile, find_configs, open_config
from app.domain.external_editor import edited
from app.queue.adding import job_spec
from app.queue.chain import chain
from app.queue.worker import APP, ensure_worker
from app.tui.screens.config.choose import Choose
from app.tui.screens.config.preset_picker import PresetPicker
from app.tui.screens.config.view import ConfigView
from app.tui.sources import Sources
from app.tui.widgets import Ask, TextView
from trainer.contract.errors import MenmaError

STEPS = ("cache", "train", "sample")


class ConfigScreen(ConfigView):
    """The config that is being edited."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("w,ctrl+s", "save", "Save", key_display="w"),
        Binding("r", "start", "Run"),
        Binding("d", "difference", "Diff"),
        Binding("exclamation_mark", "problems", "Problems", key_display="!"),
        Binding("p", "preset", "Preset", show=False),
        Binding("c", "command", "Command", show=False),
        Binding("e", "editor", "$EDITOR", show=False),
        Binding("o", "open", "Open", show=False),
    ]

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self._sources = sources

    @property
    def has_changes(self) -> bool:
        """Whether something would be lost by leaving."""
        return self.file is not None and self.file.is_changed

    def on_mount(self) -> None:
        """Without a file, ask for one."""
        super().on_mount()
        if self.file is None:
            self.action_open()

    def open(self, path: Path) -> None:
        """Open a file, or say why it cannot be."""
        try:
            file = open_config(path)
        except MenmaError as error:
            self.notify(str(error), severity="error", timeout=10)
            return
        self.show_file(file)
        if file.saved is None:
            self.notify(f"A copy of the run's config. It will be saved as {file.path}.")

    def action_open(self) -> None:
        """Choose a file: of `configs/` or of a run."""
        files = find_configs(self._sources.runs_dir)
        if not files:
            self.notify("There is no config yet: `menma new -o configs/NAME.toml` writes one.")
            return

        def chosen(place: int | None) -> None:
            if place is not None:
                self.open(files[place])

        def choose() -> None:
            self.app.push_screen(Choose("Open a config", [str(path) for path in files]), chosen)

        if self.file is not None and self.file.is_changed:
            self._ask(f"{self.file.path} has changes that are not saved.", "Lose them", choose)
        else:
            choose()

    def action_save(self) -> None:
        """Save the file; ask first where that may be a mistake."""
        file = self.file
        if file is None:
            return
        if not file.is_changed and not file.changed_outside:
            self.notify("Nothing has changed since it was saved.", timeout=2)
            return
        self._save(file, lambda: self.notify(f"Saved {file.path}", timeout=2))

    def action_difference(self) -> None:
        """Show what saving would change."""
        if self.file is not None:
            words = self.file.difference() or "Nothing has changed since it was saved."
            self.app.push_screen(TextView("Changes that are not saved", words))

    def action_problems(self) -> None:
        """List the problems; Enter goes to the line."""
        file, problems = self.file, self.checked.problems
        if file is None or not problems:
            self.notify("No problems.", timeout=2)
            return

        def chosen(place: int | None) -> None:
            line = problem_line(problems[place], file.path) if place is not None else None
            if line is not None:
                self.go_to_line(line)

        words = [problem_words(problem, file.path) for problem in problems]
        title = "1 problem" if len(words) == 1 else f"{len(words)} problems"
        self.app.push_screen(Choose(title, words), chosen)

    def action_preset(self) -> None:
        """Choose a preset for the config: one edit."""
        file = self.file
        if file is None:
            return

        def chosen(text: str | None) -> None:
            if text is not None:
                file.document.replace_all(text)
                self.show_document()

        self.app.push_screen(PresetPicker(file.document.text, file.path, self.choice), chosen)

    def action_command(self) -> None:
        """Show the commands that do the same."""
        if self.file is None:
            return
        path = shlex.quote(str(self.file.path))
        lines = [f"cd {shlex.quote(str(Path.cwd()))}"]
        lines += [f"menma {name} {path}" for name in ("check", "estimate", "cache", "train")]
        lines += [f"menma queue chain {path} --steps {','.join(STEPS)}"]
        self.app.push_screen(TextView(f"Commands of {self.file.path}", "\n".join(lines)))

    def action_editor(self) -> None:
        """Edit the text in the user's editor; what it saves is one edit here."""
        file = self.file
        if file is None:
            return
        try:
            with self.app.suspend():
                text = edited(file.document.text, file.path.name)
        except SuspendNotSupported:
            self.notify("This terminal cannot be lent to an editor.", severity="warning")
            return
        except MenmaError as error:
            self.notify(str(error), severity="error", timeout=10)
            return
        if text is None:
            self.notify("The editor ended with an error: nothing is taken.", severity="warning")
            return
        file.document.replace_all(text)
        self.show_document()

    def action_start(self) -> None:
        """Train it or queue it, as it is saved."""
        file = self.file
        if file is None:
            return
        if self.checked.config is None:
            self.notify("It has problems: ! lists them.", severity="warning")
        elif file.is_changed:
            self._ask(
                f"{file.path} has changes. Save them first?",
                "Save",
                lambda: self._save(file, lambda: self._choose_start(file)),
            )
        else:
            self._choose_start(file)

    def _choose_start(self, file: ConfigFile) -> None:
        steps = (STEPS, ("train",))
        lines = [f"queue {', '.join(part)}" for part in steps]

        def chosen(place: int | None) -> None:
            if place is None:
                return
            if place == len(steps):
                self._train(file.path)
            else:
                self._try(lambda: self._queue(file.path, steps[place]))

        lines.append("train now, in the background")
        self.app.push_screen(Choose(f"Start {file.path}", lines), chosen)

    def _queue(self, path: Path, steps: tuple[str, ...]) -> None:
        store, config = self._sources.store, self.checked.config
        if store is None or config is None:
            self.notify("The queue cannot be used.", severity="error")
            return
        numbers = store.add_all(
            [job_spec(argv) for argv in chain(path, config, steps)], chained=True
        )
        ensure_worker(store.folder)
        jobs = ", ".join(map(str, numbers))
        self.notify(f"Queued as {'job' if len(numbers) == 1 else 'jobs'} {jobs}. 1 shows them.")

    @work(thread=True, exclusive=True, group="train")
    def _train(self, path: Path) -> None:
        """Start the training with the command that people type, in a thread."""
        argv = [*APP, "train", str(path), "--detach"]
        self.app.call_from_thread(self.notify, f"Starting {path.stem} ...")
        try:
            answer = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except OSError as error:
            self.app.call_from_thread(self.notify, str(error), severity="error")
            return
        if answer.returncode:
            view = TextView(f"{path} does not train", answer.stderr.strip())
            self.app.call_from_thread(self.app.push_screen, view)
        else:
            words = answer.stderr.strip() or f"{answer.stdout.strip()} trains."
            self.app.call_from_thread(self.notify, f"{words}\n1 shows it.")

    def _save(self, file: ConfigFile, then: Callable[[], None]) -> None:
        doubts = []
        if not file.document.is_toml:
            doubts.append("It is not valid TOML; nothing can be started with it.")
        if file.changed_outside:
            doubts.append("The file was changed by another program since it was opened.")

        def save() -> None:
            self._try(file.save)
            self.tell()
            if not file.is_changed:
                then()

        if doubts:
            self._ask(f"{file.path}:\n" + "\n".join(doubts), "Save it all the same", save)
        else:
            save()

    def _ask(self, question: str, yes: str, act: Callable[[], None]) -> None:
        def answered(agreed: bool | None) -> None:
            if agreed:
                act()

        self.app.push_screen(Ask(question, yes), answered)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (MenmaError, OSError) as error:
            self.notify(str(error), severity="error", timeout=10)
