"""A technique that trains layers of its own, sent through a whole run: job, checkpoint, output."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.e2e.variant_project import VariantProject, base_config, write_clips, write_models
from trainer.adapters import load_adapter
from trainer.contract import plugin_options
from trainer.contract.catalog import TECHNIQUES
from trainer.contract.options import Options
from trainer.contract.registry import Entry
from trainer.core.seams import BuildContext, Technique
from trainer.core.types import Batch, LossTerm, NoisyInput

pytestmark = pytest.mark.slow

STEPS = 3
ENGINES = [("local", 0), ("deepspeed", 0), ("deepspeed", 2)]
NAME = "critic"
LAYER = {"extra.0_layer.weight", "extra.0_layer.bias"}


class Critic(Technique):
    """Trains a layer that reads predictions, and lets it act on them."""

    born: ClassVar[list[Critic]] = []

    class Config(Options):
        """Of this test."""

        weight: float = Field(0.5, gt=0)
        """Of the term."""

    def __init__(self, config: Critic.Config, build: BuildContext) -> None:
        self.config = config
        random = torch.Generator().manual_seed(build.seed + 5)
        self.layer, self.fixed = nn.Linear(16, 4), nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in (*self.layer.parameters(), *self.fixed.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        self.fixed.requires_grad_(False)
        self.first_weight = self.layer.weight.detach().clone()
        self.steps_done = torch.zeros((), dtype=torch.int64)
        Critic.born.append(self)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"layer": self.layer, "fixed": self.fixed}

    def loss_terms(
        self, batch: Batch, noisy: NoisyInput, prediction: Tensor, predict: Any
    ) -> list[LossTerm]:
        read = self.layer(prediction.float().flatten(2).mean(-1))
        # Its own memory acts, too: a step resumed without it would be another.
        pull = 1 + self.steps_done
        value = (self.fixed(torch.tanh(read)) - pull).square().mean()
        return [LossTerm(name=NAME, value=self.config.weight * value)]

    def after_step(self, step: int) -> None:
        self.steps_done += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.steps_done.copy_(state["steps_done"])


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Declare the technique as CONTRIBUTING.md says: catalogue and schema."""
    with pytest.MonkeyPatch.context() as patch:
        module = ModuleType("critic_technique")
        module.Critic = Critic  # type: ignore[attr-defined]
        patch.setitem(sys.modules, module.__name__, module)
        entry = Entry(NAME, f"{module.__name__}:Critic", "of this test")
        patch.setitem(TECHNIQUES._entries, NAME, entry)
        schemas = plugin_options.plugin_schemas()
        patch.setitem(schemas["technique"], NAME, Critic.Config.model_json_schema())
        yield


@pytest.fixture(scope="module")
def project(registered: None, tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("technique")
    model = write_models(folder, "wan2.1-t2v-1.3b", "comfy")
    write_clips(folder / "clips", 2, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    project = VariantProject(folder, config)
    project.config["training"]["max_steps"] = STEPS
    project.cache()
    return project


@pytest.fixture(scope="module")
def plain(project: VariantProject) -> dict[str, Tensor]:
    """Return what a run without the technique writes."""
    project.train("plain", distributed__engine="local")
    return load_file(project.output("plain"))


def options(engine: str, stage: int) -> dict[str, Any]:
    return {
        "techniques": [{"name": NAME, "weight": 0.25}],
        "distributed__engine": engine,
        "distributed__zero_stage": stage,
    }


@pytest.fixture(scope="module", params=ENGINES, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def whole(
    project: VariantProject, request: pytest.FixtureRequest
) -> tuple[str, dict[str, Any], Critic]:
    """Train without a break; return the run's name, its options and its technique."""
    engine, stage = request.param
    name = f"whole-{engine}-{stage}"
    done = project.train(name, **options(engine, stage))
    steps = done.of("step")
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    assert all(event["terms"][NAME] > 0 for event in steps)
    return name, options(engine, stage), Critic.born[-1]


def rank_files(project: VariantProject, name: str, step: int) -> dict[str, Tensor]:
    """Return everything a checkpoint holds: weights, optimizer state, state of techniques."""
    folder = project.run(name).checkpoints / f"step-{step:08d}"
    return {
        f"{path.name}|{key}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def test_its_layer_is_trained_and_kept_in_the_checkpoint(project, whole):
    name, _, critic = whole
    saved = project.checkpoint(name, STEPS)
    assert {key for key in saved if key.startswith("extra.")} == LAYER
    trained = saved["extra.0_layer.weight"].view(4, 16)
    assert torch.equal(trained, critic.layer.weight)
    moved = (trained - critic.first_weight).abs().max()
    assert 0.02 < moved < 0.1  # AdamW moves by about the learning rate a step


def test_a_stopped_run_goes_on_bit_for_bit(project, whole):
    name, changes, _ = whole
    part = name.replace("whole", "part")
    project.run(part).request("stop")
    assert project.train(part, may_fail=True, **changes).code == 130
    born = len(Critic.born)
    done = project.train(part, **changes)
    assert [event["step"] for event in done.of("step")] == list(range(1, STEPS + 1))
    assert len(Critic.born) == born + 1
    assert Critic.born[-1].steps_done == STEPS
    expected, found = rank_files(project, name, STEPS), rank_files(project, part, STEPS)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ours, theirs = load_file(project.output(part)), load_file(project.output(name))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_output_holds_the_adapter_alone(project, whole, plain):
    name, *_ = whole
    written = load_file(project.output(name))
    assert set(written) == set(plain)
    assert not any("extra" in key or "layer" in key for key in written)
    # The technique has acted, or nothing here would mean anything.
    assert any(not torch.equal(written[key], plain[key]) for key in plain)
    assert len(load_adapter(project.output(name))) > 0


def test_a_checkpoint_without_the_layer_is_refused(project, whole):
    name, changes, _ = whole
    without = {key: value for key, value in changes.items() if key != "techniques"}
    before = rank_files(project, name, STEPS)
    done = project.train(name, may_fail=True, training__max_steps=STEPS + 1, **without)
    assert done.code not in {0, 130}
    assert "extra.0_layer" in done.words
    assert rank_files(project, name, STEPS).keys() == before.keys()
