"""A slot in training: what is wrapped, what the file says, what is refused before the start."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from trainer.adapters import load_adapter
from trainer.adapters.lora import LoRA
from trainer.adapters.targets import linear_layers
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config_io import load_config, load_config_with_sources, place_problems
from trainer.contract.errors import ConfigError
from trainer.contract.loraid import LoraidOptions, partition_of
from trainer.contract.loraid_metadata import read_loraid
from trainer.contract.memory_model.trained import find_targets
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.targets import plan_layers
from trainer.contract.variants import TransformerConfig, get_variant
from trainer.core.seams import BuildContext
from trainer.jobs.adapter_checks import adapter_problems
from trainer.jobs.convert import convert_lora
from trainer.jobs.loraid_checks import slot_in_words
from trainer.models.wan.loading import save_transformer

from .tiny_models import SIZES, make_transformer

BUILD = BuildContext(
    variant=get_variant("wan2.1-t2v-1.3b"), seed=3, device=torch.device("cpu"), total_steps=10
)


def adapter_of(**options) -> LoRA:
    return LoRA(LoRA.Config(**options), BUILD)


def layers_of(adapter) -> set[str]:
    return {name.rpartition(".")[0] for name in adapter.trainable()}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("granularity", ["pair", "block", "module", "linear"])
def test_the_slots_of_a_model_together_train_what_one_lora_would(image, granularity):
    everything = layers_of(_injected(adapter_of(), image=image))
    found = []
    for slot in (1, 2, 3):
        loraid = {"slot": slot, "slots": 3, "granularity": granularity}
        found.append(layers_of(_injected(adapter_of(loraid=loraid), image=image)))
    assert sorted(name for own in found for name in own) == sorted(everything)


def _injected(adapter, *, image=False):
    adapter.inject(make_transformer(image=image), 1)
    return adapter


def test_every_kind_but_the_full_fine_tune_has_slots():
    with_slots = [e.name for e in ADAPTERS if "loraid" in ADAPTERS.load(e.name).Config.model_fields]
    assert with_slots == [name for name in ADAPTERS.names if name != "none"]


def test_exclude_narrows_the_slot_and_nothing_left_is_refused():
    loraid = {"slot": 2, "slots": 3}
    assert layers_of(_injected(adapter_of(loraid=loraid, exclude=[r".*_attn\..*"]))) == {
        "blocks.1.ffn.0",
        "blocks.1.ffn.2",
    }
    with pytest.raises(ConfigError, match="owns none of the 10 layers") as caught:
        _injected(adapter_of(loraid=loraid, exclude=[".*"], include=[r"blocks\.0\..*"]))
    assert caught.value.problems[0].key == "adapter.loraid.slot"


def test_initial_weights_of_a_layer_do_not_depend_on_the_slot():
    whole = _injected(adapter_of()).trainable()
    part = _injected(adapter_of(loraid={"slot": 2, "slots": 4, "granularity": "pair"})).trainable()
    assert part
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


@pytest.mark.parametrize("layout", ["comfy", "kohya", "peft"])
def test_the_file_says_which_slot_it_is_and_conversion_keeps_it(tmp_path, layout):
    loraid = {"slot": 3, "slots": 18, "allocation": "contiguous"}
    adapter = _injected(adapter_of(loraid=loraid))
    state = {name: torch.ones_like(value) for name, value in adapter.trainable().items()}
    path = tmp_path / "three.safetensors"
    metadata = {"menma.expert": "low_noise", "menma.kind": "lora"}
    adapter.write_output(state, path, layout=layout, dtype=torch.float32, metadata=metadata)
    told = read_loraid(load_adapter(path).metadata)
    assert told is not None
    assert (told.ids, told.slots, told.num_blocks, told.expert) == ((3,), 18, 3, "low")
    assert told.units == (2,)
    other = "kohya" if layout == "comfy" else "comfy"
    convert_lora(path, tmp_path / "converted.safetensors", layout=other)
    assert read_loraid(load_adapter(tmp_path / "converted.safetensors").metadata) == told


def test_the_file_names_patterns_that_choose_the_same_layers_without_loraid(tmp_path):
    adapter = _injected(adapter_of(loraid={"slot": 1, "slots": 9, "allocation": "spread"}))
    path = tmp_path / "a.safetensors"
    state = dict(adapter.trainable())
    adapter.write_output(state, path, layout="comfy", dtype=torch.float32, metadata={})
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["ss_network_args"])
    names = linear_layers(make_transformer())
    again = plan_layers(names, {key: told[key] for key in ("include", "exclude")})
    assert set(again) == layers_of(adapter)
    assert told["loraid"] == {"slot": 1, "slots": 9, "allocation": "spread"}


CONFIG = """\
[model]
variant = "wan2.1-t2v-1.3b"
{model}

[adapter]
rank = 4

[adapter.loraid]
slot = {slot}
slots = {slots}
{more}
"""


def write(tmp_path, slot, slots, more="", model=""):
    path = tmp_path / "slot.toml"
    path.write_text(CONFIG.format(slot=slot, slots=slots, more=more, model=model))
    return path


@pytest.mark.parametrize(
    ("text", "key", "line", "words"),
    [
        ({"slot": 3, "slots": 2}, "adapter.loraid.slot", 9, "no slot 3 of 2"),
        ({"slot": 0, "slots": 2}, "adapter.loraid.slot", 9, "greater than or equal to 1"),
        ({"slot": '"a"', "slots": 2}, "adapter.loraid.slot", 9, "valid integer"),
        ({"slot": 1, "slots": 2, "more": "alocation = 1"}, "adapter.loraid.alocation", 11,
         "did you mean 'allocation'?"),
        ({"slot": 1, "slots": 2, "more": 'granularity = "row"'}, "adapter.loraid.granularity", 11,
         "'pair', 'block', 'module' or 'linear'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_table_are_told_with_key_and_line(tmp_path, text, key, line, words):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, **text))
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == (key, line)
    assert words in str(problem)


def test_a_required_number_that_is_missing_is_named(tmp_path):
    path = tmp_path / "half.toml"
    path.write_text("[adapter.loraid]\nslot = 1\n")
    with pytest.raises(ConfigError, match=r"adapter\.loraid\.slots: required"):
        load_config(path)


def test_a_full_fine_tune_has_no_slots(tmp_path):
    path = tmp_path / "full.toml"
    path.write_text('[adapter]\nkind = "none"\n[adapter.loraid]\nslot = 1\nslots = 2\n')
    with pytest.raises(ConfigError, match=r"adapter\.loraid: unknown key"):
        load_config(path)


@pytest.mark.parametrize(
    ("slots", "more", "key", "line", "words"),
    [
        (19, "", "adapter.loraid.slots", 10, "use 1 to 18"),
        (2, 'allocation = "spread"', "adapter.loraid.slots", 10, "use 1, 3, 6, 9, 18"),
        (9, "", None, None, ""),
    ],
)
def test_a_slot_beyond_the_model_in_the_file_is_told_with_key_and_line(
    tmp_path, slots, more, key, line, words
):
    save_transformer(make_transformer(), tmp_path / "three.safetensors")
    model = f'transformer = "{tmp_path}/three.safetensors"'
    loaded = load_config_with_sources(write(tmp_path, 1, slots, more, model))
    problems = place_problems(adapter_problems(loaded.config), loaded.sources)
    if key is None:
        assert problems == []
        return
    assert [(p.key, p.line) for p in problems] == [(key, line)]
    assert words in str(problems[0])


def test_the_words_at_the_start_name_layers_and_parameters(tmp_path):
    config = load_config(write(tmp_path, 2, 9))
    adapter = _injected(adapter_of(rank=4, loraid={"slot": 2, "slots": 9}))
    trained = sum(tensor.numel() for tensor in adapter.trainable().values())
    words = slot_in_words(config, layers_of(adapter), trained)
    assert words is not None
    assert words.startswith("LORAID slot 2 of 9 (pair, contiguous): 768 parameters in 4 layers: ")
    assert words.endswith("in block 0")
    assert slot_in_words(load_config(_plain(tmp_path)), [], 0) is None


def _plain(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text("[adapter]\nrank = 4\n")
    return path


@pytest.mark.parametrize("allocation", ["contiguous", "spread"])
@pytest.mark.parametrize("image", [False, True])
def test_the_estimate_counts_the_layers_that_are_trained(tmp_path, image, allocation):
    shape = TransformerConfig(**SIZES, **({"image_dim": 1280} if image else {}))
    for slot in (1, 4, 9):
        loraid = {"slot": slot, "slots": 9, "allocation": allocation}
        trained = _injected(adapter_of(loraid=loraid, exclude=[r".*\.0\.ffn\.2"]), image=image)
        more = f'allocation = "{allocation}"'
        config = load_config(write(tmp_path, slot, 9, more), [r"adapter.exclude=['.*\.0\.ffn\.2']"])
        assert {part.name for part in find_targets(config, shape).parts} == layers_of(trained)


def test_the_estimate_of_a_config_is_that_of_its_slot(tmp_path):
    whole = workload_of(load_config(_plain(tmp_path), ["model.variant=wan2.1-t2v-1.3b"]))
    part = workload_of(load_config(write(tmp_path, 1, 30)))
    assert 30 * part.trained_parameters == whole.trained_parameters
    with pytest.raises(ConfigError, match="use 1 to 180"):
        workload_of(load_config(write(tmp_path, 1, 181)))


def test_partition_of_the_tiny_model_is_what_its_layers_say():
    names = linear_layers(make_transformer(image=True))
    parts = partition_of(LoraidOptions(slot=1, slots=2, granularity="linear"), names)
    assert (parts.num_blocks, parts.image, parts.num_units) == (3, True, 36)
