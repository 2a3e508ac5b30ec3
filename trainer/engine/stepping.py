"""What every engine does the same way: microbatches, loss terms, learning rates, results."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.types import Batch, StepResult
from trainer.engine import state_edits, state_files
from trainer.engine.finite import TermSums
from trainer.engine.optimizer_groups import Counters, clip_values
from trainer.engine.process_group import World
from trainer.engine.running_average import AverageSettings, RunningAverage, kept
from trainer.engine.state_files import EngineState


class SteppingEngine(ABC):
    """Base of the engines: `core.seams.Engine` but for what touches gradients and storage.

    Args:
        module: the whole step; maps a `Batch` to loss terms, each of shape ().
        trainable: the trained parameters by canonical name; exactly those of `module` that
            require a gradient.
        world: this process's place.
        gradient_accumulation_steps: microbatches per update.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        world: World,
        gradient_accumulation_steps: int,
    ) -> None:
        _check_trainable(module, trainable)
        self.rank = world.rank
        self.world_size = world.world_size
        self.device = world.device
        self._world = world
        self._trainable = dict(trainable)
        self._accumulation = gradient_accumulation_steps
        self._means: dict[str, float] = {}
        self._optimizer: torch.optim.Optimizer
        self._average: RunningAverage | None = None
        self._counters = Counters([])

    def _adopt(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_value: float,
        average: AverageSettings | None,
    ) -> None:
        """Take the optimizer that was made, once the engine knows its flats.

        Args:
            optimizer: the one that updates the flats.
            max_grad_value: gradients are cut to this size, element by element; 0 leaves them.
            average: how weights are averaged; None: they are not.
        """
        self._optimizer = optimizer
        self._counters = Counters(optimizer.param_groups)
        if max_grad_value:
            clip_values(optimizer, max_grad_value)
        if average is not None:
            self._average = RunningAverage(average, self._state().flats)

    def forward_backward(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Run the microbatches of one step; return each loss term's mean over all ranks.

        `batches` is consumed lazily, so that the next batch is read while this one computes.

        Raises:
            NonFiniteError: on every rank, before any gradient of that microbatch exists; names
                the term, the rank and the clips.
            ValueError: not as many microbatches as `gradient_accumulation_steps`.
        """
        sums = TermSums(self._world)
        for batch in batches:
            if sums.count == self._accumulation:
                raise ValueError(f"more than {self._accumulation} microbatches in a step")
            terms = self._forward(batch.to(self.device))
            sums.add(terms, batch.names)
            loss = functools.reduce(operator.add, terms.values())
            self._backward(loss, last=sums.count == self._accumulation)
        if sums.count != self._accumulation:
            raise ValueError(f"{sums.count} microbatches in a step of {self._accumulation}")
        self._after_backward()
        self._means = sums.means()
        return dict(self._means)

    def update(self, lr: float) -> StepResult:
        """Clip, step the optimizer with this learning rate, zero the gradients.

        `grad_norm` is the L2 norm over all trained weights before clipping.

        Raises:
            NonFiniteError: on every rank, the gradient is NaN or infinite; the weights are
                untouched.
        """
        for group in self._param_groups():
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self._step()
        if self._average is not None:
            self._average.after_step(self._state().flats)
        return StepResult(terms=self._means, grad_norm=norm, lr=lr)

    @property
    def has_average(self) -> bool:
        """Whether a running average of the weights is kept."""
        return self._average is not None

    @contextmanager
    def inference_weights(self, *, averaged: bool) -> Iterator[None]:
        """Have the weights in the module that are for use, for the duration of a block.

        After it the engine goes on with the same bits as without it. A collective call.

        Args:
            averaged: the running average, where there is one that has begun; else, and without
                one, the trained weights, which some optimizers (schedule-free ones) have to switch
                to.
        """
        average = self._average
        if averaged and average is not None and average.started:
            state = self._state()
            with self._refreshed(), average.in_place_of(state.flats):
                self._refresh_weights()
                yield
        elif callable(switch := getattr(self._optimizer, "eval", None)):
            state = self._state()
            with self._refreshed(), kept(state.flats):
                with state.grouped():
                    switch()
                self._refresh_weights()
                try:
                    yield
                finally:
                    with state.grouped():
                        self._optimizer.train()  # type: ignore[attr-defined]  # goes with `eval`
        else:
            yield

    @contextmanager
    def _refreshed(self) -> Iterator[None]:
        """Bring the module in line with the flats after a block."""
        try:
            yield
        finally:
            self._refresh_weights()

    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer state into `folder`; every rank its own part.

        Raises:
            DiskError: the disk is full, read-only or gone.
        """
        state_files.save(self._state(), folder)

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote, on any engine and number of ranks. Collective.

        Raises:
            ModelFileError: damaged, of other trained parameters or of another optimizer.
        """
        state_files.load(self._state(), folder)
        self._refresh_weights()

    @property
    def has_elementwise_state(self) -> bool:
        """Whether the optimizer keeps one value an element, which `scale_state` needs."""
        return bool(self._state().state_names)

    def overwrite(self, values: Mapping[str, Tensor]) -> None:
        """Replace trained parameters, wherever they are kept. Collective.

        Args:
            values: whole, by canonical name, the same on every rank.
        """
        state_edits.overwrite_weights(self._state(), values)
        self._refresh_weights()

    def scale_state(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply the optimizer's state of parameters, value by value; its step count stays.

        Args:
            factors: of the parameters' shapes, by canonical name, the same on every rank.
        """
        state_edits.scale_state(self._state(), factors)

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean of a float32 tensor over all ranks, on its device. Collective."""
        return self._world.gather(values.flatten()).mean(dim=0).view_as(values)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._world.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on some rank. A collective call."""
        return self._world.any_rank(flag)

    @abstractmethod
    def full_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters, whole, float32 on the CPU; empty but on rank 0."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds."""

    @abstractmethod
    def _forward(self, batch: Batch) -> dict[str, Tensor]: ...

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abstractmethod
    def _after_backward(self) -> None: ...

    @abstractmethod
    def _param_groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def _step(self) -> float: ...

    @abstractmethod
    def _state(self) -> EngineState: ...

    @abstractmethod
    def _refresh_weights(self) -> None: ...


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], lr_scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return optimizer groups, one a learning-rate factor (1 where `lr_scales` is silent)."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(lr_scales.get(name, 1.0), []).append(parameter)
    return [{"params": members, "lr_scale": scale} for scale, members in groups.items()]


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters that no loss term reached a gradient of 0, as ZeRO does on its own.

    Otherwise AdamW would decay and move them under one engine and skip them under another.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _check_trainable(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> None:
    if not trainable:
        raise ValueError("nothing to train: no parameters were given to the engine")
    given = {id(parameter) for parameter in trainable.values()}
    inside = {id(parameter): name for name, parameter in module.named_parameters()}
    foreign = [name for name, parameter in trainable.items() if id(parameter) not in inside]
    frozen = [name for name, parameter in trainable.items() if not parameter.requires_grad]
    unnamed = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in given
    ]
    if foreign or frozen or unnamed or len(given) != len(trainable):
        raise ValueError(
            f"the trained parameters are not those of the module that require a gradient: "
            f"outside the module {foreign[:3]}, frozen {frozen[:3]}, not given {unnamed[:3]}"
        )
