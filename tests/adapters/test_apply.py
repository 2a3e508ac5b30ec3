from __future__ import annotations

import pytest
import torch

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.lora import LoRA
from trainer.contract.errors import ModelFileError

from .tiny_models import (
    expected_weights,
    make_factors,
    make_transformer,
    model_inputs,
    run,
)


def saved(tmp_path, factors, name="lora"):
    path = tmp_path / f"{name}.safetensors"
    save_adapter(factors, path, layout="kohya", dtype=torch.float32)
    return load_adapter(path)


@pytest.fixture
def adapter(transformer, tmp_path):
    return saved(tmp_path, make_factors(transformer, alpha=6.0))


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
@torch.no_grad()
def test_attached_equals_merged_equals_the_formula(transformer, adapter, strength):
    inputs = model_inputs(transformer)
    plain = run(transformer, inputs)
    by_hand = make_transformer()
    weights = expected_weights(transformer, adapter, strength)
    by_hand.load_state_dict({name: value.float() for name, value in weights.items()})
    wanted = run(by_hand, inputs)
    merged = make_transformer()
    merge_into(merged, adapter, strength)
    attached = attach(transformer, adapter, strength)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(run(transformer, inputs), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(merged, inputs), wanted, rtol=1e-5, atol=1e-5)
    attached.detach()
    assert torch.equal(run(transformer, inputs), plain)


@torch.no_grad()
def test_several_loras_add_up_and_come_off_in_any_order(transformer, tmp_path):
    inputs = model_inputs(transformer)
    plain, state = run(transformer, inputs), transformer.state_dict()
    one = saved(tmp_path, make_factors(transformer, seed=1), "one")
    two = saved(tmp_path, make_factors(transformer, rank=2, seed=2), "two")
    first, second = attach(transformer, one), attach(transformer, two, 0.5)
    by_hand = make_transformer()
    weights = expected_weights(transformer, {}, 0)
    for factors, strength in ((one, 1.0), (two, 0.5)):
        for name, value in expected_weights(by_hand, factors, strength).items():
            weights[name] = weights[name] + value - by_hand.state_dict()[name]
    by_hand.load_state_dict({name: value.float() for name, value in weights.items()})
    torch.testing.assert_close(run(transformer, inputs), run(by_hand, inputs), rtol=1e-5, atol=1e-5)
    assert list(transformer.state_dict()) == list(state)
    first.detach()
    alone = run(transformer, inputs)
    second.set_strength(0.0)
    assert torch.equal(run(transformer, inputs), plain)
    second.set_strength(0.5)
    assert torch.equal(run(transformer, inputs), alone)
    second.detach()
    second.detach()
    assert torch.equal(run(transformer, inputs), plain)
    assert not any("base" in name for name, _ in transformer.named_modules())


def test_a_lora_can_be_trained_on_top_of_an_attached_one(transformer, adapter, build):
    attached = attach(transformer, adapter)
    lora = LoRA(LoRA.Config(rank=2), build)
    lora.inject(transformer, 0)
    run(transformer, model_inputs(transformer)).square().mean().backward()
    trained = {id(p) for p in transformer.parameters() if p.grad is not None}
    assert trained == {id(p) for p in lora.trainable().values()}
    attached.detach()
    lora.remove()
    assert not any("base" in name for name, _ in transformer.named_modules())


def test_training_attached_factors_is_not_possible_by_accident(transformer, adapter):
    before = sum(p.numel() for p in transformer.parameters())
    attach(transformer, adapter)
    assert sum(p.numel() for p in transformer.parameters()) == before


@torch.no_grad()
def test_a_bfloat16_model_is_merged_with_one_rounding(adapter):
    model = make_transformer().bfloat16()
    weights = expected_weights(model, adapter, 1.0)
    merge_into(model, adapter, 1.0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name].to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def test_quantised_weights_are_not_merged_into(adapter):
    model = make_transformer()
    layer = model.get_submodule("blocks.1.ffn.0")
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    before = model.get_parameter("blocks.0.self_attn.q.weight").clone()
    with pytest.raises(ModelFileError, match=r"blocks\.1\.ffn\.0.*quantised"):
        merge_into(model, adapter)
    assert torch.equal(model.get_parameter("blocks.0.self_attn.q.weight"), before)


@pytest.mark.parametrize("use", [attach, merge_into])
@pytest.mark.parametrize(
    ("trained_on", "words"),
    [
        ({"dim": 48}, ["(48, 48)", "(24, 24)", "width 48", "width 24"]),
        ({"num_layers": 5}, ["20 of its 50 layers", "blocks 0-4", "blocks 0-2"]),
        ({"ffn_dim": 96}, ["feed-forward 96", "feed-forward 48"]),
        ({"image": True}, ["blocks.0.cross_attn.k_img", "with image branch"]),
    ],
)
def test_a_lora_for_another_model_is_refused_and_nothing_changes(tmp_path, use, trained_on, words):
    model = make_transformer()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = saved(tmp_path, make_factors(make_transformer(**trained_on)))
    with pytest.raises(ModelFileError) as caught:
        use(model, adapter)
    for word in ("is for another model", str(adapter.path), *words):
        assert word in str(caught.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("base" in name for name, _ in model.named_modules())


@torch.no_grad()
def test_an_image_lora_is_used_on_a_text_model_only_when_asked_to(transformer, tmp_path):
    factors = make_factors(make_transformer(image=True))
    adapter = saved(tmp_path, factors)
    attach(transformer, adapter, skip_missing=True)
    shared = {n: f for n, f in factors.items() if not n.endswith(("k_img", "v_img"))}
    assert 0 < len(shared) < len(factors)
    by_hand = make_transformer()
    weights = expected_weights(by_hand, shared)
    by_hand.load_state_dict({name: value.float() for name, value in weights.items()})
    inputs = model_inputs(transformer)
    torch.testing.assert_close(run(transformer, inputs), run(by_hand, inputs), rtol=1e-5, atol=1e-5)
    only_image = {n: f for n, f in factors.items() if n not in shared}
    with pytest.raises(ModelFileError, match="another model"):
        attach(make_transformer(), saved(tmp_path, only_image), skip_missing=True)
