"""What a run trains, ready for the loop: with one transformer here, with two in `train_experts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from trainer.contract.config import RunConfig
from trainer.contract.experts import single_expert
from trainer.contract.variants import Expert
from trainer.core.seams import BuildContext, Engine, Technique
from trainer.engine.process_group import World
from trainer.jobs.build import DTYPES
from trainer.jobs.train_parts import (
    Session,
    TrainedModel,
    TrainingData,
    build_engine,
    build_model,
    build_validator,
    learning_rate,
    loss_watch,
    lr_schedule,
    output_metadata,
)
from trainer.loop import Steps
from trainer.models.wan.transformer import WanTransformer
from trainer.training.keeper import OutputFile, Validation
from trainer.training.lr import LossWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """The parts of a run that depend on how many transformers are trained."""

    engine: Engine
    steps: Steps
    lr_at: Callable[[int], float]
    acting: tuple[Technique, ...]
    """What the loop tells of each step."""
    techniques: tuple[Technique, ...]
    """All of them, whose state is kept."""
    outputs: tuple[OutputFile, ...]
    validator: Validation | None
    sampled: Callable[[Expert], WanTransformer | None]
    """Returns a trained transformer, ready to work; None: this expert is not trained."""
    num_trained: int
    """Parameters."""
    num_parameters: int
    """All of them."""
    notes: tuple[str, ...] = ()
    """What is worth saying before the start."""
    watch: LossWatch | None = None
    """What tells the schedule of the learning rate of losses; None: it does not go by them."""
    turns: Mapping[str, float] | None = None
    """How two experts share the steps, for a checkpoint to be compared with."""


def one_transformer(
    config: RunConfig, build: BuildContext, world: World, data: TrainingData, session: Session
) -> Trainee:
    """Load the transformer and build what trains it.

    Args:
        config: of the run; what is special to an expert stands in its general sections.
        build: for plug-ins.
        world: this process's place.
        data: what it is trained on.
        session: for the metadata of outputs.

    Raises:
        ConfigError: adapter or techniques do not fit the model or the data.
        ModelFileError: the weights cannot be used.
    """
    model = build_model(config, build, world, data.order.largest_batch)
    expert = single_expert(config)
    schedule = lr_schedule(config, build)
    return Trainee(
        num_trained=count(model.trainable),
        num_parameters=sum(value.numel() for value in model.transformer.parameters()),
        engine=build_engine(config, model, build, world),
        steps=data.steps,
        lr_at=learning_rate(config, build, model.techniques, schedule),
        watch=loss_watch(config, build, schedule),
        acting=model.techniques,
        techniques=model.techniques,
        outputs=(output_file(config, build, model, data, session, name=config.name),),
        validator=build_validator(config, build.variant, model, data, world),
        sampled=lambda wanted: model.transformer if expert in {None, wanted} else None,
        notes=quantisation_notes(model.transformer),
    )


def output_file(
    config: RunConfig,
    build: BuildContext,
    model: TrainedModel,
    data: TrainingData,
    session: Session,
    *,
    name: str,
    prefix: str = "",
    steps_of: Callable[[int], int] = lambda step: step,
) -> OutputFile:
    """Return how what `model` has learned is written.

    Args:
        config: of what it trains.
        build: as for its plug-ins.
        model: the model.
        data: what it is trained on.
        session: for the metadata.
        name: of the file.
        prefix: of its parameters among those of the engine.
        steps_of: given a step of the run, the steps that trained it.
    """

    def metadata(step: int) -> Mapping[str, str]:
        own = steps_of(step)
        told = output_metadata(config, build.variant, data, session, own, build.total_steps)
        return {**told, "ss_output_name": name}

    return OutputFile(
        name=name,
        adapter=model.adapter,
        layout=config.output.layout,
        dtype=DTYPES[config.output.dtype],
        metadata=metadata,
        prefix=prefix,
    )


def count(parameters: Mapping[str, nn.Parameter]) -> int:
    """Return how many numbers these parameters have."""
    return sum(parameter.numel() for parameter in parameters.values())


def quantisation_notes(transformer: WanTransformer) -> tuple[str, ...]:
    """Return what fp8 has made of a transformer's weights, where they are fp8."""
    quantisation = transformer.quantisation
    return () if quantisation is None else (quantisation.in_words(),)
