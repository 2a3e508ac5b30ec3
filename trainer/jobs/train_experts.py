"""What a run trains that has two experts: an adapter for each in turns, or one for both.

Each expert is built as in a run of its own, from the config that `for_expert` returns. Where each
has an adapter, such a run *is* two runs that share a process: every expert has its own optimizer,
schedule, stream of data and count of steps, and comes out bit for bit as alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.expert_turns import EXPERTS, Turns
from trainer.contract.experts import SHARED, for_expert, output_names
from trainer.contract.variants import Expert
from trainer.core.seams import BuildContext, Engine, Technique
from trainer.core.types import Batch
from trainer.data.loader import TrainingSteps
from trainer.engine.alternating import AlternatingEngine, Turn
from trainer.engine.process_group import World
from trainer.jobs.expert_share import settle_turns
from trainer.jobs.neighbours import neighbours
from trainer.jobs.run_items import validation_settings
from trainer.jobs.train_parts import (
    Session,
    TrainedModel,
    TrainingData,
    build_engine,
    build_model,
    build_validator,
    learning_rate,
)
from trainer.jobs.trainee import Trainee, count, output_file, quantisation_notes
from trainer.memory.parking import OneAtATime, Parked
from trainer.memory.streams import streams_of
from trainer.models.wan.transformer import WanTransformer
from trainer.training.keeper import OutputFile
from trainer.training.step import TrainStep, TurningStep
from trainer.training.validation import ValidationResult, Validator, together


@dataclass(frozen=True, slots=True)
class _Part:
    """One expert, as in a run of its own."""

    config: RunConfig
    build: BuildContext
    model: TrainedModel
    num_parameters: int

    @property
    def learning_rate(self) -> Callable[[int], float]:
        """Of its own steps."""
        return learning_rate(self.config, self.build, self.model.techniques)


def two_transformers(
    config: RunConfig, build: BuildContext, world: World, data: TrainingData, session: Session
) -> Trainee:
    """Load both experts and build what trains them in turns. Arguments as in `one_transformer`.

    Raises:
        ConfigError: adapter or techniques do not fit the model or the data, or an expert would
            get no steps.
        ModelFileError: the weights cannot be used.
        RunError: the RAM for the weights of the idle expert cannot be locked or shared.
    """
    turns = settle_turns(config, build)
    stage = OneAtATime(streams_of(world.device))
    shared = config.model.expert == SHARED
    parts: dict[Expert, _Part] = {}
    for expert in EXPERTS:
        steps = build.total_steps if shared else turns.steps_of(expert, build.total_steps)
        first = parts[EXPERTS[0]].model if shared and parts else None
        parts[expert] = _load(
            for_expert(config, expert, build.variant.expert_boundary),
            replace(build, total_steps=steps),
            world,
            data,
            stage,
            expert,
            first,
        )
    working = _Working(stage, turns, parts)
    trained = _shared if shared else _each
    return trained(config, working, world, data, session)


class _Working:
    """Both experts, and whose turn it is."""

    def __init__(self, stage: OneAtATime, turns: Turns, parts: Mapping[Expert, _Part]) -> None:
        self.stage = stage
        self.turns = turns
        self.parts = parts

    def transformer(self, expert: Expert) -> WanTransformer:
        """Return a transformer that is on the device, in the place of the other one."""
        self.stage.bring(expert)
        return self.parts[expert].model.transformer

    def facts(self) -> dict[str, float]:
        """Return what a checkpoint is compared with."""
        return {
            "steps_per_turn": self.turns.steps_per_turn,
            "high_noise_share": self.turns.high_noise_share,
            "boundary": self.parts[EXPERTS[0]].build.variant.expert_boundary,
        }

    def notes(self, total_steps: int) -> tuple[str, ...]:
        """Return what is worth saying before the start."""
        quantised = [
            f"{expert}: {note}"
            for expert, part in self.parts.items()
            for note in quantisation_notes(part.model.transformer)
        ]
        return (f"experts: {self.turns.in_words(total_steps)}", *quantised)

    def validator(self, data: TrainingData, world: World) -> ExpertValidator | None:
        """Return what measures each expert where it works; None where nothing is measured."""
        found: dict[Expert, Validator] = {}
        for expert, part in self.parts.items():
            if validation_settings(part.config, part.build.variant).timesteps:
                one = build_validator(part.config, part.build.variant, part.model, data, world)
                if one is not None:
                    found[expert] = one
        return ExpertValidator(self.stage, found) if found else None

    @property
    def num_parameters(self) -> int:
        """Of both transformers."""
        return sum(part.num_parameters for part in self.parts.values())


def _each(
    config: RunConfig, working: _Working, world: World, data: TrainingData, session: Session
) -> Trainee:
    """An adapter for each expert."""
    parts, turns = working.parts, working.turns
    engines: dict[str, Engine] = {
        expert: build_engine(part.config, part.model, part.build, world)
        for expert, part in parts.items()
    }
    rates = {
        expert: learning_rate(part.config, part.build, part.model.techniques)
        for expert, part in parts.items()
    }

    def turn_of(step: int) -> Turn:
        expert = turns.expert_at(step)
        return Turn(part=expert, model=expert)

    def lr_at(step: int) -> float:
        expert = turns.expert_at(step)
        return rates[expert](turns.steps_of(expert, step))

    def output(expert: Expert, part: _Part) -> OutputFile:
        return output_file(
            part.config,
            part.build,
            part.model,
            data,
            session,
            name=output_names(config)[expert],
            prefix=f"{expert}.",
            steps_of=lambda step: turns.steps_of(expert, step),
        )

    techniques = {expert: part.model.techniques for expert, part in parts.items()}
    return Trainee(
        engine=AlternatingEngine(engines, turn_of, working.stage.bring),
        steps=AlternatingSteps(data.steps, turns),
        lr_at=lr_at,
        acting=(WhoseTurn(techniques, turns),) if any(techniques.values()) else (),
        techniques=tuple(one for each in techniques.values() for one in each),
        outputs=tuple(output(expert, part) for expert, part in parts.items()),
        validator=working.validator(data, world),
        sampled=working.transformer,
        num_trained=sum(count(part.model.trainable) for part in parts.values()),
        num_parameters=working.num_parameters,
        notes=working.notes(data.total_steps),
        turns=working.facts(),
    )


def _shared(
    config: RunConfig, working: _Working, world: World, data: TrainingData, session: Session
) -> Trainee:
    """One adapter that works in both experts."""
    parts, turns = working.parts, working.turns
    first, second = (parts[expert] for expert in EXPERTS)
    share_parameters(first.model, second.model)
    steps = {expert: part.model.step for expert, part in parts.items()}
    step = TurningStep({name: one for name, one in steps.items() if isinstance(one, TrainStep)})
    model = replace(first.model, step=step)
    rates = {
        expert: learning_rate(part.config, part.build, part.model.techniques)
        for expert, part in parts.items()
    }

    def begin(expert: str) -> None:
        working.stage.bring(expert)
        step.working = expert

    engine = build_engine(config, model, first.build, world)
    return Trainee(
        engine=AlternatingEngine(
            {SHARED: engine}, lambda step: Turn(part=SHARED, model=turns.expert_at(step)), begin
        ),
        steps=data.steps,
        lr_at=lambda step: rates[turns.expert_at(step)](step),
        acting=model.techniques,
        techniques=model.techniques,
        outputs=(
            output_file(
                config, first.build, model, data, session, name=config.name, prefix=f"{SHARED}."
            ),
        ),
        validator=working.validator(data, world),
        sampled=working.transformer,
        num_trained=count(model.trainable),
        num_parameters=working.num_parameters,
        notes=working.notes(data.total_steps),
        turns=working.facts(),
    )


def _load(
    config: RunConfig,
    build: BuildContext,
    world: World,
    data: TrainingData,
    stage: OneAtATime,
    name: str,
    like: TrainedModel | None,
) -> _Part:
    """Load one expert with its adapter, and park it.

    `like` is a model whose techniques work here, too.
    """
    parked: list[Parked] = []
    sizes: list[int] = []

    def lay_out(transformer: WanTransformer) -> None:
        transformer.requires_grad_(requires_grad=False)
        blocks = transformer.blocks
        sizes.append(sum(value.numel() for value in transformer.parameters()))
        # Before the adapter comes: what that adds is no part of what is parked.
        parked.append(Parked.of(transformer, blocks, blocks.swap))

    model = build_model(
        config,
        build,
        world,
        data.order.largest_batch,
        # Those that an adapter brings along belong to its own layers.
        techniques=None if like is None else like.techniques[: len(config.techniques)],
        on_load=lay_out,
    )
    stage.add(name, parked[0], neighbours(world))
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # room for the other one, in pieces of another size
    return _Part(config, build, model, sizes[0])


def share_parameters(owner: TrainedModel, other: TrainedModel) -> None:
    """Let the adapter of `other` train the parameters of that of `owner`.

    Raises:
        ConfigError: they do not start as the same numbers, or do more than their layers, so that
            one cannot stand for both.
    """
    hint = 'set model.expert = "both" for an adapter each, or adapter.kind = "lora"'
    if owner.adapter.techniques():
        message = (
            "this kind of adapter keeps things of its own on each transformer: it cannot be shared"
        )
        raise ConfigError(problems=[Problem(message, "adapter.kind", hint=hint)])
    ours, theirs = owner.adapter.trainable(), other.adapter.trainable()
    alike = ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )
    if not alike:
        message = (
            "this adapter starts from the weights that it is added to, and those of the experts "
            "differ: it cannot be shared"
        )
        raise ConfigError(problems=[Problem(message, "model.expert", hint=hint)])
    names = {id(value): name for name, value in theirs.items()}
    for module in other.transformer.modules():
        for key, value in module._parameters.items():
            if value is not None and id(value) in names:
                module._parameters[key] = ours[names[id(value)]]


class AlternatingSteps:
    """`loop.Steps` of two experts, each of which goes through the data on its own."""

    def __init__(self, steps: TrainingSteps, turns: Turns) -> None:
        self._steps = steps
        self._turns = turns

    def starting_at(self, step: int) -> Iterator[Iterable[Batch]]:
        """Yield the microbatches of step `step` + 1, then of the next ones."""
        streams: dict[Expert, Generator[list[Batch], None, None]] = {}
        with ExitStack() as stack:
            while True:
                expert = self._turns.expert_at(step + 1)
                if expert not in streams:
                    own = self._turns.steps_of(expert, step)
                    streams[expert] = stack.enter_context(closing(self._steps.starting_at(own)))
                yield next(streams[expert])
                step += 1


class WhoseTurn(Technique):
    """Tells each step to the techniques of the expert that it trained, by that expert's count."""

    def __init__(self, techniques: Mapping[Expert, tuple[Technique, ...]], turns: Turns) -> None:
        self._techniques = techniques
        self._turns = turns

    def after_step(self, step: int) -> None:
        """Pass it on."""
        expert = self._turns.expert_at(step)
        for technique in self._techniques[expert]:
            technique.after_step(self._turns.steps_of(expert, step))


class ExpertValidator:
    """Measures at every timestep with the expert that works there."""

    def __init__(self, stage: OneAtATime, validators: Mapping[Expert, Validator]) -> None:
        self._stage = stage
        self._validators = validators

    def measure(self) -> ValidationResult:
        """Measure now. A collective call.

        Raises:
            NonFiniteError: on every rank, the loss of some item is NaN or infinite.
        """
        # The one that is there goes first, which saves a copy.
        order = sorted(self._validators, key=lambda expert: expert != self._stage.working)
        results = []
        for expert in order:
            self._stage.bring(expert)
            results.append(self._validators[expert].measure())
        return together(results)
