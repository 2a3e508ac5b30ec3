"""Two runs in one folder: each sample has a name of its own, and nothing is lost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.contract.config import Prompt
from trainer.contract.free_names import move_unless_taken
from trainer.contract.variants import get_variant
from trainer.sampling.latent_files import read_latents
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, latents_beside, write_sample
from trainer.sampling.video_io import read_frames

REQUEST = SampleRequest.of(
    Prompt(prompt="a cat", seed=7, num_frames=5, width=32, height=32),
    get_variant("wan2.1-t2v-1.3b"),
)


def frames(value: int) -> np.ndarray:
    return np.full((5, 32, 32, 3), value, np.uint8)


def shown(path: Path) -> int:
    return round(float(np.stack(list(read_frames(path))).mean()) / 50)


@pytest.mark.parametrize("fmt", ["h264", "png", "webp"])
def test_a_name_that_is_taken_while_a_sample_is_made_is_left_alone(
    tmp_path: Path, fmt: str
) -> None:
    """The other run writes while this one has begun, and ends first."""

    def slow() -> Iterator[np.ndarray]:
        first, *rest = frames(200)
        yield first
        other = write_sample(tmp_path, "v", REQUEST, frames(100), files=FileOptions(format=fmt))
        made.append(other)
        yield from rest

    made: list[Path] = []
    made.append(write_sample(tmp_path, "v", REQUEST, slow(), files=FileOptions(format=fmt)))
    assert [path.stem for path in made] == ["v_7", "v_7_2"]
    assert [shown(path) for path in made] == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in made)


def test_latents_follow_to_the_name_that_is_free(tmp_path: Path) -> None:
    def slow() -> Iterator[np.ndarray]:
        first, *rest = frames(200)
        yield first
        write_sample(tmp_path, "v", REQUEST, frames(100))
        yield from rest

    latents = torch.ones(1, 16, 2, 4, 4)
    both = FileOptions(save_latents=True)
    path = write_sample(tmp_path, "v", REQUEST, slow(), files=both, latents_BCFHW=latents)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["v_7.mp4", "v_7_2.mp4", "v_7_2.safetensors"]
    assert torch.equal(read_latents(latents_beside(path)).latents_CFHW, latents[0])


def race(move: Any, folder: Path, make: Any) -> None:
    """Let eight threads want one name at once."""
    barrier, won = threading.Barrier(8), []

    def take(number: int) -> None:
        source = folder / f".{number}"
        make(source, str(number))
        barrier.wait(timeout=60)
        if move(source, folder / "name"):
            won.append(str(number))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(won) == 1
    taken = folder / "name"
    assert (taken / "frame" if taken.is_dir() else taken).read_text() == won[0]
    assert len(list(folder.iterdir())) == 8  # those that lost are where they were


def a_file(path: Path, text: str) -> None:
    path.write_text(text)


def a_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "frame").write_text(text)


@pytest.mark.parametrize("make", [a_file, a_folder])
def test_of_many_one_gets_the_name(tmp_path: Path, make: Any) -> None:
    race(move_unless_taken, tmp_path, make)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_rest: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    race(move_unless_taken, tmp_path, a_file)


def test_a_folder_and_a_file_of_one_name_do_not_meet(tmp_path: Path) -> None:
    a_file(tmp_path / "name", "file")
    a_folder(tmp_path / "folder", "folder")
    assert not move_unless_taken(tmp_path / "folder", tmp_path / "name")
    assert not move_unless_taken(tmp_path / "name", tmp_path / "folder")
    assert (tmp_path / "name").read_text() == "file"
