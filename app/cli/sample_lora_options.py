"""`--lora FILE=STRENGTH` of `menma sample`: strengths for each expert, and from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.options import lora_use
from trainer.contract.errors import UserError

SampleLoras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[=STRENGTH]",
        help="LoRA and its strength (1 when left out): a number; low:0.8,high:1.2 for the two "
        "experts of Wan 2.2; or points over the steps, 0:1,0.5:0.4 (share of the steps:strength). "
        "@high_noise or @low_noise at the end: for that expert alone. Repeatable.",
    ),
]
MergeLoras = Annotated[
    bool,
    typer.Option(
        "--merge/--attach",
        help="Add the LoRAs to the weights, which makes steps faster and rounds; else they "
        "compute beside the weights, as in training.",
    ),
]

_EXPERT_KEYS = {
    "low": "strength",
    "low_noise": "strength",
    "high": "strength_high_noise",
    "high_noise": "strength_high_noise",
}
_FORMS = "write FILE=0.8, FILE=low:0.8,high:1.2, or FILE=0:1,0.5:0.4 (share of the steps:strength)"


def sample_lora(text: str) -> dict[str, Any]:
    """Read `FILE[=STRENGTH][@EXPERT]` into the fields of `contract.lora_use.SampleLoRA`.

    `FILE:STRENGTH`, as other commands have it, is read, too.

    Raises:
        UserError: the file does not exist, or the strength is none.
    """
    rest, expert = text, ""
    for name in ("high_noise", "low_noise"):
        if rest.endswith(f"@{name}"):
            rest, expert = rest.removesuffix(f"@{name}"), name
    file, separator, strength = rest.rpartition("=")
    if not separator or Path(rest).exists():
        return lora_use(text)
    if not Path(file).exists():
        raise UserError(f"--lora: no such LoRA file: {file}", hint=_FORMS)
    use: dict[str, Any] = {"path": file, **_strength(strength, text)}
    if expert and "strength_high_noise" in use:
        raise UserError(
            f"--lora {text}: strengths for both experts, and @{expert}", hint="give one of the two"
        )
    return use | ({"expert": expert} if expert else {})


def _strength(text: str, whole: str) -> dict[str, Any]:
    if ":" not in text:
        return {"strength": _number(text, whole)}
    pairs = [part.strip().partition(":") for part in text.split(",")]
    keys = [key.strip() for key, _, _ in pairs]
    values = [_number(value, whole) for _, _, value in pairs]
    if any(key in _EXPERT_KEYS for key in keys):
        fields = [_EXPERT_KEYS.get(key, "") for key in keys]
        if sorted(fields) != ["strength", "strength_high_noise"]:
            raise UserError(
                f"--lora {whole}: the strengths of both experts go together",
                hint="low:0.8,high:1.2; for one alone FILE=0.8@low_noise",
            )
        return dict(zip(fields, values, strict=True))
    points = [(_number(key, whole), value) for key, value in zip(keys, values, strict=True)]
    shares = [share for share, _ in points]
    if not all(0 <= share <= 1 for share in shares) or shares != sorted(shares):
        raise UserError(
            f"--lora {whole}: the points of a schedule go from 0 (first step) to 1 (last step)",
            hint="e.g. 0:1,0.5:1,0.5:0 for the first half of the steps only",
        )
    return {"schedule": points}


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--lora {whole}: {text!r} is no number", hint=_FORMS) from None
