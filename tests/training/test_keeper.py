"""The keeper: what a checkpoint must agree with, what techniques get back, what is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.toy import AdamWFactory, LoraStep, make_batch
from trainer.contract.errors import ModelFileError, NonFiniteError
from trainer.contract.run_dir import RunDir
from trainer.core.seams import Technique
from trainer.engine.local import LocalEngine
from trainer.sampling.results import FinishedSample
from trainer.training.checkpoints import CheckpointStore
from trainer.training.keeper import Identity, OutputFile, RunKeeper
from trainer.training.reporter import EventLog, RunReporter
from trainer.training.validation import ValidationResult

IDENTITY = Identity(
    variant="wan2.2-t2v-a14b",
    expert="low_noise",
    adapter="lora",
    base="b1",
    dataset="d1",
    seed=7,
    stream={"processes": 1, "accumulation": 1},
)


class FakeAdapter:
    """Writes what it is given as a torch file."""

    def __init__(self, step: LoraStep, scale: float = 1.0) -> None:
        self.module = step
        self.facts = {"scale (alpha / rank)": scale}

    def trainable(self) -> dict[str, Any]:
        return self.module.trainable()

    def write_output(self, state: Mapping[str, Tensor], path: Path, **rest: Any) -> None:
        torch.save((dict(state), rest["metadata"]), path)


class Average(Technique):
    """Keeps a number that a checkpoint must hold."""

    def __init__(self, start: float = 0.0) -> None:
        self.value = torch.tensor(start)

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.value = state["value"]


class Other(Average):
    """State of the same name."""


class Stateless(Technique):
    """Has nothing to keep."""


class Bench:
    """A keeper with everything around it, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = RunDir(folder)
        self.events: list[dict[str, Any]] = []

    def keeper(
        self,
        *,
        identity: Identity = IDENTITY,
        techniques: Sequence[Technique] = (),
        scale: float = 1.0,
        resume: bool = False,
        samples: Any = None,
        validator: Any = None,
        keep_outputs: int | None = None,
    ) -> RunKeeper:
        module = LoraStep(blocks=1)
        self.engine = LocalEngine(
            module,
            module.trainable(),
            AdamWFactory(),
            device="cpu",
            max_grad_norm=0,
            gradient_accumulation_steps=1,
        )
        emit = EventLog(lambda event: self.events.append(dict(event)))
        store = CheckpointStore(self.run_dir.checkpoints, keep_last=2)
        return RunKeeper(
            engine=self.engine,
            store=store,
            techniques=techniques,
            run_dir=self.run_dir,
            emit=emit,
            reporter=RunReporter(emit, torch.device("cpu"), 1),
            identity=identity,
            outputs=[
                OutputFile(
                    name="x",
                    adapter=FakeAdapter(module, scale),  # type: ignore[arg-type]
                    layout="comfy",
                    dtype=torch.float32,
                    metadata=lambda s: {"step": str(s)},
                )
            ],
            resume=store.latest() if resume else None,
            make_samples=samples,
            validator=validator,
            keep_outputs=keep_outputs,
        )

    def said(self, kind: str) -> list[str]:
        return [event["message"] for event in self.events if event["type"] == kind]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run")


def saved(bench: Bench, **options: Any) -> dict[str, Tensor]:
    """Save a checkpoint at step 5; return its weights."""
    keeper = bench.keeper(**options)
    bench.engine.forward_backward([make_batch(1)])
    bench.engine.update(1e-2)
    keeper.checkpoint(5)
    return bench.engine.full_parameters()


def test_what_was_saved_comes_back(bench: Bench) -> None:
    weights = saved(bench, techniques=[Stateless(), Average(3.0)])
    technique = Average()
    assert bench.keeper(techniques=[Stateless(), technique], resume=True).restore() == 5
    assert technique.value == 3.0
    back = bench.engine.full_parameters()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert bench.said("warning") == []


def test_without_a_checkpoint_it_starts_at_0(bench: Bench) -> None:
    assert bench.keeper().restore() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variant": "wan2.2-i2v-a14b"}, "another model: wan2.2-t2v-a14b, not wan2.2-i2v-a14b"),
        ({"expert": "high_noise"}, "another expert: low_noise, not high_noise"),
        ({"adapter": "none"}, "another adapter kind: lora, not none"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    bench: Bench, change: dict[str, str], words: str
) -> None:
    saved(bench)
    keeper = bench.keeper(identity=replace(IDENTITY, **change), resume=True)
    with pytest.raises(ModelFileError, match=words) as error:
        keeper.restore()
    assert "--resume never" in error.value.hint


def test_another_alpha_is_refused_because_shapes_do_not_show_it(bench: Bench) -> None:
    saved(bench, scale=1.0)
    with pytest.raises(ModelFileError, match=r"scale \(alpha / rank\): 1\.0, not 4\.0"):
        bench.keeper(scale=4.0, resume=True).restore()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"base": "b2"},
            "the base model's file or a frozen adapter on it changed since step-00000005",
        ),
        ({"dataset": "d2"}, "the clips or captions changed"),
        ({"seed": 8}, "the seed changed"),
        ({"stream": {"processes": 2, "accumulation": 1}}, "the number of processes"),
    ],
)
def test_what_may_change_is_said(bench: Bench, change: dict[str, Any], words: str) -> None:
    saved(bench)
    assert bench.keeper(identity=replace(IDENTITY, **change), resume=True).restore() == 5
    (warning,) = bench.said("warning")
    assert words in warning


def test_state_never_reaches_another_technique(bench: Bench) -> None:
    saved(bench, techniques=[Average(1.0), Other(2.0)])
    swapped = [Other(), Average()]
    with pytest.raises(ModelFileError, match=r"0\.Average\.value"):
        bench.keeper(techniques=swapped, resume=True).restore()
    assert [technique.value for technique in swapped] == [0.0, 0.0]
    with pytest.raises(ModelFileError, match=r"1\.Other\.value"):
        bench.keeper(techniques=[Average()], resume=True).restore()


def test_a_further_technique_is_said(bench: Bench) -> None:
    saved(bench)
    bench.keeper(techniques=[Stateless()], resume=True).restore()
    assert "the list of techniques changed" in bench.said("warning")[0]


def test_a_step_is_saved_once(bench: Bench) -> None:
    keeper = bench.keeper()
    keeper.checkpoint(5)
    first = (bench.run_dir.checkpoints / "step-00000005").stat().st_ino
    keeper.checkpoint(5)
    assert (bench.run_dir.checkpoints / "step-00000005").stat().st_ino == first
    assert [event["step"] for event in bench.events if event["type"] == "checkpoint"] == [5]


def test_outputs_hold_the_weights_under_their_names(bench: Bench) -> None:
    keeper = bench.keeper()
    keeper.output(3, final=False)
    keeper.output(5, final=True)
    weights = bench.engine.full_parameters()
    for name, step in (("x-step00000003", "3"), ("x", "5")):
        with (bench.run_dir.output / f"{name}.safetensors").open("rb") as file:
            state, metadata = torch.load(file)
        assert metadata == {"step": step}
        assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_the_newest_output_files_stay(bench: Bench) -> None:
    keeper = bench.keeper(keep_outputs=2)
    folder = bench.run_dir.output
    folder.mkdir(parents=True)
    others = {"x-notes.txt", "y-step00000001.safetensors", "x-step00000009.safetensors"}
    for name in others:  # not ours, of another output, of a later step that is to come again
        (folder / name).touch()
    for step in (2, 4, 6):
        keeper.output(step, final=False)
    keeper.output(7, final=True)
    written = {"x-step00000004.safetensors", "x-step00000006.safetensors", "x.safetensors"}
    assert {path.name for path in folder.iterdir()} == written | others


def test_a_run_without_prompts_makes_no_samples(bench: Bench) -> None:
    bench.keeper().sample(5)
    assert bench.events == []


def test_samples_are_events(bench: Bench, tmp_path: Path) -> None:
    made = FinishedSample(tmp_path / "5.mp4", "a fish " * 1000, 42)
    bench.keeper(samples=lambda step: [made]).sample(5)
    assert bench.events[-1] == {
        "type": "sample",
        "step": 5,
        "path": str(tmp_path / "5.mp4"),
        "prompt": ("a fish " * 1000)[:4000],
        "seed": 42,
    }


class FakeValidator:
    """Has a figure ready."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def measure(self) -> ValidationResult:
        if self.loss != self.loss:
            raise NonFiniteError("the validation loss is NaN for clip3", hint="look at it")
        by_timestep = {0.5: self.loss, 900.0: 3.0}
        return ValidationResult(
            loss=self.loss, by_timestep=by_timestep, num_items=4, seconds=1.23456
        )


def test_a_validation_is_an_event_that_json_can_hold(bench: Bench) -> None:
    bench.keeper(validator=FakeValidator(2.0)).validate(5)
    assert bench.events[-1] == {
        "type": "validation",
        "step": 5,
        "loss": 2.0,
        "by_timestep": {"0.5": 2.0, "900": 3.0},
        "items": 4,
        "seconds": 1.235,
    }
    bench.keeper().validate(6)
    assert len(bench.events) == 1


def test_a_validation_loss_that_is_nan_is_a_warning_and_not_the_end(bench: Bench) -> None:
    bench.keeper(validator=FakeValidator(float("nan"))).validate(5)
    assert bench.said("warning") == ["step 5: the validation loss is NaN for clip3"]
    assert not any(event["type"] == "validation" for event in bench.events)
