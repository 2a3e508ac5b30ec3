"""The job `train`: from a config to a running loop. The composition root."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.config_io import dump_config
from trainer.contract.config_rules import check_files
from trainer.contract.errors import DiskError, MenmaError
from trainer.contract.events import EventWriter
from trainer.contract.experts import for_expert, single_expert, trains_both
from trainer.contract.files import write_json, write_text
from trainer.contract.jobs import TrainRequest
from trainer.contract.optimizer_rules import optimizer_notes
from trainer.contract.run_dir import Request, RunDir
from trainer.contract.variants import Variant
from trainer.core.seams import BuildContext, Engine
from trainer.data.loader import load_text
from trainer.engine import process_group
from trainer.engine.failures import failing_together
from trainer.engine.process_group import World
from trainer.engine.sequence import sharing_clips
from trainer.jobs.adapter_checks import require_sound_adapter
from trainer.jobs.agreement import require_same, require_shared_folder
from trainer.jobs.automatic_memory import memory_values, resolve_for_training
from trainer.jobs.base import INTERRUPTED, Emit, Stopped, explain
from trainer.jobs.build import base_identity, pick_device
from trainer.jobs.components import settle_variant, with_variant
from trainer.jobs.config_job import read_config
from trainer.jobs.environment import describe_environment, ground
from trainer.jobs.loraid_checks import slot_in_words
from trainer.jobs.sample_preview import previews
from trainer.jobs.start import run_elsewhere, take_place
from trainer.jobs.train_experts import two_transformers
from trainer.jobs.train_parts import (
    Session,
    TrainingData,
    open_data,
    plan,
    source_names,
    validation_notes,
)
from trainer.jobs.train_samples import TrainingSamples
from trainer.jobs.trainee import Trainee, one_transformer
from trainer.loop import End, Run
from trainer.loop import train as run_loop
from trainer.training.checkpoints import Checkpoint, CheckpointStore
from trainer.training.details import LossDetails, weight_norms
from trainer.training.figure_sinks import figure_sinks
from trainer.training.keeper import AverageUse, Identity, RunKeeper
from trainer.training.reporter import EventLog, RunReporter, write_peaks
from trainer.training.requests import Requests

_CONSOLE_INTERVAL_S = 10.0


def run(request: TrainRequest, emit: Emit) -> None:
    """Train in this process, or start one process a GPU, here or on several machines, and wait.

    Raises:
        Stopped: a signal or a request ended the run early; its state is saved.
        MenmaError: the config, the data, the weights or the machine do not do.
    """
    take_place()
    config = read_config(request, "train")
    code = run_elsewhere(config, request.config)
    if code == INTERRUPTED:
        raise Stopped
    if code:
        raise SystemExit(code)  # the process that failed has said why
    if code is not None:
        return
    device = pick_device(config)
    with process_group.joined(device.type, config.distributed.timeout_s) as world:
        TrainingRun(config, request, world).run()


class TrainingRun:
    """Builds everything one run needs, runs the loop, and says how it ended."""

    def __init__(self, config: RunConfig, request: TrainRequest, world: World) -> None:
        self.config = config
        self.request = request
        self.world = world
        self.run_dir = RunDir(config.run_dir)
        self.session = Session()
        self.emit = EventLog()

    def run(self) -> None:
        """Train to the end or to a stop.

        Raises:
            Stopped: the run was asked to stop; its state is saved.
        """
        try:
            with failing_together(self.world, explain):
                if self.world.rank == 0:
                    self._open_logs()
                end = self._train()
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(DiskError):  # the log may be on a full disk; the error is what counts
                if isinstance(error, MenmaError):
                    self.emit("error", message=error.message[:8000], hint=error.hint)
                self.emit("end", reason=reason, message=str(error)[:4000])
            raise
        self.emit("end", reason=str(end))
        if end is End.STOPPED:
            raise Stopped

    def _train(self) -> End:
        distributed = self.config.distributed
        self.world = world = sharing_clips(
            self.world, distributed.sequence_parallel, distributed.timeout_s
        )
        # Whatever can be wrong is found in the order of its cost: headers, caches, then weights.
        variant = settle_variant(self.config)
        require_sound_adapter(self.config)
        hosts = require_same(world, ground(self.config))
        require_shared_folder(world, hosts, self.run_dir.root, distributed.timeout_s)
        config = resolve_for_training(self.config, variant, world, self.emit)
        if (expert := single_expert(config)) is not None:
            config = for_expert(config, expert, variant.expert_boundary)
        self.config = config
        data = open_data(config, variant, world, str(self.request.config))
        require_same(world, {"dataset": data.cached.fingerprint})
        keep = config.checkpoint.keep_last
        store = CheckpointStore(self.run_dir.checkpoints, keep, warn=self._warn)
        resume = self._resume(store)
        losses = LossDetails(source_names(config), world, config.logging.details_every_steps)
        build = BuildContext(
            variant=variant,
            seed=config.training.seed,
            device=world.device,
            total_steps=data.total_steps,
            resumes=resume is not None,
            encoded=lru_cache(maxsize=16)(partial(load_text, data.cached)),
            observe_loss=losses.observe,
        )
        samples = self._samples(variant)
        self.emit("phase", name="load", detail="transformer")
        make = two_transformers if trains_both(config) else one_transformer
        trainee = make(config, build, world, data, self.session)
        self._describe(trainee, data, variant)
        engine = trainee.engine
        if samples is not None:
            samples.use(trainee.sampled)
        reporter = self._reporter(data, losses, engine)
        with ExitStack() as stack:
            stack.callback(engine.close)
            requests = stack.enter_context(self._requests(engine, samples))
            keeper = self._keeper(trainee, data, store, resume, reporter, samples, build)
            end = run_loop(
                Run(
                    engine=engine,
                    steps=trainee.steps,
                    lr_at=trainee.lr_at,
                    techniques=trainee.acting,
                    plan=plan(config, data.total_steps, data.steps.epoch_after, trainee.watch),
                    watch=trainee.watch,
                    keeper=keeper,
                    reporter=reporter,
                    requests=requests,
                )
            )
            if world.rank == 0:
                write_peaks(self.run_dir.peaks, world.device)
        return end

    def _requests(self, engine: Engine, samples: TrainingSamples | None) -> Requests:
        refused: dict[Request, str] = {}
        if samples is None:
            refused["sample"] = "this run has no prompts to sample, or lacks what they need"
        every_s = 60 * self.config.checkpoint.every_minutes
        return Requests(self.run_dir, engine, self.emit, refused, save_every_s=every_s)

    def _reporter(self, data: TrainingData, losses: LossDetails, engine: Engine) -> RunReporter:
        norms = partial(
            weight_norms,
            every_steps=self.config.logging.weight_norms_every_steps,
            parameters=engine.full_parameters,
        )
        return RunReporter(
            self.emit,
            self.world.device,
            1 / data.steps.epoch_after(1),
            sum(group.appearances for group in data.order.groups),
            [losses, norms],
        )

    def _keeper(
        self,
        trainee: Trainee,
        data: TrainingData,
        store: CheckpointStore,
        resume: Checkpoint | None,
        reporter: RunReporter,
        samples: TrainingSamples | None,
        build: BuildContext,
    ) -> RunKeeper:
        config, variant = self.config, build.variant
        return RunKeeper(
            engine=trainee.engine,
            store=store,
            techniques=trainee.techniques,
            run_dir=self.run_dir,
            emit=self.emit,
            reporter=reporter,
            identity=Identity(
                variant=variant.name,
                expert=config.model.expert,
                adapter=config.adapter.kind,
                base=base_identity(config),
                dataset=data.cached.fingerprint,
                seed=config.training.seed,
                stream={
                    "processes": self.world.data_size,
                    "accumulation": config.training.gradient_accumulation_steps,
                },
                turns=trainee.turns,
                average=_average_facts(config),
            ),
            outputs=trainee.outputs,
            resume=resume,
            make_samples=samples,
            validator=trainee.validator,
            keep_outputs=config.output.keep_last,
            watch=trainee.watch,
            average_use=AverageUse(
                samples=config.ema.use_for_samples, validation=config.ema.use_for_validation
            ),
        )

    def _samples(self, variant: Variant) -> TrainingSamples | None:
        """Encode the prompts; None where there are none, or nobody waits for samples of them."""
        sampling = self.config.sampling
        if not sampling.prompts and sampling.prompts_file is None:
            return None
        missing = check_files(with_variant(self.config, variant), "sample")
        if missing and not sampling.while_training:
            self.emit(
                "log",
                message="this run cannot make samples when asked to: "
                + "; ".join(str(problem) for problem in missing),
            )
            return None
        self.emit("phase", name="load", detail="encoders, for samples")
        world, folder = self.world, self.run_dir.samples
        drawn = None
        if world.rank == 0:
            drawn = previews(self.config, variant, world.device, folder, self.emit)
        return TrainingSamples(self.config, variant, world, folder, self._warn, drawn)

    def _resume(self, store: CheckpointStore) -> Checkpoint | None:
        """Let rank 0 choose, so that all ranks resume from the same checkpoint."""
        path = ""
        if self.world.rank == 0:
            store.tidy()
            found = store.resolve(self.request.resume)
            path = str(found.path) if found else ""
        path = self.world.text_of_rank_0(path)
        return store.resolve(path) if path else None

    def _warn(self, message: str) -> None:
        self.emit("warning", message=message)

    def _open_logs(self) -> None:
        self.run_dir.root.mkdir(parents=True, exist_ok=True)
        writer = EventWriter(self.run_dir.events)
        self.emit.add(lambda event: writer(event["type"], **_without_type(event)))
        self.emit.add(Console())
        for sink in figure_sinks(self.config, self.run_dir):
            self.emit.add(sink)
        write_text(self.run_dir.config, dump_config(self.config, base=Path.cwd()))

    def _describe(self, trainee: Trainee, data: TrainingData, variant: Variant) -> None:
        if self.world.rank != 0:
            return
        self.emit(
            "log",
            message=f"{trainee.num_trained:,} of {trainee.num_parameters:,} parameters are "
            f"trained; {len(data.cached.items)} items, {data.order.batches_per_epoch} batches an "
            f"epoch, {data.total_steps} steps",
            num_trained=trainee.num_trained,
            num_parameters=trainee.num_parameters,
        )
        trained = trainee.outputs[0].adapter.trainable()
        layers = dict.fromkeys(name.rpartition(".")[0] for name in trained)
        if (slot := slot_in_words(self.config, layers, trainee.num_trained)) is not None:
            self.emit("log", message=slot, modules=list(layers))
        if self.world.sequence is not None:
            message = f"{self.world.sequence.size} processes share the tokens of each clip"
            self.emit("log", message=message)
        for note in trainee.notes:
            self.emit("log", message=note)
        for note in optimizer_notes(self.config):
            self.emit("warning", message=note)
        for kind, message in validation_notes(self.config, variant, data):
            self.emit(kind, message=message)
        for problem in data.cached.problems:
            self.emit("warning", message=f"not used: {problem}")
        environment = describe_environment(
            world_size=self.world.world_size,
            dataset_fingerprint=data.cached.fingerprint,
            memory=memory_values(self.config),
        )
        write_json(self.run_dir.environment, environment)


class Console:
    """Says in plain lines what happens, for `console.log`; steps at most every ten seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Print one event to stderr, if it is worth a line."""
        text = self._text(event)
        if text:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _text(self, event: Mapping[str, Any]) -> str:
        kind = event["type"]
        if kind == "step":
            now, last = time.monotonic(), event["step"] == event["total_steps"]
            if now - self._last < _CONSOLE_INTERVAL_S and not last:
                return ""
            self._last = now
            return (
                f"step {event['step']}/{event['total_steps']}  loss {event['loss']:.4f}  "
                f"lr {event['lr']:.3g}  {event['step_time_s']:.2f} s/step"
            )
        if kind in {"log", "warning"}:
            prefix = "warning: " if kind == "warning" else ""
            return f"{prefix}{event['message']}"
        if kind == "validation":
            return f"validation at step {event['step']}: loss {event['loss']:.4f}"
        if kind in {"checkpoint", "output", "sample"}:
            return f"{kind}: {event['path']}"
        if kind == "phase":
            return f"{event['name']}: {event.get('detail', '')}"
        return ""


def _average_facts(config: RunConfig) -> dict[str, float] | None:
    """Return what an average of weights depends on."""
    if not config.ema.decay:
        return None
    return config.ema.model_dump(include={"decay", "warmup", "every_steps", "start_step"})


def _without_type(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "type"}
