"""What lies in a folder, as the trainer sees it, and what can be learned from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.domain.data_folder import look_into
from app.domain.goals import GOALS, data_problem, data_words, kind_for, source_values
from app.domain.presets import read_preset
from trainer.contract.dataset_config import SourceOptions
from trainer.data.sources.folder import scan_folder


def fill(folder: Path, *names: str, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
        if captions:
            (folder / name).with_suffix(".txt").write_text(f" {name} moves \n")
    return folder


def test_it_counts_what_the_trainer_would_train_on(tmp_path):
    folder = fill(tmp_path / "clips", "b.mp4", "a.MOV", "c.webm")
    fill(folder, "d.mkv", captions=False)
    (folder / "e.mp4").write_bytes(b"")
    (folder / "e.txt").write_text("  \n")
    fill(folder / "walk", "1.png", "2.png", captions=False)
    (folder / "walk.txt").write_text("somebody walks")
    fill(folder / "menma_cache", "x.png")
    (folder / ".hidden.mp4").write_bytes(b"")
    found = look_into(folder)
    scan = scan_folder(SourceOptions(video_directory=folder))
    captioned = set(found.videos.items) - set(found.videos.without_caption)
    assert captioned == {item.name for item in scan.items}
    assert set(found.videos.without_caption) == {p.file.name for p in scan.problems}
    assert found.first_caption == "a.MOV moves"
    words = data_words(GOALS["motion"], found)
    assert words == ["6 clips", "2 without a caption are left out: d.mkv, e.mp4"]


def test_images_and_what_is_beside_them(tmp_path):
    folder = fill(tmp_path, "1.png", "2.jpg", "clip.mp4")
    fill(folder, "moving.gif", captions=False)
    fill(folder / "more", "x.mp4")
    found = look_into(folder)
    assert kind_for(GOALS["images"], found) == "image"
    assert kind_for(GOALS["motion"], found) == "video"
    assert kind_for(GOALS["character"], found) == "image"
    words = "\n".join(data_words(GOALS["images"], found))
    assert "2 images, all captioned" in words
    assert "1 clips beside them are left out" in words
    assert "Not read: moving.gif" in words
    assert "not searched: more" in words


@pytest.mark.parametrize(
    ("names", "goal", "words"),
    [
        (("1.png",), "motion", "a motion or an effect is learned from clips"),
        (("1.mp4",), "images", "is learned from images"),
        ((), "style", "neither clips nor images"),
        (("1.gif",), "style", "does not read these: 1.gif"),
    ],
)
def test_a_folder_that_does_not_go_with_the_goal(tmp_path, names, goal, words):
    assert words in data_problem(GOALS[goal], look_into(fill(tmp_path, *names)))


def test_a_folder_without_captions_or_that_is_none(tmp_path):
    goal = GOALS["motion"]
    folder = fill(tmp_path / "clips", "fish.mp4", captions=False)
    assert "such as fish.txt" in data_problem(goal, look_into(folder))
    assert "no such folder" in data_problem(goal, look_into(tmp_path / "none"))
    assert "it is a file" in data_problem(goal, look_into(folder / "fish.mp4"))
    fill(tmp_path / "set" / "one", "a.mp4")
    assert "give one of one" in data_problem(goal, look_into(tmp_path / "set"))


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "cannot be read: Permission denied" in data_problem(GOALS["style"], look_into(tmp_path))


def test_a_source_takes_the_sizes_of_the_preset():
    clips, images = read_preset("wan2.1-t2v-1.3b-lora"), read_preset("wan2.1-t2v-14b-style-24gb")
    assert source_values(clips, "video", "x") == {
        **clips.source, "video_directory": "x",
    }  # fmt: skip
    assert source_values(images, "image", "x")["image_directory"] == "x"
    stills = source_values(images, "video", "x")
    assert stills["target_frames"] == [1]
    assert stills["frame_extraction"] == "uniform"
    assert SourceOptions.model_validate(stills).kind == "video"
    alone = source_values(clips, "image", "x")
    assert SourceOptions.model_validate(alone).kind == "image"
    assert source_values(None, "video", "x") == {"video_directory": "x", "target_frames": [33]}
