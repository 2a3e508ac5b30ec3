"""What a transformer remembers from one forward of a video to the next: same bits, less work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.e2e.project import tiny_transformer
from trainer.adapters.apply import attach
from trainer.adapters.base import AdapterFile, LoRAFactors
from trainer.models.wan.kept import Kept
from trainer.models.wan.transformer import WanTransformer

LAYERS = ("blocks.0.cross_attn.k", "blocks.1.cross_attn.v", "blocks.0.self_attn.q")


class Video:
    """A video's inputs, the same objects in every call."""

    def __init__(self, **changes: Any) -> None:
        random = torch.Generator().manual_seed(0)
        self.model = tiny_transformer(**changes).eval()
        self.latents = torch.randn(1, 16, 2, 4, 4, generator=random)
        self.texts = torch.randn(2, 5, 32, generator=random).unbind()
        self.more: dict[str, Tensor] = {}
        if self.model.config.image_dim is not None:
            self.more["image_context"] = torch.randn(1, 257, 20, generator=random)
            self.more["extra_channels"] = torch.randn(1, 20, 2, 4, 4, generator=random)

    @torch.no_grad()
    def step(self, timestep: float) -> list[Tensor]:
        """Return what both passes of a step give."""
        given = torch.tensor([timestep])
        return [self.model(self.latents, given, [text], **self.more) for text in self.texts]


def adapter_file(update: dict[str, LoRAFactors]) -> AdapterFile:
    return AdapterFile(update, path=Path("lora"), layout="peft", metadata={})


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def calls_of(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> list[int]:
    """Count the forwards of a module without a hook, which would switch keeping off."""
    calls: list[int] = []
    forward = module.forward

    def counting(*given: Any) -> Any:
        calls.append(1)
        return forward(*given)

    monkeypatch.setattr(module, "forward", counting)
    return calls


@pytest.mark.parametrize("image", [{}, {"in_channels": 36, "image_dim": 20}], ids=["text", "image"])
def test_the_same_bits_with_less_work(
    monkeypatch: pytest.MonkeyPatch, image: dict[str, int]
) -> None:
    video = Video(**image)
    plain = [video.step(900.0), video.step(400.0)]
    keys = calls_of(monkeypatch, video.model.get_submodule("blocks.1.cross_attn.k"))
    first = calls_of(monkeypatch, video.model.get_submodule("blocks.0.self_attn"))
    second = calls_of(monkeypatch, video.model.get_submodule("blocks.1.self_attn"))
    with video.model.remembering(passes_alike=True):
        assert equal(video.step(900.0), plain[0])
        assert equal(video.step(400.0), plain[1])
    assert (len(keys), len(first), len(second)) == (2, 2, 4)
    with video.model.remembering(passes_alike=False):
        assert equal(video.step(900.0), plain[0])
    assert (len(keys), len(first), len(second)) == (4, 4, 6)
    assert equal(video.step(400.0), plain[1])
    assert (len(keys), len(first), len(second)) == (6, 6, 8)


def test_latents_that_change_in_place_are_seen() -> None:
    video = Video()
    with video.model.remembering(passes_alike=True):
        video.step(900.0)
        video.latents.mul_(0.5)
        video.texts[0].add_(1)
        changed = video.step(900.0)
    assert equal(video.step(900.0), changed)


def test_adapters_and_weights_that_change_are_seen() -> None:
    video = Video()
    random = torch.Generator().manual_seed(1)
    update = {
        name: LoRAFactors(
            torch.randn(2, 24, generator=random), torch.randn(24, 2, generator=random), 1.0
        )
        for name in LAYERS
    }
    seen = []
    with video.model.remembering(passes_alike=True):
        seen.append((video.step(500.0), None))
        attachment = attach(video.model, adapter_file(update), 1.0)
        for strength in (1.0, -0.5):
            attachment.set_strength(strength)
            seen.append((video.step(500.0), strength))
        attachment.detach()
        seen.append((video.step(500.0), None))
        with torch.no_grad():
            video.model.get_submodule("blocks.0.cross_attn.v").weight.mul_(1.5)  # type: ignore[operator,union-attr]
        last = video.step(500.0)
    assert equal(seen[0][0], seen[3][0])
    assert not equal(seen[0][0], last)
    assert equal(video.step(500.0), last)
    with torch.no_grad():
        video.model.get_submodule("blocks.0.cross_attn.v").weight.div_(1.5)  # type: ignore[operator,union-attr]
    for found, strength in seen[1:3]:
        assert strength is not None
        attachment = attach(video.model, adapter_file(update), strength)
        assert equal(video.step(500.0), found)
        attachment.detach()


def test_hooks_around_the_blocks_are_seen() -> None:
    class Adding:
        def before_block(self, index: int, state: Any) -> Any:
            return replace(state, tokens_BLD=state.tokens_BLD + 1) if index == 0 else state

        def after_block(self, index: int, state: Any) -> Any:
            return state

    video = Video()
    plain = video.step(500.0)
    with video.model.remembering(passes_alike=True):
        video.step(500.0)
        video.model.blocks.add_hooks([Adding()])
        hooked = video.step(500.0)
        with video.model.blocks.suspended():
            assert equal(video.step(500.0), plain)
    assert not equal(hooked, plain)
    assert equal(video.step(500.0), hooked)


def test_training_and_gradients_remember_nothing() -> None:
    video = Video()
    with video.model.remembering(passes_alike=True):
        video.step(500.0)
        given = torch.tensor([500.0])
        velocity = video.model(video.latents, given, [video.texts[0]])
        velocity.sum().backward()
        assert video.model.blocks[0].cross_attn.k.weight.grad is not None  # type: ignore[union-attr]


def test_what_was_asked_for_last_is_kept() -> None:
    kept, made = Kept(2), []
    tensors = [torch.zeros(1) for _ in range(3)]

    def ask(index: int, **how: bool) -> None:
        kept.get((tensors[index], None), (), lambda: made.append(index), **how)

    for index in (0, 0, 1, 0, 2, 0):
        ask(index)
    assert made == [0, 1, 2]
    for _ in range(4):
        ask(1, twice=True)
    assert made == [0, 1, 2, 1, 1]


def test_a_model_that_streams_or_compiles_its_blocks_remembers_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: WanTransformer = tiny_transformer().eval()
    monkeypatch.setattr(model.blocks[1], "_compiled_call_impl", object())
    with model.remembering(passes_alike=True):
        assert model._kept is None
    monkeypatch.undo()
    with model.remembering(passes_alike=True):
        assert model._kept is not None
    assert model._kept is None
