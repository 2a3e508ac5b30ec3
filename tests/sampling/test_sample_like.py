"""Samples that are made again from their own files, and latents that are decoded later."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from test_sample_run import CONFIG, events_of, models, write_lora

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError, DataError, OutOfMemoryError
from trainer.contract.jobs import LoRAUse, SampleJobRequest
from trainer.contract.run_dir import RunDir
from trainer.jobs import sample_run
from trainer.jobs.sample_like import remade
from trainer.sampling.latent_files import write_latents
from trainer.sampling.results import read_sample_metadata
from trainer.sampling.video_io import read_video, write_png, write_video

__all__ = ["models"]
NEGATIVE = 'nothing\n"at" all'
ODD = 'a "cat"\\n on\ta mat ’–’ 猫 #=[x]'


@pytest.fixture(scope="module")
def config(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(CONFIG.format(folder=models), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lora(config: Path) -> Path:
    return write_lora(config.parent / "loras/style.safetensors", 0.3)


@pytest.fixture(scope="module")
def original(config: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample with odd words, its own settings, a LoRA, and its latents."""
    prompt = Prompt(prompt=ODD, seed=9, num_steps=3, guidance_scale=2.5, flow_shift=4.5)
    request = SampleJobRequest(
        config=config,
        prompts=(prompt,),
        loras=(LoRAUse(path=lora, strength=0.7),),
        set=("sampling.save_latents=true", f"sampling.negative_prompt={json.dumps(NEGATIVE)}"),
        output=tmp_path_factory.mktemp("out"),
    )
    return sample_of(events_of(request))


def sample_of(events: list[dict[str, Any]]) -> Path:
    (sample,) = [event for event in events if event["type"] == "sample"]
    return Path(sample["path"])


def like(config: Path, source: Path, output: Path, **fields: Any) -> list[dict[str, Any]]:
    return events_of(SampleJobRequest(config=config, like=source, output=output, **fields))


def frames_of(path: Path) -> np.ndarray:
    return read_video(path).frames


def look_alike(one: Path, other: Path) -> bool:
    """Tell whether videos are of the same frames: x264 does not give the same bits each time."""
    first, second = (frames_of(path).astype(int) for path in (one, other))
    return bool(np.abs(first - second).mean() < 1)


@pytest.mark.parametrize("of", ["video", "latents"])
def test_the_same_again(config: Path, original: Path, tmp_path: Path, of: str) -> None:
    source = original if of == "video" else original.with_suffix(".safetensors")
    events = like(config, source, tmp_path, set=("sampling.save_latents=true",))
    again = sample_of(events)
    first, second = (load_file(path.with_suffix(".safetensors")) for path in (original, again))
    assert torch.equal(first["latents"], second["latents"])
    assert look_alike(original, again)
    assert not [event for event in events if event["type"] == "warning"]
    made, remade = (read_sample_metadata(path) for path in (original, again))
    assert made == remade
    assert made["prompt"] == ODD
    assert made["negative_prompt"] == NEGATIVE


def test_nothing_private_is_in_the_file(config: Path, original: Path) -> None:
    text = json.dumps(read_sample_metadata(original))
    assert str(config.parent) not in text
    assert str(Path.home()) not in text
    metadata = read_sample_metadata(original)
    assert metadata["base"] == {"low_noise": "transformer.safetensors"}
    assert metadata["loras"][0]["file"] == "style.safetensors"
    assert metadata["sampling"]["negative_prompt"] == NEGATIVE


def test_options_on_top_win(config: Path, original: Path, tmp_path: Path) -> None:
    events = like(
        config,
        original,
        tmp_path,
        prompts=(Prompt(prompt="a dog"),),
        set=("sampling.seed=5", "sampling.guidance_scale=1.0", "sampling.num_steps=1"),
    )
    made, remade = read_sample_metadata(original), read_sample_metadata(sample_of(events))
    assert remade["prompt"] == "a dog"
    assert (remade["seed"], remade["num_steps"], remade["guidance_scale"]) == (5, 1, [1.0, 1.0])
    for kept in ("negative_prompt", "flow_shift", "width", "loras"):
        assert remade[kept] == made[kept]


def test_a_lora_is_found_by_its_content_and_missed_by_name(
    config: Path, original: Path, lora: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(config.parent, folder, ignore=shutil.ignore_patterns("loras"))
    copy = tmp_path / "files" / original.name
    copy.parent.mkdir()
    shutil.copy(original, copy)
    moved = folder / config.name
    with pytest.raises(ConfigError, match=r"style\.safetensors, which is not found") as raised:
        like(moved, copy, tmp_path / "out")
    assert "--lora FILE" in raised.value.hint
    shutil.copy(lora, copy.parent / "renamed.safetensors")
    again = sample_of(like(moved, copy, tmp_path / "out"))
    assert look_alike(again, original)
    (copy.parent / "renamed.safetensors").unlink()
    write_lora(copy.parent / "style.safetensors", 0.4)
    with pytest.raises(ConfigError, match="has another content"):
        like(moved, copy, tmp_path / "out")


def test_other_models_are_told(
    config: Path, models: Path, original: Path, lora: Path, tmp_path: Path
) -> None:
    shutil.copy(models / "transformer.safetensors", tmp_path / "other.safetensors")
    text = CONFIG.format(folder=models)
    text = text.replace(f"{models}/transformer", f"{tmp_path}/other")
    (tmp_path / "other.toml").write_text(text, encoding="utf-8")
    events = like(tmp_path / "other.toml", original, tmp_path / "out", loras=(LoRAUse(path=lora),))
    (warning,) = [event["message"] for event in events if event["type"] == "warning"]
    assert "base weights is another: other.safetensors" in warning
    assert any("take the place" in event.get("message", "") for event in events)


def test_a_sample_of_a_training(config: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.samples.mkdir(parents=True)
    told = {"prompt": "a cat", "seed": 1, "num_steps": 1, "step": 20}
    path = run.samples / "step00000020_00_1.png"
    write_png(path, np.zeros((32, 32, 3), np.uint8), told)
    events = like(config, path, tmp_path / "out", set=("sampling.num_frames=1",))
    (warning,) = [event for event in events if event["type"] == "warning"]
    assert "made at step 20" in warning["message"]
    saved = write_lora(run.output / "cats-step00000020.safetensors", 0.2)
    events = like(config, path, tmp_path / "out", set=("sampling.num_frames=1",), run_dir=run.root)
    assert not [event for event in events if event["type"] == "warning"]
    (lora,) = read_sample_metadata(sample_of(events))["loras"]
    assert lora["file"] == saved.name


@pytest.mark.parametrize("kind", ["png", "mp4"])
def test_a_workflow_of_comfyui_is_not_taken_for_ours(
    config: Path, tmp_path: Path, kind: str
) -> None:
    graph = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 5}}})
    path = tmp_path / f"comfy.{kind}"
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", graph)
        info.add_text("workflow", "{}")
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    else:
        write_video(path, np.zeros((1, 16, 16, 3), np.uint8), 16, {"prompt": graph})
    with pytest.raises(DataError, match="ComfyUI"):
        like(config, path, tmp_path / "out")


def test_files_that_say_nothing_or_nonsense(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    picture = np.zeros((8, 8, 3), np.uint8)
    write_png(path, picture)
    with pytest.raises(DataError, match="does not say how it was made"):
        like(config, path, tmp_path / "out")
    write_png(path, picture, {"prompt": "x", "seed": "many", "num_steps": 0})
    with pytest.raises(DataError, match=r"cannot be used: .*seed: input should be"):
        like(config, path, tmp_path / "out")
    write_png(path, picture, {"prompt": "x", "seed": 1, "loras": [{"file": "../../x"}]})
    with pytest.raises(DataError, match="no file name"):
        like(config, path, tmp_path / "out")
    with pytest.raises(DataError, match="there is no"):
        like(config, tmp_path / "none.mp4", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"video": "/etc/hostname"}, "video is not described by name and content"),
        ({"image": {"size": 1}}, "None is no file name"),
        ({"control_images": ["/etc/hostname"], "one_frame": "target_index=1"}, "control_images"),
        ({"video": {"file": ".."}}, "no file name"),
        ({"video": {"file": ""}}, "no file name"),
        ({"video": {"file": "a\0b"}}, "no file name"),
        (
            {"loras": [{"file": "x.**", "size": 1, "sha256": "0"}]},
            r"with x\.\*\*, which is not found",
        ),
        ({"loras": [{"file": 7}]}, "no file name"),
    ],
)
def test_a_file_names_no_places_of_this_machine(
    config: Path, tmp_path: Path, words: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "hostile.png"
    write_png(path, np.zeros((8, 8, 3), np.uint8), {"prompt": "x", "seed": 1, **words})
    with pytest.raises((DataError, ConfigError), match=problem):
        like(config, path, tmp_path / "out")


@pytest.mark.parametrize("step", ["**", "7", 1.5, None])
def test_a_step_that_is_no_number_is_no_step(config: Path, tmp_path: Path, step: object) -> None:
    path = tmp_path / "samples/hostile.png"
    path.parent.mkdir()
    write_png(path, np.zeros((8, 8, 3), np.uint8), {"prompt": "x", "seed": 1, "step": step})
    asked = SampleJobRequest(config=config, like=path, output=tmp_path / "out")
    assert "no LoRA is used" in remade(asked).warnings[0]


def decode(config: Path, source: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    return events_of(SampleJobRequest(config=config, decode=source, output=output, set=settings))


def test_latents_decode_to_the_same_video_without_the_transformer(
    config: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_run, "load_base", None)
    latents = original.with_suffix(".safetensors")
    decoded = sample_of(decode(config, latents, tmp_path / "out"))
    assert decoded.name == original.name
    assert look_alike(decoded, original)
    assert read_sample_metadata(decoded) == read_sample_metadata(original)
    gif = sample_of(decode(config, latents, tmp_path / "x.gif"))
    assert gif == tmp_path / "x.gif"
    assert read_sample_metadata(gif)["prompt"] == ODD
    with pytest.raises(ConfigError, match="is there already"):
        decode(config, latents, tmp_path / "x.gif")
    with pytest.raises(ConfigError, match="decoded to latents"):
        decode(config, latents, tmp_path / "out", 'sampling.format="latents"')


def test_a_folder_of_latents_of_musubi(config: Path, original: Path, tmp_path: Path) -> None:
    latents = load_file(original.with_suffix(".safetensors"))["latents"]
    folder = tmp_path / "latents"
    folder.mkdir()
    made = {"seeds": "7", "prompt": "a fish", "infer_steps": "2", "video_length": "5"}
    save_file({"latent": latents[None]}, folder / "a_7_latent.safetensors", metadata=made)
    size = "x".join(map(str, latents.shape[1:]))
    save_file(
        {f"latents_{size}_float32": latents},
        folder / "clip_0000-005_0032x0032_wan.safetensors",
        metadata={"architecture": "wan", "caption1": "a bird"},
    )
    save_file({"varlen_t5_float32": torch.zeros(3, 4)}, folder / "clip_wan_te.safetensors")
    events = [e for e in decode(config, folder, tmp_path / "out") if e["type"] == "sample"]
    assert [event["prompt"] for event in events] == ["a fish", "a bird"]
    assert events[0]["seed"] == 7
    for event in events:
        assert look_alike(Path(event["path"]), original)
    assert read_sample_metadata(Path(events[0]["path"]))["num_steps"] == 2


@pytest.mark.parametrize(("told", "rate"), [(0.2, 1), (999, 240), (30, 30)])
def test_latents_of_odd_rates_and_seeds_are_decoded(
    config: Path, original: Path, tmp_path: Path, told: float, rate: int
) -> None:
    latents = load_file(original.with_suffix(".safetensors"))["latents"]
    write_latents(tmp_path / "a.safetensors", latents, {"prompt": "x", "seed": 2**70}, fps=told)
    made = sample_of(decode(config, tmp_path / "a.safetensors", tmp_path / "out"))
    assert read_video(made).fps == rate


def test_latents_that_cannot_be_decoded(config: Path, tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(48, 1, 2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="48 channels, and this VAE decodes 16"):
        decode(config, tmp_path, tmp_path / "out")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="no latents"):
        decode(config, tmp_path, tmp_path / "out")
    save_file({"latents": torch.full((16, 1, 2, 2), torch.nan)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not finite"):
        decode(config, tmp_path, tmp_path / "out")
    (tmp_path / "other.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="cannot be read"):
        decode(config, tmp_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no file of latents"):
        decode(config, tmp_path / "empty", tmp_path / "out")


def test_latents_of_odd_files_are_decoded_or_refused_in_words(
    config: Path, original: Path, tmp_path: Path
) -> None:
    save_file({"latents": torch.zeros(16, 1, 1, 1)}, tmp_path / "small.safetensors")
    with pytest.raises(DataError, match=r"small\.safetensors: its latents are of no sample"):
        decode(config, tmp_path / "small.safetensors", tmp_path / "out")
    latents = load_file(original.with_suffix(".safetensors"))["latents"]
    # What looks like a wildcard, and half a character: the words were used as they are.
    words = "a {cat and __nothing__ \ud83d"
    metadata = {"prompt": words}
    header = {"menma.kind": "latents", "menma.sample": json.dumps(metadata)}
    save_file({"latents": latents}, tmp_path / "odd.safetensors", header)
    wild = "sampling.wildcards=true"
    events = decode(config, tmp_path / "odd.safetensors", tmp_path / "out", wild)
    assert sample_of(events).exists()


def test_decoding_that_does_not_fit_names_the_file_and_the_tiles(
    config: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_rest: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("trainer.jobs.sample_decode.decode_frames", full)
    source = original.with_suffix(".safetensors")
    with pytest.raises(OutOfMemoryError, match=re.escape(source.name)) as raised:
        decode(config, source, tmp_path / "out")
    assert "memory.vae_tile" in raised.value.hint


def test_a_name_longer_than_names_are_is_none(config: Path, tmp_path: Path) -> None:
    metadata = {"prompt": "a cat", "seed": 1, "loras": [{"file": "x" * 300 + ".safetensors"}]}
    write_latents(tmp_path / "odd.safetensors", torch.zeros(16, 1, 4, 4), metadata, fps=16)
    with pytest.raises(DataError, match="is no file name"):
        like(config, tmp_path / "odd.safetensors", tmp_path / "out")
