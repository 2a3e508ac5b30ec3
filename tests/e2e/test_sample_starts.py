"""`menma sample` from a video, through the real command."""

from __future__ import annotations

import pytest

from tests.e2e.project import Project
from trainer.sampling.video_io import read_metadata

pytestmark = pytest.mark.slow


def test_an_image_from_a_clip_of_another_size(project: Project) -> None:
    clip = project.folder / "clips/1.mp4"
    outcome = project.done(
        "sample", project.config, "--prompt", "a red field", "--video", clip, "--strength", "0.5",
        "--solver", "heun", "--schedule", "beta", "--steps", "4", "--frames", "1", "--width", "64",
        "-o", project.folder / "out",
    )  # fmt: skip
    (picture,) = (project.folder / "out").iterdir()
    assert picture.suffix == ".png"
    assert "1.mp4 is 32x32 and is scaled to 64x32; 50% of the picture is cut off" in outcome.words
    told = read_metadata(picture)
    assert (told["solver"], told["schedule"], told["strength"]) == ("heun", "beta", 0.5)


def test_frames_that_the_vae_cannot_make(project: Project) -> None:
    outcome = project.menma("sample", project.config, "--prompt", "a", "--frames", "6")
    assert outcome.code == 2
    assert "use 5 or 9" in outcome.words
    assert "Traceback" not in outcome.words
