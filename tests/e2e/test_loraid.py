"""A slot on the whole way: trained by the command, and found by its number for sampling."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from trainer.contract.loraid import Partition
from trainer.contract.loraid_metadata import read_loraid


@pytest.mark.slow
def test_a_slot_is_trained_and_used(project):
    text = project.config.read_text()
    project.config.write_text(
        text.replace("[optimizer]", "[adapter.loraid]\nslot = 3\nslots = 4\n\n[optimizer]")
    )
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
