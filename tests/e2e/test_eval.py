"""`menma eval` after a real training: one subject, several, one that fails."""

from __future__ import annotations

import json

import pytest

from tests.e2e.project import Project

pytestmark = pytest.mark.slow


def test_a_run_its_config_and_one_that_fails(project: Project) -> None:
    with project.config.open("a") as config:
        config.write("[validation]\nsplit = 0.4\ntimesteps = [200, 800]\nevery_steps = 3\n")
    project.done("train", project.config)
    told = project.done("eval", project.config, "--json")
    (single,) = json.loads(told.out)
    # Training has measured the same: before its first step the base, at its end what it made.
    first, last = project.events("validation")
    assert first["step"] == 0
    assert single["validation"]["base"]["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert single["validation"]["trained"]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert first["loss"] != last["loss"]
    assert (single["step"], single["run"]) == (3, "runs/tiny")

    several = project.menma("eval", "tiny", "nothing", project.config, "--set", "training.seed=1")
    assert several.code == 1, several
    assert "no such run: nothing" in several.words
    lines = several.out.splitlines()
    assert lines[0].split() == ["FIGURE", "tiny#1", "tiny#2"]
    (row,) = (line.split() for line in lines if line.startswith("validation loss, trained"))
    assert row[-2:] == [f"{last['loss']:.5f}"] * 2
