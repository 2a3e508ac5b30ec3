"""`--lora FILE=STRENGTH` of `menma sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.cli.sample_lora_options import sample_lora
from app.domain.config_document import ConfigDocument
from app.domain.config_options import options_of
from trainer.contract.config import load_config
from trainer.contract.config_rules import check_files
from trainer.contract.errors import UserError
from trainer.contract.lora_use import SampleLoRA


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.safetensors", "a=b.safetensors", "c:1.safetensors"):
        Path(name).touch()
    return "cat.safetensors"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("=0.8", {"strength": 0.8}),
        (":0.8", {"strength": 0.8}),
        ("=-1", {"strength": -1.0}),
        ("=0.8@low_noise", {"strength": 0.8, "expert": "low_noise"}),
        (":0.8@high_noise", {"strength": 0.8, "expert": "high_noise"}),
        ("@high_noise", {"expert": "high_noise"}),
        ("=low:0.8,high:1.2", {"strength": 0.8, "strength_high_noise": 1.2}),
        ("=high_noise:0, low_noise:1", {"strength": 1.0, "strength_high_noise": 0.0}),
        ("=0:1,0.5:0.4", {"schedule": [(0.0, 1.0), (0.5, 0.4)]}),
        (
            "=0:1,.5:1,.5:0@high_noise",
            {"schedule": [(0, 1), (0.5, 1), (0.5, 0)], "expert": "high_noise"},
        ),
    ],
)
def test_forms(lora: str, text: str, fields: dict[str, Any]) -> None:
    assert sample_lora(lora + text) == {"path": lora} | fields
    SampleLoRA.model_validate(sample_lora(lora + text))


def test_names_with_signs_of_their_own(lora: str) -> None:
    assert sample_lora("a=b.safetensors") == {"path": "a=b.safetensors"}
    assert sample_lora("a=b.safetensors=2") == {"path": "a=b.safetensors", "strength": 2.0}
    assert sample_lora("c:1.safetensors=2") == {"path": "c:1.safetensors", "strength": 2.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dog.safetensors=1", "no such LoRA file: dog.safetensors"),
        ("dog.safetensors", "no such LoRA file: dog.safetensors"),
        ("cat.safetensors=strong", "'strong' is no number"),
        ("cat.safetensors=high:1.2", "both experts go together"),
        ("cat.safetensors=high:1,0.5:2", "both experts go together"),
        ("cat.safetensors=high:1,high:2", "both experts go together"),
        ("cat.safetensors=low:1,high:x", "'x' is no number"),
        ("cat.safetensors=0:1,1.5:0", "from 0 (first step) to 1 (last step)"),
        ("cat.safetensors=0.5:1,0:0", "from 0 (first step) to 1 (last step)"),
        ("cat.safetensors=low:1,high:2@low_noise", "strengths for both experts, and @low_noise"),
    ],
)
def test_mistakes_say_what_to_write(lora: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        sample_lora(text)
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("words", "merges"), [([], False), (["--merge"], True), (["--attach"], False),
                          (["--merge", "--attach"], False)],
)  # fmt: skip
def test_attached_unless_merging_is_asked_for(menma, config, words, merges):
    assert menma("sample", config, "-p", "x", *words).code == 0
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    assert content["request"]["merge_loras"] is merges


def test_a_missing_lora_of_the_config_is_told_with_its_line(menma, config):
    text = config.read_text(encoding="utf-8")
    loras = '[[sampling.loras]]\npath = "vae.safetensors"\n[[sampling.loras]]\npath = "gone"\n'
    config.write_text(f"{text}\n{loras}", encoding="utf-8")
    answer = menma("sample", config, "-p", "x")
    assert answer.code == 2
    line = 1 + f"{text}\n{loras}".splitlines().index('path = "gone"')
    assert f"{config}:{line}: sampling.loras[1].path: no such file or folder: gone" in answer.err
    loaded = load_config(config)
    for job in ("cache", "train"):  # what `menma check` looks at
        assert "sampling.loras[1].path" in {problem.key for problem in check_files(loaded, job)}


def test_loras_of_the_config_are_edited_one_by_one():
    text = '[[sampling.loras]]\npath = "a"\n[[sampling.loras]]\npath = "b"\nstrength = 0.5\n'
    options = {option.key: option for option in options_of(ConfigDocument(text))}
    assert options["sampling.loras[1].strength"].raw == "0.5"
    assert options["sampling.loras[0].schedule"].choices == ()
