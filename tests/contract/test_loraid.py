"""Who owns what: the partition is complete and disjoint, and the published tables come out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.loraid import (
    LoraidOptions,
    Partition,
    in_slot,
    in_words,
    include_patterns,
    legal_slots,
    numbers_text,
    parse_numbers,
    partition_of,
)
from trainer.contract.loraid_metadata import (
    Loraid,
    as_metadata,
    joined_loraid,
    loraid_metadata,
    read_loraid,
)
from trainer.contract.memory_model.weights import block_layers
from trainer.contract.variants import VARIANTS

MODELS = {
    "14B": VARIANTS["wan2.1-t2v-14b"].transformer,
    "1.3B": VARIANTS["wan2.1-t2v-1.3b"].transformer,
    "I2V 14B": VARIANTS["wan2.1-i2v-14b"].transformer,
}
GRANULARITIES = ("pair", "block", "module", "linear")


def names_of(shape):
    return [f"blocks.{i}.{name}" for i in range(shape.num_layers) for name in block_layers(shape)]


def partition(shape, slots, granularity="pair", allocation="contiguous"):
    return Partition(
        num_blocks=shape.num_layers,
        slots=slots,
        granularity=granularity,
        allocation=allocation,
        image=shape.image_dim is not None,
    )


def per_rank(shape, modules):
    """Parameters of a LoRA of rank 1 on these layers."""
    layers = block_layers(shape)
    return sum(sum(layers[name.split(".", 2)[2]]) for name in modules)


@pytest.mark.parametrize("allocation", ["contiguous", "spread"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model", MODELS)
def test_every_legal_number_of_slots_is_a_partition_of_all_layers(model, granularity, allocation):
    shape = MODELS[model]
    everything = sorted(names_of(shape))
    legal = legal_slots(
        shape.num_layers, granularity, allocation, image=shape.image_dim is not None
    )
    for slots in legal:
        parts = partition(shape, slots, granularity, allocation)
        units = [parts.units(slot) for slot in range(1, slots + 1)]
        assert sorted(unit for own in units for unit in own) == list(range(parts.num_units))
        sizes = {len(own) for own in units}
        assert 0 not in sizes
        assert max(sizes) - min(sizes) <= (allocation == "contiguous")
        assert all(own == tuple(sorted(own)) for own in units)
    for parts in (partition(shape, slots, granularity, allocation) for slots in legal[:40:9]):
        owned = [parts.modules(slot) for slot in range(1, parts.slots + 1)]
        assert sorted(name for own in owned for name in own) == everything
    if allocation == "contiguous":
        assert legal == tuple(range(1, parts.num_units + 1))


@pytest.mark.parametrize(
    ("model", "units"),
    [
        ("14B", {"pair": 240, "block": 40, "module": 120, "linear": 400}),
        ("1.3B", {"pair": 180, "block": 30, "module": 90, "linear": 300}),
        ("I2V 14B", {"pair": 240, "block": 40, "module": 120, "linear": 480}),
    ],
)
def test_units_are_as_many_as_published(model, units):
    assert {g: partition(MODELS[model], 1, g).num_units for g in GRANULARITIES} == units


def test_legal_numbers_of_spread_slots():
    assert legal_slots(40, "pair", "spread") == (1, 2, 4, 5, 8, 10, 20, 40, 80, 120, 240)
    assert legal_slots(30, "pair", "spread") == (1, 2, 3, 5, 6, 10, 15, 30, 60, 90, 180)


@pytest.mark.parametrize(
    ("slots", "units", "smallest", "largest"),
    [
        (20, 12, 239_616, 239_616),
        (40, 6, 119_808, 119_808),
        (80, 3, 58_368, 61_440),
        (120, 2, 37_888, 40_960),
        (240, 1, 18_944, 20_480),
    ],
)
def test_contiguous_slots_of_14b_are_as_large_as_published(slots, units, smallest, largest):
    shape = MODELS["14B"]
    parts = partition(shape, slots)
    sizes = [per_rank(shape, parts.modules(slot)) for slot in range(1, slots + 1)]
    assert {len(parts.units(slot)) for slot in range(1, slots + 1)} == {units}
    assert (min(sizes), max(sizes)) == (smallest, largest)


def test_the_first_and_last_of_twenty_contiguous_slots_are_two_whole_blocks():
    parts = partition(MODELS["14B"], 20)
    assert parts.units(1) == tuple(range(12))
    assert {name.split(".")[1] for name in parts.modules(20)} == {"38", "39"}
    assert len(parts.modules(20)) == 20


def test_twenty_spread_slots_have_two_of_each_kind_in_twelve_blocks():
    shape = MODELS["14B"]
    parts = partition(shape, 20, allocation="spread")
    for slot in range(1, 21):
        places = [divmod(unit, 6) for unit in parts.units(slot)]
        assert Counter(part for _, part in places) == dict.fromkeys(range(6), 2)
        assert len({block for block, _ in places}) == 12
        assert per_rank(shape, parts.modules(slot)) == 239_616
    assert [divmod(unit, 6) for unit in parts.units(1)] == [
        (0, 0), (5, 5), (8, 4), (11, 3), (14, 2), (17, 1),
        (20, 0), (25, 5), (28, 4), (31, 3), (34, 2), (37, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("slots", "units", "size"), [(40, 6, 119_808), (80, 3, 59_904)])
def test_forty_and_eighty_spread_slots_are_equal(slots, units, size):
    shape = MODELS["14B"]
    parts = partition(shape, slots, allocation="spread")
    for slot in range(1, slots + 1):
        assert len(parts.units(slot)) == units
        assert len({unit // 6 for unit in parts.units(slot)}) == (6 if slots == 40 else 3)
        assert per_rank(shape, parts.modules(slot)) == size


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("14B", [20_480] * 4 + [18_944] * 2),
        ("I2V 14B", [20_480] * 2 + [30_720] * 2 + [18_944] * 2),
        ("1.3B", [6_144] * 4 + [10_496] * 2),
    ],
)
def test_units_are_as_large_as_published(model, expected):
    shape = MODELS[model]
    parts = partition(shape, 1)
    assert [per_rank(shape, parts.modules_of_unit(unit)) for unit in range(6)] == expected


@pytest.mark.parametrize(
    ("slots", "allocation", "hint"),
    [
        (0, "contiguous", "use 1 to 240"),
        (241, "contiguous", "use 1 to 240"),
        (3, "spread", 'use 1, 2, 4, 5, 8, 10, 20, 40, 80, 120, 240; allocation = "contiguous"'),
        (241, "spread", "120, 240"),
    ],
)
def test_other_numbers_are_refused_with_the_legal_ones(slots, allocation, hint):
    with pytest.raises(ConfigError, match=f"40 blocks cannot be dealt out to {slots}") as caught:
        Partition(num_blocks=40, slots=slots, allocation=allocation)
    assert hint in caught.value.hint


def test_a_layer_knows_its_slot():
    parts = partition(MODELS["I2V 14B"], 20, allocation="spread")
    for slot in (1, 7, 20):
        assert {parts.slot_of(name) for name in parts.modules(slot)} == {slot}
    assert parts.slot_of("head.head") is None
    assert parts.slot_of("blocks.40.ffn.0") is None


def test_a_selection_is_narrowed_to_the_slot():
    shape = MODELS["1.3B"]
    names = names_of(shape)
    options = LoraidOptions(slot=2, slots=30)
    attention = [name for name in names if "_attn." in name]
    assert in_slot(attention, names, options) == tuple(n for n in attention if ".1." in n[:9])
    assert in_slot(attention, names, None) == tuple(attention)


def test_the_number_of_blocks_and_the_image_branch_come_from_the_names():
    shape = MODELS["I2V 14B"]
    assert partition_of(LoraidOptions(slot=1, slots=2), names_of(shape)) == partition(shape, 2)
    assert partition_of(LoraidOptions(slot=1, slots=2), ["blocks.6.ffn.0", "x"]).num_blocks == 7


@pytest.mark.parametrize(
    ("options", "chosen", "key", "words"),
    [
        ({"slot": 5, "slots": 4}, "blocks.", "adapter.loraid.slot", "no slot 5 of 4"),
        ({"slot": 1, "slots": 181}, "blocks.", "adapter.loraid.slots", "use 1 to 180"),
        ({"slot": 1, "slots": 30}, "blocks.3.", "adapter.loraid.slot", "in block 0"),
        ({"slot": 1, "slots": 30}, "head.", "adapter.include", "head.head belongs to no slot"),
    ],
)
def test_what_a_slot_cannot_be_is_told_with_its_key(options, chosen, key, words):
    names = [*names_of(MODELS["1.3B"]), "head.head"]
    selection = [name for name in names if name.startswith(chosen)]
    with pytest.raises(ConfigError) as caught:
        in_slot(selection, names, LoraidOptions(**options))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert words in str(problem)


def test_layers_in_words_and_as_patterns():
    modules = partition(MODELS["14B"], 20).modules(1)
    kinds = ", ".join(block_layers(MODELS["14B"]))
    assert in_words(modules) == f"{kinds} in blocks 0-1"
    assert in_words(["blocks.3.ffn.0"]) == "ffn.0 in block 3"
    assert include_patterns(["blocks.0.ffn.2", "blocks.7.ffn.2"]) == (r"blocks\.(?:0|7)\.ffn\.2",)


@given(st.sets(st.integers(0, 999_999), max_size=40))
def test_numbers_are_read_back(numbers):
    assert parse_numbers(numbers_text(sorted(numbers))) == tuple(sorted(numbers))


@given(st.integers(0, 500), st.integers(1, 60))
def test_neighbours_are_written_as_one_range(first, count):
    text = numbers_text(range(first, first + count))
    assert text == (str(first) if count == 1 else f"{first}-{first + count - 1}")


@given(st.text(alphabet="0123456789-, ", max_size=12))
def test_whatever_is_read_ascends(text):
    try:
        numbers = parse_numbers(text)
    except ValueError:
        return
    assert list(numbers) == sorted(set(numbers))
    assert parse_numbers(numbers_text(numbers)) == numbers


def test_joined_texts_are_one_list():
    assert parse_numbers("12-14,0-2,1,13") == (0, 1, 2, 12, 13, 14)


@pytest.mark.parametrize("text", ["3-2", "a", "1-", "-1", "0-999999", "1,,2", " 1"])
def test_what_is_no_list_of_units_is_refused(text):
    with pytest.raises(ValueError, match="'"):
        parse_numbers(text)


PARTITIONS = st.sampled_from(
    [
        Partition(num_blocks=b, slots=n, granularity=g, allocation=a)
        for b in (2, 4, 6)
        for g in GRANULARITIES
        for a in ("contiguous", "spread")
        for n in legal_slots(b, g, a)
    ]
)


@given(PARTITIONS, st.integers(0, 10**6), st.sampled_from([None, "high_noise", "low_noise"]))
def test_metadata_is_read_back(parts, number, expert):
    slot = 1 + number % parts.slots
    table = loraid_metadata(parts, slot, expert=expert)
    read = read_loraid(table)
    assert read is not None
    assert (read.ids, read.units) == ((slot,), parts.units(slot))
    assert read.partition(image=False) == parts
    assert loraid_metadata(parts, slot, expert="shared")["ss_loraid_expert"] == "none"
    assert read.expert == {None: "none", "high_noise": "high", "low_noise": "low"}[expert]
    assert as_metadata(read) == table
    assert set(table) == {
        "ss_loraid", "ss_loraid_slots", "ss_loraid_granularity", "ss_loraid_allocation",
        "ss_loraid_num_blocks", "ss_loraid_expert", "ss_loraid_units",
    }  # fmt: skip


def test_a_file_that_says_only_its_number_is_twelve_whole_blocks():
    read = read_loraid({"ss_loraid": "3", "ss_loraid_include_patterns": "[]"})
    assert read is not None
    assert read.units == tuple(range(24, 36))
    assert (read.granularity, read.slots, read.num_blocks) == ("block", None, None)
    assert "12 whole blocks" in read.note
    assert read.partition(image=False) is None
    assert read_loraid({"ss_seed": "1"}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ss_loraid": "0"}, "ss_loraid is '0', it must be the number of a slot"),
        ({"ss_loraid": "x"}, "ss_loraid is 'x'"),
        ({"ss_loraid": "9"}, "a slot from 1 to 4"),
        ({"ss_loraid_slots": "-4"}, "ss_loraid_slots is '-4', it must be a whole number"),
        ({"ss_loraid_slots": None}, "ss_loraid_slots is missing"),
        ({"ss_loraid_granularity": "row"}, "one of pair, block, module, linear"),
        ({"ss_loraid_allocation": "random"}, "one of contiguous, spread"),
        ({"ss_loraid_num_blocks": "many"}, "ss_loraid_num_blocks"),
        ({"ss_loraid_expert": "middle"}, "one of none, high, low"),
        ({"ss_loraid_units": "4-2"}, "numbers such as 0-11,30"),
    ],
)
def test_a_damaged_header_is_named(change, words):
    table = loraid_metadata(Partition(num_blocks=4, slots=4), 1, expert=None) | change
    broken = {key: value for key, value in table.items() if value is not None}
    with pytest.raises(ModelFileError, match=r"a\.safetensors") as caught:
        read_loraid(broken, "a.safetensors")
    assert words in caught.value.message


def test_slots_of_one_scheme_join_and_others_are_marked_as_shared():
    parts = Partition(num_blocks=4, slots=4)
    one, three = (loraid_metadata(parts, slot, expert="high_noise") for slot in (1, 3))
    both = read_loraid(joined_loraid([three, one]))
    assert both == Loraid(
        ids=(1, 3), slots=4, granularity="pair", num_blocks=4, expert="high",
        units=(*parts.units(1), *parts.units(3)),
    )  # fmt: skip
    assert joined_loraid([one, one]) == one
    other = loraid_metadata(Partition(num_blocks=4, slots=2), 2, expert="high_noise")
    for mixed in ([one, other], [one, {"ss_seed": "1"}]):
        read = read_loraid(joined_loraid(mixed))
        assert read is not None
        assert read.shared.endswith("mixed")
    assert joined_loraid([{}, {"ss_seed": "1"}]) == {}
