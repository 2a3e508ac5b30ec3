"""The transformer against diffusers' implementation, and whether the comparison is sharp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from wan_pairs import (
    GRID,
    Inputs,
    build,
    build_pair,
    gradients,
    largest_difference,
    make_inputs,
    padded,
    run_ours,
    run_theirs,
    tiny_config,
)

from trainer.attention.sdpa import TorchAttention
from trainer.contract.variants import VARIANTS
from trainer.models.wan.context import prepare_context
from trainer.models.wan.transformer import WanTransformer

TOLERANCE = 2e-5
T2V, I2V, TI2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"


@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_diffusers(variant: str, per_token: bool) -> None:
    config = tiny_config(variant)
    ours, theirs = build_pair(config, exact_time=False)
    inputs = make_inputs(config, per_token=per_token)
    assert largest_difference(run_ours(ours, inputs), run_theirs(theirs, inputs)) <= TOLERANCE


@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_diffusers(variant: str, per_token: bool) -> None:
    config = tiny_config(variant)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config, per_token=per_token)
    mine = gradients(ours, run_ours(ours, inputs), inputs.latents)
    other = gradients(theirs, run_theirs(theirs, inputs), inputs.latents)
    assert mine.keys() == other.keys()
    for name, gradient in mine.items():
        size = float(other[name].abs().max())
        assert size > 50 * TOLERANCE, f"{name} takes no part, the comparison would be empty"
        assert largest_difference(gradient, other[name]) <= TOLERANCE, name


@pytest.mark.parametrize("variant", [T2V, I2V])
def test_single_sample_takes_the_same_values(variant: str) -> None:
    config = tiny_config(variant)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config, lengths=(17,))
    mine = gradients(ours, run_ours(ours, inputs), inputs.latents)
    other = gradients(theirs, run_theirs(theirs, inputs), inputs.latents)
    for name, gradient in mine.items():
        assert largest_difference(gradient, other[name]) <= TOLERANCE, name


def test_reference_picture_is_a_frame_in_front() -> None:
    config = replace(tiny_config("wan2.1-fun-control-1.3b"), reference_conv=True)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config)
    reference = torch.randn(2, 16, *GRID[1:], generator=torch.Generator().manual_seed(2))
    seen = nn.functional.conv2d(reference, ours.ref_conv.weight, ours.ref_conv.bias, stride=2)
    embed = theirs.patch_embedding

    class WithReference(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return torch.cat([seen.unsqueeze(2), embed(latents[:, :, 1:])], dim=2)

    expected_inputs = Inputs(
        nn.functional.pad(inputs.latents.detach(), (0, 0, 0, 0, 1, 0)),
        inputs.timestep,
        inputs.texts,
        nn.functional.pad(inputs.extra, (0, 0, 0, 0, 1, 0)),  # type: ignore[arg-type]
        inputs.image,
    )
    theirs.patch_embedding = WithReference()
    expected = run_theirs(theirs, expected_inputs)[:, :, 1:]
    found = run_ours(ours, inputs, reference=reference)
    assert largest_difference(found, expected) <= TOLERANCE
    assert largest_difference(found, run_ours(ours, inputs)) > 0.01


def _swap_query_and_key(model: WanTransformer) -> None:
    attention = model.blocks[0].self_attn
    attention.q, attention.k = attention.k, attention.q
    attention.norm_q, attention.norm_k = attention.norm_k, attention.norm_q
    attention.norm_q.weight.data.mul_(1.01)


def _exact_gelu(model: WanTransformer) -> None:
    for block in model.blocks:
        block.ffn[1] = nn.GELU()


def _other_eps(model: WanTransformer) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5


def _other_theta(model: WanTransformer) -> None:
    model.config = replace(model.config, rope_theta=9000.0)


def _bfloat16_weights(model: WanTransformer) -> None:
    for value in model.parameters():
        value.data = value.data.bfloat16().float()


def _rounded_text(model: WanTransformer) -> None:
    model.config = replace(model.config, text_len=511)


@pytest.mark.parametrize(
    "mistake",
    [
        _swap_query_and_key,
        _exact_gelu,
        _other_eps,
        _other_theta,
        _bfloat16_weights,
        _rounded_text,
    ],
)
def test_tolerance_would_catch(mistake: Callable[[WanTransformer], None]) -> None:
    config = tiny_config(T2V)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config)
    mistake(ours)
    difference = largest_difference(run_ours(ours, inputs), run_theirs(theirs, inputs))
    assert difference > 3 * TOLERANCE


def test_timestep_is_not_a_fraction() -> None:
    config = tiny_config(T2V)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config)
    expected = run_theirs(theirs, inputs)
    inputs.timestep = inputs.timestep / 1000
    assert largest_difference(run_ours(ours, inputs), expected) > 0.1


class _NoBias(TorchAttention):
    takes_bias = False


@pytest.mark.parametrize("lengths", [(9, 30), (0, 4), (512, 3), (511, 510), (1, 1)])
def test_zero_rows_count_whatever_form_the_text_has(lengths: tuple[int, int]) -> None:
    config = tiny_config(I2V)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config, lengths=lengths)
    expected = run_theirs(theirs, inputs)
    as_list = run_ours(ours, inputs)
    texts = inputs.texts
    inputs.texts = padded(texts)  # type: ignore[assignment]
    as_full_tensor = run_ours(ours, inputs)
    inputs.texts = padded(texts, max(lengths))  # type: ignore[assignment]
    as_short_tensor = run_ours(ours, inputs)
    ours.attend = _NoBias()
    without_stand_ins = run_ours(ours, inputs)
    for found in (as_list, as_full_tensor, as_short_tensor, without_stand_ins):
        assert largest_difference(found, expected) <= TOLERANCE


def test_text_that_is_not_padded_would_show() -> None:
    ours = build(tiny_config(T2V))
    inputs = make_inputs(tiny_config(T2V))
    padded_output = run_ours(ours, inputs)
    ours.config = replace(ours.config, text_len=30)
    assert largest_difference(run_ours(ours, inputs), padded_output) > 0.1


def test_gradients_reach_the_text_as_in_diffusers() -> None:
    config = tiny_config(T2V)
    ours, theirs = build_pair(config)
    inputs = make_inputs(config)
    for text in inputs.texts:
        text.requires_grad_()
    mine = torch.autograd.grad(run_ours(ours, inputs).square().sum(), inputs.texts)
    other = torch.autograd.grad(run_theirs(theirs, inputs).square().sum(), inputs.texts)
    for one, two in zip(mine, other, strict=True):
        assert largest_difference(one, two) <= TOLERANCE * float(two.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [0, 1, 40, 300, 509])
def test_stand_ins_weigh_as_much_as_the_zero_rows(dtype: torch.dtype, length: int) -> None:
    rows, bias = prepare_context([torch.randn(length, 8)], 512, 8, dtype, compact=True)
    assert bias is not None
    assert rows.shape == (1, length + 2, 8)
    weight = float(bias[0, length:].double().exp().sum())
    assert weight == pytest.approx(512 - length, rel=1e-3)
    assert torch.all(bias[0, :length] == 0)
    assert torch.all(rows[0, length:] == 0)


def test_one_timestep_for_all_tokens_is_one_per_sample() -> None:
    config = tiny_config(TI2V)
    model = build(config)
    inputs = make_inputs(config)
    expected = run_ours(model, inputs)
    inputs.timestep = inputs.timestep[:, None].repeat(1, 18)
    assert torch.equal(run_ours(model, inputs), expected)


def test_bfloat16_stays_near_float32() -> None:
    config = replace(tiny_config(T2V), dim=96, ffn_dim=192)
    model = build(config)
    inputs = make_inputs(config)
    expected = run_ours(model, inputs)
    time_embedding = model.time_embedding
    model.bfloat16()
    time_embedding.float()
    found = run_ours(model, inputs)
    assert found.dtype == torch.float32
    error = float(((found - expected).norm() / expected.norm()).detach())
    assert 1e-4 < error < 1.5e-2
