"""What is wrong with a config while it is being written, and whether it fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.domain.cards import Card, circumstances
from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources, place_problems
from trainer.contract.config_rules import check_files
from trainer.contract.errors import ConfigError, MenmaError, Problem
from trainer.contract.memory_model import Estimate, estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was found about one state of a text."""

    problems: tuple[Problem, ...] = ()
    config: RunConfig | None = None
    """None: something is wrong that the config cannot be read with."""
    estimate: Estimate | None = None
    why_no_estimate: str = ""


def check_text(text: str, path: Path, card: Card | None) -> Checked:
    """Check a text as if it were the file at `path`, and estimate its memory.

    Files that are missing are problems, too; they do not keep the estimate from being made.

    Args:
        text: TOML, perhaps with mistakes.
        path: the file that it is to become.
        card: the GPU of the estimate; None: sizes without a verdict.
    """
    try:
        return _check(text, path, card)
    except (OSError, ValueError) as error:  # a path that no file can have, half typed
        words = f"it cannot be checked: {error}"
        return Checked(problems=(Problem(words[:200]),), why_no_estimate="see the problem")


def _check(text: str, path: Path, card: Card | None) -> Checked:
    try:
        loaded = load_config_with_sources(path, text=text)
    except ConfigError as error:
        why = "after the problems are solved"
        return Checked(problems=error.problems, why_no_estimate=why)
    config = loaded.config
    missing = dict.fromkeys(p for job in ("cache", "train") for p in check_files(config, job))
    problems = tuple(place_problems(missing, loaded.sources))
    try:
        if card is None:
            found = estimate(config)
        else:
            found = estimate(config, card.gpu, circumstances(config, card))
    except MenmaError as error:
        return Checked(problems=problems, config=config, why_no_estimate=error.message)
    return Checked(problems=problems, config=config, estimate=found)


def problem_line(problem: Problem, path: Path) -> int | None:
    """Return the line of a problem in the file; None: it is not of a line of this file."""
    return problem.line if problem.file == path else None


def problem_words(problem: Problem, path: Path) -> str:
    """Say a problem on one line."""
    place = f"line {problem.line}" if problem_line(problem, path) else ""
    if problem.file is not None and problem.file != path:
        place = f"{problem.file}:{problem.line}" if problem.line else str(problem.file)
    words = ": ".join(part for part in (place, problem.key, problem.message) if part)
    hint = " ".join(problem.hint.split())
    return f"{words} ({hint})" if hint else words
