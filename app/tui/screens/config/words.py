"""What the lines below the options say."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from app.domain.config_check import Checked, problem_words
from app.domain.config_options import Option
from app.render.memory_bar import bar_line, parts_line


def option_words(option: Option) -> Text:
    """Say what an option is and takes."""
    words = Text(option.key, style="bold")
    words.append(f"  {option.allowed}", style="not bold")
    if option.from_preset:
        words.append("  default of the preset", style="not bold")
    words.append(f"\n{option.help}", style="not bold")
    if option.choices and option.allowed in {"text", "path"}:
        words.append(f" One of {', '.join(option.choices)}.", style="not bold")
    return words


def memory_words(checked: Checked, without_gpu: str = "no GPU here; v names one") -> Text:
    """Say what memory it takes, and of what; `without_gpu` is said where there is no verdict."""
    result = checked.estimate
    if result is None:
        return Text(f"VRAM: no estimate: {checked.why_no_estimate}")
    remark = f"  {without_gpu}" if result.gpu is None else ""
    return Text(f"{bar_line(result)}{remark}\n{parts_line(result)}")


def problems_words(checked: Checked, path: Path) -> Text:
    """Say the first problem, and how many there are."""
    problems = checked.problems
    if not problems:
        return Text("no problems")
    count = f"{len(problems)} problems, ! lists them: " if len(problems) > 1 else ""
    return Text(f"! {count}{problem_words(problems[0], path)}", style="bold")
