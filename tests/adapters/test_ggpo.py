from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainer.adapters.ggpo import GGPO
from trainer.adapters.lora import LoRA
from trainer.adapters.perturbed_linear import NoiseState, PerturbedLinear, product_row_norms
from trainer.core.rng import generator
from trainer.core.types import Batch
from trainer.engine.local import LocalEngine
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import HostStreams
from trainer.optimizers.adamw import AdamW
from trainer.quant.fp8 import Fp8Spec, quantise
from trainer.quant.linear import Fp8Linear

from .tiny_models import make_transformer, model_inputs, run

INPUTS, OUTPUTS, RANK, SCALE = 40, 24, 3, 0.5


def make_layer(sigma=0.3, beta=0.2, base=None, name="blocks.0.ffn.0") -> PerturbedLinear:
    random = torch.Generator().manual_seed(1)
    base = base or nn.Linear(INPUTS, OUTPUTS)
    down = nn.Parameter(torch.randn(RANK, INPUTS, generator=random))
    up = nn.Parameter(torch.randn(OUTPUTS, RANK, generator=random))
    noise = NoiseState(sigma, beta)
    noise.measures = True
    base.requires_grad_(False)
    layer = PerturbedLinear(base, down, up, SCALE, 0.0, name=name, noise=noise)
    layer.gradient_norms_O.uniform_(0, 3, generator=random)
    return layer.train()


def noise_of(layer: PerturbedLinear, seed: int) -> torch.Tensor:
    """E, seen through what it does to the unit vectors."""
    layer._noise.seed = seed
    unit = torch.eye(INPUTS)
    with torch.no_grad():
        disturbed = layer.train()(unit)
        quiet = layer.eval()(unit)
    layer.train()
    return (disturbed - quiet).T


def test_noise_has_the_deviation_of_the_formula_in_each_row():
    layer = make_layer()
    draws = torch.stack([noise_of(layer, seed) for seed in range(200)])
    weight = layer.base.weight + SCALE * layer.up @ layer.down
    spread = (0.3 * weight.norm(dim=1) + 0.2 * layer.gradient_norms_O) / OUTPUTS**0.5
    count = 200 * INPUTS
    assert torch.allclose(draws.std(dim=(0, 2)) / spread, torch.ones(OUTPUTS), atol=0.05)
    assert (draws.mean(dim=(0, 2)).abs() < 5 * spread / count**0.5).all()
    normal = draws / spread[:, None]
    assert normal.pow(4).mean().item() == pytest.approx(3, rel=0.05)
    # Elements, microbatches and layers have nothing to do with one another.
    flat = normal.flatten(1)
    assert (flat[0] * flat[1]).mean().abs() < 5 / flat.shape[1] ** 0.5
    other = noise_of(make_layer(name="blocks.1.ffn.0"), 0).flatten() / spread.repeat_interleave(
        INPUTS
    )
    assert (flat[0] * other).mean().abs() < 5 / flat.shape[1] ** 0.5
    assert torch.equal(noise_of(layer, 3), draws[3])


@pytest.mark.parametrize("quantised", [False, True])
def test_gradients_are_those_of_the_disturbed_weight(quantised):
    linear = nn.Linear(INPUTS, OUTPUTS)
    weight = linear.weight.detach()
    if quantised:
        held = quantise(weight, Fp8Spec(scaled=True, dtype=torch.float8_e4m3fn, matmul=False))
        linear = Fp8Linear(held, linear.bias)
        weight = linear.dequantised(torch.bfloat16).float()
    layer = make_layer(base=linear)
    noise = noise_of(layer, 5)
    rows = (weight + SCALE * layer.up @ layer.down).norm(dim=1)
    torch.testing.assert_close(layer.weight_norms_O, rows, rtol=1e-4, atol=1e-4)
    xs = [torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    tilt = torch.randn(2, 7, OUTPUTS)
    (layer(xs[0].requires_grad_()) * tilt).sum().backward()
    ours = layer.down.grad, layer.up.grad
    layer.down.grad = layer.up.grad = None
    whole = weight + SCALE * layer.up @ layer.down + noise
    (F.linear(xs[1].requires_grad_(), whole, linear.bias) * tilt).sum().backward()
    for one, other in zip(ours, (layer.down.grad, layer.up.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-2, atol=1e-2)


def test_row_norms_are_those_of_the_whole_matrix():
    random = torch.Generator().manual_seed(1)
    up, up_gradient = (torch.randn(9, 3, generator=random) for _ in range(2))
    down, down_gradient = (torch.randn(3, 7, generator=random) for _ in range(2))
    whole = 0.5 * (up.double() @ down_gradient.double() + up_gradient.double() @ down.double())
    found = product_row_norms(up, down, up_gradient, down_gradient, 0.5)
    torch.testing.assert_close(found.double(), whole.norm(dim=1), rtol=1e-6, atol=1e-6)


class Step(nn.Module):
    """Stands for the training step: tells the technique of each microbatch."""

    def __init__(self, model, technique) -> None:
        super().__init__()
        self.model, self.technique = model, technique

    def forward(self, batch):
        random = generator(0, "technique", *batch.item_seeds)
        self.technique.edit_batch(batch, random)
        inputs = model_inputs(self.model, seed=batch.item_seeds[0])
        return {"loss": (run(self.model, inputs) - 1).square().mean()}


def microbatches(step):
    empty = torch.zeros(1)
    return [Batch(latents_BCFHW=empty, context=(), item_seeds=(10 * step + i,)) for i in (1, 2)]


def make(build, swapped=0, **options):
    model = make_transformer(num_layers=2)
    if swapped:
        model.requires_grad_(False)
        model.blocks.swap = BlockSwap(list(model.blocks), swapped, HostStreams())
        model.gradient_checkpointing = True
    adapter = GGPO(GGPO.Config(**({"rank": 3, "norms_every_steps": 2} | options)), build)
    adapter.inject(model, 4)
    random = torch.Generator().manual_seed(8)
    for parameter in adapter.trainable().values():
        parameter.data.normal_(std=0.1, generator=random)
    (technique,) = adapter.techniques()
    engine = LocalEngine(
        Step(model.train(), technique),
        adapter.trainable(),
        AdamW(AdamW.Config(), build),
        device="cpu",
        max_grad_norm=1e-3,
        gradient_accumulation_steps=2,
    )
    technique.connect(engine)
    return model, adapter, engine, technique


def train(made, steps):
    for step in steps:
        made[2].forward_backward(microbatches(step))
        made[2].update(0.02)
        made[3].after_step(step)


def test_norms_are_filled_from_the_mean_gradient_and_the_weights_before_the_update(build):
    made = make(build)
    adapter = made[1]
    train(made, [1])
    fresh = make(build)
    for batch in microbatches(1):
        (fresh[2]._module(batch)["loss"] / 2).backward()
    for name, layer in fresh[1].perturbed_layers().items():
        b, a, db, da = (
            t.detach().double() for t in (layer.up, layer.down, layer.up.grad, layer.down.grad)
        )
        found = adapter.perturbed_layers()[name]
        torch.testing.assert_close(
            found.gradient_norms_O.double(), (b @ da + db @ a).norm(dim=1), rtol=1e-4, atol=1e-8
        )
        whole = layer.base.weight.double() + b @ a
        torch.testing.assert_close(
            found.weight_norms_O.double(), whole.norm(dim=1), rtol=1e-5, atol=1e-6
        )
        assert found.gradient_norms_O.min() > 0


def test_norms_are_taken_every_so_many_steps(build):
    made = make(build)
    layer = made[1].perturbed_layers()["blocks.0.ffn.0"]
    seen = []
    for step in range(1, 6):
        train(made, [step])
        seen.append((layer.weight_norms_O.clone(), layer.gradient_norms_O.clone()))
    for step, ((w0, g0), (w1, g1)) in enumerate(pairwise(seen), start=2):
        anew = step % 2 == 1  # in steps 1, 3, 5
        assert torch.equal(w0, w1) != anew
        assert torch.equal(g0, g1) != anew


@pytest.mark.parametrize(
    ("checkpointing", "chunks", "swapped"),
    [(True, 1, 0), (True, 3, 2), (False, 3, 0), (2, 1, 0)],
)
def test_what_is_recomputed_sees_the_same_noise(build, checkpointing, chunks, swapped):
    found = []
    for memory in (False, True):
        model, adapter, *_ = made = make(build, swapped if memory else 0, sigma=0.5)
        train(made, [1])
        if memory:
            model.gradient_checkpointing = checkpointing
            model.set_attention_chunks(chunks)
            model.set_feed_forward_chunks(chunks)
        made[2]._module(microbatches(2)[0])["loss"].backward()
        found.append({n: p.grad.clone() for n, p in adapter.trainable().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_only_training_is_disturbed(build):
    model, adapter, engine, technique = make(build, sigma=0.5)
    plain = make_transformer(num_layers=2)
    lora = LoRA(LoRA.Config(rank=3), build)
    lora.inject(plain, 4)
    for name, parameter in lora.trainable().items():
        parameter.copy_(adapter.trainable()[name])
    inputs = model_inputs(model)
    technique.edit_batch(microbatches(1)[0], generator(0, "x"))
    disturbed = run(model, inputs)
    assert torch.equal(run(model, inputs), disturbed)  # one noise for all of a microbatch
    assert not torch.allclose(disturbed, run(plain, inputs), atol=1e-3)
    assert torch.equal(run(model.eval(), inputs), run(plain.eval(), inputs))
    state = engine.full_parameters()
    ours, theirs = adapter.updates(state), lora.updates(state)
    assert all(torch.equal(ours[n].delta(), theirs[n].delta()) for n in theirs)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_is_the_run_that_never_stopped(build, tmp_path, at):
    whole = make(build)
    train(whole, range(1, at + 1))
    whole[2].save_state(tmp_path)
    state = {n: t.clone() for n, t in whole[3].state_dict().items()}
    train(whole, range(at + 1, 6))
    resumed = make(build)
    resumed[2].load_state(tmp_path)
    resumed[3].load_state_dict(state)
    train(resumed, range(at + 1, 6))
    for read in (lambda made: made[2].full_parameters(), lambda made: made[3].state_dict()):
        one, other = read(whole), read(resumed)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
