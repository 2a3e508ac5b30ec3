"""The local engine against a loop written by hand in plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.engine.toy import AdamWFactory, FullStep, LoraStep, batches_of_step, make_batch
from trainer.contract.errors import NonFiniteError
from trainer.core.seams import Engine
from trainer.engine.local import LocalEngine

LR = 1e-2


def make_engine(module, **options):
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1, "device": "cpu"} | options
    return LocalEngine(module, module.trainable(), AdamWFactory(), **options)


def plain_loop(module, steps, accumulation, max_norm, scaled=()):
    named = module.trainable()
    groups = [
        {
            "params": [p for n, p in named.items() if (n in scaled) == on],
            "lr": LR * (4 if on else 1),
        }
        for on in (False, True)
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.1)
    means, norms = [], []
    for step in range(steps):
        total = 0.0
        for batch in batches_of_step(step, 0, 1, accumulation):
            terms = module(batch)
            (sum(terms.values()) / accumulation).backward()
            total += terms["loss"].item()
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), max_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        means.append(total / accumulation)
        norms.append(float(norm))
    return means, norms


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_a_hand_written_loop_bit_for_bit(accumulation, max_norm, dtype):
    plain = LoraStep(dtype)
    scaled = {name for name in plain.trainable() if name.endswith("up")}
    losses, norms = plain_loop(plain, 6, accumulation, max_norm, scaled)

    module = LoraStep(dtype)
    engine = make_engine(
        module,
        max_grad_norm=max_norm,
        gradient_accumulation_steps=accumulation,
        lr_scales=dict.fromkeys(scaled, 4.0),
    )
    assert isinstance(engine, Engine)
    for step in range(6):
        terms = engine.forward_backward(batches_of_step(step, 0, 1, accumulation))
        result = engine.update(LR)
        assert terms["loss"] == losses[step]
        assert result.grad_norm == norms[step]
        assert (result.terms, result.lr) == (terms, LR)
    for name, parameter in plain.trainable().items():
        assert torch.equal(engine.full_parameters()[name], parameter), name


def test_low_precision_weights_are_trained_through_float32_masters():
    module, reference = FullStep(torch.bfloat16), FullStep(torch.bfloat16)
    engine = make_engine(module, gradient_accumulation_steps=2)
    masters = {n: p.detach().float().clone() for n, p in reference.trainable().items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=LR, weight_decay=0.1)
    for step in range(5):
        engine.forward_backward(batches_of_step(step, 0, 1, 2))
        engine.update(LR)
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for batch in batches_of_step(step, 0, 1, 2):
            reference.zero_grad()
            (reference(batch)["loss"] / 2).backward()
            for name, parameter in reference.named_parameters():
                masters[name].grad += parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.copy_(masters[name])
    saved = engine.full_parameters()
    for name, master in masters.items():
        assert torch.equal(saved[name], master)
        assert torch.equal(module.get_parameter(name), master.bfloat16())
    assert not torch.equal(saved["layers.0.weight"], saved["layers.0.weight"].bfloat16().float())


def test_batches_are_taken_one_at_a_time():
    events = []
    module = LoraStep()
    module.register_forward_hook(lambda *_: events.append("forward"))

    def batches():
        for number in (1, 2):
            events.append("read")
            yield make_batch(number)

    make_engine(module, gradient_accumulation_steps=2).forward_backward(batches())
    assert events == ["read", "forward", "read", "forward"]


@pytest.mark.parametrize("given", [1, 3])
def test_a_wrong_number_of_microbatches_is_a_bug(given):
    engine = make_engine(LoraStep(), gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="microbatches"):
        engine.forward_backward(make_batch(number) for number in range(1, 1 + given))


def test_nan_names_term_and_clip_and_leaves_weights_and_gradients_alone():
    module = LoraStep()
    engine = make_engine(module)
    before = engine.full_parameters()
    with pytest.raises(NonFiniteError, match=r"'loss' is nan on rank 0, clips: clip-3\.mp4"):
        engine.forward_backward([make_batch(-3)])
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[n], p) for n, p in engine.full_parameters().items())


def test_a_gradient_that_is_not_finite_stops_the_update():
    module = LoraStep()
    engine = make_engine(module)
    engine.forward_backward([make_batch(1)])
    before = engine.full_parameters()
    module.blocks[0].first.up.grad[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="gradient norm is inf"):
        engine.update(LR)
    assert all(torch.equal(before[n], p) for n, p in engine.full_parameters().items())


def test_a_parameter_that_took_no_part_gets_a_gradient_of_zero():
    module = LoraStep()
    module.idle = torch.nn.Parameter(torch.ones(3))
    engine = make_engine(module)
    engine.forward_backward([make_batch(1)])
    engine.update(LR)
    assert torch.allclose(module.idle, torch.full((3,), 1 - LR * 0.1))  # decayed, as ZeRO would


def test_trainable_must_be_what_requires_a_gradient():
    module = LoraStep()
    names = module.trainable()
    first = next(iter(names))
    with pytest.raises(ValueError, match="not given"):
        LocalEngine(
            module,
            {k: v for k, v in names.items() if k != first},
            AdamWFactory(),
            device="cpu",
            max_grad_norm=0,
            gradient_accumulation_steps=1,
        )
    names[first].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        make_engine_with(module, names)


def make_engine_with(module, names):
    return LocalEngine(
        module,
        names,
        AdamWFactory(),
        device="cpu",
        max_grad_norm=0,
        gradient_accumulation_steps=1,
    )


def test_full_parameters_are_a_snapshot():
    engine = make_engine(LoraStep())
    before = engine.full_parameters()
    copy = {name: value.clone() for name, value in before.items()}
    engine.forward_backward([make_batch(1)])
    engine.update(LR)
    assert all(torch.equal(before[name], copy[name]) for name in before)
    assert any(not torch.equal(before[n], p) for n, p in engine.full_parameters().items())
