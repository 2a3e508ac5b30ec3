"""Layers of the kinds compile into one graph, and follow what changes from step to step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.adapters.lora_linear import LoRALinear
from trainer.adapters.relora import FrozenPart
from trainer.adapters.singlora import Ramp, SingLoRALinear
from trainer.adapters.vera import Projections, VeRALinear

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
INPUTS, OUTPUTS, RANK = 12, 20, 3


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def trained(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape))


def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)


def compare(layer: nn.Module, compiled) -> None:
    found = []
    for run in (layer, compiled):
        x = draw(2, 5, INPUTS).requires_grad_()
        out = run(x)
        out.square().sum().backward()
        own = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        layer.zero_grad()
        found.append({"out": out.detach(), "x": x.grad, **own})
    assert len(found[0]) > 2
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def compile_layer(layer: nn.Module):
    torch._dynamo.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


def test_singlora_follows_its_ramp_without_being_compiled_again():
    ramp = Ramp(8, CPU)
    layer = SingLoRALinear(base(), trained(OUTPUTS, RANK), 0.5, ramp)
    compiled = compile_layer(layer)
    for step in range(1, 6):
        ramp.after_step(step)
        if step == 3:
            torch._dynamo.config.error_on_recompile = True
        try:
            compare(layer, compiled)
        finally:
            torch._dynamo.config.error_on_recompile = False


def test_vera():
    layer = VeRALinear(base(), Projections(RANK, 0, CPU), trained(RANK), trained(OUTPUTS))
    compare(layer, compile_layer(layer))


def test_relora_follows_what_is_frozen():
    frozen = FrozenPart(base(), torch.zeros(0, INPUTS), torch.zeros(OUTPUTS, 0), 0.5)
    layer = LoRALinear(frozen, trained(RANK, INPUTS), trained(OUTPUTS, RANK), 0.5)
    compiled = compile_layer(layer)
    for cycle in range(5):
        compare(layer, compiled)
        frozen.take(draw(RANK, INPUTS) + cycle, draw(OUTPUTS, RANK), None)
