from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.adapters.base import AdapterFile
from trainer.adapters.dora import DoRA
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.rank_mask import RankSchedule
from trainer.adapters.tlora import TLoRA
from trainer.contract.adapter_start import TLORA_KEY
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import HostStreams
from trainer.models.wan.conditioning import first_frame_timestep

from .tiny_models import expected_weights, make_factors, make_transformer, model_inputs, run

R = 4
TIMES = (40.0, 510.0, 930.0)


def batch(model, timesteps=TIMES, seed=2):
    """One sample a timestep, each with another text."""
    parts = [model_inputs(model, seed + i) for i in range(len(timesteps))]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return joined | {"timestep": torch.tensor(timesteps)}


def trained(model, build, **options) -> TLoRA:
    adapter = TLoRA(TLoRA.Config(**({"rank": R} | options)), build)
    adapter.inject(model, 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.trainable().values():
        parameter.data.normal_(std=0.1, generator=generator)
    return adapter


def gradients(adapter):
    found = {n: p.grad.clone() for n, p in adapter.trainable().items()}
    for parameter in adapter.trainable().values():
        parameter.grad = None
    return found


def assert_equal_gradients(one, other):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


def oracle(t: float, rank: int, low: int, a: int, below: int) -> int:
    """The formula in exact arithmetic, as the reference pages write its two forms."""
    time = Fraction(t)
    if not below:
        return math.floor(((1000 - time) / 1000) ** a * (rank - low)) + low
    if time <= below:
        return rank
    left = 1 - (time - below) / (1000 - below)
    return math.floor(left**a * (rank - low) + low)


schedules = st.tuples(
    st.integers(1, 64), st.integers(0, 63), st.sampled_from((1, 2, 4)), st.integers(0, 999)
).map(lambda v: (v[0] + v[1], v[0], v[2], v[3]))
timesteps = st.integers(0, 1000 * 64).map(lambda n: n / 64)


@given(schedules, timesteps)
def test_rank_is_the_papers_formula_in_exact_arithmetic(schedule, t):
    rank, low, a, below = schedule
    made = RankSchedule(rank=rank, min_rank=low, exponent=a, full_rank_below=below)
    exact = oracle(t, rank, low, a, below)
    active = int(made.active(torch.tensor([t]))[0])
    if active != exact:  # float64 may fall on the other side of a whole number
        nudged = {oracle(t + step, rank, low, a, below) for step in (-1e-9, 1e-9) if t + step >= 0}
        assert active in nudged


@given(schedules, st.lists(timesteps, min_size=2, max_size=6))
def test_more_noise_never_has_more_ranks(schedule, times):
    rank, low, a, below = schedule
    made = RankSchedule(rank=rank, min_rank=low, exponent=a, full_rank_below=below)
    mask = made.mask(torch.tensor(sorted(times)))
    assert mask.shape == (len(times), rank)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (mask[:, :-1] >= mask[:, 1:]).all()  # the first ranks act
    active = mask.sum(dim=1)
    assert (active[:-1] >= active[1:]).all()
    assert low <= active.min() <= active.max() <= rank
    ends = made.active(torch.tensor([0.0, float(below), 1000.0])).tolist()
    assert ends == [rank, rank, low]


@torch.no_grad()
def test_each_sample_has_the_update_of_its_own_timestep(build):
    """Against a model of merged weights for each sample, its factors cut to r(t) ranks."""
    model = make_transformer()
    adapter = trained(model, build, alpha=2.0, min_rank=1)
    inputs = batch(model)
    together = run(model, inputs)
    state = {n: p.detach() for n, p in adapter.trainable().items()}
    pairs = adapter.updates(state)
    ranks = [oracle(t, R, 1, 1, 0) for t in TIMES]
    assert ranks == [3, 2, 1]
    for index, rank in enumerate(ranks):
        plain = make_transformer()
        # alpha stays that of the whole: scale is alpha / R whatever the mask.
        cut = {
            n: type(p)(p.down_RI[:rank], p.up_OR[:, :rank], p.scale * rank)
            for n, p in pairs.items()
        }
        plain.load_state_dict({n: v.float() for n, v in expected_weights(plain, cut).items()})
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        torch.testing.assert_close(
            together[index : index + 1], run(plain, alone), rtol=2e-4, atol=2e-5
        )
        torch.testing.assert_close(together[index : index + 1], run(model, alone))


@pytest.mark.parametrize(
    ("checkpointing", "chunks", "keep_attention", "swapped"),
    [
        (False, 1, False, 0),
        (False, 3, False, 0),
        (True, 1, True, 0),
        (True, 3, False, 2),
        (2, 3, True, 0),
    ],
)
def test_a_forward_at_another_timestep_before_the_backward_changes_nothing(
    build, checkpointing, chunks, keep_attention, swapped
):
    """The backward computes parts of the first forward anew, when the second has left its mask."""
    model = make_transformer().train()
    if swapped:
        model.requires_grad_(False)
        model.blocks.swap = BlockSwap(list(model.blocks), swapped, HostStreams())
    adapter = trained(model, build)
    model.gradient_checkpointing = bool(swapped)
    first, second = batch(model), batch(model, (900.0, 20.0, 500.0), seed=8)
    run(model, first).square().mean().backward()
    of_first = gradients(adapter)
    run(model, second).square().mean().backward()
    of_second = gradients(adapter)

    model.gradient_checkpointing = checkpointing
    model.blocks.keep_attention = keep_attention
    model.set_attention_chunks(chunks)
    model.set_feed_forward_chunks(chunks)
    loss = run(model, first).square().mean()
    with torch.no_grad():
        run(model, second)  # validation or a sample
    loss.backward()
    assert_equal_gradients(gradients(adapter), of_first)
    terms = [run(model, inputs).square().mean() for inputs in (first, second)]
    sum(terms).backward()
    both = {n: of_first[n] + of_second[n] for n in of_first}
    assert_equal_gradients(gradients(adapter), both)


@pytest.mark.slow
def test_compiled_blocks_see_each_forwards_mask(build):
    model, plain = (make_transformer(num_layers=2).train() for _ in range(2))
    only = {"exclude": (r".*\.(k|v|o|ffn\.2)",)}
    adapters = [trained(each, build, **only) for each in (model, plain)]
    for each in (model, plain):
        each.gradient_checkpointing = True
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for times in (TIMES, (900.0, 20.0, 500.0)):
        for each in (model, plain):
            loss = run(each, batch(each, times)).square().mean()
            with torch.no_grad():
                run(each, batch(each, (999.0, 999.0, 0.0)))
            loss.backward()
        assert_equal_gradients(*(gradients(adapter) for adapter in adapters))


@torch.no_grad()
def test_tokens_of_several_timesteps_have_the_mask_of_the_noisiest(build):
    model = make_transformer()
    trained(model, build, alpha=4.0)
    inputs = batch(model)
    per_token = first_frame_timestep(inputs["timestep"], (2, 4, 4), model.config.patch_size)
    assert per_token.shape[1] == 8
    run(model, inputs | {"timestep": per_token})
    masks = [layer.mask.value.tensor for layer in model.modules() if hasattr(layer, "mask")]
    assert len(masks) == 30
    assert all(mask.sum(dim=1).tolist() == [3, 2, 1] for mask in masks)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
def test_the_file_attached_is_the_adapter_trained(build, tmp_path, layout):
    model, other = make_transformer(), make_transformer()
    adapter = trained(model, build, alpha=2.0, min_rank=2, full_rank_below=100.0)
    state = {n: p.detach() for n, p in adapter.trainable().items()}
    path = tmp_path / "t.safetensors"
    adapter.write_output(state, path, layout=layout, dtype=torch.float32, metadata={})
    read = load_adapter(path)
    assert json.loads(read.metadata[TLORA_KEY]) == {
        "rank": 4, "min_rank": 2, "exponent": 1.0, "full_rank_below": 100.0,
    }  # fmt: skip
    inputs = batch(model)
    base = run(other, inputs)
    attachment = attach(other, read, 0.5)
    adapter.set_strength(0.5)
    torch.testing.assert_close(run(other, inputs), run(model, inputs), rtol=1e-5, atol=1e-6)
    plain = AdapterFile(read, path=path, layout=layout, metadata={})
    attachment.detach()
    assert torch.equal(run(other, inputs), base)
    assert not other._forward_pre_hooks
    full = attach(other, plain, 0.5)
    assert not torch.allclose(run(other, inputs), run(model, inputs), atol=1e-3)
    full.detach()


@torch.no_grad()
def test_two_files_with_masks_of_their_own_work_side_by_side(build, tmp_path):
    model, both = make_transformer(), make_transformer()
    names = list(make_factors(model))
    wanted = dict(model.state_dict())
    inputs = batch(model, (500.0,))
    for number, low in enumerate((1, 3)):
        schedule = RankSchedule(rank=4, min_rank=low, exponent=1.0)
        path = tmp_path / f"{number}.safetensors"
        factors = make_factors(model, names=names, seed=number + 5)
        save_adapter(factors, path, dtype=torch.float32, metadata={TLORA_KEY: schedule.in_words()})
        attach(both, load_adapter(path))
        rank = oracle(500, 4, low, 1, 0)
        for name, pair in factors.items():
            part = pair.scale * pair.up_OR[:, :rank] @ pair.down_RI[:rank]
            wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + part
    model.load_state_dict(wanted)
    torch.testing.assert_close(run(both, inputs), run(model, inputs), rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_two_experts_with_the_same_file_keep_their_own_timesteps(build, tmp_path):
    trained_on = make_transformer()
    adapter = trained(trained_on, build)
    path = tmp_path / "t.safetensors"
    state = {n: p.detach() for n, p in adapter.trainable().items()}
    adapter.write_output(state, path, layout="comfy", dtype=torch.float32, metadata={})
    experts = [make_transformer(), make_transformer(seed=1)]
    for expert in experts:
        attach(expert, load_adapter(path))
    calls = [(experts[i % 2], batch(experts[0], (t,))) for i, t in enumerate((950.0, 20.0, 500.0))]
    interleaved = [run(*call) for call in calls]
    alone = [run(*call) for call in (calls[1], calls[0], calls[2])]
    assert torch.equal(interleaved[0], alone[1])
    assert torch.equal(interleaved[1], alone[0])
    assert torch.equal(interleaved[2], alone[2])
    torch.testing.assert_close(interleaved[0], run(trained_on, calls[0][1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "no rank schedule"),
        ('{"rank": 4}', "min_rank"),
        ('{"rank": 4, "min_rank": 5, "exponent": 1}', "no rank schedule"),
        ('{"rank": 8, "min_rank": 1, "exponent": 1}', "rank 8"),
    ],
)
def test_a_file_whose_mask_does_not_fit_is_refused_and_the_model_left_alone(tmp_path, value, words):
    model = make_transformer()
    path = tmp_path / "t.safetensors"
    save_adapter(make_factors(model), path, metadata={TLORA_KEY: value})
    with pytest.raises(ModelFileError, match=words) as caught:
        attach(model, load_adapter(path))
    assert TLORA_KEY in str(caught.value.hint) + caught.value.message
    assert not any(hasattr(module, "down") for module in model.modules())


def test_a_dora_is_refused_on_it_and_works_under_it(build):
    """Its lengths are those of one weight; this one has another for each sample."""
    model, inputs = make_transformer(), batch(make_transformer())
    trained(model, build)
    with pytest.raises(ModelFileError, match="T-LoRA"):
        DoRA(DoRA.Config(rank=2), build).inject(model, 0)
    model = make_transformer()
    before = run(model, inputs)
    DoRA(DoRA.Config(rank=2), build).inject(model, 0)
    trained(model, build)
    assert not torch.allclose(run(model, inputs), before)


def test_layers_outside_of_the_blocks_are_refused(build):
    model = make_transformer()
    adapter = TLoRA(TLoRA.Config(include=(r"head\.head",)), build)
    with pytest.raises(ConfigError, match=r"head\.head"):
        adapter.inject(model, 0)
    assert not adapter.trainable()


def test_initial_factors_are_those_of_lora_and_removal_leaves_the_model(build):
    model = make_transformer()
    inputs = batch(model)
    before = run(model, inputs)
    adapter = TLoRA(TLoRA.Config(rank=R), build)
    adapter.inject(model, 0)
    assert torch.equal(run(model, inputs), before)
    adapter.remove()
    assert torch.equal(run(model, inputs), before)
    assert not model._forward_pre_hooks
