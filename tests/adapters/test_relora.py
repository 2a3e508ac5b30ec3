from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.relora import ReLoRA, truncated
from trainer.contract.errors import ConfigError
from trainer.engine.local import LocalEngine
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.adamw8bit import AdamW8bit

from .tiny_models import make_transformer, model_inputs, run


class Step(nn.Module):
    """Batch -> {"loss"}: the tiny model on one fixed input a step."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        inputs = model_inputs(self.model, seed=batch.number)
        return {"loss": (run(self.model, inputs) - 1).square().mean()}


class Number:
    names = ()

    def __init__(self, number: int) -> None:
        self.number = number

    def to(self, device):
        return self


def make(build, factory=None, **options):
    options = {"rank": 3, "restart_every_steps": 2, "restart_warmup_steps": 0} | options
    model = make_transformer(num_layers=2)
    adapter = ReLoRA(ReLoRA.Config(**options), build)
    adapter.inject(model, 4)
    optimizer = factory or AdamW(AdamW.Config(), build)
    engine = LocalEngine(
        Step(model.train()),
        adapter.trainable(),
        optimizer,
        device="cpu",
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
    )
    (restarts,) = adapter.techniques()
    restarts.connect(engine)
    return model, adapter, engine, restarts


def train(made, steps):
    _, _, engine, restarts = made
    for step in steps:
        engine.forward_backward([Number(step)])
        engine.update(0.02 * restarts.lr_factor(step))
        restarts.after_step(step)


def test_a_restart_changes_no_prediction_and_starts_anew(build):
    made = make(build, restart_every_steps=100)
    model, adapter, _, restarts = made
    train(made, range(1, 4))
    inputs = model_inputs(model)
    before = run(model, inputs).detach()
    old = {n: p.detach().clone() for n, p in adapter.trainable().items()}
    restarts._restart(1)
    after = run(model, inputs).detach()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    for name, part in adapter.frozen_parts().items():
        assert torch.equal(part.down, old[f"{name}.down"])
        assert torch.equal(part.up, old[f"{name}.up"])
        down, up = (adapter.trainable()[f"{name}.{which}"] for which in ("down", "up"))
        assert not up.any()
        bound = down.shape[1] ** -0.5
        assert 0.5 * bound < down.abs().max() <= bound
        assert not torch.equal(down, old[f"{name}.down"])


def test_the_sum_of_cycles_is_what_the_model_computes_with(build, tmp_path):
    """Against weights summed up by hand, cycle by cycle, in float64."""
    made = make(build, alpha=6.0)
    model, adapter, engine, restarts = made
    plain = make_transformer(num_layers=2)
    sums = {n: v.double() for n, v in plain.state_dict().items()}

    def add() -> None:
        for name, layer in adapter.trained_layers().items():
            sums[f"{name}.weight"] += 2.0 * (layer.up.double() @ layer.down.double()).detach()

    for step in range(1, 6):
        engine.forward_backward([Number(step)])
        engine.update(0.02)
        if step % 2 == 0:
            add()
        restarts.after_step(step)
    add()
    plain.load_state_dict({n: v.float() for n, v in sums.items()})
    inputs = model_inputs(model)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(model, inputs), run(plain, inputs), rtol=2e-4, atol=2e-5)
    for layout in ("comfy", "kohya", "peft"):
        path = tmp_path / f"{layout}.safetensors"
        state = engine.full_parameters()
        adapter.write_output(state, path, layout=layout, dtype=torch.float32, metadata={})
        read = load_adapter(path)
        assert {update.rank for update in read.values()} == {9}
        other = make_transformer(num_layers=2)
        attach(other, read)
        with torch.no_grad():
            torch.testing.assert_close(run(other, inputs), run(model, inputs), rtol=1e-5, atol=1e-6)
    adapter.set_strength(0.0)
    with torch.no_grad():
        base = run(make_transformer(num_layers=2), inputs)
        assert torch.equal(run(model, inputs), base)
        adapter.remove()
        assert torch.equal(run(model, inputs), base)


def test_the_factors_of_a_cycle_that_has_not_begun_are_left_out(build):
    made = make(build)
    train(made, range(1, 3))
    _, adapter, engine, _ = made
    assert {u.rank for u in adapter.updates(engine.full_parameters()).values()} == {3}
    fresh = make(build)
    assert {u.rank for u in fresh[1].updates(fresh[2].full_parameters()).values()} == {3}


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_restart_forgets_a_share_of_the_optimizers_state(build, ratio):
    made = make(build, optimizer_reset_ratio=ratio)
    _, _, engine, restarts = made
    states = engine._optimizer.state
    for step in (1, 2):
        engine.forward_backward([Number(step)])
        engine.update(0.02)
    before = {p: s["exp_avg_sq"].clone() for p, s in states.items()}
    steps = {p: float(s["step"]) for p, s in states.items()}
    restarts.after_step(2)
    kept, of = 0, 0
    for parameter, old in before.items():
        now = states[parameter]["exp_avg_sq"]
        same = now == old
        assert ((now == 0) | same).all()
        moments = states[parameter]["exp_avg"]
        assert ((moments == 0) == (now == 0))[old > 0].all()  # both of an element, or none
        kept += int((same & (old > 0)).sum())
        of += int((old > 0).sum())
        assert float(states[parameter]["step"]) == steps[parameter]
    assert kept / of == pytest.approx(1 - ratio, abs=0.05)


def test_learning_rate_rises_again_after_each_restart(build):
    *_, restarts = make(build, restart_every_steps=5, restart_warmup_steps=4)
    assert [restarts.lr_factor(step) for step in range(1, 13)] == [
        1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 0.25, 0.5,
    ]  # fmt: skip


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("limit", [None, 4])
def test_a_resumed_run_is_the_run_that_never_stopped(build, tmp_path, at, limit):
    whole = make(build, frozen_max_rank=limit)
    train(whole, range(1, at + 1))
    whole[2].save_state(tmp_path)
    state = {n: t.clone() for n, t in whole[3].state_dict().items()}
    train(whole, range(at + 1, 7))
    resumed = make(build, frozen_max_rank=limit)
    resumed[2].load_state(tmp_path)
    resumed[3].load_state_dict(state)
    train(resumed, range(at + 1, 7))
    one, other = (made[2].full_parameters() for made in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (made[3].state_dict() for made in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {t.shape[0] for n, t in one.items() if n.endswith("down")} == {limit or 9}


def test_truncation_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(9, 20, generator=generator), torch.randn(12, 9, generator=generator)
    new_down, new_up = truncated(down, up, 4)
    assert new_down.shape == (4, 20)
    left, sizes, right = torch.linalg.svd(up.double() @ down.double(), full_matrices=False)
    best = (left[:, :4] * sizes[:4]) @ right[:4]
    torch.testing.assert_close((new_up @ new_down).double(), best, rtol=1e-4, atol=1e-5)


def test_an_optimizer_whose_state_cannot_be_taken_apart_is_refused(build):
    factory = AdamW8bit(AdamW8bit.Config(), build)
    with pytest.raises(ConfigError, match="cannot be taken apart"):
        make(build, factory)
    make(build, factory, optimizer_reset_ratio=0.0)
