"""Attention backends against torch's own.

The packages are not here: stand-ins take their place in `sys.modules`, with the documented
signatures and layouts, insist on them, and compute with torch.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.attention.base import find_obstacle
from trainer.attention.flex import FlexAttention
from trainer.attention.sdpa import TorchAttention
from trainer.contract.catalog import ATTENTION
from trainer.contract.variants import TransformerConfig
from trainer.models.wan.transformer import WanTransformer

B, L, N, K = 2, 24, 4, 16
CPU = torch.device("cpu")


def draw(keys: int = L, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    sizes = (L, keys, keys)
    return [torch.randn(B, size, N, K, generator=random).to(dtype) for size in sizes]


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, N, K) as the packages take it, computed in float64."""
    turned = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*turned).transpose(1, 2).to(q.dtype)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Insist on what the kernels take: (B, L, N, K) half precision, last axis contiguous."""
    for tensor in (q, k, v):
        assert tensor.dim() == 4
        assert tensor.shape[::2] == q.shape[::2]
        assert tensor.shape[3] == q.shape[3]
        assert tensor.dtype == q.dtype
        assert tensor.dtype in {torch.bfloat16, torch.float16}
        assert tensor.stride(-1) == 1
    assert k.shape == v.shape


class Calls(list[dict[str, Any]]):
    """What a stand-in was called with."""


def flash2(calls: Calls) -> dict[str, ModuleType]:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        check(q, k, v)
        assert not causal
        calls.append({"shape": q.shape})
        return by_torch(q, k, v)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    return {"flash_attn": module}


def flash3(calls: Calls, *, with_lse: bool) -> dict[str, ModuleType]:
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **rest):
        check(q, k, v)
        assert not causal
        calls.append({"shape": q.shape})
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
        return (by_torch(q, k, v), lse) if with_lse else by_torch(q, k, v)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    return {"flash_attn_interface": module}


def xformers(calls: Calls) -> dict[str, ModuleType]:
    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        check(query, key, value)
        assert attn_bias is None
        calls.append({"shape": query.shape})
        return by_torch(query, key, value)

    package, operators = ModuleType("xformers"), ModuleType("xformers.ops")
    operators.memory_efficient_attention = memory_efficient_attention
    package.ops = operators
    return {"xformers": package, "xformers.ops": operators}


def sage(calls: Calls) -> dict[str, ModuleType]:
    def sageattn(
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **rest
    ):
        assert tensor_layout in {"HND", "NHD"}
        if tensor_layout == "HND":
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        check(q, k, v)
        assert not is_causal
        calls.append({"shape": q.shape})
        out = by_torch(q.detach(), k.detach(), v.detach())
        return out if tensor_layout == "NHD" else out.transpose(1, 2)

    module = ModuleType("sageattention")
    module.sageattn = sageattn
    return {"sageattention": module}


STAND_INS = {
    "flash2": flash2,
    "flash3": lambda calls: flash3(calls, with_lse=False),
    "flash3-with-lse": lambda calls: flash3(calls, with_lse=True),
    "xformers": xformers,
    "sage": sage,
}
PACKAGES = {
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "xformers": "xformers",
    "sage": "sageattention",
}


@pytest.fixture(params=STAND_INS)
def backend(request, monkeypatch):
    calls = Calls()
    for name, module in STAND_INS[request.param](calls).items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    made = ATTENTION.load(request.param.removesuffix("-with-lse"))()
    return made, calls, request.param


@pytest.mark.parametrize("keys", [L, 7])
def test_a_package_gets_its_layout_and_gives_ours(backend, keys):
    attend, calls, _ = backend
    q, k, v = draw(keys)
    found = attend(q, k, v)
    assert calls == [{"shape": (B, L, N, K)}]
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    torch.testing.assert_close(found, TorchAttention()(q, k, v), rtol=2**-6, atol=2**-7)


def test_a_bias_is_computed_by_torch(backend):
    attend, calls, _ = backend
    q, k, v = draw(7)
    bias = torch.randn(B, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attend(q, k, v, bias), TorchAttention()(q, k, v, bias))
    assert calls == []


def test_gradients_pass_where_the_package_trains(backend):
    attend, _, name = backend
    results = []
    for run in (attend, TorchAttention()):
        given = [tensor.float().requires_grad_() for tensor in draw()]
        out = run(*(tensor.bfloat16() for tensor in given))
        if name == "sage":
            assert not out.requires_grad or run is not attend
            continue
        out.float().square().sum().backward()
        results.append([tensor.grad for tensor in given])
    for ours, theirs in zip(*results, strict=True) if results else ():
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_the_model_uses_it_for_video_tokens_and_torch_for_text(backend):
    attend, calls, _ = backend
    config = TransformerConfig(
        dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=16
    )
    model = WanTransformer(config, seed=0).bfloat16().requires_grad_(False)
    model.head.head.weight.normal_(std=0.1)
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 4, 4, generator=random)
    context = [torch.randn(5, 24, generator=random)]
    expected = model(latents, torch.tensor([500.0]), context)
    model.attend = attend
    found = model(latents, torch.tensor([500.0]), context)
    assert [call["shape"] for call in calls] == [(1, 12, 2, 16)] * 2
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [L, 7])
def test_flex_is_attention_with_and_without_bias(dtype, keys):
    q, k, v = draw(keys, dtype)
    bias = torch.randn(B, keys, generator=torch.Generator().manual_seed(1))
    bias[0, -1] = float("-inf")
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for given in (None, bias.to(dtype)):
        with torch.no_grad():
            found = FlexAttention()(q, k, v, given)
        torch.testing.assert_close(found, TorchAttention()(q, k, v, given), **close)
        assert found.dtype == dtype


def test_torch_has_no_obstacle():
    for trains in (True, False):
        assert find_obstacle(TorchAttention.needs, CPU, torch.float32, trains=trains) is None
    assert find_obstacle(FlexAttention.needs, CPU, torch.float32, trains=False) is None
    obstacle = find_obstacle(FlexAttention.needs, CPU, torch.float32, trains=True)
    assert "no backward on a CPU" in obstacle.message


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    obstacle = find_obstacle(
        ATTENTION.load(name).needs, torch.device("cuda"), torch.bfloat16, trains=False
    )
    assert PACKAGES[name] in obstacle.message
    assert "pip install" in obstacle.hint or "hopper" in obstacle.hint


@pytest.mark.parametrize("name", PACKAGES)
def test_what_the_machine_lacks_is_said(name, monkeypatch):
    needs = ATTENTION.load(name).needs
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object())
    bf16 = torch.bfloat16
    assert "NVIDIA GPU" in find_obstacle(needs, CPU, bf16, trains=False).message
    cuda = torch.device("cuda", 0)
    for capability in ((6, 1), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        obstacle = find_obstacle(needs, cuda, bf16, trains=False)
        assert (obstacle is None) == (capability == (9, 0))
    obstacle = find_obstacle(needs, cuda, torch.float32, trains=False)
    if name == "xformers":
        assert obstacle is None
    else:
        assert "float32" in obstacle.message
    obstacle = find_obstacle(needs, cuda, bf16, trains=True)
    assert (obstacle is not None) == (name == "sage")
    if obstacle is not None:
        assert "sampling only" in obstacle.message


def test_every_name_says_what_it_needs():
    for entry in ATTENTION:
        needs = ATTENTION.load(entry.name).needs
        assert bool(needs.module) == bool(needs.install) == (entry.name not in {"sdpa", "flex"})
