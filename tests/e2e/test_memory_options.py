"""Runs that stream blocks and park activations: the same training, from the files to the LoRA."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.e2e.test_training_options import assert_same, losses, trained
from tests.e2e.variant_project import (
    HEADS,
    VariantProject,
    base_config,
    write_clips,
    write_models,
)
from trainer.contract.config_io import load_config
from trainer.contract.memory_model import estimate, gpu_of_memory
from trainer.jobs import automatic_memory

pytestmark = pytest.mark.slow

ALL = {
    "memory__blocks_to_swap": 2,
    "memory__offload_checkpoints": True,
    "memory__gradient_checkpointing": True,
}
SAMPLES = {
    "sampling__every_steps": 2,
    "sampling__num_steps": 2,
    "sampling__prompts": [{"prompt": "a", "width": 32, "height": 32, "num_frames": 5}],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("streamed")
    model = write_models(folder, "wan2.2-t2v-a14b", "comfy")
    model["expert"] = "low_noise"
    write_clips(folder / "clips", 2, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    project = VariantProject(
        folder, base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    )
    project.config["training"]["max_steps"] = 3
    project.cache()
    return project


@pytest.mark.parametrize(("engine", "stage"), [("local", 0), ("deepspeed", 2)])
def test_streaming_with_two_experts_and_samples_changes_nothing(project, engine, stage) -> None:
    where = {"distributed__engine": engine, "distributed__zero_stage": stage, **SAMPLES}
    plain = project.train(f"plain-{engine}", **where)
    streamed = project.train(f"streamed-{engine}", **where, **ALL)
    assert losses(streamed) == losses(plain)
    assert_same(trained(project, f"streamed-{engine}"), trained(project, f"plain-{engine}"))
    samples = [Path(e["path"]).name for e in streamed.of("sample")]
    assert samples == [Path(e["path"]).name for e in plain.of("sample")]
    assert samples


AUTO = {"memory__blocks_to_swap": "auto", "memory__gradient_checkpointing": "auto"}
TRUE = {"blocks_to_swap": 0, "gradient_checkpointing": True}


def recorded(project: VariantProject, name: str) -> dict[str, object]:
    """Return what a run has written down of `[memory]`."""
    found: dict[str, object] = json.loads(project.run(name).environment.read_text())["memory"]
    return found


def test_auto_on_a_cpu_is_said_recorded_and_changes_nothing(project) -> None:
    plain = project.train("said-plain")
    auto = project.train("said-auto", **AUTO)
    assert losses(auto) == losses(plain)
    assert_same(trained(project, "said-auto"), trained(project, "said-plain"))
    (said,) = [event for event in auto.of("log") if "= auto" in event["message"]]
    assert "CPU" in said["message"]
    assert said["memory"] == TRUE
    assert recorded(project, "said-auto") == TRUE
    written = tomllib.loads(project.run("said-auto").config.read_text())["memory"]
    assert written["blocks_to_swap"] == written["gradient_checkpointing"] == "auto"
    checked = project.job("check", config=project.write("auto.toml", **AUTO))
    assert [said["message"] in event["message"] for event in checked.of("warning")] == [True]


@pytest.mark.parametrize("large", [True, False])
def test_auto_trains_as_the_values_that_it_became(project, monkeypatch, large) -> None:
    """The card is made up; a model of two blocks fills the ring, so that none is swapped."""
    monkeypatch.chdir(project.folder)  # the sizes are read from the weight file
    config = load_config(project.write("sizes.toml"))
    smallest = estimate(config).only("training")
    needed = smallest.peak_bytes + smallest.margin_bytes + 1
    card = gpu_of_memory(40.0 if large else needed / 2**30)
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: card)
    auto = project.train(f"card-{large}", **AUTO)
    became = recorded(project, f"card-{large}")
    assert became["blocks_to_swap"] == 0
    # Every fourth of two blocks is the first one: as good as each, of which the last is none.
    assert bool(became["gradient_checkpointing"]) is not large
    (said,) = [event["message"] for event in auto.of("log") if "= auto" in event["message"]]
    assert "0 of 2" in said
    assert losses(auto) == losses(project.train(f"card-{large}-plain"))
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: gpu_of_memory(40.0))
    sampled = project.sample(config=project.write("s.toml", **AUTO, **SAMPLES), output="out")
    assert "memory.blocks_to_swap = auto: 0 of 2" in sampled.of("log")[0]["message"]


def test_nothing_is_loaded_where_no_value_fits(project, monkeypatch) -> None:
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: gpu_of_memory(0.1))
    done = project.train("too-small", may_fail=True, **AUTO)
    assert done.code == 1
    assert "no value of memory.blocks_to_swap" in done.words
    assert "--fit" in done.words
    assert done.of("phase") == []
    sampled = project.job(
        "sample", may_fail=True, config=project.write("s.toml", **AUTO, **SAMPLES), output="out"
    )
    assert sampled.code == 1
    assert "sampling takes" in sampled.words


def test_a_run_with_auto_resumes_with_other_values(project, monkeypatch) -> None:
    """What `auto` becomes may change between two starts; the numbers do not."""
    whole = project.train("whole", checkpoint__every_steps=1)
    cards = {"large": gpu_of_memory(40.0), "cpu": None}
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: cards["large"])
    project.train("resumed", **AUTO, checkpoint__every_steps=1, training__max_steps=1)
    first = recorded(project, "resumed")
    monkeypatch.setattr(automatic_memory, "usable_gpu", lambda *_, **__: cards["cpu"])
    again = project.train("resumed", **AUTO, checkpoint__every_steps=1)
    assert first != recorded(project, "resumed")
    assert losses(again)[-2:] == losses(whole)[-2:]
    assert_same(trained(project, "resumed"), trained(project, "whole"))


def test_eval_measures_with_auto(project) -> None:
    held = {"validation__split": 0.5, "training__max_steps": 1}
    project.train("measured", **held)
    config = project.write("measured.toml", name="measured", **held, **AUTO)
    done = project.job("eval", config=config)
    assert [event["memory"] for event in done.of("log")] == [TRUE]


REFUSED = [
    ({"memory__blocks_to_swap": 3}, "memory.blocks_to_swap", "the model has 2", "2 or less"),
    (
        {"memory__blocks_to_swap": 41, "model__shape": {"num_heads": HEADS}},
        "memory.blocks_to_swap",
        "the model has 40",
        "40 or less",
    ),
    (
        {"memory__blocks_to_swap": 1, "memory__gradient_checkpointing": False},
        "memory.blocks_to_swap",
        "activations",
        "gradient_checkpointing = true",
    ),
    (
        {"memory__blocks_to_swap": "auto", "memory__gradient_checkpointing": False},
        "memory.blocks_to_swap",
        "activations",
        "gradient_checkpointing = true",
    ),
    (
        {"memory__blocks_to_swap": 1, "adapter": {"kind": "none"}},
        "memory.blocks_to_swap",
        "frozen",
        'kind = "lora"',
    ),
    ({"memory__blocks_to_swap": -1}, "memory.blocks_to_swap", "number of blocks", "auto"),
    ({"memory__gradient_checkpointing": "all"}, "memory.gradient_checkpointing", "true", "auto"),
    ({"memory__attention": "sage"}, "memory.attention", "no backward", "sdpa"),
]


@pytest.mark.parametrize(("changes", "key", "words", "hint"), REFUSED)
@pytest.mark.parametrize("job", ["check", "train"])
def test_what_cannot_work_is_refused_with_key_line_and_way_out(
    project, job, changes, key, words, hint
) -> None:
    config = project.write("refused.toml", name="refused", **changes)
    done = project.job(job, config=config, may_fail=True)
    assert done.code == 2
    assert f"{key}: " in done.words
    assert "refused.toml:" in done.words
    assert words in done.words
    assert hint in done.words
    assert not project.run("refused").root.exists()
