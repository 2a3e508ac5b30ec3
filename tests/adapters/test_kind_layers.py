"""The layers of LoHa, LoKr and DoRA against the formed weight, PEFT, fp8, compile, stacking."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.adapters.dora_linear import DoRALinear, squared_rows
from trainer.adapters.loha_linear import LoHaFactors
from trainer.adapters.lokr_linear import lokr_factors
from trainer.contract.kronecker import lokr_shapes, split_width
from trainer.quant.fp8 import Fp8Spec, quantise
from trainer.quant.linear import Fp8Linear

from .kinds import KINDS, changed, make_update

INPUTS, OUTPUTS = 12, 30


def base_layer(dtype=torch.float32, *, bias=True, seed=0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return base


def inputs(*shape, dtype=torch.float32):
    drawn = torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(3))
    return drawn.to(dtype).requires_grad_()


def trained(update, base):
    """The layer of an update with every tensor a parameter, as training has it."""
    layer = update.beside(base, base.weight.dtype, torch.device("cpu"))
    for name in update.tensors():
        tensor = getattr(layer, name)
        del layer._buffers[name]
        layer.hold(name, nn.Parameter(tensor.clone()))
    return layer


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_formed_weight(kind, bias, strength):
    base = base_layer(torch.float64, bias=bias)
    update = make_update(kind, OUTPUTS, INPUTS, dtype=torch.float64)
    layer = trained(update, base).double()
    layer.strength = strength
    x, x_formed = inputs(2, 5, dtype=torch.float64), inputs(2, 5, dtype=torch.float64)
    leaves = {n: t.detach().double().requires_grad_() for n, t in update.tensors().items()}
    formed = update.with_tensors(leaves)
    weight = changed(formed, base.weight, strength)
    if kind == "dora":  # the paper's constant
        low = formed.scale * leaves["up"] @ leaves["down"]
        lengths = (base.weight + low).detach().norm(dim=1, keepdim=True)
        whole = leaves["magnitude"][:, None] * (base.weight + low) / lengths
        weight = base.weight + strength * (whole - base.weight)
    wanted = F.linear(x_formed, weight, base.bias)
    direction = torch.randn(2, 5, OUTPUTS, generator=torch.Generator().manual_seed(4)).double()
    found = layer(x)
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(x.grad, x_formed.grad)
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(layer, name).grad, leaf.grad, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_base_bit_for_bit(kind):
    base = base_layer()
    layer = make_update(kind, OUTPUTS, INPUTS).beside(base, torch.float32, torch.device("cpu"))
    layer.strength = 0.0
    x = inputs(2, 5)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_checkpointing_and_views_change_nothing(kind):
    class PassOn(torch.autograd.Function):  # DeepSpeed's ZeRO-3 does this to every output
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    results = []
    for way in ("plain", "checkpoint", "hooked"):
        base = base_layer()
        layer, x = trained(make_update(kind, OUTPUTS, INPUTS), base), inputs(2, 5)
        if way == "hooked":
            base.register_forward_hook(lambda module, args, out: PassOn.apply(out))
        y = checkpoint(layer, x, use_reentrant=False) if way == "checkpoint" else layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters(recurse=False))])
    for plain, again, hooked in zip(*results, strict=True):
        assert torch.equal(plain, again)
        torch.testing.assert_close(plain, hooked)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr cut twice", "dora"])
def test_compiles_into_one_graph(kind):
    results = []
    for compiled in (False, True):
        layer, x = trained(make_update(kind, OUTPUTS, INPUTS), base_layer()), inputs(2, 5)
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters(recurse=False))])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused)


@pytest.mark.parametrize("known", [True, False])
def test_a_dora_on_an_adapter_compiles(known):
    results = []
    for compiled in (False, True):
        inner = make_update("lora", OUTPUTS, INPUTS, seed=4)
        below = inner.beside(base_layer(), torch.float32, torch.device("cpu"))
        layer, x = trained(make_update("dora", OUTPUTS, INPUTS), below), inputs(2, 5)
        if not known:  # as on a block that was streamed when the DoRA was put on it
            layer.base_squares = None
        call = torch.compile(layer, backend="aot_eager", fullgraph=known) if compiled else layer
        call(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters(recurse=False))])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_keeps_the_input_small_tensors_and_at_most_its_own_output(kind):
    kept = []
    layer, x = trained(make_update(kind, OUTPUTS, INPUTS), base_layer()), inputs(7)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    memory = {tensor.data_ptr() for tensor in kept if tensor.dim() == 2 and len(tensor) == 7}
    expected = {x.data_ptr()}
    if kind == "dora":
        low = {tensor.data_ptr() for tensor in kept if tuple(tensor.shape) == (7, 3)}
        expected |= {y.data_ptr(), *low}
    assert memory == expected
    assert not any(tensor.numel() == OUTPUTS * INPUTS for tensor in kept if tensor.dim() == 2
                   and tensor.data_ptr() != layer.base.weight.data_ptr())  # fmt: skip


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_computes_in_bf16_beside_float32_tensors(kind):
    update = make_update(kind, OUTPUTS, INPUTS)
    exact = trained(update, base_layer())
    layer = trained(update, base_layer())
    layer.base.bfloat16()
    x = inputs(64).detach()
    rounded = x.bfloat16().requires_grad_()
    exact(x).square().sum().backward()
    y = layer(rounded)
    y.float().square().sum().backward()
    assert y.dtype == rounded.grad.dtype == torch.bfloat16
    assert (y - exact(x)).abs().max() < 0.03 * y.abs().max()
    for name in update.tensors():
        ours, theirs = getattr(layer, name).grad, getattr(exact, name).grad
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
@pytest.mark.parametrize("scaled", [True, False])
def test_on_an_fp8_base_it_acts_on_the_dequantised_weight(kind, scaled):
    base = base_layer()
    fp8 = Fp8Linear(quantise(base.weight, Fp8Spec(scaled=scaled)), base.bias)
    update = make_update(kind, OUTPUTS, INPUTS)
    layer = update.beside(fp8, torch.float32, torch.device("cpu"))
    x = inputs(9).detach()
    wanted = F.linear(x.double(), changed(update, fp8.dequantised()), base.bias.double())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_one_on_another_equals_one_merged_after_the_other(first, second):
    base, x = base_layer(), inputs(6).detach()
    one, two = make_update(first, OUTPUTS, INPUTS), make_update(second, OUTPUTS, INPUTS, seed=5)
    cpu = torch.device("cpu")
    inner = one.beside(base, torch.float32, cpu)
    outer = two.beside(inner, torch.float32, cpu)
    for strengths in ((1.0, 1.0), (0.5, 0.7), (0.0, 1.0)):
        inner.strength, outer.strength = strengths
        weight = changed(one, base.weight, strengths[0])
        weight = changed(two, weight, strengths[1])
        wanted = F.linear(x.double(), weight, base.bias.double())
        torch.testing.assert_close(outer(x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_dora_follows_what_trains_below_it():
    base, x = base_layer(), inputs(6).detach()
    inner_update = make_update("lora", OUTPUTS, INPUTS)
    inner = trained(inner_update, base)
    update = make_update("dora", OUTPUTS, INPUTS, seed=2)
    layer = update.beside(inner, torch.float32, torch.device("cpu"))
    layer(x)
    inner.up.data += 1.0
    moved = inner_update.with_tensors({"down": inner.down.detach(), "up": inner.up.detach()})
    weight = changed(update, changed(moved, base.weight))
    torch.testing.assert_close(
        layer(x).double(), F.linear(x.double(), weight, base.bias.double()), rtol=1e-4, atol=1e-4
    )


def test_dora_starts_as_the_base_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        base = base_layer(dtype)
        squares = squared_rows(base)
        layer = DoRALinear(
            base,
            nn.Parameter(torch.randn(3, INPUTS)),
            nn.Parameter(torch.zeros(OUTPUTS, 3)),
            nn.Parameter(squares.sqrt()),
            0.5,
            squares,
        )
        x = inputs(8, dtype=dtype)
        assert torch.equal(layer(x), base(x))


def test_a_row_without_length_stays_finite():
    base = base_layer()
    base.weight.data[3] = 0
    squares = squared_rows(base)
    layer = DoRALinear(
        base,
        nn.Parameter(torch.randn(3, INPUTS)),
        nn.Parameter(torch.zeros(OUTPUTS, 3)),
        nn.Parameter(squares.sqrt()),
        1.0,
        squares,
    )
    y = layer(inputs(8))
    y.square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters(recurse=False))


def peft_layer(config, base):
    net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    net[0].load_state_dict(base.state_dict())
    return peft.get_peft_model(net, config).base_model.model[0]


@pytest.mark.parametrize("rank", [2, 3])
def test_loha_equals_peft(rank):
    base = base_layer()
    config = peft.LoHaConfig(r=rank, alpha=5, target_modules=["0"], init_weights=False)
    theirs = peft_layer(config, base)
    parts = [
        getattr(theirs, f"hada_{name}")["default"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    ]
    for part in parts:
        nn.init.normal_(part, std=0.5, generator=torch.Generator().manual_seed(part.numel()))
    update = LoHaFactors(*(part.detach().clone() for part in parts), 5.0)
    torch.testing.assert_close(update.delta(), theirs.get_delta_weight("default").detach())
    layer, x, x_theirs = trained(update, base), inputs(4), inputs(4)
    layer(x).square().sum().backward()
    theirs(x_theirs).square().sum().backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-5, atol=1e-5)
    for name, part in zip(update.tensors(), parts, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, part.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "options"),
    [(1, {}), (1, {"decompose_both": True}), (2, {"decompose_factor": 2}), (8, {})],
)
def test_lokr_equals_peft_in_shapes_and_effect(rank, options):
    base = base_layer()
    config = peft.LoKrConfig(
        r=rank, alpha=rank, target_modules=["0"], init_weights=False, **options
    )
    theirs = peft_layer(config, base)
    shapes = lokr_shapes(
        INPUTS,
        OUTPUTS,
        rank,
        factor=options.get("decompose_factor"),
        decompose_both=options.get("decompose_both", False),
    )
    parts = {name: getattr(theirs, f"lokr_{name}")["default"] for name in shapes}
    assert {name: tuple(part.shape) for name, part in parts.items()} == shapes
    for name, part in parts.items():
        seed = torch.Generator().manual_seed(sum(map(ord, name)))
        nn.init.normal_(part, std=0.5, generator=seed)
    copies = {name: part.detach().clone() for name, part in parts.items()}
    update = lokr_factors(copies, lokr_factors(copies, 1.0).rank)
    torch.testing.assert_close(update.delta(), theirs.get_delta_weight("default").detach())
    assert update.norm() == pytest.approx(update.delta().norm().item(), rel=1e-5)
    layer, x, x_theirs = trained(update, base), inputs(4), inputs(4)
    layer(x).square().sum().backward()
    theirs(x_theirs).square().sum().backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-5, atol=1e-5)
    for name, part in parts.items():
        torch.testing.assert_close(getattr(layer, name).grad, part.grad, rtol=1e-5, atol=1e-4)


def test_dora_equals_peft():
    base = base_layer()
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["0"])
    theirs = peft_layer(config, base)
    update = make_update("dora", OUTPUTS, INPUTS, alpha=5.0)
    magnitude = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), squared_rows(base).sqrt())
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    for part, own in zip((down, up, magnitude), update.tensors().values(), strict=True):
        part.data.copy_(own)
    layer, x, x_theirs = trained(update, base), inputs(4), inputs(4)
    y, y_theirs = layer(x), theirs(x_theirs)
    torch.testing.assert_close(y, y_theirs, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    y_theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-4, atol=1e-4)
    for name, part in (("down", down), ("up", up), ("magnitude", magnitude)):
        torch.testing.assert_close(getattr(layer, name).grad, part.grad, rtol=1e-4, atol=1e-3)
    theirs.merge()
    torch.testing.assert_close(update.added_to(base.weight), theirs.base_layer.weight.data)


@pytest.mark.parametrize("kind", KINDS)
def test_added_folded_and_norm_agree(kind):
    update = make_update(kind, OUTPUTS, INPUTS)
    weight = base_layer().weight
    for strength in (1.0, 0.3, -1.0):
        found = update.added_to(weight, strength).double()
        torch.testing.assert_close(found, changed(update, weight, strength), rtol=1e-5, atol=1e-5)
    folded = update.folded()
    assert folded.scale == 1.0
    torch.testing.assert_close(folded.added_to(weight), update.added_to(weight))
    assert update.shape == folded.shape == (OUTPUTS, INPUTS)
    if kind == "dora":
        with pytest.raises(Exception, match="depends on the weight"):
            update.delta()
    else:
        assert update.norm() == pytest.approx(update.delta().norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("width", "factor", "parts"),
    [
        (5120, None, (64, 80)),
        (13824, None, (108, 128)),
        (1536, None, (32, 48)),
        (8960, None, (80, 112)),
        (5120, 8, (8, 640)),
        (127, None, (1, 127)),
        (127, 16, (1, 127)),
        (250, 8, (5, 50)),
        (360, 16, (15, 24)),
        (20, 5, (4, 5)),
    ],
)
def test_widths_are_cut_near_the_factor_or_the_square_root(width, factor, parts):
    assert split_width(width, factor) == parts


def test_widths_are_cut_as_in_peft():
    from peft.tuners.lokr.layer import factorization

    for width in range(1, 400):
        for factor in (None, 2, 3, 8, 16):
            theirs = factorization(width, -1 if factor is None else factor)
            assert split_width(width, factor) == tuple(sorted(theirs))
