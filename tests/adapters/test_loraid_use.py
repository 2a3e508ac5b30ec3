"""LoRAs of slots in use: merged exactly and in any order, found by number, proved disjoint."""

from __future__ import annotations

import json
import os
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.base import AdapterFile
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.targets import linear_layers
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.events import encode
from trainer.contract.jobs import (
    ConvertRequest,
    LoRABlendRequest,
    LoraidUse,
    LoraVerifyRequest,
    MergeRequest,
)
from trainer.contract.lora_use import LoRAUse
from trainer.contract.loraid import LoraidOptions, Partition, legal_slots, partition_of
from trainer.contract.loraid_metadata import loraid_metadata, read_loraid
from trainer.jobs import lora_blend, lora_verify
from trainer.jobs.convert import convert
from trainer.jobs.lora_tools import run_merge
from trainer.jobs.loraid_files import is_of_slots, read_slot_file, resolve_loraids
from trainer.jobs.merge import merge_loras
from trainer.models.wan.loading import save_transformer

from .tiny_models import make_factors, make_transformer, model_inputs, run

PARTS = Partition(num_blocks=3, slots=3, allocation="spread")


class Events(list):
    def __call__(self, kind, /, **fields):
        encode(kind, **fields)
        self.append((kind, fields))


def write_slot(path, slot, *, parts=PARTS, expert=None, model=None, metadata=None, **more):
    model = make_transformer() if model is None else model
    names = [name for name in parts.modules(slot) if name in linear_layers(model)]
    factors = make_factors(model, names=names, seed=slot, rank=3)
    header = loraid_metadata(parts, slot, expert=expert) if metadata is None else metadata
    save_adapter(factors, path, dtype=torch.float32, metadata={**header, **more})
    return path


@pytest.fixture
def slots(tmp_path):
    folder = tmp_path / "slots"
    return [write_slot(folder / f"{slot}.safetensors", slot) for slot in (1, 2, 3)]


@pytest.fixture
def base(tmp_path):
    save_transformer(make_transformer(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def merged(base, output, files, **options):
    merge_loras(base, [LoRAUse(path=file) for file in files], output, **options)
    return load_file(output)


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_any_order_gives_the_same_bits(slots, tmp_path, dtype):
    base = tmp_path / "base.safetensors"
    save_transformer(make_transformer(), base, dtype=dtype)
    results = [
        merged(base, tmp_path / f"{index}.safetensors", order)
        for index, order in enumerate(permutations(slots))
    ]
    assert all(same(result, results[0]) for result in results)
    one_by_one = base
    for index, file in enumerate(slots):
        following = tmp_path / f"step{index}.safetensors"
        merged(one_by_one, following, [file])
        one_by_one = following
    assert same(load_file(one_by_one), results[0])


def test_ordinary_loras_do_not_give_the_same_bits_in_any_order(base, tmp_path):
    files = []
    for seed in range(3):
        files.append(tmp_path / f"whole{seed}.safetensors")
        save_adapter(make_factors(make_transformer(), seed=seed), files[-1], dtype=torch.float32)
    results = [
        merged(base, tmp_path / f"{index}.safetensors", order)
        for index, order in enumerate(permutations(files))
    ]
    assert not all(same(result, results[0]) for result in results)


def test_removing_one_restores_the_others(base, slots, tmp_path):
    everything = merged(base, tmp_path / "all.safetensors", slots)
    original = load_file(base)
    for number, (left, gone) in enumerate(
        ((slots[:2], slots[2]), (slots[1:], slots[0]), ([slots[0], slots[2]], slots[1]))
    ):
        without = merged(base, tmp_path / f"without{number}.safetensors", left)
        own = {f"{name}.weight" for name in load_adapter(gone)}
        assert own
        restored = {n: original[n] if n in own else t for n, t in everything.items()}
        assert same(restored, without)


@torch.no_grad()
def test_attaching_in_any_order_and_detaching_are_exact():
    factors = [
        make_factors(make_transformer(), names=PARTS.modules(slot), seed=slot) for slot in (1, 2, 3)
    ]
    outputs = []
    for order in permutations(range(3)):
        model = make_transformer()
        inputs = model_inputs(model)
        attached = {index: attach(model, _as_file(factors[index])) for index in order}
        outputs.append(run(model, inputs))
        attached[1].detach()
        two = make_transformer()
        for index in (0, 2):
            attach(two, _as_file(factors[index]))
        assert torch.equal(run(model, inputs), run(two, inputs))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def _as_file(modules):
    return AdapterFile(modules, path=Path("slot"), layout="comfy", metadata={})


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("granularity", ["pair", "block", "module", "linear"])
@pytest.mark.parametrize("allocation", ["contiguous", "spread"])
def test_slots_of_every_legal_number_add_up_to_the_whole_in_any_order(
    image, granularity, allocation
):
    model = make_transformer(image=image)
    whole = make_factors(model)
    expected = make_transformer(image=image)
    merge_into(expected, _as_file(whole))
    for count in legal_slots(3, granularity, allocation, image=image)[1::3]:
        options = LoraidOptions(slot=1, slots=count, granularity=granularity, allocation=allocation)
        parts = partition_of(options, linear_layers(model))
        result = make_transformer(image=image)
        for slot in reversed(range(1, count + 1)):
            merge_into(result, _as_file({name: whole[name] for name in parts.modules(slot)}))
        assert same(result.state_dict(), expected.state_dict())


def request(base, output, loraids, sources, **more):
    return MergeRequest(
        base=base, output=output, loraids=tuple(loraids), loraid_from=tuple(sources), **more
    )


def uses(*slots, **strengths):
    return [LoraidUse(slot=slot, strength=strengths.get(f"s{slot}", 1.0)) for slot in slots]


def test_slots_are_found_by_number_and_merged_as_their_files_would_be(base, slots, tmp_path):
    output = tmp_path / "found.safetensors"
    run_merge(request(base, output, uses(3, 1, s3=0.5), [slots[0].parent]), Events())
    direct = tmp_path / "direct.safetensors"
    merge_loras(base, [LoRAUse(path=slots[2], strength=0.5), LoRAUse(path=slots[0])], direct)
    assert same(load_file(output), load_file(direct))


def test_strength_zero_switches_a_slot_off_even_without_its_file(base, slots, tmp_path):
    output = tmp_path / "two.safetensors"
    run_merge(request(base, output, uses(1, 2, 7, s2=0, s7=0), slots), Events())
    assert same(load_file(output), merged(base, tmp_path / "one.safetensors", slots[:1]))
    with pytest.raises(ConfigError, match="nothing to merge"):
        run_merge(request(base, tmp_path / "x.safetensors", uses(1, s1=0), slots), Events())


def test_the_merged_model_says_which_slots_are_inside(base, slots, tmp_path):
    output = tmp_path / "merged.safetensors"
    run_merge(request(base, output, uses(1, 2), slots), Events())
    with safe_open(output, "pt") as file:
        parts = json.loads(file.metadata()["menma.merged"])
    assert [read_loraid(part).ids for part in parts] == [(1,), (2,)]
    assert [part["file"] for part in parts] == ["1.safetensors", "2.safetensors"]


def test_files_are_found_in_runs_with_the_newest_of_each(tmp_path):
    for slot in (1, 2):
        for age, step in enumerate(("", "-step00000010")):
            path = tmp_path / "runs" / f"slot{slot}" / "output" / f"slot{slot}{step}.safetensors"
            write_slot(path, slot)
            os.utime(path, (1000 - age, 1000 - age))
    found = resolve_loraids(uses(2, 1), [tmp_path / "runs"])
    assert [use.path.name for use in found] == ["slot2.safetensors", "slot1.safetensors"]
    (own,) = resolve_loraids(uses(1), [tmp_path / "runs" / "slot1"])
    assert own.path.name == "slot1.safetensors"


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        (uses(1, 4), ConfigError, "no file of slot 4"),
        (uses(2, 2), ConfigError, "slot 2 is given twice"),
    ],
)
def test_missing_and_repeated_slots_are_named(slots, wanted, error, words):
    with pytest.raises(error, match=words) as caught:
        resolve_loraids(wanted, [slots[0].parent])
    assert words != "no file of slot 4" or caught.value.hint == "slots 1, 2, 3 are there"


def test_a_run_s_own_lora_is_told_to_be_of_a_slot_that_is_asked_for(slots, tmp_path):
    assert is_of_slots(slots[0], uses(1, 2, s1=0))
    assert not is_of_slots(slots[2], uses(1, 2))
    assert not is_of_slots(slots[0], [])
    plain = tmp_path / "plain.safetensors"
    save_adapter(make_factors(make_transformer()), plain)
    assert not is_of_slots(plain, uses(1))


def test_two_files_of_one_slot_are_refused_by_name(slots):
    again = write_slot(slots[0].parent / "again.safetensors", 2)
    with pytest.raises(ConfigError, match=r"2\.safetensors and .*again\.safetensors are both"):
        resolve_loraids(uses(1, 2), [slots[0].parent, again])
    assert len(resolve_loraids(uses(1, 2), [*slots])) == 2


def test_a_named_file_without_a_slot_is_refused_and_passed_over_in_a_folder(slots):
    plain = slots[0].parent / "plain.safetensors"
    save_adapter(make_factors(make_transformer()), plain, dtype=torch.float32)
    with pytest.raises(ModelFileError, match="does not say which slot"):
        resolve_loraids(uses(1), [plain])
    assert len(resolve_loraids(uses(1, 2, 3), [plain.parent])) == 3


def test_files_of_another_scheme_or_outside_their_slot_are_refused(tmp_path, slots):
    other = write_slot(tmp_path / "o.safetensors", 4, parts=Partition(num_blocks=3, slots=6))
    with pytest.raises(ModelFileError, match=r"different numbers of slots: 3: .*; 6: "):
        resolve_loraids(uses(1, 4), [slots[0], other])
    liar = write_slot(
        tmp_path / "l.safetensors", 1, metadata=loraid_metadata(PARTS, 2, expert=None)
    )
    with pytest.raises(ModelFileError, match="both change 10 layers"):
        resolve_loraids(uses(1, 2), [slots[0], liar])
    with pytest.raises(ModelFileError, match=r"l\.safetensors: 10 layers are not of the slot"):
        resolve_loraids(uses(2), [liar])


def test_each_expert_has_its_own_file_of_a_slot(tmp_path):
    files = [
        write_slot(tmp_path / f"{expert}.safetensors", 1, expert=expert)
        for expert in ("high_noise", "low_noise")
    ]
    both = resolve_loraids(uses(1), [tmp_path], both_experts=True)
    assert {(use.path, use.expert) for use in both} == {
        (files[0], "high_noise"), (files[1], "low_noise"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="slot 1 is there for both experts"):
        resolve_loraids(uses(1), [tmp_path])
    (one,) = resolve_loraids(uses(1), [tmp_path], expert="low_noise")
    assert one.path == files[1]
    (named,) = resolve_loraids([LoraidUse(slot=1, expert="high_noise")], [tmp_path])
    assert named.path == files[0]


def verify(*paths):
    events = Events()
    lora_verify.run(LoraVerifyRequest(paths=tuple(paths)), events)
    files = [fields["file"] for kind, fields in events if "file" in fields]
    overlaps = [fields["overlap"] for kind, fields in events if "overlap" in fields]
    return files, overlaps, events[-1][1]


def test_disjoint_files_and_free_slots(slots):
    files, overlaps, end = verify(slots[0], slots[2])
    assert end["disjoint"] is True
    assert overlaps == []
    assert end["free"] == {"none": [2]}
    assert end["disagreements"] == {}
    assert [file["ids"] for file in files] == [[1], [3]]
    assert all(file["num_outside"] == 0 for file in files)


def test_overlaps_are_named_by_layer_whatever_the_header_says(slots, tmp_path):
    half = tmp_path / "half.safetensors"
    model = make_transformer()
    names = [*PARTS.modules(1)[:2], *PARTS.modules(2)[:1]]
    save_adapter(make_factors(model, names=names), half, dtype=torch.float32)
    files, overlaps, end = verify(slots[0], half, slots[2])
    assert end["disjoint"] is False
    ((overlap),) = overlaps
    assert overlap["files"] == [str(slots[0]), str(half)]
    assert set(overlap["modules"]) == set(PARTS.modules(1)[:2])
    assert end["free"] == {"none": []}  # the plain LoRA is in slot 2, too
    assert files[1]["ids"] is None


def test_what_lies_outside_its_slot_is_told(tmp_path):
    header = loraid_metadata(PARTS, 2, expert=None)
    path = write_slot(tmp_path / "a.safetensors", 1, metadata=header)
    assert set(read_slot_file(path).outside) == set(PARTS.modules(1))
    model = make_transformer(image=True)
    for granularity in ("pair", "linear"):
        parts = Partition(num_blocks=3, slots=4, granularity=granularity, image=True)
        for slot in range(1, 5):
            path = write_slot(tmp_path / "i.safetensors", slot, parts=parts, model=model)
            assert read_slot_file(path).outside == ()


def test_disagreements_are_told_by_subject(slots, tmp_path):
    parts = Partition(num_blocks=3, slots=6, granularity="module")
    other = write_slot(tmp_path / "b.safetensors", 6, parts=parts, expert="high_noise")
    _, _, end = verify(slots[0], other)
    assert set(end["disagreements"]) == {"slots", "granularity", "allocation", "expert"}
    assert end["disagreements"]["slots"] == {"3": [str(slots[0])], "6": [str(other)]}
    assert end["free"] is None


def test_loras_of_models_of_other_sizes_disagree(slots, tmp_path):
    wide = make_transformer(dim=32, ffn_dim=64)
    other = write_slot(tmp_path / "wide.safetensors", 2, model=wide)
    _, overlaps, end = verify(slots[0], other)
    assert overlaps == []
    assert any("width 32" in model for model in end["disagreements"]["model_sizes"])
    with pytest.raises(ModelFileError, match="of different models"):
        resolve_loraids(uses(1, 2), [slots[0], other])


def test_shared_files_are_not_held_to_be_separate(slots, tmp_path):
    shared = write_slot(tmp_path / "s.safetensors", 1, ss_loraid_shared="1,2;a=0.5")
    _, overlaps, end = verify(slots[0], shared)
    assert end["disjoint"] is True
    assert [overlap["shared"] for overlap in overlaps] == [True]


def test_experts_do_not_meet(tmp_path):
    files = [
        write_slot(tmp_path / f"{expert}.safetensors", 1, expert=expert)
        for expert in ("high_noise", "low_noise")
    ]
    _, overlaps, end = verify(*files)
    assert (overlaps, end["disjoint"]) == ([], True)
    assert end["free"] == {"high": [2, 3], "low": [2, 3]}
    assert set(end["disagreements"]) == {"expert"}


def test_ordinary_loras_of_two_experts_do_not_meet(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for path, expert in zip(files, ("high_noise", "low_noise", "high_noise"), strict=True):
        metadata = {"menma.expert": expert}
        save_adapter(make_factors(make_transformer()), path, metadata=metadata)
    told, overlaps, end = verify(*files)
    assert [file["expert"] for file in told] == ["high", "low", "high"]
    assert [overlap["files"] for overlap in overlaps] == [[str(files[0]), str(files[2])]]
    assert set(end["disagreements"]) == {"expert"}


@pytest.fixture
def pairs(tmp_path):
    """Slots 1 and 2, each with both experts in one file."""
    made = []
    for slot in (1, 2):
        high, low = (
            write_slot(tmp_path / f"{slot}{expert}.safetensors", slot, expert=expert)
            for expert in ("high_noise", "low_noise")
        )
        made.append(tmp_path / "pairs" / f"{slot}.safetensors")
        convert(ConvertRequest(input=high, join=low, output=made[-1], layout="peft"))
    return made


def test_files_with_both_experts_are_verified_part_by_part(pairs):
    told, overlaps, end = verify(*pairs)
    assert [file["expert"] for file in told] == ["high", "low"] * 2
    assert (overlaps, end["disjoint"], end["free"]) == ([], True, {"high": [3], "low": [3]})
    assert end["disagreements"] == {}


def test_slots_are_merged_from_files_with_both_experts(pairs, base, tmp_path):
    high = tmp_path / "high.safetensors"
    save_transformer(make_transformer(seed=1), high)
    for name, sources in (("one", [pairs[0].parent]), ("two", [tmp_path])):
        output = tmp_path / "out" / f"{name}.safetensors"
        run_merge(request(base, output, uses(1, 2), sources, base_high_noise=high), Events())
    for expert in ("high_noise", "low_noise"):
        one, two = (output.with_stem(f"{name}_{expert}") for name in ("one", "two"))
        assert same(load_file(one), load_file(two))
    with pytest.raises(ConfigError, match="slot 1 is there for both experts"):
        run_merge(request(base, tmp_path / "x.safetensors", uses(1), pairs), Events())


def test_split_files_say_slot_and_expert(pairs, tmp_path):
    output = tmp_path / "back.safetensors"
    convert(ConvertRequest(input=pairs[1], output=output, layout="kohya", split=True))
    for expert, word in (("high_noise", "high"), ("low_noise", "low")):
        told = read_slot_file(output.with_stem(f"back_{expert}")).loraid
        assert (told.ids, told.expert, told.units) == ((2,), word, PARTS.units(2))


def test_a_pair_of_different_slots_is_of_no_slot(tmp_path):
    high = write_slot(tmp_path / "a.safetensors", 1, expert="high_noise")
    low = write_slot(tmp_path / "b.safetensors", 2, expert="low_noise")
    convert(ConvertRequest(input=high, join=low, output=tmp_path / "c.safetensors"))
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert not any(key.startswith("ss_loraid") for key in file.metadata())


def test_slots_of_two_experts_do_not_go_into_one_base(tmp_path, base):
    write_slot(tmp_path / "a.safetensors", 1, expert="high_noise")
    write_slot(tmp_path / "b.safetensors", 2, expert="low_noise")
    with pytest.raises(ModelFileError, match=r"is for the high-noise expert, .*low-noise one"):
        run_merge(request(base, tmp_path / "x.safetensors", uses(1, 2), [tmp_path]), Events())


def test_a_blended_slot_no_longer_names_patterns_of_its_slot(slots, tmp_path):
    table = {"ss_network_args": '{"include": []}'}
    own = write_slot(tmp_path / "own.safetensors", 1, **table)
    request = LoRABlendRequest(
        files=[LoRAUse(path=own), LoRAUse(path=slots[1])], share=0.5, output=tmp_path / "blend"
    )
    lora_blend.run(request, Events())
    with safe_open(tmp_path / "blend" / "own.safetensors", "pt") as file:
        assert "ss_network_args" not in file.metadata()
        assert read_loraid(file.metadata()).shared


def test_older_files_are_whole_blocks_with_a_note(tmp_path):
    files = []
    for number in (1, 2):
        files.append(tmp_path / f"{number}.safetensors")
        names = [f"blocks.{number}.ffn.0"]
        header = {"ss_loraid": str(number)}
        save_adapter(make_factors(make_transformer(), names=names), files[-1], metadata=header)
    told, _, end = verify(*files)
    assert end["disjoint"] is True
    assert end["free"] is None
    assert told[1]["units"] == "12-23"
    assert any("12 whole blocks" in note for note in told[1]["notes"])
    assert [use.path for use in resolve_loraids(uses(2, 1), files)] == files[::-1]


def test_damaged_files_are_named(tmp_path, slots):
    broken = write_slot(tmp_path / "x.safetensors", 1, ss_loraid_slots="many")
    with pytest.raises(ModelFileError, match=r"x\.safetensors: ss_loraid_slots is 'many'"):
        verify(slots[0], broken)
    with pytest.raises(ConfigError, match="is given twice"):
        verify(slots[0], slots[0])


def test_every_pair_is_compared(slots):
    copies = [write_slot(slots[0].parent / f"copy{slot}.safetensors", slot) for slot in (1, 2, 3)]
    _, overlaps, end = verify(*slots, *copies)
    met = {tuple(overlap["files"]) for overlap in overlaps}
    assert met == {(str(a), str(b)) for a, b in zip(slots, copies, strict=True)}
    assert len(list(combinations(range(6), 2))) > len(met)
    assert end["disjoint"] is False
