"""The validator alone: the same figure however the work is shared, and nothing else is touched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.attention.sequence import SequenceGroup
from trainer.contract.errors import DataError, NonFiniteError
from trainer.contract.variants import TransformerConfig
from trainer.core.seams import BlockState
from trainer.data.buckets import Bucket
from trainer.data.entries import read_entry, write_entry
from trainer.data.items import TrainingItem
from trainer.engine.process_group import World
from trainer.models.wan.transformer import WanTransformer
from trainer.training.validation import (
    ValidationSettings,
    Validator,
    choose_items,
    item_noise,
)

SETTINGS = ValidationSettings(timesteps=(100.0, 900.0), noises_per_timestep=2, seed=5)
SIZES = [(1, 4, 4), (1, 4, 4), (2, 4, 4), (1, 4, 4), (1, 4, 4)]
"""Latent sizes of the five items: batches of three are 3 + 1 of one bucket and 1 of another."""


@pytest.fixture
def items(tmp_path: Path) -> list[TrainingItem]:
    found = []
    for number, size in enumerate(SIZES):
        random = torch.Generator().manual_seed(number)
        latents, context = tmp_path / f"{number}.latents", tmp_path / f"{number}.text"
        write_entry(
            latents, f"l{number}", {"latents": torch.randn(16, *size, generator=random)}, {}
        )
        tokens = torch.randn(3 + number, 32, generator=random)
        write_entry(context, f"c{number}", {"context": tokens}, {})
        item = TrainingItem(
            key=f"clips/{number}",
            name=f"clip{number}",
            source=0,
            clip=f"hash{number}",
            start=0,
            bucket=Bucket(32, 32, 4 * size[0] - 3),
            latents=latents,
            latents_key=f"l{number}",
            context=context,
            context_key=f"c{number}",
            num_repeats=1,
            batch_size=1,
        )
        found.append(item)
    return found


@pytest.fixture
def model() -> WanTransformer:
    shape: Any = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16}
    model = WanTransformer(TransformerConfig(**shape, text_dim=32), seed=0)
    model.head.head.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@dataclass
class Ranks:
    """Runs the ranks of a world one after the other: all but the last only leave their values."""

    left: list[Tensor] = field(default_factory=list)

    def world(self, rank: int, world_size: int, share: int = 1) -> World:
        ranks = self

        class Place(World):
            def gather(self, values: Tensor) -> Tensor:
                ranks.left.append(values.flatten().clone())
                return torch.stack(ranks.left)

        sequence = SequenceGroup(rank % share, share, None) if share > 1 else None
        return Place(rank, world_size, rank, torch.device("cpu"), sequence)


def measure(model: nn.Module, items: list[TrainingItem], **changes: Any) -> Any:
    return Validator(model, items, replace(SETTINGS, **changes), World.alone()).measure()


def by_hand(
    model: nn.Module, items: list[TrainingItem], timestep: float, masks: Any = (None,) * 5
) -> float:
    losses = []
    for number, (item, size) in enumerate(zip(items, SIZES, strict=True)):
        random = torch.Generator().manual_seed(number)
        clean = torch.randn(16, *size, generator=random)
        context = torch.randn(3 + number, 32, generator=random)
        for repeat in range(2):
            noise = item_noise(item, clean.shape, timestep, repeat, 5)
            noisy = (1 - timestep / 1000) * clean + timestep / 1000 * noise
            with torch.no_grad():
                velocity = model(noisy[None], torch.tensor([timestep]), [context])[0]
            squares = (velocity - (noise - clean)).double().square()
            mask = masks[number]
            if mask is None or not mask.any():
                losses.append(float(squares.mean()))
            else:
                weights = mask.double().expand_as(squares)
                losses.append(float((weights * squares).sum() / weights.sum()))
    return sum(losses) / len(losses)


def test_it_is_the_mean_of_the_formula_over_items_timesteps_and_noises(model, items) -> None:
    result = measure(model, items)
    assert result.num_items == 5
    assert list(result.by_timestep) == [100, 900]
    for timestep, found in result.by_timestep.items():
        assert found == pytest.approx(by_hand(model.eval(), items, timestep), rel=1e-5)
    assert result.loss == pytest.approx(sum(result.by_timestep.values()) / 2, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_masks_mark_what_is_measured(model, items, batch_size) -> None:
    """Five items: a half mask, a grey one, a black one, and two without."""
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    masks = [mask, 0.5 * mask + 0.25, None, torch.zeros(1, 1, 4, 4), None]
    masked = []
    for item, own in zip(items, masks, strict=True):
        if own is not None:
            tensors = read_entry(item.latents, item.latents_key) | {"mask": own}
            write_entry(item.latents, item.latents_key, tensors, {})
        masked.append(replace(item, has_mask=own is not None))
    plain = measure(model, masked, batch_size=batch_size)
    assert plain.by_timestep == pytest.approx(measure(model, items).by_timestep, rel=1e-5)
    found = measure(model, masked, use_masks=True, batch_size=batch_size)
    for timestep, loss in found.by_timestep.items():
        assert loss == pytest.approx(by_hand(model.eval(), items, timestep, masks), rel=1e-5)
    assert found.loss != pytest.approx(plain.loss, rel=1e-3)
    with pytest.raises(DataError, match="no item that is validated on has a mask"):
        measure(model, items, use_masks=True)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_the_batch_size_does_not_change_it(model, items, batch_size) -> None:
    one, other = measure(model, items), measure(model, items, batch_size=batch_size)
    assert other.by_timestep == pytest.approx(one.by_timestep, rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "share"), [(2, 1, 1), (3, 3, 1), (7, 1, 1), (4, 1, 2), (2, 2, 2)]
)
def test_any_number_of_ranks_finds_the_very_same_and_runs_as_often(
    model, items, world_size, batch_size, share
) -> None:
    settings = replace(SETTINGS, batch_size=batch_size)
    alone = Validator(model, items, settings, World.alone()).measure()
    ranks, forwards = Ranks(), []
    for rank in range(world_size):
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        world = ranks.world(rank, world_size, share)
        last = Validator(model, items[::-1], settings, world).measure()
        handle.remove()
        forwards.append(len(calls))
    assert (last.loss, last.by_timestep) == (alone.loss, alone.by_timestep)
    assert len(set(forwards)) == 1, "ZeRO-3 would hang"
    assert forwards[0] > 0


class Doubling:
    """A technique's hook that would change every prediction."""

    def before_block(self, index: int, state: BlockState) -> BlockState:
        return replace(state, tokens_BLD=2 * state.tokens_BLD)

    def after_block(self, index: int, state: BlockState) -> BlockState:
        return state


def test_dropout_and_hooks_are_off_and_everything_is_left_as_it_was(model, items) -> None:
    plain = measure(model, items).loss
    layer = model.blocks[0].self_attn.q
    model.blocks[0].self_attn.q = nn.Sequential(layer, nn.Dropout(0.5))
    model.train()
    model.blocks[1].eval()  # a mode of its own
    hook = Doubling()
    model.blocks.add_hooks([hook])
    modes = [part.training for part in model.modules()]
    state = torch.random.get_rng_state()
    assert measure(model, items).loss == plain
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert model.blocks.hooks == (hook,)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_is_the_items_own(items) -> None:
    def noise(item: TrainingItem, timestep: float = 100, number: int = 0, seed: int = 5) -> Tensor:
        return item_noise(item, (2, 3), timestep, number, seed)

    first = noise(items[0])
    moved = replace(items[0], key="elsewhere", name="x", source=3, latents=Path("y"))
    assert torch.equal(first, noise(moved)), "the place does not count"
    others = [
        noise(items[1]),
        noise(items[0], timestep=100.00001),
        noise(items[0], number=1),
        noise(items[0], seed=6),
        noise(replace(items[0], start=4)),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_a_limited_choice_is_a_part_of_the_larger_one_in_any_order(items) -> None:
    three, four = (replace(SETTINGS, max_items=count) for count in (3, 4))
    chosen = choose_items(items, three)
    assert len(chosen) == 3
    assert choose_items(items[::-1], three) == chosen
    assert choose_items(items, four)[:3] == chosen
    without = [item for item in items if item is not chosen[0]]
    assert set(chosen[1:]) < set(choose_items(without, three))


def test_a_loss_that_is_not_finite_names_item_and_timestep(model, items) -> None:
    def spoil(_: Any, arguments: Any, velocity: Tensor) -> Tensor:
        wrong = (arguments[1] == 900) & (velocity.shape[2] == 2)
        return velocity.masked_fill(wrong.view(-1, 1, 1, 1, 1), torch.nan)

    model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError) as caught:
        measure(model, items)
    message = "the validation loss is NaN or infinite for clip2 at timestep 900"
    assert caught.value.message == message


def test_without_items_there_is_nothing_to_measure(model) -> None:
    with pytest.raises(DataError, match="no items to validate on"):
        measure(model, [])
