"""Every shipped preset: loads, makes a config that checks, fits its card, and its steps add up."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from preset_table import PAGE, with_table

from app.domain.presets import card_memory_gib, differences, flatten, read_preset
from app.domain.template import render_config
from app.domain.user_presets import settings_of
from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config
from trainer.contract.config_rules import check_rules
from trainer.contract.memory_model import (
    GPUS,
    Circumstances,
    Estimate,
    estimate,
    gpu_of_memory,
)
from trainer.contract.preset_folders import PRESETS_DIR
from trainer.contract.timestep_mass import high_noise_mass
from trainer.contract.variants import VARIANTS

PRESETS = sorted(path.stem for path in PRESETS_DIR.glob("*.toml"))
HEADS = {name: read_preset(name).head for name in PRESETS}
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for configs."""
    return tmp_path_factory.mktemp("presets")


@cache
def new_config(name: str, folder: Path) -> RunConfig:
    """Return what `menma new --preset NAME` writes, loaded."""
    path = folder / f"{name}.toml"
    path.write_text(render_config("fish", read_preset(name)), encoding="utf-8")
    return load_config(path, environ={})


@cache
def estimated(name: str, folder: Path) -> Estimate:
    """Return the estimate of that config for the preset's card and machine."""
    head = HEADS[name]
    assert head.card_gb is not None
    assert head.ram_gb is not None
    memory = card_memory_gib(head.card_gb)
    assert memory is not None, f"no GPU has {head.card_gb} GB"
    known = Circumstances(num_gpus=head.num_gpus, machine_bytes=head.ram_gb * GIB)
    return estimate(new_config(name, folder), gpu_of_memory(memory), known)


def test_there_is_one_for_everybody():
    heads = HEADS.values()
    assert len(PRESETS) >= 20
    assert {head.card_gb for head in heads} >= {12, 16, 24, 32, 48, 80}
    assert {head.num_gpus for head in heads} >= {1, 2, 4, 8}
    assert {head.goal for head in heads} == {"general", "character", "style", "motion", "full"}
    assert {read_preset(name).medium for name in PRESETS} == {"clips", "images"}
    assert {head.variant for head in heads} >= {
        "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.2-t2v-a14b",
        "wan2.2-i2v-a14b", "wan2.2-ti2v-5b",
    }  # fmt: skip
    places = [read_preset(name).values.get("distributed", {}) for name in PRESETS]
    assert {"num_processes": 4, "zero_stage": 3, "offload_optimizer": "cpu",
            "offload_parameters": "cpu"} in places  # fmt: skip


def test_titles_are_unique_and_fit_a_line():
    titles = [head.title for head in HEADS.values()]
    assert len(set(titles)) == len(titles)
    assert max(map(len, titles)) <= 60


@pytest.mark.parametrize("name", PRESETS)
def test_its_config_checks(name, folder):
    preset, config = read_preset(name), new_config(name, folder)
    assert check_rules(config) == []
    assert preset.variant in VARIANTS
    assert config.model.variant == preset.variant
    source = config.dataset.load().sources[0]
    assert source.kind == {"images": "image", "clips": "video"}[preset.medium]
    assert list(source.resolution) == preset.source["resolution"]
    multiple = VARIANTS[preset.variant].pixel_multiple
    assert [side % 16 for side in source.resolution] == [0, 0]
    assert multiple == 16 or [side % multiple for side in source.resolution] == [0, 0]
    assert all(frames % 4 == 1 for frames in source.target_frames)
    assert config.distributed.num_processes == (
        preset.head.num_gpus if preset.head.num_gpus > 1 else None
    )


@pytest.mark.parametrize("name", PRESETS)
def test_it_fits_its_card_and_says_how_much_it_takes(name, folder):
    head, result = HEADS[name], estimated(name, folder)
    assert result.world_size == head.num_gpus
    assert result.verdict == "fits"
    assert result.host_verdict == "fits"
    # Written with one digit behind the point.
    assert head.peak_vram_gib == pytest.approx(result.peak_bytes / GIB, abs=0.051)


@pytest.mark.parametrize("name", PRESETS)
def test_its_steps_add_up(name, folder):
    data, config = HEADS[name].data, new_config(name, folder)
    assert data is not None
    source, distributed = config.dataset.load().sources[0], config.distributed
    data_ranks = (distributed.num_processes or 1) // distributed.sequence_parallel
    batch = source.batch_size * config.training.gradient_accumulation_steps * data_ranks
    items = data.num_items * source.num_repeats
    assert items % batch == 0, "no step of a pass is smaller than the others"
    assert config.training.epochs is None
    assert config.training.max_steps == data.views * items // batch
    every = config.output.every_steps
    assert every == config.checkpoint.every_steps
    assert config.training.max_steps % every == 0, "the last file is one of the regular ones"
    assert 10 * config.lr_schedule.warmup_steps <= config.training.max_steps


@pytest.mark.parametrize("name", PRESETS)
def test_it_sets_only_what_is_no_default(name, folder):
    given = flatten(read_preset(name).values)
    assert differences(given, flatten(settings_of(new_config(name, folder)))) == {}


@pytest.mark.parametrize("name", [name for name in PRESETS if "-high-" in name])
def test_experts_come_in_pairs(name):
    high, low = HEADS[name], HEADS[name.replace("-high-", "-low-")]
    assert (high.variant, high.goal, high.card_gb) == (low.variant, low.goal, low.card_gb)


@pytest.mark.parametrize("name", PRESETS)
def test_its_description_is_true(name, folder):
    text, config = " ".join(HEADS[name].description.split()), new_config(name, folder)
    for other in re.findall(r"\bwan2\.[\w.-]*\w", text):
        assert other in PRESETS
    told = re.search(r"(\d+) % of the steps", text)
    assert (told is not None) == (config.model.expert == "both")
    if told is not None:
        boundary = VARIANTS[config.model.variant].expert_boundary
        assert int(told[1]) == round(100 * high_noise_mass(config, boundary))
    for shift in re.findall(r"flow_shift (\d+)", text):
        assert config.objective.model_dump()["flow_shift"] == float(shift)
    size = re.search(r"(\d{3,4})x(\d{3,4})", text.replace("32x32", ""))
    if size is not None:
        assert [int(size[1]), int(size[2])] == read_preset(name).source["resolution"]
    if "rank 64" in text:
        assert config.adapter.model_dump()["rank"] == 64
    assert ("fp8" in text) == (config.memory.weight_format == "fp8_scaled")
    if "blocks in RAM" in text:
        assert config.memory.swapped_blocks > 0


@pytest.mark.parametrize(
    ("card_gb", "least"), [(12, "RTX 3060"), (24, "A10"), (32, "RTX 5090"), (48, "L40S")]
)
def test_a_size_on_a_box_is_the_least_that_its_cards_have(card_gb, least):
    assert card_memory_gib(card_gb) == GPUS[least].memory_gib


def test_no_card_has_such_a_size():
    assert card_memory_gib(13) is None


def test_a_preset_that_does_not_fit_would_be_seen(folder):
    config: Any = new_config("wan2.1-t2v-14b-lora", folder)
    assert estimate(config, gpu_of_memory(24)).verdict == "does not fit"


def test_the_page_lists_them_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: PYTHONPATH=. python tests/app/preset_table.py"
    assert [name for name in PRESETS if f"| `{name}` |" not in page] == []
