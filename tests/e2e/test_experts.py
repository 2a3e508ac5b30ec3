"""Both experts of Wan 2.2 in one run, against the same experts trained each on its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.e2e.project import Project
from tests.e2e.variant_project import (
    CAPTIONS,
    HEADS,
    Done,
    VariantProject,
    base_config,
    tiny_config,
    write_clips,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.lora import LoRA
from trainer.contract.memory_model.weights import linear_shapes
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.jobs import build, train_experts
from trainer.memory.parking import OneAtATime
from trainer.memory.streams import HostStreams
from trainer.models import load_transformer
from trainer.models.wan.transformer import WanTransformer

T2V = "wan2.2-t2v-a14b"
STEPS = 14
ORDER = "hhhlllhhhlllhh"
"""Of the experts in turns of 3 steps."""
OWN = {"high_noise": 8, "low_noise": 6}
FILES = {"high_noise": "transformer_high_noise", "low_noise": "transformer"}


def make_project(folder: Path) -> VariantProject:
    section = write_models(folder, T2V, "comfy") | {"expert": "both"}
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(section, {"general": {"resolution": [32, 32]}, "sources": sources})
    config["distributed"] = {"engine": "local", "device": "cpu"}
    config["training"]["max_steps"] = STEPS
    config["experts"] = {"steps_per_turn": 3, "high_noise_share": 0.5}
    config["high_noise"] = {"learning_rate": 0.01, "flow_shift": 5.0}
    config["lr_schedule"] = {"kind": "cosine", "warmup_steps": 2}
    config["validation"] = {"split": 0.4, "timesteps": [200.0, 600.0, 950.0]}
    config["sampling"]["prompts"] = [{"prompt": CAPTIONS[1]}]
    project = VariantProject(folder, config)
    project.cache()
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    return make_project(tmp_path_factory.mktemp("experts"))


def train_alone(project: VariantProject, prefix: str = "", **changes: Any) -> dict[str, Done]:
    """Train each expert in a run of its own, for as many steps as it gets in the run of both."""
    return {
        expert: project.train(
            f"{prefix}{expert}",
            model__expert=expert,
            training__max_steps=steps,
            validation__every_steps=steps,
            **changes,
        )
        for expert, steps in OWN.items()
    }


@pytest.fixture(scope="module")
def alone(project: VariantProject) -> dict[str, Done]:
    return train_alone(project)


@pytest.fixture(scope="module")
def both(project: VariantProject) -> Done:
    return project.train(
        "both",
        validation__every_steps=STEPS,
        checkpoint__every_steps=5,
        output__every_steps=10,
        sampling__every_steps=7,
        sampling__at_start=True,
    )


def factors(path: Path) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(pair, part)
        for name, pair in load_adapter(path).items()
        for part in ("down_RI", "up_OR")
    }


def pair_of(project: VariantProject, run: str) -> dict[str, Path]:
    return {expert: project.run(run).output / f"{run}_{expert}.safetensors" for expert in OWN}


def assert_same(one: Path, other: Path) -> None:
    """Bit for bit, and trained."""
    ours, theirs = factors(one), factors(other)
    assert ours.keys() == theirs.keys()
    assert all(bool(value.any()) for name, value in ours.items() if name.endswith("up_OR"))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def last(done: Done, kind: str) -> dict[str, Any]:
    return done.of(kind)[-1]


@pytest.mark.parametrize(
    ("expert", "adapter", "key"),
    [
        ("both", {"rank": "from_weights", "init_from": "HIGH"}, "adapter.init_from"),
        ("low_noise", {"rank": "from_weights", "init_from": "HIGH"}, "adapter.init_from"),
        ("high_noise", {"rank": "from_weights", "init_from": "HIGH"}, None),
        ("shared", {"frozen": ["HIGH"]}, "adapter.frozen[0].path"),
        ("high_noise", {"frozen": ["HIGH"]}, None),
        ("both", {"frozen": [{"path": "HIGH", "expert": "high_noise"}]}, None),
        ("low_noise", {"frozen": [{"path": "HIGH", "expert": "low_noise"}]}, None),
    ],
)
def test_weights_of_the_other_expert_are_told(
    project: VariantProject, tmp_path: Path, expert: str, adapter: dict[str, Any], key: str | None
) -> None:
    high = tmp_path / "high.safetensors"
    shapes = linear_shapes(tiny_config(T2V))
    updates = {
        name: LoRAFactors(torch.ones(2, i), torch.ones(o, 2), 2.0)
        for name, (i, o) in shapes.items()
        if name.startswith("blocks.")
    }
    save_adapter(updates, high, metadata={"menma.expert": "high_noise"})
    text = json.dumps({"kind": "lora", **adapter}).replace("HIGH", str(high))
    config = project.write("mixed.toml", adapter=json.loads(text), model__expert=expert)
    done = project.job("check", config=config, may_fail=True)
    assert done.code == (0 if key is None else 2)
    assert key is None or (f"{key}: " in done.words and "high_noise expert" in done.words)


def test_each_expert_comes_out_as_from_a_run_of_its_own(
    project: VariantProject, alone: dict[str, Done], both: Done
) -> None:
    """Bit for bit: weights, losses, learning rates, gradient norms and validation losses."""
    steps = both.of("step")
    for expert, path in pair_of(project, "both").items():
        assert_same(path, project.output(expert))
        ours = [step for step in steps if f"{expert}.loss" in step["terms"]]
        theirs = alone[expert].of("step")
        assert len(ours) == len(theirs) == OWN[expert]
        for key in ("loss", "lr", "grad_norm"):
            assert [step[key] for step in ours] == [step[key] for step in theirs], key
    assert "".join(next(iter(step["terms"]))[0] for step in steps) == ORDER
    for index in (0, -1):
        measured = {
            t: x
            for one in alone.values()
            for t, x in one.of("validation")[index]["by_timestep"].items()
        }
        assert both.of("validation")[index]["by_timestep"] == measured
        assert both.of("validation")[index]["loss"] == pytest.approx(sum(measured.values()) / 3)
    assert set(measured) == {"200", "600", "950"}


def test_the_shares_are_said_before_the_start(project: VariantProject, both: Done) -> None:
    kinds = [event["type"] for event in both.events]
    (words,) = [e["message"] for e in both.of("log") if e["message"].startswith("experts: ")]
    assert words == (
        "experts: high_noise 50.0% of the steps (8 of 14), low_noise 50.0% of the steps (6 of 14); "
        "turns of 3 steps, 4 changes of the expert"
    )
    place = next(i for i, e in enumerate(both.events) if e.get("message") == words)
    assert place < kinds.index("step")
    config = project.write("auto.toml", experts={"steps_per_turn": 2})
    checked = project.job("check", config=config)
    (words,) = [e["message"] for e in checked.of("log") if e["message"].startswith("experts: ")]
    assert "high_noise 19.8% of the steps (2 of 14)" in words
    assert last(checked, "end")["experts"]["high_noise_share"] == pytest.approx(0.1984, abs=1e-4)


def test_the_files_say_whom_they_are_for(project: VariantProject, both: Done) -> None:
    output = project.run("both").output
    assert {path.name for path in output.iterdir()} == {
        f"both_{expert}{step}.safetensors" for expert in OWN for step in ("", "-step00000010")
    }
    assert len(both.of("output")) == 4
    ranges = {"high_noise": "875,1000", "low_noise": "0,875"}
    for expert, path in pair_of(project, "both").items():
        (event,) = project.job("inspect", path=str(path)).of("output")
        told = event["lora"]["metadata"]
        assert event["lora"]["expert"] == expert
        assert told["ss_output_name"] == f"both_{expert}"
        assert told["modelspec.timestep_range"] == ranges[expert]
        assert (told["ss_steps"], told["ss_max_train_steps"]) == (str(OWN[expert]),) * 2
        assert told["ss_learning_rate"] == {"high_noise": "0.01", "low_noise": "0.02"}[expert]
        assert told["ss_sd_model_name"] == f"{FILES[expert]}.safetensors"


@pytest.mark.parametrize("step", [5, 10])
def test_a_run_goes_on_in_the_middle_of_a_turn(
    project: VariantProject, both: Done, step: int
) -> None:
    assert ORDER[step - 1] == ORDER[step], "the middle"
    name = f"resumed{step}"
    checkpoint = f"runs/both/checkpoints/step-{step:08d}"
    done = project.train(name, resume=checkpoint, validation__every_steps=STEPS)
    for expert, path in pair_of(project, name).items():
        assert_same(path, pair_of(project, "both")[expert])
    seen = [(one["step"], one["loss"], one["lr"]) for one in done.of("step")]
    assert seen == [(one["step"], one["loss"], one["lr"]) for one in both.of("step")[step:]]
    assert not done.of("warning")


def test_another_way_to_share_is_a_warning_and_another_expert_an_error(
    project: VariantProject, both: Done
) -> None:
    checkpoint = "runs/both/checkpoints/step-00000010"
    done = project.train("other", resume=checkpoint, experts__steps_per_turn=2)
    (warning,) = done.of("warning")
    assert warning["message"].startswith("how the experts share the steps, or the boundary")
    for expert in ("high_noise", "shared"):
        refused = project.train("wrong", resume=checkpoint, model__expert=expert, may_fail=True)
        assert refused.code == 2
        assert f"is of another expert: both, not {expert}" in refused.words


class Counting(HostStreams):
    """Remembers the most device memory that was alive."""

    peak = 0

    def device_bytes(self, num: int) -> Tensor:
        memory = super().device_bytes(num)
        self.peak = max(self.peak, self.held)
        return memory


@pytest.mark.parametrize(
    "memory",
    [
        {"memory__blocks_to_swap": 1, "memory__weight_format": "fp8_scaled"},
        pytest.param(
            {"memory__blocks_to_swap": 2, "memory__offload_checkpoints": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_with_swapped_blocks_and_fp8_and_never_two_on_the_device(
    project: VariantProject, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any]
) -> None:
    prefix = f"{'-'.join(str(value) for value in memory.values())}-"
    train_alone(project, prefix, **memory)
    streams = Counting()
    stages: list[OneAtATime] = []

    class Seen(OneAtATime):
        def __init__(self, streams: Any) -> None:
            super().__init__(streams)
            stages.append(self)

    monkeypatch.setattr(train_experts, "OneAtATime", Seen)
    for module in (train_experts, build):
        monkeypatch.setattr(module, "streams_of", lambda _device: streams)
    name = f"{prefix}both"
    project.train(name, **memory)
    for expert, path in pair_of(project, name).items():
        assert_same(path, project.output(f"{prefix}{expert}"))
    (stage,) = stages
    parked = list(stage._parked.values())
    (resident,) = {one.num_bytes for one in parked}
    ring = max(one.swap.ring_bytes for one in parked if one.swap)
    activations = 0
    if "memory__offload_checkpoints" in memory:
        activations = streams.peak - resident - ring
        assert activations < resident
    assert streams.peak == resident + ring + activations


def test_samples_use_each_experts_own_file(project: VariantProject, both: Done) -> None:
    """As the merged weights give them: before, during and after training."""
    for expert, path in pair_of(project, "both").items():
        project.job(
            "merge",
            base=project.config["model"][FILES[expert]],
            loras=[{"path": str(path)}],
            output=f"merged_{expert}.safetensors",
        )
    changes = {f"model__{FILES[e]}": f"merged_{e}.safetensors" for e in OWN}
    merged = project.sample(config=project.write("merged.toml", **changes)).latents[0]
    plain = project.sample(config=project.write("plain.toml")).latents[0]
    used = project.sample(config="plain.toml", run_dir="runs/both").latents[0]
    assert float((plain - merged).abs().max()) > 0.02, "the LoRAs change nothing"
    assert len(both.latents) == 3
    assert torch.equal(both.latents[0], plain)
    torch.testing.assert_close(used, merged, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.latents[2], merged, atol=1e-4, rtol=1e-4)
    one = project.sample(
        config=project.write("one.toml", model__expert="low_noise"), run_dir="runs/both"
    )
    given = [{"path": str(pair_of(project, "both")["low_noise"])}]
    named = project.sample(config="plain.toml", loras=given)
    assert torch.equal(one.latents[0], named.latents[0]), "the low-noise file alone"


def test_eval_measures_both(project: VariantProject, alone: dict[str, Done], both: Done) -> None:
    (end,) = project.job("eval", config="both.toml").of("end")
    assert end["expert"] == "both"
    assert [Path(path).name for path in end["output"]] == [f"both_{e}.safetensors" for e in OWN]
    assert end["step"] == STEPS
    for whose, index in (("base", 0), ("trained", -1)):
        expected = both.of("validation")[index]["by_timestep"]
        assert end["validation"][whose]["by_timestep"] == pytest.approx(expected, rel=1e-5)
    numbers = {
        name: value.numel()
        for name, value in factors(pair_of(project, "both")["low_noise"]).items()
    }
    assert end["adapter"]["parameters"] == 2 * sum(numbers.values())
    (one,) = project.job("eval", config="low_noise.toml").of("end")
    assert one["output"].endswith("low_noise.safetensors")
    parts = end["validation"]["trained"]["by_timestep"]
    assert one["validation"]["trained"]["by_timestep"] == {t: parts[t] for t in ("200", "600")}


def test_the_boundary_is_the_configs(project: VariantProject) -> None:
    done = project.train("bound", model__expert_boundary=0.5, training__max_steps=6)
    sigmas = {name: [float(s) for s in find(done, name)] for name in "hl"}
    assert min(sigmas["h"]) >= 0.5 >= max(sigmas["l"])
    assert min(sigmas["h"]) < 0.875
    (event,) = project.job("inspect", path=str(pair_of(project, "bound")["low_noise"])).of("output")
    assert event["lora"]["metadata"]["modelspec.timestep_range"] == "0,500"


def load(path: Path) -> WanTransformer:
    return load_transformer(path, config={"num_heads": HEADS})


def find(done: Done, who: str) -> list[Tensor]:
    steps = zip(done.steps, ORDER, strict=False)
    return [noisy.sigma_B for (noisy, _), name in steps if name == who]


def test_one_lora_for_both_is_that_of_plain_torch(project: VariantProject) -> None:
    """Against a loop with the update in the weights, the experts chosen by hand."""
    done = project.train(
        "shared",
        model__expert="shared",
        high_noise={},
        optimizer__max_grad_norm=0,
        sampling__every_steps=STEPS,
        checkpoint__every_steps=5,
    )
    sigmas = {name: [float(s) for s in find(done, name)] for name in "hl"}
    assert min(sigmas["h"]) >= 0.875 >= max(sigmas["l"])
    losses, trained = by_hand(project, done)
    assert [step["loss"] for step in done.of("step")] == pytest.approx(losses, rel=1e-5)
    (path,) = project.run("shared").output.iterdir()
    adapter = load_adapter(path)
    assert adapter.metadata["menma.expert"] == "shared"
    assert adapter.metadata["modelspec.timestep_range"] == "0,1000"
    for name, pair in adapter.items():
        update = pair.scale * pair.up_OR @ pair.down_RI
        wanted = 8 / 4 * trained[f"{name}.up"] @ trained[f"{name}.down"]
        torch.testing.assert_close(update, wanted, rtol=1e-4, atol=1e-5)

    again = project.train(
        "shared-again",
        resume="runs/shared/checkpoints/step-00000010",
        model__expert="shared",
        high_noise={},
        optimizer__max_grad_norm=0,
    )
    assert_same(project.output("shared-again"), path)
    assert len(again.of("step")) == 4
    used = project.sample(config="shared.toml", run_dir="runs/shared").latents[0]
    torch.testing.assert_close(done.latents[-1], used, atol=1e-4, rtol=1e-4)


def by_hand(project: VariantProject, done: Done) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and the factors, W + 8/4 · up @ down in both experts' weights."""
    models = {
        expert[0]: load(project.folder / project.config["model"][field])
        for expert, field in FILES.items()
    }
    context = BuildContext(
        variant=VARIANTS[T2V], seed=42, device=torch.device("cpu"), total_steps=1
    )
    start = LoRA(LoRA.Config(rank=4), context)
    start.inject(load(project.folder / project.config["model"]["transformer"]), 42)
    params = {
        name: value.detach().clone().requires_grad_() for name, value in start.trainable().items()
    }
    modules = {name.rpartition(".")[0] for name in params}
    optimizer = torch.optim.AdamW(params.values(), lr=0.0, weight_decay=0.01)
    losses = []
    for (noisy, batch), who, event in zip(done.steps, ORDER, done.of("step"), strict=True):
        weights = {name: value.detach() for name, value in models[who].named_parameters()}
        for name in modules:
            update = 8 / 4 * params[f"{name}.up"] @ params[f"{name}.down"]
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + update
        given = (noisy.noisy_latents_BCFHW, 1000 * noisy.sigma_B, batch.context)
        velocity = functional_call(models[who], weights, given)
        loss = (velocity - (noisy.noise_BCFHW - batch.latents_BCFHW)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = event["lr"]
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in params.items()}


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_deepspeed_trains_the_same(project: VariantProject, both: Done, stage: int) -> None:
    settings = {
        "distributed__engine": "deepspeed",
        "distributed__zero_stage": stage,
        "checkpoint__every_steps": 10,
    }
    done = project.train(f"zero{stage}", **settings)
    losses = [step["loss"] for step in both.of("step")]
    assert [step["loss"] for step in done.of("step")] == pytest.approx(losses, rel=1e-5)
    checkpoint = f"runs/zero{stage}/checkpoints/step-00000010"
    project.train(f"again{stage}", resume=checkpoint, **settings)
    for expert, path in pair_of(project, f"again{stage}").items():
        assert_same(path, pair_of(project, f"zero{stage}")[expert])


@pytest.mark.slow
def test_two_processes_agree_on_whose_turn_it_is(project: VariantProject) -> None:
    """ZeRO-1 on two processes: each expert as alone, also when it goes on within a turn.

    They see two clips in each step, so that one process takes two microbatches to do the same.
    """
    commands = Project(project.folder)
    settings = ("engine=deepspeed", "num_processes=2", "zero_stage=1")
    changes = [part for one in settings for part in ("--set", f"distributed.{one}")]
    project.write("two.toml", name="two", checkpoint__every_steps=10)
    commands.done("train", "two.toml", *changes)
    project.write("two_again.toml", name="two_again")
    checkpoint = "runs/two/checkpoints/step-00000010"
    assert {path.name for path in (project.folder / checkpoint / "low_noise").iterdir()} == {
        "engine.json", "rank-00000.safetensors", "rank-00001.safetensors",
    }  # fmt: skip
    commands.done("train", "two_again.toml", "--resume", checkpoint, *changes)
    train_alone(project, "one-", training__gradient_accumulation_steps=2)
    for expert, path in pair_of(project, "two").items():
        assert_same(pair_of(project, "two_again")[expert], path)
        wanted = factors(project.output(f"one-{expert}"))
        for name, value in factors(path).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
