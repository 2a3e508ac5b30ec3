"""Files of runs, and the command that samples with one of them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from app.tui.outputs import find_outputs, sampling_command


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with a run that has written two steps of both experts, and a final pair."""
    run = tmp_path / "runs/fish"
    (run / "output").mkdir(parents=True)
    (run / "config.toml").write_text("[adapter]\nkind = 'lora'\n")
    (run / "status.json").write_text("{}")
    names = [
        f"fish-{expert}_noise{step}"
        for step in ("-step00000100", "-step00000200", "")
        for expert in ("low", "high")
    ]
    for moment, name in enumerate(names, start=1000):
        file = run / "output" / f"{name}.safetensors"
        file.touch()
        os.utime(file, (moment, moment))
    return tmp_path / "runs"


def command_for(runs: Path, name: str) -> list[str]:
    outputs = find_outputs(runs)
    (output,) = (one for one in outputs if one.file.stem == name)
    return sampling_command(output, outputs)


def test_the_newest_file_is_sampled_as_the_run(runs: Path) -> None:
    for name in ("fish-low_noise", "fish-high_noise"):
        assert command_for(runs, name) == ["sample", str(runs / "fish")]


def test_an_older_file_is_sampled_with_the_other_experts_of_its_step(runs: Path) -> None:
    run = runs / "fish"
    command = command_for(runs, "fish-low_noise-step00000100")
    assert command[:4] == ["sample", str(run / "config.toml"), "--output", str(run / "samples")]
    assert command[4::2] == ["--lora", "--lora"]
    assert sorted(Path(file).name for file in command[5::2]) == [
        "fish-high_noise-step00000100.safetensors",
        "fish-low_noise-step00000100.safetensors",
    ]


def test_a_model_that_was_trained_whole_takes_the_place_of_the_base(runs: Path) -> None:
    (runs / "fish/config.toml").write_text("[adapter]\nkind = 'none'\n")
    command = command_for(runs, "fish-high_noise-step00000200")
    settings = tomllib.loads("\n".join(command[5::2]))["model"]
    assert command[4::2] == ["--set", "--set"]
    assert Path(settings["transformer"]).name == "fish-low_noise-step00000200.safetensors"
    high = Path(settings["transformer_high_noise"])
    assert high.name == "fish-high_noise-step00000200.safetensors"
