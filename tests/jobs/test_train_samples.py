"""Samples during training: dealt out to the ranks, and never the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.attention.sequence import SequenceGroup
from trainer.contract.config import RunConfig
from trainer.contract.errors import NonFiniteError
from trainer.contract.variants import VARIANTS
from trainer.engine.process_group import World
from trainer.jobs import train_samples
from trainer.jobs.train_samples import TrainingSamples
from trainer.sampling.conditions import Conditions


@dataclass(frozen=True)
class FakeWorld(World):
    """One of two ranks; `other` is what the other one says."""

    world_size: int = 2
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    other: list[str] = field(default_factory=list)

    def gather_texts(self, text: str) -> list[str]:
        theirs = self.other.pop(0) if self.other else ""
        return [text, theirs] if self.rank == 0 else [theirs, text]


class Encoded(TrainingSamples):
    """Samples without real encoders."""

    def _encode(self) -> None:
        self._contexts = {}
        self._vae = nn.Identity()  # type: ignore[assignment]
        self._conditions = [Conditions() for _ in self._requests]


Make = Callable[..., tuple[Encoded, list[str]]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    def generate(models: Any, request: Any, conditions: Any) -> torch.Tensor:
        return failing(request.prompt) or torch.full((1,), float(request.seed))

    def failing(prompt: str) -> None:
        if prompt == "nan":
            raise NonFiniteError("the sample of 'nan'\nbecame NaN")
        if prompt == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")

    def write(folder: Path, name: str, request: Any, frames: Any, **rest: Any) -> Path:
        if request.prompt == "long":
            raise torch.OutOfMemoryError("CUDA out of memory")
        path = folder / f"{name}_{request.seed}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(frames.item()))
        return path

    monkeypatch.setattr(train_samples, "generate", generate)
    monkeypatch.setattr(train_samples, "write_sample", write)
    monkeypatch.setattr(train_samples, "decode_frames", lambda vae, latents, tile, bits: latents)

    def samples(
        *prompts: str,
        rank: int = 0,
        zero_stage: int = 0,
        other: tuple[str, ...] = (),
        together: bool = False,
    ) -> tuple[Encoded, list[str]]:
        content = {
            "sampling": {"prompts": [{"prompt": prompt} for prompt in prompts], "seed": 7},
            "distributed": {"zero_stage": zero_stage},
        }
        said: list[str] = []
        config = RunConfig.model_validate(content)
        sequence = SequenceGroup(rank, 2, None) if together else None
        world = FakeWorld(rank, sequence=sequence, other=list(other))
        variant = VARIANTS["wan2.1-t2v-1.3b"]
        return Encoded(config, variant, world, tmp_path / "samples", said.append), said

    return samples


def names(samples: Any) -> list[str]:
    return [sample.path.name for sample in samples]


def test_prompts_are_dealt_out_and_come_back_in_their_order(make: Make) -> None:
    samples, said = make("a", "b", "c", other=("", "000001 step00000005_01_8.mp4"))
    found = samples(5)
    wanted = ["step00000005_00_7.mp4", "step00000005_01_8.mp4", "step00000005_02_9.mp4"]
    assert names(found) == wanted
    assert [(sample.prompt, sample.seed) for sample in found] == [("a", 7), ("b", 8), ("c", 9)]
    assert [sample.path.exists() for sample in found] == [True, False, True]
    second, _ = make("a", "b", "c", rank=1)
    assert names(second(5)) == ["step00000005_01_8.mp4"]
    assert [sample.path.read_text() for sample in found] == ["7.0", "8.0", "9.0"]
    assert said == []


def test_ranks_that_share_clips_make_each_sample_together(make: Make) -> None:
    first, _ = make("a", "b", together=True)
    assert names(first(5)) == ["step00000005_00_7.mp4", "step00000005_01_8.mp4"]
    second, _ = make("a", "b", rank=1, together=True)
    made: list[int] = []

    def generate(_step: int, index: int, request: Any) -> torch.Tensor:
        made.append(index)
        return torch.zeros(1)

    second._generate = generate  # type: ignore[method-assign]
    assert second(5) == [], "the first of them has decoded and written it"
    assert made == [0, 1]


def test_out_of_memory_in_a_forward_that_others_wait_in_ends_the_run(make: Make) -> None:
    samples, _ = make("large", "b", together=True)
    with pytest.raises(torch.OutOfMemoryError):
        samples(5)


def test_with_sharded_weights_every_rank_takes_part_and_rank_0_writes(make: Make) -> None:
    first, _ = make("a", "b", zero_stage=3)
    assert len(first(1)) == 2
    second, _ = make("a", "b", zero_stage=3, rank=1)
    assert second(1) == []


@pytest.mark.parametrize(
    ("prompt", "word"), [("nan", "became NaN"), ("large", "out of memory"), ("long", "vae_tile")]
)
def test_a_sample_that_fails_is_a_warning_and_the_others_are_made(
    make: Make, prompt: str, word: str
) -> None:
    samples, said = make("a", "b", prompt, "c", "d")
    assert names(samples(3)) == ["step00000003_00_7.mp4", "step00000003_04_11.mp4"]
    (warning,) = said
    assert warning.startswith("step 3, sample 2 was not made: ")
    assert word in warning
    assert "\n" not in warning


def test_what_failed_on_another_rank_is_said_on_this_one(make: Make) -> None:
    samples, said = make("a", other=("sample 1 was not made: out of memory",))
    samples(3)
    assert said == ["step 3, sample 1 was not made: out of memory"]


def test_out_of_memory_between_ranks_that_wait_for_each_other_is_an_error(make: Make) -> None:
    samples, _ = make("large", zero_stage=3)
    with pytest.raises(torch.OutOfMemoryError):
        samples(3)
