"""`menma sample` with two processes: the files of one process, prompts dealt out or one video shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.project import Outcome, Project
from trainer.sampling.video_io import read_metadata, read_video

pytestmark = pytest.mark.slow

PROMPTS = "a red field --d 1\nwaves of blue --d 2\na green field --d 3 --f 9\n"
TWO = ("distributed.engine=deepspeed", "distributed.num_processes=2")


def sample(project: Project, folder: str, *settings: str, prompts: str = PROMPTS) -> Outcome:
    """Sample into `folder`."""
    (project.folder / "prompts.txt").write_text(prompts)
    sets = [part for setting in settings for part in ("--set", setting)]
    return project.menma(
        "sample", project.config, "--prompts-file", "prompts.txt", "-o", folder, *sets
    )


def files(project: Project, folder: str) -> list[Path]:
    return sorted((project.folder / folder).iterdir())


def test_prompts_dealt_out_give_the_files_of_one_process(project: Project) -> None:
    one = sample(project, "one")
    two = sample(project, "two", *TWO)
    assert (one.code, two.code) == (0, 0), f"{one}\n{two}"
    names = ["tiny_00_1.mp4", "tiny_01_2.mp4", "tiny_02_3.mp4"]
    assert sorted(Path(line).name for line in two.out.splitlines()) == names
    assert [path.name for path in files(project, "two")] == names
    for alone, dealt in zip(files(project, "one"), files(project, "two"), strict=True):
        assert np.array_equal(read_video(alone).frames, read_video(dealt).frames), dealt
        assert read_metadata(alone) == read_metadata(dealt)


def test_what_one_process_fails_with_ends_the_run_and_costs_no_other_sample(
    project: Project,
) -> None:
    broken = PROMPTS.replace("waves of blue", "waves of blue --l 1e38")
    outcome = sample(project, "out", *TWO, prompts=broken)
    assert outcome.code == 1, outcome
    assert "the sample of 'waves of blue' became NaN or infinite" in outcome.words
    assert "Traceback" not in outcome.words
    names = ["tiny_00_1.mp4", "tiny_02_3.mp4"]
    assert [path.name for path in files(project, "out")] == names


def test_two_processes_share_one_video(project: Project) -> None:
    prompt = "a red field --d 1 --f 9\n"
    one = sample(project, "one", prompts=prompt)
    shared = sample(project, "shared", *TWO, "distributed.sequence_parallel=2", prompts=prompt)
    assert (one.code, shared.code) == (0, 0), f"{one}\n{shared}"
    (alone,), (together,) = files(project, "one"), files(project, "shared")
    assert together.name == alone.name
    frames = [read_video(path).frames.astype(int) for path in (alone, together)]
    assert np.abs(frames[0] - frames[1]).max() <= 1
    refused = sample(project, "no", "distributed.sequence_parallel=2", prompts=prompt)
    assert refused.code == 2
    assert "distributed.sequence_parallel" in refused.words
