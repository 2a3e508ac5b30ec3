"""What was answered so far; every step reads and writes its own part, and going back keeps all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.domain.cards import Card
from app.domain.data_folder import DataFolder
from app.domain.demo_model import is_demo
from app.domain.goals import GoalChoice, kind_for
from app.domain.presets import Preset
from app.domain.weight_search import ModelFiles, Weights
from app.domain.wizard import Answers, config_path
from trainer.contract.dataset_config import MediaKind


@dataclass(slots=True)
class Draft:
    """The answers, some of them missing."""

    runs_dir: Path
    weights: Weights | None = None
    """What was found on the disk; None: it was not looked yet."""
    model: ModelFiles | None = None
    goal: GoalChoice | None = None
    data: DataFolder | None = None
    here: tuple[Card | None] | None = None
    """This machine's GPUs, in a tuple; None: it was not asked yet."""
    card: Card | None = None
    preset: Preset | None = None
    preset_taken: bool = False
    """Whether a preset, or none, was chosen for this model and goal."""
    name: str = ""
    suggested: tuple[str, int | None, str] = ("", None, "")
    """Name, steps and prompt that were offered: what is left as offered follows other answers."""
    max_steps: int | None = None
    prompt: str = ""
    image: Path | None = None

    @property
    def is_demo(self) -> bool:
        """Whether the model is the one that comes with Menma: it needs no preset and no GPU."""
        return self.model is not None and is_demo(self.model)

    @property
    def kind(self) -> MediaKind | None:
        """What is trained on."""
        if self.goal is None or self.data is None:
            return None
        return kind_for(self.goal, self.data)

    @property
    def num_items(self) -> int:
        """How many clips or images can be trained on."""
        if self.kind is None or self.data is None:
            return 0
        return self.data.medium(self.kind).num_usable

    @property
    def path(self) -> Path:
        """The file of the config."""
        return config_path(self.name)

    def answers(self, preset: Preset | None = None) -> Answers:
        """Return the answers.

        Args:
            preset: one to look at; None: the one that was chosen.

        Raises:
            ValueError: one is missing; the steps do not let that happen.
        """
        if self.model is None or self.goal is None or self.data is None:
            raise ValueError("model, goal and data come first")
        return Answers(
            model=self.model,
            goal=self.goal,
            data=self.data,
            preset=self.preset if preset is None else preset,
            name=self.name or "new",
            max_steps=self.max_steps,
            prompt=self.prompt,
            image=self.image,
        )
