"""LoRAs of a sampling run: their strengths from sample to sample and step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.contract.variants import TransformerConfig, get_variant
from trainer.jobs.sample_loras import LoRASwitch
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.requests import SampleRequest

DIM = 24
T2V = get_variant("wan2.1-t2v-1.3b")


def transformer() -> WanTransformer:
    shape = TransformerConfig(
        dim=DIM, ffn_dim=48, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
    )
    made = WanTransformer(shape).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(made.head.head.weight, std=0.2, generator=generator)
    return made


def write_lora(path: Path, seed: int, **metadata: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in ("self_attn.q", "cross_attn.v", "ffn.0"):
        width = 48 if module == "ffn.0" else DIM
        name = f"diffusion_model.blocks.1.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, DIM, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * 0.3
    save_file(tensors, path, metadata=metadata)
    return path


def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    context = torch.randn(6, 32, generator=generator)
    with torch.no_grad():
        result: Tensor = model(latents, torch.tensor([600.0]), [context])
    return result


def request(strengths: tuple[float, ...] | None = None) -> SampleRequest:
    made = SampleRequest.of("a cat", T2V)
    return SampleRequest(**{**fields_of(made), "lora_strengths": strengths})


def fields_of(made: SampleRequest) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def expected(*parts: tuple[Path, float]) -> Tensor:
    """Return the answer of a fresh transformer with these LoRAs at these strengths."""
    model = transformer()
    for path, strength in parts:
        attach(model, load_adapter(path), strength)
    return answer(model)


def test_strengths_follow_the_samples_on_one_transformer(tmp_path: Path) -> None:
    one = write_lora(tmp_path / "one.safetensors", 1)
    two = write_lora(tmp_path / "two.safetensors", 2)
    model = transformer()
    plain = answer(model)
    switch = LoRASwitch((LoRAUse(path=one, strength=0.5), LoRAUse(path=two)), has_experts=False)

    def sampled(strengths: tuple[float, ...] | None) -> Tensor:
        switch.begin(request(strengths))
        return answer(switch.ready(model, "low_noise"))

    assert torch.equal(sampled(None), expected((one, 0.5), (two, 1.0)))
    # One of several checkpoints at a time.
    assert torch.equal(sampled((1.0, 0.0)), expected((one, 1.0)))
    assert torch.equal(sampled((0.0, 1.0)), expected((two, 1.0)))
    assert torch.equal(sampled((0.0, 0.0)), plain)
    assert isinstance(model.get_submodule("blocks.1.ffn.0"), nn.Linear), "nothing is left on it"
    assert torch.equal(sampled((-1.0, 0.25)), expected((one, -1.0), (two, 0.25)))
    assert torch.equal(sampled(None), expected((one, 0.5), (two, 1.0)))
    with pytest.raises(ValueError, match="zip"):
        sampled((1.0,))


def test_a_schedule_sets_the_strength_of_each_step(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "one.safetensors", 1)
    use = SampleLoRA(path=path, strength=0.8, schedule=((0.0, 1.0), (0.5, 0.5), (0.5, 0.0)))
    model = transformer()
    switch = LoRASwitch((use,), has_experts=False)
    switch.begin(request())
    found = []
    for step in range(5):
        found.append(answer(switch.ready(model, "low_noise")))
        switch.on_step(step + 1, 5)
    wanted = [0.8, 0.6, 0.0, 0.0, 0.0]
    for strength, result in zip(wanted, found, strict=True):
        torch.testing.assert_close(result, expected((path, strength)))


@pytest.mark.parametrize(
    ("points", "share", "factor"),
    [
        ((), 0.7, 1.0),
        (((0.0, 1.0), (1.0, 0.0)), 0.25, 0.75),
        (((0.2, 2.0), (0.6, 1.0)), 0.1, 2.0),
        (((0.2, 2.0), (0.6, 1.0)), 0.4, 1.5),
        (((0.2, 2.0), (0.6, 1.0)), 0.9, 1.0),
        (((0.0, 1.0), (0.5, 1.0), (0.5, 0.0)), 0.49, 1.0),
        (((0.0, 1.0), (0.5, 1.0), (0.5, 0.0)), 0.5, 0.0),
    ],
)
def test_points_of_a_schedule(points: Any, share: float, factor: float) -> None:
    use = SampleLoRA(path=Path("a"), strength=2.0, strength_high_noise=-1.0, schedule=points)
    assert use.strength_at(high_noise=False, share=share) == pytest.approx(2 * factor)
    assert use.strength_at(high_noise=True, share=share) == pytest.approx(-factor)
    shares, factors = zip(*points, strict=True) if points else ((0.0,), (1.0,))
    if share != 0.5:  # numpy takes the point before a jump
        assert np.interp(share, shares, factors) == pytest.approx(factor)


def test_schedules_that_are_none() -> None:
    for points in (((0.5, 1.0), (0.4, 1.0)), ((1.5, 1.0),), ((0.5, 1.0),) * 3):
        with pytest.raises(ValidationError, match=r"schedule"):
            SampleLoRA(path=Path("a"), schedule=points)


def test_each_expert_has_its_strength_and_its_files(tmp_path: Path) -> None:
    both = write_lora(tmp_path / "both.safetensors", 1)
    high = write_lora(tmp_path / "told.safetensors", 2, **{"menma.expert": "high_noise"})
    uses = (SampleLoRA(path=both, strength=0.4, strength_high_noise=0.0), LoRAUse(path=high))
    switch = LoRASwitch(uses, has_experts=True)
    low_model, high_model = transformer(), transformer()
    switch.begin(request())
    assert torch.equal(answer(switch.ready(low_model, "low_noise")), expected((both, 0.4)))
    assert torch.equal(answer(switch.ready(high_model, "high_noise")), expected((high, 1.0)))
    switch.begin(request((0.5, 2.0)))
    wanted = expected((both, 0.5), (high, 2.0))
    assert torch.equal(answer(switch.ready(high_model, "high_noise")), wanted)
