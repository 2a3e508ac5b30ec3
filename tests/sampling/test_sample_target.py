"""Names of results: patterns, endings, what is there already, and what --force replaces."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.files import atomic_path
from trainer.contract.free_names import move_unless_taken
from trainer.contract.variants import get_variant
from trainer.jobs.sample_target import Target, file_options
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import (
    FileOptions,
    describe,
    latents_beside,
    read_sample_metadata,
    write_sample,
)
from trainer.sampling.video_io import read_video

REQUEST = SampleRequest.of(
    Prompt(prompt="A cat, 猫: on a/mat!", width=32, height=16, num_frames=5, seed=7),
    get_variant("wan2.1-t2v-1.3b"),
)
IMAGE = replace(REQUEST, num_frames=1)
FRAMES = np.zeros((5, 16, 32, 3), np.uint8)


def target(output: Path, **files: object) -> Target:
    return Target(output, "my run", FileOptions(**files))


@pytest.mark.parametrize("name", ["taken", "taken/further/on", "taken/a.mp4"])
def test_a_folder_that_is_a_file_is_refused_before_anything_is_made(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "taken").write_text("words", encoding="utf-8")
    with pytest.raises(ConfigError, match="taken is a file, no folder"):
        target(tmp_path / name).check([REQUEST])
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "words"


def test_long_names_in_letters_of_several_bytes_are_written(tmp_path: Path) -> None:
    """120 letters would take 360 bytes, and file systems take 255."""
    request = replace(REQUEST, prompt="猫" * 300)
    path = write_sample(tmp_path, "猫" * 120, request, FRAMES)
    assert path.is_file()
    assert path.name.startswith("猫" * 40 + "_7")
    named = Target(tmp_path / "{name}_{prompt}_{seed}.mp4", "猫" * 120, FileOptions())
    with pytest.raises(ConfigError, match="takes more than 240 bytes"):
        named.check([request])
    Target(tmp_path / "{index}_{prompt}_{seed}.mp4", "猫" * 120, FileOptions()).check([request])


@pytest.mark.parametrize(
    "wrong", [{"seed": 2**63}, {"fps": 241}, {"fps": 0}, {"seed": -1}], ids=str
)
def test_what_generators_and_encoders_do_not_take_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Prompt.model_validate({"prompt": "x", **wrong})
    with pytest.raises(ValidationError):
        SamplingSection.model_validate(wrong)


def test_a_folder_that_takes_no_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)
    with pytest.raises(ConfigError, match="is not writable"):
        target(tmp_path / "new/folder").check([REQUEST])


@pytest.mark.parametrize(
    ("fmt", "video", "image"),
    [
        ("h264", ".mp4", ".png"),
        ("prores", ".mov", ".png"),
        ("vp9", ".webm", ".png"),
        ("gif", ".gif", ".gif"),
        ("webp", ".webp", ".webp"),
        ("png", "", ".png"),
        ("latents", ".safetensors", ".safetensors"),
    ],
)
def test_endings_in_a_folder(tmp_path: Path, fmt: str, video: str, image: str) -> None:
    wanted = target(tmp_path, format=fmt)
    assert wanted.path(3, REQUEST) == tmp_path / f"my_run_03_7{video}"
    assert wanted.path(3, IMAGE) == tmp_path / f"my_run_03_7{image}"


def test_fields_in_a_name(tmp_path: Path) -> None:
    name = "{name}-{index}-{seed}-{prompt}-{width}x{height}x{num_frames}.mp4"
    wanted = target(tmp_path / name)
    wanted.check([REQUEST])
    assert wanted.path(3, REQUEST).name == "my_run-03-7-A_cat_猫_on_a_mat-32x16x5.mp4"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("{sead}.mp4", "no field {sead}", "seed"),
        ("{seed.real}.mp4", "no field {seed.real}", "seed"),
        ("{seed!r}.mp4", "no field {seed}", ""),
        ("{seed:>9}.mp4", "no field {seed}", ""),
        ("{seed.mp4", "expected", "fields: name"),
        ("{}.mp4", "no field {}", "name"),
        ("same.mp4", "several samples would be named", "{index}"),
        ("{index}.webm", "is written as .mp4", "ending"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        target(tmp_path / name).check([REQUEST, replace(REQUEST, seed=8)])
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_a_video_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would be one image"):
        target(tmp_path / "x.png", format="png").check([REQUEST])
    target(tmp_path / "x.png", format="png").check([IMAGE])
    target(tmp_path / "x.png").check([IMAGE])
    with pytest.raises(ConfigError, match=r"one frame is written as \.png"):
        target(tmp_path / "x.mp4").check([IMAGE])


def test_what_is_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    path = tmp_path / "x.mp4"
    target(path).check([REQUEST])
    with pytest.raises(ConfigError, match="x.safetensors is there already"):  # noqa: RUF043
        target(path, save_latents=True).check([REQUEST])
    path.touch()
    with pytest.raises(ConfigError, match="--force"):
        target(path).check([REQUEST])
    target(path, force=True).check([REQUEST])
    target(tmp_path).check([REQUEST, REQUEST])  # in a folder names count on


@pytest.mark.parametrize(
    ("output", "settings", "fmt", "quality"),
    [
        ("x.webm", [], "vp9", 50),
        ("x.png", [], "png", None),
        ("x.mp4", [], "h265", 50),  # the config's own is an mp4
        ("folder", [], "h265", 50),
        ("v1.5", [], "h265", 50),
        ("x.gif", ["sampling.format=h265"], "h265", 50),
    ],
)
def test_the_ending_says_the_format(
    output: str, settings: list[str], fmt: str, quality: int | None
) -> None:
    sampling = SamplingSection(format="h265", quality=50)
    found = file_options(Path(output), settings, sampling, force=False)
    assert (found.format, found.quality) == (fmt, quality)


def test_latents_beside_a_file_of_latents_are_refused() -> None:
    wanted = SamplingSection(save_latents=True)
    with pytest.raises(ConfigError, match="the latents are the sample already"):
        file_options(Path("x.safetensors"), [], wanted, force=False)


def test_nothing_is_overwritten_unless_asked_for(tmp_path: Path) -> None:
    first = write_sample(tmp_path, "v", REQUEST, FRAMES)
    second = write_sample(tmp_path, "v", REQUEST, FRAMES + 200)
    assert [first.name, second.name] == ["v_7.mp4", "v_7_2.mp4"]
    third = write_sample(tmp_path, "v", REQUEST, FRAMES + 200, files=FileOptions(force=True))
    assert third == first
    assert read_video(first).frames.mean() > 150
    assert len(list(tmp_path.iterdir())) == 2


def test_latents_beside_do_not_replace_those_of_another(tmp_path: Path) -> None:
    latents = torch.zeros(1, 16, 2, 2, 4)
    both = FileOptions(format="vp9", save_latents=True)
    one = write_sample(tmp_path, "v", REQUEST, FRAMES, files=both, latents_BCFHW=latents)
    one.unlink()
    two = write_sample(tmp_path, "v", REQUEST, FRAMES, files=both, latents_BCFHW=latents)
    assert two.name == "v_7_2.webm"
    assert latents_beside(two).exists()
    assert read_sample_metadata(latents_beside(two)) == describe(REQUEST)


def test_latents_are_there_when_decoding_fails(tmp_path: Path) -> None:
    def frames():
        yield FRAMES[0]
        raise RuntimeError("out of memory")

    both = FileOptions(save_latents=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        write_sample(
            tmp_path, "v", REQUEST, frames(), files=both, latents_BCFHW=torch.ones(1, 16, 2, 2, 4)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["v_7.safetensors"]


def test_a_folder_of_frames_is_replaced_whole(tmp_path: Path) -> None:
    forced = FileOptions(format="png", force=True)
    path = write_sample(tmp_path, "v", REQUEST, FRAMES, files=forced)
    assert write_sample(tmp_path, "v", REQUEST, FRAMES[:2], files=forced) == path
    assert sorted(file.name for file in path.iterdir()) == ["00000.png", "00001.png"]
    (path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="more than frames"):
        write_sample(tmp_path, "v", REQUEST, FRAMES, files=forced)
    assert sorted(file.name for file in path.iterdir()) == ["00000.png", "00001.png", "notes.txt"]
    assert [file.name for file in tmp_path.iterdir()] == ["v_7"]


def test_names_with_dots_count_on_behind_them(tmp_path: Path) -> None:
    taken = tmp_path / "v1.5_7"
    taken.mkdir()
    (taken / "notes.txt").touch()
    frames = FileOptions(format="png")
    assert write_sample(tmp_path, "v1.5", REQUEST, FRAMES, files=frames).name == "v1.5_7_2"
    assert latents_beside(tmp_path / "v1.5_7").name == "v1.5_7.safetensors"


def test_fields_are_for_files_and_not_for_folders(tmp_path: Path) -> None:
    for output in ("{prompt}", "out/{seed}/x_{index}.mp4"):
        target = Target(tmp_path / output, "cats", FileOptions())
        with pytest.raises(ConfigError, match="in the name of a folder") as raised:
            target.check([REQUEST])
        assert "out/{prompt}_{seed}.mp4" in raised.value.hint
    Target(tmp_path / "{mine}", "cats", FileOptions()).check([REQUEST])  # no field: their own name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc_passwd"),
        ("..", "prompt"),
        ("/", "prompt"),
        ("--force", "force"),
        ('a/b\\c:d*?"<>|', "a_b_c_d"),
        ("🐈🐕", "prompt"),
        ("eine Katze 🐈 schläft", "eine_Katze_schläft"),
        ("a\0b\nc", "a_b_c"),
        ("x" * 5000, "x" * 60),
        ("猫" * 5000, "猫" * 40),
    ],
)
def test_no_prompt_leads_out_of_the_folder(tmp_path: Path, prompt: str, name: str) -> None:
    wanted = replace(REQUEST, prompt=prompt)
    target = Target(tmp_path / "out/{prompt}.mp4", "cats", FileOptions())
    target.check([wanted])
    assert target.path(0, wanted) == tmp_path / f"out/{name}.mp4"
    path = Target(tmp_path, "..", FileOptions()).path(0, wanted, prompt[:80])
    assert path.parent == tmp_path
    assert path.name[0] not in ".-/"


def test_what_force_would_remove_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "cats_00_7").mkdir()
    (tmp_path / "cats_00_7/notes.txt").touch()
    (tmp_path / "7.mp4").mkdir()
    (tmp_path / "7.mp4/notes.txt").touch()
    for output, kind in ((tmp_path, "png"), (tmp_path / "{seed}.mp4", "h264")):
        target = Target(output, "cats", FileOptions(format=kind, force=True))
        with pytest.raises(ConfigError, match="holds more than frames"):
            target.check([REQUEST], ["cats"])


def test_a_link_to_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="is a file, no folder"):
        Target(tmp_path / "out", "cats", FileOptions()).check([REQUEST])


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_utf_8_is_a_name(tmp_path: Path) -> None:
    output = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4"))
    target = Target(output, "cats", FileOptions())
    target.check([REQUEST])
    path = write_sample(output.parent, "v", REQUEST, FRAMES)
    assert move_unless_taken(path, output)
    with atomic_path(output) as place:
        place.write_bytes(b"new")
    assert output.read_bytes() == b"new"
