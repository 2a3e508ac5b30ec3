"""The parts of a training run, each built from the config: data, model, engine, plan."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from trainer.attention.sequence import SequenceGroup
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.experts import single_expert
from trainer.contract.intervals import Repeated
from trainer.contract.metadata import TrainingFacts, training_metadata
from trainer.contract.variants import Variant
from trainer.core.seams import (
    Adapter,
    BuildContext,
    Engine,
    LossSchedule,
    LRSchedule,
    OptimizerFactory,
    Technique,
)
from trainer.data.items import CachedDataset, TrainingItem
from trainer.data.loader import TrainingSteps
from trainer.data.order import BatchOrder, require_full_step
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.local import LocalEngine
from trainer.engine.process_group import World
from trainer.engine.running_average import AverageSettings
from trainer.jobs.build import (
    WeightsSource,
    build_objective,
    build_plugin,
    build_techniques,
    engine_kind,
    load_base,
    make_base,
    mask_problems,
    trained_transformer_file,
)
from trainer.jobs.companions import attach_companions
from trainer.jobs.deepspeed_settings import deepspeed_settings
from trainer.jobs.environment import menma_version
from trainer.jobs.neighbours import neighbours
from trainer.jobs.run_items import load_run_items, validation_settings
from trainer.models.wan.transformer import WanTransformer
from trainer.training.lr import LearningRate, LossWatch
from trainer.training.plan import Interval, Plan
from trainer.training.step import TrainStep, TurningStep
from trainer.training.validation import Validator


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The cached items of a run and the order they come in."""

    cached: CachedDataset
    order: BatchOrder
    steps: TrainingSteps
    total_steps: int
    validation: tuple[TrainingItem, ...] = ()
    """Cached items that are not trained on."""
    shared_clips: int = 0
    """Validation clips that are training clips, too."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The step, and what of it is trained."""

    transformer: WanTransformer
    adapter: Adapter
    techniques: tuple[Technique, ...]
    step: TrainStep | TurningStep

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters, then those of techniques, by name."""
        extra = {
            f"extra.{name}": parameter
            for name, parameter in self.step.extra.named_parameters()
            if parameter.requires_grad
        }
        return {**self.adapter.trainable(), **extra}


@dataclass(frozen=True, slots=True)
class Session:
    """One start of a run, for the metadata of its outputs."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_at: float = field(default_factory=time.time)


def open_data(config: RunConfig, variant: Variant, world: World, config_name: str) -> TrainingData:
    """Open the caches of a config's dataset.

    Raises:
        DataError: missing or stale caches, nothing to train on, or less than one step.
        ConfigError: there are masks and nothing uses them, or the other way round.
    """
    items = load_run_items(config, variant, config_name)
    cached = items.training
    problems = mask_problems(config, masks=any(item.has_mask for item in cached.items))
    if problems:
        raise ConfigError(problems=problems)
    buckets = config.objective.num_timestep_buckets
    order = BatchOrder(cached.items, config.training.seed, num_timestep_buckets=buckets)
    accumulation = config.training.gradient_accumulation_steps
    require_full_step(order, world_size=world.data_size, gradient_accumulation_steps=accumulation)
    steps = TrainingSteps(
        order,
        rank=world.data_rank,
        world_size=world.data_size,
        gradient_accumulation_steps=accumulation,
        pin_memory=world.device.type == "cuda",
    )
    epochs = config.training.epochs
    total = config.training.max_steps if epochs is None else steps.steps_for_epochs(epochs)
    return TrainingData(cached, order, steps, total, items.validation, items.shared_clips)


def source_names(config: RunConfig) -> list[str]:
    """Return what figures call the sources: folder or file, numbered where two are alike."""
    names = [source.media_path.name for source in config.load_all_sources().sources]
    return [
        name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names)
    ]


def build_model(
    config: RunConfig,
    build: BuildContext,
    world: World,
    largest_batch: int,
    weights: WeightsSource | None = None,
    *,
    techniques: tuple[Technique, ...] | None = None,
    on_load: Callable[[WanTransformer], None] = lambda _transformer: None,
) -> TrainedModel:
    """Load the transformer, add what is trained, and make the step.

    Args:
        config: of the run.
        build: for plug-ins.
        world: this process's place.
        largest_batch: items of the largest microbatch.
        weights: makes the transformer; None: from the config's file.
        techniques: as in `assemble_model`.
        on_load: told of the transformer before anything is added to it.

    Raises:
        ConfigError: adapter or techniques do not fit the model or the data.
        ModelFileError: the weights cannot be used.
    """
    # ZeRO-3 shards weights one by one on their way to the device; whole they might not fit it.
    device = torch.device("cpu") if config.distributed.zero_stage == 3 else world.device

    def load() -> WanTransformer:
        share = neighbours(world) if config.memory.swapped_blocks else None
        expert = single_expert(config)
        if weights is not None:
            transformer = make_base(config, weights, device=device, share=share)
            attach_companions(config, transformer, expert)
        else:
            path = trained_transformer_file(config)
            transformer = load_base(config, path, expert=expert, device=device, share=share)
        on_load(transformer)
        return transformer

    together = config.distributed.zero_stage == 3 and world.world_size > 1
    return assemble_model(
        config,
        build,
        largest_batch,
        load,
        sequence=world.sequence,
        techniques=techniques,
        any_rank=world.any_rank if together else None,
    )


def assemble_model(
    config: RunConfig,
    build: BuildContext,
    largest_batch: int,
    load: Callable[[], WanTransformer],
    *,
    sequence: SequenceGroup | None = None,
    techniques: tuple[Technique, ...] | None = None,
    any_rank: Callable[[bool], bool] | None = None,
) -> TrainedModel:
    """Put together the step around the transformer that `load` returns.

    It is loaded when nothing else can be wrong any more, since that takes longest.

    Args:
        config: of the run.
        build: what plug-ins are given.
        largest_batch: items of the largest microbatch.
        load: makes the transformer.
        sequence: the processes that compute each clip together; None: this one alone does.
        techniques: those of another model, to work here, too; None: the config's, made anew.
        any_rank: as in `TrainStep`.

    Raises:
        ConfigError: adapter or techniques do not fit the model or the data.
    """
    if techniques is None:
        techniques = build_techniques(config, build, largest_batch)
    objective = build_objective(config, build)
    adapter: Adapter = build_plugin(config.adapter, "kind", build, where="adapter")
    transformer = load()
    if sequence is not None:
        transformer.share_tokens(sequence)
    adapter.inject(transformer, config.training.seed)
    techniques = (*techniques, *adapter.techniques())
    for technique in techniques:
        transformer.blocks.add_hooks(technique.block_hooks())
    step = TrainStep(
        transformer,
        objective,
        techniques,
        config.training.seed,
        transformer.blocks.suspended,
        suspended_adapter=adapter.suspended,
        observe=build.observe_loss,
        any_rank=any_rank,
        part=0 if sequence is None else sequence.rank,
    )
    return TrainedModel(transformer, adapter, techniques, step.train())


def build_engine(
    config: RunConfig, model: TrainedModel, build: BuildContext, world: World
) -> Engine:
    """Make the engine that the config asks for, and tell the techniques of it.

    Raises:
        ConfigError: DeepSpeed is asked for and missing, several processes without it, or a
            technique cannot work with it.
    """
    engine = _make_engine(config, model, build, world)
    try:
        for technique in model.techniques:
            technique.connect(engine)
    except ConfigError:
        engine.close()
        raise
    return engine


def _make_engine(
    config: RunConfig, model: TrainedModel, build: BuildContext, world: World
) -> LocalEngine | DeepSpeedEngine:
    factory: OptimizerFactory = build_plugin(config.optimizer, "kind", build, where="optimizer")
    if engine_kind(config) == "local":
        if world.world_size > 1 or config.distributed.zero_stage:
            raise ConfigError(
                "several processes and ZeRO stages need DeepSpeed, which is not installed",
                hint="install it (Linux), or set num_processes = 1 and zero_stage = 0",
            )
        return LocalEngine(
            model.step,
            model.trainable,
            factory,
            device=world.device,
            max_grad_norm=config.optimizer.max_grad_norm,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            lr_scales=model.adapter.lr_scales(),
            max_grad_value=config.optimizer.max_grad_value,
            average=average_settings(config),
        )
    settings = deepspeed_settings(config, world.device)
    return DeepSpeedEngine(
        model.step,
        model.trainable,
        factory,
        world=world,
        lr_scales=model.adapter.lr_scales(),
        max_grad_value=config.optimizer.max_grad_value,
        average=average_settings(config),
        **settings,
    )


def average_settings(config: RunConfig) -> AverageSettings | None:
    """Return how the weights are averaged; None where they are not."""
    ema = config.ema
    if not ema.decay:
        return None
    return AverageSettings(
        decay=ema.decay,
        warmup=ema.warmup,
        every_steps=ema.every_steps,
        start_step=ema.start_step,
        device=ema.device,
    )


def build_validator(
    config: RunConfig, variant: Variant, model: TrainedModel, data: TrainingData, world: World
) -> Validator | None:
    """Return what measures the validation loss; None where none is wanted."""
    if not config.validation.repeats:
        return None
    settings = validation_settings(config, variant)
    return Validator(model.transformer, data.validation, settings, world)


def validation_notes(
    config: RunConfig, variant: Variant, data: TrainingData
) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing of a run's validation: kind of event, message."""
    if not data.validation:
        return
    section = config.validation
    settings = validation_settings(config, variant)
    if not section.repeats:
        yield (
            "log",
            f"{len(data.validation)} items are held out of training and not measured: "
            "validation.every_steps and every_epochs are 0",
        )
        return
    skipped = sorted(set(section.timesteps) - set(settings.timesteps))
    if skipped:
        listed = ", ".join(f"{timestep:g}" for timestep in skipped)
        yield (
            "log",
            f"not validated at timesteps {listed}: the other expert works there",
        )
    items = min(len(data.validation), section.max_items or len(data.validation))
    forwards = items * len(settings.timesteps) * settings.noises_per_timestep
    yield (
        "log",
        f"validation: {items} items, {forwards} predictions {section.in_words}",
    )
    if data.shared_clips:
        yield (
            "warning",
            f"{data.shared_clips} clips of validation.sources are training clips, too: the "
            "validation loss will look better than it is",
        )


def lr_schedule(config: RunConfig, build: BuildContext) -> LRSchedule:
    """Make the schedule of the learning rate."""
    schedule: LRSchedule = build_plugin(config.lr_schedule, "kind", build, where="lr_schedule")
    return schedule


def loss_watch(config: RunConfig, build: BuildContext, schedule: LRSchedule) -> LossWatch | None:
    """Return what tells a schedule of the losses; None: it does not go by them."""
    if not isinstance(schedule, LossSchedule):
        return None
    return LossWatch(
        schedule=schedule, warmup_steps=config.lr_schedule.warmup_of(build.total_steps)
    )


def learning_rate(
    config: RunConfig,
    build: BuildContext,
    techniques: Sequence[Technique] = (),
    schedule: LRSchedule | None = None,
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, with what techniques make of it.

    Args:
        config: of what is trained.
        build: for the schedule.
        techniques: that may have a say.
        schedule: of the rate; None: made anew.
    """
    course = LearningRate(
        base=config.optimizer.learning_rate,
        warmup_steps=config.lr_schedule.warmup_of(build.total_steps),
        total_steps=build.total_steps,
        schedule=lr_schedule(config, build) if schedule is None else schedule,
    )
    having_a_say = [t for t in techniques if type(t).lr_factor is not Technique.lr_factor]
    if not having_a_say:
        return course
    return lambda step: course(step) * math.prod(t.lr_factor(step) for t in having_a_say)


def plan(
    config: RunConfig,
    total_steps: int,
    epoch_after: Callable[[int], float],
    watch: LossWatch | None = None,
) -> Plan:
    """Return at which steps something is due.

    Args:
        config: of the run.
        total_steps: of the run.
        epoch_after: gives the epochs that were seen after a step.
        watch: what the learning rate goes by.
    """

    def interval(section: Repeated) -> Interval:
        return Interval(
            steps=section.every_steps, epochs=section.every_epochs, epoch_after=epoch_after
        )

    return Plan(
        total_steps=total_steps,
        checkpoint=interval(config.checkpoint),
        output=interval(config.output),
        validation=interval(config.validation),
        validate_first=watch is not None and watch.of_validation,
        validate_at_start=config.validation.repeats and config.validation.at_start,
        sample=interval(config.sampling),
        sample_at_start=config.sampling.at_start,
    )


def output_metadata(
    config: RunConfig,
    variant: Variant,
    data: TrainingData,
    session: Session,
    step: int,
    total_steps: int,
) -> Mapping[str, str]:
    """Return the header of the output file of `step`, one of `total_steps`."""
    facts = TrainingFacts(
        session_id=session.id,
        started_at=session.started_at,
        finished_at=time.time(),
        step=step,
        total_steps=total_steps,
        epoch=math.ceil(data.steps.epoch_after(step)),
        num_items=data.order.items_per_epoch,
        num_batches_per_epoch=data.order.batches_per_epoch,
        world_size=round(data.steps.epoch_after(1) * data.order.batches_per_epoch)
        // config.training.gradient_accumulation_steps,
        version=menma_version(),
    )
    return training_metadata(config, facts, variant=variant.name, expert=config.model.expert)
