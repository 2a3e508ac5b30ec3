from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.singlora import Ramp, SingLoRA, SingLoRALinear

from .tiny_models import make_transformer, model_inputs, run

SHAPES = [(12, 12), (12, 20), (20, 12)]


def formula(factor, weight, bias, x, scale, share):
    """W + s · u · A Aᵀ as the paper cuts it for layers that are not square, in float64."""
    outputs, inputs = weight.shape
    a = factor.double()
    square = a @ a.T
    delta = square[:outputs, :inputs]
    return x.double() @ (weight.double() + scale * share * delta).T + bias.double()


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_is_the_papers_formula(inputs, outputs, share):
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(inputs, outputs).requires_grad_(False)
    ramp = Ramp(8, torch.device("cpu"))
    ramp.after_step(int(8 * share))
    factor = nn.Parameter(torch.randn(max(inputs, outputs), 3, generator=generator))
    layer = SingLoRALinear(base, factor, 0.5, ramp)
    x = torch.randn(2, 5, inputs, generator=generator, requires_grad=True)
    ours = layer(x)
    theirs = formula(factor, base.weight, base.bias, x, 0.5, share)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn(ours.shape, generator=generator)
    for out in (ours, theirs):
        (out * weight).sum().backward()
        found = factor.grad.clone(), x.grad.clone()
        factor.grad = x.grad = None
        if out is ours:
            mine = found
    for one, other in zip(mine, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_ramp_is_a_function_of_the_step():
    ramp = Ramp(4, torch.device("cpu"))
    seen = [ramp.value]
    for step in range(1, 7):
        ramp.after_step(step)
        seen.append(ramp.share.item())
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    resumed = Ramp(4, torch.device("cpu"))
    ramp.after_step(3)
    resumed.load_state_dict(ramp.state_dict())
    assert (resumed.value, resumed.share.item(), resumed.step) == (0.75, 0.75, 3)
    assert Ramp(0, torch.device("cpu")).value == 1.0


@torch.no_grad()
@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_the_file_is_the_adapter_at_its_step(build, tmp_path, layout, step):
    model, other = make_transformer(), make_transformer()
    inputs = model_inputs(model)
    base = run(model, inputs)
    adapter = SingLoRA(SingLoRA.Config(rank=4, alpha=8.0, ramp_steps=9), build)
    adapter.inject(model, 0)
    assert torch.equal(run(model, inputs), base)  # u = 0
    (ramp,) = adapter.techniques()
    ramp.after_step(step)
    for parameter in adapter.trainable().values():
        parameter.data.mul_(2)
    state = {n: p.detach() for n, p in adapter.trainable().items()}
    path = tmp_path / "s.safetensors"
    adapter.write_output(state, path, layout=layout, dtype=torch.float32, metadata={})
    attach(other, load_adapter(path))
    torch.testing.assert_close(run(other, inputs), run(model, inputs), rtol=1e-5, atol=1e-6)
    assert torch.allclose(run(model, inputs), base, atol=1e-3) == (step == 0)


def test_a_layer_has_one_factor_as_long_as_its_longer_side(build):
    model = make_transformer()
    adapter = SingLoRA(SingLoRA.Config(rank=4), build)
    adapter.inject(model, 7)
    shapes = {n: tuple(p.shape) for n, p in adapter.trainable().items()}
    assert shapes["blocks.0.ffn.0.factor"] == shapes["blocks.0.ffn.2.factor"] == (48, 4)
    assert shapes["blocks.2.self_attn.q.factor"] == (24, 4)
    values = adapter.trainable()["blocks.0.ffn.0.factor"]
    assert values.abs().max() <= 48**-0.5
    assert adapter.facts == {"scale (alpha / rank)": 1.0, "ramp_steps": 1000}
