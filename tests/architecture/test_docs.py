"""What the documents say exists: commands and their options, links, imports, generated pages."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from app.cli import main as cli
from trainer.contract import options_page

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_COMMAND = re.compile(r"\bmenma ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)([^`\n#]*)")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def commands_in(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield words and options of each `menma ...` in code."""
    for code in re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL):
        for words, rest in _COMMAND.findall(code):
            yield words.split(), re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)


def find(words: list[str]) -> object:
    """Return the command that the words name; what follows it are arguments."""
    command = typer.main.get_command(cli.app)
    for word in words:
        group = getattr(command, "commands", None)
        if group is None:
            return command
        assert word in group, f"menma has no command {word!r} in {' '.join(words)!r}"
        command = group[word]
    return command


def options_of(command: object) -> set[str]:
    """Return the option names of a command."""
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for words, options in commands_in(page.read_text(encoding="utf-8")):
        missing = set(options) - options_of(find(words))
        assert not missing, f"menma {' '.join(words)} has no {missing}"


def test_a_command_that_does_not_exist_would_be_seen():
    ((words, options),) = commands_in("run `menma tarin my.toml --detach`")
    assert options == ["--detach"]
    with pytest.raises(AssertionError, match="tarin"):
        find(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_python_seams_can_be_imported():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"^from (\S+) import ([\w, ]+?)(?:\s*#.*)?$", text, flags=re.MULTILINE)
    assert len(found) >= 3
    for module, names in found:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_options_page_is_fresh():
    assert options_page.is_fresh(), "run: python -m trainer schema"


def test_every_page_of_the_folder_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in readme] == []


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="bash is not installed")
def test_install_options_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    help_text = subprocess.run(
        ["/bin/bash", str(ROOT / "install.sh"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wanted = set(re.findall(r"install\.(?:sh|bat) (--[a-z-]+)", readme)) | {
        "--cpu",
        "--torch-index",
    }
    assert {"--demo", "--test"} <= wanted
    assert {option for option in wanted if option not in help_text} == set()
