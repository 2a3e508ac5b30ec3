"""Which model: files that were found on the disk, files of one's own, or the demo's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input, Label, OptionList, Static

from app.domain.demo_model import TITLE as DEMO_TITLE
from app.domain.demo_model import demo_files
from app.domain.weight_files import SUFFIXES
from app.domain.weight_search import ModelFiles, Weights, search, usual_places
from app.domain.wizard import FIELDS, TITLES, fields_of, model_problems, with_variant, written_path
from app.tui.keyed import Keyed
from app.tui.lines import Lines
from app.tui.path_field import PathField, path_keys
from app.tui.screens.wizard.step import Judged, Step
from trainer.contract.variants import VARIANTS

OWN, DEMO = "own", "demo"
_OTHERS = {OWN: "other files: put in their paths below", DEMO: DEMO_TITLE}
_DEMO_WORDS = (
    "It knows coloured shapes that move, trains on a CPU in about a minute, and shows how "
    "everything works, with your clips or those of `menma demo`."
)
_ENDINGS = (*sorted(SUFFIXES), ".pt", ".bin", ".ckpt", ".model", ".json")


class VariantInput(Keyed, Input):
    """The name of a variant; up and down go through all of them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "choice(-1)", "Choice", show=False),
        Binding("down", "choice(1)", "Choice", show=False),
    ]

    def action_choice(self, by: int) -> None:
        """Take the next variant."""
        names = list(VARIANTS)
        place = names.index(self.value) + by if self.value in names else 0
        self.value = names[place % len(names)]
        self.cursor_position = len(self.value)


class ModelStep(Step):
    """Finds models; what is chosen fills the fields, and what is typed into them counts."""

    TITLE = "model"
    DEFAULT_CSS = """
    ModelStep #wizard-models { max-height: 7; }
    ModelStep .-hidden { display: none; }
    """

    class Found(Message):
        """The disk was looked through."""

        def __init__(self, weights: Weights) -> None:
            super().__init__()
            self.weights = weights

    def compose(self) -> ComposeResult:
        """Lay out the models and the fields of their files."""
        yield Label("Which model is to be trained?", classes="words")
        yield Lines(id="wizard-models")
        yield Static("Looking for models ...", id="wizard-places", classes="words")
        with Horizontal(classes="row gap", id="row-variant"):
            yield Label("model", classes="label")
            yield VariantInput(compact=True, id="wizard-variant")
        yield Static(_DEMO_WORDS, id="wizard-demo", classes="words gap -hidden")
        for field in FIELDS:
            with Horizontal(classes="row", id=f"row-{field}"):
                yield Label(TITLES[field], classes="label")
                yield PathField(suffixes=_ENDINGS, id=f"wizard-{field.replace('_', '-')}")
        yield Static(
            f"enter goes on: what is missing is looked for. {path_keys(self.app)}, up and down go "
            "through what a field can be.",
            classes="words gap",
        )

    def arrive(self) -> None:
        """Look through the disk, the first time; then show the models."""
        if self.draft.weights is None:
            self._models: dict[str, ModelFiles] = {}
            self._mine: ModelFiles | None = None
            self._shown = ""
            self._list("")
            self._look()
        self.query_one(Lines).focus()

    @work(thread=True, exclusive=True, group="weights")
    def _look(self) -> None:
        self.post_message(self.Found(search(usual_places(self.draft.runs_dir))))

    @on(Found)
    def found(self, message: Found) -> None:
        """Show what was found."""
        weights = self.draft.weights = message.weights
        self._models = {f"model-{n}": model for n, model in enumerate(weights.models())}
        now = self.query_one(Lines).name_in_focus
        untouched = now == OWN and not any(self._typed().values())
        self._list("" if untouched else now)
        count = len(weights.files)
        looked = ", ".join(_short(folder) for folder in weights.places[:4])
        words = f"{count} weight files found in {looked}" if count else "no weight files found"
        if not count and weights.places:
            words += f" in {looked}"
        self.query_one("#wizard-places", Static).update(
            Text(words, no_wrap=True, overflow="ellipsis")
        )

    @on(OptionList.OptionHighlighted, "#wizard-models")
    def highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show the files of the model in focus."""
        event.stop()
        name, before = event.option_id or "", self._shown
        if name == before or name != self.query_one(Lines).name_in_focus:
            return
        self._shown = name
        if before == OWN:
            self._mine = self._own()
        if name == OWN:
            self._show_files(self._mine or self._own())
        else:
            self._show_files(self._models.get(name), demo=name == DEMO)

    @on(OptionList.OptionSelected, "#wizard-models")
    def selected(self, event: OptionList.OptionSelected) -> None:
        """Take a model, or begin with the first file."""
        event.stop()
        if event.option_id == OWN:
            self.query_one("#wizard-transformer", PathField).focus()
        else:
            self.done()

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        """Go to the line of one's own files when something is typed into a field."""
        event.stop()
        if not event.input.has_focus:
            return
        lines = self.query_one(Lines)
        if lines.name_in_focus != OWN:
            self._mine, self._shown = self._own(), OWN
            lines.highlighted = len(self._models)
        if event.input.id == "wizard-variant":
            self._show_rows(event.value.strip())

    @on(Input.Submitted)
    def submitted(self, event: Input.Submitted) -> None:
        """Go on; what is missing is looked for, and then asked for."""
        event.stop()
        self.done()

    def read(self) -> tuple[ModelFiles, Weights | None]:
        """Return the model of the line, with what the fields say."""
        if self.query_one(Lines).name_in_focus == DEMO:
            return demo_files(), None
        return self._own(), self.draft.weights

    def judge(self, given: Any) -> Judged:
        """Find out what the files are, find what is missing, say what is wrong."""
        model, weights = given
        if weights is None and model == demo_files():
            return Judged(model)
        model = with_variant(model)
        if weights is not None:
            model = weights.completed(model)
        problems = model_problems(model)
        if not problems:
            return Judged(model)
        field, words = next(iter(problems.items()))
        title = TITLES.get(field, "model")
        return Judged(model, f"{title}: {words}", f"wizard-{field.replace('_', '-')}")

    def take(self, answer: Any) -> None:
        """Remember the model; another one takes another preset."""
        if answer != demo_files():
            self._show_files(answer)
        if self.draft.model != answer:
            self.draft.model = answer
            self.draft.preset, self.draft.preset_taken = None, False

    def show_problem(self, judged: Judged) -> None:
        """Show what was found, and go to the field that lacks something."""
        self._show_files(judged.answer)
        self.query_one(f"#{judged.field}").focus()

    def _list(self, name: str) -> None:
        lines = {key: _line(model) for key, model in self._models.items()}
        self.query_one(Lines).show({**lines, **_OTHERS}, name)

    def _typed(self) -> dict[str, str]:
        return {
            field: self.query_one(f"#wizard-{field.replace('_', '-')}", Input).value.strip()
            for field in FIELDS
        }

    def _own(self) -> ModelFiles:
        """Return the model as the fields have it."""
        variant = self.query_one("#wizard-variant", Input).value.strip()
        shown = fields_of(variant)
        paths: dict[str, Path] = {
            field: Path(words).expanduser()
            for field, words in self._typed().items()
            if words and field in shown
        }
        return replace(ModelFiles(variant=variant), **paths)  # type: ignore[arg-type]  # fields of it

    def _show_files(self, model: ModelFiles | None, *, demo: bool = False) -> None:
        """Fill the fields; those that the model does not have are hidden."""
        self._show_rows(model.variant if model is not None else "", demo=demo)
        if demo or model is None:
            return
        self.query_one("#wizard-variant", Input).value = model.variant
        for field in FIELDS:
            path: Path | None = getattr(model, field)
            words = "" if path is None else written_path(path)
            widget = self.query_one(f"#wizard-{field.replace('_', '-')}", PathField)
            if widget.value != words:
                widget.show(words)

    def _show_rows(self, variant: str, *, demo: bool = False) -> None:
        """Show the fields that a model has; the demo's model has none."""
        shown = () if demo else ("variant", *fields_of(variant))
        for field in ("variant", *FIELDS):
            self.query_one(f"#row-{field}").set_class(field not in shown, "-hidden")
        self.query_one("#wizard-demo").set_class(not demo, "-hidden")


def _line(model: ModelFiles) -> str:
    where = _short(model.main.parent) if model.main is not None else ""
    both = model.transformer is not None and model.transformer_high_noise is not None
    known = VARIANTS.get(model.variant)
    part = ""
    if known is not None and known.experts and not both:
        part = ", high noise only" if model.transformer is None else ", low noise only"
    name = model.main.name if model.main is not None else ""
    return f"{model.title}{part}   {name}   {where}"


def _short(folder: Path) -> str:
    """Return a folder as people write it."""
    absolute = folder.absolute()
    for base, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        try:
            inner = absolute.relative_to(base).as_posix()
        except ValueError:
            continue
        return sign if inner == "." else f"{sign}/{inner}"
    return absolute.as_posix()
