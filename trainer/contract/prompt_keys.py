"""What the keys of a prompt are called in prompt files, and how their values are written there.

A key that is added to `Prompt` can be written by its own name at once; a second name for it is one
line in `SPELLINGS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args, get_origin

from trainer.contract.config import Prompt
from trainer.contract.registry import nearest

FLAGS: Mapping[str, str] = {
    "w": "width",
    "h": "height",
    "f": "num_frames",
    "d": "seed",
    "s": "num_steps",
    "l": "guidance_scale",
    "fs": "flow_shift",
    "n": "negative_prompt",
    "i": "image",
    "ei": "last_image",
    "cn": "control",
    "v2v": "video",
    "st": "strength",
    "so": "solver",
    "sc": "schedule",
    "of": "one_frame",
    "ci": "control_images",
}
"""musubi-tuner's flag after a prompt, or one of our own -> key of `Prompt`."""

INFERENCE_FLAGS: Mapping[str, str] = {"g": "guidance_scale"}
"""What is a flag of Wan in musubi-tuner's prompts for inference only."""

SPELLINGS: Mapping[str, str] = {
    "text": "prompt",
    "negative": "negative_prompt",
    "neg": "negative_prompt",
    "frames": "num_frames",
    "frame_count": "num_frames",
    "steps": "num_steps",
    "step": "num_steps",
    "sample_steps": "num_steps",
    "guidance": "guidance_scale",
    "guidance_high_noise": "guidance_scale_high_noise",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "shift": "flow_shift",
    "discrete_flow_shift": "flow_shift",
    "image_path": "image",
    "end_image_path": "last_image",
    "control_path": "control",
    "control_video_path": "control",
}
"""Other name -> key of `Prompt`: those of `menma sample`'s options, of musubi-tuner, Takenoko."""

FOREIGN: Mapping[str, str] = {
    "cim": "masks of control images are not for the models Menma samples",
}
"""Flags that musubi-tuner knows and Menma does not: why."""

REPEATABLE = frozenset({"control_images"})
"""Keys whose flag is written once for each value."""

_MAY_BE_EMPTY = frozenset({"negative_prompt"})


def key_of(name: str) -> str | None:
    """Return the key of `Prompt` that a name in a file means; None: there is no such key."""
    return _key(name, SPELLINGS)


def key_of_flag(flag: str) -> str | None:
    """Return the key that a flag of a line means, short or long; None: there is no such flag.

    The text of the prompt is no flag: it stands first on its line.
    """
    key = _key(flag, {**SPELLINGS, **FLAGS, **INFERENCE_FLAGS})
    return None if key == "prompt" else key


def flag_hint(flag: str) -> str:
    """Return what to say about a flag that does not exist."""
    if flag in FOREIGN:
        return FOREIGN[flag]
    if _key(flag, SPELLINGS) == "prompt":
        return "write the text first, without a flag"
    short = (*FLAGS, *INFERENCE_FLAGS)
    if len(flag) <= max(map(len, short)):
        return f"known: {', '.join(f'--{name}' for name in short)}, and long names of keys"
    keys = [key for key in Prompt.model_fields if key != "prompt"]
    return nearest(f"--{dashed(flag)}", [f"--{dashed(name)}" for name in (*keys, *SPELLINGS)])


def key_hint(name: str) -> str:
    """Return what to say about a key that does not exist."""
    near = nearest(name, [*Prompt.model_fields, *SPELLINGS], otherwise=" ")
    return near.strip() or f"known: {', '.join(Prompt.model_fields)}"


def may_be_empty(key: str) -> bool:
    """Tell whether a flag means something without a value: a switch, or an empty text."""
    return key in _MAY_BE_EMPTY or bool in _kinds(Prompt.model_fields[key].annotation)


def written_value(key: str, text: str) -> Any:
    """Return the value that a text stands for, still to be checked by `Prompt`."""
    return parse_value(Prompt.model_fields[key].annotation, text)


def parse_value(annotation: Any, text: str) -> Any:
    """Read the value of a flag: `1,2,3` where there are several, nothing for a switch that is on.

    Args:
        annotation: the type that the value shall have; `None` in it does not count.
        text: as written.
    """
    kinds = list(_kinds(annotation))
    if bool in kinds and not text:
        return True
    if any(get_origin(kind) in {tuple, list} for kind in kinds):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def dashed(name: str) -> str:
    """Return the name of a key as an option has it."""
    return name.replace("_", "-")


def _key(name: str, spellings: Mapping[str, str]) -> str | None:
    plain = name.replace("-", "_")
    return plain if plain in Prompt.model_fields else spellings.get(plain)


def _kinds(annotation: Any) -> Iterable[Any]:
    if get_origin(annotation) in {tuple, list}:
        return [annotation]
    parts = get_args(annotation)
    return [part for part in parts if part is not NoneType] if parts else [annotation]
