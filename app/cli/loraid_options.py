"""`--loraid 1 2 3`: slots of LORAID on the command line, with their strengths and files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from trainer.contract.errors import UserError

Loraids = Annotated[
    list[str] | None,
    typer.Option(
        "--loraid",
        metavar="SLOT…",
        help="Slots of LORAID to use: --loraid 1 2 3. For one expert of Wan 2.2: 1@high_noise.",
    ),
]
LoraidStrengths = Annotated[
    list[str] | None,
    typer.Option(
        "--loraid-strength",
        metavar="NUMBER…",
        help="Strength of each slot in that order, or one for all (1); 0 switches a slot off.",
    ),
]
LoraidFrom = Annotated[
    list[Path] | None,
    typer.Option(
        "--loraid-from",
        metavar="PATH",
        help="Where the slots' files are: a file, a folder, a run, or the folder of the runs. "
        "Repeatable.",
    ),
]

_SLOT = re.compile(r"([0-9]+)(?:@(high_noise|low_noise))?")
_SEVERAL = {
    "--loraid": re.compile(r"[0-9][0-9,]*(?:@\w+)?"),
    "--loraid-strength": re.compile(r"[-+]?[0-9.][0-9.,eE+-]*"),
}
"""Options that take all words behind them that look like their values."""


class LoraidCommand(TyperCommand):
    """Lets `--loraid 1 2 3` stand for `--loraid 1 --loraid 2 --loraid 3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments with every such list written out."""
        return super().parse_args(ctx, spread(args))


def spread(arguments: list[str]) -> list[str]:
    """Return the arguments with the option repeated in front of each of its values."""
    found: list[str] = []
    option = ""
    for position, word in enumerate(arguments):
        if word == "--":
            return [*found, *arguments[position:]]
        if word in _SEVERAL:
            option = word
            following = arguments[position + 1 : position + 2]
            if not following or not _SEVERAL[option].fullmatch(following[0]):
                found.append(word)  # no value, or one that is none: told by the parser
                option = ""
        elif option and _SEVERAL[option].fullmatch(word):
            found += [f"{option}={part}" for part in word.split(",") if part]
        else:
            option = ""
            found.append(word)
    return found


def loraid_fields(
    slots: list[str] | None, strengths: list[str] | None, sources: list[Path] | None
) -> dict[str, Any]:
    """Return the fields `loraids` and `loraid_from` of a job's request.

    Raises:
        UserError: something is no slot or no strength, is missing, or does not exist.
    """
    slots, strengths, sources = slots or [], strengths or [], sources or []
    if not slots:
        if strengths or sources:
            given = "--loraid-strength" if strengths else "--loraid-from"
            raise UserError(f"{given} needs --loraid", hint="e.g. --loraid 1 2 3")
        return {}
    if not sources:
        raise UserError(
            "--loraid does not say where the files of the slots are",
            hint="add --loraid-from with their folder, or the files themselves",
        )
    missing = [str(path) for path in sources if not path.exists()]
    if missing:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    numbers = [_strength(text) for text in strengths] or [1.0]
    if len(numbers) not in {1, len(slots)}:
        raise UserError(
            f"{len(numbers)} strengths for {len(slots)} slots",
            hint="give one --loraid-strength for each slot, or one for all",
        )
    if len(numbers) == 1:
        numbers *= len(slots)
    uses = [_use(slot) | {"strength": n} for slot, n in zip(slots, numbers, strict=True)]
    places = [(use["slot"], use.get("expert")) for use in uses]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"slot {place[0]} is given twice", hint="give each slot once")
    return {"loraids": uses, "loraid_from": [str(path) for path in sources]}


def _use(text: str) -> dict[str, Any]:
    match = _SLOT.fullmatch(text)
    if match is None or int(match[1]) < 1:
        raise UserError(
            f"--loraid: {text!r} is no slot", hint="slots count from 1; 1@high_noise for one expert"
        )
    return {"slot": int(match[1]), **({"expert": match[2]} if match[2] else {})}


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--loraid-strength: {text!r} is no number") from None
