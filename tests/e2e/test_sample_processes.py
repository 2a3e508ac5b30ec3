"""`menma sample` with two processes: prompts dealt out, or one video shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.project import Outcome, Project
from trainer.contract.config import Prompt
from trainer.contract.jobs import SampleJobRequest
from trainer.jobs.sample_run import run
from trainer.sampling.video_io import read_metadata

pytestmark = pytest.mark.slow

PROMPTS = "a red field --d 1\nwaves of blue --d 2\na green field --d 3 --f 9\n"
TWO = ("distributed.engine=deepspeed", "distributed.num_processes=2")


def sample(project: Project, folder: str, prompts: str, *settings: str) -> Outcome:
    """Sample into `folder` by the real command."""
    (project.folder / "prompts.txt").write_text(prompts)
    sets = [part for setting in settings for part in ("--set", setting)]
    return project.menma(
        "sample",
        project.config,
        "--prompts-file",
        "prompts.txt",
        "-o",
        folder,
        "--format",
        "png",
        *sets,
    )


def sample_here(
    project: Project, folder: str, monkeypatch: pytest.MonkeyPatch, *prompts: dict[str, Any]
) -> list[Path]:
    """Sample in this process; return the files."""
    monkeypatch.chdir(project.folder)
    asked = tuple(Prompt.model_validate(prompt) for prompt in prompts)
    settings = ('sampling.format="png"',)
    request = SampleJobRequest(
        config=project.config, set=settings, prompts=asked, output=Path(folder)
    )
    run(request, lambda _kind, /, **_fields: None)
    return files(project, folder)


def files(project: Project, folder: str) -> list[Path]:
    return sorted((project.folder / folder).iterdir())


def frames_of(folder: Path) -> np.ndarray:
    """Return the frames of a sample: PNGs, since x264 does not give the same bits each time."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]).astype(int)


def test_prompts_dealt_out_give_the_files_of_one_process(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = sample_here(
        project,
        "one",
        monkeypatch,
        {"prompt": "a red field", "seed": 1},
        {"prompt": "waves of blue", "seed": 2},
        {"prompt": "a green field", "seed": 3, "num_frames": 9},
    )
    # The second process, which makes the samples 1 and 3, fails with one of them.
    outcome = sample(project, "two", PROMPTS + "a red field --d 4 --l 1e38\n", *TWO)
    assert outcome.code == 1, outcome
    assert "the sample of 'a red field' became NaN or infinite" in outcome.words
    assert "Traceback" not in outcome.words
    dealt = files(project, "two")
    assert [path.name for path in dealt] == ["tiny_00_1", "tiny_01_2", "tiny_02_3"]
    for one, two in zip(alone, dealt, strict=True):
        assert np.array_equal(frames_of(one), frames_of(two)), two
        assert read_metadata(one / "00000.png") == read_metadata(two / "00000.png")


def test_two_processes_share_one_video(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = sample_here(
        project, "one", monkeypatch, {"prompt": "a red field", "seed": 1, "num_frames": 9}
    )
    prompt = "a red field --d 1 --f 9\n"
    outcome = sample(project, "shared", prompt, *TWO, "distributed.sequence_parallel=2")
    assert outcome.code == 0, outcome
    (together,) = files(project, "shared")
    assert outcome.out.split() == ["shared/tiny_00_1"]
    assert together.name == alone.name
    assert np.abs(frames_of(alone) - frames_of(together)).max() <= 1
