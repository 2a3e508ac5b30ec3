"""Saving and restoring a run: checkpoints to resume from, outputs to take away, samples to see."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.contract.errors import ModelFileError, NonFiniteError
from trainer.contract.run_dir import RunDir
from trainer.core.seams import Adapter, Engine, Technique
from trainer.io.atomic_save import save_safetensors
from trainer.io.mapped_load import open_weights
from trainer.sampling.results import FinishedSample
from trainer.training.checkpoints import Checkpoint, CheckpointStore
from trainer.training.lr import LossWatch
from trainer.training.reporter import EventLog, RunReporter, write_peaks
from trainer.training.validation import ValidationResult

_TECHNIQUES = "techniques.safetensors"
_SCHEDULE = "lr_schedule"
_MUST_AGREE = {
    "variant": "model",
    "expert": "expert",
    "adapter": "adapter kind",
}
_AS_IT_WAS = "set it as it was, change the run's name, or start anew with --resume never"
_ORDER = "but items come in another order than without the interruption"
_MAY_CHANGE = {
    "base": (
        "the base model's file or a frozen adapter on it",
        "but what it has learned may belong to other weights",
    ),
    "techniques": ("the list of techniques", "with another loss"),
    "dataset": ("the clips or captions", _ORDER),
    "seed": ("the seed", _ORDER),
    "stream": (
        "the number of processes (those that share clips count as one) or "
        "gradient_accumulation_steps",
        _ORDER,
    ),
    "turns": (
        "how the experts share the steps, or the boundary between them",
        "but each expert's schedule and data go on from another place",
    ),
    "average": (
        "[ema]",
        "and the average of the weights with the new options, from the one that was kept if any",
    ),
}
"""Facts of a checkpoint: what changed, and what is otherwise then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint must agree with to be resumed."""

    variant: str
    expert: str | None
    """Wan 2.2: the expert that is trained, or how both are."""
    adapter: str
    """Kind of adapter."""
    base: str
    """Fingerprint of the transformer's file and of the frozen adapters on it."""
    dataset: str
    """Fingerprint of the cached items."""
    seed: int
    stream: Mapping[str, int] = field(default_factory=dict)
    """What decides which microbatches a step takes: processes (those that share clips count as
    one) and accumulation."""
    turns: Mapping[str, float] | None = None
    """How two experts share the steps."""
    average: Mapping[str, float] | None = None
    """How the weights are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """What of the trained parameters is written into a file, and how."""

    name: str
    adapter: Adapter
    layout: str
    dtype: torch.dtype
    metadata: Callable[[int], Mapping[str, str]]
    """Header strings for the file of a step."""
    prefix: str = ""
    """Of the adapter's parameters among those of the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageUse:
    """What is made with the running average of the weights, where there is one."""

    samples: bool = True
    validation: bool = True


class Validation(Protocol):
    """Measures the validation loss; a collective call."""

    def measure(self) -> ValidationResult:
        """Measure now.

        Raises:
            NonFiniteError: on every rank, the loss of some item is NaN or infinite.
        """
        ...


class RunKeeper:
    """Implements `loop.Keeper` for one run. Every method is collective."""

    def __init__(  # noqa: PLR0913 - the composition root hands over every part by name
        self,
        *,
        engine: Engine,
        store: CheckpointStore,
        techniques: Sequence[Technique],
        run_dir: RunDir,
        emit: EventLog,
        reporter: RunReporter,
        identity: Identity,
        outputs: Sequence[OutputFile],
        resume: Checkpoint | None,
        make_samples: Callable[[int], Sequence[FinishedSample]] | None,
        validator: Validation | None,
        average_use: AverageUse | None = None,
        keep_outputs: int | None = None,
        watch: LossWatch | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._techniques = techniques
        self._run_dir = run_dir
        self._emit = emit
        self._reporter = reporter
        self._identity = identity
        self._outputs = tuple(outputs)
        self._resume = resume
        self._make_samples = make_samples
        self._validator = validator
        self._average_use = average_use or AverageUse()
        self._keep_outputs = keep_outputs
        self._watch = watch
        self._saved_at = -1

    def restore(self) -> int:
        """Load the checkpoint to resume from, if any; return its step, else 0.

        Raises:
            ModelFileError: it is of another model, expert or adapter, or its state does not fit.
        """
        checkpoint = self._resume
        if checkpoint is None:
            return 0
        self._refuse_others(checkpoint)
        self._warn_of_changes(checkpoint)
        self._engine.load_state(checkpoint.path)
        self._load_techniques(checkpoint.path)
        self._load_schedule(checkpoint)
        self._emit("log", message=f"resumed from {checkpoint.path} at step {checkpoint.step}")
        self._saved_at = checkpoint.step
        return checkpoint.step

    def _load_schedule(self, checkpoint: Checkpoint) -> None:
        if self._watch is None:
            return
        state = checkpoint.progress.get(_SCHEDULE)
        if state is not None:
            self._watch.schedule.load_state(state)
            return
        self._emit(
            "warning",
            message=f"{checkpoint.path.name} does not know what the learning rate goes by: it is "
            "the full one again, and the losses are watched from here",
        )

    def checkpoint(self, step: int) -> None:
        """Save the full training state."""
        if step == self._saved_at:
            return
        with self._reporter.paused():
            progress = {**self._facts(), "step": step}
            if self._watch is not None:
                progress[_SCHEDULE] = self._watch.schedule.state()
            saved = self._store.save(step, self._save_techniques, progress, self._engine)
        self._saved_at = step
        self._emit("checkpoint", step=step, path=str(saved.path))
        if self._engine.rank == 0:
            write_peaks(self._run_dir.peaks, self._engine.device)

    def output(self, step: int, *, final: bool) -> None:
        """Write `output/<name>.safetensors`, or `<name>-step00000500.safetensors` on the way.

        The running average of the weights, where there is one, is `<name>-ema.safetensors`.
        """
        with self._reporter.paused():
            self._write_outputs(step, averaged=False, final=final)
            if self._engine.has_average:
                self._write_outputs(step, averaged=True, final=final)
            if not final and self._keep_outputs is not None and self._engine.rank == 0:
                self._remove_outputs(step, self._keep_outputs)

    def _remove_outputs(self, step: int, kept: int) -> None:
        """Leave the newest files on the way, up to `step`, of each output and its average."""
        for stem in (f"{output.name}{kind}" for output in self._outputs for kind in ("", "-ema")):
            pattern = re.compile(rf"{re.escape(stem)}-step(\d{{8,}})\.safetensors")
            found = [
                (int(match[1]), path)
                for path in self._run_dir.output.iterdir()
                if (match := pattern.fullmatch(path.name)) and int(match[1]) <= step
            ]
            for _, path in sorted(found)[:-kept]:
                path.unlink(missing_ok=True)

    def _write_outputs(self, step: int, *, averaged: bool, final: bool) -> None:
        with self._engine.inference_weights(averaged=averaged):
            state = self._engine.full_parameters()
        if self._engine.rank == 0:
            for output in self._outputs:
                self._write_output(output, state, step, averaged=averaged, final=final)
        self._engine.barrier()

    def _write_output(
        self,
        output: OutputFile,
        state: Mapping[str, Tensor],
        step: int,
        *,
        averaged: bool,
        final: bool,
    ) -> None:
        stem = f"{output.name}-ema" if averaged else output.name
        name = stem if final else f"{stem}-step{step:08d}"
        path = self._run_dir.output / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = dict(output.metadata(step))
        if averaged:
            metadata |= {"ss_output_name": stem, "menma.averaged_weights": "true"}
        output.adapter.write_output(
            {name: state[output.prefix + name] for name in output.adapter.trainable()},
            path,
            layout=output.layout,
            dtype=output.dtype,
            metadata=metadata,
        )
        self._emit("output", step=step, path=str(path), final=final)

    def validate(self, step: int) -> None:
        """Measure and report the validation loss; a run without validation has none.

        A loss that is not finite is a warning: whether training can go on, the next step finds out.
        """
        if self._validator is None:
            return
        averaged = self._average_use.validation
        with self._reporter.paused(), self._engine.inference_weights(averaged=averaged):
            try:
                result = self._validator.measure()
            except NonFiniteError as error:
                self._emit("warning", message=f"step {step}: {error.message}", hint=error.hint)
                return
        if self._watch is not None:
            self._watch.validated(step, result.loss)
        self._emit(
            "validation",
            step=step,
            loss=result.loss,
            by_timestep={f"{t:.10g}": loss for t, loss in result.by_timestep.items()},
            items=result.num_items,
            seconds=round(result.seconds, 3),
        )

    def sample(self, step: int) -> None:
        """Make the samples of this step; a run without prompts has none."""
        if self._make_samples is None:
            return
        averaged = self._average_use.samples
        with self._reporter.paused(), self._engine.inference_weights(averaged=averaged):
            for sample in self._make_samples(step):
                self._emit("sample", step=step, **sample.fields())
            self._engine.barrier()

    def _facts(self) -> dict[str, Any]:
        """Return what a later run is compared with."""
        return {
            **asdict(self._identity),
            "facts": dict(self._outputs[0].adapter.facts),
            "techniques": [type(technique).__name__ for technique in self._techniques],
        }

    def _refuse_others(self, checkpoint: Checkpoint) -> None:
        ours, saved = self._facts(), checkpoint.progress
        for key, name in _MUST_AGREE.items():
            if saved.get(key) != ours[key]:
                raise ModelFileError(
                    f"{checkpoint.path} is of another {name}: {saved.get(key)}, not {ours[key]}",
                    hint=_AS_IT_WAS,
                )
        before, now = saved.get("facts") or {}, ours["facts"]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise ModelFileError(
                    f"{checkpoint.path} is of an adapter with another {key}: {before.get(key)}, "
                    f"not {now.get(key)}",
                    hint=_AS_IT_WAS,
                )

    def _warn_of_changes(self, checkpoint: Checkpoint) -> None:
        ours, saved = self._facts(), checkpoint.progress
        for key, (what, effect) in _MAY_CHANGE.items():
            if saved.get(key) != ours[key]:
                self._emit(
                    "warning",
                    message=f"{what} changed since {checkpoint.path.name}: training goes on, "
                    f"{effect}",
                )

    def _technique_state(self) -> dict[str, Tensor]:
        return {
            f"{prefix}{name}": tensor
            for prefix, technique in self._technique_prefixes()
            for name, tensor in technique.state_dict().items()
        }

    def _technique_prefixes(self) -> list[tuple[str, Technique]]:
        # With the class's name: in another order, state would reach the wrong technique.
        return [
            (f"{index}.{type(technique).__name__}.", technique)
            for index, technique in enumerate(self._techniques)
        ]

    def _save_techniques(self, folder: Path) -> None:
        state = self._technique_state()
        if state and self._engine.rank == 0:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_safetensors(tensors, folder / _TECHNIQUES, {})

    def _load_techniques(self, folder: Path) -> None:
        path = folder / _TECHNIQUES
        if not path.is_file():
            return
        weights, prefixes = open_weights(path), self._technique_prefixes()
        known = tuple(prefix for prefix, _ in prefixes)
        foreign = sorted(name for name in weights if not name.startswith(known))
        if foreign:
            raise ModelFileError(
                f"{path} holds the state of a technique that this run does not have there: "
                f"{foreign[0]}",
                hint="list the techniques as they were, or start anew with --resume never",
            )
        for prefix, technique in prefixes:
            technique.load_state_dict(
                {
                    name.removeprefix(prefix): weights.read(name).clone()
                    for name in weights
                    if name.startswith(prefix)
                }
            )
