from __future__ import annotations

import json

import pytest
from data_clips import write_caption, write_images, write_video
from data_fakes import T2V, dataset_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.contract.dataset_config import SourceOptions, parse_dataset
from trainer.contract.variants import VARIANTS
from trainer.data.checks import check_dataset
from trainer.data.sources import scan_source


def scan(folder, **keys):
    return scan_source(SourceOptions(video_directory=folder, **keys))


def by_name(result):
    return {problem.file.name: problem for problem in result.problems}


def test_folder_lists_media_with_captions_and_names_all_that_is_left_out(tmp_path):
    for name in ("b.mp4", "a.mp4", "a.mkv", "c.MOV", "mute.mp4", "empty.mp4", "latin.mp4"):
        (tmp_path / name).touch()
    write_images(tmp_path / "walk", 2)
    write_caption(tmp_path / "walk", "walking")
    (tmp_path / "walk2").mkdir()
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "c.mp4").touch()
    (tmp_path / "a.txt").write_text("\ufeff  both a clips \n", "utf-8")
    (tmp_path / "c.txt").write_text("upper")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "x.gif").touch()
    (tmp_path / "photo.png").touch()
    (tmp_path / ".hidden.mp4").touch()
    (tmp_path / "notes.md").touch()
    result = scan(tmp_path)
    assert {item.name: item.caption for item in result.items} == {
        "a.mkv": "both a clips",
        "a.mp4": "both a clips",
        "b.mp4": "b",
        "c.MOV": "upper",
        "walk": "walking",
    }
    problems = by_name(result)
    assert set(problems) == {"mute.mp4", "empty.mp4", "latin.mp4", "nested", "x.gif", "photo.png"}
    assert "mute.txt" in problems["mute.mp4"].message
    assert "empty" in problems["empty.mp4"].message
    assert "UTF-8" in problems["latin.mp4"].message


def test_the_cache_folder_is_no_clip(tmp_path):
    write_images(tmp_path / "menma_cache", 1)
    assert "holds no videos" in scan(tmp_path).problems[0].message


def test_caption_extension_and_dots_in_names(tmp_path):
    (tmp_path / "shot.01.mp4").touch()
    (tmp_path / "shot.01.caption").write_text("one")
    assert scan(tmp_path, caption_extension="caption").items[0].caption == "one"


def test_missing_folder_is_a_problem(tmp_path):
    result = scan(tmp_path / "none")
    assert result.items == ()
    assert "cannot be read" in result.problems[0].message


def jsonl(tmp_path, *lines):
    file = tmp_path / "list.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return scan_source(SourceOptions(video_jsonl_file=file, cache_directory=tmp_path / "cache"))


def test_jsonl_reports_each_bad_line_with_its_number(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").touch()
    result = jsonl(
        tmp_path,
        {"video_path": "one/a.mp4", "caption": " one "},
        "{not json",
        "",
        {"video_path": "two/a.mp4", "caption": "two"},
        {"video_path": "two/a.mp4", "caption": "again"},
        {"video_path": "none.mp4", "caption": "x"},
        {"caption": "x"},
        {"video_path": "one/a.mp4"},
        {"video_path": "b.mp4", "caption": "x", "control_path_1": "c.mp4"},
        "[1]",
        '{"video_path": "one/a.mp4", "caption": "\\ud800"}',
    )
    assert [(item.name, item.caption) for item in result.items] == [
        ("one/a.mp4", "one"),
        ("two/a.mp4", "two"),
    ]
    assert [problem.line for problem in result.problems] == [2, 5, 6, 7, 8, 9, 10, 11]
    assert "control_path" in result.problems[5].message


def test_a_list_of_images_gives_images(tmp_path):
    """Of one size each, without windows, from a list that names them `image_path`."""
    images = tmp_path / "pictures"
    images.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 32)).save(images / f"{name}.png")
    file = tmp_path / "list.jsonl"
    lines = [
        {"image_path": "pictures/a.png", "caption": "one"},
        {"image_path": "pictures/b.png", "caption": ["two", "three"]},
        {"video_path": "pictures/b.png", "caption": "of a video"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    source = SourceOptions(image_jsonl_file=file, cache_directory=tmp_path / "cache")
    result = scan_source(source)
    assert [(item.name, item.kind, item.captions) for item in result.items] == [
        ("pictures/a.png", "image", ("one",)),
        ("pictures/b.png", "image", ("two", "three")),
    ]
    (problem,) = result.problems
    assert (problem.line, "image_path" in problem.message) == (3, True)
    values = {"image_jsonl_file": str(file), "cache_directory": str(tmp_path / "cache")}
    dataset = parse_dataset({"datasets": [values | {"resolution": [64, 32]}]})
    checked = check_dataset(dataset, T2V)
    assert {str(row.bucket) for row in checked.buckets} == {"64x32x1"}


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80) | st.lists(st.text(max_size=20), max_size=4).map(json.dumps))
def test_any_list_is_items_or_problems(tmp_path, text):
    file = tmp_path / "list.jsonl"
    file.write_text(text, "utf-8", errors="replace", newline="")
    source = SourceOptions(video_jsonl_file=file, cache_directory=tmp_path / "cache")
    assert scan_source(source).problems


# menma check -----------------------------------------------------------------------------------


def test_check_finds_everything_without_a_model(tmp_path):
    for name, frames in (("long.mp4", 30), ("short.mp4", 4), ("mid.mkv", 12), ("mute.mp4", 10)):
        write_video(tmp_path / name, frames)
        if name != "mute.mp4":
            write_caption(tmp_path / name, "text")
    (tmp_path / "broken.mp4").write_bytes(b"nothing like a video")
    write_caption(tmp_path / "broken.mp4", "text")
    dataset = dataset_of(tmp_path, target_frames=[9, 25], num_repeats=3, batch_size=2)
    result = check_dataset(dataset, T2V, num_threads=2)
    assert result.clips == 2
    assert {problem.file.name for problem in result.problems} == {
        "short.mp4",
        "mute.mp4",
        "broken.mp4",
    }
    table = [(str(row.bucket), row.items, row.tokens) for row in result.buckets]
    assert table == [("64x32x25", 1, 7 * 2 * 4), ("64x32x9", 2, 3 * 2 * 4)]
    assert result.batches_per_epoch == 2 + 3  # 3 and 6 appearances in twos
    (note,) = result.notes
    assert "1 of 2 clips" in note
    assert "25" in note
    assert not (tmp_path / "menma_cache").exists()


def test_check_says_when_the_resolution_is_rounded(tmp_path):
    write_video(tmp_path / "a.mp4", 9)
    write_caption(tmp_path / "a.mp4", "text")
    ti2v = VARIANTS["wan2.2-ti2v-5b"]
    result = check_dataset(dataset_of(tmp_path, resolution=[80, 48]), ti2v)
    assert [str(row.bucket) for row in result.buckets] == ["64x32x5"]
    assert "80x48 becomes 64x32" in result.notes[0]


@pytest.mark.parametrize(("fps", "frames"), [(24, 16), (16, 24), (12.0, 32)])
def test_check_counts_frames_after_resampling(tmp_path, fps, frames):
    write_video(tmp_path / "a.mp4", 24)
    write_caption(tmp_path / "a.mp4", "text")
    dataset = dataset_of(tmp_path, frame_extraction="full", source_fps=float(fps))
    (row,) = check_dataset(dataset, T2V).buckets
    assert row.bucket.num_frames == (frames - 1) // 4 * 4 + 1


def test_check_says_when_files_disagree_with_source_fps(tmp_path):
    for name, fps in (("a.mp4", 24), ("b.mp4", 48)):
        write_video(tmp_path / name, 24, fps=fps)
        write_caption(tmp_path / name, "text")
    (note,) = check_dataset(dataset_of(tmp_path, source_fps=24.0), T2V).notes
    assert "1 of 2 clips say 48 to 48" in note


def test_check_of_images(tmp_path):
    for name, size in (("wide.png", (200, 100)), ("tall.jpg", (100, 200))):
        Image.new("RGB", size).save(tmp_path / name)
        write_caption(tmp_path / name, "text")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_caption(tmp_path / "broken.png", "text")
    dataset = parse_dataset(
        {
            "general": {"enable_bucket": True, "resolution": 128},
            "datasets": [{"image_directory": str(tmp_path)}],
        }
    )
    result = check_dataset(dataset, T2V)
    # Of 64x256, 80x192, 96x160, … and their transposes: 160/96 is nearest to 2, 80/192 to 1/2.
    assert sorted(str(row.bucket) for row in result.buckets) == ["160x96x1", "80x192x1"]
    assert [problem.file.name for problem in result.problems] == ["broken.png"]
