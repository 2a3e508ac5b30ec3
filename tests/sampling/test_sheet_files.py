"""Files of sheets and sessions: any format that browsers show, and all that makes one again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_sample_matrix import config, make, models, samples, write_lora, write_transformer
from test_sample_session import talk

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import SampleJobRequest
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.vary import parse_vary
from trainer.jobs import sample_studio
from trainer.jobs.sample_run import run as run_plain
from trainer.sampling.results import read_sample_metadata
from trainer.sampling.video_io import read_frames

__all__ = ["config", "models"]
CLIP = (Prompt(prompt="a cat", num_frames=5, seed=7),)


def plain(config: Path, **fields: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    request = SampleJobRequest(config=config, **fields)
    run_plain(request, lambda kind, /, **said: events.append({"type": kind, **said}))
    return events


def warnings(events: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["type"] == "warning"]


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


@pytest.mark.parametrize("kind", ["vp9", "av1", "webp", "gif", "png"])
def test_a_cell_is_the_very_file_that_the_plain_command_writes(
    config: Path, tmp_path: Path, kind: str
) -> None:
    chosen = (f'sampling.format="{kind}"',)
    events = make(config, parse_vary("steps=1"), prompts=CLIP, set=chosen)
    assert events[-1]["type"] == "end"
    (cell,) = samples(events)
    once = tuple(prompt.model_copy(update={"num_steps": 1}) for prompt in CLIP)
    (own,) = samples(plain(config, prompts=once, set=chosen, output=tmp_path / "own"))
    assert cell.suffix == own.suffix
    assert read_sample_metadata(cell) == read_sample_metadata(own)
    assert frames_of(cell).shape == (5, 32, 32, 3)
    assert (frames_of(cell) == frames_of(own)).all()
    page = (tmp_path / "sheet/index.html").read_text(encoding="utf-8")
    source = cell.relative_to(tmp_path / "sheet").as_posix()
    tag = "video" if cell.suffix == ".webm" else "img"
    assert f'<{tag} src="{source}{"/00000.png" if kind == "png" else ""}"' in page
    with Image.open(tmp_path / "sheet/sheet.png") as picture:
        colours = np.asarray(picture).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 100  # frames, not only words
    assert samples(make(config, parse_vary("steps=1"), prompts=CLIP, set=chosen)) == []


def test_what_browsers_do_not_show_is_refused_with_what_they_do(
    config: Path, tmp_path: Path
) -> None:
    for kind in ("h265", "prores", "latents"):
        with pytest.raises(ConfigError, match=f"do not show {kind}") as raised:
            make(config, parse_vary("seed=1,2"), prompts=CLIP, set=(f'sampling.format="{kind}"',))
        assert "h264, vp9, av1, gif, webp, png" in raised.value.hint
    assert not (tmp_path / "sheet").exists()


def test_another_kind_of_file_is_another_cell(config: Path, tmp_path: Path) -> None:
    def made(*settings: str) -> list[Path]:
        return samples(make(config, parse_vary("seed=1"), set=settings))

    assert len(made()) == 1
    assert made('sampling.format="vp9"') == []  # one frame is a PNG all the same
    (webp,) = made('sampling.format="webp"')
    assert len(made('sampling.format="webp"', "sampling.quality=5")) == 1
    (bare,) = made("sampling.metadata=false")
    assert (read_sample_metadata(webp)["seed"], read_sample_metadata(bare)) == (1, {})


def test_latents_are_written_beside_also_of_cells_that_are_there(
    config: Path, tmp_path: Path
) -> None:
    (cell,) = samples(make(config, parse_vary("seed=1")))
    wanted = ("sampling.save_latents=true",)
    events = make(config, parse_vary("seed=1"), set=wanted)
    (event,) = [event for event in events if event["type"] == "sample"]
    assert Path(event["path"]) == cell
    assert event["evaluations"]["computed"] > 0
    (own,) = samples(
        plain(
            config, prompts=(Prompt(prompt="a cat", seed=1),), set=wanted, output=tmp_path / "own"
        )
    )
    beside, of_own = (load_file(path.with_suffix(".safetensors")) for path in (cell, own))
    assert Path(event["latents"]) == cell.with_suffix(".safetensors")
    assert (beside["latents"] == of_own["latents"]).all()
    assert samples(make(config, parse_vary("seed=1"), set=wanted)) == []


def test_a_cell_is_made_again_from_its_own_file(config: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "loras/cat.safetensors", 0.4)
    tuned = tmp_path / "tuned.safetensors"
    write_transformer(tuned, 1)
    events = make(
        config,
        parse_vary(f"lora:{lora}=0,0.5"),
        parse_vary(f"checkpoint=none,{tuned}"),
        prompts=CLIP,
        set=('sampling.format="gif"',),
    )
    cells = {
        (len(said.get("loras", ())), said["base"]["low_noise"]): path
        for path in samples(events)
        for said in (read_sample_metadata(path),)
    }
    assert len(cells) == 4
    cell = cells[1, "transformer.safetensors"]
    shutil.copy(cell, tmp_path / "cell.gif")
    again = plain(
        config, like=tmp_path / "cell.gif", output=tmp_path / "own",
        set=("sampling.format=\"gif\"",),
    )  # fmt: skip
    assert warnings(again) == []
    (path,) = samples(again)
    assert (frames_of(path) == frames_of(cell)).all()
    assert read_sample_metadata(path) == read_sample_metadata(cell)
    other = plain(config, like=cells[0, "tuned.safetensors"], output=tmp_path / "other")
    assert "made with tuned.safetensors" in warnings(other)[0]


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)
    return path


@pytest.mark.parametrize("place", ["clip.png", "clip/00.png"])
def test_other_content_of_a_file_makes_another_sample(
    config: Path, tmp_path: Path, place: str
) -> None:
    file = picture(tmp_path / place, (250, 10, 90))
    clip = tmp_path / place.partition("/")[0]
    wanted = (Prompt(prompt="a cat", video=clip, strength=0.5, num_frames=1, seed=3),)
    (before,) = samples(make(config, parse_vary("seed=3"), prompts=wanted))
    file.touch()
    assert samples(make(config, parse_vary("seed=3"), prompts=wanted)) == []
    size = file.stat().st_size
    picture(file, (10, 250, 90))
    assert file.stat().st_size == size  # neither name nor size tell
    (after,) = samples(make(config, parse_vary("seed=3"), prompts=wanted))
    assert (next(read_frames(before)) != next(read_frames(after))).any()
    picture(file, (250, 10, 90))
    assert samples(make(config, parse_vary("seed=3"), prompts=wanted)) == []


def test_a_session_reads_a_changed_file_anew_and_writes_what_is_asked_for(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = picture(tmp_path / "clip.png", (250, 10, 90))
    encoded = 0
    real = sample_studio.encode_files

    def encode_files(*args: Any) -> Any:
        nonlocal encoded
        encoded += 1
        made = real(*args)
        if encoded == 1:
            picture(clip, (10, 250, 90))
        return made

    monkeypatch.setattr(sample_studio, "encode_files", encode_files)
    lora = SampleLoRA(path=write_lora(tmp_path / "cat.safetensors", 0.4), strength=0.5)
    wanted = {"prompt": "a cat", "video": str(clip), "strength": 0.5, "num_frames": 5, "seed": 3}
    line = {"prompt": wanted}
    settings = ('sampling.format="av1"', "sampling.save_latents=true")
    answers = talk(config, monkeypatch, line, line, line, set=settings, loras=(lora,))
    _, second, third, _ = ([one for one in said if one["type"] == "sample"] for said in answers)
    assert encoded == 2  # the second line sees the change, the third one none
    assert Path(second[0]["path"]).suffix == ".webm"
    assert Path(second[0]["latents"]).exists()
    own = plain(config, prompts=(Prompt(**wanted),), loras=(lora,), set=settings,
                output=tmp_path / "own")  # fmt: skip
    (path,) = samples(own)
    for event in (*second, *third):
        made = Path(event["path"])
        assert (frames_of(made) == frames_of(path)).all()
        assert read_sample_metadata(made) == read_sample_metadata(path)


def test_a_session_writes_to_the_file_that_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"prompt": {"prompt": "a cat", "num_frames": 1}}
    first, second, wrong, _ = talk(
        config, monkeypatch, line, line, {"prompt": {"prompt": "a cat", "num_frames": 5}},
        output=tmp_path / "{index}.png",
    )  # fmt: skip
    assert [Path(said[0]["path"]).name for said in (first, second)] == ["00.png", "01.png"]
    assert "one image" in wrong[0]["message"]
    only, taken, _ = talk(config, monkeypatch, line, line, output=tmp_path / "only.webp")
    assert Path(only[0]["path"]).name == "only.webp"
    assert "is there already" in taken[0]["message"]


def test_names_of_cells_fit_into_a_file_system(config: Path, tmp_path: Path) -> None:
    """Letters of Chinese take three bytes, and several keys are in the name."""
    words = "猫" * 40
    axes = (
        parse_vary(f"name={words}1,{words}2"),
        parse_vary(f"negative_prompt={words}3,{words}4"),
        parse_vary(f"prompt={words}5,{words}6"),
        parse_vary("seed=1,2"),
    )
    cells = samples(make(config, *axes, prompts=()))
    assert len(cells) == 8  # the name of a prompt changes no sample
    assert max(len(cell.name.encode()) for cell in cells) < 130
    with pytest.raises(ConfigError, match="in the name of a folder"):
        make(config, *axes, prompts=(), output=tmp_path / "{seed}")
