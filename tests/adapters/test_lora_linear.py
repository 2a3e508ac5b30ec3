from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trainer.adapters.lora_linear import LoRALinear

NUM_IN, NUM_OUT, RANK = 12, 20, 3


def make(seed: int = 0, *, scale: float = 0.5, dropout: float = 0.0, **kw) -> LoRALinear:
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(NUM_IN, NUM_OUT, **kw).requires_grad_(False)
    for parameter in base.parameters():
        nn.init.normal_(parameter, generator=generator)
    down = nn.Parameter(torch.randn(RANK, NUM_IN, generator=generator))
    up = nn.Parameter(torch.randn(NUM_OUT, RANK, generator=generator))
    return LoRALinear(base, down, up, scale, dropout)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, NUM_IN, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft_forward_and_gradients(shape, bias):
    layer = make(bias=bias)
    base = nn.Linear(NUM_IN, NUM_OUT, bias=bias)
    base.load_state_dict(layer.base.state_dict())
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * layer.scale, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    lora = theirs.base_model.model[0]
    lora.lora_A["default"].weight.data.copy_(layer.down)
    lora.lora_B["default"].weight.data.copy_(layer.up)

    x, x_theirs = inputs(*shape), inputs(*shape)
    weight = torch.randn(*shape, NUM_OUT, generator=torch.Generator().manual_seed(9))
    ours_out, theirs_out = layer(x), theirs(x_theirs)
    (ours_out * weight).sum().backward()
    (theirs_out * weight).sum().backward()

    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-6, atol=2e-6)
    for ours, grad in ((layer.down, lora.lora_A), (layer.up, lora.lora_B)):
        torch.testing.assert_close(ours.grad, grad["default"].weight.grad, rtol=1e-5, atol=2e-6)


def test_gradients_are_right_in_float64():
    layer = make().double()
    x = inputs(4).double().detach().requires_grad_()

    def forward(x, down, up):
        return torch.func.functional_call(layer, {"down": down, "up": up}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.down, layer.up))


def test_strength_zero_is_the_base_bit_for_bit():
    layer = make()
    layer.strength = 0.0
    x = inputs(2, 5)
    assert torch.equal(layer(x), F.linear(x, layer.base.weight, layer.base.bias))


def test_checkpointing_changes_nothing():
    results = []
    for use in (False, True):
        layer, x = make(), inputs(2, 5)
        y = checkpoint(layer, x, use_reentrant=False) if use else layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.down.grad, layer.up.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class ProductsWithTheWeight(TorchDispatchMode):
    """Counts products x @ Wᵀ with the base's weight."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        self.count += func is torch.ops.aten.addmm.default and (NUM_IN, NUM_OUT) in shapes
        return func(*args, **(kwargs or {}))


def test_checkpointing_does_not_recompute_the_product_of_the_last_layer():
    class BaseFirst(nn.Module):
        def __init__(self, layer: LoRALinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            out = self.layer.base(x)
            return out + self.layer.scale * F.linear(F.linear(x, self.layer.down), self.layer.up)

    def products(net: nn.Module) -> int:
        with ProductsWithTheWeight() as counter:
            checkpoint(net, inputs(8), use_reentrant=False).square().sum().backward()
        return counter.count

    assert products(make()) == 1
    assert products(BaseFirst(make())) == 2


def test_keeps_no_tensor_of_the_outputs_size_for_backward():
    kept: list[tuple[int, ...]] = []
    layer, x = make(), inputs(7)

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    activations = [shape for shape in kept if shape[0] == 7]
    assert sorted(activations) == [(7, RANK), (7, NUM_IN)]


def test_adds_in_place():
    layer, outputs = make(), []
    layer.base.register_forward_hook(lambda module, args, out: outputs.append(out))
    assert layer(inputs(5)).data_ptr() == outputs[0].data_ptr()


@pytest.mark.parametrize("alias", [torch.Tensor.detach, lambda tensor: tensor.view_as(tensor)])
def test_outputs_that_an_autograd_function_passed_on_are_added_to(alias):
    class PassOn(torch.autograd.Function):  # DeepSpeed's ZeRO-3 does this to every output
        @staticmethod
        def forward(ctx, x):
            return alias(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    results = []
    for hooked in (False, True):
        layer, x = make(), inputs(5)
        if hooked:
            layer.base.register_forward_hook(lambda module, args, out: PassOn.apply(out))
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.down.grad, layer.up.grad))
    for plain, passed_on in zip(*results, strict=True):
        torch.testing.assert_close(plain, passed_on)


def test_computes_in_the_dtype_of_the_model_with_float32_factors():
    layer = make()
    layer.base.bfloat16()
    x = inputs(6).detach().bfloat16().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.down.dtype == layer.down.grad.dtype == torch.float32
    exact = make()(inputs(6))
    assert (y - exact).abs().max() < 0.02 * exact.abs().max()


def test_dropout_acts_on_the_rank_wide_activations_only_while_training():
    layer = make(dropout=0.5)
    x = inputs(400).detach()
    layer.eval()
    assert torch.equal(layer(x), make()(x))
    layer.train()
    torch.manual_seed(0)
    update = layer(x) - layer.base(x)
    low = F.linear(x, layer.down)
    # Solving back gives rank-wide activations that are 0 or doubled.
    solved = torch.linalg.lstsq(layer.up * layer.scale, update.T).solution.T
    ratio = solved / low
    assert ((ratio.abs() < 1e-3) | ((ratio - 2).abs() < 1e-3)).float().mean() > 0.98
    assert 0.4 < (ratio.abs() < 1e-3).float().mean() < 0.6


def test_tensors_keep_the_names_they_had():
    net = nn.Sequential(nn.Linear(NUM_IN, NUM_OUT))
    original = {name: value.clone() for name, value in net.state_dict().items()}
    net[0] = LoRALinear(
        net[0], nn.Parameter(torch.ones(RANK, NUM_IN)), nn.Parameter(torch.ones(NUM_OUT, RANK)), 1.0
    )
    assert set(net.state_dict()) == {"0.weight", "0.bias", "0.down", "0.up"}
    assert net.get_parameter("0.weight") is net[0].base.weight
    net[0] = LoRALinear(net[0], torch.zeros(RANK, NUM_IN), torch.zeros(NUM_OUT, RANK), 1.0)
    assert set(net.state_dict()) == {"0.weight", "0.bias", "0.down", "0.up"}
    changed = {name: value + 1 for name, value in net.state_dict().items()}
    net.load_state_dict(changed)
    assert torch.equal(net.get_parameter("0.weight"), original["0.weight"] + 1)
    assert torch.equal(net[0].base.down, torch.full((RANK, NUM_IN), 2.0))


def test_compiles_into_one_graph():
    results = []
    for compiled in (False, True):
        layer, x = make(), inputs(2, 5)
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.down.grad, layer.up.grad))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused)
