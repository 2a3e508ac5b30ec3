from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.errors import DataError, UserError
from trainer.core.rng import derive_seed
from trainer.data.buckets import Bucket
from trainer.data.items import TrainingItem
from trainer.data.order import BatchOrder, require_full_step


def item(source, bucket, number, repeats=1, batch_size=1):
    return TrainingItem(
        key=f"{source}/{bucket}/{number}",
        name=f"clip{number}",
        source=source,
        clip=str(number),
        start=0,
        bucket=Bucket(*bucket),
        latents=Path("x"),
        latents_key="k",
        context=Path("y"),
        context_key="c",
        num_repeats=repeats,
        batch_size=batch_size,
    )


@st.composite
def datasets(draw):
    items = []
    for source in range(draw(st.integers(1, 3))):
        repeats, batch_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        for bucket in [(64, 32, 5), (32, 64, 5), (64, 32, 9)][: draw(st.integers(1, 3))]:
            items += [
                item(source, bucket, number, repeats, batch_size)
                for number in range(draw(st.integers(1, 6)))
            ]
    return items


seeds = st.integers(0, 2**40)


@given(datasets(), seeds, st.integers(0, 3))
def test_an_epoch_holds_every_item_exactly_num_repeats_times(items, seed, epoch):
    order = BatchOrder(items, seed)
    size = order.batches_per_epoch
    drawn = [d for n in range(epoch * size, (epoch + 1) * size) for d in order.batch(n)]
    assert len(drawn) == order.items_per_epoch
    assert Counter((d.item.key, d.repeat) for d in drawn) == Counter(
        (i.key, repeat) for i in items for repeat in range(i.num_repeats)
    )
    assert {d.epoch for d in drawn} == {epoch}


@given(datasets(), seeds)
def test_batches_never_mix_and_only_a_groups_last_is_smaller(items, seed):
    order = BatchOrder(items, seed)
    sizes = {}
    for n in range(order.batches_per_epoch):
        batch = order.batch(n)
        assert len({(d.item.source, d.item.bucket) for d in batch}) == 1
        group = batch[0].item.source, batch[0].item.bucket
        sizes.setdefault((group, batch[0].item.batch_size), []).append(len(batch))
    for (_, batch_size), group_sizes in sizes.items():
        assert sum(size < batch_size for size in group_sizes) <= 1
        assert max(group_sizes) <= batch_size
    assert order.largest_batch == max(max(group) for group in sizes.values())


@given(datasets(), seeds, st.integers(1, 5), st.integers(1, 3), st.integers(0, 7))
def test_ranks_and_resumes_see_the_same_stream(items, seed, world_size, accumulation, resume_at):
    # One process that never stops ...
    order = BatchOrder(items, seed)
    per_step = world_size * accumulation
    straight = [order.batch(n) for n in range((resume_at + 4) * per_step)]
    # ... against ranks that are born anew in every step, asking in any order.
    positions = list(range(len(straight)))
    random.Random(seed).shuffle(positions)
    pieces: dict[int, tuple] = {}
    for position in positions:
        pieces[position] = BatchOrder(list(reversed(items)), seed).batch(position)
    assert [pieces[n] for n in range(len(straight))] == straight
    ranks = [
        [n for n in range(len(straight)) if n % world_size == rank] for rank in range(world_size)
    ]
    assert sorted(n for rank in ranks for n in rank) == list(range(len(straight)))


@given(datasets(), seeds)
def test_item_seeds_depend_on_epoch_item_and_repeat_alone(items, seed):
    order = BatchOrder(items, seed)
    drawn = [d for n in range(2 * order.batches_per_epoch) for d in order.batch(n)]
    for d in drawn:
        assert d.seed == derive_seed(seed, "item", d.epoch, d.item.key, d.repeat)
    assert len({d.seed for d in drawn}) == len(drawn)
    # Another batch size moves items into other batches, and leaves their seeds.
    other = BatchOrder([replace(i, batch_size=i.batch_size + 1) for i in items], seed)
    again = [d for n in range(2 * other.batches_per_epoch) for d in other.batch(n)]
    assert {d.seed for d in again} == {d.seed for d in drawn}


def test_epochs_and_seeds_are_shuffled_differently():
    items = [item(0, (64, 32, 5), n) for n in range(20)]

    def keys(seed, epoch):
        order = BatchOrder(items, seed)
        return [order.batch(epoch * 20 + n)[0].item.key for n in range(20)]

    orders = [keys(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_buckets_and_sources_are_mixed_over_the_epoch():
    items = [item(source, (64, 32, 5), n) for source in (0, 1) for n in range(30)]
    order = BatchOrder(items, 3)
    sources = [order.batch(n)[0].item.source for n in range(60)]
    changes = sum(a != b for a, b in itertools.pairwise(sources))
    assert changes > 15


def test_every_place_is_equally_likely():
    items = [item(0, (64, 32, 5), n) for n in range(4)]
    order = BatchOrder(items, 0)
    firsts = Counter(order.batch(4 * epoch)[0].item.key for epoch in range(2000))
    assert all(abs(count - 500) < 100 for count in firsts.values())


def test_the_order_is_fixed_for_good():
    # A change here makes runs of earlier versions resume into another order.
    items = [item(0, (64, 32, 5), n, repeats=2, batch_size=3) for n in range(4)]
    order = BatchOrder(items, 42)
    shown = [[f"{d.item.name}.{d.repeat}" for d in order.batch(n)] for n in range(4)]
    assert shown == [
        ["clip2.1", "clip0.0", "clip3.0"],
        ["clip3.1", "clip1.1"],
        ["clip0.1", "clip1.0", "clip2.0"],
        ["clip3.0", "clip0.0", "clip3.1"],  # the second epoch
    ]
    assert order.batch(0)[0].seed == 2645439714981499873


# Turns -----------------------------------------------------------------------------------------


@st.composite
def turning_datasets(draw):
    """Items that stand alone beside slots of several windows, with one or more captions."""
    items = []
    for number, plain in enumerate(draw(datasets())):
        windows, captions = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        dropout = draw(st.sampled_from([0.0, 0.5]))
        for window in range(windows):
            items.append(
                replace(
                    plain,
                    key=f"{plain.key}/{number}:{window}",
                    start=window,
                    slot=f"slot{number}" if windows > 1 else "",
                    more_contexts=tuple((Path("y"), f"c{n}") for n in range(1, captions)),
                    caption_dropout=dropout,
                    empty_context=(Path("y"), "empty") if dropout else None,
                )
            )
    return items


def place(item):
    return item.slot or item.key


@given(turning_datasets(), seeds)
def test_windows_of_a_slot_take_turns_without_a_gap(items, seed):
    order = BatchOrder(items, seed)
    epochs = 12
    drawn = [d for n in range(epochs * order.batches_per_epoch) for d in order.batch(n)]
    shown = {}
    for d in drawn:
        shown.setdefault(place(d.item), {}).setdefault((d.epoch, d.repeat), []).append(d.item.key)
    windows = {}
    for i in items:
        windows.setdefault(place(i), []).append(i)
    assert order.items_per_epoch == sum(group[0].num_repeats for group in windows.values())
    assert len(drawn) == epochs * order.items_per_epoch
    for name, group in windows.items():
        repeats = group[0].num_repeats
        # One window in each appearance: none twice, none left out.
        assert all(len(keys) == 1 for keys in shown[name].values())
        assert sorted(shown[name]) == [(e, r) for e in range(epochs) for r in range(repeats)]
        row = [shown[name][at][0] for at in sorted(shown[name])]
        for start in range(0, len(row) - len(group) + 1, len(group)):
            assert sorted(row[start : start + len(group)]) == sorted(i.key for i in group)


@given(turning_datasets(), seeds)
def test_captions_take_turns_and_dropout_takes_their_place(items, seed):
    order = BatchOrder(items, seed)
    rows = {}
    for n in range(8 * order.batches_per_epoch):
        for d in order.batch(n):
            rows.setdefault(place(d.item), {})[d.epoch, d.repeat] = d
    for row in rows.values():
        draws = [row[at] for at in sorted(row)]
        item = draws[0].item
        count = len(item.contexts)
        known = {key for _, key in item.contexts} | ({"empty"} if item.caption_dropout else set())
        assert {d.context[1] for d in draws} <= known
        if not item.caption_dropout:
            for start in range(0, len(draws) - count + 1, count):
                shown = [d.context for d in draws[start : start + count]]
                assert sorted(shown) == sorted(item.contexts)


@given(turning_datasets(), seeds, st.integers(0, 30))
def test_turns_are_the_same_on_every_rank_and_after_every_resume(items, seed, position):
    shuffled = random.Random(seed).sample(items, len(items))
    assert BatchOrder(shuffled, seed).batch(position) == BatchOrder(items, seed).batch(position)


def test_options_that_are_off_leave_the_order_and_the_seeds():
    plain = [item(0, (64, 32, 5), n, repeats=2, batch_size=3) for n in range(4)]
    more = [replace(i, more_contexts=((Path("y"), "c1"),)) for i in plain]
    one, two = BatchOrder(plain, 42), BatchOrder(more, 42)
    for position in range(8):
        before, after = one.batch(position), two.batch(position)
        assert [(d.item.key, d.seed) for d in before] == [(d.item.key, d.seed) for d in after]
        assert all(d.context == (Path("y"), "c") for d in before)


# Too little data -------------------------------------------------------------------------------


@given(datasets(), st.integers(1, 8), st.integers(1, 8))
def test_the_advised_num_repeats_is_the_smallest_cure(items, world_size, accumulation):
    items = [i for i in items if i.source == 0]
    order = BatchOrder(items, 0)
    more = {"world_size": world_size, "gradient_accumulation_steps": accumulation}
    if order.batches_per_epoch >= world_size * accumulation:
        require_full_step(order, **more)
        return
    with pytest.raises(UserError) as caught:
        require_full_step(order, **more)
    assert caught.value.exit_code == 2
    repeats = int(caught.value.hint.split("num_repeats = ")[1].split(" ")[0])
    require_full_step(BatchOrder([replace(i, num_repeats=repeats) for i in items], 0), **more)
    fewer = repeats - items[0].num_repeats
    if fewer >= 1:
        with pytest.raises(DataError):
            require_full_step(BatchOrder([replace(i, num_repeats=fewer) for i in items], 0), **more)


def test_no_items_are_an_error():
    with pytest.raises(DataError, match="no items"):
        BatchOrder([], 0)
