"""A slot on the whole way: trained by the command, and found by its number for sampling."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from tests.e2e.project import write_project
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import CheckRequest
from trainer.contract.loraid import Partition
from trainer.contract.loraid_metadata import read_loraid
from trainer.jobs import check


def with_slot(project, slot, slots):
    text = project.config.read_text()
    table = f"[adapter.loraid]\nslot = {slot}\nslots = {slots}\n\n[optimizer]"
    project.config.write_text(text.replace("[optimizer]", table))


def test_check_refuses_a_slot_that_the_model_has_not(tmp_path, monkeypatch):
    project = write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    with_slot(project, 1, 13)
    with pytest.raises(ConfigError) as caught:
        check.run(CheckRequest(config=project.config), lambda kind, **fields: None)
    (problem,) = caught.value.problems
    assert (problem.key, problem.file) == ("adapter.loraid.slots", project.config)
    assert project.config.read_text().splitlines()[problem.line - 1] == "slots = 13"
    assert "2 blocks cannot be dealt out to 13 slots" in problem.message
    assert problem.hint == "use 1 to 12"


@pytest.mark.slow
def test_a_slot_is_trained_and_used(project):
    with_slot(project, 3, 4)
    project.done("train", project.config)
    parts = Partition(num_blocks=2, slots=4)
    layers = len(parts.modules(3))
    told = "LORAID slot 3 of 4 (pair, contiguous): "
    lines = project.run.console.read_text().splitlines()
    assert any(told in line and f"in {layers} layers" in line for line in lines)
    with safe_open(project.output, "pt") as file:
        found = read_loraid(file.metadata())
        assert len(list(file.keys())) == 2 * layers
    assert found is not None
    assert (found.ids, found.units) == ((3,), parts.units(3))
    words = ("--prompt", "a red field", "--loraid", "3", "--loraid-strength", "0.5")
    samples = project.done("sample", project.run.root, *words, "--loraid-from", "runs")
    assert samples.out.count(".mp4") == 1
