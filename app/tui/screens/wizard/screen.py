"""The wizard's screen: one step after the other, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import ContentSwitcher, Footer, Static

from app.domain.wizard import Answers, save
from app.queue.adding import job_spec
from app.queue.chain import chain
from app.queue.store import QueueStore
from app.queue.worker import ensure_worker
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed
from app.tui.screens.wizard.data_steps import DataStep, GoalStep
from app.tui.screens.wizard.draft import Draft
from app.tui.screens.wizard.last_steps import NameStep, ReviewStep
from app.tui.screens.wizard.machine_steps import HardwareStep, PresetStep
from app.tui.screens.wizard.model_step import ModelStep
from app.tui.screens.wizard.step import Judged, Step
from app.tui.sources import Sources
from app.tui.widgets import Ask
from trainer.contract.config import RunConfig
from trainer.contract.errors import MenmaError, UserError

STEPS: dict[str, type[Step]] = {
    "model": ModelStep,
    "goal": GoalStep,
    "data": DataStep,
    "hardware": HardwareStep,
    "preset": PresetStep,
    "name": NameStep,
    "review": ReviewStep,
}
_NOT_FOR_DEMO = ("hardware", "preset")


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of the wizard."""

    path: Path
    words: str
    jobs: tuple[int, ...] = ()
    """Numbers in the queue; none: the config was only saved."""


class WizardScreen(Fitting, Keyed, ModalScreen[Finished | None]):
    """Asks for everything that a training needs, and starts it."""

    DEFAULT_CSS = """
    WizardScreen { background: $background; }
    WizardScreen #wizard-title { height: 1; background: $panel; }
    WizardScreen ContentSwitcher { height: 1fr; }
    WizardScreen #wizard-problem { height: auto; max-height: 3; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "on", "Next"),
        Binding("escape", "back", "Back"),
    ]

    class Seen(Message):
        """An answer was judged."""

        def __init__(self, step: Step, judged: Judged) -> None:
            super().__init__()
            self.step, self.judged = step, judged

    class Started(Message):
        """The config was saved and its jobs queued, or not."""

        def __init__(self, finished: Finished | None, problem: str = "") -> None:
            super().__init__()
            self.finished, self.problem = finished, problem

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self._sources = sources
        self.draft = Draft(sources.runs_dir)
        self._steps = {name: kind(name, self.draft) for name, kind in STEPS.items()}
        self._shown = "model"
        self._busy = False

    def compose(self) -> ComposeResult:
        """Lay out title, step, problem and keys."""
        yield Static(id="wizard-title")
        with ContentSwitcher(initial="wizard-model"):
            yield from self._steps.values()
        yield Static(id="wizard-problem")
        yield Footer()

    def on_mount(self) -> None:
        """Begin with the model."""
        self._show("model")

    @property
    def _order(self) -> list[str]:
        """The steps that are asked; the demo's model needs neither GPU nor preset."""
        return [n for n in STEPS if not (self.draft.is_demo and n in _NOT_FOR_DEMO)]

    @property
    def _step(self) -> Step:
        return self._steps[self._shown]

    @on(Step.Done)
    def done(self) -> None:
        """Judge what was answered."""
        if not self._busy:
            self._busy = True
            self._judge(self._step, self._step.read())

    @work(thread=True, exclusive=True, group="judge")
    def _judge(self, step: Step, given: Any) -> None:
        self.post_message(self.Seen(step, step.judge(given)))

    @on(Seen)
    def seen(self, message: Seen) -> None:
        """Go on, or say what is wrong."""
        self._busy = False
        if message.step is not self._step:
            return
        judged = message.judged
        if judged.problem:
            self._say(judged.problem)
            self._step.show_problem(judged)
            return
        self._step.take(judged.answer)
        if self._shown == "review":
            self._busy = True
            way, config = judged.answer
            self._start(self.draft.answers(), self.draft.path, way, config)
        else:
            order = self._order
            self._show(order[order.index(self._shown) + 1])

    def action_on(self) -> None:
        """Take the answer of the step; most widgets do so themselves."""
        self._step.done()

    def action_back(self) -> None:
        """Go to the step before; from the first one: leave."""
        if isinstance(self._step, PresetStep) and self._step.leave_filter():
            return
        order = self._order
        place = order.index(self._shown)
        if place:
            self._show(order[place - 1])
        elif self.draft.model is None:
            self.dismiss(None)
        else:
            self.app.push_screen(Ask("Leave? What was answered is lost.", "Leave"), self._left)

    def _left(self, agreed: bool | None) -> None:
        if agreed:
            self.dismiss(None)

    @work(thread=True, exclusive=True, group="start")
    def _start(self, answers: Answers, path: Path, way: str, config: RunConfig | None) -> None:
        try:
            save(answers, path)
            finished = Finished(path, f"Saved {path}")
            if way != "save" and config is not None:
                finished = _queued(self._sources.folder, answers, path, config, first=way == "run")
        except (MenmaError, OSError) as error:
            self.post_message(self.Started(None, str(error)))
            return
        self.post_message(self.Started(finished))

    @on(Started)
    def started(self, message: Started) -> None:
        """Leave, or say why it was not started."""
        self._busy = False
        if message.finished is None:
            self._say(message.problem)
        else:
            self.dismiss(message.finished)

    def _show(self, name: str) -> None:
        self._shown = name
        self._say("")
        self.query_one(ContentSwitcher).current = f"wizard-{name}"
        order = self._order
        title = Text(" menma ", style="bold", no_wrap=True, overflow="ellipsis")
        title.append(f"  New training  {order.index(name) + 1}/{len(order)} ")
        for other in order:
            shown = STEPS[other].TITLE
            title.append(f" {shown.upper() if other == name else shown}",
                         style="bold" if other == name else "")  # fmt: skip
        self.query_one("#wizard-title", Static).update(title)
        self._step.arrive()

    def _say(self, problem: str) -> None:
        words = Text(f"! {problem}", style="bold") if problem else Text("")
        self.query_one("#wizard-problem", Static).update(words)


def _queued(
    folder: Path, answers: Answers, path: Path, config: RunConfig, *, first: bool
) -> Finished:
    """Queue the jobs of a config.

    Args:
        folder: of the queue.
        answers: how many GPUs it takes, and whether it samples.
        path: the config.
        config: what is in it.
        first: before all that wait.
    """
    store = QueueStore(folder)
    try:
        waiting = [job.spec.priority for job in store.jobs() if job.waits]
        priority = max(waiting, default=-1) + 1 if first else 0
        specs = [
            job_spec(
                argv,
                priority=max(priority, 0),
                gpus=str(answers.num_gpus) if argv[0] == "train" else None,
            )
            for argv in chain(path, config, answers.steps)
        ]
        numbers = store.add_all(specs, chained=True)
        ensure_worker(store.folder)
        paused = " The queue is paused: P goes on." if store.paused else ""
    except UserError as error:
        raise UserError(f"{path} is saved, but not queued: {error.message}") from error
    finally:
        store.close()
    jobs = ", ".join(map(str, numbers))
    return Finished(path, f"Saved {path}, queued as jobs {jobs}.{paused}", tuple(numbers))
