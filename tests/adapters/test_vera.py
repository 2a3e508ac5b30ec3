from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.vera import Projections, VeRA, VeRALinear
from trainer.contract.adapter_start import VERA_KEY

from .tiny_models import make_transformer, model_inputs, run

RANK = 6
CPU = torch.device("cpu")


def injected(model, build, **options) -> VeRA:
    adapter = VeRA(VeRA.Config(**({"rank": RANK} | options)), build)
    adapter.inject(model, 0)
    return adapter


def peft_layer(linear: nn.Linear, **options):
    config = peft.VeraConfig(r=RANK, target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(linear), config)
    return model, model.base_model.model[0]


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 12), (12, 20), (20, 12)])
def test_equals_peft_forward_and_gradients(inputs, outputs):
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(inputs, outputs)
    twin = nn.Linear(inputs, outputs)
    twin.load_state_dict(base.state_dict())
    projections = Projections(RANK, 3, CPU)
    d = nn.Parameter(torch.randn(RANK, generator=generator))
    b = nn.Parameter(torch.randn(outputs, generator=generator))
    ours = VeRALinear(base.requires_grad_(False), projections, d, b)
    theirs, layer = peft_layer(twin)
    layer.vera_A["default"].copy_(projections.down(inputs))
    layer.vera_B["default"].copy_(projections.up(outputs))
    layer.vera_lambda_d["default"].data.copy_(d.detach())
    layer.vera_lambda_b["default"].data.copy_(b.detach())
    xs = [torch.randn(2, 5, inputs, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    weight = torch.randn(2, 5, outputs, generator=generator)
    outs = [module(x.requires_grad_()) for module, x in zip((ours, theirs), xs, strict=True)]
    for out in outs:
        (out * weight).sum().backward()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-5, atol=1e-5)
    for one, other in ((d, layer.vera_lambda_d), (b, layer.vera_lambda_b)):
        torch.testing.assert_close(one.grad, other["default"].grad, rtol=1e-4, atol=1e-4)


def test_starts_as_peft_does(build):
    """The spread of the random matrices, the vectors' first values, and a model left alone."""
    _, layer = peft_layer(nn.Linear(400, 300))
    projections = Projections(RANK, 0, CPU)
    for ours, theirs in (
        (projections.down(400), layer.vera_A["default"]),
        (projections.up(300), layer.vera_B["default"]),
    ):
        assert ours.shape == theirs.shape
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.05)
    model = make_transformer()
    before = run(model, model_inputs(model))
    adapter = injected(model, build)
    trained = adapter.trainable()
    assert torch.equal(run(model, model_inputs(model)), before)
    assert torch.equal(trained["blocks.0.ffn.0.down_scale"], layer.vera_lambda_d["default"])
    assert not trained["blocks.0.ffn.0.up_scale"].any()
    assert trained["blocks.0.ffn.0.up_scale"].shape == (48,)


def test_matrices_come_from_the_seed_and_are_shared_by_all_layers_of_a_width(build):
    models = [make_transformer() for _ in range(3)]
    injected(models[0], build)
    injected(models[1], build, exclude=(r"blocks\.0\..*",))
    injected(models[2], build, projection_seed=1)
    one, other, seeded = (model.blocks[2] for model in models)
    assert (
        one.ffn[0]._down_RI is one.self_attn.q._down_RI is models[0].blocks[0].cross_attn.k._down_RI
    )
    assert torch.equal(one.ffn[0]._up_OR, other.ffn[0]._up_OR)
    assert not torch.equal(one.ffn[0]._up_OR, seeded.ffn[0]._up_OR)
    assert not any("_RI" in name or "_OR" in name for name in models[0].state_dict())


@torch.no_grad()
@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
def test_the_file_is_a_lora_with_the_vectors_in_it(build, tmp_path, layout):
    model, other = make_transformer(), make_transformer()
    adapter = injected(model, build, projection_seed=5)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.trainable().values():
        parameter.data.normal_(std=0.3, generator=generator)
    state = {n: p.detach() for n, p in adapter.trainable().items()}
    path = tmp_path / "v.safetensors"
    adapter.write_output(state, path, layout=layout, dtype=torch.float32, metadata={})
    read = load_adapter(path)
    assert json.loads(read.metadata[VERA_KEY]) == {"projection_seed": 5, "rank": RANK}
    attach(other, read)
    inputs = model_inputs(model)
    changed = run(model, inputs)
    torch.testing.assert_close(run(other, inputs), changed, rtol=1e-5, atol=1e-6)
    adapter.set_strength(0.0)
    assert torch.equal(run(model, inputs), run(make_transformer(), inputs))
    assert adapter.facts == {"projection_seed": 5}
