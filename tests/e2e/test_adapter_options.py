"""Options of `[adapter]` through whole runs, in this process: start, resume, output, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.e2e.project import VARIANT, Project
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach, merge_into
from trainer.adapters.lora import LoRA
from trainer.adapters.targets import linear_layers
from trainer.adapters.wrapping import base_weight
from trainer.contract.config import load_config
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.events import EventReader
from trainer.contract.jobs import TrainRequest
from trainer.contract.run_dir import RunDir
from trainer.contract.variants import get_variant
from trainer.core.seams import BuildContext
from trainer.engine import process_group
from trainer.jobs.build import load_base
from trainer.jobs.train import TrainingRun
from trainer.models.wan.loading import load_transformer, save_transformer

STILL = "optimizer.learning_rate=1e-12"
Train = Callable[..., Path]


@pytest.fixture
def train(project: Project, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Return what trains the project's config with overrides and gives the output file."""
    monkeypatch.chdir(project.folder)

    def run(name: str, *overrides: str, resume: str = "never") -> Path:
        config = load_config(project.config, (f"name={name}", *overrides))
        request = TrainRequest(config=project.config, set=(), resume=resume)
        with process_group.joined("cpu", 60) as world:
            TrainingRun(config, request, world).run()
        return project.folder / "runs" / name / "output" / f"{name}.safetensors"

    return run


def fine_tune(project: Project) -> None:
    """Let the config train the model itself."""
    text = project.config.read_text()
    project.config.write_text(
        text.replace('kind = "lora"\nrank = 4\ndropout = 0.1\n', 'kind = "none"\n')
    )


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    events = EventReader(RunDir(folder / "runs" / name).events).read()
    return [event for event in events if event["type"] == "step"]


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: update.delta() for name, update in load_adapter(path).items()}


EVERYTHING = (
    "adapter.rank_dropout=0.3",
    "adapter.module_dropout=0.2",
    "adapter.scale_weight_norms=0.05",
    "adapter.loraplus_lr_ratio=4",
    "adapter.rslora=true",
    "adapter.alpha=2",
    r"adapter.rank_pattern={'.*\.q'=2}",
    r"adapter.lr_pattern={'blocks\.0\..*'=0.5}",
)
PISSA = ("adapter.init='pissa_niter_2'", "adapter.dropout=0.0")


@pytest.mark.parametrize("options", [EVERYTHING, PISSA], ids=["dropouts", "pissa"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(train, project, options):
    options = (*options, "training.max_steps=4", "checkpoint.every_steps=2")
    path = train("whole", *options)
    checkpoints = project.folder / "runs" / "whole" / "checkpoints"
    (project.folder / "runs" / "again").mkdir()
    shutil.copytree(checkpoints, project.folder / "runs" / "again" / "checkpoints")
    shutil.rmtree(project.folder / "runs" / "again" / "checkpoints" / "step-00000004")
    again = train("again", *options, resume="auto")
    assert [event["step"] for event in steps(project.folder, "again")] == [3, 4]
    before, after = load_file(path), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(value.any()) for value in before.values())


def test_pissa_reads_weights_that_wait_in_ram(train):
    options = (*PISSA, "adapter.rank=3")
    kept, swapped = train("kept", *options), train("swapped", *options, "memory.blocks_to_swap=2")
    before, after = load_file(kept), load_file(swapped)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("swapped", [0, 1])
def test_pissa_begins_with_the_principal_part_of_fp8_weights(project, swapped):
    memory = ("memory.weight_format='fp8_scaled'", f"memory.blocks_to_swap={swapped}")
    config = load_config(project.config, (*memory, "distributed.device='cpu'"))
    path, cpu = project.folder / "models" / "transformer.safetensors", torch.device("cpu")
    reference = load_base(load_config(project.config, memory[:1]), path, expert=None, device=cpu)
    weights = {name: base_weight(layer) for name, layer in linear_layers(reference).items()}
    model = load_base(config, path, expert=None, device=cpu)
    build = BuildContext(variant=get_variant(VARIANT), seed=0, device=cpu, total_steps=1)
    adapter = LoRA(LoRA.Config(rank=3, init="pissa", alpha=6.0), build)
    adapter.inject(model, 0)
    for name in adapter.plan:
        factors = (adapter.trainable()[f"{name}.{part}"].detach() for part in ("up", "down"))
        up, down = factors
        u, s, vt = torch.linalg.svd(weights[name].float())
        expected = u[:, :3] @ torch.diag(s[:3]) @ vt[:3]
        torch.testing.assert_close(2 * up @ down, expected, rtol=1e-3, atol=1e-4)


def test_training_goes_on_from_weights_and_keeps_their_ranks(train, project):
    first = train("first", r"adapter.rank_pattern={'.*\.q'=2}", "output.layout='kohya'")
    options = ("adapter.rank='from_weights'", f"adapter.init_from='{first}'", STILL)
    second = train("second", *options)
    before, after = deltas(first), deltas(second)
    assert before.keys() == after.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, rtol=1e-4, atol=1e-7)
    ranks = {name: update.rank for name, update in load_adapter(second).items()}
    assert {rank for name, rank in ranks.items() if name.endswith(".q")} == {2}
    # From where the first ended, not from the start.
    fresh = train("fresh", STILL)
    assert steps(project.folder, "second")[0]["loss"] != steps(project.folder, "fresh")[0]["loss"]
    args = json.loads(load_adapter(second).metadata["ss_network_args"])
    assert args["init_from"] == "first.safetensors"
    assert fresh.exists()


def test_a_frozen_adapter_is_trained_on_and_not_written(train, project):
    companion = train("companion")
    model = load_transformer(project.folder / "models" / "transformer.safetensors")
    merge_into(model, load_adapter(companion), 0.5)
    save_transformer(model, project.folder / "models" / "merged.safetensors")
    validation = ("validation.every_steps=3", "validation.split=0.4", "adapter.dropout=0.0")
    frozen = f"adapter.frozen=[{{path='{companion}', strength=0.5}}]"
    beside = train("beside", frozen, *validation)
    merged = train("merged", "model.transformer='models/merged.safetensors'", *validation)
    for kind in ("step", "validation"):
        ours, theirs = (
            [e["loss"] for e in EventReader(RunDir(project.folder / "runs" / n).events).read()
             if e["type"] == kind]
            for n in ("beside", "merged")
        )  # fmt: skip
        assert ours
        assert ours == pytest.approx(theirs, rel=1e-4)
    before, after = deltas(beside), deltas(merged)
    assert before.keys() == after.keys()
    for name, delta in before.items():
        torch.testing.assert_close(delta, after[name], rtol=5e-2, atol=1e-4)
    told = json.loads(load_adapter(beside).metadata["menma.frozen"])
    assert told == [{"file": "companion.safetensors", "strength": 0.5}]
    assert "menma.frozen" not in load_adapter(merged).metadata


def test_a_changed_frozen_adapter_is_told_when_a_run_goes_on(train, project):
    companion = train("companion")
    train("beside", f"adapter.frozen=['{companion}']", "training.max_steps=1")
    frozen = f"adapter.frozen=[{{path='{companion}', strength=0.25}}]"
    train("beside", frozen, "training.max_steps=2", resume="auto")
    events = EventReader(RunDir(project.folder / "runs" / "beside").events).read()
    assert any("frozen adapter" in e["message"] for e in events if e["type"] == "warning")


def test_each_expert_gets_its_own_frozen_adapters(train, project):
    companion = train("companion")
    path = project.folder / "models" / "transformer.safetensors"
    config = load_config(project.config, (f"adapter.frozen=['{companion}']",))
    (both,) = config.adapter.frozen
    high = both.model_copy(update={"expert": "high_noise"})
    adapter = config.adapter.model_copy(update={"frozen": (high, both)})
    config = config.model_copy(update={"adapter": adapter})
    inputs = (torch.ones(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.ones(1, 3, 32))
    for expert, number in (("low_noise", 1), ("high_noise", 2)):
        loaded = load_base(config, path, expert=expert, device=torch.device("cpu"))
        by_hand = load_transformer(path)
        for _ in range(number):
            attach(by_hand, load_adapter(companion))
        with torch.no_grad():
            torch.testing.assert_close(loaded(*inputs), by_hand(*inputs))


def test_chosen_weights_are_trained_and_the_others_keep_their_bits(train, project):
    companion = train("companion", "adapter.include=['head.head']")
    fine_tune(project)
    frozen = f"adapter.frozen=['{companion}', '{companion}']"
    output = train("tuned", "adapter.targets='ffn'", "adapter.include=['.*norm3']", frozen)
    before = load_file(project.folder / "models" / "transformer.safetensors")
    after = load_file(output)
    assert before.keys() == after.keys()
    for name, value in after.items():
        chosen = ".ffn." in name or ".norm3." in name
        assert torch.equal(value, before[name]) != chosen, name
    with safe_open(output, "pt") as file:
        assert file.metadata()["menma.kind"] == "transformer"
    with pytest.raises(ModelFileError, match="choice of weights"):
        train("tuned", "adapter.targets='attention'", frozen, resume="auto")
    with pytest.raises(ModelFileError, match="choice of weights"):
        train("tuned", frozen, resume="auto")


@pytest.mark.slow
def test_chosen_weights_that_zero_3_shards_are_written_beside_the_file_s_own(train, project):
    fine_tune(project)
    text = project.config.read_text().replace('weight_format = "fp32"', 'weight_format = "bf16"')
    project.config.write_text(text)
    sharded = ("distributed.engine='deepspeed'", "distributed.zero_stage=3")
    output = train("sharded", "adapter.targets='attention'", *sharded)
    before = load_file(project.folder / "models" / "transformer.safetensors")
    for name, value in load_file(output).items():
        assert torch.equal(value, before[name]) != ("_attn." in name), name


def test_weights_of_a_chosen_part_learn_at_their_own_rate(train, project):
    fine_tune(project)
    only = ("adapter.targets='ffn'", "training.max_steps=1", "optimizer.weight_decay=0")
    output = train("rates", *only, r"adapter.lr_pattern={'blocks\.1'=0.1}")
    before = load_file(project.folder / "models" / "transformer.safetensors")
    after = load_file(output)
    moved = {i: (after[n] - before[n]).abs().max() for i in (0, 1)
             for n in (f"blocks.{i}.ffn.0.weight",)}  # fmt: skip
    assert moved[0].item() == pytest.approx(1e-2, rel=0.05)
    assert moved[1].item() == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["adapter.include=['blocks.9.*']"], "adapter.include"),
        (["adapter.rank_pattern={'x'=3}"], "adapter.rank_pattern.x"),
        (["adapter.rank='from_weights'"], "adapter.rank"),
        (["adapter.init_from='models/vae.safetensors'"], "adapter.init_from"),
        (["adapter.frozen=['models/vae.safetensors']"], "adapter.frozen[0].path"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_read(train, options, key):
    with pytest.raises(ConfigError) as caught:
        train("refused", *options)
    assert key in {problem.key for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (
            ["adapter.scale_weight_norms=1", "distributed.zero_stage=2"],
            "adapter.scale_weight_norms",
        ),
        (["adapter.init='pissa'"], "adapter.dropout"),
        (["adapter.init='pissa'", "adapter.init_from='x'"], "adapter.init"),
        (["adapter.init='pissa_niter_0'"], "adapter.init"),
        (["adapter.rank='from_weights'", "adapter.targets='ffn'"], "adapter.targets"),
        (["adapter.rank='many'"], "adapter.rank"),
        (["adapter.frozen=[{path='x', expert='low_noise'}]"], "adapter.frozen[0].expert"),
        (["adapter.frozen=[{strength=1}]"], "adapter.frozen[0].path"),
        (["adapter.lr_pattern={'a'=0}"], "adapter.lr_pattern.a"),
    ],
)
def test_options_that_exclude_one_another_are_refused_by_key(project, options, key):
    with pytest.raises(ConfigError) as caught:
        load_config(project.config, (*options, "distributed.engine='deepspeed'"))
    assert key in {problem.key for problem in caught.value.problems}


def test_check_tells_key_and_line_and_targets_lists_what_is_trained(project):
    text = project.config.read_text().replace(
        "rank = 4", "rank = 4\ninclude = ['blocks.7.*']\nfrozen = ['none.safetensors']"
    )
    project.config.write_text(text)
    line = text.splitlines().index("include = ['blocks.7.*']") + 1
    outcome = project.menma("check", project.config)
    assert outcome.code == 2
    assert f"tiny.toml:{line}: adapter.include" in outcome.words
    assert f"tiny.toml:{line + 1}: adapter.frozen[0].path" in outcome.words
    fixed = "adapter.include=[]"
    listed = project.done("lora", "targets", project.config, "--set", fixed, "--json")
    found = json.loads(listed.out)
    assert found["total"] == 2 * 4 * (8 * (24 + 24) + 2 * (24 + 48))
    assert {module["rank"] for module in found["modules"]} == {4}
    refused = project.menma("lora", "targets", project.config)
    assert refused.code == 2
    assert f"tiny.toml:{line}: adapter.include" in refused.words
