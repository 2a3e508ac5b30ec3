"""`menma sample --help`: every option under one heading."""

from __future__ import annotations

import re

import typer

from app.cli.commands.sample import app
from app.cli.sample_help import SECTIONS


def test_every_option_has_its_place_in_the_help(menma):
    answer = menma("sample", "--help")
    assert answer.code == 0
    headings = re.findall(r"^(\w[\w ]*):$", answer.out, re.MULTILINE)
    assert headings == ["Arguments", *SECTIONS, "Other options"]
    parameters = {one.name: one for one in typer.main.get_command(app).params}
    listed = [name for names in SECTIONS.values() for name in names]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= parameters.keys()
    assert parameters.keys() - set(listed) == {"source", "overrides", "as_json"}
    for heading, names in SECTIONS.items():
        text = answer.out.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
        assert shown == [_long(parameters[name]) for name in names]


def _long(parameter) -> str:
    return next(option for option in parameter.opts if option.startswith("--"))
