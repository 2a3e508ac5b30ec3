"""The wizard's questions, answered on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from app.domain.cards import Card, choose_card
from app.domain.data_folder import look_into
from app.domain.demo_model import demo_files, demo_preset
from app.domain.goals import data_problem, find_goal, kind_for
from app.domain.preset_offers import fitting_offers
from app.domain.presets import Preset, usable_preset
from app.domain.weight_search import ModelFiles, search, usual_places
from app.domain.wizard import (
    TITLES,
    Answers,
    can_sample,
    model_problems,
    name_problem,
    needs_image,
    suggested_name,
    suggested_steps,
    with_variant,
)
from trainer.contract.errors import ConfigError, Problem, UserError
from trainer.contract.variants import VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Answers as they were given; what is left out is found, or offered as in the app."""

    goal: str
    data: Path | None = None
    demo: bool = False
    model: ModelFiles = field(default_factory=lambda: ModelFiles(variant=""))
    preset: str | None = None
    """None: the best one; `none`: Menma's defaults."""
    name: str = ""
    max_steps: int | None = None
    prompt: str = ""
    image: Path | None = None
    gpu: str | None = None
    vram_gib: float | None = None
    num_gpus: int = 1
    runs_dir: Path = Path("runs")


def answers_of(wanted: Wanted, target: Path | None, *, force: bool = False) -> Answers:
    """Return complete answers.

    Args:
        wanted: what was given.
        target: file of the config; None: that of the name.
        force: the file may be there already.

    Raises:
        UserError: something is missing, wrong, or does not go together.
    """
    goal = find_goal(wanted.goal)
    model = _model(wanted)
    if wanted.data is None:
        raise UserError("--goal needs --data", hint="the folder of your clips or images")
    data = look_into(wanted.data.expanduser())
    if problem := data_problem(goal, data):
        raise UserError(problem)
    kind = kind_for(goal, data)
    assert kind is not None, "data_problem tells where there is none"
    preset = demo_preset() if wanted.demo else None
    answers = Answers(model=model, goal=goal, data=data, name=wanted.name)
    if not wanted.demo:
        preset = _preset(wanted, answers)
    name = wanted.name or suggested_name(goal, data.path, wanted.runs_dir)
    problem = name_problem(name, wanted.runs_dir, target)
    if problem and not (force and "already" in problem):
        raise UserError(problem, hint="give another --name")
    steps = wanted.max_steps
    if steps is None and not wanted.demo:
        steps = suggested_steps(preset, data.medium(kind).num_usable)
    if steps is not None and preset is not None and steps == preset.max_steps:
        steps = None
    _check_sample(wanted, model)
    return Answers(
        model=model,
        goal=goal,
        data=data,
        preset=None if wanted.demo else preset,
        name=name,
        max_steps=steps,
        prompt=wanted.prompt,
        image=wanted.image,
    )


def _model(wanted: Wanted) -> ModelFiles:
    if wanted.demo:
        if wanted.model != ModelFiles(variant=""):
            raise UserError("--demo and files of another model at once", hint="give one of them")
        return demo_files()
    model = with_variant(wanted.model)
    if model.main is None:
        raise UserError("no model is given", hint="add --transformer FILE, or --demo")
    if any(getattr(model, field) is None for field in ("vae", "text_encoder", "image_encoder")):
        model = search(usual_places(wanted.runs_dir)).completed(model)
    found = [
        Problem(f"{TITLES.get(key, 'model')}: {words}", f"--{key.replace('_', '-')}")
        for key, words in model_problems(model).items()
    ]
    if found:
        raise ConfigError(problems=found)
    return model


def _preset(wanted: Wanted, answers: Answers) -> Preset | None:
    if wanted.preset == "none":
        return None
    if wanted.preset is not None:
        preset = usable_preset(wanted.preset)
        if preset.variant not in ("", answers.model.variant):
            raise UserError(
                f"preset {preset.name} is for {preset.variant}, not {answers.model.variant}",
                hint=f"menma presets list --variant {answers.model.variant}",
            )
        return preset
    kind = kind_for(answers.goal, answers.data)
    assert kind is not None, "looked at before"
    card = choose_card(wanted.gpu, wanted.vram_gib)
    if card is not None and not card.here:
        card = Card(gpu=card.gpu, count=wanted.num_gpus)
    offers = fitting_offers(answers.model, answers.goal, kind, card)
    return offers[0].preset if offers else None


def _check_sample(wanted: Wanted, model: ModelFiles) -> None:
    known = VARIANTS.get(model.variant)
    if wanted.image is not None and not wanted.image.is_file():
        raise UserError(f"--image: no such picture: {wanted.image}")
    if not wanted.prompt or known is None:
        return
    if not can_sample(known):
        raise UserError(
            f"a sample of {known.title} takes more than a prompt",
            hint="leave --prompt out, and give the prompt to `menma sample`",
        )
    if needs_image(known) and wanted.image is None:
        raise UserError(f"a sample of {known.title} needs --image, its first frame")
