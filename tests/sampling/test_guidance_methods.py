"""Methods of guidance: their formulas, the passes they make, and that they work together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeZeroStarGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from sampling_fakes import FakeTransformer
from torch import Tensor, nn

from tests.models.wan_pairs import build, tiny_config
from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.denoising_options import (
    DenoisingOptions,
    PromptDenoising,
    SectionDenoising,
)
from trainer.contract.errors import ConfigError
from trainer.contract.passes import guided_steps
from trainer.contract.variants import get_variant
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import HostStreams
from trainer.models.block_stack import BlockStack
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.conditions import Conditions
from trainer.sampling.guidance import (
    NEGATIVE,
    POSITIVE,
    Step,
    combined_velocity,
    methods_of,
    planned_passes,
)
from trainer.sampling.guidance_methods.cfg_zero_star import best_scale
from trainer.sampling.guidance_methods.skip_layers import SKIPPING
from trainer.sampling.pipeline import SamplingModels, generate
from trainer.sampling.requests import SampleRequest

T2V = get_variant("wan2.1-t2v-1.3b")
TEXT_DIM = 32


def request_with(variant_name: str = T2V.name, **options: Any) -> SampleRequest:
    own = {key: options.pop(key) for key in ("image",) if key in options}
    fields = {"prompt": "a cat", "width": 64, "height": 64, "num_frames": 5, "num_steps": 6}
    return SampleRequest.of(
        Prompt.model_validate({**fields, **own, **options}), get_variant(variant_name)
    )


def step_of(index: int = 3, num_steps: int = 10, guidance_scale: float = 4.0) -> Step:
    return Step(
        index=index,
        num_steps=num_steps,
        timestep=500.0,
        expert="low_noise",
        guidance_scale=guidance_scale,
    )


def velocities(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {name: torch.randn(2, 4, 2, 3, 3, generator=random).to(dtype) for name in names}


def tiny_model(num_layers: int = 4, variant: str = T2V.name) -> WanTransformer:
    return build(replace(tiny_config(variant), num_layers=num_layers)).eval()


def models_of(transformer: nn.Module, variant_name: str = T2V.name) -> SamplingModels:
    variant = get_variant(variant_name)
    random = torch.Generator().manual_seed(1)
    contexts = {
        "a cat": torch.randn(5, TEXT_DIM, generator=random),
        variant.negative_prompt: torch.randn(9, TEXT_DIM, generator=random),
    }
    return SamplingModels(variant=variant, transformer=lambda _: transformer, contexts=contexts)


def passes_at(options: DenoisingOptions, step: Step) -> dict[str, Any]:
    return dict(planned_passes(step, "a cat", "bad", methods_of(options)))


@pytest.mark.parametrize(
    ("mode", "pattern"),
    [
        ("early", "SSSSAAAAAA"),
        ("late", "AAAAAASSSS"),
        ("middle", "AAASSSSAAA"),
        ("early_late", "SSAAAAAASS"),
        ("alternate", "SASASAASAS"),
        ("none", "AAAAAAAAAA"),
    ],
)
def test_skip_modes_have_the_patterns_of_musubi_tuner(mode: Any, pattern: str) -> None:
    found = "".join("A" if guided else "S" for guided in guided_steps(mode, 0.6, 10))
    assert found == pattern


@pytest.mark.parametrize("mode", ["early", "late", "middle", "early_late", "alternate"])
def test_the_ratio_is_the_share_of_guided_steps(mode: Any) -> None:
    for steps in (1, 2, 7, 20, 50):
        assert sum(guided_steps(mode, 1.0, steps)) == steps
        assert sum(guided_steps(mode, 0.0, steps)) == 0
        assert abs(sum(guided_steps(mode, 0.5, steps)) - steps / 2) <= 1


def test_skipped_steps_make_one_pass() -> None:
    transformer = FakeTransformer()
    options = {"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5}
    generate(models_of(transformer), request_with(**options))
    assert len(transformer.calls) == 3 * 2 + 3


def test_cfg_zero_star_is_the_formula() -> None:
    seen = velocities(POSITIVE, NEGATIVE)
    options = DenoisingOptions(cfg_zero_star=True)
    found = combined_velocity(step_of(), seen, methods_of(options))
    positive, negative = (seen[name].double().flatten(1) for name in (POSITIVE, NEGATIVE))
    scale = (positive * negative).sum(1) / negative.square().sum(1)
    scaled = scale[:, None] * negative
    expected = scaled + 4.0 * (positive - scaled)
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=1e-5, atol=1e-5)


def test_cfg_zero_star_is_that_of_diffusers() -> None:
    seen = velocities(POSITIVE, NEGATIVE)
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=1)
    guider.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(500))
    theirs = guider.forward(seen[POSITIVE], seen[NEGATIVE]).pred
    ours = combined_velocity(step_of(), seen, methods_of(DenoisingOptions(cfg_zero_star=True)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_best_scale_is_the_best() -> None:
    positive, negative = velocities("a", "b").values()
    best = best_scale(positive, negative)

    def distance(scale: Tensor) -> Tensor:
        return (positive - scale * negative).flatten(1).norm(dim=1)

    assert (distance(best) < distance(best * 1.01)).all()
    assert (distance(best) < distance(best * 0.99)).all()
    assert torch.isfinite(best_scale(positive, torch.zeros_like(negative))).all()


def test_nothing_moves_at_the_first_steps_of_cfg_zero_star() -> None:
    transformer = FakeTransformer()
    options = {"cfg_zero_star": True, "cfg_zero_init_steps": 2, "solver": "euler"}
    states: list[Tensor] = []
    generate(
        models_of(transformer),
        request_with(**options),
        on_estimate=lambda _index, estimate: states.append(estimate),
    )
    assert len(transformer.calls) == 2 * (6 - 2)
    # With no velocity the estimate of the clean latents is where the walk stands.
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescale_is_that_of_diffusers(share: float) -> None:
    seen = velocities(POSITIVE, NEGATIVE)
    plain = combined_velocity(step_of(), seen)
    found = combined_velocity(step_of(), seen, methods_of(DenoisingOptions(guidance_rescale=share)))
    torch.testing.assert_close(found, rescale_noise_cfg(plain, seen[POSITIVE], share))


def test_skip_layers_original_adds_a_pass_within_its_share_of_the_steps() -> None:
    options = DenoisingOptions(slg_mode="original", slg_layers=(1, 2), slg_start=0.2, slg_end=0.5)
    made = [index for index in range(10) if SKIPPING in passes_at(options, step_of(index))]
    assert made == [2, 3, 4]
    passes = passes_at(options, step_of())
    assert passes[SKIPPING].text == "a cat"
    assert passes[SKIPPING].skipped_blocks == {1, 2}
    assert not passes[POSITIVE].skipped_blocks
    assert not passes[NEGATIVE].skipped_blocks
    seen = velocities(POSITIVE, NEGATIVE, SKIPPING, dtype=torch.float64)
    found = combined_velocity(step_of(), seen, methods_of(options))
    guided = seen[NEGATIVE] + 4.0 * (seen[POSITIVE] - seen[NEGATIVE])
    torch.testing.assert_close(found, guided + 3.0 * (seen[POSITIVE] - seen[SKIPPING]))


def test_skip_layers_uncond_skips_in_the_negative_pass() -> None:
    options = DenoisingOptions(slg_mode="uncond", slg_layers=(1,), slg_end=1.0)
    passes = passes_at(options, step_of())
    assert list(passes) == [POSITIVE, NEGATIVE]
    assert passes[NEGATIVE].skipped_blocks == {1}
    # Where another method has taken the negative away, nothing is left to do.
    both = options.model_copy(update={"cfg_skip_mode": "early", "cfg_apply_ratio": 0.0})
    assert list(passes_at(both, step_of())) == [POSITIVE]


def without_blocks(model: WanTransformer, skipped: set[int]) -> WanTransformer:
    """Return a model that never had the blocks."""
    shorter = tiny_model(len(model.blocks))
    shorter.load_state_dict(model.state_dict())
    kept = [block for index, block in enumerate(shorter.blocks) if index not in skipped]
    shorter.blocks = BlockStack(kept)
    return shorter


def velocity_of(model: WanTransformer) -> Tensor:
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 3, 4, 6, generator=random)
    context = [torch.randn(7, TEXT_DIM, generator=random)]
    with torch.no_grad():
        result: Tensor = model(latents, torch.tensor([400.0]), context)
    return result


@pytest.mark.parametrize("skipped", [{1}, {0, 3}, {0, 1, 2}])
@pytest.mark.parametrize("swapped", [0, 2, 4])
def test_leaving_blocks_out_is_a_model_without_them(skipped: set[int], swapped: int) -> None:
    expected = velocity_of(without_blocks(tiny_model(), skipped))
    model = tiny_model()
    whole = velocity_of(model)
    if swapped:
        model.requires_grad_(False)
        model.blocks.swap = BlockSwap(model.blocks, swapped, HostStreams())
    with model.blocks.leaving_out(skipped):
        assert torch.equal(velocity_of(model), expected)
    assert torch.equal(velocity_of(model), whole)


def test_streamed_blocks_that_are_left_out_do_not_come() -> None:
    streams = HostStreams()
    model = tiny_model(num_layers=6).requires_grad_(False)
    swap = model.blocks.swap = BlockSwap(model.blocks, 6, streams)
    velocity_of(model)
    before = streams.copies
    velocity_of(model)
    whole = streams.copies - before
    arrived: set[int] = set()
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_: arrived.update(swap.resident))
        assert index in swap.streamed
    with model.blocks.leaving_out({2, 3}):
        before = streams.copies
        velocity_of(model)
    assert streams.copies - before == whole - 2
    assert arrived == {0, 1, 4, 5}


def test_a_block_that_is_not_there_is_named() -> None:
    request = request_with(slg_mode="original", slg_layers=[9])
    request.check(T2V)  # the released model has it
    with pytest.raises(ConfigError, match="model has 4"):
        generate(models_of(tiny_model()), request)


def test_batched_passes_are_the_same() -> None:
    """With texts of different lengths, and passes that go through different blocks."""
    model = tiny_model()
    for options in ({}, {"slg_mode": "original", "slg_layers": [1], "slg_end": 1.0}):
        single = generate(models_of(model), request_with(**options))
        batched = generate(models_of(model), request_with(cfg_batch=True, **options))
        torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-5)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _module, given: calls.append(len(given[0])))
    generate(models_of(model), request_with(cfg_batch=True, slg_mode="uncond", slg_layers=[1]))
    assert calls == [1, 1, 2, 2, 2, 2, 2]  # the first step's negative skips a block


def test_batched_passes_with_a_timestep_for_each_token() -> None:
    name = "wan2.2-ti2v-5b"
    model = tiny_model(variant=name)
    held = Conditions(first_latents_BC1HW=torch.full((1, 48, 1, 4, 4), 0.5))
    made = [
        generate(models_of(model, name), request_with(name, cfg_batch=batch), conditions=held)
        for batch in (False, True)
    ]
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)


def test_batched_passes_with_channels_and_an_image(tmp_path: Path) -> None:
    name = "wan2.1-i2v-14b"
    model = tiny_model(variant=name)
    random = torch.Generator().manual_seed(2)
    given = Conditions(
        extra_channels_BCFHW=torch.randn(1, 20, 2, 8, 8, generator=random),
        image_context_BTD=torch.randn(1, 7, 20, generator=random),
    )
    picture = tmp_path / "first.png"
    picture.touch()  # encoded already
    made = [
        generate(
            models_of(model, name),
            request_with(name, cfg_batch=batch, image=picture),
            conditions=given,
        )
        for batch in (False, True)
    ]
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"slg_mode": "original"}, "slg_layers"),
        ({"slg_layers": [3]}, "slg_layers"),
        ({"slg_mode": "original", "slg_layers": [30]}, "slg_layers"),
        ({"slg_mode": "original", "slg_layers": [9], "slg_start": 0.5}, "slg_end"),
        ({"slg_mode": "uncond", "slg_layers": [9], "guidance_scale": 1.0}, "slg_mode"),
        ({"step_cache": "tea"}, "step_cache"),
        ({"step_cache": "magcache", "step_cache_retention": True}, "step_cache_retention"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        request_with(**options).check(T2V)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert all(problem.hint for problem in caught.value.problems)


def test_prompts_take_what_they_leave_open_from_the_section() -> None:
    assert set(DenoisingOptions.model_fields) == set(PromptDenoising.model_fields)
    assert issubclass(SamplingSection, SectionDenoising)
    section = SamplingSection(cfg_zero_star=True, slg_scale=2.0, cfg_skip_mode="late")
    prompt = Prompt(prompt="a cat", cfg_zero_star=False, slg_scale=0.0)
    found = SampleRequest.of(prompt, T2V, section).denoising
    assert (found.cfg_zero_star, found.slg_scale, found.cfg_skip_mode) == (False, 0.0, "late")


def test_methods_that_are_off_are_absent() -> None:
    assert methods_of(DenoisingOptions()) == []
