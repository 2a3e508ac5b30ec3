"""The job `sample_session`: one sample a line, with models that stay loaded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sample_matrix import CONFIG, Loads, write_lora, write_transformer
from torch import nn

from trainer.contract.config import Prompt
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.jobs import SampleJobRequest, SampleSessionRequest
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.variants import get_variant
from trainer.jobs import sample_session, sample_studio
from trainer.jobs.sample import SampleLoaders
from trainer.jobs.sample_run import run as run_plain
from trainer.models.wan.tiny import write_tiny_text_encoder, write_tiny_vae
from trainer.sampling.conditions import Conditions
from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import read_metadata, read_video

T2V = get_variant("wan2.1-t2v-1.3b")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_vae(folder / "vae.safetensors")
    write_tiny_text_encoder(folder / "text.safetensors", ["a cat", "a dog on a mat"], text_dim=32)
    write_transformer(folder / "transformer.safetensors", 0)
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(folder=models), encoding="utf-8")
    return path


class Talk:
    """What is sent to the job, and what it says."""

    def __init__(self, *messages: Any) -> None:
        self.messages = messages
        self.events: list[dict[str, Any]] = []
        self.drawing = threading.Event()

    def __iter__(self) -> Iterator[str]:
        for message in self.messages:
            if message == {"stop": True}:
                assert self.drawing.wait(60)
            yield json.dumps(message) + "\n"

    def emit(self, kind: str, /, **fields: Any) -> None:
        self.events.append({"type": kind, **fields})
        if kind == "phase" and fields["name"] == "steps":
            self.drawing.set()

    def answers(self) -> list[list[dict[str, Any]]]:
        """What was said to each line, without progress."""
        found: list[list[dict[str, Any]]] = [[]]
        for event in self.events:
            if event["type"] == "phase" and event["name"] == "ready":
                found.append([])
            elif event["type"] != "phase":
                found[-1].append(event)
        return found[1:]


def talk(
    config: Path, monkeypatch: pytest.MonkeyPatch, *messages: Any, **fields: Any
) -> list[list[dict[str, Any]]]:
    conversation = Talk(*messages)
    monkeypatch.setattr("sys.stdin", conversation)
    fields = {"output": config.parent / "out"} | fields
    request = SampleSessionRequest(config=config, **fields)
    sample_session.run(request, conversation.emit)
    return conversation.answers()


def test_models_are_loaded_once_and_mistakes_do_not_end_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    lora = SampleLoRA(path=write_lora(tmp_path / "cat.safetensors", 0.4))
    first, wrong, nonsense, second, end = talk(
        config,
        monkeypatch,
        {"prompt": {"prompt": "a cat", "seed": 7}},
        {"prompt": {"prompt": "a cat", "num_frames": 6}},
        ["what"],
        {"prompt": {"prompt": "a dog", "name": "rex"}},
        loras=(lora,),
    )
    assert [event["type"] for event in (*first, *wrong, *nonsense, *second)] == [
        "sample", "error", "error", "sample",
    ]  # fmt: skip
    assert "num_frames is 6" in wrong[0]["message"]
    assert Path(second[0]["path"]).name == "rex_02_44.png"  # seeds count on, as in a list
    assert end == [{"type": "end", "reason": "done", "num_samples": 2}]
    assert len(loads.paths) == 1

    plain: list[dict[str, Any]] = []
    prompts = (Prompt(prompt="a cat", seed=7),)
    request = SampleJobRequest(
        config=config, prompts=prompts, loras=(lora,), output=tmp_path / "plain"
    )
    run_plain(request, lambda kind, /, **said: plain.append({"type": kind, **said}))
    (path,) = [Path(event["path"]) for event in plain if event["type"] == "sample"]
    own = Path(first[0]["path"])
    assert (read_video(own).frames == read_video(path).frames).all()
    assert read_metadata(own)["loras"] == read_metadata(path)["loras"]
    assert read_metadata(own)["evaluations"] == read_metadata(path)["evaluations"]


def test_a_stop_ends_one_sample_alone(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, made, _end = talk(
        config,
        monkeypatch,
        {"prompt": {"prompt": "a cat", "num_steps": 1000}},
        {"stop": True},
        {"prompt": {"prompt": "a cat"}},
    )
    assert [(event["type"], "stopped" in event["message"]) for event in stopped] == [("log", True)]
    assert [event["type"] for event in made] == ["sample"]


def test_what_is_wrong_with_the_models_ends_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="broken"):
        talk(config, monkeypatch, set=(f"model.vae={broken}",))


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_image_that_was_changed_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    encoded: list[str] = []

    def encode(request: SampleRequest, *_: object) -> Conditions:
        encoded.append(request.prompt)
        return Conditions()

    monkeypatch.setattr(sample_studio, "encode_files", encode)
    loaders = SampleLoaders(text_encoder=list, transformer=lambda _: nn.Identity(), vae=list)  # type: ignore[arg-type]
    studio = sample_studio.Studio(T2V, loaders, sample_studio.StudioOptions())
    given = tmp_path / "given"
    picture = given
    if is_folder:
        given.mkdir()
        picture = given / "1.png"
    picture.write_bytes(b"red")

    def ask(prompt: str) -> None:
        studio.encode_files(SampleRequest.of(Prompt(prompt=prompt, video=given), T2V))

    ask("first")
    ask("the same")
    picture.write_bytes(b"green")
    ask("changed")
    ask("the same again")
    assert encoded == ["first", "changed"]
    picture.unlink()
    if not is_folder:
        with pytest.raises(DataError, match="cannot be read"):
            ask("gone")
