"""`menma lora merge` and `subtract`: the model with the result acts as with the parts."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.adapters import load_adapter
from trainer.adapters.base import AdapterFile, LoRAFactors
from trainer.contract.loraid import Partition, numbers_text
from trainer.contract.loraid_metadata import loraid_metadata
from trainer.models.wan.loading import save_transformer

from .lora_tool_runs import (
    HALVES,
    best_approximation,
    content,
    deltas,
    effect,
    header,
    lora,
    same_bits,
    tool,
)
from .tiny_models import make_transformer


def use(path, strength=1.0):
    return {"path": path, "strength": strength}


@pytest.fixture
def pair(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    lora(one, rank=3, alpha=6.0, metadata={"ss_seed": "7", "ss_steps": "5"})
    lora(two, rank=2, alpha=1.0, seed=5, layout="comfy", metadata={"ss_seed": "7", "ss_steps": "9"})
    return one, two


@pytest.mark.parametrize("layout", ["kohya", "comfy", "peft"])
def test_a_merged_lora_acts_as_both(pair, tmp_path, layout):
    one, two = pair
    output = tmp_path / "both.safetensors"
    loras = [use(one, 0.8), use(two, -0.5)]
    (event,) = tool("lora_merge", loras=loras, output=output, layout=layout)
    assert event["ranks"] == {"5": 30}
    assert event["energy"] is None
    assert load_adapter(output).layout == layout
    torch.testing.assert_close(
        effect((output, 1.0)), effect((one, 0.8), (two, -0.5)), rtol=1e-5, atol=1e-5
    )
    said = header(output)
    assert said["ss_seed"] == "7"
    assert "ss_steps" not in said
    assert said["modelspec.merged_from"] == "one.safetensors, two.safetensors"
    step = json.loads(said["menma.history"])[-1]
    assert (step["tool"], step["strengths"]) == ("merge", [0.8, -0.5])


def test_the_order_of_the_files_does_not_matter(pair, tmp_path):
    three = tmp_path / "three.safetensors"
    lora(three, rank=2, seed=9)
    written = []
    for number, order in enumerate(itertools.permutations([*pair, three])):
        output = tmp_path / f"{number}.out.safetensors"
        tool("lora_merge", loras=[use(path, 0.7) for path in order], output=output)
        written.append(content(output))
    assert written == [written[0]] * 6


def test_disjoint_loras_keep_every_bit(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    scheme = {
        "ss_loraid_slots": "3",
        "ss_loraid_granularity": "module",
        "ss_loraid_allocation": "contiguous",
        "ss_loraid_num_blocks": "3",
        "ss_loraid_expert": "none",
    }
    for path, half, slot, units in ((one, "attention", "1", "0-1"), (two, "ffn", "2", "3-4")):
        said = {**scheme, "ss_loraid": slot, "ss_loraid_units": units}
        lora(path, names=HALVES[half], alpha=3.0, dtype=torch.bfloat16, metadata=said)
    output = tmp_path / "both.safetensors"
    tool("lora_merge", loras=[use(two), use(one)], output=output)
    assert load_file(output).keys() == load_file(one).keys() | load_file(two).keys()
    for path in (one, two):
        for key, value in load_file(path).items():
            assert same_bits(load_file(output)[key], value)
    said = header(output)
    assert (said["ss_loraid"], said["ss_loraid_units"]) == ("1,2", "0-1,3-4")
    assert scheme.items() <= said.items()
    mixed, plain = tmp_path / "mixed.safetensors", tmp_path / "plain.safetensors"
    lora(plain, seed=3)
    tool("lora_merge", loras=[use(one), use(plain)], output=mixed)
    assert header(mixed)["ss_loraid_shared"] == "1;mixed"


def test_what_would_round_is_written_in_fp32(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    lora(one, dtype=torch.bfloat16, alpha=4.0)
    lora(two, dtype=torch.bfloat16, alpha=4.0, seed=5)

    def merged(first, second, **options):
        output = tmp_path / "out.safetensors"
        loras = [use(one, first), use(two, second)]
        (event,) = tool("lora_merge", loras=loras, output=output, force=True, **options)
        return event

    assert merged(1.0, 1.0)["dtype"] == "bfloat16"
    assert merged(0.5, -2.0)["dtype"] == "bfloat16"
    event = merged(0.3, 1.0)
    assert event["dtype"] == "float32"
    assert "would round" in event["said"][0]
    assert merged(0.3, 1.0, dtype="bf16")["dtype"] == "bfloat16"
    assert merged(0.3, 1.0, rank=4)["dtype"] == "bfloat16"


def test_a_cut_keeps_the_largest_singular_values(pair, tmp_path):
    one, two = pair
    output = tmp_path / "both.safetensors"
    (event,) = tool("lora_merge", loras=[use(one), use(two, 0.5)], output=output, rank=2)
    assert event["ranks"] == {"2": 30}
    first, second, cut = deltas(one), deltas(two), deltas(output)
    kept = total = 0.0
    for name, found in cut.items():
        whole = first[name] + 0.5 * second[name]
        torch.testing.assert_close(found, best_approximation(whole, 2), rtol=1e-4, atol=1e-6)
        kept += float(found.square().sum())
        total += float(whole.square().sum())
        share = float(found.square().sum() / whole.square().sum())
        assert event["energy_by_module"][name] == pytest.approx(share, abs=1e-5)
    assert event["energy"] == pytest.approx(kept / total, rel=1e-4)
    (event,) = tool("lora_merge", loras=[use(one), use(two)], output=output, energy=0.9, force=True)
    assert min(event["energy_by_module"].values()) >= 0.9
    (event,) = tool("lora_merge", loras=[use(one), use(two)], output=output, rank=5, force=True)
    assert event["energy"] is None, "nothing had to be cut"


@pytest.mark.parametrize(("how", "rank"), [("cat", None), ("svd", 3)])
def test_peft_combines_to_the_same(tmp_path, how, rank):
    from peft import LoraConfig, get_peft_model

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(24, 24, bias=False)

    name, files, strengths = "blocks.0.self_attn.q", [], [0.7, -0.4]
    model = None
    for number, (own, alpha) in enumerate([(3, 6.0), (2, 1.0)]):
        path = tmp_path / f"{number}.safetensors"
        pair = lora(path, rank=own, alpha=alpha, seed=number, names=[name])[name]
        files.append(path)
        config = LoraConfig(r=own, lora_alpha=alpha, target_modules=["q"])
        if model is None:
            model = get_peft_model(Tiny(), config, adapter_name="0")
        else:
            model.add_adapter("1", config)
        layer = model.base_model.model.q
        layer.lora_A[str(number)].weight.data = pair.down_RI.clone()
        layer.lora_B[str(number)].weight.data = pair.up_OR.clone()
    model.add_weighted_adapter(["0", "1"], strengths, "sum", combination_type=how, svd_rank=rank)
    output = tmp_path / "sum.safetensors"
    loras = [use(file, s) for file, s in zip(files, strengths, strict=True)]
    tool("lora_merge", loras=loras, output=output, rank=rank)
    torch.testing.assert_close(
        deltas(output)[name].float(), layer.get_delta_weight("sum"), rtol=1e-4, atol=1e-6
    )


def test_what_was_added_can_be_taken_out(pair, tmp_path):
    one, two = pair
    both, back = tmp_path / "both.safetensors", tmp_path / "back.safetensors"
    tool("lora_merge", loras=[use(one, 0.8), use(two, 0.5)], output=both)
    tool("lora_subtract", minuend=both, loras=[use(two, 0.5)], output=back)
    torch.testing.assert_close(effect((back, 1.0)), effect((one, 0.8)), rtol=1e-5, atol=1e-5)
    small = tmp_path / "small.safetensors"
    (event,) = tool("lora_subtract", minuend=both, loras=[use(two, 0.5)], output=small, energy=1.0)
    assert event["ranks"].keys() <= {"3", "4"}, "the parts that cancel are gone"
    torch.testing.assert_close(effect((small, 1.0)), effect((one, 0.8)), rtol=1e-4, atol=1e-4)


def test_a_slot_that_is_taken_out_is_gone_from_layers_and_header(tmp_path):
    partition = Partition(num_blocks=3, slots=3, granularity="module")
    files = {}
    for slot in (1, 2, 3):
        files[slot] = tmp_path / f"{slot}.safetensors"
        said = loraid_metadata(partition, slot, expert=None)
        lora(files[slot], names=partition.modules(slot), seed=slot, metadata=said)
    both, back = tmp_path / "both.safetensors", tmp_path / "back.safetensors"
    tool("lora_merge", loras=[use(file) for file in files.values()], output=both)
    assert header(both)["ss_loraid"] == "1,2,3"
    tool("lora_subtract", minuend=both, loras=[use(files[2])], output=back, energy=1.0)
    assert set(load_adapter(back)) == {*partition.modules(1), *partition.modules(3)}
    assert header(back)["ss_loraid"] == "1,3"
    assert header(back)["ss_loraid_units"] == numbers_text(
        (*partition.units(1), *partition.units(3))
    )
    torch.testing.assert_close(
        effect((back, 1.0)), effect((files[1], 1.0), (files[3], 1.0)), rtol=1e-5, atol=1e-5
    )
    tool("lora_subtract", minuend=both, loras=[use(files[2])], output=back, force=True)
    assert header(back)["ss_loraid"] == "1,2,3", "without a cut its layers are there"


def test_a_lora_is_taken_out_of_a_merged_base(pair, tmp_path):
    one, two = pair
    base, merged, back = (tmp_path / f"{n}.safetensors" for n in ("base", "merged", "back"))
    save_transformer(make_transformer(), base)
    tool("merge", base=base, loras=[use(one, 0.8), use(two)], output=merged)
    (event,) = tool("lora_subtract", minuend=merged, loras=[use(one, 0.8)], output=back)
    assert event["said"] == []
    assert event["rounding"]["update_error"] < 1e-6
    only = tmp_path / "only.safetensors"
    tool("merge", base=base, loras=[use(two)], output=only)
    for name, value in load_file(only).items():
        torch.testing.assert_close(load_file(back)[name], value, rtol=1e-5, atol=1e-6)
    assert json.loads(header(back)["menma.merged"])[-1]["strength"] == -0.8
    (event,) = tool("lora_subtract", minuend=back, loras=[use(two, 0.5)], output=merged, force=True)
    assert "with strength 0.5, but with 1" in event["said"][0]


def test_ranks_with_timesteps_of_their_own_lose_them(tmp_path):
    one, output = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    lora(one, metadata={"menma.tlora": "{}", "ss_seed": "7"})
    loras = [use(one)]
    for job, request in (
        ("lora_merge", {"loras": loras}),
        ("lora_resize", {"input": one, "rank": 2}),
    ):
        (event,) = tool(job, **request, output=output, force=True)
        assert "one.safetensors is a T-LoRA" in event["said"][0]
        assert "menma.tlora" not in header(output)
        assert header(output)["ss_seed"] == "7"
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_transformer(make_transformer(), base)
    (event,) = tool("merge", base=base, loras=loras, output=merged)
    assert "one.safetensors is a T-LoRA" in event["said"][0]
    tool("convert", input=one, output=output, layout="peft", force=True)
    assert header(output)["menma.tlora"] == "{}"


class Hadamard(LoRAFactors):
    """A stand-in for a kind without factors."""

    kind = "loha"

    def delta(self, strength: float = 1.0) -> torch.Tensor:
        return super().delta(strength) * 2


def test_other_kinds_are_kept_alone_and_summed_as_matrices(tmp_path):
    from trainer.adapters.low_rank import Cut
    from trainer.contract.errors import ModelFileError
    from trainer.jobs.lora_sum import Energies, Part, sum_module

    path = tmp_path / "loha.safetensors"
    other = Hadamard(torch.randn(2, 24), torch.randn(24, 2), 2.0)
    plain = LoRAFactors(torch.randn(2, 24), torch.randn(24, 2), 1.0)
    both = [Part(path, other, 1.0), Part(path, plain, 0.5)]
    assert sum_module("m", both[:1], Cut(), Energies()) is other
    with pytest.raises(ModelFileError, match=r"loha\.safetensors: m is a loha update"):
        sum_module("m", both, Cut(), Energies())
    with pytest.raises(ModelFileError, match="--rank"):
        sum_module("m", [Part(path, other, 0.5)], Cut(), Energies())
    found = sum_module("m", both, Cut(max_rank=4), Energies())
    wanted = other.delta() + 0.5 * plain.delta()
    torch.testing.assert_close(found.delta(), wanted, rtol=1e-4, atol=1e-5)


def test_peft_folders_can_be_given(tmp_path):
    folder = tmp_path / "style"
    folder.mkdir()
    lora(folder / "adapter_model.safetensors", layout="peft")
    output = tmp_path / "out.safetensors"
    tool("lora_merge", loras=[use(folder, 0.5)], output=output)
    torch.testing.assert_close(effect((output, 1.0)), effect((load_adapter(folder), 0.5)))
    assert isinstance(load_adapter(output), AdapterFile)
