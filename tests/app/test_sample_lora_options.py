"""`--lora FILE=STRENGTH` of `menma sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.cli.sample_lora_options import sample_lora
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
