"""State and weights that wait in RAM: equal to the run without offload, resumable both ways."""

from __future__ import annotations

import pytest
import torch

from tests.engine.toy import (
    AdamWFactory,
    FullStep,
    LoraStep,
    RawAdamWFactory,
    batches_of_step,
    make_batch,
)
from trainer.contract.errors import NonFiniteError, RunError
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine
from trainer.engine.offload import NO_OFFLOAD, Offload

LR = 1e-2
SPECIES = {
    "lora": (LoraStep, False),
    "lora_on_bf16": (lambda: LoraStep(torch.bfloat16), False),
    "full": (FullStep, False),
    "full_bf16": (lambda: FullStep(torch.bfloat16), True),
}
OPTIMIZER = Offload(optimizer="cpu")
PARAMETERS = Offload(parameters="cpu")
BOTH = Offload(optimizer="cpu", parameters="cpu")
CELLS = [
    *[(species, stage, OPTIMIZER) for species in ("lora", "full") for stage in (1, 2, 3)],
    ("lora_on_bf16", 2, OPTIMIZER),
    ("full_bf16", 2, OPTIMIZER),
    ("full_bf16", 3, OPTIMIZER),
    *[(species, 3, offload) for species in SPECIES for offload in (PARAMETERS, BOTH)],
]


@pytest.fixture
def make(world):
    """Return a maker of engines (stage None: local) and close them afterwards."""
    made = []

    def make_engine(species, stage, offload=NO_OFFLOAD, factory=None, **options):
        build, bf16 = SPECIES[species]
        module = build()
        options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2} | options
        arguments = (module, module.trainable(), factory or AdamWFactory())
        if stage is None:
            engine = LocalEngine(*arguments, device="cpu", **options)
        else:
            options = {"persistence_threshold": 0} | options
            engine = DeepSpeedEngine(
                *arguments,
                world=world,
                zero_stage=stage,
                full_finetune_bf16=bf16,
                offload=offload,
                **options,
            )
        made.append(engine)
        return engine

    yield make_engine
    for engine in made:
        engine.close()


def train(engine, steps, accumulation=2):
    seen = []
    for step in steps:
        terms = engine.forward_backward(batches_of_step(step, 0, 1, accumulation))
        seen.append((terms["loss"], engine.update(LR).grad_norm))
    return seen


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("species", "stage", "offload"), CELLS)
def test_equals_the_run_without_offload_bit_for_bit(make, species, stage, offload, accumulation):
    plain = make(species, stage, gradient_accumulation_steps=accumulation)
    engine = make(species, stage, offload, gradient_accumulation_steps=accumulation)
    expected, seen = train(plain, range(5), accumulation), train(engine, range(5), accumulation)
    assert [loss for loss, _ in seen] == [loss for loss, _ in expected]
    assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    assert difference(engine.full_parameters(), plain.full_parameters()) == 0


@pytest.mark.parametrize(("stage", "offload"), [(1, OPTIMIZER), (2, OPTIMIZER), (3, BOTH)])
def test_clipping_and_its_norm_are_the_same(make, stage, offload):
    plain = make("full", stage, max_grad_norm=0.05)
    engine = make("full", stage, offload, max_grad_norm=0.05)
    expected, seen = train(plain, range(5)), train(engine, range(5))
    assert min(norm for _, norm in expected) > 0.05  # clipping was at work
    assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    assert difference(engine.full_parameters(), plain.full_parameters()) < 1e-6


RESUME = [
    ("lora", 1, OPTIMIZER, AdamWFactory),
    ("lora", 2, OPTIMIZER, AdamWFactory),
    ("lora", 2, OPTIMIZER, RawAdamWFactory),
    ("lora", 3, BOTH, AdamWFactory),
    ("full_bf16", 2, OPTIMIZER, AdamWFactory),
    ("full_bf16", 3, OPTIMIZER, AdamWFactory),
    ("full_bf16", 3, PARAMETERS, AdamWFactory),
    ("full_bf16", 3, BOTH, AdamWFactory),
    ("full_bf16", 3, BOTH, RawAdamWFactory),
]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("species", "stage", "offload", "factory"), RESUME)
def test_five_steps_and_five_more_are_ten(make, tmp_path, species, stage, offload, factory, used):
    options = {"max_grad_norm": 0.05}
    if stage == 3:
        options["persistence_threshold"] = 70  # some parameters stay whole, others are sharded
    first = make(species, stage, offload, factory(), **options)
    train(first, range(5))
    first.save_state(tmp_path)
    straight = train(first, range(5, 10))

    second = make(species, stage, offload, factory(), **options)
    if used:
        train(second, range(50, 52))  # what is loaded must replace all of this
    second.load_state(tmp_path)
    assert train(second, range(5, 10)) == straight
    assert difference(second.full_parameters(), first.full_parameters()) == 0


CROSSED = [
    ("lora", (2, OPTIMIZER), (2, NO_OFFLOAD)),
    ("lora", (1, OPTIMIZER), (None, NO_OFFLOAD)),
    ("lora", (3, BOTH), (1, OPTIMIZER)),
    ("full_bf16", (2, OPTIMIZER), (2, NO_OFFLOAD)),
    ("full_bf16", (3, BOTH), (3, NO_OFFLOAD)),
    ("full_bf16", (3, PARAMETERS), (2, OPTIMIZER)),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("species", "one", "other"), CROSSED)
def test_a_state_fits_with_and_without_offload(make, tmp_path, species, one, other, turned):
    written, read = (other, one) if turned else (one, other)
    first, second = make(species, *written), make(species, *read)
    train(first, range(5))
    first.save_state(tmp_path)
    second.load_state(tmp_path)
    assert difference(second.full_parameters(), first.full_parameters()) == 0
    train(first, range(5, 10))
    train(second, range(5, 10))
    assert difference(second.full_parameters(), first.full_parameters()) < 1e-6


@pytest.mark.parametrize("place", ["first", "later"])
def test_a_state_from_before_the_first_step_can_be_loaded(make, tmp_path, place):
    """The buffers that DeepSpeed keeps gradients in must outlive what `load_state` does."""
    fresh = make("full_bf16", 2, OPTIMIZER)
    fresh.save_state(tmp_path)
    used = make("full_bf16", 2, OPTIMIZER)
    if place == "later":
        train(used, range(3))
    used.load_state(tmp_path)
    assert train(used, range(5)) == train(fresh, range(5))
    assert difference(used.full_parameters(), fresh.full_parameters()) == 0


class FusedFactory(AdamWFactory):
    """What is picked on CUDA: it has to step over tensors that lie in RAM, too."""

    def build(self, parameters, lr):
        groups = [dict(group) for group in parameters]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1, fused=True)


@pytest.mark.parametrize(("stage", "offload"), [(2, OPTIMIZER), (3, BOTH)])
def test_a_fused_optimizer_steps_in_ram(make, tmp_path, stage, offload):
    plain, engine = (
        make("full_bf16", stage, place, FusedFactory()) for place in (NO_OFFLOAD, offload)
    )
    expected, seen = train(plain, range(4)), train(engine, range(4))
    assert [loss for loss, _ in seen] == [loss for loss, _ in expected]
    assert difference(engine.full_parameters(), plain.full_parameters()) == 0
    engine.save_state(tmp_path)
    other = make("full_bf16", stage, offload, FusedFactory())
    other.load_state(tmp_path)
    assert train(other, range(4, 6)) == train(engine, range(4, 6))


@pytest.mark.parametrize(("stage", "offload"), [(1, OPTIMIZER), (2, OPTIMIZER), (3, BOTH)])
def test_what_is_not_finite_never_reaches_the_weights(make, stage, offload):
    species = "full_bf16" if stage > 1 else "full"
    engine = make(species, stage, offload)
    train(engine, range(2))
    before = engine.full_parameters()
    with pytest.raises(NonFiniteError, match=r"clip-9\.mp4"):
        engine.forward_backward([make_batch(-9), make_batch(9)])
    victim = next(iter(engine._trainable.values()))
    hook = victim.register_hook(lambda gradient: gradient * torch.inf)
    engine.forward_backward(batches_of_step(2, 0, 1, 2))
    with pytest.raises(NonFiniteError, match="gradient norm"):
        engine.update(LR)
    hook.remove()
    assert difference(engine.full_parameters(), before) == 0


class SometimesIdle(LoraStep):
    """A second expert that the first step reaches and the second does not."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Parameter(torch.ones(3))
        self.steps = 0

    def forward(self, batch):
        self.steps += 1
        terms = super().forward(batch)
        return terms if self.steps > 1 else {**terms, "other": self.other.square().sum()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_that_took_no_part_are_refused(world, stage):
    """DeepSpeed would update them with the gradient that lies in the buffer from before."""
    module = SometimesIdle()
    engine = DeepSpeedEngine(
        module,
        module.trainable(),
        AdamWFactory(),
        world=world,
        zero_stage=stage,
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
        persistence_threshold=0,
        offload=OPTIMIZER,
    )
    train(engine, range(1), 1)
    with pytest.raises(
        RunError, match=r"1 trained parameters took no part in this step, e\.g\. other"
    ):
        engine.forward_backward([make_batch(1)])
    engine.close()
