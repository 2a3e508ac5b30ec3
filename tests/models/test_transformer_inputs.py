"""What the transformer refuses, how it starts, and its size for every variant."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from wan_pairs import build, diffusers_options, make_inputs, run_ours, tiny_config

from trainer.contract.diffusers_names import to_diffusers_name, to_original_name
from trainer.contract.errors import ConfigError, DataError, ModelFileError
from trainer.contract.variants import VARIANTS
from trainer.models.wan.rope import axis_sizes, rope_table
from trainer.models.wan.transformer import WanTransformer

T2V, I2V, FLF2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b"

OFFICIAL_NAMES_AND_SHAPES = {
    "wan2.1-t2v-1.3b": "83f3237464a545f01585d3aab2efa8ec4333b7b9d73d329aa5aaa4d1a861e223",
    "wan2.1-t2v-14b": "7ca52b13faf083dcb17dd2de5b34a0ec72db782ec816192b9c40543a40ae3186",
    "wan2.1-i2v-14b": "129391da486fe9b9cf085b86a46ba3a9114acaa92a5499197e37af2574774d67",
    "wan2.1-flf2v-14b": "bd8c9f752e19444a316959621fd6bda7547017a578b55938aa4c76e1d5505e7c",
    "wan2.2-t2v-a14b": "7ca52b13faf083dcb17dd2de5b34a0ec72db782ec816192b9c40543a40ae3186",
    "wan2.2-i2v-a14b": "9dc5a4e7268a050f3708609791596e50ae93d7324592636d21090c51cb71baec",
    "wan2.2-ti2v-5b": "e6aa5b3ad491053717cbb3af607b9d9e6e22e91bb0ae32a0c41eaeccba85787b",
}
"""SHA-256 of the sorted lines `name shape` of the official models' tensors."""


def full_size(variant: str) -> WanTransformer:
    """Return the model at full size without memory."""
    with torch.device("meta"):
        return WanTransformer(VARIANTS[variant].transformer, seed=None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_the_published_one(variant: str) -> None:
    count = sum(value.numel() for value in full_size(variant).parameters())
    assert count == VARIANTS[variant].num_parameters


@pytest.mark.parametrize("variant", OFFICIAL_NAMES_AND_SHAPES)
def test_names_and_shapes_are_the_official_ones(variant: str) -> None:
    state = full_size(variant).state_dict()
    lines = sorted(f"{name} {list(value.shape)}" for name, value in state.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == OFFICIAL_NAMES_AND_SHAPES[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_name_map_is_complete_in_both_directions(variant: str) -> None:
    ours = {name: value.shape for name, value in full_size(variant).state_dict().items()}
    with torch.device("meta"):
        model = WanTransformer3DModel(**diffusers_options(VARIANTS[variant].transformer))
    theirs = {name: value.shape for name, value in model.state_dict().items()}
    assert {to_diffusers_name(name): shape for name, shape in ours.items()} == theirs
    assert {to_original_name(name): shape for name, shape in theirs.items()} == ours


def test_module_names_map_as_parameter_names_do() -> None:
    assert to_diffusers_name("blocks.12.self_attn.q") == "blocks.12.attn1.to_q"
    assert to_original_name("blocks.12.ffn.net.0.proj") == "blocks.12.ffn.0"


@pytest.mark.parametrize("name", ["ref_conv.weight", "blocks.0", "blocks.0.nonsense", "", "head"])
def test_names_without_counterpart_are_refused(name: str) -> None:
    with pytest.raises(ModelFileError, match="diffusers"):
        to_diffusers_name(name)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 3, 5, 6), "height of 5"),
        ((1, 16, 3, 4, 7), "width of 7"),
        ((1, 16, 0, 4, 6), "frames of 0"),
        ((1, 16, 1, 2, 2050), "width of 2050"),
        ((1, 15, 3, 4, 6), "16 channels, 15"),
        ((1, 36, 3, 4, 6), "16 channels, 36"),
        ((16, 3, 4, 6), "latents are"),
    ],
)
def test_latents_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    model = build(tiny_config(T2V))
    with pytest.raises(DataError, match=message):
        model(torch.zeros(shape), torch.tensor([1.0]), [torch.zeros(3, 32)])


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (T2V, {"image_context": torch.zeros(2, 7, 20)}, "image context"),
        (T2V, {"reference": torch.zeros(2, 16, 4, 6)}, "reference picture"),
        (T2V, {"extra_channels": torch.zeros(2, 20, 3, 4, 6)}, "16 channels, 36"),
        (I2V, {"image_context": torch.zeros(2, 14, 20)}, "image context"),
        (I2V, {"extra_channels": torch.zeros(2, 20, 1, 4, 6)}, "differ"),
        (FLF2V, {"image_context": torch.zeros(2, 7, 20)}, "image context"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(
    variant: str, changes: dict[str, Any], message: str
) -> None:
    config = tiny_config(variant)
    with pytest.raises(DataError, match=message):
        run_ours(build(config), make_inputs(config), **changes)


def test_missing_image_is_refused() -> None:
    config = tiny_config(I2V)
    inputs = make_inputs(config)
    inputs.image = None
    with pytest.raises(DataError, match="None was given"):
        run_ours(build(config), inputs)


@pytest.mark.parametrize("shape", [(3,), (2, 17), (2, 18, 1), ()])
def test_timesteps_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    config = tiny_config(T2V)
    inputs = make_inputs(config)
    inputs.timestep = torch.zeros(shape)
    with pytest.raises(DataError, match="timestep"):
        run_ours(build(config), inputs)


@pytest.mark.parametrize("shapes", [[(3, 32)], [(3, 32), (513, 32)], [(3, 32), (3, 31)]])
def test_texts_that_do_not_fit_are_refused(shapes: list[tuple[int, int]]) -> None:
    config = tiny_config(T2V)
    inputs = make_inputs(config)
    inputs.texts = [torch.ones(shape) for shape in shapes]
    with pytest.raises(DataError, match="text embedding"):
        run_ours(build(config), inputs)


@pytest.mark.parametrize("changes", [{"num_heads": 5}, {"num_heads": 0}, {"freq_dim": 15}])
def test_impossible_shapes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        WanTransformer(replace(tiny_config(T2V), **changes))


def test_fresh_models_predict_nothing_and_depend_on_the_seed_alone() -> None:
    config = tiny_config(FLF2V)
    one, same, other = (WanTransformer(config, seed=seed) for seed in (1, 1, 2))
    assert not run_ours(one, make_inputs(config)).any()
    for name, value in one.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, same.state_dict()[name]), name
    assert not torch.equal(one.blocks[0].ffn[0].weight, other.blocks[0].ffn[0].weight)


def test_fresh_models_learn() -> None:
    config = tiny_config(T2V)
    model = WanTransformer(config)
    inputs = make_inputs(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    target = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(60):
        loss = (run_ours(model, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("head_dim", [2, 4, 6, 8, 12, 16, 64, 128])
def test_axes_share_a_head_as_in_the_releases(head_dim: int) -> None:
    sizes = axis_sizes(head_dim)
    assert sum(sizes) == head_dim
    assert all(size % 2 == 0 for size in sizes)
    known = {128: (44, 42, 42), 64: (24, 20, 20), 16: (8, 4, 4), 12: (4, 4, 4), 2: (2, 0, 0)}
    assert sizes == known.get(head_dim, sizes)


def test_angles_are_exact_far_from_the_origin() -> None:
    table_LK = rope_table((1, 1, 1024), 12, 10000.0, torch.device("cpu"))
    # Width turns the last four channels; the second of its pairs by position / 10000^(1/2).
    angle = torch.tensor(1023 / 100, dtype=torch.float64)
    found = table_LK[1023, -2:].double()
    expected = torch.stack((angle.cos(), angle.sin()))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_sampling_in_inference_mode_leaves_training_possible() -> None:
    config = tiny_config(T2V)
    model = build(config)
    inputs = make_inputs(config)
    with torch.inference_mode():
        run_ours(model, inputs)
    run_ours(model, inputs).square().mean().backward()
    assert model.blocks[0].self_attn.q.weight.grad is not None
