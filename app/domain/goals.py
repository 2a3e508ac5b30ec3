"""What somebody wants to teach a model, and which presets and data that goes with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.domain.data_folder import DataFolder, some
from app.domain.presets import Preset
from trainer.contract.dataset_config import MediaKind
from trainer.contract.errors import UserError
from trainer.contract.registry import nearest

GoalName = Literal["character", "style", "motion", "images", "full"]
STILLS = 4
"""Frames that are taken of each clip where only the looks of clips are to be learned."""


@dataclass(frozen=True, slots=True)
class GoalChoice:
    """One line of the choice."""

    name: GoalName
    title: str
    help: str
    presets: tuple[str, ...]
    """Goals of presets that serve it, the best first."""
    medium: MediaKind | None = None
    """The only kind of data that it can be learned from; None: either."""


GOALS: dict[str, GoalChoice] = {
    goal.name: goal
    for goal in (
        GoalChoice(
            "character",
            "a character",
            "A face, figure, animal or thing that is to look the same in every video. Two or "
            "three dozen images or clips of it, from all sides.",
            ("character", "general"),
        ),
        GoalChoice(
            "style",
            "a style",
            "How everything looks: drawing, film stock, light. Some dozen images or clips that "
            "have nothing in common but the style.",
            ("style", "general", "character"),
        ),
        GoalChoice(
            "motion",
            "a motion or an effect",
            "How something moves: a dance, a camera movement, a transformation. Needs clips.",
            ("motion", "general"),
            "video",
        ),
        GoalChoice(
            "images",
            "something from images only",
            "Looks, from a folder of images; how it moves stays the model's. Takes the least "
            "memory and time.",
            ("character", "style", "general"),
            "image",
        ),
        GoalChoice(
            "full",
            "everything: a full fine-tune",
            "All weights of the model are trained, and a whole model is written. For hundreds of "
            "clips and large machines; with less, a LoRA is better.",
            ("full",),
        ),
    )
}


def find_goal(name: str) -> GoalChoice:
    """Return a goal by its name.

    Raises:
        UserError: there is none; the hint names the nearest one.
    """
    if name not in GOALS:
        raise UserError(f"unknown goal {name!r}", hint=nearest(name, GOALS))
    return GOALS[name]


def kind_for(goal: GoalChoice, data: DataFolder) -> MediaKind | None:
    """Return which of a folder's media are trained on; None: none that would do."""
    fitting = [kind for kind in data.kinds if goal.medium in (None, kind)]
    return fitting[0] if fitting else None


def data_problem(goal: GoalChoice, data: DataFolder) -> str:
    """Return why this goal cannot be reached with a folder; "": it can."""
    if data.problem:
        return f"{data.path}: {data.problem}"
    if not data.kinds:
        if data.unread:
            return f"Menma does not read these: {some(data.unread)}. Convert them, say with ffmpeg."
        where = f" Its folders are not searched: give one of {some(data.inner)}."
        return f"{data.path} holds neither clips nor images.{where if data.inner else ''}"
    kind = kind_for(goal, data)
    if kind is None:
        lacks = "clips" if goal.medium == "video" else "images"
        return f"{goal.title} is learned from {lacks}, and {data.path} has none: give another one."
    medium = data.medium(kind)
    if not medium.num_usable:
        return (
            f"None of the {medium.num_items} has a caption: a file of its name with .txt, such as "
            f"{Path(medium.items[0]).stem}.txt, that says what is to be seen."
        )
    return ""


def data_words(goal: GoalChoice, data: DataFolder) -> list[str]:
    """Say what was found in a folder that can be used, line by line."""
    kind = kind_for(goal, data)
    if kind is None:
        return []
    medium, name = data.medium(kind), "clips" if kind == "video" else "images"
    lines = [f"{medium.num_items} {name}" + ("" if medium.without_caption else ", all captioned")]
    if medium.without_caption:
        lines.append(
            f"{len(medium.without_caption)} without a caption are left out: "
            f"{some(medium.without_caption)}"
        )
    other: MediaKind = "image" if kind == "video" else "video"
    if left := data.medium(other).num_items:
        what = "images" if kind == "video" else "clips"
        lines.append(f"{left} {what} beside them are left out: give them a folder of their own")
    if kind == "image":
        lines.append("Images only: looks are learned, movement stays the model's.")
    if data.unread:
        lines.append(f"Not read: {some(data.unread)}")
    if data.inner:
        lines.append(f"Folders in it are not searched: {some(data.inner)}")
    return lines


def source_values(preset: Preset | None, kind: MediaKind, folder: str) -> dict[str, Any]:
    """Return the keys of `[[dataset.sources]]` for a folder, in a preset's sizes.

    A preset for images that meets clips takes single frames of them.

    Args:
        preset: where the sizes come from; None: those of a new config.
        kind: of what lies in the folder.
        folder: as it is to be written.
    """
    of_preset = dict(preset.source) if preset is not None else {}
    sizes = {key: value for key, value in of_preset.items() if not key.endswith("_directory")}
    video = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames",
             "source_fps")  # fmt: skip
    if kind == "image":
        return {
            "image_directory": folder,
            **{key: value for key, value in sizes.items() if key not in video},
        }
    if preset is not None and preset.medium == "images":
        sizes |= {"target_frames": [1], "frame_extraction": "uniform", "frame_sample": STILLS}
    sizes.setdefault("target_frames", [33])
    return {"video_directory": folder, **sizes}
