"""Step caches: when they compute, what they reuse, and how near they stay to the full run."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.wan_pairs import build, tiny_config
from tests.swap.swapped_models import make_model
from trainer.contract.config import Prompt
from trainer.contract.denoising_options import DenoisingOptions
from trainer.contract.errors import ConfigError
from trainer.contract.variants import get_variant
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import HostStreams
from trainer.models import load_text_encoder, load_transformer
from trainer.models.wan.quantised import is_block_linear
from trainer.models.wan.transformer import WanTransformer
from trainer.nano.files import ASSETS, EXPERT_VARIANT, T2V_VARIANT, asset
from trainer.nano.quality import FLOW_SHIFT, GUIDANCE_SCALE, NUM_FRAMES, NUM_STEPS, SIZE
from trainer.quant.fp8 import Fp8Spec, quantise
from trainer.quant.linear import Fp8Linear
from trainer.sampling.conditions import Conditions
from trainer.sampling.guidance import NEGATIVE, POSITIVE
from trainer.sampling.pipeline import Evaluations, SamplingModels, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.drift import Drift, input_distances
from trainer.sampling.step_cache.magcache import MagCache, resampled
from trainer.sampling.step_cache.published import published_values
from trainer.sampling.step_cache.recorder import Recorder
from trainer.sampling.step_cache.teacache import TeaCache
from trainer.sampling.step_cache.values import (
    Calibration,
    ExpertValues,
    Polynomial,
    StepCacheValues,
    read_calibration,
    write_calibration,
)

T2V = get_variant(T2V_VARIANT)
EXPERTS = get_variant(EXPERT_VARIANT)
STEPS = 12


class Embedding(nn.Module):
    """Stands for a transformer of which only the timestep's embedding is asked for."""

    def time_features(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        head_BD = torch.stack([(timestep_B / 300).sin(), timestep_B / 500], 1)
        return head_BD, torch.cat([head_BD, 1 + (timestep_B / 100)[:, None].cos()], 1)


def decisions(drift: Drift, name: str, num_steps: int) -> list[bool]:
    """Return which steps are computed, as the cache decides one after the other."""
    computed, since = [], 0
    for index in range(num_steps):
        fresh = index == 0 or not drift.allows(name, since, index)
        computed.append(fresh)
        since = index if fresh else since
    return computed


def teacache_reference(
    distances: list[float], coefficients: tuple[float, ...], threshold: float, first: int, last: int
) -> list[bool]:
    """The published loop: a sum that is carried along and set back."""
    carried, computed = 0.0, []
    for index, distance in enumerate(distances):
        if index < first or index >= last:
            fresh, carried = True, 0.0
        else:
            carried += float(np.poly1d(coefficients)(distance))
            fresh = carried >= threshold
            carried = 0.0 if fresh else carried
        computed.append(fresh)
    return computed


def magcache_reference(
    ratios: list[float], threshold: float, most: int, retained: int
) -> list[bool]:
    """The published loop, likewise."""
    product, error, skips, computed = 1.0, 0.0, 0, []
    for index, ratio in enumerate(ratios):
        fresh = True
        if index >= max(1, retained):
            product *= ratio
            error += abs(1 - product)
            skips += 1
            fresh = not (error < threshold and skips <= most)
        if fresh:
            product, error, skips = 1.0, 0.0, 0
        computed.append(fresh)
    return computed


@settings(max_examples=40, deadline=None)
@given(
    ratios=st.lists(st.floats(0.8, 1.2), min_size=2, max_size=30),
    threshold=st.floats(0.01, 0.4),
    most=st.integers(1, 6),
    start=st.floats(0, 0.5),
)
def test_magcache_decides_as_published(
    ratios: list[float], threshold: float, most: int, start: float
) -> None:
    ratios = [1.0, *ratios[1:]]
    options = DenoisingOptions(
        step_cache="magcache",
        step_cache_threshold=threshold,
        step_cache_max_skips=most,
        step_cache_start=start,
    )
    values = ExpertValues(magcache={POSITIVE: tuple(ratios)})
    drift = MagCache.drift(options, values, Embedding(), torch.zeros(len(ratios)))
    expected = magcache_reference(ratios, threshold, most, round(start * len(ratios)))
    assert decisions(drift, POSITIVE, len(ratios)) == expected


@pytest.mark.parametrize("retention", [False, True])
@pytest.mark.parametrize("threshold", [0.02, 0.08, 0.3])
def test_teacache_decides_as_published(retention: bool, threshold: float) -> None:
    timesteps = torch.linspace(1000, 40, 30)
    values = published_values("wan2.1-t2v-1.3b", 832 * 480)
    assert values is not None
    options = DenoisingOptions(
        step_cache="teacache", step_cache_threshold=threshold, step_cache_retention=retention
    )
    drift = TeaCache.drift(options, values, Embedding(), timesteps)
    form = "retention" if retention else "plain"
    distances = input_distances(Embedding(), timesteps, form)
    first, last = (3, 30) if retention else (1, 29)
    polynomial = values.teacache[form]
    assert decisions(drift, POSITIVE, 30) == teacache_reference(
        distances, polynomial.coefficients, threshold, first, last
    )


def test_distances_are_relative_l1() -> None:
    model = build(tiny_config(T2V_VARIANT)).eval()
    timesteps = torch.tensor([900.0, 850.0, 790.0])
    with torch.no_grad():
        found = {form: input_distances(model, timesteps, form) for form in ("plain", "retention")}
        for form, layers in (("plain", 0), ("retention", 1)):
            features = []
            for timestep in timesteps:
                # From the definition: sinusoid, embedding, and the projection of the blocks.
                half = model.config.freq_dim // 2
                angles = timestep.double() * 10000 ** (-torch.arange(half).double() / half)
                sinusoid = torch.cat([angles.cos(), angles.sin()]).float()
                embedding = model.time_embedding(sinusoid[None])
                features.append(model.time_projection(embedding) if layers else embedding)
            for index in (1, 2):
                before, after = features[index - 1].double(), features[index].double()
                expected = (after - before).abs().mean() / before.abs().mean()
                assert found[form][index] == pytest.approx(float(expected), rel=1e-4)
            assert found[form][0] == 0


def test_ratios_are_resampled_to_the_nearest_step() -> None:
    assert resampled([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.0, 3.0, 5.0]
    assert resampled([1.0, 2.0, 3.0], 5) == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert resampled([1.0, 2.0], 1) == [2.0]


def test_polynomials_go_on_as_lines_outside_of_what_they_were_fitted_to() -> None:
    polynomial = Polynomial(coefficients=(1.0, 0.0, 0.0), lowest=0.1, highest=0.4)
    assert polynomial(0.3) == pytest.approx(0.09)
    assert polynomial(0.8) == pytest.approx(0.32)
    assert polynomial(0.05) == pytest.approx(0.005)
    assert Polynomial(coefficients=(1.0, 0.0, 0.0))(0.8) == pytest.approx(0.64)


def tiny_models(
    variant: Any = T2V, num_layers: int = 4
) -> tuple[SamplingModels, dict[str, WanTransformer]]:
    shape = replace(tiny_config(T2V_VARIANT), num_layers=num_layers)
    names = ("low_noise", "high_noise") if variant.experts else ("low_noise",)
    experts = {name: build(shape, seed).eval() for seed, name in enumerate(names)}
    random = torch.Generator().manual_seed(1)
    contexts = {
        text: torch.randn(5, 32, generator=random) for text in ("a cat", variant.negative_prompt)
    }
    models = SamplingModels(variant=variant, transformer=experts.__getitem__, contexts=contexts)
    return models, experts


def request_with(variant: Any = T2V, **options: Any) -> SampleRequest:
    fields = {
        "prompt": "a cat",
        "width": 64,
        "height": 64,
        "num_frames": 5,
        "num_steps": STEPS,
        "flow_shift": 8.0,
    }
    return SampleRequest.of(Prompt.model_validate(fields | options), variant)


def known(experts: tuple[str, ...] = ("low_noise",), **ratios: list[float]) -> StepCacheValues:
    one = ExpertValues(
        magcache=ratios or {POSITIVE: [1.0] * STEPS, NEGATIVE: [1.0] * STEPS},
        teacache={"plain": Polynomial(coefficients=(1.0, 0.0))},
    )
    return StepCacheValues(
        Calibration(
            variant=T2V_VARIANT,
            models={},
            num_steps=STEPS,
            flow_shift=8.0,
            num_prompts=1,
            experts=dict.fromkeys(experts, one),
        )
    )


def count(models: SamplingModels, request: SampleRequest, **more: Any) -> tuple[Tensor, int, int]:
    ends: list[Evaluations] = []
    result = generate(models, request, on_end=ends.append, **more)
    return result, ends[0].computed, ends[0].reused


def blocks_run(experts: dict[str, WanTransformer]) -> list[str]:
    """Return a list to which every run through the blocks adds the expert's name."""
    runs: list[str] = []
    for name, expert in experts.items():
        expert.blocks[0].register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    return runs


def test_reused_steps_do_not_run_the_blocks() -> None:
    models, experts = tiny_models()
    models = replace(models, step_cache=known())
    runs = blocks_run(experts)
    request = request_with(step_cache="magcache", step_cache_max_skips=3, step_cache_start=0.0)
    _, computed, reused = count(models, request)
    # Ratios of 1 never drift: each pass at steps 0, 4 and 8.
    assert (computed, reused) == (6, 18)
    assert len(runs) == computed


def test_what_is_added_again_is_what_the_blocks_added() -> None:
    """Two steps, the second reused: the velocity from its own tokens and the first's residual."""
    models, experts = tiny_models()
    models = replace(models, step_cache=known())
    model = experts["low_noise"]
    seen: list[Tensor] = []
    model.blocks.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    residuals: list[Tensor] = []
    model.head.register_forward_pre_hook(
        lambda _module, given: residuals.append(given[0] - seen[-1])
    )
    request = request_with(
        num_steps=2, guidance_scale=1.0, step_cache="magcache", step_cache_start=0.0
    )
    count(models, request)
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(residuals[1], residuals[0], rtol=1e-4, atol=1e-5)


def test_positive_and_negative_passes_are_kept_apart() -> None:
    models, _experts = tiny_models()
    drifting = [1.0] + [2.0] * (STEPS - 1)
    models = replace(models, step_cache=known(positive=[1.0] * STEPS, negative=drifting))
    request = request_with(step_cache="magcache", step_cache_max_skips=100, step_cache_start=0.0)
    _, computed, _ = count(models, request)
    assert computed == 1 + STEPS


def test_another_expert_begins_anew() -> None:
    models, experts = tiny_models(EXPERTS)
    models = replace(models, step_cache=known(("low_noise", "high_noise")))
    runs = blocks_run(experts)
    request = request_with(
        EXPERTS, step_cache="magcache", step_cache_max_skips=100, step_cache_start=0.0
    )
    count(models, request)
    assert runs == ["high_noise"] * 2 + ["low_noise"] * 2


def test_steps_that_guidance_leaves_out_count_as_skipped() -> None:
    models, _experts = tiny_models()
    models = replace(models, step_cache=known())
    options = {"step_cache": "magcache", "step_cache_start": 0.0, "step_cache_max_skips": 2}
    request = request_with(cfg_skip_mode="alternate", cfg_apply_ratio=0.5, **options)
    _, computed, reused = count(models, request)
    # Positive at 0, 3, 6, 9. Negative is there at 1, 3, 5, …: computed at 1, reused at 3, …
    assert computed == 4 + 3
    assert reused == 8 + 3


def test_passes_through_other_blocks_are_not_mixed_up() -> None:
    models, _experts = tiny_models()
    models = replace(models, step_cache=known())
    options = {"step_cache": "magcache", "step_cache_start": 0.0, "step_cache_max_skips": 100}
    request = request_with(slg_mode="uncond", slg_layers=[1], slg_end=0.5, **options)
    _, computed, _ = count(models, request)
    assert computed == 1 + 2  # the negative once without block 1 and once with it


@pytest.mark.parametrize("method", ["teacache", "magcache"])
def test_batched_passes_and_streamed_blocks_give_the_same(method: str) -> None:
    results = []
    for batch, swapped in ((False, 0), (True, 0), (False, 3)):
        models, experts = tiny_models()
        models = replace(models, step_cache=known())
        if swapped:
            blocks = experts["low_noise"].requires_grad_(False).blocks
            blocks.swap = BlockSwap(blocks, swapped, HostStreams())
        request = request_with(
            step_cache=method, step_cache_threshold=5.0, step_cache_start=0.0, cfg_batch=batch
        )
        result, computed, reused = count(models, request)
        assert reused > 0
        assert computed + reused == 2 * STEPS
        results.append(result)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[2], results[0])


def with_lora(swapped: int = 0) -> WanTransformer:
    return make_model(swapped)[0].eval()


def in_fp8() -> WanTransformer:
    model = build(replace(tiny_config(T2V_VARIANT), num_layers=4)).eval()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and is_block_linear(f"{name}.weight", linear.weight.shape):
            parent, _, child = name.rpartition(".")
            weight = quantise(linear.weight.detach(), Fp8Spec(scaled=True), "cpu")
            setattr(model.get_submodule(parent), child, Fp8Linear(weight, linear.bias, None))
    return model


@pytest.mark.parametrize(
    "pair", [(with_lora, lambda: with_lora(3)), (in_fp8, in_fp8)], ids=["LoRA, streamed", "fp8"]
)
def test_adapters_and_fp8_weights_are_reused_like_others(pair: Any) -> None:
    results = []
    for make in pair:
        models, _ = tiny_models()
        model = make()
        models = replace(models, transformer=lambda _, model=model: model, step_cache=known())
        plain = generate(models, request_with())
        never, _, reused = count(
            models, request_with(step_cache="teacache", step_cache_threshold=0)
        )
        assert reused == 0
        assert torch.equal(never, plain)
        result, computed, reused = count(models, request_with(step_cache="magcache"))
        assert reused > 0
        assert computed + reused == 2 * STEPS
        assert not torch.equal(result, plain)
        results.append(result)
    assert torch.equal(*results)


def test_a_timestep_for_each_token_counts_as_that_of_the_step() -> None:
    """TI2V-5B holds its first frame at timestep 0; the others' timestep decides."""
    variant = get_variant("wan2.2-ti2v-5b")
    model = build(replace(tiny_config(variant.name), num_layers=4)).eval()
    contexts = tiny_models()[0].contexts
    models = SamplingModels(
        variant=variant,
        transformer=lambda _: model,
        contexts={"a cat": contexts["a cat"], variant.negative_prompt: contexts["a cat"]},
        step_cache=known(),
    )
    held = Conditions(first_latents_BC1HW=torch.full((1, 48, 1, 4, 4), 0.5))
    request = request_with(variant, step_cache="teacache", step_cache_threshold=5.0)
    result, computed, reused = count(models, request, conditions=held)
    _, computed_in_text_mode, _ = count(models, request, conditions=Conditions())
    assert computed == computed_in_text_mode
    assert reused > 0
    assert (result[:, :, 0] == 0.5).all()


def test_without_a_cache_nothing_changes() -> None:
    models, _ = tiny_models()
    plain = generate(models, request_with())
    again = generate(replace(models, step_cache=known()), request_with())
    assert torch.equal(plain, again)
    # Measuring changes nothing, either, nor does a cache that never finds a step near enough.
    assert torch.equal(generate(models, request_with(), observer=Recorder()), plain)
    strict = request_with(step_cache="teacache", step_cache_threshold=0.0)
    result, computed, reused = count(replace(models, step_cache=known()), strict)
    assert (computed, reused) == (2 * STEPS, 0)
    assert torch.equal(result, plain)


def test_the_same_request_gives_the_same_latents() -> None:
    models, _ = tiny_models()
    models = replace(models, step_cache=known())
    request = request_with(step_cache="magcache")
    assert torch.equal(generate(models, request), generate(models, request))


def test_what_is_not_known_is_refused_with_the_way_out() -> None:
    models, _experts = tiny_models()
    for method in ("teacache", "magcache"):
        with pytest.raises(ConfigError, match=f"{method} does not know") as caught:
            generate(models, request_with(step_cache=method))
        assert "menma sample --calibrate" in caught.value.hint
    # Without a negative pass, none needs to have been measured.
    models = replace(models, step_cache=known(positive=[1.0] * STEPS))
    with pytest.raises(ConfigError, match="with guidance"):
        generate(models, request_with(step_cache="magcache"))
    generate(models, request_with(step_cache="magcache", guidance_scale=1.0))


def test_published_values_are_those_of_the_size() -> None:
    for name, sides, threshold in (
        ("wan2.1-t2v-1.3b", (832, 480), 0.08),
        ("wan2.1-t2v-14b", (1280, 720), 0.2),
        ("wan2.1-i2v-14b", (832, 480), 0.26),
        ("wan2.1-i2v-14b", (720, 1280), 0.3),
    ):
        values = published_values(name, sides[0] * sides[1])
        assert values is not None
        assert values.teacache_threshold == threshold
        assert all(len(one.coefficients) == 5 for one in values.teacache.values())
    assert published_values("wan2.2-t2v-a14b", 832 * 480) is None


@pytest.mark.parametrize(
    ("name", "num_pixels", "num_steps"),
    [
        ("wan2.1-t2v-1.3b", 832 * 480, 50),
        ("wan2.1-t2v-14b", 832 * 480, 50),
        ("wan2.1-i2v-14b", 832 * 480, 40),
        ("wan2.1-i2v-14b", 1280 * 720, 40),
    ],
)
def test_published_ratios_are_those_of_whole_runs(
    name: str, num_pixels: int, num_steps: int
) -> None:
    values = published_values(name, num_pixels)
    assert values is not None
    positive, negative = values.magcache[POSITIVE], values.magcache[NEGATIVE]
    assert len(positive) == len(negative) == num_steps
    assert positive[0] == negative[0] == 1
    # The passes differ little, and most of the work changes at the end: a slip would stand out.
    assert max(abs(a - b) for a, b in zip(positive, negative, strict=True)) < 0.01
    steps = np.abs(np.diff(positive[1:]))
    assert steps[: num_steps // 2].max() < 0.025
    # At the authors' settings about half of the passes are spared.
    options = DenoisingOptions(step_cache="magcache")
    drift = MagCache.drift(options, values, Embedding(), torch.zeros(num_steps))
    assert 0.4 < sum(decisions(drift, POSITIVE, num_steps)) / num_steps < 0.7


def test_the_fun_models_have_coefficients_and_no_ratios() -> None:
    values = published_values("wan2.1-fun-control-1.3b", 832 * 480)
    assert values is not None
    assert values.teacache
    assert not values.magcache


def test_recorded_ratios_are_those_of_the_blocks() -> None:
    models, experts = tiny_models()
    model = experts["low_noise"]
    tokens: list[Tensor] = []
    model.blocks.register_forward_pre_hook(lambda _module, given: tokens.append(given[0]))
    residuals: list[Tensor] = []
    model.head.register_forward_pre_hook(
        lambda _module, given: residuals.append((given[0] - tokens[-1]).double())
    )
    recorder = Recorder()
    generate(models, request_with(), observer=recorder)
    values = recorder.values()["low_noise"]
    for name, own in ((POSITIVE, residuals[0::2]), (NEGATIVE, residuals[1::2])):
        expected = [1.0]
        for before, after in itertools.pairwise(own):
            expected.append(float((after.norm(dim=-1) / before.norm(dim=-1)).mean()))
        assert values.magcache[name] == pytest.approx(expected, rel=1e-4)
    distances = input_distances(model, torch.tensor([1.0]), "plain")
    assert distances == [0.0]
    # The polynomial is the least squares of all changes of both passes.
    polynomial = values.teacache["plain"]
    assert polynomial.highest is not None
    assert len(polynomial.coefficients) == 5


def test_too_few_steps_to_calibrate_are_refused() -> None:
    models, _ = tiny_models()
    recorder = Recorder()
    generate(models, request_with(num_steps=5), observer=recorder)
    with pytest.raises(ConfigError, match="too few"):
        recorder.values()


def test_calibrations_come_back_from_their_file(tmp_path: Path) -> None:
    calibration = known().measured
    assert calibration is not None
    path = tmp_path / "folder" / "one.json"
    write_calibration(calibration, path)
    assert read_calibration(path) == calibration


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "other"}', "\x00", '{"a": ' * 10_000]
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"one\.json"):
        read_calibration(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_calibration(tmp_path / "none.json")


def test_numbers_of_a_calibration_are_checked(tmp_path: Path) -> None:
    calibration = known().measured
    assert calibration is not None
    content = calibration.model_dump(mode="json")
    content["experts"]["low_noise"]["magcache"][POSITIVE][3] = -1
    path = tmp_path / "one.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="greater than 0"):
        read_calibration(path)


@pytest.fixture(scope="module")
def nano() -> SamplingModels:
    prompt, negative = NANO_TEXTS
    encoder = load_text_encoder(asset("text_encoder"), dtype=torch.float32)
    contexts = dict(zip(NANO_TEXTS, encoder([prompt, negative]), strict=True))
    transformer = load_transformer(asset("t2v"))
    calibration = read_calibration(ASSETS / "wan_nano_t2v.step_cache.json")
    return SamplingModels(
        variant=T2V,
        transformer=lambda _: transformer,
        contexts=contexts,
        step_cache=StepCacheValues(calibration),
    )


NANO_TEXTS = ("a red circle moves to the left on a plain white background", "a video")


def nano_request(**options: Any) -> SampleRequest:
    fields = {
        "prompt": NANO_TEXTS[0],
        "negative_prompt": NANO_TEXTS[1],
        "width": SIZE,
        "height": SIZE,
        "num_frames": NUM_FRAMES,
        "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "flow_shift": FLOW_SHIFT,
    }
    return SampleRequest.of(Prompt.model_validate(fields | options), T2V)


def test_the_shipped_model_stays_near_its_full_run(
    nano: SamplingModels,
) -> None:
    full, computed, _ = count(nano, nano_request())
    assert computed == 2 * NUM_STEPS
    for options in (
        {"step_cache": "teacache"},
        {"step_cache": "teacache", "step_cache_retention": True},
        {"step_cache": "magcache"},
    ):
        result, computed, reused = count(nano, nano_request(**options))
        assert computed + reused == 2 * NUM_STEPS
        assert computed * 1.5 <= 2 * NUM_STEPS, options
        cosine = torch.cosine_similarity(result.flatten(), full.flatten(), dim=0)
        assert float(cosine) >= 0.95, options
