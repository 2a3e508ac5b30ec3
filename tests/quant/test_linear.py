"""The fp8 layer against a float layer with the dequantised weight; fp8 products against floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.adapters.lora_linear import LoRALinear
from trainer.quant import products as products_module
from trainer.quant.fp8 import Fp8Spec, QuantisedWeight, quantise
from trainer.quant.linear import Fp8Linear
from trainer.quant.products import Fp8Products, fp8_products_problem

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
IN, OUT = 128, 48
"""Input and output width."""


def random(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(spec: Fp8Spec, bias: bool = True, products=None) -> Fp8Linear:
    weight = quantise(random(OUT, IN, std=0.05), spec)
    bias_O = nn.Parameter(random(OUT, seed=1), requires_grad=False) if bias else None
    return Fp8Linear(weight, bias_O, products)


def reference(layer: Fp8Linear, dtype: torch.dtype = torch.float64) -> nn.Linear:
    twin = nn.Linear(IN, OUT, bias=layer.bias is not None, dtype=dtype)
    scale = layer.weight_scale
    factor = 1.0 if scale is None else scale.double().repeat_interleave(IN // scale.shape[1], 1)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.double() * factor)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin.requires_grad_(False)


SPECS = {
    "blocks": Fp8Spec(scaled=True),
    "rows": Fp8Spec(scaled=True, matmul=True),
    "plain": Fp8Spec(scaled=False),
    "e5m2": Fp8Spec(scaled=True, dtype=E5M2),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)])
def test_output_and_gradient_are_those_of_the_dequantised_weight(name, bias, shape):
    layer = make_layer(SPECS[name], bias)
    twin = reference(layer)
    x = random(*shape, seed=2).requires_grad_()
    twin_x = x.detach().double().requires_grad_()
    out, twin_out = layer(x), twin(twin_x)
    assert (out.shape, out.dtype) == (twin_out.shape, torch.float32)
    torch.testing.assert_close(out.double(), twin_out, rtol=1e-5, atol=1e-6)
    grad = random(*out.shape, seed=3)
    out.backward(grad)
    twin_out.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), twin_x.grad, rtol=1e-5, atol=1e-6)


def test_state_has_the_names_of_a_linear_layer_and_the_scale():
    layer = make_layer(SPECS["blocks"])
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    assert set(make_layer(SPECS["plain"]).state_dict()) == {"weight", "bias"}
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_trained_bias_gets_its_gradient():
    layer = make_layer(SPECS["blocks"])
    layer.bias.requires_grad_()
    layer(random(7, IN)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 7.0))


def test_nothing_of_the_weight_s_size_is_kept_in_floats_for_the_backward():
    layer = make_layer(SPECS["blocks"])
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = random(3, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    large = [tensor for tensor in kept if tensor.numel() >= OUT * IN]
    assert [tensor.dtype for tensor in large] == [E4M3]
    assert large[0].data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("name", SPECS)
def test_numbers_held_as_bytes_are_the_same_numbers(name):
    layer, twin = make_layer(SPECS[name]), make_layer(SPECS[name])
    twin.hold_bytes()
    twin.hold_bytes()  # again changes nothing
    assert (twin.weight.dtype, twin.weight.requires_grad) == (torch.uint8, False)
    assert torch.equal(twin.dequantised(), layer.dequantised())
    assert repr(twin) == repr(layer)
    for rows in (1, 7):
        outs, grads = [], []
        for one in (layer, twin):
            x = random(rows, IN).requires_grad_()
            out = one(x)
            out.square().sum().backward()
            outs.append(out.detach())
            grads.append(x.grad)
        assert torch.equal(*outs)
        assert torch.equal(*grads)


def test_bytes_may_be_away_between_forward_and_backward():
    layer = make_layer(SPECS["blocks"])
    layer.hold_bytes()
    gradients = []
    for away in (False, True):
        x = random(5, IN).requires_grad_()
        out = layer(x)
        here = layer.weight.data
        if away:  # as ZeRO-3 does it
            layer.weight.data = torch.empty(0, dtype=torch.uint8)
            with pytest.raises(RuntimeError):
                out.sum().backward(retain_graph=True)
            layer.weight.data = here.clone()
        out.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["blocks", "rows"])
def test_checkpointing_gives_the_same_bits_and_skips_the_last_product(name, monkeypatch):
    layer = make_layer(SPECS[name])
    lora = LoRALinear(layer, nn.Parameter(random(4, IN)), nn.Parameter(random(OUT, 4)), 1.0)
    x = random(6, IN, seed=2).requires_grad_()
    calls = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(a[1].shape) or plain(*a))

    def gradients(run) -> list[Tensor]:
        for value in (x, lora.down, lora.up):
            value.grad = None
        run(x).square().sum().backward()
        return [value.grad.clone() for value in (x, lora.down, lora.up)]

    whole = gradients(lambda value: lora(value).sin())
    calls.clear()
    recomputed = gradients(lambda value: checkpoint(lora, value, use_reentrant=False).sin())
    for ours, theirs in zip(recomputed, whole, strict=True):
        assert torch.equal(ours, theirs)
    assert calls.count((OUT, IN)) == 1, "the product was computed again for nothing"


def test_lora_on_fp8_learns_as_on_the_dequantised_weight():
    layer = make_layer(SPECS["blocks"])
    twin = reference(layer, torch.float32)
    x = random(9, IN, seed=5)
    results = []
    for base in (layer, twin):
        lora = LoRALinear(base, nn.Parameter(random(4, IN)), nn.Parameter(random(OUT, 4)), 0.5)
        out = lora(x)
        out.square().mean().backward()
        results.append((out, lora.down.grad, lora.up.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def emulated_rounding(x: Tensor) -> Tensor:
    """Round each row to e4m3 on a scale of its own: a second implementation, in float64."""
    exponent = torch.floor(torch.log2(448 / x.abs().amax(1, keepdim=True)))
    return (x * 2**exponent).to(torch.float32).to(E4M3).double() / 2**exponent


@pytest.mark.parametrize("name", ["rows", "plain"])
def test_fp8_products_are_float_products_of_rounded_factors(name):
    layer = make_layer(SPECS[name], products=Fp8Products())
    twin = reference(layer)
    x = random(16, IN, seed=2).bfloat16().requires_grad_()
    layer.bias.data = layer.bias.data.bfloat16()
    with torch.no_grad():
        twin.bias.copy_(layer.bias)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = twin(emulated_rounding(x.detach().double()))
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=1e-3)
    grad = random(16, OUT, seed=3).bfloat16()
    out.backward(grad)
    scale = torch.ones(OUT, 1) if layer.weight_scale is None else layer.weight_scale
    folded = (grad * scale.view(1, -1).bfloat16()).double()
    values = layer.weight.double()
    torch.testing.assert_close(
        x.grad.double(), emulated_rounding(folded) @ values, rtol=2**-7, atol=1e-4
    )


def test_fp8_products_are_close_to_the_unrounded_ones():
    layer = make_layer(SPECS["rows"], products=Fp8Products())
    twin = reference(layer)
    x = random(64, IN, seed=2).bfloat16().requires_grad_()
    layer.bias.data = layer.bias.data.bfloat16()
    twin_x = x.detach().double().requires_grad_()
    grad = random(64, OUT, seed=3).bfloat16()
    out, twin_out = layer(x), twin(twin_x)
    out.backward(grad)
    twin_out.backward(grad.double())
    # Each factor's element is off by 2.4 % (test_fp8); a sum of many such products by as much.
    for ours, theirs in ((out, twin_out), (x.grad, twin_x.grad)):
        error = float((ours.double() - theirs).detach().norm() / theirs.detach().norm())
        assert 0.005 < error < 0.0361


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e4, 1e20])
def test_rows_of_any_size_are_rounded_alike(scale):
    layer = make_layer(SPECS["rows"], bias=False, products=Fp8Products())
    x = random(4, IN).bfloat16()
    factor = 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    small = layer(x * factor)
    if scale >= 1e-12:
        torch.testing.assert_close(small, layer(x) * factor, rtol=2**-7, atol=0)
    assert bool(torch.isfinite(small).all())


@pytest.mark.parametrize("name", ["blocks", "rows"])
def test_any_order_of_memory_will_do(name):
    products = Fp8Products() if name == "rows" else None
    layer = make_layer(SPECS[name], bias=False, products=products)
    straight = random(16, IN, seed=2).bfloat16()
    results = []
    for x, turn in ((straight, False), (straight.t().contiguous().t(), True)):
        given = x.detach().requires_grad_()
        out = layer(given)
        grad = random(16, OUT, seed=3).bfloat16()
        out.backward(grad.t().contiguous().t() if turn else grad)
        results.append((out, given.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)
    given = straight.detach().requires_grad_()
    layer(given).sum().backward()  # a gradient that is one number, expanded
    assert bool(torch.isfinite(given.grad).all())


def test_zero_rows_give_the_bias_and_bad_rows_stay_bad():
    layer = make_layer(SPECS["rows"], products=Fp8Products())
    layer.bias.data = layer.bias.data.bfloat16()
    x = random(3, IN).bfloat16()
    x[0] = 0
    x[1, 3] = float("nan")
    out = layer(x)
    assert torch.equal(out[0], layer.bias)
    assert not bool(torch.isfinite(out[1]).any())
    assert bool(torch.isfinite(out[2]).all())


def test_a_cpu_is_asked_by_multiplying(monkeypatch):
    assert fp8_products_problem(torch.device("cpu")) is None

    def no_kernel(*args, **kwargs):
        raise NotImplementedError("no kernel\nmore")

    monkeypatch.setattr(products_module.torch, "_scaled_mm", no_kernel)
    reason = fp8_products_problem(torch.device("cpu"))
    assert reason.endswith("cannot multiply fp8 on cpu: no kernel")


@pytest.mark.parametrize(("capability", "fine"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_is_judged_by_its_compute_capability(monkeypatch, capability, fine):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    reason = fp8_products_problem(torch.device("cuda", 0))
    assert (reason is None) == fine
    if not fine:
        assert "8.6" in reason
        assert "8.9" in reason


def test_file_scales_are_used_as_they_are():
    values = random(OUT, IN, std=40).clamp(-448, 448).to(E4M3)
    for scale in (torch.tensor([[0.003]]), random(OUT, 1, seed=4).abs()):
        layer = Fp8Linear(QuantisedWeight(values, scale), None)
        expected = values.double() * scale.double()
        torch.testing.assert_close(layer.dequantised().double(), expected, rtol=1e-6, atol=0)
        assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("matmul", [False, True])
def test_a_compiled_layer_is_one_graph_with_the_same_bits(matmul):
    layer = make_layer(SPECS["rows"], products=Fp8Products() if matmul else None)
    layer.bias.data = layer.bias.data.bfloat16()
    lora = LoRALinear(layer, nn.Parameter(random(4, IN)), nn.Parameter(random(OUT, 4)), 0.5)
    results = []
    for run in (lora, torch.compile(lora, backend="aot_eager", fullgraph=True)):
        x = random(8, IN, seed=3).bfloat16().requires_grad_()
        out = run(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        results.append((out, gradient))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
