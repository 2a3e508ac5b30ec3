"""`[[sampling.loras]]`: LoRAs of the config in samples, sheets and sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_sample_like import frames_of, sample_of
from test_sample_matrix import make, samples
from test_sample_run import CONFIG, events_of, models, write_lora

from trainer.contract.config import Prompt, load_config
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.vary import parse_vary
from trainer.jobs.sample_metadata import sampling_metadata
from trainer.sampling.results import read_sample_metadata

__all__ = ["models"]
LORAS = """
[[sampling.loras]]
path = "{folder}/fast.safetensors"
strength = 0.5
schedule = [[0, 1], [1, 0.25]]
"""
PROMPT = (Prompt(prompt="a cat", seed=3),)


@pytest.fixture
def plain(models: Path, tmp_path: Path) -> Path:
    write_lora(tmp_path / "fast.safetensors", 0.3)
    write_lora(tmp_path / "cat.safetensors", 0.4)
    path = tmp_path / "plain.toml"
    path.write_text(CONFIG.format(folder=models), encoding="utf-8")
    return path


@pytest.fixture
def config(plain: Path) -> Path:
    text = plain.read_text(encoding="utf-8") + LORAS.format(folder=plain.parent)
    path = plain.with_name("config.toml")
    path.write_text(text, encoding="utf-8")
    return path


def made(config: Path, **fields: Any) -> Path:
    output = config.parent / "out"
    return sample_of(events_of(SampleJobRequest(config=config, output=output, **fields)))


def test_they_come_before_those_of_the_command_line(config: Path, plain: Path) -> None:
    folder = config.parent
    fast = SampleLoRA(path=folder / "fast.safetensors", strength=0.5, schedule=((0, 1), (1, 0.25)))
    cat = SampleLoRA(path=folder / "cat.safetensors", strength=0.7)
    both = made(config, prompts=PROMPT, loras=(cat,))
    told = read_sample_metadata(both)
    assert [lora["file"] for lora in told["loras"]] == ["fast.safetensors", "cat.safetensors"]
    by_hand = made(plain, prompts=PROMPT, loras=(fast, cat))
    assert told == read_sample_metadata(by_hand)
    assert (frames_of(both) == frames_of(by_hand)).all()
    alone = made(plain, prompts=PROMPT, loras=(cat,))
    assert (frames_of(both) != frames_of(alone)).any()
    # Made again they count once, and not at all where the file names none.
    assert read_sample_metadata(made(config, like=both)) == told
    assert (frames_of(made(config, like=alone)) == frames_of(alone)).all()


def test_sheets_use_them_too(config: Path) -> None:
    cells = samples(make(config, parse_vary("lora=0,1"), prompts=PROMPT))
    used = {tuple(lora["file"] for lora in read_sample_metadata(p).get("loras", ())) for p in cells}
    assert used == {(), ("fast.safetensors",)}


def test_they_are_no_default_that_samples_of_a_training_are_made_with(config: Path) -> None:
    section = load_config(config).sampling
    assert section.loras[0].strength == 0.5
    assert "loras" not in sampling_metadata(section)
