"""Fixtures of the app's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from app_runs import Runs, fake_command

CONFIG = """\
name = "fish"

[model]
variant = "wan2.1-t2v-1.3b"
transformer = "transformer.safetensors"
vae = "vae.safetensors"
text_encoder = "text_encoder.safetensors"

[[dataset.sources]]
video_directory = "clips"

[training]
max_steps = 5
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """Return a starter of runs; what still lives after the test is killed."""
    runs = Runs(tmp_path / "runs")
    yield runs
    runs.end_all()


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def menma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Return a `menma` that works in a folder of its own and has no real trainer."""
    from app.cli.main import run
    from app.runs import child

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(child, "TRAINER", tuple(fake_command("finish")))
    monkeypatch.setenv("FAKE_RECORD", str(tmp_path / "request.json"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a config whose files exist."""
    for name in ("transformer", "vae", "text_encoder"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "clips").mkdir()
    path = tmp_path / "fish.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path
